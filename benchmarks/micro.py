"""Time of small steps of the code: `python -m benchmarks.micro`.

Comments in the code give these times. The steps of the first table are compared with the usual way to write them; both
must give the same result. Those of the second run in the event loop, with the largest input that they may have there.
Times are the CPU time of one thread and call: medians of rounds, in which the two ways run in turns.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gzip
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote

import numpy as np
import orjson
from _bentoml_impl.serde import JSONSerde
from _bentoml_sdk.io_models import IODescriptor
from prometheus_client import CollectorRegistry, Histogram, values
from tokenizers import Tokenizer

from benchmarks import report
from embedder.errors import AttributedToItem
from embedder.http import content_coding
from embedder.http.guard import COUNTED_AT_ONCE_BYTES
from embedder.http.json_limits import MAX_VALUES, exceeds_value_count
from embedder.inputs.data_uri import decode_base64
from embedder.inputs.items import unknown_fields_message
from embedder.inputs.preprocess import SHORT_CHARS, Patches
from embedder.inputs.word_ids import WordIds
from embedder.model.checkpoint import BUNDLED
from embedder.telemetry.bulk_histogram import BulkHistogram
from embedder.telemetry.metrics import SECONDS

HEADERS = ("step", "ours, µs", "the usual way, µs", "ratio")
ROUND_S = 0.02  # of each of the two, in one round
TEXT = "a photo of a small red car next to a big green tree in front of the house"  # 17 words


@dataclass(frozen=True)
class Step:
    """One call of `ours` does what one call of `usual` does. `is_same` compares their results."""

    ours: Callable[[], Any]
    usual: Callable[[], Any]
    is_same: Callable[[Any, Any], bool] = operator.eq


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    data: dict[str, Any] = {"environment": report.environment(report.command("micro", chosen)), "steps": {}}
    with steps() as found:
        for name, step in found.items():
            if not step.is_same(step.ours(), step.usual()):
                raise SystemExit(f"{name}: the two ways give different results")
            data["steps"][name] = dict(zip(("ours_us", "usual_us"), measure(step, chosen.rounds), strict=True))
    data["bounded_us"] = {name: measure(Step(call, call), chosen.rounds)[0] for name, call in bounded().items()}
    text = table(data["steps"]) + "\n\n" + bounded_table(data["bounded_us"])
    report.write(chosen.results, "micro", data, text)
    print(text)
    return data


def measure(step: Step, num_rounds: int) -> tuple[float, float]:
    """Microseconds of CPU time of one call: ours, and the usual way."""
    num_calls = [_num_calls(step.ours), _num_calls(step.usual)]
    rounds = [
        [_call_us(call, num) for call, num in zip((step.ours, step.usual), num_calls, strict=True)]
        for _ in range(num_rounds)
    ]
    ours, usual = (statistics.median(column) for column in zip(*rounds, strict=True))
    return ours, usual


def _num_calls(call: Callable[[], object]) -> int:
    _call_us(call, 1)
    return max(1, int(ROUND_S * 1e6 / max(_call_us(call, 3), 0.01)))


def _call_us(call: Callable[[], object], num_calls: int) -> float:
    start = time.thread_time_ns()
    for _ in range(num_calls):
        call()
    return (time.thread_time_ns() - start) / num_calls / 1e3


@contextlib.contextmanager
def steps() -> Iterator[dict[str, Step]]:
    """All steps by name."""
    with _histograms() as histograms:
        yield {
            "ids of a text of 17 words": word_ids(),
            "64 values into a histogram": histograms,
            "context manager that names an item": context_manager(),
            "append to a list, as a callback": callback(),
            "a vector of 2,048 values as JSON": vector_as_json(),
            "gzip of 100 vectors of 2,048 values": compression(),
            "base64 of 40,000 percent escapes": percent_escapes(),
        }


def word_ids() -> Step:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    words = WordIds(tokenizer)
    words.ids(TEXT)
    return Step(lambda: words.ids(TEXT), lambda: list(tokenizer.encode(TEXT, add_special_tokens=False).ids))


@contextlib.contextmanager
def _histograms() -> Iterator[Step]:
    """In memory-mapped files, as in the service."""
    seconds = [0.0004 * 1.1**power for power in range(64)]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, PROMETHEUS_MULTIPROC_DIR=folder),
        mock.patch.object(values, "ValueClass", values.MultiProcessValue()),
    ):
        ours, usual = (
            kind("x", "x", buckets=SECONDS, registry=CollectorRegistry()) for kind in (BulkHistogram, Histogram)
        )

        def one_by_one() -> None:
            for value in seconds:
                usual.observe(value)

        yield Step(lambda: ours.observe_all(seconds), one_by_one)


def context_manager() -> Step:
    @contextlib.contextmanager
    def generator() -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            error.item = 0  # type: ignore[attr-defined]
            raise

    def ours() -> None:
        with AttributedToItem():
            pass

    def usual() -> None:
        with generator():
            pass

    return Step(ours, usual)


def callback() -> Step:
    class Protocol:
        def __init__(self) -> None:
            self.pieces: list[bytes] = []
            self.on_piece = self.pieces.append

        def on_body(self, piece: bytes) -> None:
            self.pieces.append(piece)

    def run(protocol: Protocol, call: Callable[[bytes], None]) -> None:
        for _ in range(1000):
            call(b"")
        protocol.pieces.clear()

    fast, slow = Protocol(), Protocol()
    return Step(lambda: run(fast, fast.on_piece), lambda: run(slow, slow.on_body))


def vector_as_json() -> Step:
    """BentoML validates a list of Python floats and serializes it with pydantic."""
    vector = np.random.default_rng(0).standard_normal(2048).astype(np.float32)

    def embed() -> list[float]:
        raise NotImplementedError  # only its annotation is used

    spec, serde = IODescriptor.from_output(embed), JSONSerde()

    def through_bentoml() -> bytes:
        return b"".join(serde.serialize_model(spec(vector.tolist())).data)

    return Step(
        lambda: orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY),
        through_bentoml,
        lambda ours, usual: bool(np.allclose(orjson.loads(ours), orjson.loads(usual), rtol=1e-6)),
    )


def compression() -> Step:
    vectors = np.random.default_rng(0).standard_normal((100, 2048)).astype(np.float32)
    body = orjson.dumps(vectors, option=orjson.OPT_SERIALIZE_NUMPY)
    return Step(
        lambda: content_coding._gzip(body),
        lambda: gzip.compress(body, 6),
        lambda ours, usual: len(ours) < 1.15 * len(usual) and gzip.decompress(ours) == gzip.decompress(usual),
    )


def percent_escapes() -> Step:
    """A text that consists of escapes, the slowest one for `unquote`."""
    escaped = "%2B%2F" * 20_000
    return Step(lambda: decode_base64(escaped), lambda: base64.b64decode(unquote(escaped)))


def bounded() -> dict[str, Callable[[], object]]:
    """What runs in the event loop, or between its turns, with its largest input."""
    body = b'"' + rb"\\," * (COUNTED_AT_ONCE_BYTES // 3) + b'"'  # one value, of escapes and commas
    words = "".join(chr(97 + place * 7 % 26) + " " * (place % 6 == 5) for place in range(SHORT_CHARS))
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    patches = Patches(np.zeros((2**20 // 768, 768), np.uint8), (1, 1, 1), 1)
    known = {
        "input",
        "instruction",
        "dimensions",
        "normalize",
        "encoding_format",
        "output_dtype",
        "truncate",
        "priority",
    }
    return {
        "count the values of a body of 1 MiB": lambda: exceeds_value_count(body, MAX_VALUES),
        "tokenize 512 characters of unknown words": lambda: tokenizer.encode(words, add_special_tokens=False),
        "key of 1 MiB of pixels": patches.with_key,
        "message about an unknown field": lambda: unknown_fields_message(["dimension"], known),
    }


def bounded_table(found: Mapping[str, float]) -> str:
    """Markdown."""
    return report.table(
        ("step with its largest input", "µs"), [(name, report.number(us)) for name, us in found.items()]
    )


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown."""
    lines = [
        (name, *map(report.number, (one["ours_us"], one["usual_us"])), f"{one['usual_us'] / one['ours_us']:.1f}x")
        for name, one in found.items()
    ]
    return report.table(HEADERS, lines)


if __name__ == "__main__":
    main()
