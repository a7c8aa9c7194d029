"""``raypipe fmri betas``: models of every run, unit by unit, and a table of the betas to decode from."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raypipe.fmri.commands import FmriSummary, Verb, account, carry_out, done_records
from raypipe.fmri.glm.job import BetasConfig
from raypipe.fmri.glm.lay_out import BetaPlan, lay_out
from raypipe.fmri.glm.outputs import FOLDER
from raypipe.fmri.glm.worker import BetaShared, BetaWorker
from raypipe.fmri.ledger import write_whole
from raypipe.fmri.units import slug
from raypipe.progress import Progress
from raypipe.runner import Needs, Prospect, Runner
from raypipe.store.durable import remove

KIND = "fmri betas"


def betas(cfg: BetasConfig, runner: Runner | Prospect) -> FmriSummary:
    """Trial-wise betas or maps of conditions of every subject; raises as ``commands.mvpa``."""
    verb = Verb(kind=KIND, plan=lay_out, compute=compute_fits, finish=save_tables)
    return carry_out(cfg, runner, verb)


def compute_fits(
    cfg: BetasConfig,
    runner: Runner,
    plan: BetaPlan,
    needs: Needs,
    kind: str,
    summary: FmriSummary,
) -> None:
    """Hand out the units that are left."""
    for folder in (FOLDER, "maps"):
        remove((cfg.run_dir / folder).glob(".*.tmp"))  # of writers that were killed
    shared = BetaShared(cfg=cfg, rois=plan.rois, use_memmap=runner.memory.config.use_memmap)
    said: set[str] = set()
    with (
        runner.pool(BetaWorker, replace(needs, run_dir=cfg.run_dir)) as pool,
        Progress(kind, len(plan.units), "units", done=len(plan.done)) as progress,
    ):
        for done in pool.run(plan.batches, shared):
            account(done.payload, summary, progress, said)
            progress.update(1)


def save_tables(cfg: BetasConfig, plan: BetaPlan, summary: FmriSummary) -> None:
    """``betas_roi-NAME.csv``: the betas of all runs that are done, as ``fmri mvpa --table`` takes them."""
    records = [record for record in done_records(cfg, plan) if "table" in record]
    for roi in dict.fromkeys(record["roi"] for record in records):
        rows = [record["table"] for record in records if record["roi"] == roi]
        path = cfg.run_dir / f"betas_roi-{slug(roi)}.csv"
        print(_save_csv(path, rows))
        print(decode_command(path, roi, rows), file=sys.stderr)


def decode_command(table: Path, roi: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """How these betas are decoded; what a table of labels is called follows from its run's words."""
    words = ["sub-{subject}"]
    words += ["ses-{session}"] if rows[0]["session"] else []
    words += ["task-{task}"] if rows[0]["task"] else []
    labels = (
        table.parent / FOLDER / "_".join([*words, "run-{run}", f"roi-{slug(roi)}", "trials.tsv"])
    )
    return (
        f"decode them: raypipe fmri mvpa --table {table} --labels '{labels}' --delay-s 0 --no-detrend "
        "--run-dir …"
    )


def _save_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_whole(path, lambda file: file.write(text.getvalue().encode()))
