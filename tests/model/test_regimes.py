"""Each preprocessing regime gives the vectors of its oracle, for pictures and clips around every threshold."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from qwen_vl_utils.vision_process import smart_nframes, smart_resize
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as image_size
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as frame_size

from embedder import Embedder
from embedder.errors import InputTooLong, InvalidMedia
from embedder.inputs.items import item_from_fields
from embedder.inputs.preprocess import Preprocessor
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.regimes import CheckpointRegime, Filter, ReferenceRegime, Regime, Resize
from embedder.inputs.resample import resize
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.settings import Settings
from tests.conftest import picture
from tests.inputs.test_video import clip
from tests.model.test_parity import MAX_DIFFERENCE, assert_equal
from tests.oracle import Oracle

Both = tuple[Embedder, Oracle]
Make = Callable[[int], dict[str, Any]]
REGIMES = ("checkpoint", "reference")

# Width and height. Minimum: 4,096 px (64x64). Rounding: to 32, for the frames of a list first to 64. Maximum: 1,310,720
# (1280x1024) and 1,843,200 (1440x1280) px.
IMAGE_SIZES = [
    *[(2, 2), (3, 5), (31, 33), (63, 64), (64, 64), (65, 63), (47, 49), (48, 80), (10, 1000), (1000, 10), (400, 2)],
    *[(79, 81), (95, 97), (111, 112), (112, 113), (127, 128), (144, 160), (333, 120), (321, 239), (500, 375)],
    *[(1279, 1024), (1280, 1024), (1281, 1025), (1296, 1040), (1311, 1000), (2000, 655), (200, 6553)],
    *[(1440, 1280), (1441, 1281), (1456, 1296), (1600, 1200), (3000, 700), (700, 3000)],
]
# Number of frames, width, height, and the list's frames per second. 128 tokens: 131,072 px (362x362). 768 tokens:
# 786,432 px (887x887). All frames of a list: 7,864,320 px.
LISTS = [
    *[(1, 64, 64, None), (2, 65, 97, 1.0), (3, 96, 95, None), (4, 128, 64, 0.5), (5, 100, 33, 3.0), (7, 31, 20, 2.0)],
    *[(2, 320, 240, None), (4, 362, 362, None), (3, 361, 363, None), (6, 400, 400, None), (5, 20, 400, None)],
    *[(3, 30, 20, None), (5, 33, 20, None), (7, 20, 30, None)],  # odd, below the minimum
    *[(2, 886, 887, None), (2, 900, 900, None), (63, 64, 64, None), (65, 64, 97, None), (100, 64, 64, 4.0)],
]
# Number of frames, width, height, the clip's frames per second, and the sampled ones.
CLIPS: list[tuple[int, int, int, Fraction | int, float | None]] = [
    *[
        (1, 64, 64, 25, None),
        (2, 64, 96, 25, None),
        (3, 96, 64, 25, None),
        (4, 128, 96, 5, None),
        (5, 128, 96, 1, None),
    ],
    *[(7, 96, 96, 1, None), (50, 130, 70, 25, None), (60, 320, 240, 25, None), (100, 96, 128, 10, None)],
    *[(61, 64, 64, Fraction(30000, 1001), 4.0), (100, 34, 62, 24, 3.0), (100, 32, 32, 1, None), (99, 64, 64, 1, 2.0)],
    *[(30, 362, 362, 6, None), (31, 366, 360, 6, 0.5), (12, 640, 360, 6, None), (4, 900, 900, 2, None)],
    (5, 20, 30, 2, None),  # odd, below the minimum; test_variants has one above a maximum
    *[(9, 64, 64, Fraction(1, 2), None), (70, 64, 64, Fraction(12), None), (45, 66, 94, 15, 1.5)],
]


@pytest.fixture(scope="module")
def small_checkpoint(write_random: Callable[..., Path]) -> Path:
    """Two layers and a narrow vision tower: the inputs matter here. `test_parity` compares larger models."""
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "deepstack_visual_indexes": [0]}
    return write_random(text={"num_hidden_layers": 2}, vision=vision)


@pytest.fixture(scope="module", params=REGIMES)
def both(request: pytest.FixtureRequest, small_checkpoint: Path) -> Iterator[Both]:
    """The service's own and the oracle's computation of one regime."""
    with Embedder(str(small_checkpoint), device="cpu", preprocessing=request.param) as embedder:
        yield embedder, Oracle(small_checkpoint, request.param)


def image(case: int) -> dict[str, Any]:
    return {"image": picture(*IMAGE_SIZES[case], case)}


def frame_list(case: int) -> dict[str, Any]:
    count, width, height, fps = LISTS[case]
    frames = [picture(width, height, seed) for seed in range(count)]
    return {"video": frames, **({"fps": fps} if fps else {})}


def encoded_clip(case: int) -> dict[str, Any]:
    count, width, height, rate, fps = CLIPS[case]
    return {"video": clip("H.264 in MP4", count, rate, width, height), **({"fps": fps} if fps else {})}


def param(make: Make, case: int, of_case: tuple[Any, ...]) -> Any:
    """One case; many frames are for the slow run."""
    is_long = make is not image and of_case[0] >= 60
    name = f"{make.__name__} {of_case}"
    return pytest.param(make, case, id=name, marks=[pytest.mark.slow] if is_long else [])


CASES = [
    param(make, case, of_case)
    for make, cases in ((image, IMAGE_SIZES), (frame_list, LISTS), (encoded_clip, CLIPS))
    for case, of_case in enumerate(cases)
]


def raw_pixels(patches: Any) -> NDArray[np.uint8]:
    """(num_patches, 1536) normalized -> (num_patches, channels, frames, patch**2) of 0..255."""
    return (patches * 0.5 + 0.5).mul(255).round().numpy().astype(np.uint8).reshape(-1, 3, 2, 256)


@pytest.mark.parametrize(("make", "case"), CASES)
def test_inputs_of_the_model_equal_the_oracles(make: Make, case: int, both: Both) -> None:
    """Every pixel and every id; `test_parity` shows that the same inputs give the same vector."""
    item = make(case)
    ours, theirs = both[0].preprocessor(item_from_fields(item)), both[1].inputs([item])
    assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
    kind = "pixel_values_videos" if "video" in item else "pixel_values"
    (patches,) = ours.patches
    assert list(patches.grid_thw) == theirs["video_grid_thw" if "video" in item else "image_grid_thw"][0].tolist()
    pixels = patches.pixels.reshape(-1, 3, patches.num_frames, 256)
    assert np.array_equal(np.broadcast_to(pixels, (len(pixels), 3, 2, 256)), raw_pixels(theirs[kind]))


def test_items_in_one_batch_equal_the_oracles(both: Both) -> None:
    items = [image(case) for case in range(8)] + [frame_list(0), frame_list(2), encoded_clip(2)]
    items += [
        {"image": picture(100, 70), "text": "a picture"},
        {
            "content": [
                {"type": "text", "text": "first "},
                {"type": "video", "video": encoded_clip(3)["video"], "fps": 2},
                {"type": "image", "image": picture(70, 50)},
                {"type": "video", "video": [picture(70, 60, 1), picture(70, 60, 2), picture(70, 60, 3)]},
                {"type": "text", "text": " last"},
            ]
        },
    ]
    assert_equal(both[0].embed(items), both[1].embed(items))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [image, frame_list, encoded_clip])
def test_vectors_equal_the_oracles_alone_and_together(kind: Make, both: Both) -> None:
    """All cases of one kind, each by itself and all in one call, whose batches the engine forms."""
    embedder, oracle = both
    names = {one.id: one.values[1] for one in CASES if one.values[0] is kind}
    items = [kind(case) for case in names.values()]
    expected = np.concatenate([oracle.embed([item]) for item in items])
    together = np.stack(embedder.embed(items[::-1])[::-1])
    alone = np.stack([embedder.embed([item])[0] for item in items])
    differences = {
        name: float(max(np.abs(one - row).max() for one in found))
        for name, row, *found in zip(names, expected, alone, together, strict=True)
    }
    assert {name: one for name, one in differences.items() if not one <= MAX_DIFFERENCE} == {}


# What the originals refuse, or a setting changes


@pytest.mark.parametrize("name", REGIMES)
def test_video_that_does_not_fit_is_refused_before_it_is_decoded(name: str, random_checkpoint: Path) -> None:
    settings = Settings(preprocessing=name, max_input_tokens=400)
    preprocess = Preprocessor(
        load_tokenizer(random_checkpoint), read_vision_config(random_checkpoint, settings), settings
    )
    data = clip("H.264 in MP4", 40, 4, 320, 240)
    place = data.index(b"mdat") + 4
    damaged = data[:place] + b"\xff" * 2000 + data[place + 2000 :]
    message = r"^\d+ tokens of a video of \d+ frames of 320x240 pixels, .*; allowed: 400 \(EMBEDDER_MAX_INPUT_TOKENS\)"
    for content in (data, damaged):
        with pytest.raises(InputTooLong, match=message):
            preprocess(item_from_fields({"video": content}))
    assert preprocess(item_from_fields({"video": data, "fps": 0.1})).patches
    smaller = settings.model_copy(update={"max_pixels": 16_384, "max_video_frames": 20})  # as the message says
    vision = read_vision_config(random_checkpoint, smaller)
    assert Preprocessor(load_tokenizer(random_checkpoint), vision, smaller)(item_from_fields({"video": data})).patches
    with pytest.raises(InvalidMedia):
        preprocess(item_from_fields({"video": damaged, "fps": 0.1}))


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({}, {3: True, 4: False, 400: False}),
        ({"max_input_tokens": 16_384}, {4: True, 10: True, 60: True, 400: True}),
        ({"max_pixels": 262_144}, {30: True, 60: False}),
        ({"max_pixels": 262_144, "max_video_frames": 60}, {30: True, 60: True, 400: True}),
        ({"preprocessing": "reference"}, {20: True, 30: False}),
        ({"preprocessing": "reference", "max_video_frames": 20}, {20: True, 30: True, 400: True}),
    ],
)
def test_full_hd_videos_fit_as_the_guide_says(
    options: dict[str, Any], seconds: dict[int, bool], random_checkpoint: Path
) -> None:
    settings = Settings(**options)
    regime = read_vision_config(random_checkpoint, settings).regime
    prompt = Preprocessor(load_tokenizer(random_checkpoint), read_vision_config(random_checkpoint, settings), settings)
    for duration, fits in seconds.items():
        times = regime.sample_encoded(duration * 25, 25, None).seconds
        size = regime.resize_frame(1080, 1920, len(times), is_list=False)[-1]
        grid = (len(times) // 2, size.height // 32, size.width // 32)
        ids = prompt.prompt_ids(item_from_fields({"video": b"any"}), [grid], [times])
        assert (len(ids) <= settings.max_input_tokens) is fits, (duration, len(ids))


def test_max_pixels_bounds_images_and_frames(random_checkpoint: Path) -> None:
    for name in REGIMES:
        regime = read_vision_config(random_checkpoint, Settings(preprocessing=name, max_pixels=65_536)).regime
        assert regime.resize_image(1000, 1000) == Resize(256, 256, "uint8" if name == "checkpoint" else "pillow")
        for is_list in (True, False):
            last = regime.resize_frame(1000, 1000, 4, is_list=is_list)[-1]
            assert (last.height, last.width) == (256, 256)
        assert regime.resize_image(64, 64).height == 64


def test_max_video_frames_replaces_the_regimes_number(random_checkpoint: Path) -> None:
    numbers = {
        name: [
            len(
                read_vision_config(random_checkpoint, Settings(preprocessing=name, **options))
                .regime.sample_encoded(30_000, 25, None)
                .indices
            )
            for options in ({}, {"max_video_frames": 6})
        ]
        for name in REGIMES
    }
    assert numbers == {"checkpoint": [768, 6], "reference": [64, 6]}


def test_regimes_differ_where_the_docs_say_so(random_checkpoint: Path) -> None:
    checkpoint, reference = CheckpointRegime(), ReferenceRegime()
    assert [one.resize_image(2000, 2000).height for one in (checkpoint, reference)] == [1120, 1344]
    assert [one.resize_frame(240, 320, 8, is_list=False)[-1].width for one in (checkpoint, reference)] == [320, 448]
    assert [len(one.sample_encoded(250, 25, None).indices) for one in (checkpoint, reference)] == [20, 10]


@pytest.mark.parametrize("max_frames", [64, 63, 8, 4])
def test_sampled_frames_are_those_of_qwen_vl_utils(max_frames: int) -> None:
    generator = random.Random(max_frames)
    rates = [1.0, 2.0, 24.0, 25.0, 30000 / 1001, 30.0, 60.0, 0.5, 7.3]
    for _ in range(2000):
        total, rate, wanted = generator.randint(2, 5000), generator.choice(rates), generator.choice([0.5, 1, 2, 3.7])
        count = smart_nframes({"fps": wanted, "max_frames": max_frames}, total_frames=total, video_fps=rate)
        expected = torch.linspace(0, total - 1, count).round().long().tolist()
        found = ReferenceRegime(max_frames=max_frames).sample_encoded(total, rate, wanted)
        assert list(found.indices) == expected, (total, rate, wanted)


def test_sizes_are_those_of_both_originals_for_many_sizes() -> None:
    generator = random.Random(0)
    for _ in range(3000):
        height, width = (round(2 ** generator.uniform(1, 12.5)) for _ in range(2))
        num_frames, longest = generator.randint(2, 40), generator.choice([4096, 65_536, 1_310_720])
        if max(height, width) / min(height, width) > 200:
            continue
        ours = CheckpointRegime(max_pixels=longest).resize_image(height, width)
        assert (ours.height, ours.width) == image_size(height, width, 32, 4096, longest)
        (frame,) = CheckpointRegime(clip_max_pixels=longest * 4).resize_frame(height, width, num_frames, is_list=True)
        assert (frame.height, frame.width) == frame_size(num_frames, height, width, 2, 32, 4096, longest * 4)
        ours = ReferenceRegime(max_pixels=longest).resize_image(height, width)
        theirs = smart_resize(height, width, 32, 4096, longest)
        assert (ours.height, ours.width) == tuple(max(side, 32) for side in theirs)  # a side of 0 fails in theirs


def test_long_image_under_a_small_maximum_keeps_one_row() -> None:
    # 8,000,000 px into 4,096: both sides shrink by sqrt(8e6 / 4096) = 44.2, to 4.5 x 905; 905 floors to 28 * 32
    assert smart_resize(200, 40_000, 32, 4096, 4096) == (0, 896)
    assert ReferenceRegime(max_pixels=4096).resize_image(200, 40_000) == Resize(32, 896, "pillow")


@pytest.mark.parametrize("regime", [CheckpointRegime(), ReferenceRegime()])
def test_aspect_ratio_above_200_is_refused(regime: Regime) -> None:
    assert regime.resize_image(10, 2000).height == 32
    message = r"^image of 2010x10 pixels has an aspect ratio of 201:1; allowed: up to 200:1$"
    with pytest.raises(InvalidMedia, match=message):
        regime.resize_image(10, 2010)
    with pytest.raises(InvalidMedia, match=r"an aspect ratio of 20\d:1; allowed: up to 200:1$"):
        regime.resize_frame(40, 8100, 4, is_list=False)


def test_rules_can_be_imported_without_torch_or_transformers() -> None:
    modules = "embedder.inputs.regimes, embedder.inputs.orientation, embedder.inputs.resample"
    code = f"import sys, {modules}; assert not {{'torch', 'transformers', 'torchvision'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size", [(70, 90), (64, 96)])
@pytest.mark.parametrize("kind", ["pillow", "uint8", "float32"])
def test_channels_of_a_resized_image_are_one_after_the_other(kind: Filter, size: tuple[int, int]) -> None:
    """Otherwise `patchify` would copy its patches byte by byte."""
    values = resize(picture(90, 70), [Resize(*size, kind)])
    assert values.shape == (*size, 3)
    assert values.transpose(2, 0, 1).flags.c_contiguous


def test_resizing_leaves_no_threads_behind() -> None:
    values = np.asarray(picture(900, 700))
    steps = [Resize(640, 640, "float32")]
    resize(values, steps)

    def resize_and_count() -> int:
        resize(values, steps)
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        before = len(os.listdir("/proc/self/task"))
        assert pool.submit(resize_and_count).result() == torch.get_num_threads()  # as before in that thread
        assert len(os.listdir("/proc/self/task")) <= before + 1
