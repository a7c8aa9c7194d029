"""What the page of a segmentation run shows, from its saved files alone: result, training, memory, how.

Blocks and their look are ``raypipe.report``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.report.blocks import Block, Card, Cards, Facts, Note, Page, Picture, Section, Table
from raypipe.report.html import PAGE_FILE, render
from raypipe.report.memory import memory_card, memory_section
from raypipe.report.saved import read_json, read_metrics, read_run, write_bytes
from raypipe.report.sections import how_it_was_made, learning
from raypipe.units import format_seconds

Run = Mapping[str, Any]
_TITLES = {"test": "Held-out pictures", "val": "Validation pictures"}


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html; its path. Raises MissingInput, StoreCorrupt."""
    return write_bytes(run_dir / PAGE_FILE, render(segment_page(run_dir)).encode())


def segment_page(run_dir: Path) -> Page:
    """The page of a run folder."""
    run = read_run(run_dir)
    found = {split: _summary(run_dir, split) for split in _TITLES}
    scored = {split: one for split, one in found.items() if one is not None}
    sections = [
        Section("Result", [*_cards(run_dir, run, scored), *map(Note, run.get("notes", ()))])
    ]
    sections += [_scores(run_dir, split, summary) for split, summary in scored.items()]
    sections += [
        s for s in (_training(run_dir, run), memory_section(run_dir, run)) if s is not None
    ]
    sections.append(how_it_was_made(run, list(_setup(run_dir, run))))
    started = str(run.get("started", ""))[:16].replace("T", " ")
    footer = f"raypipe {run.get('raypipe', '')} · {run_dir.resolve()}"
    return Page(
        "Segmentation", " · ".join(filter(None, [run.get("counts"), started])), sections, footer
    )


def _summary(run_dir: Path, split: str) -> dict[str, Any] | None:
    path = run_dir / "evaluation" / split / "summary.json"
    return read_json(path, "evaluate again") if path.is_file() else None


def _cards(run_dir: Path, run: Run, scored: Mapping[str, Run]) -> list[Block]:
    found = []
    for split, summary in scored.items():
        pixels, objects = summary["pixels"], summary["objects"]
        detail = f"{_number(pixels['image_dice'])} averaged over {summary['n_pictures']} pictures"
        found.append(Card(f"Dice, {split}", _number(pixels["dice"]), detail))
        if objects:
            told = f"at IoU 0.5; {objects['n_true']:.0f} true, {objects['n_predicted']:.0f} found"
            found.append(Card(f"AP of objects, {split}", _number(objects["ap_50"]), told))
    result = run.get("result") or {}
    if result.get("best_val_dice") is not None:
        detail = f"epoch {result['best_epoch'] + 1} of {result['epochs']}"
        if result.get("best_val_threshold") is not None:
            detail += f", threshold {result['best_val_threshold']:.3f}"
        found.append(Card("Dice, choosing the epoch", _number(result["best_val_dice"]), detail))
    if not found:
        found.append(Card("This run", "training", "no epoch finished yet"))
    memory = memory_card(run_dir)
    return [Cards([*found, memory] if memory else found)]


def _scores(run_dir: Path, split: str, summary: Run) -> Section:
    """Examples, each picture's scores, objects over IoU."""
    from raypipe.report.plots import data_uri
    from raypipe.segment import figures

    names = [one["name"] for one in summary["pictures"]]
    blocks: list[Block] = []
    path = run_dir / "evaluation" / split / "examples.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as saved:
            examples = {key: saved[key] for key in saved.files}
        if examples:
            caption = "Outlines of the true and of the found objects, over the picture."
            uri = data_uri(figures.example_pictures(examples, names), dpi=110)
            blocks.append(Picture(uri, "Pictures with true and found outlines", caption))
    ap = {int(k[3:]) / 100: v for k, v in summary["objects"].items() if k.startswith("ap_")}
    if ap:
        uri = data_uri(figures.precision_over_iou(ap))
        caption = "Average precision TP / (TP + FP + FN) of objects, matched one to one."
        blocks.append(Picture(uri, "Average precision over the IoU of a match", caption))
    rows = [
        [
            one["name"],
            _number(one["dice"]),
            _number(one["ap50"]),
            str(one["true"]),
            str(one["found"]),
        ]
        for one in summary["pictures"]
    ]
    header = ["picture", "Dice", "AP at IoU 0.5", "true objects", "found"]
    blocks.append(Table(header, rows, "Each picture", folded=len(rows) > 12))
    pairs = [(name.replace("_", " "), _number(value)) for name, value in summary["pixels"].items()]
    blocks.append(Facts(pairs))
    return Section(_TITLES[split], blocks)


def _training(run_dir: Path, run: Run) -> Section | None:
    from raypipe.report.plots import data_uri
    from raypipe.segment import figures

    curves = learning(read_metrics(run_dir))
    if curves is None or "val_loss" not in curves.val:
        return None
    caption = "The weights of the best epoch are kept: highest validation Dice, dashed line."
    picture = Picture(
        data_uri(figures.training_curves(curves)),
        "Training and validation loss, and validation Dice, over optimiser steps",
        caption,
    )
    result = run.get("result") or {}
    pairs = [("optimiser steps", f"{len(curves.step):,}"), ("epochs", str(len(curves.epoch_end)))]
    if result.get("seconds") is not None:
        pairs.append(("training time", format_seconds(result["seconds"])))
    return Section("Training", [picture, Facts(pairs)])


def _setup(run_dir: Path, run: Run) -> Iterator[tuple[str, str]]:
    config = run.get("config") or {}
    inputs, train = config.get("inputs") or {}, config.get("train") or {}
    network = config.get("network") or {}
    yield "data", str((run.get("inputs") or {}).get("data", "?"))
    yield (
        "pictures",
        f"{run.get('counts', '?')}; {run.get('n_train', '?')} crops an epoch of {inputs.get('crop')} pixels",
    )
    yield "target", str(inputs.get("target"))
    sizes = f", width {network.get('width')}, depth {network.get('depth')}, {network.get('up')} up"
    yield "network", str(network.get("model")) + (sizes if network.get("model") == "unet" else "")
    yield "parameters", f"{run.get('n_parameters', 0):,}"
    yield (
        "optimiser",
        f"AdamW, learning rate {train.get('lr')}, {train.get('schedule')} schedule, weight decay"
        f" {train.get('weight_decay')}, batch {train.get('batch_size')} × {train.get('accumulate')}, AMP"
        f" {train.get('amp')}, seed {train.get('seed')}",
    )
    how = ((run.get("identity") or {}).get("normalisation")) or {}
    if how:
        ends = ", ".join(
            f"{lo:g} to {hi:g}" for lo, hi in zip(how["low"], how["high"], strict=True)
        )
        yield "normalisation", f"{how['kind']}: {ends} become 0 to 1"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "–" if value is None else str(value)
