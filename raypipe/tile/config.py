"""The options of tiled inference, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raypipe.errors import ConfigError
from raypipe.tile.blend import Blend


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How an image is cut and who computes it. Raises ConfigError."""

    chunk_size: int = 512
    """Pixels of a tile along each axis, rounded up to the model's alignment (TIFF: and to 16). Memory
    grows with it and with ``batch``, not with the image."""
    batch: int = 1
    """Windows computed at once."""
    halo: int | tuple[int, ...] | None = None
    """Pixels that the model looks beyond a tile; measured when left out."""
    align: int | tuple[int, ...] | None = None
    """Period of its strides in pixels; measured when left out."""
    blend: Blend | None = None
    """None: tiles that equal the whole image, or an error. linear, gaussian: overlapping windows,
    for models that cannot be tiled exactly."""
    overlap: int = 32
    """With ``blend``: pixels that a window counts beyond its tile, on each side."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes CUDA where there is one."""
    workers: int | None = None
    """Processes, one a GPU; by default as many as the runner has room for."""
    overwrite: bool = False
    """Replace a finished result, also of the same inputs, and one of others; what is unfinished and
    fits is gone on with. The old one keeps its name, and its space, until the new one is complete."""

    def __post_init__(self) -> None:
        if self.chunk_size < 1 or self.batch < 1:
            raise ConfigError(
                f"chunk_size {self.chunk_size}, batch {self.batch}: both must be at least 1"
            )
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers {self.workers} is below 1; give 1 or more")
        if (self.halo is None) != (self.align is None) and self.blend is None:
            raise ConfigError(
                f"halo {self.halo}, align {self.align}: state both, or neither to have them measured"
            )
        if self.blend not in (None, "linear", "gaussian"):
            raise ConfigError(f"blend {self.blend!r} is not linear or gaussian, nor left out")
        if self.blend is not None and self.overlap < 1:
            raise ConfigError(f"overlap {self.overlap}: blending needs 1 pixel or more")
