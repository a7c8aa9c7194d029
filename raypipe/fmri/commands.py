"""``raypipe fmri roi`` and ``raypipe fmri mvpa``: plan, hand out, record, test the group, say what failed.

``carry_out`` is the frame of every fMRI command; a ``Verb`` says how one plans, computes and ends. What is
finished stays finished: the same command computes only units that are not done, or whose inputs or
options changed. A unit that fails does not stop the others; the exit code and the summary tell.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import config as configs
from raypipe.errors import ConfigError, InputError, RaypipeError, ResourceError, WorkerFailed
from raypipe.fmri.cohort import group_rows, lines, save_group
from raypipe.fmri.config import FmriConfig, MvpaJobConfig, RoiConfig, absolute
from raypipe.fmri.ledger import DONE, Ledger, write_whole
from raypipe.fmri.planned import time_line
from raypipe.fmri.prepare import Plan, make_plan
from raypipe.fmri.report import write_report
from raypipe.fmri.roi_map import save_roi_maps
from raypipe.fmri.units import Unit
from raypipe.fmri.work import Outcome, Shared, WorkerSetup
from raypipe.memory.config import ResolvedMemory
from raypipe.progress import Progress
from raypipe.provenance import run_record
from raypipe.report.saved import RUN_FILE, read_run, write_json
from raypipe.runner import LocalRunner, Machines, Needs, Prospect, Runner
from raypipe.store import require_space
from raypipe.store.durable import make_dirs
from raypipe.store.flocks import held
from raypipe.units import format_seconds

LOCK = ".fmri.lock"
_NAMED = 4  # units in one line of failures; all are in run.json


@dataclass(kw_only=True)
class FmriSummary:
    """What a run came to. found : units that were done before; failed : unit id -> (reason, exit code).

    blocks : of searchlights, computed now; a unit's blocks are kept apart
    """

    units: int = 0
    computed: int = 0
    found: int = 0
    blocks: int = 0
    failed: dict[str, tuple[str, int]] = field(default_factory=dict)
    seconds: float = 0.0
    group: list[dict[str, Any]] = field(default_factory=list)


def roi(cfg: RoiConfig, runner: Runner | Prospect) -> FmriSummary:
    """Write the cleaned time series of every region; raises as ``mvpa``."""
    return carry_out(cfg, runner, Verb(kind="fmri roi", finish=_save_table))


def mvpa(cfg: MvpaJobConfig, runner: Runner | Prospect) -> FmriSummary:
    """Decode every target from every region of every subject, then test the group.

    A dry run needs no runner, and takes a prospect instead. Raises InputError when nothing can be computed,
    MemoryBudgetExceeded and NoSpace; and, when all else is done, InputError, ResourceError or
    WorkerFailed when units failed.
    """
    return carry_out(cfg, runner, Verb(kind="fmri mvpa", finish=_test_group))


def carry_out(cfg: FmriConfig, runner: Runner | Prospect, verb: Verb) -> FmriSummary:
    """Plan ``cfg`` and, unless it is a dry run, do it in its run folder; raises as ``mvpa``."""
    cfg = absolute(cfg)
    here = runner.needs(cfg.workers, "cpu") if isinstance(runner, LocalRunner) else None
    plan = verb.plan(cfg, runner.memory, runner.machines)
    if cfg.dry_run or isinstance(runner, Prospect):
        print("\n".join([*plan.lines, verb.seconds(cfg, plan)]))
        _tell_failed(plan.failed)
        return FmriSummary(units=len(plan.units) + len(plan.failed), found=len(plan.done))
    print("\n".join(plan.lines), file=sys.stderr, flush=True)
    require_space({cfg.run_dir: plan.output_bytes})
    make_dirs(cfg.run_dir)
    with held(cfg.run_dir / LOCK, f"{cfg.run_dir} is in use by another run; wait for it"):
        return _in_folder(cfg, runner, plan, verb, here or _needs(plan))


def _needs(plan: Any) -> Needs:
    """Workers by the plan; cores that are left over clean series."""
    if plan.decision is None:  # nothing is left to do
        return Needs()
    return Needs(workers=plan.decision.workers, cpus=plan.decision.cores)


def _in_folder(cfg: FmriConfig, runner: Runner, plan: Any, verb: Verb, needs: Needs) -> FmriSummary:
    check_kind(cfg, verb.kind)
    record = run_record(cfg) | {
        "kind": verb.kind,
        "memory": runner.memory.record(),
        "plan": list(plan.lines),
        "notes": _notes(cfg),
        # Records of earlier runs with other regions or targets may lie beside these.
        "units": [unit.unit_id for unit in [*plan.units, *(unit for unit, _ in plan.failed)]],
    }
    _save_run(cfg, runner.name, record)
    ledger = Ledger(cfg.run_dir)
    ledger.sweep()
    summary = FmriSummary(units=len(plan.units) + len(plan.failed), found=len(plan.done))
    for unit, reason in plan.failed:
        summary.failed[unit.unit_id] = (reason, InputError.exit_code)
        known = ledger.read(unit)
        if known is None or known["status"] != DONE:  # results of an earlier run are kept
            ledger.fail(unit, reason)
    _tell_failed(plan.failed)
    started = time.monotonic()
    with _saving(cfg, runner.name, record, summary):
        if plan.batches:
            verb.compute(cfg, runner, plan, needs, verb.kind, summary)
        summary.seconds = time.monotonic() - started
        verb.finish(cfg, plan, summary)
    _tell(summary)
    print(f"report: {write_report(cfg.run_dir)}")
    _raise_if_failed(cfg, summary)
    return summary


def check_kind(cfg: FmriConfig, kind: str) -> None:
    """Raises ConfigError where the run folder has another command's results: names would collide."""
    if not (cfg.run_dir / RUN_FILE).is_file():
        return
    held_kind = read_run(cfg.run_dir).get("kind", kind)
    if held_kind != kind:
        raise ConfigError(
            f"{cfg.run_dir} holds results of {held_kind}; give {kind} a --run-dir of its own"
        )


def _notes(cfg: FmriConfig) -> list[str]:
    """What the report must say about these data."""
    if cfg.bids_dir is None or not (cfg.bids_dir / "planted.json").is_file():
        return []
    return [
        "The scans are made up, not measured: patterns are planted in some regions and in no others "
        "(planted.json says in which)."
    ]


def compute_units(
    cfg: FmriConfig, runner: Runner, plan: Plan, needs: Needs, kind: str, summary: FmriSummary
) -> None:
    """Hand the plan's batches to workers and count what becomes of their units."""
    use_memmap = runner.memory.config.use_memmap
    shared = Shared(cfg=cfg, rois=plan.rois, use_memmap=use_memmap)
    setup = WorkerSetup(threads=max(1, int(needs.cpus)))
    total = len(plan.done) + plan.left
    said: set[str] = set()
    with (
        runner.pool(setup, replace(needs, run_dir=cfg.run_dir)) as pool,
        Progress(kind, total, "units", done=len(plan.done)) as progress,
    ):
        for done in pool.run(plan.batches, shared):
            for outcome in done.payload:
                account(outcome, summary, progress, said)
            progress.update(len(done.payload))


@dataclass(frozen=True, kw_only=True)
class Verb:
    """How one command plans, computes and ends.

    plan    : (cfg, budgets, machines) -> what ``prepare.Plan`` has; seconds : the time it will take, in words
    compute : (cfg, runner, plan, needs, kind, summary), not called where nothing is left
    finish  : (cfg, plan, summary), over all that is done
    """

    kind: str
    finish: Callable[[Any, Any, FmriSummary], None]
    plan: Callable[[Any, ResolvedMemory, Machines], Any] = make_plan
    compute: Callable[[Any, Runner, Any, Needs, str, FmriSummary], None] = compute_units
    seconds: Callable[[Any, Any], str] = time_line


def account(
    outcome: Outcome,
    summary: FmriSummary,
    progress: Progress,
    said: set[str],
    *,
    whole: bool = True,
) -> None:
    """Count a unit; say what failed, and each warning once. whole : False for a part of one."""
    name = outcome.unit.unit_id
    for text in outcome.warnings:
        if text not in said:
            said.add(text)
            progress.note(f"warning: {name}: {text}")
    if outcome.reason is None:
        summary.computed += whole
        return
    summary.failed[name] = (outcome.reason, outcome.exit_code)
    progress.note(f"failed: {name}: {outcome.reason}")


def _save_table(cfg: RoiConfig, plan: Plan, summary: FmriSummary) -> None:
    """series.parquet and series.tsv: a row a subject, run and region."""
    rows = [row for record in done_records(cfg, plan) for row in record["series"]]
    if not rows:
        return
    table = pa.Table.from_pylist(rows)
    write_whole(cfg.run_dir / "series.parquet", lambda file: pq.write_table(table, file))
    write_whole(cfg.run_dir / "series.tsv", lambda file: file.write(_tsv(rows)))
    print(cfg.run_dir / "series.tsv")


def _tsv(rows: list[dict[str, Any]]) -> bytes:
    """As BIDS writes tables: tabs, a header, n/a for what there is not."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: "n/a" if v is None else v for k, v in row.items()} for row in rows])
    return text.getvalue().encode()


def _test_group(cfg: MvpaJobConfig, plan: Plan, summary: FmriSummary) -> None:
    """group.json and group.parquet of all subjects that are done, and maps of regions."""
    summary.group = group_rows(done_records(cfg, plan), seed=cfg.mvpa.seed)
    if summary.group:
        save_group(cfg.run_dir, summary.group)
        save_roi_maps(cfg, summary.group)
        print("\n".join(lines(summary.group)))


def done_records(cfg: FmriConfig, plan: Any) -> list[dict[str, Any]]:
    """Of this run's units, in its order."""
    ledger = Ledger(cfg.run_dir)
    found = [ledger.read(unit) for unit in plan.units if ledger.is_done(unit)]
    return [record for record in found if record is not None]


@contextmanager
def _saving(
    cfg: FmriConfig, runner: str, record: dict[str, Any], summary: FmriSummary
) -> Iterator[None]:
    """run.json gets the summary, also of a run that ends early."""
    try:
        yield
    finally:
        told = {name: value for name, value in asdict(summary).items() if name != "group"}
        _save_run(cfg, runner, {**record, "summary": told})


def _save_run(cfg: FmriConfig, runner: str, record: dict[str, Any]) -> None:
    write_json(cfg.run_dir / RUN_FILE, record)
    configs.save({**configs.to_dict(cfg), "runner": runner}, cfg.run_dir / "config.yaml")


def _tell_failed(failed: list[tuple[Unit, str]]) -> None:
    """One line a reason: what keeps all units of a subject from being computed is said once."""
    units: dict[str, list[str]] = {}
    for unit, reason in failed:
        units.setdefault(reason, []).append(unit.unit_id)
    for reason, names in units.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        print(f"failed: {', '.join(names[:_NAMED])}{more}: {reason}", file=sys.stderr, flush=True)


def _tell(summary: FmriSummary) -> None:
    text = f"{summary.computed} units in {format_seconds(summary.seconds)}"
    text += f", {summary.found} were done before" if summary.found else ""
    text += f", {len(summary.failed)} failed" if summary.failed else ""
    print(text, file=sys.stderr, flush=True)


def _raise_if_failed(cfg: FmriConfig, summary: FmriSummary) -> None:
    """The worst failure decides the exit code: a worker's, then memory or disk, then input."""
    if not summary.failed:
        return
    code = max(code for _, code in summary.failed.values())
    kind: type[RaypipeError] = InputError
    if code != InputError.exit_code:
        kind = ResourceError if code == ResourceError.exit_code else WorkerFailed
    raise kind(
        f"{len(summary.failed)} of {summary.units} units failed, each named above and in "
        f"{cfg.run_dir / 'units'}; the others are done: mend the cause and give the same command again"
    )
