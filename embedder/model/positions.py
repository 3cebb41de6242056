"""Coordinates to positional information: rotary angles, and position embeddings interpolated from a learned grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (tokens, heads, head_dim) by cos and sin of shape (tokens, head_dim).

    Value i of a head rotates together with value i + head_dim / 2 (transformers' `rotate_half`).
    """
    first, second = states.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # one kernel: of operations in place on parts, the compiler makes three
        return torch.cat(rotate_halves(first, second, cos, sin), dim=-1)
    sin_first, sin_second = sin[:, None].chunk(2, dim=-1)
    rotated = states * cos[:, None]
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    rotated_first.addcmul_(second, sin_first, value=-1)  # in place: `rotate_half` would copy both halves
    rotated_second.addcmul_(first, sin_second)
    return rotated


def rotate_halves(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `apply_rotary`, from and to the two halves of each head, without operations in place."""
    cos_first, cos_second = cos[:, None].chunk(2, dim=-1)
    sin_first, sin_second = sin[:, None].chunk(2, dim=-1)
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """The angle by which each pair of values turns from one position to the next: (head_dim / 2,) float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies: Tensor = 1.0 / theta**exponents
    return frequencies


def interleaved_axes(head_dim: int, sections: Sequence[int]) -> Tensor:
    """The axis (0 time, 1 height, 2 width) that each pair of values follows: (head_dim / 2,) int64.

    `sections`: the number of pairs of each axis. They take turns (t, h, w, t, h, w, ...) until the pairs of height and
    width are used up; all others follow time.
    """
    axes = torch.zeros(head_dim // 2, dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def text_rotary(position_ids: Tensor, frequencies: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """M-RoPE positions, (3, tokens), to cos and sin, each (tokens, head_dim) float32.

    `frequencies` and `axes`, each (head_dim / 2,), as `rotary_frequencies` and `interleaved_axes` return them
    (`Qwen3VLTextRotaryEmbedding` in transformers).
    """
    angles = position_ids.float().index_select(0, axes).t() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def vision_rotary(coordinates: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, (num_patches, 2), to cos and sin, each (num_patches, head_dim) float32.

    The angles are [row frequencies, column frequencies], head_dim / 4 each, and the same again (axial RoPE,
    `Qwen3VLVisionRotaryEmbedding` in transformers).
    """
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=coordinates.device) / (head_dim // 2)
    angles = (coordinates[:, :, None].float() * theta**-exponents).flatten(1)  # (num_patches, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def interpolate_position_grid(table: Tensor, coordinates: Tensor, grid_sizes: Tensor) -> Tensor:
    """Bilinear interpolation of a learned grid, (side * side, hidden_size), at each patch: (num_patches, hidden_size).

    `coordinates` and `grid_sizes`: (num_patches, 2), the patch's row and column, and the rows and columns of its image.
    The corners of an image map to the corners of the grid (align_corners=True). Computed in float32, as in
    transformers.
    """
    side = round(table.shape[0] ** 0.5)
    place = coordinates.float() * (side - 1) / (grid_sizes.float() - 1).clamp(min=1)  # (num_patches, 2)
    low = place.floor().long()
    high = (low + 1).clamp(max=side - 1)
    weight = place - low
    row_low, column_low = low.unbind(1)
    row_high, column_high = high.unbind(1)
    row_weight, column_weight = weight[:, 0:1], weight[:, 1:2]
    interpolated: Tensor = (
        table[row_low * side + column_low] * ((1 - row_weight) * (1 - column_weight))
        + table[row_low * side + column_high] * ((1 - row_weight) * column_weight)
        + table[row_high * side + column_low] * (row_weight * (1 - column_weight))
        + table[row_high * side + column_high] * (row_weight * column_weight)
    )
    return interpolated
