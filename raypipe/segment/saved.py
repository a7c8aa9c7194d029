"""A fitted network on disk, and back: everything that applying it takes.

    RUN/model.json     spec, normalisation, target, classes, seed: written before training begins
    RUN/best, RUN/last checkpoints by ``raypipe.train.checkpoint``; the threshold tuned on the validation
                       pictures of that very epoch lies in meta.json, beside the weights it was tuned on

`load_model` is what ``evaluate``, ``predict`` and a notebook begin with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from raypipe.errors import InputError, StoreCorrupt
from raypipe.report.saved import read_json, write_json
from raypipe.segment.labels import Target, class_names
from raypipe.segment.model import ModelSpec, build_model, record, spec_from
from raypipe.segment.normalise import Normalisation
from raypipe.train.checkpoint import Found, find_checkpoint

MODEL_FILE = "model.json"
_REMEDY = "give a folder made by raypipe segment fit"


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What a fitted network is, beside its weights.

    classes : of masks, with target "classes"; outputs are ``spec.classes``. threshold : foreground is
    what is at least as probable, for one output; None for several, where the likeliest class wins, and
    where none was tuned on these very weights: before the first epoch, in the middle of one, and for the
    last weights of a run whose averaged ones were judged. epoch : of the weights, from 0.
    """

    spec: ModelSpec
    normalisation: Normalisation
    target: Target
    classes: int
    ignore: int | None
    seed: int
    threshold: float | None = None
    epoch: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the foreground classes."""
        return class_names(self.target, self.classes)

    @property
    def multiple(self) -> int:
        """What the sides of an input must be a multiple of; 32 for networks of the library."""
        return int(getattr(self.spec, "multiple", 32))

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """(channels, h, w) or (h, w) of any number type -> (channels, h, w) float32 for the network."""
        return self.normalisation.apply(pixels[None] if pixels.ndim == 2 else pixels)


def save_model(run_dir: Path, saved: SavedModel) -> Path:
    """Write RUN/model.json; threshold and epoch are the checkpoints' own."""
    fields = {
        "format": "raypipe-segment-model",
        "version": 1,
        "model": record(saved.spec),
        "normalisation": asdict(saved.normalisation),
        "target": saved.target,
        "classes": saved.classes,
        "class_names": list(saved.names),
        "ignore": saved.ignore,
        "seed": saved.seed,
    }
    return write_json(run_dir / MODEL_FILE, fields)


@dataclass(frozen=True, eq=False, kw_only=True)
class Fitted:
    """A network with the weights of one checkpoint, in eval mode on the CPU. files : size and digest of
    each of the checkpoint's files, by name. (Not in ``saved``: a prediction's identity is made of that.)
    """

    module: nn.Module
    saved: SavedModel
    files: Mapping[str, Any]


def load_model(run_dir: Path | str, checkpoint: str = "best") -> tuple[nn.Module, SavedModel]:
    """The network with its weights, in eval mode on the CPU, and what it is. As `load_fitted`."""
    fitted = load_fitted(run_dir, checkpoint)
    return fitted.module, fitted.saved


def load_fitted(run_dir: Path | str, checkpoint: str = "best") -> Fitted:
    """What a run's checkpoint, "best" or "last", holds.

    Raises MissingInput (no such run, no checkpoint yet), StoreCorrupt, InputError (weights of another
    model).
    """
    run_dir = Path(run_dir)
    saved = read_saved(run_dir)
    found = find_checkpoint(run_dir / checkpoint)
    module = build_model(saved.spec, saved.seed)
    try:
        module.load_state_dict(found.load("model"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"weights in {run_dir / checkpoint} do not fit {MODEL_FILE} ({reason}); {_REMEDY}"
        ) from error
    saved = _of_epoch(saved, found, checkpoint)
    return Fitted(module=module.eval(), saved=saved, files=found.meta["files"])


def read_saved(run_dir: Path) -> SavedModel:
    """RUN/model.json, without an epoch's threshold. Raises MissingInput, StoreCorrupt, ConfigError."""
    fields = read_json(run_dir / MODEL_FILE, _REMEDY)
    try:
        return SavedModel(
            spec=spec_from(fields["model"]),
            normalisation=Normalisation.from_dict(fields["normalisation"]),
            target=fields["target"],
            classes=fields["classes"],
            ignore=fields["ignore"],
            seed=fields["seed"],
        )
    except (KeyError, TypeError) as error:
        raise StoreCorrupt(f"{run_dir / MODEL_FILE} lacks {error}; {_REMEDY}") from error


def _of_epoch(saved: SavedModel, found: Found, checkpoint: str) -> SavedModel:
    history = found.meta.get("progress", {}).get("history", [])
    # Earlier versions did not say it; their best weights were judged.
    judged = found.meta.get("judged", checkpoint == "best")
    threshold = history[-1].get("val_threshold") if history and judged else None
    return replace(saved, epoch=found.epoch, threshold=threshold)
