"""A fitted encoder, opened again beside the data that it is applied to.

Everything comes from the run folder: run.json says which data, features and model; split.json which
rows; the checkpoint the weights. What does not fit together any more is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from raypipe.backbone.options import FeatureOptions
from raypipe.encoding import data
from raypipe.encoding.config import ApplyConfig, ModelConfig
from raypipe.encoding.model import build_encoder
from raypipe.encoding.readout import HEMIS, build_readout
from raypipe.encoding.split import load_split, same_images
from raypipe.errors import InputError, MissingInput
from raypipe.read import ROI_FAMILIES
from raypipe.report.saved import read_run
from raypipe.runner import LocalRunner
from raypipe.train.checkpoint import Found, find_checkpoint


@dataclass(frozen=True, eq=False, kw_only=True)
class Applied:
    """One subject's encoder and the images it is applied to.

    all_rows : (n,) rows of the split in order; rows : those of them whose image could be read
    epoch    : of the weights, from 0, or None (`Found.epoch`)
    """

    opened: data.SplitData
    model: nn.Module
    rows: NDArray[np.int64]
    all_rows: NDArray[np.int64]
    n_vertices: Mapping[str, int]
    device: str
    checkpoint: str
    epoch: int | None

    def families(self) -> dict[str, dict[str, dict[str, NDArray[np.bool_]]]]:
        """family -> hemisphere -> ROI -> (V,) bool, streams last; absent families left out."""
        subject = self.opened.subject
        absent = subject.missing_families()
        wanted = [name for name in (*ROI_FAMILIES, "streams") if name not in absent]
        return {family: subject.rois(families=(family,)) for family in wanted}

    def note(self) -> dict[str, Any]:
        """What the summary says of the encoder."""
        features = self.opened.features
        return {
            "checkpoint": self.checkpoint,
            "epoch": self.epoch,
            "n_invalid": len(self.all_rows) - len(self.rows),
            "features": str(features.path),
            "features_fingerprint": features.fingerprint,
        }


def open_applied(cfg: ApplyConfig, run_dir: Path, *, fmri: bool) -> Applied:
    """Open one subject's run and the split that ``cfg`` names.

    Raises MissingInput, UnknownName, InputError (the data are not those of the fit, or features of
    another backbone), DeviceUnavailable, StoreCorrupt (damaged checkpoint).
    """
    record = read_run(run_dir)
    opened = _open_data(cfg, record, run_dir, fmri=fmri)
    if cfg.split == "val":
        all_rows = np.asarray(load_split(run_dir / "split.json").val)
        _check_rows(all_rows, opened, run_dir)
        _check_images(record, opened, run_dir)
    else:
        all_rows = np.arange(opened.n_rows, dtype=np.int64)
    rows = all_rows[opened.valid[all_rows]]
    if not len(rows):
        raise InputError(
            f"{opened.features.path} holds no valid {cfg.split} image to apply a model to"
        )
    found = find_checkpoint(run_dir / cfg.checkpoint)
    return Applied(
        opened=opened,
        model=_load_model(record, opened, found),
        rows=rows,
        all_rows=all_rows,
        n_vertices={hemi: int(record["responses"][hemi][1]) for hemi in HEMIS},
        device=LocalRunner().resolve_device(cfg.device),
        checkpoint=cfg.checkpoint,
        epoch=found.epoch,
    )


def _open_data(
    cfg: ApplyConfig, record: Mapping[str, Any], run_dir: Path, *, fmri: bool
) -> data.SplitData:
    inputs = record.get("inputs")
    if not isinstance(inputs, dict):
        raise MissingInput(f"{run_dir} was not made by encode fit; give the folder of such a run")
    opened = data.open_split(
        cfg.data_dir or Path(inputs["data_dir"]),
        _place(cfg, record, inputs),
        record["subject"],
        "test" if cfg.split == "test" else "train",
        fmri=fmri,
        kept_in=run_dir if cfg.split == "val" else None,
    )
    fitted, found = record["features"]["identity"], dict(opened.features.identity)
    if fitted != found:
        differing = sorted(k for k in {**fitted, **found} if fitted.get(k) != found.get(k))
        raise InputError(
            f"features of {opened.features.path} are of other {', '.join(differing)} than those of the"
            " fit; extract this split as the training split was"
        )
    return opened


def _place(
    cfg: ApplyConfig, record: Mapping[str, Any], inputs: Mapping[str, Any]
) -> data.StoresIn | FeatureOptions:
    """Stores, where there were some or ``cfg`` names some; otherwise the fit's own options."""
    folder = cfg.features_dir or inputs["features_dir"]
    if folder is not None:
        return data.StoresIn(Path(folder), inputs["feature"])
    saved = dict(record["config"]["images"])
    saved["layer"] = tuple(saved["layer"])
    options = FeatureOptions(**saved)
    return replace(options, weights=cfg.weights) if cfg.weights else options


def _check_rows(rows: NDArray[np.int64], opened: data.SplitData, run_dir: Path) -> None:
    if len(rows) and rows.max() >= opened.n_rows:
        raise InputError(
            f"{run_dir}/split.json names row {rows.max()}, {opened.features.path} holds"
            f" {opened.n_rows}; these are not the features of the fit"
        )


def _check_images(record: Mapping[str, Any], opened: data.SplitData, run_dir: Path) -> None:
    """Row numbers mean the images of the fit: others may have been trained on."""
    fitted = record["identity"].get("images")
    found = opened.features.fingerprints().get("images")
    other = fitted is not None and found is not None and fitted != found
    if other or not same_images(run_dir / "split.json", opened.features.names):
        raise InputError(
            f"{opened.features.path} holds other images than the fit in {run_dir} was made of (some "
            "were added, removed, renamed or changed); put them back to apply it to its validation "
            "split, or fit again"
        )


def _load_model(record: Mapping[str, Any], opened: data.SplitData, found: Found) -> nn.Module:
    """The encoder with its trained weights and its channel statistics, on the CPU."""
    cfg = ModelConfig(**record["config"]["encoder"])
    n_vertices = {hemi: int(record["responses"][hemi][1]) for hemi in HEMIS}
    readout = build_readout(cfg.readout, opened.subject.rois(), n_vertices)
    fitted = record["identity"]
    if (list(readout.queries), readout.digest) != (fitted["queries"], fitted.get("ROI masks")):
        raise InputError(
            f"{opened.subject.root} has other ROI masks than the fit in {found.path.parent}; give the"
            " data of the fit with --data-dir"
        )
    model = build_encoder(cfg, opened.shape, readout)
    try:
        model.load_state_dict(found.load("model"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"weights in {found.path} do not fit these data ({reason}); give the data of the fit"
        ) from error
    return model
