"""The stores that an extraction fills: which, of what shape, opened, sealed, and what is there.

Which images become which rows is ``plan``'s; what can be refused early is ``checks``'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from raypipe.backbone import BackboneSpec, TokenLayout
from raypipe.backbone.model import layouts
from raypipe.backbone.options import ITEMSIZE, feature_identity
from raypipe.errors import MissingInput, StoreError
from raypipe.extract.checks import bad_rows, changed_error, changed_images
from raypipe.extract.config import ExtractConfig
from raypipe.extract.plan import Group, find_groups, image_hw
from raypipe.extract.worker import Described
from raypipe.provenance import run_record
from raypipe.store import (
    ShardRun,
    ShardSpec,
    describe,
    discard_store,
    open_for_writing,
    refusal,
    require_space,
    space_needed,
)
from raypipe.units import format_bytes


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

    def paths(self, root: Path) -> list[Path]:
        return [self.path(root, group, layer) for group in self.groups for layer in self.layouts]

    def row_bytes(self, layer: str) -> int:
        return math.prod(self.row_shape(layer)) * self.itemsize

    def row_shape(self, layer: str) -> tuple[int, int]:
        return self.layouts[layer].n_tokens, self.layouts[layer].dim

    @property
    def row_bytes_in_all(self) -> int:
        """Bytes of one image in all its stores together."""
        return sum(self.row_bytes(layer) for layer in self.layouts)


def make_plan(cfg: ExtractConfig) -> ExtractPlan:
    """Find images and shapes, without weights and without writing."""
    spec = cfg.spec()
    groups = find_groups(cfg)
    hw = image_hw(groups)
    return ExtractPlan(
        groups=groups,
        spec=spec,
        hw=hw,
        layouts=layouts(spec, hw),
        itemsize=ITEMSIZE[cfg.store_dtype],
    )


def describe_plan(cfg: ExtractConfig, plan: ExtractPlan) -> str:
    """What ``--dry-run`` prints: a line a store with what is there now, and the disk it takes.

    Weights are not loaded: that an earlier store was made with the same ones is not checked here.
    """
    lines, missing, beside = [], 0, 0  # bytes
    for group in plan.groups:
        for layer in plan.layouts:
            rows = len(group.paths)
            size = format_bytes(rows * plan.row_bytes(layer))
            path = plan.path(cfg.output_dir, group, layer)
            shape = (rows, *plan.row_shape(layer))
            state, needed = _what_is_there(cfg, plan, group, layer)
            missing += needed
            beside += _beside_bytes(cfg, plan, group, layer)
            lines.append(f"{path}  {shape} {cfg.store_dtype}  {size}  {state}")
    data = data_bytes(cfg, plan)
    lines.append(
        f"disk needed: {format_bytes(data)} ({data} bytes): the .npy files, their headers included"
    )
    lines.append(
        f"beside them: up to about {format_bytes(beside)}, of journals while it runs, then of index "
        "and manifest"
    )
    lines.append(f"still to be allotted, journals and index included: {format_bytes(missing)}")
    return "\n".join(lines)


def data_bytes(cfg: ExtractConfig, plan: ExtractPlan) -> int:
    """Bytes of all finished .npy files of ``plan``, headers included."""
    return sum(
        _shard_spec(cfg, plan, group, layer, "", {}).nbytes
        for group in plan.groups
        for layer in plan.layouts
    )


def _beside_bytes(cfg: ExtractConfig, plan: ExtractPlan, group: Group, layer: str) -> int:
    """What the store reckons for its other files: its need at a place where nothing is yet."""
    spec = _shard_spec(cfg, plan, group, layer, "", {})
    nowhere = replace(spec, path=spec.path.with_name(".not-there.npy"))
    return space_needed(nowhere) - spec.nbytes


def _what_is_there(
    cfg: ExtractConfig, plan: ExtractPlan, group: Group, layer: str
) -> tuple[str, int]:
    """The state of one store in words, and the bytes that it still takes."""
    path = plan.path(cfg.output_dir, group, layer)
    try:
        facts = describe(path)
    except MissingInput:
        facts = {}
    except StoreError as error:
        return f"there, and unusable: {error}", 0
    weights = facts.get("identity", {}).get("weights_sha256", "")
    spec = _shard_spec(cfg, plan, group, layer, weights, {})
    refused = refusal(spec)
    if refused and not cfg.overwrite:
        return f"REFUSED: {refused}", 0
    if not facts:
        state = "new"
    elif refused:
        state = "there, will be replaced"
    elif facts["state"] == "sealed":
        changed = changed_images(path, group)
        state = f"finished, but {len(changed)} image(s) changed since" if changed else "finished"
    else:
        state = f"{facts['rows_done']} of {facts['shape'][0]} rows done, will be resumed"
    return state, space_needed(spec)


def require_room(cfg: ExtractConfig, plan: ExtractPlan) -> None:
    """All stores that are not there yet must fit, before the first byte is written."""
    need = 0
    for group in plan.groups:
        for layer in plan.layouts:
            path = plan.path(cfg.output_dir, group, layer)
            begun = path.with_name(path.name + ".partial")
            if not path.exists() and not begun.exists():
                need += len(group.paths) * plan.row_bytes(layer)
    require_space({cfg.output_dir: need})


def open_shards(
    cfg: ExtractConfig, plan: ExtractPlan, described: Described, run_id: str, stack: ExitStack
) -> dict[str, dict[str, ShardRun]]:
    shards: dict[str, dict[str, ShardRun]] = {group.key: {} for group in plan.groups}
    for group in plan.groups:
        for layer in plan.layouts:
            spec = _shard_spec(cfg, plan, group, layer, described.weights_sha256, asdict(described))
            shards[group.key][layer] = stack.enter_context(
                _open_shard(spec, group, run_id, overwrite=cfg.overwrite)
            )
    return shards


def _open_shard(spec: ShardSpec, group: Group, run_id: str, *, overwrite: bool) -> ShardRun:
    """The shard new, resumed, or finished from just these images."""
    run = open_for_writing(spec, run_id=run_id, overwrite=overwrite)
    changed = changed_images(spec.path, group) if run.sealed else []
    if not changed:
        return run
    run.close()
    if not overwrite:
        raise changed_error(spec.path, changed)
    discard_store(spec.path)
    return open_for_writing(spec, run_id=run_id)


def _shard_spec(
    cfg: ExtractConfig,
    plan: ExtractPlan,
    group: Group,
    layer: str,
    weights_sha256: str,
    described: Mapping[str, object],
) -> ShardSpec:
    return ShardSpec(
        path=plan.path(cfg.output_dir, group, layer),
        rows=len(group.paths),
        row_shape=plan.row_shape(layer),
        dtype=cfg.store_dtype,
        names=group.names,
        grid=cfg.batch_size,
        identity=feature_identity(cfg, plan.spec, layer, weights_sha256, plan.hw),
        token_layout=plan.layouts[layer].describe(),
        provenance={**run_record(cfg), **described},
    )


def seal(runs: Mapping[str, ShardRun], group: Group) -> None:
    for run in runs.values():
        if run.sealed:
            continue
        resumed = run.progress.rows_kept > 0
        path = run.seal()
        changed = changed_images(path, group) if resumed else []
        if changed:
            raise changed_error(path, changed)


def bad_images(plan: ExtractPlan, cfg: ExtractConfig) -> list[tuple[str, str, str]]:
    """(group, image, reason) of every invalid row, those of earlier runs too."""
    layer = next(iter(plan.layouts))
    return [
        (group.key, name, reason)
        for group in plan.groups
        for name, reason in bad_rows(plan.path(cfg.output_dir, group, layer))
    ]
