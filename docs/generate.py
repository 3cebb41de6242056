"""Write the generated parts of README.md and docs/: `python docs/generate.py`.

A page marks them by `<!-- generated: NAME -->` and `<!-- /generated -->` around a table, or `<!-- figure: NAME -->` and
`<!-- /figure -->` around a number. `tests/docs` fails where a page differs from what the code and the recorded
benchmark results give.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script has its own folder there

import embedder.server  # noqa: E402
from benchmarks import front, hardware, invariance, output_types, pretended_gpu, report, starts, weights  # noqa: E402
from embedder.errors import errors_table  # noqa: E402
from embedder.settings import settings_table  # noqa: E402
from embedder.telemetry.metrics import Metrics  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
FAMILY_25, XEON = "epyc-family-25/", "xeon-amx/"  # the results of other processors
GPUS, NOT_MEASURED = ("H100", "H200"), "not measured yet"
WORDS, HISTOGRAM = "ids of a text of 17 words", "64 values into a histogram"  # steps of `benchmarks.micro`
VECTOR, GZIP, GZIP_THOUSANDS = "a vector of 2,048 values as JSON", "gzip of 100 vectors of 2,048 values", 204.8
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_MARKED = re.compile(r"<!-- (generated|figure): (\S+) -->.*?<!-- /\1 -->", re.DOTALL)


def rendered(text: str, folder: str) -> str:
    """A page's text with its generated parts up to date. `folder`: the way from the page to the root, as `../`."""

    def part(match: re.Match[str]) -> str:
        kind, name = match.groups()
        start, end = f"<!-- {kind}: {name} -->", f"<!-- /{kind} -->"
        return f"{start}\n{TABLES[name](folder)}\n{end}" if kind == "generated" else f"{start}{FIGURES[name]()}{end}"

    return _MARKED.sub(part, text)


def way_to_root(page: Path) -> str:
    """`../` for each folder between the page and the root."""
    return "../" * (len(page.relative_to(ROOT).parts) - 1)


def record(name: str) -> dict[str, Any]:
    """A file of benchmarks/results/."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def library_ratio(workload: str, peer: str, folder: str = "", dtype: str = "float32") -> float:
    """Items per second of the library over those of a peer."""
    who = library_row(workload, folder, dtype)["who"]
    return float(who["ours"]["items_per_s"] / who[peer]["items_per_s"])


def library_row(workload: str, folder: str = "", dtype: str = "float32") -> dict[str, Any]:
    """What was measured with a workload."""
    row: dict[str, Any]
    (row,) = [one for one in record(f"{folder}library-small-{dtype}")["workloads"] if one["workload"] == workload]
    return row


def callers_s(key: str) -> float:
    """The median time of a short text next to texts of 512 tokens that are sent with this key."""
    rows = record("callers")["rows"]
    times = [row["p50_ms"] / 1000 for row in rows if (row["flood"], row["key"]) == ("texts of 512 tokens", key)]
    return float(times[0])


def server_ratio(name: str, callers: int, peer: str, figure: str = "requests_per_s", folder: str = "") -> float:
    """A figure of the service over that of a peer, for requests of one item."""
    cells = record(f"{folder}server-small-{name}")["cells"]
    (who,) = [cell["who"] for cell in cells if (cell["size"], cell["callers"]) == (1, callers)]
    return float(who["service"][figure] / who[peer][figure])


def speed_rows() -> list[tuple[str, str, float, bool]]:
    """What was compared on a CPU: its name, the record, the ratio, and whether README.md shows it."""
    library, texts, pictures = "library-small-float32", "server-small-text-mixed", "server-small-image-448"
    return [
        ("library, texts of mixed lengths, against padded transformers", library,
         library_ratio("text-mixed", "transformers"), True),
        ("library, texts of mixed lengths, against sentence-transformers", library,
         library_ratio("text-mixed", "sentence-transformers"), False),
        ("service, texts, 64 callers, against FastAPI with sentence-transformers", texts,
         server_ratio("text-mixed", 64, "FastAPI + s-t"), True),
        ("service, texts, 1 caller, against vLLM", texts, server_ratio("text-mixed", 1, "vLLM"), False),
        ("service, texts, 64 callers, against vLLM", texts, server_ratio("text-mixed", 64, "vLLM"), True),
        ("service, 448x448 pictures, 1 caller, against vLLM", pictures, server_ratio("image-448", 1, "vLLM"), False),
        ("service, 448x448 pictures, 16 callers, against vLLM", pictures, server_ratio("image-448", 16, "vLLM"), True),
    ]  # fmt: skip


def speed_table(folder: str) -> str:
    """What the records say of the speed on a CPU."""
    lines = ["| what | throughput | record |", "|---|---|---|"]
    lines += [f"| {what} | {ratio:.2f}x | {_link(file, folder)} |" for what, file, ratio, _ in speed_rows()]
    return "\n".join(lines)


def speed_summary(_: str) -> str:
    """One ratio for each system that was compared; for vLLM, one of texts and one of pictures."""
    lines = ["| what | throughput |", "|---|---|"]
    lines += [f"| {what} | {ratio:.2f}x |" for what, _, ratio, is_shown in speed_rows() if is_shown]
    return "\n".join(lines)


def latency_table(_: str) -> str:
    """Median and 99th percentile of single texts of mixed lengths."""
    lines = ["| server | callers | requests/s | p50 | p99 |", "|---|---|---|---|---|"]
    for cell in record("server-small-text-mixed")["cells"]:
        for who, figures in cell["who"].items():
            if cell["size"] == 1 and "model" not in who and "bare" not in who:
                times = [f"{figures[name] / 1000:.2f} s" for name in ("p50_ms", "p99_ms")]
                lines.append(
                    f"| {who} | {cell['callers']} | {figures['requests_per_s']:.1f} | {times[0]} | {times[1]} |"
                )
    return "\n".join(lines)


def library_table(_: str) -> str:
    """What one process reaches on a CPU, next to the peers, and its share of the machine's fastest matrix product."""
    head = (
        "workload | ours, items/s | share of the limit | attention counted too | transformers | sentence-transformers"
    )
    lines = [f"| {head} |", "|---|---|---|---|---|---|"]
    for row in record("library-small-float32")["workloads"]:
        ours, *peers = (row["who"].get(name) for name in ("ours", "transformers", "sentence-transformers"))
        ratios = [f"{one['items_per_s'] / ours['items_per_s']:.2f}x" if one else "" for one in peers]
        shares = [f"{ours[share]:.0%}" for share in ("share_of_limit", "share_with_attention")]
        cells = (row["workload"], report.number(ours["items_per_s"]), *shares, *ratios)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def processors_table(_: str) -> str:
    """The figures of the other tables next to those of other processors, and of one of them next to a busy process."""

    def of_library(folder: str, dtype: str = "float32") -> list[str]:
        cells = [f"{library_row('text-512', folder, dtype)['limit_gflop_per_s']:.0f} GFLOP/s"]
        for workload in ("text-512", "text-2048", "image-448"):
            ours = library_row(workload, folder, dtype)["who"]["ours"]
            cells.append(f"{ours['share_of_limit']:.0%}, {ours['share_with_attention']:.0%}")
        peers = ("transformers", "sentence-transformers")
        return cells + [f"{library_ratio('text-mixed', peer, folder, dtype):.2f}x" for peer in peers]

    def against_vllm(folder: str, suffix: str = "") -> list[str]:
        loads = (("text-mixed", 1), ("text-mixed", 64), ("image-448", 1), ("image-448", 16))
        return [f"{server_ratio(f'{name}{suffix}', callers, 'vLLM', folder=folder):.2f}x" for name, callers in loads]

    names = (
        "fastest matrix product",
        *(f"share of it, and with attention: {what}" for what in ("512 tokens", "2,048 tokens", "448x448 pictures")),
        *(f"library, mixed texts, against {peer}" for peer in ("transformers", "sentence-transformers")),
        *(
            f"service against vLLM, {what}"
            for what in ("texts, 1 caller", "texts, 64 callers", "pictures, 1 caller", "pictures, 16 callers")
        ),
    )
    columns = {
        "the other tables": of_library("") + against_vllm(""),
        "EPYC, family 25": of_library(FAMILY_25) + against_vllm(FAMILY_25),
        "next to a busy process": [""] * 6 + against_vllm(FAMILY_25, "-neighbors-1"),
        "Xeon": of_library(XEON) + against_vllm(XEON),
        "Xeon, bfloat16": of_library(XEON, "bfloat16") + against_vllm(XEON, "-bfloat16"),
    }
    lines = [f"| what | {' | '.join(columns)} |", f"|{'---|' * (1 + len(columns))}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in zip(names, *columns.values(), strict=True))])


def bfloat16_table(_: str) -> str:
    """The library in bfloat16, on a processor with AMX, compared with itself in float32."""
    lines = ["| workload | bfloat16, items/s | compared with float32 | lowest cosine |", "|---|---|---|---|"]
    for row in record(f"{XEON}library-small-bfloat16")["workloads"]:
        ours, exact = row["who"]["ours"], row["who"]["ours, float32"]
        ratio = ours["items_per_s"] / exact["items_per_s"]
        lines.append(
            f"| {row['workload']} | {report.number(ours['items_per_s'])} | {ratio:.2f}x | {ours['min_cosine']:.4f} |"
        )
    return "\n".join(lines)


def gpu_table(_: str) -> str:
    """What each GPU reaches, from the records of `benchmarks.gpu` that name it."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("gpu*.json"))]
    by_gpu = {gpu: [one for one in records if gpu in str(one.get("environment", {}).get("gpu"))] for gpu in GPUS}
    lines = ["| GPU | model | workload | roofline allows | ours | transformers |", "|---|---|---|---|---|---|"]
    for gpu, found in by_gpu.items():
        for shape, counts in record("gpu_counts")["shapes"].items():
            for workload in ("query", "text-64", "image-448"):
                rows = found[-1]["shapes"].get(shape, {}).get("rows", []) if found else []
                who = next((row["who"] for row in rows if row["workload"] == workload), {})
                ours = [one["items_per_s"] for name, one in who.items() if name.startswith("ours")]
                peer = who.get("transformers", {}).get("items_per_s")
                cells = [f"{max(ours):.0f} items/s" if ours else NOT_MEASURED, f"{peer:.0f} items/s" if peer else ""]
                allowed = counts[workload]["items"] / counts[workload]["roofline_ms"] * 1e3
                limit = f"{allowed:.0f} items/s" if gpu == "H200" else ""
                lines.append(f"| {gpu} | {shape.upper()} | {workload} | {limit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def output_types_table(_: str) -> str:
    table: str = output_types.table(record("output_types")["rows"])
    return table


def starts_table(_: str) -> str:
    """The parts of a start of the bundled model."""
    found = record("starts-bundled")
    return starts.table(found["parts"], found["commands"])


def ledger_table(_: str) -> str:
    """The tricks ledger in the docstring of embedder.server: entries with a name, and indented lines about it."""
    lines = ["| what | why and how | can be removed when | test |", "|---|---|---|---|"]
    _, _, ledger = (embedder.server.__doc__ or "").partition("\n\n")[2].partition("\n\n")
    for entry in re.split(r"\n(?=\S)", ledger.strip()):
        name, *about = entry.splitlines()
        text, goes_when, test = re.split(r" Goes when: | Test: ", " ".join(map(str.strip, about)))
        lines.append(f"| {', '.join(f'`{one}`' for one in name.split(', '))} | {text} | {goes_when} | {test} |")
    return "\n".join(lines)


def hardware_table(_: str) -> str:
    """Which model fits which GPU, and the rate that its arithmetic allows (`hardware.py` in benchmarks)."""
    return hardware.table(record("gpu_counts")["shapes"])


def _link(file: str, folder: str) -> str:
    return f"[{file}.json]({folder}benchmarks/results/{file}.json)"


TABLES: dict[str, Callable[[str], str]] = {
    "settings": lambda _: settings_table(),
    "metrics": lambda _: Metrics(()).table(),
    "errors": lambda _: errors_table(),
    "speed": speed_table,
    "speed_summary": speed_summary,
    "latency": latency_table,
    "library": library_table,
    "bfloat16": bfloat16_table,
    "processors": processors_table,
    "gpu": gpu_table,
    "front": lambda _: front.table(record("front")["rows"]),
    "pretended_gpu": lambda _: pretended_gpu.table(record("pretended_gpu")["rows"]),
    "starts": starts_table,
    "output_types": output_types_table,
    "invariance": lambda _: invariance.table(record("invariance")["rows"]),
    "hardware": hardware_table,
    "weights": lambda _: weights.describe(record("weights")),
    "ledger": ledger_table,
}

FIGURES: dict[str, Callable[[], str]] = {
    "bulk.ratio": lambda: f"{record('bulk')['ratio']:.2f}",
    "decoding.clips_240": lambda: f"{decoding_ratio('clips, 320x240'):.2f}",
    "decoding.clips_720": lambda: f"{decoding_ratio('clips, 1280x720'):.2f}",
    "decoding.clips_240_before": lambda: f"{decoding_ratio('clips, 320x240', 'before'):.2f}",
    "decoding.clips_720_before": lambda: f"{decoding_ratio('clips, 1280x720', 'before'):.2f}",
    "front.single": lambda: f"{record('front')['rows'][0]['now']:.1f}",
    "growth.library": lambda: f"{record('growth')['verdicts']['library']['time_ratio']:.2f}",
    "growth.server": lambda: f"{record('growth')['verdicts']['server']['time_ratio']:.2f}",
    "page_rendering.ms": lambda: f"{1000 * render_s_per_page():.0f}",
    "page_rendering.percent": lambda: f"{100 * record('page_rendering')['share']:.2f}",
    "micro.bentoml_json_ms": lambda: f"{micro_us(VECTOR, 'usual_us') / 1000:.1f}",
    "micro.gzip_ms": lambda: f"{micro_us(GZIP, 'ours_us') / 1000 / GZIP_THOUSANDS:.2f}",
    "micro.json_ms": lambda: f"{micro_us(VECTOR, 'ours_us') / 1000:.2f}",
    "micro.json_thousand_ms": lambda: f"{micro_us(VECTOR, 'ours_us') / 1000 / 2.048:.3f}",
    "micro.histogram_us": lambda: f"{micro_us(HISTOGRAM, 'ours_us'):.0f}",
    "micro.observe_us": lambda: f"{micro_us(HISTOGRAM, 'usual_us'):.0f}",
    "micro.tokenizer_us": lambda: f"{micro_us(WORDS, 'usual_us'):.0f}",
    "micro.words_us": lambda: f"{micro_us(WORDS, 'ours_us'):.1f}",
    "callers.same_s": lambda: f"{callers_s('the same'):.1f}",
    "callers.another_s": lambda: f"{callers_s('another'):.1f}",
    "overload.p99_s": lambda: f"{record('overload')['p99_s']:.1f}",
    "preprocessing.image-448": lambda: (
        f"{record('preprocessing')['images_per_s']['image-448']['ours: base64 to model input']:.0f}"
    ),
    "server.p99_against_fastapi": lambda: f"{server_ratio('text-mixed', 64, 'FastAPI + s-t', 'p99_ms'):.2f}",
    "soak.growth_mb": lambda: f"{record('soak')['growth_mb']:.0f}",
    "soak.refused": lambda: f"{record('soak')['refused']:,}",
    "soak.wrong": lambda: f"{record('soak')['wrong']}",
}


def decoding_ratio(kind: str, other: str = "threads") -> float:
    """Items of a kind per second, decoded as the service does, over those decoded in its threads only."""
    return float(record("decoding")["items_per_s"][kind][f"processes / {other}"])


def micro_us(step: str, which: str) -> float:
    """Microseconds of CPU time of a small step of the code."""
    return float(record("micro")["steps"][step][which])


def render_s_per_page() -> float:
    """CPU seconds that rendering a page of the demo documents takes."""
    measured = record("page_rendering")
    return float(measured["render_cpu_s"] / measured["pages"])


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = rendered(text, way_to_root(page))
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"updated {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
