"""What a run keeps in the output for the next one: the options it was started with, and the plan of its parts.

A run holds a lock, so that two runs do not write one output.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedder.bulk.plan import Plan, read_plan, take_out_rows
from embedder.bulk.source import Source
from embedder.bulk.worker import Job, job_schema
from embedder.bulk.writer import Writer, replace_file
from embedder.model.checkpoint import Checkpoint

JOB_FILE = "job.json"
LAYOUT = 2  # of the state folder; an output of another one can be searched, but not continued


@contextlib.contextmanager
def lock(state_folder: Path) -> Iterator[None]:
    """Hold the lock of the output. Raises `ValueError` if another run does."""
    state_folder.mkdir(parents=True, exist_ok=True)
    with (state_folder / "lock").open("a") as file:  # closing it, or the end of this process, releases the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing this output: it holds the lock of {file.name}") from None
        yield


def start(job: Job, checkpoint: Checkpoint, source: Source, writer: Writer, rows_per_part: int | None) -> Plan:
    """Start an output, or continue one: bring its plan up to date, and take out rows that the input has no more.

    Raises `ValueError` if the output was started with other options, or with another input.
    """
    options = _options(job, checkpoint, source)
    path = writer.state_folder / JOB_FILE
    started = json.loads(path.read_text()) if path.exists() else {}
    if started and started.get("layout") != LAYOUT:
        raise ValueError(f"{path} is of another version: the output can be searched, not continued; use another OUTPUT")
    if started and (changed := [name for name in options if started.get(name) != options[name]]):
        raise ValueError(
            f"the output was started with another value of {', '.join(changed)} (see {path}); "
            "use the same options, or another OUTPUT"
        )
    plan = read_plan(writer.state_folder)
    changes = plan.compare(source)
    earlier = started.get("input", str(job.input))
    if earlier != str(job.input) and (changes.changed or changes.removed):
        raise ValueError(
            f"the output was started with the input {earlier}, {len(changes.removed)} files of which are not in "
            f"{job.input}, and {len(changes.changed)} are different there; use the same input, or another OUTPUT"
        )
    if plan.parts and (changes.new or changes.changed or changes.removed):
        print(f"since the last run, {changes}", file=sys.stderr)
    replace_file(path, json.dumps({**options, "input": str(job.input), "folder": str(source.folder)}, indent=1))
    plan = plan.updated(source, changes, rows_per_part)
    source.close()
    plan.write(writer.state_folder)  # before rows are taken out: a run that is killed in between does that again
    writer.remove_unfinished()
    plan = take_out_rows(plan, writer)
    plan.write(writer.state_folder)
    return plan


def _options(job: Job, checkpoint: Checkpoint, source: Source) -> dict[str, Any]:
    """What must be equal in all runs for their parts to form one output."""
    settings = job.settings
    return {
        "layout": LAYOUT,
        "format": job.output_format,
        "columns": asdict(job.columns),
        "dimensions": job.dimensions,
        "output_dtype": job.output_dtype,
        "model": f"{checkpoint.name} {checkpoint.revision}".strip(),
        "segment_seconds": job.segment_s,
        "output_columns": [str(field) for field in job_schema(job, source, 1)],
        "dtype": settings.dtype,
        "weights": settings.weights,  # missing, and so None, in outputs of older versions
        "default_instruction": settings.default_instruction,
        "preprocessing": settings.preprocessing,
        "raw_orientation": settings.raw_orientation,
        "max_pixels": settings.max_pixels,
        "max_input_tokens": settings.max_input_tokens,
    }
