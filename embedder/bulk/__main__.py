"""`python -m embedder.bulk INPUT OUTPUT`: every row of INPUT gets its vector, or its error, in OUTPUT, exactly once.

The model and its limits are the service's: the same `EMBEDDER_` variables. After a crash or a kill the same command
goes on where it stood. Exit status: 0 all rows are in OUTPUT, 1 some are not yet, 2 nothing could be begun.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, get_args

try:
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from tqdm import tqdm

    from embedder.bulk.worker import PARTS_AT_ONCE, Job, Worker
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: pip install -e '.[bulk]'") from None

from embedder.bulk.formats import Part
from embedder.bulk.source import Columns, Source
from embedder.bulk.writer import OutputFormat, Writer, output_schema
from embedder.engine.postprocess import OutputDtype, check_dimensions
from embedder.errors import ModelUnavailable, UnsupportedDimensions
from embedder.model.checkpoint import Checkpoint, find_checkpoint
from embedder.settings import Settings

OBJECT_STORE_BYTES = 80 * 2**20  # about the least that Ray takes; nothing but counts goes through it


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        job = _job(chosen)
        checkpoint = find_checkpoint(job.settings)
        hidden_size = json.loads((checkpoint.folder / "config.json").read_text())["text_config"]["hidden_size"]
        check_dimensions(job.dimensions, hidden_size)
        source = Source(job.input, job.columns, job.settings)
        parts = source.parts(chosen.rows_per_part)
        writer = Writer(job.output, job.output_format)
        note = _begin(writer, _identity(job, checkpoint, source, parts))
    except (ValueError, OSError, ModelUnavailable, UnsupportedDimensions) as error:
        parser.error(str(error))
    with note:
        writer.remove_unfinished()
        try:
            is_complete = _embed(job, parts, writer, chosen.address)
        except (ray.exceptions.RayError, ConnectionError) as error:
            print(f"stopped: {error}\nthe same command goes on where this one stood", file=sys.stderr)
            return 1
        if is_complete:
            schema = output_schema(source.id_type, job.dimensions or hidden_size, job.output_dtype)
            writer.commit(schema, [part.number for part in parts])
    return 0 if is_complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m embedder.bulk", description=__doc__)
    parser.add_argument("input", type=Path, help="Parquet, JSONL, WebDataset tar, a folder of them, or one of images")
    parser.add_argument("output", type=Path, help="folder (on a cluster: on a file system that all nodes share)")
    parser.add_argument("--format", choices=get_args(OutputFormat), default="parquet")
    for name, what in {
        "text": "column of the text",
        "image": "column of the image: bytes, base64, data URI, or a path inside the folder of INPUT",
        "video": "column of the clip: likewise",
        "instruction": "column of the instruction (default: EMBEDDER_DEFAULT_INSTRUCTION)",
        "id": "column that names the row in OUTPUT (default: its file and number, of a picture its path)",
    }.items():
        parser.add_argument(f"--{name}", metavar="COLUMN", help=what)
    parser.add_argument("--dimensions", type=int, help="size of the vectors (default: all)")
    parser.add_argument("--output-dtype", choices=get_args(OutputDtype), default="float32")
    parser.add_argument("--rows-per-part", type=int, default=4096, help="rows in one file of OUTPUT (%(default)s)")
    parser.add_argument("--address", help="a Ray cluster (default: this machine)")
    return parser


def _job(chosen: argparse.Namespace) -> Job:
    """Raises `ValueError`."""
    settings = Settings.from_environment()
    if settings.device.startswith("cuda:"):
        raise ValueError(f"EMBEDDER_DEVICE={settings.device}: Ray deals out the GPUs; limit it by CUDA_VISIBLE_DEVICES")
    if chosen.rows_per_part < 1:
        raise ValueError(f"--rows-per-part: got {chosen.rows_per_part}; allowed: 1 and more")
    source, output = chosen.input.resolve(), chosen.output.resolve()
    if output.is_relative_to(source):
        raise ValueError(f"{chosen.output} lies in {chosen.input}: it would be read as input")
    columns = Columns(chosen.text, chosen.image, chosen.video, chosen.instruction, chosen.id)
    return Job(source, output, chosen.format, columns, chosen.dimensions, chosen.output_dtype, settings)


def _identity(job: Job, checkpoint: Checkpoint, source: Source, parts: Sequence[Part]) -> dict[str, Any]:
    """What must be the same for parts of two runs to belong together."""
    files = [(name, (source.folder / name).stat()) for name in source.names]
    read = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files], [part.to_json() for part in parts]
    settings = job.settings
    return {
        "input": hashlib.sha256(json.dumps(read).encode()).hexdigest(),
        "parts": len(parts),
        "format": job.output_format,
        "columns": asdict(job.columns),
        "dimensions": job.dimensions,
        "output_dtype": job.output_dtype,
        "model": f"{checkpoint.name} {checkpoint.revision}".strip(),
        "dtype": settings.dtype,
        "default_instruction": settings.default_instruction,
        "max_pixels": settings.max_pixels,
        "max_input_tokens": settings.max_input_tokens,
    }


def _begin(writer: Writer, identity: dict[str, Any]) -> TextIO:
    """Take the output: the file's lock goes when it is closed, or with this process.

    Raises `ValueError` where another run has it, or it was begun otherwise.
    """
    writer.notes.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as on_error:
        note = on_error.enter_context((writer.notes / "job.json").open("a+"))
        try:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{note.name}: another run is writing this output") from None
        note.seek(0)
        begun = json.loads(note.read() or "{}")
        if begun and (other := [name for name in identity if begun.get(name) != identity[name]]):
            raise ValueError(f"the output was begun with another {', '.join(other)}: see {note.name}")
        if not begun:
            note.write(json.dumps(identity, indent=1))
            note.flush()
        on_error.pop_all()
    return note


def _embed(job: Job, parts: Sequence[Part], writer: Writer, address: str | None) -> bool:
    """Whether all parts are written now."""
    left = [part for part in parts if not writer.is_written(part.number)]
    total = sum(part.num_rows for part in parts)
    done = total - sum(part.num_rows for part in left)
    rows, errors, faults = 0, 0, []
    with tqdm(total=total or None, initial=done, unit="row", smoothing=0.1) as bar:
        for counts in _run(job, left, address) if left else ():
            rows, errors = rows + counts["rows"], errors + counts["errors"]
            bar.update(counts["rows"])
            bar.set_postfix(errors=errors)
            if counts["fault"]:
                faults.append(counts["fault"])
                bar.write(f"not written: {counts['fault']}", file=sys.stderr)
    print(f"{rows} rows, {errors} of them errors; {len(left) - len(faults)} parts written, {len(faults)} not")
    return not faults


def _run(job: Job, parts: Sequence[Part], address: str | None) -> Iterator[dict[str, Any]]:
    """What the workers say of each part, as they finish."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        ray.init(address)
    else:
        os.environ.setdefault("RAY_worker_niceness", "0")  # its 15 is for who works at the machine: a quarter slower
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # walking a worker's pages, once a second for each part, took a sixth
    alive = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive if node["Alive"] and node["Resources"].get("CPU")]
    gpus = 0 if job.settings.device == "cpu" else sum(int(node.get("GPU", 0)) for node in nodes)
    num_workers, resources = share_out(job.settings, gpus, [int(node["CPU"]) for node in nodes])
    try:
        items = ray.data.from_items([{"part": part.to_json()} for part in parts], override_num_blocks=len(parts))
        counted = items.map(
            Worker,  # type: ignore[arg-type]  # Ray makes one an actor
            fn_constructor_args=(job,),
            compute=ActorPoolStrategy(
                size=num_workers, max_concurrent_calls_per_actor=PARTS_AT_ONCE, enable_true_multi_threading=True
            ),
            **resources,
        )
        yield from counted.iter_rows()
    finally:
        ray.shutdown()


def share_out(settings: Settings, num_gpus: int, cpus: Sequence[int]) -> tuple[int, dict[str, Any]]:
    """How many workers, and what Ray reserves for each. `cpus`: of each node.

    A GPU, or an even fraction of one; without GPUs the cores of the smallest node in even parts, which are also the
    threads that torch uses.
    """
    num_workers = settings.num_workers(num_gpus or len(cpus))
    if num_gpus:
        return num_workers, {
            "num_gpus": 1 / math.ceil(num_workers / num_gpus),
            "num_cpus": min(1, sum(cpus) / num_workers),
        }
    cores = min(cpus) / math.ceil(num_workers / len(cpus))
    return num_workers, {"num_cpus": cores if cores < 1 else int(cores)}


if __name__ == "__main__":
    sys.exit(main())
