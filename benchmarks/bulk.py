"""Compare bulk embedding on Ray Data with the library: `python -m benchmarks.bulk [--rows 20000]`.

The rows are drawings of the demo collection and their names, each row different. The library embeds them in one call.
The bulk command embeds them, is killed (SIGKILL) when half of its parts are written, and is started again. Then the
library embeds them once more, because the speed of a shared machine changes; its rate is that of both calls. The run
fails unless every row is in the output exactly once with the library's vector.

Rates are rows per second of embedding. They exclude loading, `start_s` (the start of Ray and of the model) and the time
to the first parts, during which Ray still starts processes. Both are independent of the number of rows.
"""

from __future__ import annotations

import argparse
import io
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.ImageChops
import psutil
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.drawings import drawings_of_the_demo
from benchmarks.meter import resident_bytes
from embedder import Embedder
from embedder.bulk.worker import PARTS_AT_ONCE

MAX_DIFFERENCE = 1e-6
NUM_PARTS = 80


@dataclass
class Run:
    """One run of the command. `part_s`: the seconds from the start until each part was written, ascending."""

    start_s: float
    part_s: list[float]
    peak_bytes: int

    @property
    def first_parts_s(self) -> float:
        """When the first parts were written; they are written together."""
        return self.part_s[PARTS_AT_ONCE - 1]

    def parts_per_s(self) -> float:
        """The rate from the first parts to the last one."""
        return (len(self.part_s) - PARTS_AT_ONCE) / (self.part_s[-1] - self.first_parts_s)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    about = report.environment(report.command("bulk", chosen))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pq.write_table(_rows(chosen.rows), folder / "in.parquet", row_group_size=1000)
        items = [
            {field: value for field, value in row.items() if field != "id" and value is not None}
            for row in pq.read_table(folder / "in.parquet").to_pylist()
        ]
        vectors, before_s = _library(items)
        rows_per_part = -(-chosen.rows // NUM_PARTS)
        num_parts = -(-chosen.rows // rows_per_part)
        killed = _run(folder, rows_per_part, kill_at=num_parts // 2)
        resumed = _run(folder, rows_per_part)
        difference = _largest_difference(folder / "out", vectors)
        library_s = (before_s + _library(items)[1]) / 2
    bulk_rate = resumed.parts_per_s() * rows_per_part
    data = {
        "environment": about,
        "rows": chosen.rows,
        "rows_before_kill": len(killed.part_s) * rows_per_part,
        "library_rows_per_s": chosen.rows / library_s,
        "bulk_rows_per_s": bulk_rate,
        "ratio": bulk_rate * library_s / chosen.rows,
        "start_s": resumed.start_s,
        "first_parts_s": resumed.first_parts_s,
        "resumed_s": resumed.part_s[-1],
        "peak_gib": [run.peak_bytes / 2**30 for run in (killed, resumed)],
        "largest_difference": difference,
    }
    lines = [[name, report.number(value)] for name, value in data.items() if isinstance(value, float | int)]
    lines.append(["peak_gib, all processes", ", ".join(map(report.number, data["peak_gib"]))])
    text = report.table(("what", "value"), lines)
    rates = {"library": data["library_rows_per_s"], "bulk": bulk_rate}
    report.save(chosen.results, "bulk", data, text, {"drawings and names": rates}, "rows per second")
    print(text)
    return data


def _library(items: list[dict[str, Any]]) -> tuple[NDArray[np.float32], float]:
    """Embed with the library. Returns the vectors and the seconds."""
    with Embedder() as embedder:
        start = time.monotonic()
        vectors = embedder.embed(items)
        return np.stack(vectors), time.monotonic() - start


def _rows(count: int) -> pa.Table:
    """Alternately a drawing, shifted so that each is different, and a name with a number."""
    names, drawings = drawings_of_the_demo()
    texts: list[str | None] = []
    images: list[bytes | None] = []
    for row in range(count):
        place, turn = row // 2 % len(drawings), row // 2 // len(drawings)
        buffer = io.BytesIO()
        if row % 2 == 0:
            shifted = PIL.ImageChops.offset(drawings[place], turn % 7, turn // 7)
            shifted.save(buffer, "PNG", compress_level=1)
        images.append(buffer.getvalue() or None)
        texts.append(None if row % 2 == 0 else f"{names[place]} {turn}")
    return pa.table({"id": range(count), "text": pa.array(texts, pa.string()), "image": pa.array(images, pa.binary())})


def _run(folder: Path, rows_per_part: int, kill_at: int | None = None) -> Run:
    """Run the command. Kill it when `kill_at` parts are written."""
    output = folder / "out"
    command = [sys.executable, "-m", "embedder.bulk", str(folder / "in.parquet"), str(output), "--id", "id"]
    command += ["--rows-per-part", str(rows_per_part)]
    before, stale = set(output.glob("*.parquet")), set(output.glob("_bulk/*.tmp"))
    begun_s, first_s, peak_bytes = time.time(), 0.0, 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if not first_s and set(output.glob("_bulk/*.tmp")) - stale:
            first_s = time.time()
        peak_bytes = max(peak_bytes, resident_bytes(process.pid))
        if kill_at and len(list(output.glob("*.parquet"))) >= kill_at:
            left = process.children(recursive=True)
            process.send_signal(signal.SIGKILL)
            while any(map(_is_running, left)):  # Ray's processes end by themselves and may write more parts
                time.sleep(0.05)
        time.sleep(0.05)
    process.wait()
    written = sorted(path.stat().st_mtime - begun_s for path in set(output.glob("*.parquet")) - before)
    expected = -signal.SIGKILL if kill_at else 0
    if process.returncode != expected or not written:
        raise SystemExit(
            f"the bulk command exited with {process.returncode} (expected {expected}) and wrote {len(written)} parts"
        )
    return Run(first_s - begun_s, written, peak_bytes)


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)  # in a container, possibly no process reaps them
    except psutil.NoSuchProcess:
        return False


def _largest_difference(output: Path, vectors: Any) -> float:
    table = pyarrow.dataset.dataset(output).to_table()
    if table["id"].to_pylist() != list(range(len(vectors))) or table["error"].null_count != len(vectors):
        raise SystemExit("the output has a row that is missing, repeated, out of order or failed")
    found = np.array(table["embedding"].combine_chunks().flatten()).reshape(vectors.shape)
    difference = float(np.abs(found - vectors).max())
    if difference > MAX_DIFFERENCE:
        raise SystemExit(f"a vector differs from the library's by {difference}; allowed: up to {MAX_DIFFERENCE}")
    return difference


if __name__ == "__main__":
    main()
