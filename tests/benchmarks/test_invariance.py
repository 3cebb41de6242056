"""A vector depends on the content of its item only, within the bounds that the documentation promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import invariance
from tests.conftest import ROOT


@pytest.mark.slow
def test_cases_of_one_process_are_within_the_promise(random_checkpoint: Path) -> None:
    vectors = invariance.vectors_of_one_process(str(random_checkpoint), "cpu", ["float32", "bfloat16"], 2)
    for dtype, cases in vectors.items():
        (alone,) = cases.pop("alone")
        assert set(cases) == set(invariance.CASES[:3])
        for case, others in cases.items():
            found = invariance.differences(alone, others)
            assert invariance.is_within(dtype, found), (dtype, case, found)


def test_other_vectors_are_not_within_the_promise() -> None:
    alone = invariance.np.eye(2, 8, dtype="float32")
    for dtype in invariance.MAX_DIFFERENCE:
        assert invariance.is_within(dtype, invariance.differences(alone, [alone]))
        for other in (alone[::-1], alone + 0.03):
            assert not invariance.is_within(dtype, invariance.differences(alone, [alone, other]))


@pytest.mark.slow
def test_restarts_and_two_workers_are_within_the_promise(
    random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(random_checkpoint), "--device", "cpu", "--batches", "1", "--results", str(tmp_path)]
    assert invariance.main(command) == 0
    rows = json.loads((tmp_path / "invariance.json").read_text())["rows"]
    assert {dtype: set(cases) for dtype, cases in rows.items()} == {key: set(invariance.CASES) for key in rows}
    assert capsys.readouterr().out.strip() == invariance.table(rows)


def test_page_says_what_the_command_promises() -> None:
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    for dtype, difference in invariance.MAX_DIFFERENCE.items():
        assert f"| {dtype} | {difference:g} | {invariance.MIN_COSINE[dtype]:g} |" in page
