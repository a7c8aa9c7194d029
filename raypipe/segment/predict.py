"""``raypipe segment predict``: a fitted network on an image, or stack, of any size, tile by tile.

The result equals that of the whole image (``raypipe.tile`` says how, docs/tiles.md what it takes), is
written as it comes, and the same command goes on after a crash. Normalisation and threshold are the
run's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from raypipe.errors import ConfigError, InputError
from raypipe.runner import Runner
from raypipe.segment.metrics import predict_labels
from raypipe.segment.saved import SavedModel, load_model
from raypipe.tile import Inferred, TileConfig, infer, open_source
from raypipe.tile.worker import After
from raypipe.units import format_seconds

What = Literal["labels", "probabilities", "logits"]


@dataclass(frozen=True, kw_only=True)
class SegmentPredictConfig:
    """Apply a fitted network to an image or stack of any size."""

    run_dir: Path
    """A folder made by segment fit."""
    input: Path
    """TIFF (a page an image), PNG, .npy or .zarr."""
    output: Path
    """.tif, .ome.tif, .npy or .zarr, written tile by tile."""
    what: What = "labels"
    """labels (uint8, by the tuned threshold or the likeliest class), probabilities, or logits."""
    axes: str | None = None
    """A letter a dimension, of F (frames) C Y X, e.g. YXC; YX and FYX, and a TIFF's pages, are known."""
    checkpoint: Literal["best", "last"] = "best"
    """best has the highest validation Dice; last is where training ended."""
    tile: TileConfig = field(default_factory=TileConfig)
    """How it is cut and who computes it."""


@dataclass(frozen=True)
class Labels:
    """Logits (n, outputs, h, w) -> labels (n, 1, h, w) uint8."""

    threshold: float

    def __call__(self, logits: Tensor) -> Tensor:
        return predict_labels(logits, self.threshold)[:, None].to(torch.uint8)


@dataclass(frozen=True)
class Probabilities:
    """Logits -> probabilities of the same shape: of one output by itself, of several among them."""

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.softmax(1) if logits.shape[1] > 1 else logits.sigmoid()


def predict(cfg: SegmentPredictConfig, runner: Runner | None) -> Inferred:
    """Write ``cfg.what`` of every frame of ``cfg.input``.

    Raises MissingInput, InputError (channels of another model; a network that tiles cannot give
    exactly, unless --blend), and what ``raypipe.tile.infer`` raises.
    """
    if runner is None:
        raise ConfigError("predict needs a runner; open one with raypipe.launch.open_runner")
    module, saved = load_model(cfg.run_dir, cfg.checkpoint)
    source = open_source(cfg.input.absolute(), 2, cfg.axes)
    wanted = saved.spec.in_channels
    if source.channels != wanted:
        raise InputError(
            f"input {cfg.input} has {source.channels} channel(s), the model of {cfg.run_dir} takes "
            f"{wanted}; give --axes where the channels are elsewhere, or such an image"
        )
    found = infer(
        source,
        module,
        cfg.output.absolute(),
        cfg.tile,
        runner,
        keep_frames=source.frames > 1,
        prepare=saved.prepare,
        after=after_of(cfg.what, saved),
    )
    new = found.tiles - found.kept
    print(
        f"{cfg.output}: {found.dtype} {found.shape}, {new} tiles in {format_seconds(found.seconds)}"
    )
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
    return Labels(0.5 if saved.threshold is None else saved.threshold)
