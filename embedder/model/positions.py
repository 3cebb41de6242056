"""Coordinates -> what tells the towers where a patch stands: rotary angles, and the resampled position grid."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (tokens, heads, head_dim) by the angles of (tokens, head_dim)."""
    first, second = states.chunk(2, dim=-1)
    sin_first, sin_second = sin[:, None].chunk(2, dim=-1)
    rotated = states * cos[:, None]
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    rotated_first.addcmul_(second, sin_first, value=-1)  # in place, 2.3x as fast as a rotated copy (CPU)
    rotated_second.addcmul_(first, sin_second)
    return rotated


def vision_rotary(coordinates: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, (num_patches, 2) -> cos and sin, (num_patches, head_dim) float32.

    A quarter of the frequencies for rows, a quarter for columns, then both again (transformers' axial RoPE).
    """
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=coordinates.device) / (head_dim // 2)
    angles = (coordinates[:, :, None].float() * theta**-exponents).flatten(1)  # (num_patches, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def interpolate_position_grid(table: Tensor, coordinates: Tensor, grid_sizes: Tensor) -> Tensor:
    """Learned square grid, (side * side, hidden_size), bilinearly resampled to each patch: (num_patches, hidden_size).

    Corners meet corners (align_corners). In float32, as transformers computes it.
    """
    side = round(table.shape[0] ** 0.5)
    place = coordinates.float() * (side - 1) / (grid_sizes.float() - 1).clamp(min=1)  # (num_patches, 2)
    low = place.floor().long()
    high = (low + 1).clamp(max=side - 1)
    weight = place - low
    row_low, column_low = low.unbind(1)
    row_high, column_high = high.unbind(1)
    row_weight, column_weight = weight[:, 0:1], weight[:, 1:2]
    resampled: Tensor = (
        table[row_low * side + column_low] * ((1 - row_weight) * (1 - column_weight))
        + table[row_low * side + column_high] * ((1 - row_weight) * column_weight)
        + table[row_high * side + column_low] * (row_weight * (1 - column_weight))
        + table[row_high * side + column_high] * (row_weight * column_weight)
    )
    return resampled
