"""Request bodies from items, and vectors from responses, for each kind of server."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from benchmarks.checkpoints import INSTRUCTION
from benchmarks.workloads import Item

Rows = NDArray[np.float32]


class LocalProtocol:
    """The `local` provider schema of the service and its peers: `{"input": ..}` and `{"embedding": ..}`."""

    def bodies(self, items: Sequence[Item], size: int) -> list[bytes]:
        """One body per `size` consecutive items."""
        groups = _groups([item["text"] if "text" in item else data_uri(item["image"]) for item in items], size)
        return [orjson.dumps({"input": group[0] if size == 1 else group}) for group in groups]

    def rows(self, answer: bytes) -> Rows:
        """(num_items, hidden_size)."""
        return np.atleast_2d(np.array(orjson.loads(answer)["embedding"], np.float32))


class VLLMProtocol:
    """vLLM's `/v1/embeddings`: texts as complete prompts, because `input` gets no template; images as messages."""

    name = "model"

    def bodies(self, items: Sequence[Item], size: int) -> list[bytes]:
        """One body per `size` consecutive items; none for several images, because a request accepts only one."""
        if "text" in items[0]:
            fields = [{"input": group} for group in _groups([_prompt(item["text"]) for item in items], size)]
        else:
            fields = [{"messages": _chat(item["image"]), **_AS_PROMPTED} for item in items] if size == 1 else []
        return [orjson.dumps({"model": self.name, **one}) for one in fields]

    def rows(self, answer: bytes) -> Rows:
        """(num_items, hidden_size)."""
        return np.array([one["embedding"] for one in orjson.loads(answer)["data"]], np.float32)


_AS_PROMPTED = {"add_generation_prompt": True, "add_special_tokens": True}  # not the default for messages


def data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _groups(inputs: list[str], size: int) -> list[list[str]]:
    return [inputs[start : start + size] for start in range(0, len(inputs), size)]


def _prompt(text: str) -> str:
    system = f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n"
    return f"{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def _chat(jpeg: bytes) -> list[dict[str, Any]]:
    picture = {"type": "image_url", "image_url": {"url": data_uri(jpeg)}}
    system = {"role": "system", "content": [{"type": "text", "text": INSTRUCTION}]}
    return [system, {"role": "user", "content": [picture]}]
