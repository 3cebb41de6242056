"""Print the goals and the recorded results, as the table in `benchmarks/README.md`: `python -m benchmarks.goals`.

Each goal is compared with the results file of the benchmark that measures it. Without that file or figure, the goal
counts as not measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import contenders, front, peers, pretended_gpu, report, weights

WEIGHTS = weights.NAME
NOT_MEASURED = "not measured yet"
LIBRARY, GPU = "library-small-float32", "gpu"
IN_BFLOAT16 = "xeon-amx/library-small-bfloat16"  # on a processor with AMX
TEXTS, SHORT_TEXTS, PICTURES = "server-small-text-mixed", "server-small-text-16", "server-small-image-448"
RANKINGS = "rerank-small"


@dataclass(frozen=True)
class Goal:
    """A figure that must be at least `goal`, or at most `goal` with `is_most`.

    `reached` reads the figure from the results in `file`; None if it was not measured.
    """

    what: str
    file: str
    reached: Callable[[dict[str, Any]], float | None]
    goal: float
    unit: str = "x"
    is_most: bool = False

    def row(self, folder: Path) -> tuple[str, str, str, str]:
        """Description, goal, figure, and whether the goal is met."""
        sign = "<=" if self.is_most else ">="
        goal = f"{sign} {self._shown(self.goal)}"
        path = folder / f"{self.file}.json"
        figure = self.reached(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
        if figure is None:
            return self.what, goal, NOT_MEASURED, ""
        is_met = figure <= self.goal if self.is_most else figure >= self.goal
        return self.what, goal, self._shown(figure), "yes" if is_met else "**no**"

    def _shown(self, figure: float) -> str:
        if self.unit == "%":
            return f"{figure:.0%}"
        space = "" if self.unit in ("", "x") else " "
        return f"{report.number(figure)}{space}{self.unit}"


def main() -> None:
    print(table(report.RESULTS))


def table(folder: Path) -> str:
    """Markdown."""
    return report.table(("what", "goal", "reached", "met"), [goal.row(folder) for goal in GOALS])


def _workload(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (row,) = [one for one in rows if one["workload"] == name]
    who: dict[str, Any] = row["who"]
    return who


def _against(name: str, peer: str) -> Callable[[dict[str, Any]], float]:
    def ratio(data: dict[str, Any]) -> float:
        who = _workload(data["workloads"], name)
        return float(who[peers.OURS]["items_per_s"] / who[peer]["items_per_s"])

    return ratio


def _share(name: str, figure: str = "share_of_limit") -> Callable[[dict[str, Any]], float]:
    return lambda data: float(_workload(data["workloads"], name)[peers.OURS][figure])


def _on_gpu(shape: str, name: str, figure: str) -> Callable[[dict[str, Any]], float | None]:
    """The figure of the fastest configuration of the engine."""

    def reached(data: dict[str, Any]) -> float | None:
        rows = data["shapes"].get(shape, {"rows": []})["rows"]
        who = next((row["who"] for row in rows if row["workload"] == name), {})
        ours = [one for name, one in who.items() if name.startswith(peers.OURS)]
        return float(max(ours, key=lambda one: one["items_per_s"])[figure]) if ours else None

    return reached


def _ranked(name: str, who: str, peer: str) -> Callable[[dict[str, Any]], float | None]:
    def ratio(data: dict[str, Any]) -> float | None:
        row = _workload(data["workloads"], name)
        return float(row[who]["documents_per_s"] / row[peer]["documents_per_s"]) if peer in row else None

    return ratio


def _cell(data: dict[str, Any], callers: int) -> dict[str, Any]:
    (cell,) = [one for one in data["cells"] if (one["size"], one["callers"]) == (1, callers)]
    who: dict[str, Any] = cell["who"]
    return who


def _served(callers: int, figure: str, who: str, peer: str) -> Callable[[dict[str, Any]], float]:
    return lambda data: float(_cell(data, callers)[who][figure] / _cell(data, callers)[peer][figure])


def _callers(number: int) -> str:
    return "1 caller" if number == 1 else f"{number} callers"


def _spent(workload: str) -> Callable[[dict[str, Any]], float]:
    return lambda data: float(next(row["now"] for row in data["rows"] if row["workload"] == workload))


def _waited(model: str) -> Callable[[dict[str, Any]], float]:
    """The p99 of a query next to bulk requests, with one worker and the launch that is the default on a GPU."""
    load = next(iter(pretended_gpu.LOADS))
    chosen = {"load": load, "model": model, "workers": 1, "launch": "one call"}
    return lambda data: float(next(row["p99_ms"] for row in data["rows"] if chosen.items() <= row.items()))


OURS, FASTAPI, VLLM, NULL = contenders.OURS, contenders.FASTAPI, contenders.VLLM, contenders.NULL

GOALS = (
    *(
        goal
        for shape, most_ms in (("2b", 2.0), ("8b", 6.0))
        for goal in (
            Goal(
                f"GPU, {shape}: text of 64 tokens, share of the matrix rate",
                GPU,
                _on_gpu(shape, "text-64", "share_of_limit"),
                0.65,
                "%",
            ),
            Goal(
                f"GPU, {shape}: 448x448 JPEGs, share of the matrix rate",
                GPU,
                _on_gpu(shape, "image-448", "share_of_limit"),
                0.5,
                "%",
            ),
            Goal(
                f"GPU, {shape}: one short query", GPU, _on_gpu(shape, "query", "call_ms"), most_ms, "ms", is_most=True
            ),
        )
    ),
    *(
        Goal(
            f"simulated GPU, {model.lower()}: a query next to bulk requests, p99",
            pretended_gpu.FILE,
            _waited(model),
            most_ms,
            "ms",
            is_most=True,
        )
        for model, most_ms in (("2B", 100.0), ("8B", 150.0))
    ),
    Goal("CPU, mixed text, engine against padded transformers", LIBRARY, _against("text-mixed", peers.TRANSFORMERS), 2),
    Goal(
        "CPU, mixed text, engine against sentence-transformers",
        LIBRARY,
        _against("text-mixed", peers.SENTENCE_TRANSFORMERS),
        5,
    ),
    Goal("CPU, mixed text, share of the matrix rate", LIBRARY, _share("text-mixed"), 0.6, "%"),
    *(
        Goal(f"CPU, {what}, share of the matrix rate{counted}", LIBRARY, _share(name, figure), 0.7, "%")
        for what, name in (
            ("text of 512 tokens", "text-512"),
            ("text of 2,048 tokens", "text-2048"),
            ("448x448 JPEGs", "image-448"),
        )
        for counted, figure in (("", "share_of_limit"), (", attention's products counted too", "share_with_attention"))
    ),
    *(
        Goal(
            f"CPU with AMX, {what}, bfloat16 against float32: items/s",
            IN_BFLOAT16,
            _against(name, peers.OURS_IN_FLOAT32),
            goal,
        )
        for what, name, goal in (("mixed text", "text-mixed", 2.0), ("448x448 JPEGs", "image-448", 1.5))
    ),
    Goal(
        "service against FastAPI with sentence-transformers, 64 callers: requests/s",
        TEXTS,
        _served(64, "requests_per_s", OURS, FASTAPI),
        4,
    ),
    Goal("the same: p99", TEXTS, _served(64, "p99_ms", OURS, FASTAPI), 1, is_most=True),
    *(
        Goal(
            f"service with a null model, {what}: CPU of an item", front.FILE, _spent(what), most_ms, "ms", is_most=True
        )
        for what, most_ms in ((front.SINGLE, 0.16), (front.MANY, 0.06))
    ),
    Goal(
        "service without the engine, a short text, 1 caller: p50 with a null model",
        SHORT_TEXTS,
        lambda data: float(_cell(data, 1)[NULL]["p50_ms"]),
        2,
        "ms",
        is_most=True,
    ),
    *(
        Goal(
            f"service against vLLM, {what}, {_callers(number)}: requests/s",
            file,
            _served(number, "requests_per_s", OURS, VLLM),
            goal,
        )
        for what, file, goal, numbers in (("texts", TEXTS, 1.5, (1, 64)), ("448x448 JPEGs", PICTURES, 1.2, (1, 16)))
        for number in numbers
    ),
    Goal(
        "reranker, a picture and 100 texts, library against sentence-transformers: documents/s",
        RANKINGS,
        _ranked("picture query, texts", "library", "CrossEncoder"),
        3,
    ),
    Goal(
        "the same, service against vLLM",
        RANKINGS,
        _ranked("picture query, texts", OURS, VLLM),
        1.5,
    ),
    Goal(
        "CPU, 2b with int8 weights: memory of the weights",
        WEIGHTS,
        lambda data: weights.most_memory(data["depth"]) if "depth" in data else None,
        weights.MAX_RESIDENT_GB,
        "GB",
        is_most=True,
    ),
    Goal(
        "the same: 1 - lowest cosine to bfloat16",
        WEIGHTS,
        lambda data: 1 - weights.least_cosine(data["depth"]) if "depth" in data else None,
        1 - weights.MIN_COSINE,
        "",
        is_most=True,
    ),
    Goal(
        "CPU, layers of 2b with int8 weights, slowest workload: time against float32",
        WEIGHTS,
        lambda data: weights.slowest_ratio(data["speed"]) if "speed" in data else None,
        1,
        is_most=True,
    ),
    Goal(
        "int8 weights, bundled model: recall lost, in points",
        WEIGHTS,
        lambda data: weights.lost_points(data["recall"]) if "recall" in data else None,
        weights.MAX_LOST_POINTS,
        "",
        is_most=True,
    ),
)

if __name__ == "__main__":
    main()
