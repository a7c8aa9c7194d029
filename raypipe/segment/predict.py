"""``raypipe segment predict``: a fitted network on an image, or stack, of any size, tile by tile.

The result equals that of the whole image (``raypipe.tile`` says how, docs/tiles.md what it takes), is
written as it comes, and the same command goes on after a crash. Normalisation and threshold are the
run's own. What it will take is told by ``predict_plan``, what made it is kept by ``predict_record``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from raypipe.errors import ConfigError, InputError
from raypipe.runner import LocalRunner, Prospect, Runner
from raypipe.segment import predict_record
from raypipe.segment.metrics import predict_labels
from raypipe.segment.predict_plan import check_output, dry_run_lines, make_ready, seats
from raypipe.segment.saved import SavedModel
from raypipe.tile import Inferred, TileConfig
from raypipe.tile.engine import carry_out
from raypipe.tile.forecast import budget_of, is_known, require_memory
from raypipe.tile.worker import After
from raypipe.units import format_seconds

What = Literal["labels", "probabilities", "logits"]


@dataclass(frozen=True, kw_only=True)
class SegmentPredictConfig:
    """Apply a fitted network to an image or stack of any size."""

    plans_memory: ClassVar[bool] = True  # a dry run says what fits, so it is told the budgets

    run_dir: Path
    """A folder made by segment fit."""
    input: Path
    """TIFF (a page an image), PNG, .npy or .zarr."""
    output: Path
    """.tif, .ome.tif, .npy or .zarr, written tile by tile, in a folder that is there."""
    what: What = "labels"
    """labels (uint8, above 256 classes uint16; by the tuned threshold or the likeliest class),
    probabilities, or logits."""
    axes: str | None = None
    """A letter a dimension, of F (frames) C Y X, e.g. YXC; YX and FYX are known, and of TIFF files what they
    say (OME, ImageJ) is followed, as segment fit does; other pages are images."""
    checkpoint: Literal["best", "last"] = "best"
    """best has the highest validation Dice; last is where training ended."""
    tile: TileConfig = field(default_factory=TileConfig)
    """How it is cut and who computes it."""
    report_dir: Path | None = None
    """Folder for run.json, which says what made the result, and the memory of each process; by default
    OUTPUT.predict."""
    dry_run: bool = False
    """Print what would be read and written, tiles, memory and disk, and stop; nothing is written."""

    @property
    def record_dir(self) -> Path:
        """``report_dir``, or OUTPUT.predict beside the result; absolute."""
        beside = self.output.with_name(f"{self.output.name}.predict")
        return (self.report_dir or beside).absolute()


@dataclass(frozen=True)
class Labels:
    """Logits (n, outputs, h, w) -> labels (n, 1, h, w) uint8."""

    threshold: float

    def __call__(self, logits: Tensor) -> Tensor:
        return predict_labels(logits, self.threshold)[:, None].to(torch.uint8)


@dataclass(frozen=True)
class WideLabels:
    """As `Labels`, uint16: for more than 256 classes."""

    threshold: float

    def __call__(self, logits: Tensor) -> Tensor:
        return predict_labels(logits, self.threshold)[:, None].to(torch.uint16)


@dataclass(frozen=True)
class Probabilities:
    """Logits -> probabilities of the same shape: of one output by itself, of several among them."""

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.softmax(1) if logits.shape[1] > 1 else logits.sigmoid()


def predict(cfg: SegmentPredictConfig, runner: Runner | Prospect | None) -> Inferred | None:
    """Write ``cfg.what`` of every frame of ``cfg.input``; None after a dry run, for which a prospect is
    enough.

    Raises MissingInput, InputError (channels of another model; a network that tiles cannot give
    exactly, unless --blend), MemoryBudgetExceeded (a tile that no worker can hold, found before the first
    one), and what ``raypipe.tile.infer`` raises.
    """
    if runner is None:
        raise ConfigError("predict needs a runner; open one with raypipe.launch.open_runner")
    check_output(cfg)
    predict_record.check_folder(cfg)
    device, workers = seats(runner, cfg.tile)
    ready = make_ready(cfg, runner, device, after_of)
    if cfg.dry_run or isinstance(runner, Prospect):
        print("\n".join(dry_run_lines(cfg, ready, runner, device, workers)))
        return None
    if is_known(runner):
        apart = not isinstance(runner, LocalRunner)
        require_memory(ready.plan, device, budget_of(runner, workers), apart=apart)
    needs = replace(runner.needs(cfg.tile.workers, device), run_dir=cfg.record_dir)
    fields = predict_record.fields_of(cfg, ready, runner, needs)
    found = carry_out(
        ready.plan, runner, needs, begun=partial(predict_record.begin, cfg.record_dir, fields)
    )
    predict_record.finish(cfg.record_dir, found, ready.plan.identity)
    new = found.tiles - found.kept
    came = f"{new} tiles in {format_seconds(found.seconds)}" if new else "complete already"
    print(f"{cfg.output}: {found.dtype} {found.shape}, {came}")
    if new:
        print(f"record: {cfg.record_dir}")
    return found


def after_of(what: What, saved: SavedModel) -> After | None:
    """What becomes of logits. Raises InputError when no threshold was tuned for them."""
    if what == "logits":
        return None
    if what == "probabilities":
        return Probabilities()
    if saved.spec.classes == 1 and saved.threshold is None:
        raise InputError(
            "these weights have no tuned threshold: before the first epoch is over there is none, and "
            "last has one at an epoch's end only, without --ema-decay; take --checkpoint best, or "
            "--what probabilities"
        )
    kind = Labels if saved.spec.classes <= 256 else WideLabels
    return kind(0.5 if saved.threshold is None else saved.threshold)
