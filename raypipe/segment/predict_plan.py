"""What ``segment predict`` is about to do, found and checked before anything is written; and told.

The network's field is measured here, on a GPU where this process is the one that computes. A dry run
takes the field that an earlier run of the same output measured on the same network, if there is one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raypipe.errors import ConfigError, InputError, MissingInput
from raypipe.runner import LocalRunner, Prospect, Runner
from raypipe.segment.channels import axes_taken, open_tiles, said_otherwise, ways
from raypipe.segment.saved import SavedModel, load_fitted
from raypipe.store.space import may_write
from raypipe.tile import Source, TileConfig
from raypipe.tile.engine import run_of
from raypipe.tile.forecast import budget_of, forecast, is_known
from raypipe.tile.look import Left, disk_words, known_field, look, said_finished
from raypipe.tile.output import kind_of
from raypipe.tile.plan import TilePlan, make_plan
from raypipe.tile.source import describe
from raypipe.tile.worker import After
from raypipe.units import format_seconds

if TYPE_CHECKING:
    from raypipe.segment.predict import SegmentPredictConfig, What

AfterOf = Callable[["What", SavedModel], After | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Ready:
    """Input, network and tiles. weight_files : the checkpoint's, as `Fitted.files`; field_words : where the
    field is from; axes_note : where the file says other axes than are taken, else "".
    """

    saved: SavedModel
    weight_files: Mapping[str, Any]
    plan: TilePlan
    field_words: str
    axes_note: str


def seats(runner: Runner | Prospect, cfg: TileConfig) -> tuple[str, int]:
    """(device, workers) that a run would take. Raises DeviceUnavailable, ConfigError."""
    if not isinstance(runner, Prospect):
        device = runner.resolve_device(cfg.device)
        return device, runner.needs(cfg.workers, device).workers
    device = LocalRunner(runner.memory).resolve_device(cfg.device)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    return device, cfg.workers or gpus or 1


def make_ready(
    cfg: SegmentPredictConfig, runner: Runner | Prospect, device: str, after_of: AfterOf
) -> Ready:
    """Load, check and measure. Raises MissingInput, InputError, StoreCorrupt."""
    fitted = load_fitted(cfg.run_dir, cfg.checkpoint)
    module, saved = fitted.module, fitted.saved
    after = after_of(cfg.what, saved)
    source = _source(cfg, saved)
    axes_note = said_otherwise(source, _why(cfg, source))
    if axes_note and not cfg.dry_run:
        print(f"{cfg.input}: {axes_note}", file=sys.stderr, flush=True)
    out = cfg.output.absolute()
    # On Ray each GPU is a worker's: what this process put there would stay beside it to the end.
    module = module.to(device) if isinstance(runner, LocalRunner) else module
    known = known_field(out, module, cfg.tile, 2) if cfg.dry_run else None
    began = time.monotonic()
    plan = make_plan(
        source,
        module,
        out,
        cfg.tile,
        keep_frames=source.frames > 1,
        prepare=saved.prepare,
        after=after,
        known=known,
    )
    words = _field_words(plan, module, time.monotonic() - began, earlier=known is not None)
    return Ready(
        saved=saved, weight_files=fitted.files, plan=plan, field_words=words, axes_note=axes_note
    )


def writes_nothing(cfg: SegmentPredictConfig) -> bool:
    """Whether a complete result is there, so that the run will find it, or refuse it as another's: it may
    lie in a folder that nobody writes any more.
    """
    return not cfg.tile.overwrite and said_finished(cfg.output.absolute())


def check_output(cfg: SegmentPredictConfig) -> None:
    """Raises ConfigError, InputError, MissingInput: a folder that was made here may be a disk that is not
    mounted.
    """
    out = cfg.output.absolute()
    kind_of(out)
    if not out.parent.is_dir():
        raise MissingInput(
            f"output {out}: folder {out.parent} does not exist; make it, or mend the path"
        )
    if not (writes_nothing(cfg) or may_write(out.parent)):
        raise InputError(
            f"output {out}: folder {out.parent} cannot be written; choose another, or change its rights"
        )


def _source(cfg: SegmentPredictConfig, saved: SavedModel) -> Source:
    source = open_tiles(cfg.input.absolute(), cfg.axes, saved.spec.in_channels)
    if len(source.space) != 2:
        raise ConfigError(
            f"axes {cfg.axes!r}: the network works on planes, and Z makes volumes; name it F, and each "
            "plane is an image"
        )
    wanted = saved.spec.in_channels
    if source.channels != wanted:
        other = " or ".join(ways(source, wanted))
        remedy = f"--axes {other} where they are so, or an image of {wanted}"
        raise InputError(
            f"input {cfg.input} has {source.channels} channel(s), the model of {cfg.run_dir} takes "
            f"{wanted}; its axes were taken to be {axes_taken(source)}: give "
            + (remedy if other else "such an image, or --axes where they are others")
        )
    return source


def _why(cfg: SegmentPredictConfig, source: Source) -> str:
    return "as asked" if cfg.axes else f"as the model takes {source.channels} channel(s)"


def _field_words(plan: TilePlan, module: nn.Module, seconds: float, *, earlier: bool) -> str:
    radius, align = (" x ".join(map(str, row)) for row in (plan.field.radius, plan.field.align))
    where = next(module.parameters()).device.type
    how = {
        "measured": f"measured in {format_seconds(seconds)} on {where}",
        "stated": "stated",
        "blended": f"the overlap of windows that are blended ({plan.cfg.blend}): not exact",
    }[plan.how]
    how = "measured by the earlier run of this output" if earlier else how
    return f"radius {radius}, align {align} pixels, {how}"


def dry_run_lines(
    cfg: SegmentPredictConfig, ready: Ready, runner: Runner | Prospect, device: str, workers: int
) -> list[str]:
    """What ``--dry-run`` prints. Raises StoreError, FingerprintMismatch where the run would."""
    plan, saved = ready.plan, ready.saved
    run = run_of(plan)
    left = look(run, overwrite=cfg.tile.overwrite)
    threshold = "" if saved.threshold is None else f", threshold {saved.threshold:.3g}"
    epoch = "" if saved.epoch is None else f", epoch {saved.epoch + 1}"
    counts = " x ".join(map(str, plan.grid.counts))
    tile = " x ".join(str(axis.tile) for axis in plan.grid.axes)
    halo = " x ".join(str(axis.halo) for axis in plan.grid.axes)
    window = " x ".join(map(str, plan.grid.window))
    memory = forecast(plan, device, apart=not isinstance(runner, LocalRunner)).words(
        budget_of(runner, workers)
    )
    if not is_known(runner):
        memory += "; that is of a node like this one, each node has its own"
    return [
        f"input    {cfg.input}: {describe(plan.source)}; axes taken to be {axes_taken(plan.source)}"
        + (f"; {ready.axes_note}" if ready.axes_note else ""),
        f"model    {cfg.run_dir} {cfg.checkpoint}{epoch}: {saved.spec.name}{threshold}",
        f"network  {ready.field_words}",
        f"output   {cfg.output}: {cfg.what}, {plan.spec.dtype} {plan.spec.shape}",
        f"tiles    {plan.tiles} of {tile} pixels, {counts} an image; halo {halo}, read as {window}, "
        f"{plan.cfg.batch} at once",
        f"kept     {_kept_words(left, plan.tiles)}",
        f"workers  {workers} on {device}, {runner.name}",
        f"memory   {memory}",
        f"disk     {disk_words(run, left)}",
        f"record   {cfg.record_dir}",
        "dry run: nothing was computed or written",
    ]


def _kept_words(left: Left, tiles: int) -> str:
    if left.finished:
        return f"all {tiles} tiles: finished already, the same command would compute nothing"
    if not left.recorded:
        text = "none"
    else:
        text = f"{left.recorded} of {tiles} tiles of an earlier run, checked when it goes on"
    return f"{text}; being written now by {left.owner}" if left.owner else text
