"""What tiled inference will do, decided before anything is written: field, grid, output, identity.

`make_plan` opens nothing for writing and takes no lock; `engine` carries a plan out, `forecast` says what
it will take, and `look` what is there of it already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raypipe.errors import InputError
from raypipe.tile.blend import check_overlap
from raypipe.tile.config import TileConfig
from raypipe.tile.field import Field, measure, stated
from raypipe.tile.files import check_place
from raypipe.tile.grid import TileGrid, round_up
from raypipe.tile.identity import digest_of_function, digest_of_model
from raypipe.tile.output import OutputSpec, kind_of
from raypipe.tile.pointwise import check_after, prepared_channels
from raypipe.tile.probe import Probe
from raypipe.tile.source import Source, digest
from raypipe.tile.worker import After, Prepare


@dataclass(frozen=True, eq=False, kw_only=True)
class TilePlan:
    """One run, ready to go. channels_in : that the model is given; identity : what decides the values."""

    source: Source
    model: nn.Module
    cfg: TileConfig
    field: Field
    spec: OutputSpec
    channels_in: int
    identity: dict[str, Any]
    prepare: Prepare | None
    after: After | None

    @property
    def grid(self) -> TileGrid:
        """Of each frame."""
        return self.spec.grid

    @property
    def tiles(self) -> int:
        """Of all frames."""
        return self.source.frames * len(self.grid)

    @property
    def how(self) -> str:
        """Where halo and align are from: measured, stated, or the overlap of blended windows."""
        if self.cfg.blend is not None:
            return "blended"
        return "measured" if self.cfg.halo is None else "stated"

    @property
    def window_shape(self) -> tuple[int, ...]:
        """(channels, *space) of what the model is shown for one tile."""
        return (self.channels_in, *self.grid.window)

    def resized(self, chunk_size: int) -> TilePlan:
        """The same with tiles of another size, to see what it would take: a result of its own."""
        cfg = replace(self.cfg, chunk_size=chunk_size)
        grid = _grid(self.source, self.field, cfg, tiff=self.spec.kind == "tiff")
        return replace(self, cfg=cfg, spec=replace(self.spec, grid=grid))

    def about(self) -> dict[str, Any]:
        """What the result's record says of the model beside the identity; see ``look``."""
        radius, align = list(self.field.radius), list(self.field.align)
        return {"field": {"radius": radius, "align": align, "how": self.how}}

    def words(self) -> str:
        """In one line."""
        exact = f"blended ({self.cfg.blend}), not exact" if self.cfg.blend else "exact"
        size = "x".join(map(str, self.source.space))
        tiles = "x".join(str(axis.tile) for axis in self.grid.axes)
        window = "x".join(map(str, self.grid.window))
        how = "measured" if self.how == "measured" else "stated"
        return (
            f"{self.source.frames} image(s) of {size} in {len(self.grid)} tiles of {tiles} each, read as "
            f"{window}; {exact}: radius {self.field.radius}, align {self.field.align} ({how})"
        )


def make_plan(
    source: Source,
    model: nn.Module,
    out: Path,
    cfg: TileConfig,
    *,
    keep_frames: bool = True,
    prepare: Prepare | None = None,
    after: After | None = None,
    known: Field | None = None,
) -> TilePlan:
    """The plan of `raypipe.tile.infer` with these arguments. known : the model's field, if it has been
    measured before.

    Raises ConfigError when ``out`` is what is read, or no place for a result; InputError when prepare or
    after is seen not to be pointwise, or tiles cannot equal the whole image and no ``blend`` is asked for.
    """
    kind = kind_of(out)
    check_place(source, out)
    dims = len(source.space)
    channels_in = prepared_channels(source, prepare)
    channels, dtype = _result_of(model, channels_in, dims, after)
    field = known or field_of(model, channels_in, dims, cfg)
    spec = OutputSpec(
        path=out,
        grid=_grid(source, field, cfg, tiff=kind == "tiff"),
        frames=source.frames,
        channels=channels,
        dtype=dtype,
        keep_frames=keep_frames,
        keep_channels=channels > 1,
    )
    return TilePlan(
        source=source,
        model=model,
        cfg=cfg,
        field=field,
        spec=spec,
        channels_in=channels_in,
        identity=_identity(source, model, spec, cfg, prepare, after),
        prepare=prepare,
        after=after,
    )


def field_of(model: nn.Module, in_channels: int, dims: int, cfg: TileConfig) -> Field:
    """Halo and alignment: stated, measured, or the overlap. Raises InputError."""
    if cfg.blend is not None:
        align = cfg.align if cfg.align is not None else _accepted(model, in_channels, dims)
        return stated(cfg.overlap, align, dims)
    if cfg.halo is not None and cfg.align is not None:
        return stated(cfg.halo, cfg.align, dims)
    field = measure(model, in_channels, dims)
    if not field.exact:
        raise InputError(
            f"the model cannot be tiled exactly: {field.why_not}; take blend='gaussian' or 'linear' "
            "with an overlap, which hides seams but is not the whole image's result, or state halo "
            "and align if you know better"
        )
    return field


def _accepted(model: nn.Module, in_channels: int, dims: int) -> int:
    """The smallest power of two whose odd multiples the model takes as a size."""
    with Probe.of(model, in_channels, dims) as probe:
        for align in (1, 2, 4, 8, 16, 32, 64):
            lengths = [2 * probe.base + align, 2 * probe.base + 3 * align]
            images = [(probe.image(0, length), length) for length in lengths]
            if all(probe.whole(0, image, 0, length) is not None for image, length in images):
                return align
        raise InputError(
            f"the model takes {2 * probe.base} pixels but not {2 * probe.base + 64}: "
            f"{probe.refusal}; state align"
        )


def _result_of(
    model: nn.Module, in_channels: int, dims: int, after: After | None
) -> tuple[int, str]:
    """(channels, dtype) of the result. Raises InputError, also for an ``after`` that is not pointwise."""
    with Probe.of(model, in_channels, dims) as probe:
        image = probe.image(0, 2 * probe.base)
        out = model(image)
        if after is not None:
            made = after(out.clone())
            if made.shape[2:] == image.shape[2:]:
                check_after(after, out)
            out = made
    if out.shape[2:] != image.shape[2:]:
        raise InputError(
            f"after gives {tuple(out.shape)} for an image {tuple(image.shape)}; it must keep (n, "
            "channels, *space)"
        )
    if out.dtype == torch.bfloat16:
        raise InputError(
            "the result is bfloat16, which no kind of output holds; add after=torch.Tensor.float"
        )
    return int(out.shape[1]), str(out.dtype).removeprefix("torch.")


def _grid(source: Source, field: Field, cfg: TileConfig, *, tiff: bool) -> TileGrid:
    tiles = []
    for axis, align in enumerate(field.align):
        in_plane = axis >= len(field.align) - 2
        unit = math.lcm(align, 16) if tiff and in_plane else align
        tiles.append(round_up(cfg.chunk_size, unit))
    grid = TileGrid.of(source.space, tiles, field.halo, field.align)
    if cfg.blend is not None:
        check_overlap(grid)
    return grid


def _identity(
    source: Source,
    model: nn.Module,
    spec: OutputSpec,
    cfg: TileConfig,
    prepare: Prepare | None,
    after: After | None,
) -> dict[str, Any]:
    """What decides the values and their place: nobody goes on with another's tiles. Not the batch,
    the device and the workers.
    """
    grid = spec.grid
    return {
        "input": digest(source),
        "model": digest_of_model(model),
        "prepare": digest_of_function(prepare),
        "after": digest_of_function(after),
        "output": [spec.kind, list(spec.shape), spec.dtype],
        "tile": [axis.tile for axis in grid.axes],
        "halo": [axis.halo for axis in grid.axes],
        "align": [axis.align for axis in grid.axes],
        "blend": cfg.blend or "",
    }
