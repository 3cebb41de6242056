"""The oracle: plain transformers, padded, as the published reference code embeds (QwenLM/Qwen3-VL-Embedding 8ce3aab).

Nothing here is shared with `embedder` but the torchvision declaration: prompt by the checkpoint's chat template,
pictures by qwen-vl-utils, patches by Qwen3VLProcessor, forward by Qwen3VLModel, last token, cut, unit length.

Encoded clips: qwen-vl-utils chooses the frames, their size and the prompt's times; reading them is replaced, because
its readers need torchcodec, decord or a video-enabled torchvision, none of which a CPU build has. The replacement
decodes every frame with PyAV and resizes the chosen ones with PIL, so that the same pixels reach both sides.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

from qwen_vl_utils import vision_process  # noqa: E402 - after the declaration
from qwen_vl_utils.vision_process import process_vision_info, smart_nframes, smart_resize  # noqa: E402
from transformers import Qwen3VLModel, Qwen3VLProcessor  # noqa: E402 - after the declaration

DEFAULT_INSTRUCTION = "Represent the user's input."
CLIPS: dict[str, bytes] = {}  # encoded clips under the names that stand for their paths


def read_clip(element: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
    """A reader as qwen-vl-utils has them: (frames, channels, height, width), metadata, sampled frames a second."""
    with av.open(io.BytesIO(CLIPS[element["video"]])) as container:
        fps = float(container.streams.video[0].average_rate)
        images = [frame.to_image() for frame in container.decode(video=0)]
    num_frames = smart_nframes(element, total_frames=len(images), video_fps=fps)
    indices = torch.linspace(0, len(images) - 1, num_frames).round().long().tolist()
    max_pixels = min(768 * 1024, element["total_pixels"] / num_frames * 2)
    size = smart_resize(images[0].height, images[0].width, 32, element["min_pixels"], max_pixels)
    chosen = [images[index].resize(size[::-1], PIL.Image.Resampling.BICUBIC) for index in indices]
    frames = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in chosen])
    metadata = {"fps": fps, "frames_indices": indices, "total_num_frames": len(images), "video_backend": "av"}
    return frames, metadata, num_frames / len(images) * fps


vision_process.VIDEO_READER_BACKENDS.update(dict.fromkeys(("torchvision", "decord", "torchcodec"), read_clip))


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
        for part in content:
            if isinstance(part.get("video"), bytes):
                name = f"clip {len(CLIPS)}"
                CLIPS[name] = part["video"]
                part |= {"video": name, "fps": part.get("fps", 1), "max_frames": 64}
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
