"""The work of `python -m embedder.bulk`: plans the parts, embeds the missing ones, and completes the output."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from embedder.bulk.formats import FOLDER, Part
from embedder.bulk.plan import num_rows
from embedder.bulk.progress import Progress
from embedder.bulk.source import Columns, Source
from embedder.bulk.state import lock, start
from embedder.bulk.worker import Job, job_schema
from embedder.bulk.writer import STATE_FOLDER, Writer
from embedder.engine.admission import check_dimensions
from embedder.errors import ModelUnavailable, UnsupportedDimensions
from embedder.model.checkpoint import find_checkpoint
from embedder.settings import Settings

MIN_SEGMENT_S = 0.1
ALL_EMBEDDED, PARTS_MISSING, ROWS_WITH_ERRORS = 0, 1, 3  # exit status; argparse exits with 2


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the command and return its exit status. The parser reports what is wrong with its options."""
    if importlib.util.find_spec("ray") is None:
        raise SystemExit("ray is not installed: pip install -e '.[bulk]'")
    with contextlib.ExitStack() as stack:
        try:
            job = _job(options)
            checkpoint = find_checkpoint(job.settings)
            hidden_size = json.loads((checkpoint.folder / "config.json").read_text())["text_config"]["hidden_size"]
            check_dimensions(job.dimensions, hidden_size)
            source = Source(job.input, job.columns, job.settings, job.output / STATE_FOLDER, job.segment_s)
            if job.segment_s is not None and source.format is not FOLDER:
                raise ValueError("--segment-seconds: the input is not a folder of clips; allowed: such a folder")
            if job.has_thumbnails and source.format is not FOLDER:
                raise ValueError(
                    "--thumbnails: the input is not a folder of pictures and documents; allowed: such a folder"
                )
            writer = Writer(job.output, job.output_format)
            stack.enter_context(lock(writer.state_folder))
            plan = start(job, checkpoint, source, writer, options.rows_per_part)
        except (ValueError, OSError, ModelUnavailable, UnsupportedDimensions) as error:
            parser.error(str(error))
        if source.num_left_out:
            counts = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in source.num_left_out.items())
            print(f"left out: {counts}", file=sys.stderr)
        unit = "page" if source.has_documents else "row"
        try:
            is_complete = _embed(job, plan.parts, writer, options.address, unit)
        except ConnectionError as error:
            print(f"stopped: {error}\nrun the same command again to resume", file=sys.stderr)
            return PARTS_MISSING
        if not is_complete:
            return PARTS_MISSING
        return _finish(job_schema(job, source, job.dimensions or hidden_size), plan.parts, writer)


def _job(options: argparse.Namespace) -> Job:
    """Check the options. Raises `ValueError` for those that are not allowed."""
    settings = Settings.from_environment()
    if settings.device.startswith("cuda:"):
        raise ValueError(
            f"EMBEDDER_DEVICE: got {settings.device}; allowed: auto, cpu, cuda (choose GPUs with CUDA_VISIBLE_DEVICES)"
        )
    if options.rows_per_part is not None and options.rows_per_part < 1:
        raise ValueError(f"--rows-per-part: got {options.rows_per_part}; allowed: 1 and more")
    if options.segment_seconds is not None and not MIN_SEGMENT_S <= options.segment_seconds < math.inf:
        raise ValueError(f"--segment-seconds: got {options.segment_seconds}; allowed: {MIN_SEGMENT_S} and more")
    source, output = options.input.resolve(), options.output.resolve()
    if output.is_relative_to(source):
        raise ValueError(f"OUTPUT {options.output} is inside INPUT {options.input}; allowed: a folder outside it")
    columns = Columns(options.text, options.image, options.video, options.instruction, options.id)
    return Job(
        source,
        output,
        options.format,
        columns,
        options.dimensions,
        options.output_dtype,
        settings,
        has_text=not options.no_text,
        has_thumbnails=options.thumbnails,
        segment_s=options.segment_seconds,
    )


def _embed(job: Job, parts: Sequence[Part], writer: Writer, address: str | None, unit: str) -> bool:
    """Embed the missing parts. Returns whether all parts are written."""
    missing = [part for part in parts if not writer.is_written(part.number)]
    total = num_rows(parts)
    if not missing:
        print(f"nothing to embed: the output already has all {f'{total} ' if total else ''}{unit}s of the input")
        return True
    finished = []
    with Progress(writer.state_folder, total, total - num_rows(missing), unit) as progress:
        for counts in _run(job, missing, address):
            finished.append(counts)
            progress.finish(counts["number"], counts["rows"], counts["errors"])
            if counts["fault"]:
                progress.write(f"part not written: {counts['fault']}")
    num_done, num_errors = (sum(counts[name] for counts in finished) for name in ("rows", "errors"))
    num_faults = sum(bool(counts["fault"]) for counts in finished)
    num_written = len(missing) - num_faults
    print(f"{num_done} {unit}s, {num_errors} with errors; {num_written} parts written, {num_faults} not written")
    return not num_faults


def _finish(schema: pa.Schema, parts: Sequence[Part], writer: Writer) -> int:
    """Complete the output and report its errors. Returns the exit status."""
    numbers = [part.number for part in parts]
    writer.commit(schema, numbers)
    errors = writer.count_errors(numbers)
    if errors:
        counts = ", ".join(f"{count} {code}" for code, count in errors.most_common())
        print(f"rows of the output with an error: {counts}", file=sys.stderr)
    return ROWS_WITH_ERRORS if errors else ALL_EMBEDDED


def _run(job: Job, parts: Sequence[Part], address: str | None) -> Iterator[dict[str, Any]]:
    """Embed the parts with Ray. Ray is imported here: that takes 3.5 s, and wrong arguments are reported before."""
    from embedder.bulk.actors import run_parts

    return run_parts(job, parts, address)
