"""Fixed 2-D sine positions for patch tokens (DETR's, normalised to the grid)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raypipe.errors import ConfigError


def sine_positions(height: int, width: int, dim: int, temperature: float = 10_000.0) -> Tensor:
    """Positions of a ``height`` x ``width`` grid, row-major: (height * width, dim) float32.

    The first half of ``dim`` codes the row, the second the column: each a (1-based) index scaled to
    0..2 pi and passed through sine and cosine of geometrically falling frequency, interleaved.
    Carion et al. 2020. Raises ConfigError where dim is not a multiple of 4.
    """
    if dim % 4:
        raise ConfigError(f"d_model {dim} is not a multiple of 4, which 2-D sine positions need")
    rows, columns = _axis(height, dim // 2, temperature), _axis(width, dim // 2, temperature)
    grid = torch.cat(
        [
            rows[:, None, :].expand(height, width, dim // 2),
            columns[None, :, :].expand(height, width, dim // 2),
        ],
        dim=-1,
    )
    return grid.reshape(height * width, dim).float()


def _axis(length: int, dim: int, temperature: float) -> Tensor:
    """(length, dim) float64: sine at even, cosine at odd places."""
    at = torch.arange(1, length + 1, dtype=torch.float64) / length * (2 * math.pi)
    exponent = 2 * torch.div(torch.arange(dim), 2, rounding_mode="floor") / dim
    angle = at[:, None] / temperature ** exponent.double()
    return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)
