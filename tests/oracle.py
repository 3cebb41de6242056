"""The oracle: plain transformers, padded, as the published reference code embeds (QwenLM/Qwen3-VL-Embedding 8ce3aab).

Nothing here is shared with `embedder` but the torchvision declaration: prompt by the checkpoint's chat template,
pictures by qwen-vl-utils, patches by Qwen3VLProcessor, forward by Qwen3VLModel, last token, cut, unit length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

from qwen_vl_utils.vision_process import process_vision_info  # noqa: E402 - after the declaration
from transformers import Qwen3VLModel, Qwen3VLProcessor  # noqa: E402 - after the declaration

DEFAULT_INSTRUCTION = "Represent the user's input."


class Oracle:
    """transformers' padded forward over one checkpoint."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        max_pixels: int = 1_310_720,
        processor: Path | None = None,
    ) -> None:
        """`processor` is a folder to take the processor from, where `folder` has none."""
        self.model = Qwen3VLModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
        self.processor = Qwen3VLProcessor.from_pretrained(processor or folder, padding_side="right")
        self.max_pixels = max_pixels

    @torch.no_grad()
    def embed(self, items: list[dict[str, Any]], max_tokens: int = 0) -> NDArray[np.float32]:
        """(num_items, hidden_size), unit length. `items` as `Embedder.embed` takes them, with PIL images.

        `max_tokens` cuts text items inside the text: what is over is taken from before the template's tail.
        """
        conversations = [self._conversation(item) for item in items]
        texts = self.processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        # transformers 4.57, of the checkpoints' time, put a clip's frames in the place of this whole triple
        texts = [text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>") for text in texts]
        images, videos, kwargs = process_vision_info(
            conversations, image_patch_size=16, return_video_kwargs=True, return_video_metadata=True
        )
        metadata = None
        if videos is not None:
            videos, metadata = map(list, zip(*videos, strict=True))
        inputs = self.processor(
            text=texts,
            images=images,
            videos=videos,
            video_metadata=metadata,
            padding=True,
            do_resize=False,
            return_tensors="pt",
            **kwargs,
        )
        if max_tokens and inputs["input_ids"].shape[1] > max_tokens:
            inputs = self._cut(inputs, max_tokens)
        states = self.model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        rows = states[torch.arange(len(items)), last].float()
        return torch.nn.functional.normalize(rows, dim=-1).numpy()

    def _conversation(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        parts = item.get("content") or [
            *({"type": "video", "video": item["video"]} for _ in ("video",) if "video" in item),
            *({"type": "image", "image": image} for image in _list(item.get("image"))),
            *({"type": "text", "text": text} for text in _list(item.get("text"))),
        ]
        sizes = {
            "image": {"min_pixels": 4096, "max_pixels": self.max_pixels},
            "video": {"min_pixels": 4096, "total_pixels": 10 * 768 * 1024},
            "text": {},
        }
        content = [{**part, **sizes[part["type"]]} for part in parts]
        instruction = item.get("instruction") or DEFAULT_INSTRUCTION
        return [
            {"role": "system", "content": [{"type": "text", "text": instruction}]},
            {"role": "user", "content": content},
        ]

    def _cut(self, inputs: Any, max_tokens: int) -> Any:
        """Keep the head and the tail of a single text: `<|im_end|>\\n<|im_start|>assistant\\n<|endoftext|>`."""
        assert len(inputs["input_ids"]) == 1
        tail = len(self.processor.tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            row = inputs[name]
            inputs[name] = torch.cat([row[:, : max_tokens - tail], row[:, -tail:]], dim=1)
        return inputs


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
