"""Measure which share of the time rendering takes when pages are embedded: `python -m benchmarks.page_rendering`.

200 pages of the demo documents are rendered in the confined process, as bulk does, in the size that the published
models embed. The 2B shape takes minutes for a page on a CPU, so the model's time is computed from copies of it with
few layers and random weights: the time of a layer is the difference between two copies. Times are CPU seconds of all
threads and processes, which depend less on what else the machine does.

Then pages are embedded by the copy with the fewest layers as bulk does it, while others are rendered, to see how long
the engine has nothing to compute between its first and its last batch. The whole model takes longer for a page, so it
waits for a smaller share.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image

from benchmarks import report
from benchmarks.checkpoints import write_few_layers
from benchmarks.demo_documents import write_documents
from benchmarks.random_checkpoint import SHAPES
from embedder.bulk.source import Columns
from embedder.bulk.worker import PARTS_AT_ONCE, Job, Worker
from embedder.bulk.writer import STATE_FOLDER
from embedder.documents.pages import DocumentReader
from embedder.embedder import Embedder
from embedder.engine.observer import Batch, ItemTrace, Observer
from embedder.inputs.regimes import CheckpointRegime
from embedder.settings import Settings

TEXT_LAYERS, VISION_LAYERS = (3, 5), (4, 7)  # three places where the vision tower enters the language tower


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("tiny", "2b"), default="2b", help="tiny: to try the command")
    parser.add_argument("--documents", type=int, default=20, help="of 10 pages each")
    parser.add_argument("--idle-pages", type=int, default=10, help="embedded to see how long the engine waits")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    environment = report.environment(report.command("page_rendering", options))
    with tempfile.TemporaryDirectory() as folder:
        render_s, page = measure_rendering(Path(folder) / "documents", options.documents)
        page_s = measure_model(Path(folder), options.shape, page)
        idle = measure_idle(Path(folder) / "documents", Path(folder) / "few", options.idle_pages)
    num_pages = 10 * options.documents
    share = render_s / (render_s + num_pages * page_s)
    result = {
        "environment": environment,
        "pages": num_pages,
        "page_pixels": [page.width, page.height],
        "render_cpu_s": render_s,
        "model_cpu_s_per_page": page_s,
        "share": share,
        "idle_pages": options.idle_pages,
        "idle_share": idle,
    }
    rows = [
        ["rendering, per page", report.number(render_s / num_pages)],
        [f"{options.shape} shape, per page (from {VISION_LAYERS} and {TEXT_LAYERS} layers)", report.number(page_s)],
    ]
    text = report.table(["what", "CPU seconds"], rows) + f"\n\nshare of rendering: {share:.2%}\n"
    text += f"engine without work while pages are rendered, {options.idle_pages} pages: {idle:.2%} of the time\n"
    print(text)
    report.write(options.results, "page_rendering", result, text)
    return result


def measure_rendering(folder: Path, num_documents: int) -> tuple[float, PIL.Image.Image]:
    """CPU seconds for all pages, the start of the process included, and one of the pages."""
    write_documents(folder, num_documents, 10)
    begin = _cpu_s()
    with DocumentReader(Settings()) as reader:
        for path in sorted(folder.glob("*.pdf")):
            for number in range(1, reader.count_pages(path) + 1):
                page = reader.render(path, number, CheckpointRegime()).image
    return _cpu_s() - begin, page  # the process has ended, so its time is counted


class Batches(Observer):
    """Keeps the measurements of all batches."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def ran(self, batch: Batch, traces: Sequence[ItemTrace]) -> None:
        self.batches.append(batch)

    def idle_share(self) -> float:
        """The share of the time between the first and the last batch in which no batch ran."""
        first, last = self.batches[0], self.batches[-1]
        return 1 - sum(batch.seconds for batch in self.batches) / (last.ended_s - first.started_s)


def measure_idle(documents: Path, checkpoint: Path, num_pages: int) -> float:
    """Embed the first pages as a worker of bulk does. Returns the engine's idle share."""
    output = documents.parent / "vectors"
    (output / STATE_FOLDER).mkdir(parents=True)
    settings = Settings(model=str(checkpoint), device="cpu", dtype="float32")
    observer = Batches()
    with contextlib.closing(
        Worker(Job(documents, output, "parquet", Columns(), None, "float32", settings), observer)
    ) as worker:
        parts = worker.source.parts(-(-num_pages // PARTS_AT_ONCE))[:PARTS_AT_ONCE]
        with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
            counts = list(threads.map(worker, [{"part": part.to_json()} for part in parts]))
    assert not sum(one["errors"] for one in counts)
    return observer.idle_share()


def measure_model(folder: Path, shape: str, page: PIL.Image.Image) -> float:
    """CPU seconds for a page, preprocessing included, of the whole shape."""
    (few_text, more_text), (few_vision, more_vision) = TEXT_LAYERS, VISION_LAYERS
    base = _embed(folder / "few", shape, few_text, few_vision, page)
    text_layer = (_embed(folder / "text", shape, more_text, few_vision, page) - base) / (more_text - few_text)
    vision_layer = (_embed(folder / "vision", shape, few_text, more_vision, page) - base) / (more_vision - few_vision)
    num_text, num_vision = SHAPES[shape]["text"]["num_hidden_layers"], SHAPES[shape]["vision"]["depth"]
    return float(base + (num_text - few_text) * text_layer + (num_vision - few_vision) * vision_layer)


def _embed(folder: Path, shape: str, text_layers: int, vision_layers: int, page: PIL.Image.Image) -> float:
    """CPU seconds for a page of the shape with so many layers."""
    write_few_layers(folder, shape, text=text_layers, vision=vision_layers, dtype="float32")
    with Embedder(str(folder), device="cpu", dtype="float32") as embedder:
        embedder.embed(["ready?", PIL.Image.new("RGB", (64, 64))])
        begin = time.process_time()
        embedder.embed([page])
        return time.process_time() - begin


def _cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
