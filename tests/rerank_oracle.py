"""The reranker's oracle: plain transformers, pair by pair, as the published reference code scores.

After src/models/qwen3_vl_reranker.py of QwenLM/Qwen3-VL-Embedding 8ce3aab. Nothing here is shared with `embedder` but
the torchvision declaration; pictures and clips are resized by transformers, as in `tests.oracle`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from tests.oracle import ProcessorOracle, media_by_processor  # after its torchvision declaration

from transformers import Qwen3VLForConditionalGeneration  # isort: skip

SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
    'answer can only be "yes" or "no".'
)
INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."


class RerankOracle:
    """transformers' whole model over one checkpoint, with the pictures and clips of one preprocessing regime.

    `max_pixels`: of an image.
    """

    def __init__(
        self,
        folder: Path,
        max_pixels: int | None = None,
        regime: Literal["checkpoint", "reference"] = "checkpoint",
    ) -> None:
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.model = model.model
        self.media = ProcessorOracle(folder, regime, max_pixels)
        self.processor = self.media.processor
        vocabulary = self.processor.tokenizer.get_vocab()
        head = model.lm_head.weight.data
        self.direction = head[vocabulary["yes"]] - head[vocabulary["no"]]
        # the last five tokens of a prompt, which the reference keeps; with a small vocabulary they are more
        self.num_tail = len(self.processor.tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])

    @torch.no_grad()
    def score(self, query: Any, document: Any, instruction: str | None = None, *, max_length: int = 10_240) -> float:
        """The probability of "yes". Query and document as `Reranker.score` takes them, with PIL images."""
        conversation = self._conversation(query, document, instruction or INSTRUCTION)
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        # transformers 4.57, of the checkpoints' time, put a clip's frames in the place of this whole triple
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
        by_script = self.media.regime == "reference"
        media = (self.media._by_script if by_script else partial(media_by_processor, self.processor))([conversation])
        inputs = self.processor(text=[text], return_tensors="pt", **media)
        self._cut(inputs, max_length)
        state = self.model(**inputs).last_hidden_state[0, -1]
        return float(torch.sigmoid(state @ self.direction))

    def _conversation(self, query: Any, document: Any, instruction: str) -> list[dict[str, Any]]:
        content = [{"type": "text", "text": f"<Instruct>: {instruction}"}]
        for header, part in (("<Query>:", query), ("\n<Document>:", document)):
            content += [{"type": "text", "text": header}, *self._parts(part)]
        return [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": content},
        ]

    def _parts(self, value: Any) -> list[dict[str, Any]]:
        """Videos, then images, then texts; or a mixture in its own order."""
        fields = {"text": value} if isinstance(value, str) else value
        parts = fields.get("content") or [
            {"type": kind, kind: one, **({"fps": fields.get("fps")} if kind == "video" else {})}
            for kind in ("video", "image", "text")
            for one in ([] if kind not in fields else [fields[kind]] if kind != "image" else _list(fields[kind]))
        ]
        return [self.media._element(part) for part in parts]

    def _cut(self, inputs: Any, max_length: int) -> None:
        """Keep special tokens and the first of the others, up to `max_length`, then the tail."""
        ids = inputs["input_ids"][0].tolist()
        special = set(self.processor.tokenizer.all_special_ids)
        body = ids[: -self.num_tail]
        if len(body) <= max_length:
            return
        left = max_length - sum(one in special for one in body)
        kept = []
        for place, one in enumerate(body):
            if one in special:
                kept.append(place)
            elif left > 0:
                kept.append(place)
                left -= 1
        kept += range(len(body), len(ids))
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[name] = inputs[name][:, kept]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
