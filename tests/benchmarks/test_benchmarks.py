"""Each benchmark command, tiny and short: right vectors, files without paths, and nothing three times too slow."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("litserve", reason="the peers come with the `bench` extra")

from benchmarks import (
    callers,
    choices,
    contenders,
    decoding,
    gaps,
    goals,
    gpu,
    gpu_parts,
    growth,
    guard,
    library,
    overload,
    peers,
    preprocessing,
    report,
    server,
    soak,
)
from benchmarks.checkpoints import random_folder
from benchmarks.compare import WrongVectors, compare
from benchmarks.peers import Peer
from benchmarks.protocols import VLLMProtocol
from benchmarks.workloads import WORKLOADS, Item, make_items
from embedder.inputs.items import item_from_fields
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.model import language
from embedder.models import Models

# of sentence-transformers, LitServe and what they bring
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SLOWEST = 1 / 3  # of the in-run baseline, padded transformers
WORDS = ["red", "green", "blue", "cyan"]


def saved(folder: Path, name: str) -> dict[str, Any]:
    """The JSON of a run; its table and plot are there, and no path is in any of them."""
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / f"{name}.json").read_text() + (folder / f"{name}.md").read_text()
    assert "/root" not in text
    assert "/tmp" not in text
    data: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    assert {"command", "date", "cpu", "cores", "versions"} <= set(data["environment"])
    return data


@pytest.mark.slow
def test_library_gives_right_vectors_and_is_not_three_times_slower(tmp_path: Path) -> None:
    library.main(
        ["--shape", "tiny", "--workloads", "query", "text-mixed", "--seconds", "2", "--results", str(tmp_path)]
    )
    for row in saved(tmp_path, "library-tiny-float32")["workloads"]:
        ours = row["who"][peers.OURS]
        assert ours["min_cosine"] >= 0.999
        assert ours["ratio"] >= SLOWEST
        assert row["limit_gflop_per_s"] > 0


@pytest.mark.slow
def test_library_in_bfloat16_takes_turns_with_itself_in_float32(tmp_path: Path) -> None:
    few = ["--workloads", "query", "--rounds", "1", "--seconds", "2", "--results", str(tmp_path)]
    library.main(["--shape", "tiny", "--dtype", "bfloat16", *few])
    (row,) = saved(tmp_path, "library-tiny-bfloat16")["workloads"]
    exact, rounded = row["who"][peers.OURS_IN_FLOAT32], row["who"][peers.OURS]
    assert exact["min_cosine"] > 1 - 1e-5
    assert 0.99 < rounded["min_cosine"] < exact["min_cosine"]
    assert exact["items_per_s"] > 0


GPU_ON_CPU = ["--device", "cpu", "--shapes", "tiny"]


@pytest.mark.slow
def test_gpu_script_runs_on_the_cpu_without_faults(tmp_path: Path) -> None:
    arguments = [*GPU_ON_CPU, "--workloads", "half-half", "--seconds", "60", "--results", str(tmp_path)]
    assert gpu.main(arguments)["faults"] == []
    data = saved(tmp_path, "gpu-script-on-cpu")
    assert [check["result"] for check in data["checks"]] == ["right"]
    assert data["shapes"]["tiny"]["rows"][0]["who"][peers.OURS]["ratio"] >= SLOWEST


@pytest.mark.slow
def test_gpu_script_that_is_killed_leaves_the_results_it_has(tmp_path: Path) -> None:
    """And its processes end with it. A later run merges them."""
    arguments = [*GPU_ON_CPU, "--parts", "speed", "--workloads", "query", "text-2048", "--seconds", "600"]
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--results", str(tmp_path)]
    part = tmp_path / "gpu-script-on-cpu-parts" / "speed-tiny.json"
    with subprocess.Popen(command, cwd=report.RESULTS.parents[1]) as process:
        try:
            (child,) = wait_for(lambda: psutil.Process(process.pid).children())
            wait_for(lambda: part.is_file() and json.loads(part.read_text())["results"])
        finally:
            process.kill()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()
    assert set(json.loads(part.read_text())["results"]) == {"query"}
    merged = gpu.main([*GPU_ON_CPU, "--parts", "--results", str(tmp_path)])
    assert [row["workload"] for row in merged["shapes"]["tiny"]["rows"]] == ["query"]


def wait_for(condition: Callable[[], Any]) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + 240
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


STAND_IN = """
import os, sys
from pathlib import Path
from benchmarks.gpu_parts import PartFile
part = PartFile(Path(sys.argv[1]), "part")
for step in sys.argv[2:]:
    part.step(step, lambda: os._exit(9) if step == "b" else {})
"""


def test_part_of_a_benchmark_goes_on_after_a_step_that_ends_its_process(tmp_path: Path) -> None:
    """As after a CUDA error that stays."""
    gpu_parts.run_part(
        tmp_path, "part", ["a", "b", "c"], 60, lambda steps, _: [sys.executable, "-c", STAND_IN, str(tmp_path), *steps]
    )
    part = gpu_parts.read_parts(tmp_path)["part"]
    assert part["started"] == ["a", "b", "c"]
    assert part["results"] == {"a": {}, "c": {}}
    assert part["faults"] == ["b: the process ended with status 9"]


def test_part_of_a_benchmark_is_stopped_at_its_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "GRACE_SECONDS", 0)
    gpu_parts.run_part(tmp_path, "part", ["a"], 0.2, lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    (fault,) = gpu_parts.read_parts(tmp_path)["part"]["faults"]
    assert fault == "before the first step: stopped after 0 s, the time limit of this part"


@pytest.mark.parametrize("shapes", [{}, {"2b": {"rows": []}}])
def test_gpu_goal_without_its_workload_is_not_measured(shapes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"shapes": shapes}))
    goal = next(goal for goal in goals.GOALS if goal.what == "GPU, 2b: one short query")
    assert goal.row(tmp_path)[2] == goals.NOT_MEASURED


def test_gpu_goal_is_that_of_the_fastest_configuration(tmp_path: Path) -> None:
    times = {peers.OURS: 7.0, f"{peers.OURS}, CUDA graphs, compiled": 1.9, peers.TRANSFORMERS: 1.0}
    who = {name: {"call_ms": ms, "items_per_s": 1e3 / ms} for name, ms in times.items()}
    shapes = {"2b": {"rows": [{"workload": "query", "who": who}]}}
    (tmp_path / "gpu.json").write_text(json.dumps({"shapes": shapes}))
    goal = next(goal for goal in goals.GOALS if goal.what == "GPU, 2b: one short query")
    assert goal.row(tmp_path) == (goal.what, "<= 2 ms", "1.9 ms", "yes")


@pytest.mark.slow
def test_preprocessing_says_how_many_cores_feed_a_gpu(tmp_path: Path) -> None:
    preprocessing.main(["--rounds", "1", "--results", str(tmp_path)])
    data = saved(tmp_path, "preprocessing")
    for rates in data["images_per_s"].values():
        assert rates[preprocessing.OURS] >= SLOWEST / 2 * rates[preprocessing.RESIZE]
    per_core = data["images_per_s"]["image-448"][preprocessing.OURS]
    assert data["gpu_images_per_s"]["2b"] == pytest.approx(data["cores"]["2b"] * per_core)
    assert data["gpu_images_per_s"]["8b"] < data["gpu_images_per_s"]["2b"] / 3


@pytest.mark.slow
def test_decoding_in_processes_takes_about_as_long_as_in_threads_and_before(tmp_path: Path) -> None:
    decoding.main(["--rounds", "1", "--num-items", "2", "--results", str(tmp_path)])
    found = saved(tmp_path, "decoding")["items_per_s"]
    if guard.find_commit(decoding.BEFORE_PROCESSES):  # a clone may have no history
        assert {kind for kind, rates in found.items() if len(rates) < 5} == {"pictures, 448x448 AVIF"}  # unknown before
    for kind, rates in found.items():
        assert all(rates[ratio] > SLOWEST / 2 for ratio in decoding.RATIOS if ratio in rates), kind


@pytest.mark.slow
def test_growth_says_whether_it_is_flat(tmp_path: Path) -> None:
    growth.main(["--sizes", "64", "640", "--where", "library", "--warm-up", "640", "--results", str(tmp_path)])
    data = saved(tmp_path, "growth")
    assert [row["items"] for row in data["rows"]] == [64, 640, 64]
    assert data["verdicts"]["library"]["text"].startswith(("flat", "NOT flat"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("neighbors", "dtype", "suffix"),
    [(0, "float32", ""), (0, "bfloat16", "-bfloat16"), (1, "float32", "-neighbors-1")],
)
def test_server_answers_right_under_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, neighbors: int, dtype: str, suffix: str
) -> None:
    num_busy = []
    drive = server._drive

    def counted(*arguments: Any) -> dict[str, float]:
        num_busy.append(len(active_children()))
        return drive(*arguments)

    monkeypatch.setattr(server, "_drive", counted)
    servers = [contenders.OURS, contenders.BARE]
    few = ["--callers", "4", "--sizes", "1", "--rounds", "1", "--seconds", "1", "--neighbors", f"{neighbors}"]
    server.main(["--shape", "tiny", "--dtype", dtype, "--servers", *servers, *few, "--results", str(tmp_path)])
    who = saved(tmp_path, f"server-tiny-text-mixed{suffix}")["cells"][0]["who"]
    assert num_busy == [neighbors] * 2
    assert active_children() == []
    for name in servers:
        assert who[name]["num_checked"] > 0
        assert who[name]["num_refused"] == who[name]["num_unfinished"] == 0


def test_vllm_is_asked_for_the_same_tokens() -> None:
    with random_folder("tiny") as folder:
        preprocess = library.load_preprocessor(folder)
        tokenizer = load_tokenizer(folder)
    (body,) = VLLMProtocol().bodies([{"text": "red"}, {"text": "blue"}], 2)
    for prompt, text in zip(json.loads(body)["input"], ("red", "blue"), strict=True):
        expected = preprocess(item_from_fields({"text": text})).input_ids
        assert tokenizer.encode(prompt).ids == expected.tolist()
    assert len(VLLMProtocol().bodies([{"image": b"a"}, {"image": b"b"}], 1)) == 2
    assert VLLMProtocol().bodies([{"image": b"a"}, {"image": b"b"}], 2) == []


@pytest.mark.slow
def test_callers_with_and_without_keys_of_their_own_are_measured(tmp_path: Path) -> None:
    callers.main(["--seconds", "2", "--connections", "8", "--results", str(tmp_path)])
    alone, *rows = saved(tmp_path, "callers")["rows"]
    assert alone["flood"] == "nothing"
    assert [(row["flood"], row["key"]) for row in rows] == [
        (name, key) for name in callers.FLOODS for key in ("the same", "another")
    ]
    assert all(0 < row["p50_ms"] <= row["p90_ms"] for row in (alone, *rows))


@pytest.mark.slow
def test_overload_is_refused_and_nothing_else_happens(tmp_path: Path) -> None:
    few = ["--shape", "tiny", "--seconds", "4", "--capacity-seconds", "2"]
    overload.main([*few, "--results", str(tmp_path)])
    data = saved(tmp_path, "overload")
    assert set(data["statuses"]) == {"200", "429"}
    assert data["p99_s"] <= 10
    assert data["growth_mb"] <= overload.MAX_GROWTH_MB
    assert data["answered"] >= data["capacity"] * SLOWEST  # the driver takes its share of so few cores


@pytest.mark.slow
def test_soak_gives_no_wrong_vector_and_stays_flat(tmp_path: Path) -> None:
    soak.main(["--requests", "500", "--results", str(tmp_path)])
    data = saved(tmp_path, "soak")
    assert data["wrong"] == 0
    assert data["growth_files"] <= 8
    # In so short a run the pools are still filling. Where oneDNN's product is chosen, it prepares one for each number
    # of rows: 266 MB after 200 of them (embedder/model/products.py).
    assert data["growth_mb"] < 320
    assert data["answered"] + data["refused"] == 500
    assert data["refused"] > 20


def hot(items: list[Item], shift: int) -> Any:
    """One-hot rows, moved on by `shift`."""
    return np.eye(len(items), dtype=np.float32)[[(index + shift) % len(items) for index in range(len(items))]]


def test_peer_with_other_vectors_ends_the_run() -> None:
    contestants = [Peer(peers.OURS, lambda items: hot(items, 0)), Peer("other", lambda items: hot(items, 1))]
    with pytest.raises(WrongVectors, match="other"):
        compare("text-16", contestants, WORDS, rounds=1, seconds=0.1, limit=lambda: 1.0)


def test_rounds_take_turns() -> None:
    calls: list[str] = []

    def embed(name: str, items: list[Item]) -> Any:
        calls.append(name)
        return hot(items, 0)

    contestants = [Peer(name, partial(embed, name)) for name in (peers.OURS, "b")]
    compare("text-16", contestants, WORDS, rounds=3, seconds=5, limit=lambda: 1.0)
    assert calls[-6:] == [peers.OURS, "b"] * 3


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_is_the_same_every_time(name: str) -> None:
    items = make_items(name, 3, WORDS)
    assert items == make_items(name, 3, WORDS)
    assert make_items(name, 2, WORDS) == items[:2]
    assert len({item.get("image") for item in items if "image" in item}) == sum("image" in item for item in items)


def test_gaps_are_those_between_kernels_of_any_stream() -> None:
    found = gaps.summarize([(30.0, 40.0), (0.0, 10.0), (5.0, 15.0)])
    assert found == {"num_kernels": 3, "span_ms": 0.04, "busy": "62.5%", "num_gaps": 1, "longest_us": 15.0}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", choices.MAX_DIFFERENCES)
def test_variants_of_the_forward_pass_give_the_same_vectors(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(choices.shutil, "which", lambda _: None)  # compiling takes as long as all the rest
    with random_folder("tiny") as folder:
        times = choices._forward_times(folder, list(choices.BATCHES), dtype, rounds=1)
    assert set(times) == set(choices.BATCHES)
    assert all(len(of_one) == 9 and of_one[choices.OURS] == 1 for of_one in times.values())


@pytest.mark.parametrize("dtype", choices.MAX_DIFFERENCES)
def test_variant_with_other_vectors_ends_the_run(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    def without_norm(embedder: Any) -> Any:
        return choices._patched(embedder, language, _rms_norm=lambda _, states: states)

    variants = [(choices.OURS, choices._as_it_is, {}), ("wrong", without_norm, {})]
    monkeypatch.setattr(choices, "_variants", lambda _: variants)
    with random_folder("tiny") as folder, pytest.raises(SystemExit, match="wrong gives other vectors"):
        choices._forward_times(folder, list(choices.BATCHES), dtype, rounds=1)


@pytest.mark.slow
def test_batches_have_the_lengths_that_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    num_batches: dict[Any, int] = {}
    launch = Models._launch

    def counted(models: Models, inputs: Any) -> Any:
        num_batches[models] = num_batches.get(models, 0) + 1
        return launch(models, inputs)

    monkeypatch.setattr(Models, "_launch", counted)
    with random_folder("tiny") as folder:
        rates = choices._batch_lengths(folder, rounds=1, num_items=64)
    assert list(rates) == list(choices.BATCH_TOKENS)
    assert all(rate > 0 for rate in rates.values())
    shortest, *_, longest = num_batches.values()
    assert shortest > 2 * longest


@pytest.mark.slow
def test_frozen_heap_is_not_walked() -> None:
    unfrozen, frozen = choices._pauses_ms().values()
    assert frozen < unfrozen


def test_commands_declare_torchvision_before_they_import_transformers() -> None:
    """Otherwise they end with an error next to a CPU build of torch. Other tests of this process declare it first."""
    sources = [path.read_text(encoding="utf-8") for path in report.RESULTS.parent.rglob("*.py")]
    importing = [
        text for text in sources if re.search(r"^(from|import) (transformers|torchvision)\b", text, re.MULTILINE)
    ]
    assert importing
    for text in importing:
        assert re.search(r"^declare_torchvision_operators\(\)$.*^from transformers", text, re.MULTILINE | re.DOTALL)


def test_documented_goals_are_those_of_the_recorded_results() -> None:
    documented = (report.RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert goals.table(report.RESULTS) in documented


def test_goal_is_met_missed_or_not_measured(tmp_path: Path) -> None:
    goal = goals.Goal("speed", "file", lambda data: float(data["speed"]), 2)
    most = goals.Goal("share", "file", lambda data: float(data["speed"]), 2, "%", is_most=True)
    assert goal.row(tmp_path) == ("speed", ">= 2x", "not measured yet", "")
    (tmp_path / "file.json").write_text('{"speed": 2.5}')
    assert goal.row(tmp_path) == ("speed", ">= 2x", "2.5x", "yes")
    assert most.row(tmp_path) == ("share", "<= 200%", "250%", "**no**")
