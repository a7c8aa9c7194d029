"""Drives an extraction: plan, reserve, hand out, seal, say what came of it.

What is on disk after a crash is whole: the same command computes only what was not committed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from raypipe import config as configs
from raypipe.backbone import BackboneSpec, TokenLayout, resolve
from raypipe.backbone.model import layouts
from raypipe.errors import ConfigError
from raypipe.extract.config import ExtractConfig
from raypipe.extract.plan import Group, RangeItem, cut_items, find_groups, image_hw
from raypipe.extract.worker import Described, Extracted, WorkerSetup
from raypipe.progress import Progress
from raypipe.provenance import run_record
from raypipe.runner import Needs, Pool, Runner
from raypipe.store import ShardRun, ShardSpec, open_for_writing, require_space
from raypipe.units import format_bytes, format_seconds

_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


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


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """All that is known before anything is written.

    hw : pixels of every image before resizing; layouts : by layer, how a row's tokens lie.
    """

    groups: tuple[Group, ...]
    spec: BackboneSpec
    hw: tuple[int, int]
    layouts: Mapping[str, TokenLayout]
    itemsize: int

    def path(self, root: Path, group: Group, layer: str) -> Path:
        return root / self.spec.folder(layer) / group.subject / f"{group.shard}.npy"

    def row_bytes(self, layer: str) -> int:
        return math.prod(self.row_shape(layer)) * self.itemsize

    def row_shape(self, layer: str) -> tuple[int, int]:
        return self.layouts[layer].n_tokens, self.layouts[layer].dim

    @property
    def bytes_needed(self) -> int:
        rows = sum(len(group.paths) for group in self.groups)
        return rows * sum(self.row_bytes(layer) for layer in self.layouts)


def make_plan(cfg: ExtractConfig) -> ExtractPlan:
    """Find images and shapes, without weights and without writing."""
    spec = resolve(
        cfg.backbone,
        enc_layer=cfg.enc_layer,
        layers=cfg.layer,
        preprocess=cfg.preprocess,
        image_size=cfg.image_size,
    )
    groups = find_groups(cfg)
    hw = image_hw(groups)
    return ExtractPlan(
        groups=groups,
        spec=spec,
        hw=hw,
        layouts=layouts(spec, hw),
        itemsize=_ITEMSIZE[cfg.store_dtype],
    )


def extract(cfg: ExtractConfig, runner: Runner) -> ExtractSummary:
    """Run ``cfg`` on ``runner``; see the errors of the modules it calls.

    Raises MissingInput, UnknownName, ConfigError, FingerprintMismatch, StoreLocked, NoSpace,
    WeightsUnavailable, DeviceUnavailable, MemoryBudgetExceeded, WorkerFailed.
    """
    check(cfg)
    plan = make_plan(cfg)
    if cfg.dry_run:
        print(describe_plan(cfg, plan))
        return ExtractSummary()
    device = runner.resolve_device(cfg.device)
    needs = runner.needs(cfg.workers, device)
    _require_room(cfg, plan)
    setup = WorkerSetup(
        spec=plan.spec,
        weights=cfg.weights,
        device=device,
        precision=cfg.precision,
        torch_threads=max(1, int(needs.cpus)) if device == "cpu" else None,
        decode_threads=cfg.decode_threads or (8 if device.startswith("cuda") else 2),
        fail_on_bad_image=cfg.on_bad_image == "fail",
        image_hw=plan.hw,
    )
    with runner.pool(setup, needs) as pool, ExitStack() as stack:
        described = pool.describe()
        run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        run_dir = cfg.output_dir / "runs" / f"extract-{run_id}"
        shards = _open_shards(cfg, plan, described, run_id, stack)
        summary = _compute(cfg, plan, pool, shards, needs)
        summary.run_dir = str(run_dir)
        _save_run(cfg, plan, described, summary, run_dir)
    _say_summary(summary)
    return summary


def describe_plan(cfg: ExtractConfig, plan: ExtractPlan) -> str:
    """What ``--dry-run`` prints: a line a store, and the disk that all need."""
    lines = []
    for group in plan.groups:
        for layer in plan.layouts:
            rows = len(group.paths)
            size = format_bytes(rows * plan.row_bytes(layer))
            path = plan.path(cfg.output_dir, group, layer)
            shape = (rows, *plan.row_shape(layer))
            lines.append(f"{path}  {shape} {cfg.store_dtype}  {size}")
    lines.append(f"disk needed: {format_bytes(plan.bytes_needed)} ({plan.bytes_needed} bytes)")
    return "\n".join(lines)


def _require_room(cfg: ExtractConfig, plan: ExtractPlan) -> None:
    """All stores that are not there yet must fit, before the first byte is written."""
    need = 0
    for group in plan.groups:
        for layer in plan.layouts:
            path = plan.path(cfg.output_dir, group, layer)
            begun = path.with_name(path.name + ".partial")
            if not path.exists() and not begun.exists():
                need += len(group.paths) * plan.row_bytes(layer)
    require_space({cfg.output_dir: need})


def _open_shards(
    cfg: ExtractConfig, plan: ExtractPlan, described: Described, run_id: str, stack: ExitStack
) -> dict[str, dict[str, ShardRun]]:
    shards: dict[str, dict[str, ShardRun]] = {}
    for group in plan.groups:
        shards[group.key] = {
            layer: stack.enter_context(
                open_for_writing(
                    _shard_spec(cfg, plan, group, layer, described),
                    run_id=run_id,
                    overwrite=cfg.overwrite,
                )
            )
            for layer in plan.layouts
        }
    return shards


def _shard_spec(
    cfg: ExtractConfig, plan: ExtractPlan, group: Group, layer: str, described: Described
) -> ShardSpec:
    return ShardSpec(
        path=plan.path(cfg.output_dir, group, layer),
        rows=len(group.paths),
        row_shape=plan.row_shape(layer),
        dtype=cfg.store_dtype,
        names=group.names,
        grid=cfg.batch_size,
        identity={
            **plan.spec.identity(layer),
            "weights": _weights_name(cfg.weights),
            "weights_sha256": described.weights_sha256,
            "precision": cfg.precision,
            "image_hw": list(plan.hw),
        },
        token_layout=plan.layouts[layer].describe(),
        provenance=run_record(cfg) | {"device": described.device_name},
    )


def _weights_name(weights: str) -> str:
    """Where weights lie does not matter, their digest does; a seed is worth reading."""
    return weights if weights == "pretrained" or weights.startswith("random:") else "file"


def _compute(  # the heart of the run: items out, durable ranges in, stores sealed
    cfg: ExtractConfig,
    plan: ExtractPlan,
    pool: Pool,
    shards: Mapping[str, Mapping[str, ShardRun]],
    needs: Needs,
) -> ExtractSummary:
    items = [item for group in plan.groups for item in _items(cfg, plan, group, shards, needs)]
    waiting = {key: {item.key for item in items if item.group == key} for key in shards}
    rows = {item.key: item.hi - item.lo for item in items}
    total = sum(len(group.paths) for group in plan.groups)
    resumed = total - sum(rows.values())
    summary = ExtractSummary(rows_resumed=resumed)
    summary.stores = [str(run.spec.path) for runs in shards.values() for run in runs.values()]
    if resumed:
        print(f"{resumed} of {total} rows are committed already", file=sys.stderr)
    targets = {
        key: {layer: run.target for layer, run in runs.items() if not run.sealed}
        for key, runs in shards.items()
    }
    started = time.monotonic()
    with Progress("extract", total, "images", done=resumed) as progress:
        for key in [key for key, left in waiting.items() if not left]:
            _seal(shards[key])
        if items:
            for done in pool.run(items, targets):
                group, _ = done.key
                progress.update(rows[done.key])
                _account(summary, group, done.payload, progress)
                waiting[group].discard(done.key)
                if not waiting[group]:
                    _seal(shards[group])
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
    missing = _union([run.missing() for run in shards[group.key].values()])
    row_bytes = sum(plan.row_bytes(layer) for layer in plan.layouts)
    return cut_items(
        group, missing, grid=cfg.batch_size, row_bytes=row_bytes, workers=needs.workers
    )


def _union(parts: Sequence[Sequence[tuple[int, int]]]) -> list[tuple[int, int]]:
    """The union of several lists of ranges, sorted and merged."""
    merged: list[tuple[int, int]] = []
    for lo, hi in sorted(span for part in parts for span in part):
        if merged and lo <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
        else:
            merged.append((lo, hi))
    return merged


def _account(summary: ExtractSummary, group: str, payload: Extracted, progress: Progress) -> None:
    for name, reason in payload.bad:
        summary.bad.append((group, name, reason))
        progress.note(f"bad image, row kept and marked invalid: {group} {reason}")
    if payload.halved_to is not None:
        summary.halved.append(f"{group}: batch {payload.halved_to}")
        progress.note(f"out of memory: {group} goes on with a batch of {payload.halved_to}")


def _seal(runs: Mapping[str, ShardRun]) -> None:
    for run in runs.values():
        if not run.sealed:
            run.seal()


def _save_run(
    cfg: ExtractConfig,
    plan: ExtractPlan,
    described: Described,
    summary: ExtractSummary,
    run_dir: Path,
) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    record = run_record(cfg) | {
        "weights_sha256": described.weights_sha256,
        "n_parameters": described.n_parameters,
        "summary": asdict(summary) | {"rows_per_s": summary.rate},
    }
    (run_dir / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    configs.save(cfg, run_dir / "config.yaml")


def _say_summary(summary: ExtractSummary) -> None:
    text = f"{summary.rows} rows in {format_seconds(summary.seconds)} ({summary.rate:.3g} images/s)"
    if summary.rows_resumed:
        text += f", {summary.rows_resumed} were there before"
    if summary.bad:
        text += f"; {len(summary.bad)} bad image(s) marked invalid, named in {summary.run_dir}"
    print(text, file=sys.stderr)
    for path in summary.stores:
        print(path)


def check(cfg: ExtractConfig) -> None:
    """Options that only make sense together."""
    if cfg.layer and not cfg.backbone.startswith(("timm:", "open_clip:")):
        raise ConfigError(
            f"--layer goes with timm:NAME and open_clip:NAME; {cfg.backbone} takes --enc-layer"
        )
