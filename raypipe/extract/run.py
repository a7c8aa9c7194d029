"""Drives an extraction: plan, reserve, hand out, seal, say what came of it.

What is on disk after a crash is whole: the same command computes only what was not committed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from raypipe import config as configs
from raypipe.errors import ConfigError, DeviceUnavailable, NoSpace, WorkerFailed
from raypipe.extract.checks import check_unfinished
from raypipe.extract.config import ExtractConfig
from raypipe.extract.plan import Group, RangeItem, cut_items, union
from raypipe.extract.rehearse import rehearse
from raypipe.extract.stores import (
    ExtractPlan,
    bad_images,
    data_bytes,
    describe_plan,
    make_plan,
    open_shards,
    require_room,
    seal,
)
from raypipe.extract.worker import Described, Extracted, Shared, WorkerSetup
from raypipe.progress import Progress
from raypipe.provenance import run_record
from raypipe.report import build_report
from raypipe.runner import Needs, Pool, Runner
from raypipe.store import ShardRun
from raypipe.store.space import explain_os_errors
from raypipe.units import format_seconds

MAX_BAD_NAMED = 20


@dataclass
class ExtractSummary:
    """What an extraction did.

    seconds : of computing rows, start-up not counted; bad : (group, image, reason).
    """

    stores: list[str] = field(default_factory=list)
    rows: int = 0
    rows_resumed: int = 0
    seconds: float = 0.0
    bad: list[tuple[str, str, str]] = field(default_factory=list)
    halved: list[str] = field(default_factory=list)
    run_dir: str = ""

    @property
    def rate(self) -> float:
        return self.rows / self.seconds if self.seconds > 0 else 0.0


def extract(cfg: ExtractConfig, runner: Runner | None) -> ExtractSummary:
    """Run ``cfg`` on ``runner``; see the errors of the modules it calls.

    A dry run tells what the run would take; without a runner (None) it cannot rehearse its memory.

    Raises MissingInput, UnknownName, ConfigError, FingerprintMismatch, StoreLocked, NoSpace,
    WeightsUnavailable, DeviceUnavailable, MemoryBudgetExceeded, WorkerFailed; StoreError when the
    images are no longer those that a finished store was made from.
    """
    cfg = _absolute(cfg)
    plan = make_plan(cfg)
    if cfg.dry_run:
        print(describe_plan(cfg, plan), flush=True)
        print("\n".join(_forecast(cfg, plan, runner)))
        return ExtractSummary()
    if runner is None:
        raise ConfigError("extract needs a runner; open one with raypipe.launch.open_runner")
    device = runner.resolve_device(cfg.device)
    for path in plan.paths(cfg.output_dir):
        check_unfinished(path, device, overwrite=cfg.overwrite)
    require_room(cfg, plan)
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run_dir = cfg.output_dir / "runs" / f"extract-{run_id}"
    needs = replace(runner.needs(cfg.workers, device), run_dir=run_dir)
    with runner.pool(_worker_setup(cfg, plan, needs), needs) as pool, ExitStack() as stack:
        described = pool.describe()
        shards = open_shards(cfg, plan, described, run_id, stack)
        record = run_record(cfg) | {
            "kind": "extract",
            "weights": asdict(described),
            "torch_threads": needs.cpus,
            "memory": runner.memory.record(),
        }
        _save_run(cfg, runner.name, record, run_dir)
        summary = _compute(cfg, plan, pool, shards, needs, described)
    summary.run_dir = str(run_dir)
    summary.bad = bad_images(plan, cfg)
    record |= {"summary": asdict(summary) | {"rows_per_s": summary.rate}}
    _save_run(cfg, runner.name, record, run_dir)
    _say_summary(summary)
    print(f"report: {build_report(run_dir)}", file=sys.stderr)
    return summary


def _absolute(cfg: ExtractConfig) -> ExtractConfig:
    """Workers have a working directory of their own."""
    data_dir, output_dir = cfg.data_dir.absolute(), cfg.output_dir.absolute()
    weights = cfg.absolute_weights()
    return replace(cfg, data_dir=data_dir, output_dir=output_dir, weights=weights)


def _forecast(cfg: ExtractConfig, plan: ExtractPlan, runner: Runner | None) -> list[str]:
    """What a dry run says of memory and time. What would fail the run fails here."""
    disk = f"disk exactly {data_bytes(cfg, plan)} bytes"
    if runner is None:
        return [f"predicted peak: not rehearsed (no runner was given), {disk}"]
    try:
        needs = runner.needs(cfg.workers, runner.resolve_device(cfg.device))
        setup = _worker_setup(cfg, plan, needs)
        with tempfile.TemporaryDirectory(prefix="raypipe-dry-run-") as folder:
            found = rehearse(cfg, plan, runner, setup, replace(needs, run_dir=Path(folder)))
    except (DeviceUnavailable, NoSpace, WorkerFailed) as error:
        return [f"predicted peak: not rehearsed ({error}), {disk}"]
    rows = sum(len(group.paths) for group in plan.groups)
    return [
        f"predicted peak: {found.line()}, {disk}",
        found.budget_line(),
        found.place_line(rows, needs.workers),
    ]


def _worker_setup(cfg: ExtractConfig, plan: ExtractPlan, needs: Needs) -> WorkerSetup:
    on_cpu = needs.device == "cpu"
    return WorkerSetup(
        spec=plan.spec,
        weights=cfg.weights,
        device=needs.device,
        precision=cfg.precision,
        torch_threads=max(1, int(needs.cpus)) if on_cpu else None,
        decode_threads=cfg.decode_threads or (2 if on_cpu else 8),
        fail_on_bad_image=cfg.on_bad_image == "fail",
        image_hw=plan.hw,
    )


def _compute(  # the heart of the run: items out, durable ranges in, stores sealed
    cfg: ExtractConfig,
    plan: ExtractPlan,
    pool: Pool,
    shards: Mapping[str, Mapping[str, ShardRun]],
    needs: Needs,
    described: Described,
) -> ExtractSummary:
    items = [item for group in plan.groups for item in _items(cfg, plan, group, shards, needs)]
    groups = {group.key: group for group in plan.groups}
    waiting = {key: {item.key for item in items if item.group == key} for key in shards}
    rows = {item.key: item.hi - item.lo for item in items}
    total = sum(len(group.paths) for group in plan.groups)
    resumed = total - sum(rows.values())
    summary = ExtractSummary(rows_resumed=resumed)
    summary.stores = [str(path) for path in plan.paths(cfg.output_dir)]
    if resumed:
        print(f"{resumed} of {total} rows are committed already", file=sys.stderr)
    targets = {
        key: {layer: run.target for layer, run in runs.items() if not run.sealed}
        for key, runs in shards.items()
    }
    shared = Shared(targets, described.weights_sha256)
    open_runs = [run for runs in shards.values() for run in runs.values() if not run.sealed]

    def shut_out(writer_id: str) -> None:
        for run in open_runs:
            if not run.sealed:
                run.fence_writer(writer_id)

    started = time.monotonic()
    with Progress("extract", total, "images", done=resumed) as progress:
        for key in [key for key, left in waiting.items() if not left]:
            seal(shards[key], groups[key])
        if items:
            for done in pool.run(items, shared, shut_out):
                group, _ = done.key
                progress.update(rows[done.key])
                _account(summary, group, done.payload, progress)
                waiting[group].discard(done.key)
                if not waiting[group]:
                    seal(shards[group], groups[group])
    summary.rows = sum(rows.values())
    summary.seconds = time.monotonic() - started
    return summary


def _items(
    cfg: ExtractConfig,
    plan: ExtractPlan,
    group: Group,
    shards: Mapping[str, Mapping[str, ShardRun]],
    needs: Needs,
) -> Sequence[RangeItem]:
    """What at least one of the group's layers lacks: they share the forward pass."""
    missing = union([run.missing() for run in shards[group.key].values()])
    row_bytes = sum(plan.row_bytes(layer) for layer in plan.layouts)
    return cut_items(
        group, missing, grid=cfg.batch_size, row_bytes=row_bytes, workers=needs.workers
    )


def _account(summary: ExtractSummary, group: str, payload: Extracted, progress: Progress) -> None:
    if payload.halved_to is not None:
        now = f"{group}: batch {payload.halved_to}"
        if now not in summary.halved:
            progress.note(f"memory is short: {group} goes on with a batch of {payload.halved_to}")
        summary.halved.append(now)


def _save_run(cfg: ExtractConfig, runner: str, record: Mapping[str, object], run_dir: Path) -> None:
    """Written before the first row, and again with the summary; --config reads config.yaml back."""
    text = json.dumps(record, indent=1)
    with explain_os_errors(run_dir, len(text)):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "run.json").write_text(text, encoding="utf-8")
        configs.save({**configs.to_dict(cfg), "runner": runner}, run_dir / "config.yaml")


def _say_summary(summary: ExtractSummary) -> None:
    text = f"{summary.rows} rows in {format_seconds(summary.seconds)} ({summary.rate:.3g} images/s)"
    if summary.rows_resumed:
        text += f", {summary.rows_resumed} were there before"
    for group, name, reason in summary.bad[:MAX_BAD_NAMED]:
        print(f"bad image, row kept and marked invalid: {group} {name}: {reason}", file=sys.stderr)
    if summary.bad:
        text += (
            f"; {len(summary.bad)} bad image(s) marked invalid, named in {summary.run_dir}/run.json"
        )
    print(text, file=sys.stderr)
    for path in summary.stores:
        print(path)
