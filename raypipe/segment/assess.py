"""``raypipe segment evaluate``: whole pictures that were not trained on, scored by pixel and by object.

Everything comes from the run folder that ``run`` made: run.json says which pictures, model.json and the
checkpoint which network. Runs in this process, without Ray. Written to RUN/evaluation/SPLIT:

    summary.json     scores over all pixels, averages over pictures, average precision at each IoU
    pictures.csv     one line a picture
    examples.npz     pixels, truth and found objects of a few pictures, for the report
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raypipe.errors import InputError, MissingInput
from raypipe.memory.attend import attend
from raypipe.memory.config import resolve
from raypipe.report.saved import read_json, read_run, write_bytes, write_json
from raypipe.runner import LocalRunner
from raypipe.segment.apply import field_for, found_objects, logits_of, true_objects
from raypipe.segment.config import SegmentEvaluateConfig
from raypipe.segment.crops import Labelling
from raypipe.segment.inputs import from_dict, kept_digest
from raypipe.segment.instances import (
    THRESHOLDS,
    Matches,
    average_precision_of,
    instance_metrics,
    match,
)
from raypipe.segment.labels import IGNORE
from raypipe.segment.metrics import MEASURES, PixelScores, image_scores
from raypipe.segment.page import write_report
from raypipe.segment.pictures import Picture
from raypipe.segment.prepare import digest_of, used
from raypipe.segment.readers import Readers
from raypipe.segment.run import PICTURES_FILE
from raypipe.segment.saved import SavedModel, load_model
from raypipe.tile import Field

MOST_EXAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One picture's scores, NaN where not defined; matches: of its objects, None for classes.

    shown : for examples: "image" (h, w), "true" and "found" (h, w) whole numbers
    """

    picture: Picture
    scores: dict[str, float]
    matches: Matches | None
    shown: dict[str, np.ndarray]

    def row(self) -> dict[str, Any]:
        """For summary.json and the table."""
        ap = None if self.matches is None else average_precision_of(self.matches)[THRESHOLDS[0]]
        return {
            "name": self.picture.name,
            **{name: _plain(value) for name, value in self.scores.items()},
            "ap50": _plain(ap),
            "true": None if self.matches is None else self.matches.n_true,
            "found": None if self.matches is None else self.matches.n_predicted,
        }


def evaluate(cfg: SegmentEvaluateConfig) -> dict[str, Any]:
    """Score the pictures of ``cfg.split`` and write the report; returns the summary.

    Raises MissingInput (no run, checkpoint or picture), InputError (files changed since the fit),
    MemoryBudgetExceeded.
    """
    run_dir = cfg.run_dir.resolve()
    record = read_run(run_dir)
    with attend(resolve(cfg.memory), run_dir, "evaluate"):
        split, pictures = _pictures(cfg, run_dir, record)
        module, saved = load_model(run_dir, cfg.checkpoint)
        device = LocalRunner().resolve_device(cfg.device)
        summary = _evaluate(cfg, module.to(device), saved, pictures, run_dir / "evaluation" / split)
    summary |= {"split": split, "checkpoint": cfg.checkpoint, "epoch": saved.epoch}
    write_json(run_dir / "evaluation" / split / "summary.json", summary)
    print(score_line(summary))
    print(f"report: {write_report(run_dir)}")
    return summary


def _pictures(
    cfg: SegmentEvaluateConfig, run_dir: Path, record: dict[str, Any]
) -> tuple[str, list[Picture]]:
    """The split to score and its pictures, where they lie now."""
    remedy = "give a folder made by raypipe segment fit"
    saved = read_json(run_dir / PICTURES_FILE, remedy)["pictures"]
    base = Path(record["inputs"]["folder"])
    new = cfg.data.resolve() if cfg.data else base
    new = new.parent if new.is_file() else new
    pictures = [_moved(from_dict(one), base, new) for one in saved]
    splits = {p.split for p in pictures}
    split = cfg.split if cfg.split != "auto" else ("test" if "test" in splits else "val")
    chosen = [p for p in pictures if p.split == split]
    if not chosen:
        raise MissingInput(
            f"{run_dir} has no pictures in split {split!r}; give --split {' or '.join(sorted(splits))}"
        )
    for p in chosen:
        for path in (p.image, p.mask):
            if not path.is_file():
                raise MissingInput(f"{path} is not there; say where the data lie now with --data")
    if split == "val" and _digest(run_dir, pictures) != record["identity"]["images and masks"]:
        raise InputError(
            f"files under {new} were changed since the fit in {run_dir}; put them back to score its"
            " validation pictures, or fit again"
        )
    return split, chosen


def _digest(run_dir: Path, pictures: Sequence[Picture]) -> str:
    """Of what was fitted, as it is now: of files that did not change it is kept."""
    fitted = used(pictures)
    return kept_digest(run_dir, fitted) or digest_of(fitted)


def _moved(picture: Picture, old: Path, new: Path) -> Picture:
    """``picture`` with its files below ``new`` that were below ``old``."""
    image, mask = (
        new / path.relative_to(old) if path.is_relative_to(old) else path
        for path in (picture.image, picture.mask)
    )
    return replace(picture, image=image, mask=mask)


def _evaluate(
    cfg: SegmentEvaluateConfig,
    module: nn.Module,
    saved: SavedModel,
    pictures: Sequence[Picture],
    out: Path,
) -> dict[str, Any]:
    """Score one picture after the other, write the table and the examples; the summary."""
    readers = Readers()
    threshold = 0.5 if saved.threshold is None else saved.threshold
    field = field_for(module, saved, [picture.shape for picture in pictures])
    pixels = PixelScores(saved.spec.classes, ignore_label=IGNORE, threshold=threshold)
    scored: list[Scored] = []
    examples: dict[str, Any] = {}
    for number, picture in enumerate(pictures):
        one = _score(cfg, module, saved, field, picture, readers, pixels, threshold)
        if number < MOST_EXAMPLES:
            examples |= {f"{name}_{number}": array for name, array in one.shown.items()}
        scored.append(replace(one, shown={}))
    _write_table(out / "pictures.csv", scored)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **examples)
    write_bytes(out / "examples.npz", buffer.getvalue())
    names = ("background", *saved.names) if saved.spec.classes > 1 else ()
    matches = [one.matches for one in scored if one.matches is not None]
    objects = instance_metrics(matches) if matches else {}
    return {
        "n_pictures": len(scored),
        "threshold": threshold if saved.spec.classes == 1 else None,
        "pixels": {name: _plain(value) for name, value in pixels.metrics(names).items()},
        "objects": {name: _plain(value) for name, value in objects.items()},
        "pictures": [one.row() for one in scored],
    }


def _score(
    cfg: SegmentEvaluateConfig,
    module: nn.Module,
    saved: SavedModel,
    field: Field | None,
    picture: Picture,
    readers: Readers,
    pixels: PixelScores,
    threshold: float,
) -> Scored:
    """One whole picture, also added to ``pixels``."""
    labelling = Labelling(target=saved.target, classes=saved.classes, ignore=saved.ignore)
    image = readers.image(picture, picture.rows, picture.cols)
    mask = readers.mask(picture, picture.rows, picture.cols)
    plane = labelling.plane(mask)
    logits, target = logits_of(module, saved, image, field), torch.from_numpy(plane)[None]
    pixels.add(logits, target)
    by_name = image_scores(logits, target, ignore_label=IGNORE, threshold=threshold)
    first = 0 if saved.spec.classes == 1 else 1
    scores = {name: _mean(by_name[name][0, first:]) for name in MEASURES}
    found = found_objects(logits, saved.target, threshold, cfg.objects)
    if found is None:
        shown = {"true": np.maximum(plane, 0), "found": logits.argmax(1)[0].numpy()}
        return Scored(
            picture=picture, scores=scores, matches=None, shown={"image": image[0], **shown}
        )
    found = found * (plane != IGNORE)
    true = true_objects(mask, saved.ignore)
    shown = {"image": image[0], "true": true, "found": found}
    return Scored(picture=picture, scores=scores, matches=match(true, found), shown=shown)


def _write_table(path: Path, scored: Sequence[Scored]) -> None:
    text = io.StringIO()
    table = csv.writer(text)
    columns = [*MEASURES, "ap50", "true", "found"]
    table.writerow(["image", "frame", "rows", "cols", *columns])
    for one in scored:
        p, row = one.picture, one.row()
        spans = [f"{lo}:{hi}" for lo, hi in (p.rows, p.cols)]
        table.writerow([p.image, p.frame, *spans, *(row[name] for name in columns)])
    write_bytes(path, text.getvalue().encode())


def score_line(summary: dict[str, Any]) -> str:
    """The result in one line."""
    pixels = summary["pixels"]
    text = (
        f"{summary['n_pictures']} {summary['split']} pictures: Dice {_number(pixels['dice'])} over all"
        f" pixels, {_number(pixels['image_dice'])} a picture"
    )
    if summary["objects"]:
        text += f"; AP of objects {_number(summary['objects']['ap_50'])} at IoU 0.5"
    return text


def _mean(values: torch.Tensor) -> float:
    defined = values[~values.isnan()]
    return float(defined.mean()) if defined.numel() else float("nan")


def _plain(value: float | None) -> float | None:
    """For JSON, which has no NaN."""
    return None if value is None or value != value else float(value)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
