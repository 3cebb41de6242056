"""Two halves of a batch at the same time: the same vectors, and errors as without halves."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedder import Embedder
from embedder.inputs.preprocess import ModelInput
from embedder.inputs.python_items import item_from_python
from embedder.model import halves
from embedder.model.forward import Forward
from embedder.model.halves import MIN_COST, compute_both, split
from embedder.model.vision_cache import VisionCache
from tests.conftest import picture, words

needs_two_threads = pytest.mark.skipif(torch.get_num_threads() % 2 == 1, reason="an odd number of cores")


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([500, 500], ([0], [1])),
        ([100, 300, 200, 200], ([0, 1], [2, 3])),
        ([1000, *[250] * 4], ([0], [1, 2, 3, 4])),
        ([MIN_COST, MIN_COST], ([0], [1])),
        ([MIN_COST - 1, MIN_COST - 1], None),  # small
        ([500, 400], None),  # not equal
        ([500, 500, 500], None),
        ([2000], None),
        ([], None),
        ([0, 0], None),
    ],
)
def test_halves_have_about_the_same_cost(costs: list[float], expected: object) -> None:
    assert split(costs) == expected


def test_every_item_is_in_one_half() -> None:
    costs = np.random.default_rng(0).integers(10, 300, 101).tolist()
    found = split(costs)
    assert found is not None
    assert sorted(found[0] + found[1]) == list(range(101))
    sums = [sum(costs[index] for index in half) for half in found]
    assert max(sums) <= halves.MAX_SHARE * sum(sums)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def thread() -> tuple[int, int]:
    return threading.get_ident(), torch.get_num_threads()


@pytest.mark.usefixtures("four_threads")
def test_each_function_has_half_of_the_threads() -> None:
    (own, num_first), (other, num_second) = compute_both(thread, thread)
    assert own == threading.get_ident() != other
    assert num_first == num_second == 2
    assert torch.get_num_threads() == 4
    assert "second-half" not in {one.name for one in threading.enumerate()}


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("later", [0, 1])
def test_error_is_raised_when_both_have_ended(failing: tuple[int, ...], later: int) -> None:
    ended = []

    def function(number: int) -> Callable[[], None]:
        def run() -> None:
            time.sleep(0.05 if number == later else 0)
            ended.append(number)
            if number in failing:
                raise RuntimeError(f"function {number}")

        return run

    with pytest.raises(RuntimeError, match=f"function {failing[0]}"):
        compute_both(function(0), function(1))
    assert sorted(ended) == [0, 1]
    assert torch.get_num_threads() == 4


def test_failed_halves_keep_no_memory() -> None:
    kept = []

    def fail() -> None:
        states = torch.ones(1)
        kept.append(weakref.ref(states))
        raise RuntimeError

    gc.disable()
    try:
        with pytest.raises(RuntimeError):
            compute_both(fail, fail)
        assert [one() for one in kept] == [None, None]
    finally:
        gc.enable()


ITEMS: list[Any] = [
    *[words(10 + 7 * number, number) for number in range(12)],
    *[{"text": words(20, number), "instruction": "Find the same colors."} for number in range(6)],
    *[{"text": words(9, number), "instruction": f"Instruction {number}."} for number in range(6)],
    *[{"image": picture(96 + 32 * (number % 3), 128, number), "text": "what is this"} for number in range(12)],
    *[{"video": [picture(64, 64, seed) for seed in range(4)]}] * 2,
]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of items of each call of a forward pass, in the order of their ends."""
    called: list[int] = []
    compute = Forward.__call__

    def count(self: Forward, *arguments: Any) -> Any:
        rows = compute(self, *arguments)
        called.append(len(rows))
        return rows

    monkeypatch.setattr(Forward, "__call__", count)
    return called


def inputs_of(embedder: Embedder) -> list[ModelInput]:
    return [embedder.models.preprocessor(item_from_python(item, None, None)) for item in ITEMS]


@needs_two_threads
def test_rows_are_those_of_the_items_alone(random_checkpoint: Path, sizes: list[int]) -> None:
    with Embedder(str(random_checkpoint), device="cpu") as embedder:
        inputs = inputs_of(embedder)
        together = embedder.models._launch(inputs)()
        assert len(sizes) == 2
        assert sum(sizes) == len(inputs)
        again = embedder.models._launch(inputs)()  # with cached prefixes
        sizes.clear()
        alone = np.concatenate([np.asarray(embedder.models._launch([one])()) for one in inputs])
    assert sizes == [1] * len(inputs)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    np.testing.assert_allclose(again, alone, rtol=0, atol=1e-5)
    assert len(np.unique(alone.round(3), axis=0)) == len(inputs) - 1  # both clips are the same


@pytest.mark.parametrize("options", [{"weights": "int8"}, {"execution": "compiled"}])
def test_layers_that_share_memory_or_threads_are_not_halved(
    random_checkpoint: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with Embedder(str(random_checkpoint), device="cpu", **options) as embedder:
        sizes.clear()
        embedder.models._launch(inputs_of(embedder))()
    assert sizes == [len(ITEMS)]


@needs_two_threads
def test_vision_cache_is_used_by_one_thread(random_checkpoint: Path, sizes: list[int]) -> None:
    with Embedder(str(random_checkpoint), device="cpu") as embedder:
        assert embedder.models.embedder is not None
        embedder.models.embedder.use_vision_cache(VisionCache(2**20))
        inputs = inputs_of(embedder)
        embedder.models._launch(inputs)()
        assert sizes == [len(inputs)]
        embedder.models._launch(inputs[:24])()  # texts
    assert sum(sizes[1:]) == 24
    assert len(sizes) == 3


@needs_two_threads
def test_pass_that_is_stopped_ends_both_halves(random_checkpoint: Path, sizes: list[int]) -> None:
    class Stopped(Exception):
        pass

    threads = set()

    def stop() -> None:
        threads.add(threading.get_ident())
        if len(threads) == 2:
            raise Stopped

    with Embedder(str(random_checkpoint), device="cpu") as embedder:
        assert embedder.models.embedder is not None
        forward = embedder.models.embedder.forward
        inputs = inputs_of(embedder)
        embedder.models._launch(inputs)()  # computes the prefixes
        sizes.clear()
        forward.call_between_layers(stop)
        with pytest.raises(Stopped):
            embedder.models._launch(inputs)()
        forward.call_between_layers(lambda: None)
        assert len(embedder.models._launch(inputs)()) == len(inputs)
