"""What a page shows of a run, read from its saved files alone; no file, no block.

A subject's folder gives a section on how well it predicts (evaluation/, made in ``scores``), one on
training (metrics.jsonl), one on memory (memory/, made in ``memory``) and one on what it was made of
(run.json). Another kind of run adds its function to SECTIONS. How figures look is ``plots``', how a
page looks is the template's.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.report import plots
from raypipe.report.blocks import Card, Code, Facts, Note, Picture, Section, Table
from raypipe.report.memory import memory_section
from raypipe.report.saved import read_metrics
from raypipe.report.scores import score_cards, score_section
from raypipe.units import format_seconds

Floats = NDArray[np.float64]
Run = Mapping[str, Any]


def cards(run_dir: Path, run: Run) -> list[Card]:
    """The numbers to see first: of the test images, or of validation where that is all there is."""
    who = f"Subject {run['subject']}" if run.get("subject") else "This run"
    scores = score_cards(run_dir, who)
    if scores:
        return scores
    result = run.get("result") or {}
    if result.get("best_val_r") is None:
        return [Card(who, "training", "no epoch finished yet")]
    return [Card(f"{who}: r, validation", f"{result['best_val_r']:.3f}", "not evaluated yet")]


def notes(run: Run) -> list[Note]:
    """Sentences that must not be missed."""
    found = [Note(text) for text in run.get("notes", ())]
    identity = (run.get("features") or {}).get("identity") or {}
    weights = str(identity.get("weights", ""))
    if weights.startswith("random"):
        arch = identity.get("arch", "the backbone")
        found.append(
            Note(
                f"The features come from {arch} with random weights ({weights}): nothing was learnt"
                " from other images. They test the pipeline; they are not a model of the brain."
            )
        )
    return found


def training_section(run_dir: Path, run: Run) -> Section | None:
    """Learning curves and how training ended."""
    records = read_metrics(run_dir)
    curves = learning(records)
    if curves is None:
        return None
    result = run.get("result") or {}
    caption = "Loss is the mean over vertices, the two hemispheres added."
    if curves.best_epoch is not None:
        caption += " The weights of the best epoch are kept: lowest validation loss, dashed line."
    picture = Picture(
        plots.data_uri(plots.learning_curves(curves)),
        "Training and validation loss, and validation correlation, over optimiser steps",
        caption,
    )
    pairs = [("optimiser steps", f"{len(curves.step):,}"), ("epochs", str(len(curves.epoch_end)))]
    if result.get("seconds") is not None:
        pairs.append(("training time", format_seconds(result["seconds"])))
    if result.get("best_val_loss") is not None:
        best = f"{result['best_val_loss']:.4f} in epoch {result['best_epoch'] + 1}"
        pairs.append(("best validation loss", best))
    return Section("Training", [picture, Facts(pairs)])


def learning(records: Sequence[Run]) -> plots.Curves | None:
    """Curves of a run's records; None before the first step."""
    steps = [record for record in records if record.get("kind") == "step"]
    epochs = [record for record in records if record.get("kind") == "epoch"]
    if not steps:
        return None
    names = [name for name in (epochs[0] if epochs else {}) if name.startswith("val_")]
    best = [i for i, record in enumerate(epochs) if record.get("best")]
    return plots.Curves(
        step=_column(steps, "global_step") + 1,
        step_loss=_column(steps, "loss"),
        lr=_column(steps, "lr"),
        epoch_end=_column(epochs, "global_step"),
        val={name: _column(epochs, name) for name in names},
        best_epoch=best[-1] if best else None,
    )


def _column(records: Sequence[Run], name: str) -> Floats:
    values = [record.get(name) for record in records]
    return np.array([np.nan if value is None else value for value in values], np.float64)


def setup_section(run_dir: Path, run: Run) -> Section | None:
    """What the run was made of."""
    features, config = run.get("features") or {}, run.get("config") or {}
    identity, encoder = features.get("identity") or {}, config.get("encoder") or {}
    pairs = [
        ("features", f"{features.get('path', '?')}  {_shape(features)}"),
        ("backbone", _backbone(identity)),
        ("weights", _weights(identity)),
        ("encoder", _encoder(encoder)),
        ("parameters", f"{run.get('n_parameters', 0):,}"),
        ("images", _images(run)),
        ("optimiser", _optimiser(config.get("train") or {})),
    ]
    return how_it_was_made(run, pairs)


def how_it_was_made(run: Run, pairs: Sequence[tuple[str, str]]) -> Section:
    """``pairs`` of a run, and what every kind of run has: when, where, command, versions, options."""
    config = run.get("config") or {}
    common = [
        (
            "run",
            f"{run.get('started', '?')} on {run.get('host', '?')}, raypipe {run.get('raypipe')}",
        ),
        ("command", typed_command(run.get("command", ()))),
        ("commit", str(run.get("git_commit") or "not a git checkout")),
    ]
    versions = Table(
        ["package", "version"], sorted((run.get("versions") or {}).items()), "Versions",
        numeric_from=2, folded=True,
    )  # fmt: skip
    resolved = Code("Resolved configuration", json.dumps(config, indent=2))
    return Section("How it was made", [Facts([*pairs, *common]), versions, resolved])


def typed_command(words: Sequence[str]) -> str:
    """As a person would type it; ``python -m raypipe`` is run.json's ``__main__.py``."""
    program = ["raypipe" if word == "__main__.py" else word for word in words[:1]]
    return shlex.join([*program, *words[1:]])


def _shape(features: Run) -> str:
    shape = " × ".join(str(n) for n in features.get("shape", ()))
    return f"({shape}, {features.get('dtype', '?')})"


def _backbone(identity: Run) -> str:
    part = identity.get("part")
    taken = f", {part} of" if part not in (None, "out") else ","
    size = identity.get("image_hw")
    pixels = f", images of {size[1]} × {size[0]} pixels" if size else ""
    return (
        f"{identity.get('arch', '?')} ({identity.get('library', '?')}){taken}"
        f" {identity.get('module') or 'the model output'}{pixels}"
    )


def _weights(identity: Run) -> str:
    digest = str(identity.get("weights_sha256", ""))[:16]
    return f"{identity.get('weights', '?')}, sha256 {digest}…" if digest else "?"


def _encoder(encoder: Run) -> str:
    if encoder.get("model") == "linear":
        return f"linear on {encoder.get('linear_pool')} tokens"
    return (
        f"{encoder.get('model', '?')}, readout {encoder.get('readout')}: {encoder.get('layers')}"
        f" cross-attention layer(s), {encoder.get('heads')} heads, width {encoder.get('d_model')},"
        f" feed-forward {encoder.get('ffn')}, dropout {encoder.get('dropout')}"
    )


def _images(run: Run) -> str:
    text = f"{run.get('n_train', '?')} to train, {run.get('n_val', '?')} to choose the epoch"
    invalid = run.get("n_invalid", 0)
    return f"{text}; {invalid} unreadable, left out" if invalid else text


def _optimiser(train: Run) -> str:
    return (
        f"AdamW, learning rate {train.get('lr')}, {train.get('schedule')} schedule, weight decay"
        f" {train.get('weight_decay')}, batch {train.get('batch_size')} × {train.get('accumulate')},"
        f" AMP {train.get('amp')}, seed {train.get('seed')}"
    )


SECTIONS: tuple[Callable[[Path, Run], Section | None], ...] = (
    score_section,
    training_section,
    memory_section,
    setup_section,
)
