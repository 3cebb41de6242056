"""Token ids and position ids of the prompt around an image, clip or text, identical to the service's prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLModel

DEFAULT_INSTRUCTION = "Represent the user's input."
INSTRUCTIONS = (
    "Retrieve images or text relevant to the user's query.",
    "Find the picture that matches the text.",
    "Retrieve the image described by the user.",
    "Represent the image for retrieval.",
    "Given a query, retrieve relevant pictures.",
)
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Tokens:
    """The tokens after the system prompt, padded on the right."""

    input_ids: Tensor  # (num_items, tokens)
    lengths: Tensor  # (num_items,)
    position_ids: Tensor  # (3, 1, tokens)
    visual_at: Tensor | None  # (visual_tokens,)


def prefix_ids(tokenizer: Qwen2Tokenizer, instruction: str) -> Tensor:
    text = f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n"
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def text_tokens(tokenizer: Qwen2Tokenizer, texts: list[str], prefix_tokens: int) -> Tokens:
    rows = [tokenizer(text + TAIL).input_ids for text in texts]
    longest = max(len(row) for row in rows)
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    position_ids = torch.arange(prefix_tokens, prefix_tokens + longest).expand(3, 1, -1)
    return Tokens(input_ids, torch.tensor([len(row) for row in rows]), position_ids, None)


def visual_tokens(
    tokenizer: Qwen2Tokenizer,
    model: Qwen3VLModel,
    prefix: Tensor,
    num_items: int,
    size: tuple[int, int],
    timestamps: list[float] | None = None,
    texts: list[str] | None = None,
) -> Tokens:
    """The tokens of items with one image, or one clip with a timestamp per frame pair, and optionally a text.

    All items have the same image size, so they share one row of position ids.
    """
    num_tokens = size[0] // 32 * (size[1] // 32)
    if timestamps is None:
        visual = "<|vision_start|>" + "<|image_pad|>" * num_tokens + "<|vision_end|>"
    else:
        frame = "<|vision_start|>" + "<|video_pad|>" * num_tokens + "<|vision_end|>"
        visual = "".join(f"<{time:.1f} seconds>{frame}" for time in timestamps)
    rows = [tokenizer(visual + text + TAIL).input_ids for text in (texts or [""])]
    longest = max(rows, key=len)
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.tensor([row + [0] * (len(longest) - len(row)) for row in rows])
    position_ids = _positions(model, torch.cat((prefix, torch.tensor(longest)))[None], size, timestamps)
    visual_at = (input_ids[0] == _pad_id(model.config, timestamps)).nonzero()[:, 0]
    if texts is None:
        input_ids, lengths = input_ids.expand(num_items, -1), lengths.expand(num_items)
    return Tokens(input_ids, lengths, position_ids[..., len(prefix) :], visual_at)


def _pad_id(config: Qwen3VLConfig, timestamps: list[float] | None) -> int:
    return config.image_token_id if timestamps is None else config.video_token_id


def _positions(model: Qwen3VLModel, input_ids: Tensor, size: tuple[int, int], timestamps: list[float] | None) -> Tensor:
    """Multimodal rotary position ids, (3, 1, tokens), computed by transformers."""
    is_visual = input_ids == _pad_id(model.config, timestamps)
    grid = torch.tensor([[len(timestamps or [0]), size[0] // 16, size[1] // 16]])
    kind = {"image_grid_thw": grid} if timestamps is None else {"video_grid_thw": grid}
    type_ids = is_visual.int() * (1 if timestamps is None else 2)
    position_ids, _ = model.get_rope_index(input_ids, mm_token_type_ids=type_ids, **kind)
    return position_ids
