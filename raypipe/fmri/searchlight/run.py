"""``raypipe fmri searchlight``: blocks handed out, each kept as it is done; maps, the group's maps, a page.

A finished block is never computed again, a finished map never put together again; a changed input or
option makes both anew.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from raypipe.fmri.cohort import save_group
from raypipe.fmri.commands import FmriSummary, Verb, account, carry_out, done_records
from raypipe.fmri.searchlight.blockfile import FOLDER
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.fmri.searchlight.lay_out import Light, LightPlan, lay_out, seconds_left
from raypipe.fmri.searchlight.settle import settle
from raypipe.fmri.searchlight.together import group_maps
from raypipe.fmri.searchlight.worker import LightShared, LightWorker
from raypipe.fmri.units import Unit
from raypipe.fmri.work import Outcome
from raypipe.progress import Progress
from raypipe.runner import Needs, Prospect, Runner
from raypipe.store.durable import remove

KIND = "fmri searchlight"


def run_searchlight(cfg: SearchlightJobConfig, runner: Runner | Prospect) -> FmriSummary:
    """Map what can be decoded around every voxel of every subject, then test the group.

    Raises as ``commands.mvpa``.
    """
    verb = Verb(
        kind=KIND, plan=lay_out, compute=compute_blocks, finish=put_together, seconds=seconds_left
    )
    return carry_out(cfg, runner, verb)


def compute_blocks(
    cfg: SearchlightJobConfig,
    runner: Runner,
    plan: LightPlan,
    needs: Needs,
    kind: str,
    summary: FmriSummary,
) -> None:
    """Hand out the blocks; a map is put together as soon as its last one is there."""
    remove((cfg.run_dir / FOLDER).glob("*/.*.tmp"))  # of writers that were killed
    by_unit = {light.unit: light for light in plan.lights}
    left = Counter(item.unit for item in plan.batches)
    shared = LightShared(
        cfg=cfg,
        rois=plan.rois,
        use_memmap=runner.memory.config.use_memmap,
        reads=max(len(light.items) for light in plan.lights),
    )
    found = sum(len(light.done) for light in plan.lights)
    total = found + len(plan.batches)
    said: set[str] = set()
    warned: set[Unit] = set()
    with (
        runner.pool(LightWorker, replace(needs, run_dir=cfg.run_dir)) as pool,
        Progress(kind, total, "blocks", done=found) as progress,
    ):
        for done in pool.run(plan.batches, shared):
            unit, outcome = done.payload.unit, done.payload
            if unit in warned:  # its other blocks warn of the same with other numbers
                outcome = replace(outcome, warnings=())
            elif outcome.warnings:
                warned.add(unit)
            _take(outcome, summary, progress, said)
            left[unit] -= 1
            if not left[unit] and unit.unit_id not in summary.failed:
                _settle(cfg, plan, by_unit[unit], summary)
            progress.update(1)


def _take(outcome: Outcome, summary: FmriSummary, progress: Progress, said: set[str]) -> None:
    """Count a block; a map's failure is told with its first one."""
    if outcome.reason is None:
        summary.blocks += not outcome.found
    if outcome.reason is None or outcome.unit.unit_id not in summary.failed:
        account(outcome, summary, progress, said, whole=False)


def put_together(cfg: SearchlightJobConfig, plan: LightPlan, summary: FmriSummary) -> None:
    """Maps whose blocks were all there, and those of the group."""
    for light in plan.lights:
        if not light.left:
            _settle(cfg, plan, light, summary)
    records = done_records(cfg, plan)
    summary.group = group_maps(cfg.run_dir, records, seed=cfg.mvpa.seed)
    if summary.group:
        save_group(cfg.run_dir, summary.group)
        print("\n".join(map(_line, summary.group)))


def _settle(cfg: SearchlightJobConfig, plan: LightPlan, light: Light, summary: FmriSummary) -> None:
    settle(cfg, light, next(spec for spec in plan.rois if spec.name == light.unit.roi))
    summary.computed += 1


def _line(row: dict[str, Any]) -> str:
    """For people: one line a row."""
    text = f"{row['roi']} {row['target']} {row['score']}: "
    if row["n_centres"] == 0:
        best = max((v for v in row["subjects"].values() if v is not None), default=float("nan"))
        return text + f"highest {best:.3f} (chance {row['chance']:.3f}); {row['note']}"
    where = ", ".join(f"{row[f'{axis}_mm']:.0f}" for axis in "xyz")
    return (
        f"{text}mean {row['mean']:.3f} at {where} mm (chance {row['chance']:.3f}, "
        f"{row['n_subjects']} subjects, t {row['t']:.2f}, corrected p {row['p_flip']:.2g}, at best "
        f"{row['p_flip_least']:.2g}); "
        f"{row['above_fwe']} of {row['n_centres']} centres at p < 0.05 corrected, "
        f"{row['above_fdr']} at FDR < 0.05"
    )
