"""The jobs of a fitted encoder: evaluate on images it was not trained on, and predict.

Both read everything from the run folder that ``run`` made, and add evaluation/ or predictions/ to it.
They run in this process, without Ray; features are read from stores, or computed on the fly.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.encoding.apply import Applied, open_applied
from raypipe.encoding.config import ApplyConfig, EvaluateConfig, PredictConfig
from raypipe.encoding.predictions import PredictionFile
from raypipe.encoding.readout import HEMIS
from raypipe.errors import MissingInput
from raypipe.memory.attend import attend
from raypipe.memory.config import resolve
from raypipe.report import build_report
from raypipe.report.saved import read_run, subject_folders
from raypipe.store import require_space


def evaluate(cfg: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Score every subject of the run on ``cfg.split`` and write the report.

    Returns subject -> summary (also evaluation/SPLIT/summary.json). Raises MissingInput (no run, no
    checkpoint, responses withheld), MemoryBudgetExceeded, and as ``raypipe.encoding.data``.
    """
    summaries, memory = {}, resolve(cfg.memory)
    for subj, folder in fitted_subjects(cfg).items():
        with attend(memory, folder, "evaluate"):
            summaries[subj] = _evaluate_subject(cfg, subj, folder)
        print(score_line(summaries[subj]))
    print(f"report: {build_report(cfg.run_dir)}")
    return summaries


def _evaluate_subject(cfg: EvaluateConfig, subj: str, folder: Path) -> dict[str, Any]:
    from raypipe.encoding.score import Scores, correlate, load_ceiling, save_scores

    applied = open_applied(cfg, folder, fmri=True)
    opened = applied.opened
    r = correlate(
        applied.model,
        {**opened.features.sources(), **opened.responses()},
        applied.rows,
        batch_size=cfg.eval_batch,
        device=applied.device,
        backbone=opened.features.backbone,
    )
    ceiling = load_ceiling(opened.subject.noise_ceiling())
    scores = Scores(n_images=len(applied.rows), r=r, nc=ceiling)
    note = {"subject": subj, "split": cfg.split, **applied.note()}
    return save_scores(scores, applied.families(), folder / "evaluation" / cfg.split, note)


def fitted_subjects(cfg: ApplyConfig) -> dict[str, Path]:
    """Subject -> its run folder, once all of them have weights; says which are not fully trained.

    Raises MissingInput, naming the subjects that are not fitted yet.
    """
    folders = subject_folders(cfg.run_dir)
    bare = [s for s, f in folders.items() if not any(f.glob(f"{cfg.checkpoint}*/meta.json"))]
    if bare and all(bare):  # a folder without a subject is no fit's: opening it says so
        raise MissingInput(
            f"{cfg.run_dir}: subject {', '.join(bare)} is not fitted yet (no {cfg.checkpoint}"
            " checkpoint); give the same encode fit command again to finish the run"
        )
    for subj, folder in folders.items():
        if read_run(folder).get("result") is None:
            print(
                f"subject {subj}: its training has not ended; what is applied is its state so far"
            )
    return folders


def score_line(summary: Mapping[str, Any]) -> str:
    """One subject's result in one line."""
    left_out = summary["n_vertices"] - summary["n_scored"]
    text = (
        f"subject {summary['subject']}, {summary['n_images']} {summary['split']} images:"
        f" mean r {_number(summary['mean_r'])} over {summary['n_scored']} vertices"
        + (f" (undefined in {left_out} more)" if left_out else "")
    )
    if summary.get("recovered") is not None:
        text += (
            f"; where a ceiling is known it averages {_number(summary['mean_ceiling_r'])}, of which"
            f" {summary['recovered']:.0%} is reached"
        )
        if summary["n_counted_zero"]:
            text += f" (undefined r count as 0 there: {summary['n_counted_zero']} vertices)"
    return text


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def predict(cfg: PredictConfig) -> dict[str, dict[str, Path]]:
    """Write predicted responses of every subject; returns subject -> hemisphere -> file.

    Rows of images that could not be read hold NaN, and are counted in what is printed. Files appear
    whole. Raises as ``evaluate``, but needs no responses; NoSpace.
    """
    written, memory = {}, resolve(cfg.memory)
    folders = fitted_subjects(cfg)
    for subj, folder in folders.items():
        out = folder / "predictions"
        if cfg.output_dir is not None:
            out = cfg.output_dir / f"subj{subj}" if len(folders) > 1 else cfg.output_dir
        with attend(memory, folder, "predict"):
            applied = open_applied(cfg, folder, fmri=False)
            written[subj] = _write_predictions(cfg, applied, out)
        missing = int((~applied.opened.valid[applied.all_rows]).sum())
        note = f", {missing} of them unreadable and left NaN" if missing else ""
        print(f"subject {subj}: {len(applied.all_rows)} images predicted{note}; {out}")
    return written


def _write_predictions(cfg: PredictConfig, applied: Applied, out: Path) -> dict[str, Path]:
    from raypipe.encoding.score import predictions

    n_rows, n_vertices = len(applied.all_rows), applied.n_vertices
    require_space({out: sum(4 * n_rows * n for n in n_vertices.values())})
    place_of = {int(row): place for place, row in enumerate(applied.all_rows)}
    with ExitStack() as stack:
        files = {
            hemi: stack.enter_context(
                PredictionFile(out / f"{hemi}_pred_{cfg.split}.npy", n_rows, n_vertices[hemi])
            )
            for hemi in HEMIS
        }
        features = applied.opened.features
        for rows, predicted, _ in predictions(
            applied.model,
            features.sources(),
            applied.rows,
            batch_size=cfg.eval_batch,
            device=applied.device,
            backbone=features.backbone,
        ):
            for hemi in HEMIS:
                for row, values in zip(rows, predicted[hemi], strict=True):
                    files[hemi].write(place_of[int(row)], values)
        for row in set(applied.all_rows.tolist()) - set(applied.rows.tolist()):
            for hemi in HEMIS:
                files[hemi].write(place_of[row], np.full(n_vertices[hemi], np.nan, np.float32))
    return {hemi: files[hemi].path for hemi in HEMIS}
