"""Items laid one behind the other: every token and patch is there once, and is found again."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_position_ids

from embedder.inputs.preprocess import ModelInput, Patches
from embedder.model import packing
from embedder.model.packing import PackedVision, Sequences, pack, prefix_of

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
    packed = vision()
    patches = [one for item in INPUTS for one in item.patches]
    stills = [one.pixels for size in (4, 12) for one in patches if one.num_frames == 1 and len(one.pixels) == size]
    clips = [one.pixels for one in patches if one.num_frames == 2]
    assert np.array_equal(packed.image_pixels.numpy(), np.concatenate(stills))
    assert np.array_equal(packed.video_pixels.numpy(), np.concatenate(clips))


def test_batch_of_clips_alone_has_no_image_pixels() -> None:
    packed = pack([model_input(1, CLIP)], MERGE, CPU).vision
    assert packed is not None
    assert (len(packed.image_pixels), len(packed.video_pixels)) == (0, 24)


def test_every_visual_token_is_found_at_its_patches() -> None:
    packed = vision()
    values = torch.cat([packed.image_pixels[:, 0], packed.video_pixels[:, 0]])  # (num_patches,) the marks
    marks = values.view(-1, MERGE**2)
    assert (marks == marks[:, :1]).all()
    ids = pack(INPUTS, MERGE, CPU).input_ids
    assert ids[packed.token_index].tolist() == marks[:, 0].tolist()
    assert sorted(packed.token_index.tolist()) == torch.nonzero(ids)[:, 0].tolist()


def test_pictures_come_before_clips_with_transformers_coordinates() -> None:
    packed = vision()
    patches = (one for item in INPUTS for one in item.patches)
    ordered = sorted(patches, key=lambda one: (one.num_frames, one.grid_thw[1] * one.grid_thw[2]))
    grids = torch.tensor([one.grid_thw for one in ordered])
    assert torch.equal(packed.coordinates, get_vision_position_ids(grids, MERGE))
    sizes = [list(one.grid_thw[1:]) for one in ordered for _ in range(len(one.pixels))]
    assert packed.grid_sizes.tolist() == sizes


def test_each_picture_and_each_two_frames_of_a_clip_attend_alone() -> None:
    # pictures: two of 4 patches and two of 12; clips: 3 temporal patches of 4x2 each, twice
    check_cover(vision().sequences, [4, 4, 12, 12] + [8] * 6)


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
    inputs = [replace(model_input(length), num_prefix_tokens=4) for length in (20, 30)]
    assert pack(inputs, MERGE, CPU).prefixes == (prefix_of(inputs[0]),)
    assert pack(inputs, MERGE, torch.device("cuda")).prefixes == ()
    assert pack(inputs * 10, MERGE, torch.device("cuda")).prefixes == (prefix_of(inputs[0]),)
