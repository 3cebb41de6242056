"""Serve a checkpoint on this CPU: time until ready, memory, and latency: `python -m benchmarks.cpu CHECKPOINT`.

`python -m benchmarks.random_checkpoint 2b FOLDER` writes one with the shapes of the 2B. If the service warns that the
largest picture exceeds the timeout, it is started again with the timeout that the warning proposes. Exit status 1 if
the full picture is not embedded within that.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import httpx
import numpy as np
import PIL.Image

from benchmarks.contenders import ROOT, free_port
from benchmarks.meter import Meter
from embedder.settings import WeightFormat

START_S = 600.0
PROPOSED = re.compile(r"the largest picture takes about .* Set EMBEDDER_REQUEST_TIMEOUT_S=(\d+)")
ESTIMATED = re.compile(r"estimated for this CPU: .*")


@contextlib.contextmanager
def serving(
    checkpoint: str, timeout_s: float, log: Path, options: Mapping[str, str] | None = None
) -> Iterator[tuple[str, int]]:
    """The service, ready: its URL and process id. `options`: more settings, by name."""
    port = free_port()
    settings = {"MODEL": checkpoint, "DEVICE": "cpu", "REQUEST_TIMEOUT_S": f"{timeout_s:g}", **(options or {})}
    environment = os.environ | {f"EMBEDDER_{name}": value for name, value in settings.items()}
    bentoml = Path(sys.executable).with_name("bentoml")
    command = [bentoml, "serve", ".", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603 - a fixed command
    try:
        deadline = time.monotonic() + START_S
        while not is_ready(f"http://127.0.0.1:{port}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the service did not become ready:\n{log.read_text()}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(2 * timeout_s + 30)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def full_picture(max_pixels: int) -> bytes:
    """A page-like JPEG that is resized to the largest size."""
    side = math.isqrt(max_pixels) + 100
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(values).resize((side, side)).save(buffer, "JPEG")
    return buffer.getvalue()


def measure(url: str, timeout_s: float) -> int:
    """Print the latency of a query and of a full picture. Returns the status of the latter."""
    with httpx.Client(base_url=url, timeout=2 * timeout_s + 30) as client:
        start = time.monotonic()
        client.post("/txt/embed", json={"input": "red"}).raise_for_status()
        print(f"a query: {time.monotonic() - start:.2f} s", flush=True)
        picture = full_picture(client.get("/info").json()["pixels"]["max"])
        start = time.monotonic()
        files = {"file": ("page.jpg", picture, "image/jpeg")}
        status = client.post("/img/embed", files=files).status_code
        seconds = time.monotonic() - start
        print(f"a full picture: {seconds:.1f} s, status {status}, timeout {timeout_s:g} s", flush=True)
        return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--weights", choices=get_args(WeightFormat), help="EMBEDDER_WEIGHTS; default: as loaded")
    parser.add_argument("--timeout", type=float, default=60.0, help="EMBEDDER_REQUEST_TIMEOUT_S; default: %(default)s")
    chosen = parser.parse_args(arguments)
    timeout_s: float = chosen.timeout
    options = {"WEIGHTS": chosen.weights} if chosen.weights else {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        for is_first in (True, False):
            start = time.monotonic()
            with serving(chosen.checkpoint, timeout_s, log, options) as (url, pid), Meter(pid) as meter:
                print(f"ready after {time.monotonic() - start:.1f} s", flush=True)
                text = log.read_text()
                print("\n".join(ESTIMATED.findall(text)), flush=True)
                if is_first and (proposed := PROPOSED.search(text)):
                    print(proposed[0], flush=True)
                    timeout_s = float(proposed[1])
                    continue
                status = measure(url, timeout_s)
                time.sleep(0.2)  # one more sample of the memory
            print(f"peak memory: {meter.peak_bytes / 1e9:.2f} GB", flush=True)
            return int(status != 200)
    raise AssertionError("the second start measures")


if __name__ == "__main__":
    sys.exit(main())
