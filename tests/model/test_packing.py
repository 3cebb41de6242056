"""Items laid one after the other: every token and patch is there once, and is found again."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_position_ids

from embedder.inputs.preprocess import ModelInput, Patches
from embedder.model import packing
from embedder.model.packing import PackedPatches, PackedVision, Sequences, pack, prefix_of

CPU = torch.device("cpu")
MERGE = 2
Grid = tuple[int, int, int, int]  # frames in a patch, then time, height, width
STILL, WIDE, CLIP = (1, 1, 2, 2), (1, 1, 2, 6), (2, 3, 4, 2)
_marks = count(1)


def model_input(num_text_tokens: int, *grids: Grid) -> ModelInput:
    """Text tokens around each picture. A visual token has an id of its own, and its four patches hold that as value."""
    runs: list[list[int]] = [[0] * num_text_tokens]
    patches = []
    for num_frames, *grid in grids:
        marks = [next(_marks) for _ in range(int(np.prod(grid)) // MERGE**2)]
        pixels = np.repeat(np.array(marks, np.uint8), MERGE**2)[:, None].repeat(3 * num_frames, axis=1)
        patches.append(Patches(pixels, (grid[0], grid[1], grid[2]), num_frames))
        runs += [marks, [0] * num_text_tokens]
    input_ids = np.concatenate([np.array(run, np.int64) for run in runs])
    position_ids = np.stack([np.arange(len(input_ids)) * 10 + axis for axis in range(3)])
    return ModelInput(input_ids, position_ids, np.flatnonzero(input_ids), tuple(patches), 0, 0, len(input_ids))


INPUTS = [
    model_input(3),
    model_input(2, CLIP, STILL),
    model_input(5),
    model_input(1, WIDE),
    model_input(1, STILL, CLIP, WIDE),
    model_input(3),
]
LENGTHS = [len(one.input_ids) for one in INPUTS]


def vision() -> PackedVision:
    packed = pack(INPUTS, MERGE, CPU).vision
    assert packed is not None
    return packed


def patches_of(packed: PackedVision | None) -> PackedPatches:
    assert packed is not None
    assert packed.patches is not None
    return packed.patches


def check_cover(sequences: Sequences, lengths: list[int]) -> None:
    """Offsets are the running sum, and the runs hold every sequence whole and once, neighbors of a length together."""
    assert sequences.cu_seqlens.tolist() == [0, *np.cumsum(lengths)]
    assert sequences.cu_seqlens.dtype == torch.int32  # what the kernels take
    assert sequences.max_seqlen == max(lengths)
    row = torch.arange(sum(lengths))
    found = [one for run in sequences.runs for one in run.view(row).tolist()]
    assert found == [list(range(start, stop)) for start, stop in pairwise(sequences.cu_seqlens.tolist())]
    assert all(first.length != second.length for first, second in pairwise(sequences.runs))


def test_items_stand_one_behind_the_other() -> None:
    batch = pack(INPUTS, MERGE, CPU)
    assert batch.input_ids.tolist() == [token for one in INPUTS for token in one.input_ids]
    assert batch.position_ids.shape == (3, sum(LENGTHS))
    assert batch.position_ids[1].tolist() == [10 * place + 1 for length in LENGTHS for place in range(length)]
    check_cover(batch.sequences, LENGTHS)


def test_last_token_of_each_item_is_pooled() -> None:
    batch = pack(INPUTS, MERGE, CPU)
    assert batch.pooled_index.tolist() == (np.cumsum(LENGTHS) - 1).tolist()
    assert batch.pooled.cu_seqlens.tolist() == list(range(len(INPUTS) + 1))
    assert batch.pooled.max_seqlen == 1


def test_runs_of_pooled_tokens_meet_the_runs_of_their_items() -> None:
    batch = pack(sorted(INPUTS, key=lambda one: one.num_tokens), MERGE, CPU)
    row = torch.arange(sum(LENGTHS))
    pooled_row = row[batch.pooled_index]
    assert max(run.count for run in batch.sequences.runs) > 1
    for pooled, items in zip(batch.pooled.runs, batch.sequences.runs, strict=True):
        assert pooled.length == 1
        assert pooled.view(pooled_row)[:, 0].tolist() == items.view(row)[:, -1].tolist()


def test_batch_of_one_is_the_item() -> None:
    (batch, item) = (pack(INPUTS[1:2], MERGE, CPU), INPUTS[1])
    assert batch.input_ids.tolist() == item.input_ids.tolist()
    assert batch.pooled_index.tolist() == [len(item.input_ids) - 1]


def test_batch_of_texts_has_no_vision() -> None:
    assert pack([INPUTS[0], INPUTS[2]], MERGE, CPU).vision is None


def test_pixels_of_pictures_and_of_clips_lie_apart_in_order() -> None:
    packed = patches_of(vision())
    patches = [one for item in INPUTS for one in item.patches]
    stills = [one.pixels for size in (4, 12) for one in patches if one.num_frames == 1 and len(one.pixels) == size]
    clips = [one.pixels for one in patches if one.num_frames == 2]
    assert np.array_equal(packed.image_pixels.numpy(), np.concatenate(stills))
    assert np.array_equal(packed.video_pixels.numpy(), np.concatenate(clips))


def test_batch_of_clips_alone_has_no_image_pixels() -> None:
    packed = patches_of(pack([model_input(1, CLIP)], MERGE, CPU).vision)
    assert (len(packed.image_pixels), len(packed.video_pixels)) == (0, 24)


def test_every_visual_token_is_found_at_its_patches() -> None:
    packed = patches_of(vision())
    values = torch.cat([packed.image_pixels[:, 0], packed.video_pixels[:, 0]])  # (num_patches,) the marks
    marks = values.view(-1, MERGE**2)
    assert (marks == marks[:, :1]).all()
    ids = pack(INPUTS, MERGE, CPU).input_ids
    assert ids[vision().token_index].tolist() == marks[:, 0].tolist()
    assert sorted(vision().token_index.tolist()) == torch.nonzero(ids)[:, 0].tolist()


def test_pictures_come_before_clips_with_transformers_coordinates() -> None:
    packed = patches_of(vision())
    patches = (one for item in INPUTS for one in item.patches)
    ordered = sorted(patches, key=lambda one: (one.num_frames, one.grid_thw[1] * one.grid_thw[2]))
    grids = torch.tensor([one.grid_thw for one in ordered])
    assert torch.equal(packed.coordinates, get_vision_position_ids(grids, MERGE))
    sizes = [list(one.grid_thw[1:]) for one in ordered for _ in range(len(one.pixels))]
    assert packed.grid_sizes.tolist() == sizes


def test_each_picture_and_each_two_frames_of_a_clip_attend_alone() -> None:
    # pictures: two of 4 patches and two of 12; clips: 3 temporal patches of 4x2 each, twice
    check_cover(patches_of(vision()).sequences, [4, 4, 12, 12] + [8] * 6)


def test_equal_content_is_packed_once_and_kept_features_not_at_all() -> None:
    """Content without a key is never taken for equal."""
    first, second, third = (model_input(1, STILL, WIDE) for _ in range(3))
    named = [
        one._replace(patches=tuple(replace(patches, key=key) for patches, key in zip(one.patches, keys, strict=True)))
        for one, keys in ((first, (b"a", b"b")), (second, (b"a", b"c")), (third, (b"", b"")))
    ]
    features = torch.ones(4, 3, 8)
    inputs = [*named, named[2]]
    packed = pack(inputs, MERGE, CPU, find_features={b"c": features}.get).vision
    assert packed is not None
    assert packed.keys == (b"a", b"", b"", b"b", b"", b"")
    assert packed.num_tokens == (1, 1, 1, 3, 3, 3)
    assert len(packed.reused) == 2
    assert packed.reused[0] == 0
    assert packed.reused[1] is features
    assert len(patches_of(packed).image_pixels) == 3 * 4 + 3 * 12
    ids = pack(inputs, MERGE, CPU).input_ids[packed.token_index].tolist()
    expected = [first, third, third, first, third, third]
    marks = [one.input_ids[one.visual_index].tolist() for one in expected]
    assert ids[:12] == [
        mark for one, part in zip(marks, [slice(1)] * 3 + [slice(1, 4)] * 3, strict=True) for mark in one[part]
    ]
    assert ids[12:] == second.input_ids[second.visual_index].tolist()
    every = pack(named[:2], MERGE, CPU, find_features=lambda _: features).vision
    assert every is not None
    assert every.patches is None
    assert len(every.reused) == 4


def test_tensors_that_share_one_copy_to_the_device_keep_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[torch.Tensor] = []

    def copy(tensor: torch.Tensor, _: torch.device) -> torch.Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(packing, "_copy", copy)
    expected, moved = pack(INPUTS, MERGE, CPU), pack(INPUTS, MERGE, torch.device("cuda"))
    pairs = list(zip(packing._tensors(expected), packing._tensors(moved), strict=True))
    assert len(pairs) == 12
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert len(copies) == 3  # indices, pixels of images, pixels of clips


def test_small_batch_shares_no_prefix_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_copy", lambda tensor, _: tensor)
    inputs = [model_input(length)._replace(num_prefix_tokens=4) for length in (20, 30)]
    assert pack(inputs, MERGE, CPU).prefixes == (prefix_of(inputs[0]),)
    assert pack(inputs, MERGE, torch.device("cuda")).prefixes == ()
    assert pack(inputs * 10, MERGE, torch.device("cuda")).prefixes == (prefix_of(inputs[0]),)
