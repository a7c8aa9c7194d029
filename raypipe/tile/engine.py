"""Drives tiled inference: take the result over, hand out what is missing, finish.

What is on the disk after a crash is whole: the same call computes only the tiles that it lacks. What is
done, and how it is cut, is ``plan``'s to decide.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from raypipe.progress import Progress
from raypipe.runner import Needs, Runner
from raypipe.tile.config import TileConfig
from raypipe.tile.field import Field
from raypipe.tile.grid import TileGrid
from raypipe.tile.ledger import TileRun
from raypipe.tile.plan import TilePlan, make_plan
from raypipe.tile.source import Source
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
    started = time.monotonic()
    needs = runner.needs(cfg.workers, runner.resolve_device(cfg.device))
    plan = make_plan(source, model, out, cfg, keep_frames=keep_frames, prepare=prepare, after=after)
    return carry_out(plan, runner, needs, started=started)


def carry_out(
    plan: TilePlan,
    runner: Runner,
    needs: Needs,
    *,
    begun: Callable[[TileRun], None] = lambda run: None,
    started: float | None = None,
) -> Inferred:
    """Compute what is missing of ``plan``'s result, in a pool of ``needs``.

    begun : called once the result is this run's, before the first tile; not for one that is finished.
    started : by time.monotonic(), where the work began before. Raises as `infer`.
    """
    started = time.monotonic() if started is None else started
    _say(plan.words())
    run = run_of(plan)
    with run:
        run.open(overwrite=plan.cfg.overwrite)
        if len(run.missing()):
            begun(run)
            _compute(run, _setup(plan, runner, needs), plan.cfg, runner, needs)
        run.finish()
    return Inferred(
        path=plan.spec.path,
        shape=plan.spec.shape,
        dtype=plan.spec.dtype,
        field=plan.field,
        tile=tuple(axis.tile for axis in plan.grid.axes),
        window=plan.grid.window,
        tiles=len(run.done),
        kept=run.kept,
        seconds=time.monotonic() - started,
    )


def run_of(plan: TilePlan) -> TileRun:
    """The hold that a run of ``plan`` would take on its result; nothing is taken yet."""
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return TileRun(plan.spec, plan.identity, run_id=run_id, about=plan.about())


def _setup(plan: TilePlan, runner: Runner, needs: Needs) -> TileSetup:
    return TileSetup(
        model=_on(plan.model, needs.device, here=runner.name == "local"),
        source=plan.source,
        grid=plan.grid,
        device=needs.device,
        # In this process torch's threads are the caller's to set.
        torch_threads=_threads(needs) if runner.name != "local" else None,
        blend=plan.cfg.blend,
        prepare=plan.prepare,
        after=plan.after,
    )


def _on(model: nn.Module, device: str, *, here: bool) -> nn.Module:
    """The model itself where all of it lies where it is used, else a copy; for other processes (not
    ``here``) one on the CPU, as they may have no GPU to unpickle it on. Each worker moves its own.
    """
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    wanted = torch.device(device if here else "cpu")
    if all(_same(place, wanted) for place in places):
        return model
    return copy.deepcopy(model) if here else _cpu_copy(model)


def _cpu_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, each tensor taken there by itself: its GPU need not have room for two models."""
    tensors = (*model.parameters(), *model.buffers())
    plain = [t for t in tensors if type(t) in (Tensor, nn.Parameter) and t.device.type != "cpu"]
    copied: nn.Module = copy.deepcopy(model, {id(t): _on_cpu(t) for t in plain})
    return copied.to("cpu")  # tensors of other types


def _on_cpu(tensor: Tensor) -> Tensor:
    there = tensor.detach().cpu()
    if type(tensor) is nn.Parameter:
        return nn.Parameter(there, requires_grad=tensor.requires_grad)
    return there.requires_grad_(tensor.requires_grad)


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether they are one device; "cuda" is the current one."""
    if one.type != other.type:
        return False
    if one.type != "cuda":
        return True
    numbers = [torch.cuda.current_device() if d.index is None else d.index for d in (one, other)]
    return numbers[0] == numbers[1]


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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
