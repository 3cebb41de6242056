"""The checkpoint's processor files -> the format of the vision tower's input, and the preprocessing regime.

As transformers reads them: for images, `image_processor` of `processor_config.json`, else `preprocessor_config.json`;
for videos, `video_processor`, else `video_preprocessor_config.json`, else `preprocessor_config.json`. A key that a file
does not have is the default of transformers' class. A folder without these files gets the published values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedder.errors import ModelUnavailable
from embedder.inputs.items import json_value
from embedder.inputs.json_file import read_json
from embedder.inputs.regimes import CheckpointRegime, ReferenceRegime, Regime
from embedder.settings import Settings

BICUBIC = 3  # Pillow's number
MAX_RESCALE_ERROR = 1e-9  # a file holds 1/255 as a rounded decimal
_PUBLISHED = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_PUBLISHED_IMAGE = {**_PUBLISHED, "size": {"shortest_edge": 4096, "longest_edge": 1_310_720}}
_PUBLISHED_VIDEO = {**_PUBLISHED, "size": {"shortest_edge": 4096, "longest_edge": 25_165_824}}
_DEFAULTS = {  # of both of transformers' classes
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": BICUBIC,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_IMAGE_DEFAULTS = {  # of Qwen2VLImageProcessor, which is Qwen3-VL's too
    **_DEFAULTS,
    "patch_size": 14,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_VIDEO_DEFAULTS = {  # of Qwen3VLVideoProcessor
    **_DEFAULTS,
    "patch_size": 16,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_sample_frames": True,
    "fps": 2,
    "num_frames": None,
    "min_frames": 4,
    "max_frames": 768,
    "cap_pixels_per_frame": False,
    "max_video_tokens": 768,
}
_NULL_IS_DEFAULT = {"image_processor_type": "size", "video_processor_type": "cap_pixels_per_frame"}
_IMAGE_TYPES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen3VLImageProcessor")
_VIDEO_TYPES = ("Qwen3VLVideoProcessor",)


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower's input format. `mean` and `std`: for values in 0..1, one per channel."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    regime: Regime

    @property
    def factor(self) -> int:
        """Side length of one visual token, in pixels."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class _Section:
    """The processor's fields, with defaults, and the name of the file for messages."""

    file: str
    fields: Mapping[str, Any]

    def fault(self, key: str, allowed: str) -> ModelUnavailable:
        return ModelUnavailable(f"{self.file}: {key} is {json_value(self.fields.get(key))}; allowed: {allowed}")

    def require(self, key: str, allowed: object) -> None:
        if self.fields[key] != allowed:
            raise self.fault(key, json_value(allowed))

    def count(self, key: str) -> int:
        value = self.fields[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fault(key, "a number from 1")
        return value

    def bounds(self) -> tuple[int, int]:
        size = self.fields["size"] if isinstance(self.fields["size"], dict) else {}
        shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
        if not isinstance(shortest, int) or not isinstance(longest, int) or not 0 < shortest <= longest:
            raise self.fault("size", "shortest_edge and longest_edge in pixels, the first not above the second")
        return shortest, longest

    def channels(self, key: str) -> tuple[float, ...]:
        values = self.fields[key]
        is_valid = isinstance(values, list) and len(values) == 3 and all(isinstance(one, int | float) for one in values)
        if not is_valid or (key == "image_std" and 0 in values):
            raise self.fault(key, "three numbers, one per channel")
        return tuple(float(one) for one in values)


def read_vision_config(folder: Path, settings: Settings) -> VisionConfig:
    """Read the processor files for the regime of `settings`.

    Raises `ModelUnavailable`, with file and key, for a value that the service cannot reproduce.
    """
    tower = read_json(folder / "config.json").get("vision_config") or {}
    sizes = {
        "patch_size": tower.get("patch_size", 16),
        "temporal_patch_size": tower.get("temporal_patch_size", 2),
        "merge_size": tower.get("spatial_merge_size", 2),
    }
    _check_tokenizer_config(folder)
    images, videos = _image_section(folder), _video_section(folder)
    for section in (images, videos):
        _check_section(section, sizes)
    for key in ("image_mean", "image_std"):
        if videos.channels(key) != images.channels(key):
            raise videos.fault(key, f"the value for images, {list(images.channels(key))}, in {images.file}")
    regime = _make_regime(images, videos, sizes["patch_size"] * sizes["merge_size"], settings)
    return VisionConfig(**sizes, mean=images.channels("image_mean"), std=images.channels("image_std"), regime=regime)


def _make_regime(images: _Section, videos: _Section, factor: int, settings: Settings) -> Regime:
    if settings.preprocessing == "reference":
        default = ReferenceRegime(factor)
        return ReferenceRegime(
            factor, settings.max_pixels or 1800 * factor**2, settings.max_video_frames or default.max_frames
        )
    min_pixels, max_pixels = images.bounds()
    max_pixels = settings.max_pixels or max_pixels
    if max_pixels < min_pixels:
        raise ModelUnavailable(
            f"max_pixels ({max_pixels}) is below the checkpoint's min_pixels ({min_pixels}); raise EMBEDDER_MAX_PIXELS"
        )
    clip_min_pixels, clip_max_pixels = videos.bounds()
    is_capped = bool(videos.fields["cap_pixels_per_frame"])
    fps = videos.fields["fps"]
    if not isinstance(fps, int | float) or fps <= 0:
        raise videos.fault("fps", "a number above 0")
    return CheckpointRegime(
        factor,
        min_pixels,
        max_pixels,
        clip_min_pixels,
        clip_max_pixels,
        fps,
        videos.count("min_frames"),
        settings.max_video_frames or videos.count("max_frames"),
        max_frame_tokens=videos.count("max_video_tokens") if is_capped else None,
        frame_max_pixels=settings.max_pixels,
    )


def _check_section(section: _Section, sizes: Mapping[str, int]) -> None:
    """Raises `ModelUnavailable` for values under which transformers computes something else than this service."""
    for key, value in sizes.items():
        if section.fields[key] != value:
            raise section.fault(key, f"{value}, as in config.json's vision_config")
    for key in ("do_resize", "do_rescale", "do_normalize", "resample"):
        section.require(key, _DEFAULTS[key])
    factor = section.fields["rescale_factor"]
    if not isinstance(factor, int | float) or abs(factor - 1 / 255) > MAX_RESCALE_ERROR:
        raise section.fault("rescale_factor", "1/255")
    if "do_sample_frames" in section.fields:
        section.require("do_sample_frames", True)
        section.require("num_frames", None)


def _check_tokenizer_config(folder: Path) -> None:
    """Raises `ModelUnavailable` for keys of images and videos, which transformers obeys in the tokenizer's file too."""
    section = _Section("tokenizer_config.json", read_json(folder / "tokenizer_config.json"))
    for key in (*_IMAGE_DEFAULTS, *_VIDEO_DEFAULTS, "min_pixels", "max_pixels"):
        if section.fields.get(key) is not None:
            raise section.fault(key, "none; transformers would apply it to images and videos")


def _image_section(folder: Path) -> _Section:
    file, fields = _find(folder, "image_processor", "preprocessor_config.json")
    if fields is None:
        return _Section(file, {**_IMAGE_DEFAULTS, **_PUBLISHED_IMAGE})
    section = _section(file, fields, _IMAGE_DEFAULTS, "image_processor_type", _IMAGE_TYPES)
    edges = {"shortest_edge": fields.get("min_pixels"), "longest_edge": fields.get("max_pixels")}  # older names
    if any(edge is not None for edge in edges.values()) and isinstance(section.fields["size"], dict):
        given = {key: edge for key, edge in edges.items() if edge is not None}
        return _Section(file, {**section.fields, "size": {**section.fields["size"], **given}})
    return section


def _video_section(folder: Path) -> _Section:
    names = ("video_preprocessor_config.json", "preprocessor_config.json")
    file, fields = _find(folder, "video_processor", *names)
    if fields is None:
        return _Section(file, {**_VIDEO_DEFAULTS, **_PUBLISHED_VIDEO})
    return _section(file, fields, _VIDEO_DEFAULTS, "video_processor_type", _VIDEO_TYPES)


def _section(
    file: str, fields: Mapping[str, Any], defaults: Mapping[str, Any], type_key: str, types: tuple[str, ...]
) -> _Section:
    """Raises `ModelUnavailable` for null where transformers' class does not take the default instead."""
    given = {key: value for key, value in fields.items() if value is not None}
    section = _Section(file, {**defaults, **given})
    optional = {_NULL_IS_DEFAULT[type_key], *(("size",) if file == "preprocessor_config.json" else ())}
    for key, default in defaults.items():
        if default is not None and key not in optional and fields.get(key, default) is None:
            raise ModelUnavailable(f"{file}: {key} is null; leave it out or give a value")
    if given.get(type_key, types[0]) not in types:
        raise section.fault(type_key, " or ".join(types))
    if given.get("input_data_format", "channels_first") != "channels_first":
        raise section.fault("input_data_format", "null or channels_first")
    return section


def _find(folder: Path, nested: str, *names: str) -> tuple[str, Mapping[str, Any] | None]:
    """The first of the places that exists, as transformers looks for it, and its fields."""
    fields = read_json(folder / "processor_config.json").get(nested)
    if isinstance(fields, dict):
        return f"processor_config.json's {nested}", fields
    for name in names:
        if os.path.lexists(folder / name):
            return name, read_json(folder / name)
    return names[0], None
