"""Write all quality reports of one model to benchmarks/results/quality/: `python -m benchmarks.quality report`.

Colors and mteb use a service, started with `--model` or running at `--url`; the ablations use the library.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.contenders import Contender
from benchmarks.quality import ablations, colors, suite
from benchmarks.quality.targets import name_of

RESULTS = report.RESULTS / "quality"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality report", description=__doc__)
    parser.add_argument("--model", default="", help="folder or hub id; default: the bundled model")
    parser.add_argument("--url", help="a running service of that model; default: start one")
    parser.add_argument("--compositions", type=int, default=10_000, help="number of random batches")
    parser.add_argument("--count", type=int, help="use only the first COUNT colors and drawings")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    name = name_of({"model": chosen.model}) if chosen.model else "bundled"
    results = ["--results", str(chosen.results)]
    few = [] if chosen.count is None else ["--count", str(chosen.count)]
    few_colors = [] if chosen.count is None else ["--colors", str(chosen.count)]
    with service(chosen.url, chosen.model) as url, tempfile.TemporaryDirectory() as folder:
        statuses = [
            colors.main(["--url", f"{name}={url}", *few_colors, *results]),
            suite.main(["--url", url, "--output", folder, *few, *results]),
        ]
    model = ["--model", chosen.model] if chosen.model else []
    statuses.append(ablations.main([*model, "--compositions", str(chosen.compositions), *few, *results]))
    return max(statuses)


@contextlib.contextmanager
def service(url: str | None, model: str) -> Iterator[str]:
    """Yield `url`, or the URL of a service that runs during the `with` block."""
    if url:
        yield url
        return
    command = [str(Path(sys.executable).parent / "bentoml"), "serve", ".", "--host", "127.0.0.1", "--port", "PORT"]
    with tempfile.TemporaryDirectory() as home:
        environment = {"EMBEDDER_MODEL": model, "BENTOML_HOME": home}
        contender = Contender("the service", command, "/txt/embed", environment)
        contender.start(b'{"input": "ready?"}')
        try:
            yield contender.url.removesuffix("/txt/embed")
        finally:
            contender.stop()
