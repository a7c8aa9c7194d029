"""Drives tiled inference: measure the model, lay the grid, hand out what is missing, finish.

What is on the disk after a crash is whole: the same call computes only the tiles that it lacks.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raypipe.errors import InputError
from raypipe.progress import Progress
from raypipe.runner import Needs, Runner
from raypipe.tile.blend import check_overlap
from raypipe.tile.config import TileConfig
from raypipe.tile.field import Field, measure, stated
from raypipe.tile.files import check_apart
from raypipe.tile.grid import TileGrid, round_up
from raypipe.tile.identity import digest_of_function, digest_of_model
from raypipe.tile.ledger import TileRun
from raypipe.tile.output import OutputSpec, kind_of
from raypipe.tile.pointwise import check_after, prepared_channels
from raypipe.tile.probe import Probe
from raypipe.tile.source import Source, digest
from raypipe.tile.worker import After, Prepare, TileItem, TileSetup

# Large enough that its syncs are hidden behind the next item, small enough to lose little.
ITEM_BYTES = 32 * 1024**2
MIN_ITEMS_PER_WORKER = 4
BLOCK = 4  # tiles a side of an item when blending: (BLOCK + 2)**2 windows for BLOCK**2 tiles


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """What came of it. seconds : of computing; kept : tiles that were there before."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    field: Field
    tile: tuple[int, ...]
    window: tuple[int, ...]
    tiles: int
    kept: int
    seconds: float


def infer(
    source: Source,
    model: nn.Module,
    out: Path,
    cfg: TileConfig,
    runner: Runner,
    *,
    keep_frames: bool = True,
    prepare: Prepare | None = None,
    after: After | None = None,
) -> Inferred:
    """Write ``after(model(prepare(image)))`` of every frame of ``source`` to ``out``.

    The model runs as it stands (call ``eval()`` first) and is not changed. prepare and after work
    pixel by pixel; their code, or their pickled form, tells results apart.

    Raises ConfigError when ``out`` is what is read; InputError when prepare or after is seen not to be
    pointwise, or tiles cannot equal the whole image and no ``blend`` is asked for; what ``TileRun.open``
    raises; MemoryBudgetExceeded, WorkerFailed.
    """
    started, kind = time.monotonic(), kind_of(out)
    check_apart(source, out)
    dims = len(source.space)
    channels_in = prepared_channels(source, prepare)
    channels, dtype = _result_of(model, channels_in, dims, after)
    field = field_of(model, channels_in, dims, cfg)
    grid = _grid(source, field, cfg, tiff=kind == "tiff")
    spec = OutputSpec(
        path=out,
        grid=grid,
        frames=source.frames,
        channels=channels,
        dtype=dtype,
        keep_frames=keep_frames,
        keep_channels=channels > 1,
    )
    _say(_words(source, grid, field, cfg))
    device = runner.resolve_device(cfg.device)
    needs = runner.needs(cfg.workers, device)
    identity = _identity(source, model, spec, cfg, prepare, after)
    run = TileRun(spec, identity, run_id=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    setup = TileSetup(
        model=_on(model, device),
        source=source,
        grid=grid,
        device=device,
        # In this process torch's threads are the caller's to set.
        torch_threads=_threads(needs) if runner.name != "local" else None,
        blend=cfg.blend,
        prepare=prepare,
        after=after,
    )
    with run:
        run.open(overwrite=cfg.overwrite)
        if len(run.missing()):
            _compute(run, setup, cfg, runner, needs)
        run.finish()
    return Inferred(
        path=out,
        shape=spec.shape,
        dtype=dtype,
        field=field,
        tile=tuple(axis.tile for axis in grid.axes),
        window=grid.window,
        tiles=len(run.done),
        kept=run.kept,
        seconds=time.monotonic() - started,
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


def _on(model: nn.Module, device: str) -> nn.Module:
    """The model itself, or a copy of it to be moved to ``device``."""
    first = next(model.parameters(), torch.empty(0))
    return model if first.device.type == torch.device(device).type else copy.deepcopy(model)


def _threads(needs: Needs) -> int | None:
    return max(1, int(needs.cpus)) if needs.device == "cpu" else None


def _compute(run: TileRun, setup: TileSetup, cfg: TileConfig, runner: Runner, needs: Needs) -> None:
    items = list(cut(run, setup.grid, cfg, needs.workers))
    tiles, total = len(setup.grid), len(run.done)
    if run.kept:
        _say(f"{run.kept} of {total} tiles are there already")
    with (
        runner.pool(setup, needs) as pool,
        Progress("tiles", total, "tiles", done=run.kept) as progress,
    ):
        for done in pool.run(items, run.target, run.shut_out):
            item: TileItem = done.payload
            run.accept(item.frame * tiles + number for number in item.tiles)
            progress.update(len(item.tiles))


def cut(run: TileRun, grid: TileGrid, cfg: TileConfig, workers: int) -> Iterator[TileItem]:
    """Work items of the tiles that are missing: runs of them, and of one block when blending."""
    missing = run.missing()
    tile_bytes = math.prod(a.tile for a in grid.axes) * run.spec.channels
    tile_bytes *= np.dtype(run.spec.dtype).itemsize
    share = len(missing) // (workers * MIN_ITEMS_PER_WORKER)
    most = max(cfg.batch, min(ITEM_BYTES // tile_bytes, share), 1)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number in missing:
        frame, tile = divmod(int(number), len(grid))
        block = tuple(k // BLOCK for k in grid.tile(tile).place) if cfg.blend else ()
        groups.setdefault((frame, *block), []).append(tile)
    for (frame, *_), numbers in groups.items():
        step = len(numbers) if cfg.blend else most
        for lo in range(0, len(numbers), step):
            part = tuple(numbers[lo : lo + step])
            yield TileItem(frame=frame, tiles=part, batch_limit=cfg.batch)


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


def _words(source: Source, grid: TileGrid, field: Field, cfg: TileConfig) -> str:
    how = f"blended ({cfg.blend}), not exact" if cfg.blend else "exact"
    measured = "measured" if cfg.halo is None and cfg.blend is None else "stated"
    size = "x".join(map(str, source.space))
    tiles = "x".join(str(axis.tile) for axis in grid.axes)
    window = "x".join(map(str, grid.window))
    return (
        f"{source.frames} image(s) of {size} in {len(grid)} tiles of {tiles} each, read as {window}; "
        f"{how}: radius {field.radius}, align {field.align} ({measured})"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
