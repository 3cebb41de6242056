"""The oracle: plain transformers, padded, as the published reference code embeds (QwenLM/Qwen3-VL-Embedding 8ce3aab).

Nothing here is shared with `embedder` but the torchvision declaration. The prompt comes from the checkpoint's chat
template, ids and patches from Qwen3VLProcessor, and the vector from Qwen3VLModel: last token, cut, unit length.
Pictures and clips are resized by the code of the regime: `reference` by qwen-vl-utils, with the parameters of the
authors' script; `checkpoint` by the image and video processors of Qwen3VLProcessor.

Encoded clips are decoded with PyAV, because the readers of qwen-vl-utils and transformers need torchcodec, decord or a
torchvision that decodes, none of which a CPU build has. The same pixels reach both sides.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from numpy.typing import NDArray

from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

from qwen_vl_utils import vision_process  # noqa: E402 - after the declaration
from qwen_vl_utils.vision_process import process_vision_info, smart_nframes  # noqa: E402
from transformers import Qwen3VLModel, Qwen3VLProcessor  # noqa: E402 - after the declaration
from transformers.image_utils import SizeDict, load_image  # noqa: E402 - after the declaration
from transformers.video_utils import VideoMetadata  # noqa: E402 - after the declaration

DEFAULT_INSTRUCTION = "Represent the user's input."
CLIPS: dict[str, bytes] = {}  # encoded clips under the names that stand for their paths


def decode_clip(data: bytes) -> tuple[torch.Tensor, float]:
    """Every frame, (frames, channels, height, width), and the frame rate."""
    with av.open(io.BytesIO(data)) as container:
        fps = float(container.streams.video[0].average_rate)
        frames = [np.array(frame.to_image()) for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), fps


def read_clip(element: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
    """A reader as qwen-vl-utils has them: (frames, channels, height, width), metadata, sampled frames a second."""
    frames, fps = decode_clip(CLIPS[element["video"]])
    if len(frames) == 1:  # the original raises
        frames = frames.repeat(2, 1, 1, 1)
        return frames, {"fps": fps, "frames_indices": [0, 0], "total_num_frames": 1}, fps
    num_frames = smart_nframes(element, total_frames=len(frames), video_fps=fps)
    indices = torch.linspace(0, len(frames) - 1, num_frames).round().long()
    metadata = {"fps": fps, "frames_indices": indices.tolist(), "total_num_frames": len(frames), "video_backend": "av"}
    return frames[indices], metadata, num_frames / len(frames) * fps


vision_process.VIDEO_READER_BACKENDS.update(dict.fromkeys(("torchvision", "decord", "torchcodec"), read_clip))


class ProcessorOracle:
    """The inputs of one preprocessing regime, by transformers' processor of one folder."""

    def __init__(
        self, folder: Path, regime: Literal["checkpoint", "reference"] = "checkpoint", max_pixels: int | None = None
    ) -> None:
        """`max_pixels`: of an image."""
        self.processor = Qwen3VLProcessor.from_pretrained(folder, padding_side="right")
        self.regime = regime
        self.max_pixels = max_pixels
        if max_pixels:
            self.processor.image_processor.size = SizeDict(shortest_edge=4096, longest_edge=max_pixels)

    def inputs(self, items: list[dict[str, Any]]) -> Any:
        """What the model takes: ids, pixel values, grids."""
        conversations = [self._conversation(item) for item in items]
        texts = self.processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        # transformers 4.57, of the checkpoints' time, put a clip's frames in the place of this whole triple
        texts = [text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>") for text in texts]
        media = (
            self._by_script(conversations)
            if self.regime == "reference"
            else media_by_processor(self.processor, conversations)
        )
        return self.processor(text=texts, padding=True, return_tensors="pt", **media)

    def _by_script(self, conversations: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """As `_preprocess_inputs` of the authors' script."""
        images, videos, options = process_vision_info(
            conversations, image_patch_size=16, return_video_kwargs=True, return_video_metadata=True
        )
        metadata = None
        if videos is not None:
            videos, metadata = map(list, zip(*videos, strict=True))
        return {"images": images, "videos": videos, "video_metadata": metadata, "do_resize": False, **options}

    def _conversation(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """As `format_model_input` of the authors' script."""
        parts = item.get("content") or [
            *({"type": "video", "video": item["video"], "fps": item.get("fps")} for _ in ("video",) if "video" in item),
            *({"type": "image", "image": image} for image in _list(item.get("image"))),
            *({"type": "text", "text": text} for text in _list(item.get("text"))),
        ]
        content = [self._element(part) for part in parts]
        instruction = item.get("instruction") or DEFAULT_INSTRUCTION
        return [
            {"role": "system", "content": [{"type": "text", "text": instruction}]},
            {"role": "user", "content": content},
        ]

    def _element(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image" and self.regime == "reference":
            return {**part, "min_pixels": 4096, "max_pixels": self.max_pixels or 1_843_200}
        if part["type"] != "video":
            return part
        fps, video = part.get("fps"), part["video"]
        if isinstance(video, bytes):
            name = f"clip {len(CLIPS)}"
            CLIPS[name] = video
            if self.regime == "reference":
                return {"type": "video", "video": name, "fps": fps or 1, "max_frames": 64}
            return {"type": "video", "video": name, **({"fps": fps} if fps else {})}
        rate = {"sample_fps": fps} if fps else {}
        if self.regime == "reference":
            return {"type": "video", "video": sample_frames(list(video), 64), "total_pixels": 7_864_320, **rate}
        return {"type": "video", "video": list(video), **rate}


class Oracle(ProcessorOracle):
    """transformers' padded forward over one checkpoint, with the inputs of one preprocessing regime."""

    def __init__(
        self,
        folder: Path,
        regime: Literal["checkpoint", "reference"] = "checkpoint",
        dtype: torch.dtype = torch.float32,
        max_pixels: int | None = None,
        processor: Path | None = None,
    ) -> None:
        """`processor` is a folder to take the processor from, where `folder` has none."""
        super().__init__(processor or folder, regime, max_pixels)
        self.model = Qwen3VLModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()

    @torch.no_grad()
    def embed(self, items: list[dict[str, Any]], max_tokens: int = 0) -> NDArray[np.float32]:
        """(num_items, hidden_size), unit length. `items` as `Embedder.embed` takes them, with PIL images.

        `max_tokens` cuts text items inside the text: what is over is taken from before the template's tail.
        """
        inputs = self.inputs(items)
        if max_tokens and inputs["input_ids"].shape[1] > max_tokens:
            inputs = self._cut(inputs, max_tokens)
        states = self.model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        rows = states[torch.arange(len(items)), last].float()
        return torch.nn.functional.normalize(rows, dim=-1).numpy()

    def _cut(self, inputs: Any, max_tokens: int) -> Any:
        """Keep the head and the tail of a single text: `<|im_end|>\\n<|im_start|>assistant\\n<|endoftext|>`."""
        assert len(inputs["input_ids"]) == 1
        tail = len(self.processor.tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            row = inputs[name]
            inputs[name] = torch.cat([row[:, : max_tokens - tail], row[:, -tail:]], dim=1)
        return inputs


def media_by_processor(processor: Any, conversations: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Images and videos for transformers' processors, which resize them."""
    images, videos, metadata = [], [], []
    for part in (part for conversation in conversations for part in conversation[1]["content"]):
        if part["type"] == "image":
            images.append(load_image(part["image"]))
        elif part["type"] == "video":
            frames, found = _sample(processor, part)
            videos.append(frames)
            metadata.append(found)
    media: dict[str, Any] = {"images": images} if images else {}
    return media | ({"videos": videos, "video_metadata": metadata, "do_sample_frames": False} if videos else {})


def _sample(processor: Any, part: dict[str, Any]) -> tuple[torch.Tensor, VideoMetadata]:
    """The frames that transformers' video processor chooses. It takes all of a list, but no single frame."""
    if isinstance(part["video"], str):
        frames, fps = decode_clip(CLIPS[part["video"]])
        found = VideoMetadata(total_num_frames=len(frames), fps=fps)
        indices = processor.video_processor.sample_frames(found, fps=part.get("fps")).tolist()
    else:
        frames = torch.stack([torch.from_numpy(np.array(load_image(image))) for image in part["video"]])
        frames, fps = frames.permute(0, 3, 1, 2), part.get("sample_fps", 2.0)
        indices = list(range(len(frames)))
    if len(indices) == 1:
        indices = indices * 2
    return frames[indices], VideoMetadata(total_num_frames=len(frames), fps=fps, frames_indices=indices)


def sample_frames(frames: list[Any], max_segments: int) -> list[Any]:
    """As the function of this name of the authors' script: evenly spaced frames, rounded down."""
    if len(frames) <= max_segments:
        return frames
    return [frames[index] for index in np.linspace(0, len(frames) - 1, max_segments, dtype=int)]


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
