"""Preprocessed items to one packed batch on the device: all sequences concatenated, no padding.

The scheduler has already chosen the items of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedder.inputs.preprocess import ModelInput, Patches

MAX_SHARED_TOKENS = 1024  # of the distinct prefixes of a batch, together
# On a GPU, batches of up to this many tokens do not share prefixes. They spend most of their time reading the weights,
# and each layer needs four fewer kernels without a prefix (benchmarks/results/gpu_counts.json).
MAX_UNSHARED_GPU_TOKENS = 256

Placed = tuple[Patches, NDArray[np.int64]]  # with the places of the visual tokens


@dataclass(frozen=True)
class Run:
    """`count` consecutive sequences of `length` tokens each; the first starts at token `start`."""

    start: int
    count: int
    length: int

    def view(self, packed: Tensor) -> Tensor:
        """The run's part of a packed tensor, (total_tokens, ...), as a view of shape (count, length, ...)."""
        part = packed[self.start : self.start + self.count * self.length]
        return part.view(self.count, self.length, *packed.shape[1:])


@dataclass(frozen=True)
class Sequences:
    """The boundaries of the sequences in a packed tensor.

    `cu_seqlens`: (num_sequences + 1,) int32 on the device, cumulative lengths from 0, for the varlen kernels. `runs`:
    the same boundaries as runs of equal length, for the CPU, which has no varlen kernel.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class PackedPatches:
    """The patches of the images and clips that the vision tower computes, images first.

    `image_pixels`: (num_image_patches, channels * patch**2) uint8.
    `video_pixels`: (num_video_patches, channels * temporal_patch * patch**2) uint8.
    `coordinates`: (num_patches, 2), each patch's row and column in its image.
    `grid_sizes`: (num_patches, 2), the rows and columns of that image.
    `sequences`: which patches attend to each other: those of an image, or of a temporal patch (two frames) of a clip.
    """

    image_pixels: Tensor
    video_pixels: Tensor
    coordinates: Tensor
    grid_sizes: Tensor
    sequences: Sequences


@dataclass(frozen=True)
class PackedVision:
    """The images and clips of a batch: those of `patches`, then those whose features are `reused`.

    `patches`: None if there is nothing to compute. `keys` and `num_tokens`: the content and the number of visual tokens
    of each image and clip of `patches`. `reused`: features from the vision cache, or the place of equal content in
    `keys`. `token_index`: (num_visual_tokens,), where each visual token is in the packed tokens.
    """

    patches: PackedPatches | None
    keys: tuple[bytes, ...]
    num_tokens: tuple[int, ...]
    reused: tuple[Tensor | int, ...]
    token_index: Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that several items begin with, and their images and clips. Two are equal if ids and content are.

    `input_ids`, `position_ids`, `visual_index` and `patches` are those of `ModelInput`, up to the prefix's end.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    visual_index: NDArray[np.int64]
    patches: tuple[Patches, ...]
    key: bytes

    def __len__(self) -> int:
        return len(self.input_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prefix) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def prefix_of(one: ModelInput) -> Prefix:
    """The item's prefix; it is empty if the item has none."""
    stop = one.num_prefix_tokens
    return Prefix(
        one.input_ids[:stop],
        one.position_ids[:, :stop],
        one.visual_index[one.visual_index < stop],
        one.patches[: one.num_prefix_patches],
        one.input_ids[:stop].tobytes() + one.prefix_key,
    )


@dataclass(frozen=True)
class PackedBatch:
    """The tokens of a batch. Shared prefixes are kept apart; an item's own tokens are those after its prefix.

    `input_ids`: (total_tokens,) int64. `position_ids`: (3, total_tokens), time, height and width of M-RoPE.
    `sequences`: the items' own tokens. `keys`: the keys of each item, with its prefix.
    `prefixes`: the distinct prefixes.
    `key_index`: (total_keys,), indices into all prefixes followed by all own tokens; None if there are no prefixes.
    `pooled_index`: (num_items,), each item's last token. `pooled`: the same as sequences of one token.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequences: Sequences
    keys: Sequences
    prefixes: tuple[Prefix, ...]
    key_index: Tensor | None
    pooled_index: Tensor
    pooled: Sequences
    vision: PackedVision | None


@dataclass(frozen=True)
class PackedPrefixes:
    """A batch of prefixes: `input_ids` (total_tokens,), `position_ids` (3, total_tokens)."""

    input_ids: Tensor
    position_ids: Tensor
    sequences: Sequences
    vision: PackedVision | None


Packed = TypeVar("Packed", PackedBatch, PackedPrefixes)
FindFeatures = Callable[[bytes], Tensor | None]  # the kept features of an image or clip with this key


def _find_none(_: bytes) -> None:
    """Without a vision cache no features are kept."""


def pack(
    inputs: Sequence[ModelInput],
    merge_size: int,
    device: torch.device,
    max_shared_tokens: int = MAX_SHARED_TOKENS,
    find_features: FindFeatures = _find_none,
) -> PackedBatch:
    """Concatenate the items in the given order, and copy them to the device.

    Items sorted by length give fewer and longer runs, which are faster on the CPU. `merge_size` is the vision config's
    `spatial_merge_size`. `max_shared_tokens`: limit on all distinct prefixes. `find_features`: the vision cache's.
    """
    if device.type == "cuda" and sum(one.num_tokens for one in inputs) <= MAX_UNSHARED_GPU_TOKENS:
        inputs = [one.without_prefix() for one in inputs]
    inputs = _limit_shared_prefixes(inputs, max_shared_tokens)
    shared = np.array([one.num_prefix_tokens for one in inputs])
    lengths = np.array([one.num_tokens for one in inputs]) - shared
    starts = np.cumsum(lengths) - lengths
    prefixes, key_index = _share_prefixes(inputs, starts, lengths)
    counts = _run_lengths(zip(lengths.tolist(), shared.tolist(), strict=True))
    batch = PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([one.input_ids[one.num_prefix_tokens :] for one in inputs])),
        position_ids=torch.from_numpy(
            np.concatenate([one.position_ids[:, one.num_prefix_tokens :] for one in inputs], axis=1)
        ),
        sequences=_sequences(lengths, counts),
        keys=_sequences(lengths + shared, counts),
        prefixes=prefixes,
        key_index=torch.from_numpy(key_index) if prefixes else None,
        pooled_index=torch.from_numpy(starts + lengths - 1),
        pooled=_sequences(np.ones_like(lengths), counts),
        vision=_pack_vision(
            [_own_vision(one, start) for one, start in zip(inputs, starts, strict=True)], merge_size, find_features
        ),
    )
    return _to_device(batch, device)


def pack_prefixes(
    prefixes: Sequence[Prefix], merge_size: int, device: torch.device, find_features: FindFeatures = _find_none
) -> PackedPrefixes:
    """Concatenate prefixes, and copy them to the device."""
    lengths = np.array([len(prefix) for prefix in prefixes])
    starts = np.cumsum(lengths) - lengths
    visual = [(one.patches, one.visual_index + start) for one, start in zip(prefixes, starts, strict=True)]
    packed = PackedPrefixes(
        input_ids=torch.from_numpy(np.concatenate([prefix.input_ids for prefix in prefixes])),
        position_ids=torch.from_numpy(np.concatenate([prefix.position_ids for prefix in prefixes], axis=1)),
        sequences=_sequences(lengths, _run_lengths(lengths.tolist())),
        vision=_pack_vision(visual, merge_size, find_features),
    )
    return _to_device(packed, device)


def _own_vision(one: ModelInput, start: int) -> tuple[tuple[Patches, ...], NDArray[np.int64]]:
    """The patches after the item's prefix, and the places of their tokens if the item's own tokens begin at `start`."""
    if not one.num_prefix_patches:
        return one.patches, one.visual_index + (start - one.num_prefix_tokens)
    own = one.visual_index[one.visual_index >= one.num_prefix_tokens]
    return one.patches[one.num_prefix_patches :], own + (start - one.num_prefix_tokens)


def _limit_shared_prefixes(inputs: Sequence[ModelInput], max_shared_tokens: int) -> list[ModelInput]:
    """Share at most `max_shared_tokens` of distinct prefixes; the other items keep theirs as ordinary tokens.

    If every item has its own instruction, sharing saves nothing, and cached keys and values take memory in every layer.
    """
    known: set[Prefix] = set()
    capacity = max_shared_tokens
    limited = []
    for one in inputs:
        prefix = prefix_of(one)
        if len(prefix) and prefix not in known:
            if one.num_prefix_tokens > capacity:
                limited.append(one.without_prefix())
                continue
            known.add(prefix)
            capacity -= one.num_prefix_tokens
        limited.append(one)
    return limited


def _share_prefixes(
    inputs: Sequence[ModelInput], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[tuple[Prefix, ...], NDArray[np.int64]]:
    """The distinct prefixes, and `key_index`: item by item the places of its prefix and of its own tokens."""
    places: dict[Prefix, NDArray[np.int64]] = {}
    num_prefix_rows = 0
    item_prefixes = []
    for one in inputs:
        prefix = prefix_of(one)
        if prefix not in places:
            places[prefix] = np.arange(num_prefix_rows, num_prefix_rows + len(prefix))
            num_prefix_rows += len(prefix)
        item_prefixes.append(places[prefix])
    own = (np.arange(start, start + length) for start, length in zip(num_prefix_rows + starts, lengths, strict=True))
    key_index = np.concatenate([part for pair in zip(item_prefixes, own, strict=True) for part in pair])
    return tuple(prefix for prefix in places if len(prefix)), key_index


def _pack_vision(
    visual: Sequence[tuple[Sequence[Patches], NDArray[np.int64]]], merge_size: int, find_features: FindFeatures
) -> PackedVision | None:
    """`visual`: the patches of each sequence, and the places of their visual tokens in the packed tokens."""
    pairs: list[Placed] = []
    for patches_of_one, places_of_one in visual:
        sizes = [len(one.pixels) // merge_size**2 for one in patches_of_one]
        places = np.split(places_of_one, np.cumsum(sizes)[:-1])
        pairs += zip(patches_of_one, places, strict=False)
    if not pairs:
        return None
    # images before clips, and grids of the same size next to each other
    pairs.sort(key=lambda pair: (pair[0].num_frames, pair[0].grid_thw[1] * pair[0].grid_thw[2]))
    new, placed_again, reused = _split_known(pairs, find_features)
    patches = [patches for patches, _ in new]
    return PackedVision(
        patches=_pack_patches(patches, merge_size) if patches else None,
        keys=tuple(one.key for one in patches),
        num_tokens=tuple(len(places) for _, places in new),
        reused=reused,
        token_index=torch.from_numpy(np.concatenate([places for _, places in (*new, *placed_again)])),
    )


def _split_known(
    pairs: Sequence[Placed], find_features: FindFeatures
) -> tuple[list[Placed], list[Placed], tuple[Tensor | int, ...]]:
    """What the vision tower must compute, and the rest, with where its features come from. No key: content unknown."""
    new: list[Placed] = []
    again: list[Placed] = []
    reused: list[Tensor | int] = []
    places: dict[bytes, int] = {}
    for pair in pairs:
        key = pair[0].key
        source: Tensor | int | None = places.get(key, find_features(key)) if key else None
        if source is None:
            places[key] = len(new)
            new.append(pair)
        else:
            again.append(pair)
            reused.append(source)
    return new, again, tuple(reused)


def _pack_patches(patches: Sequence[Patches], merge_size: int) -> PackedPatches:
    lengths = np.concatenate([np.full(t, h * w) for t, h, w in (one.grid_thw for one in patches)])
    sizes_hw = np.concatenate([np.full((len(one.pixels), 2), one.grid_thw[1:]) for one in patches])
    return PackedPatches(
        image_pixels=torch.from_numpy(_rows([one.pixels for one in patches if one.num_frames == 1])),
        video_pixels=torch.from_numpy(_rows([one.pixels for one in patches if one.num_frames > 1])),
        coordinates=torch.from_numpy(np.concatenate([_coordinates(one.grid_thw, merge_size) for one in patches])),
        grid_sizes=torch.from_numpy(sizes_hw),
        sequences=_sequences(lengths, _run_lengths(lengths.tolist())),
    )


def _rows(pixels: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.concatenate(pixels) if pixels else np.empty((0, 0), np.uint8)


@lru_cache(maxsize=256)
def _coordinates(grid_thw: tuple[int, int, int], merge_size: int) -> NDArray[np.int64]:
    """Row and column of each patch of a grid, (t * h * w, 2), in the order of `preprocess.patchify`."""
    grid_t, grid_h, grid_w = grid_thw
    grid = np.indices((grid_h, grid_w)).reshape(2, grid_h // merge_size, merge_size, grid_w // merge_size, merge_size)
    return np.tile(grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2), (grid_t, 1))


def _sequences(lengths: NDArray[np.int64], counts: Sequence[int]) -> Sequences:
    """`counts`: the number of sequences of each run; sequences of one run must have equal lengths."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    firsts = np.cumsum(counts) - counts
    runs = (
        Run(int(cu_seqlens[first]), count, int(lengths[first])) for first, count in zip(firsts, counts, strict=True)
    )
    return Sequences(torch.from_numpy(cu_seqlens), int(lengths.max()), tuple(runs))


def _run_lengths(values: Iterable[object]) -> list[int]:
    """The number of equal neighbors in each run (run-length encoding without the values)."""
    return [len(list(equal)) for _, equal in groupby(values)]


def _to_device(packed: Packed, device: torch.device) -> Packed:
    """The same with all tensors on the device: pixels in copies of their own, everything else in one copy."""
    if device.type == "cpu":
        return packed
    tensors = list(_tensors(packed))
    pixels = [tensor for tensor in tensors if tensor.dtype == torch.uint8 and tensor.numel()]
    # Larger items first, so that each part is aligned to its own item size.
    others = sorted((one for one in tensors if one.dtype != torch.uint8 or not one.numel()), key=_negative_item_size)
    buffer = _copy(torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in others]), device)
    parts = torch.split(buffer, [tensor.numel() * tensor.element_size() for tensor in others])
    moved = {id(one): part.view(one.dtype).view(one.shape) for one, part in zip(others, parts, strict=True)}
    moved |= {id(tensor): _copy(tensor, device) for tensor in pixels}
    result: Packed = _map_tensors(packed, lambda tensor: moved[id(tensor)])
    return result


def _tensors(packed: Any) -> Iterator[Tensor]:
    for field in fields(packed):
        value = getattr(packed, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def _map_tensors(packed: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of the dataclass with `function` applied to each tensor, also in nested dataclasses."""
    changes: dict[str, Any] = {}
    for field in fields(packed):
        value = getattr(packed, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = function(value)
        elif is_dataclass(value):
            changes[field.name] = _map_tensors(value, function)
    return replace(packed, **changes)


def _negative_item_size(tensor: Tensor) -> int:
    return -tensor.element_size()


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)
