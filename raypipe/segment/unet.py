"""The U-Net of Ronneberger, Fischer and Brox (2015), with batch norm and padded convolutions.

    level 0   (b, width, h, w)             --- skip --->   Up   -> head -> (b, classes, h, w)
    level 1   (b, 2 width, h/2, w/2)       --- skip --->   Up
    ...
    bottom    (b, 2^(depth-1) width, h/2^(depth-1), ...)

Defaults are the paper's widths, 64-128-256-512-1024. A level's pooling, up-sampling and joining lie
inside its block, so that a recomputed block keeps its inputs only: a skip and the level below.
What it means to recompute a block is `raypipe.train.precision`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raypipe.errors import ConfigError, InputError

Up = Literal["transposed", "bilinear"]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of our U-Net. Raises ConfigError when a value breaks its rule."""

    in_channels: int = 1
    """Channels of an image."""
    classes: int = 1
    """Maps that come out: 1 is one foreground (sigmoid), more are exclusive classes (softmax),
    the first of them the background."""
    width: int = 64
    """Channels of the first level; each level below has twice as many."""
    depth: int = 5
    """Levels; sides of an image are multiples of 2^(depth-1)."""
    up: Up = "transposed"
    """Up-sampling: learned 2x2 transposed convolutions, or bilinear and a 1x1 convolution."""
    dropout: float = 0.0
    """Probability of dropping a value at the end of the deepest level, as in the paper."""

    def __post_init__(self) -> None:
        for name, least in (("in_channels", 1), ("classes", 1), ("width", 1), ("depth", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"U-Net {name}={getattr(self, name)}: give at least {least}")
        if self.up not in ("transposed", "bilinear"):
            raise ConfigError(f"U-Net up={self.up!r}: one of transposed, bilinear")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"U-Net dropout={self.dropout}: give a probability in [0, 1)")

    @property
    def name(self) -> str:
        """As on the command line."""
        return "unet"

    @property
    def multiple(self) -> int:
        """What the sides of an image must be a multiple of, in pixels."""
        return 2 ** (self.depth - 1)

    def channels(self, level: int) -> int:
        """Channels at ``level``, 0 the finest."""
        return int(self.width * 2**level)


class DoubleConv(nn.Sequential):
    """Twice: 3x3 convolution, batch norm, ReLU. The norm's shift stands for the bias."""

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.0) -> None:
        parts: list[nn.Module] = []
        for n_in in (inputs, outputs):
            parts.append(nn.Conv2d(n_in, outputs, 3, padding=1, bias=False))
            # ReLU in place: batch norm's backward needs its input, not its output.
            parts += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        super().__init__(*parts, *([nn.Dropout(dropout)] if dropout else []))


class Down(nn.Module):
    """One level down: halve the sides, then a double convolution."""

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.convs = DoubleConv(inputs, outputs, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h/2, w/2)."""
        return self.convs(self.pool(x))


class UpBlock(nn.Module):
    """One level up: double the sides, join the skip, then a double convolution."""

    def __init__(self, inputs: int, outputs: int, up: Up) -> None:
        super().__init__()
        self.up = _TO_LARGER[up](inputs, outputs)
        self.convs = DoubleConv(2 * outputs, outputs)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        """below (b, inputs, h/2, w/2), skip (b, outputs, h, w) -> (b, outputs, h, w)."""
        return self.convs(torch.cat([skip, self.up(below)], dim=1))


def _bilinear(inputs: int, outputs: int) -> nn.Module:
    """The 1x1 convolution first: it commutes with the interpolation, on a quarter of the pixels."""
    larger = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1), larger)


_TO_LARGER = {
    "transposed": lambda inputs, outputs: nn.ConvTranspose2d(inputs, outputs, 2, stride=2),
    "bilinear": _bilinear,
}


class UNet(nn.Module):
    """Images -> logits of the same height and width."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        n, last = config.channels, config.depth - 1
        self.first = DoubleConv(config.in_channels, n(0))
        self.down = nn.ModuleList(
            Down(n(i - 1), n(i), config.dropout if i == last else 0.0) for i in range(1, last + 1)
        )
        self.up = nn.ModuleList(UpBlock(n(i + 1), n(i), config.up) for i in reversed(range(last)))
        self.head = nn.Conv2d(n(0), config.classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x : (b, in_channels, h, w) -> logits (b, classes, h, w). Raises InputError."""
        multiple = self.config.multiple
        if x.shape[-2] % multiple or x.shape[-1] % multiple:
            raise InputError(
                f"image of {x.shape[-2]}x{x.shape[-1]} pixels: this U-Net halves the sides"
                f" {self.config.depth - 1} times; pad to multiples of {multiple}"
            )
        levels = [self.first(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for up in self.up:
            x = up(x, levels.pop())
        return self.head(x)

    def checkpoint_blocks(self) -> list[nn.Module]:
        """A block a level and way: what may be recomputed instead of kept."""
        return [self.first, *self.down, *self.up]
