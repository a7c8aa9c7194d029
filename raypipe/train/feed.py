"""From the plan's slices to gathered micro batches, in step with each other.

A slice is one rank's part of one optimiser step; it is computed in micro batches of at most
``batch_size`` rows. The plan itself is `raypipe.stream`'s; this module fixes the one number that it
needs from training: rows a step, which a resumed run takes from its checkpoint, so that it goes on
with the same steps on another number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from raypipe.errors import ConfigError, WorkerFailed
from raypipe.stream import Cursor, Gatherer, StepSlice, StreamPlan, split_micro
from raypipe.stream.reading import Source
from raypipe.stream.rows import ComputedRows
from raypipe.train import checkpoint
from raypipe.train.config import TrainConfig
from raypipe.train.cut import Cut, n_pieces
from raypipe.train.task import Task


@dataclass(frozen=True, eq=False)
class Micro:
    """One micro batch of a step: ``rows`` (b,) int64, ``counted`` of them (all, or none).

    A rank that was dealt no row of a small step still takes part, with one row that counts nothing:
    the others' gradients wait for it. (Not under SyncBN, see ``cut``.) ``widest``: rows of the
    largest micro batch that any rank computes meanwhile, where the ranks go in step.
    """

    cursor: Cursor
    global_rows: int
    rows: np.ndarray
    counted: int
    last: bool
    widest: int | None = None


def training_plan(
    train_rows: np.ndarray | range | ComputedRows,
    cfg: TrainConfig,
    world: int,
    run_dir: Path | None = None,
) -> StreamPlan:
    """The stream of a run: ``cfg``'s, or that of the checkpoint in ``run_dir`` which it resumes.

    Every feeder (`raypipe.runner`, Ray Data) and `fit` itself build it by this function. Raises
    ConfigError when the checkpoint's steps are not what ``cfg`` would make of its workers, or
    its training rows are others; StoreCorrupt when no checkpoint in ``run_dir`` is whole.
    """
    found = checkpoint.newest(run_dir) if run_dir else None
    return plan_from(train_rows, cfg, world, found)


def plan_from(
    train_rows: np.ndarray | range | ComputedRows,
    cfg: TrainConfig,
    world: int,
    found: checkpoint.Found | None,
) -> StreamPlan:
    """`training_plan` for a checkpoint that is already chosen (None: a fresh run).

    A range of rows stays one, as other computed rows do: they are computed when a step needs them.
    """
    if found is None:
        return _plan(train_rows, cfg, cfg.rows_per_step(world))
    rows_per_step = _recorded_rows_per_step(found, cfg, world)
    plan = _plan(train_rows, cfg, rows_per_step)
    check_same_run(found, plan, cfg)
    return plan


def _plan(
    train_rows: np.ndarray | range | ComputedRows, cfg: TrainConfig, rows_per_step: int
) -> StreamPlan:
    return StreamPlan(train_rows, cfg.seed, rows_per_step, cfg.epochs, cfg.shuffle_window)


def stream_record(
    plan: StreamPlan,
    cfg: TrainConfig,
    world: int,
    found: checkpoint.Found | None,
    fingerprints: Mapping[str, str],
) -> dict[str, object]:
    """What a checkpoint notes of its stream, for `training_plan` and `check_same_sources`.

    ``world`` stays the number of workers that the run began with: rows_per_step was made from it.
    """
    return {
        "n_rows": int(plan.rows.size),
        "rows_sha256": plan.rows_digest,
        "rows_per_step": plan.rows_per_step,
        "world": found.meta["stream"]["world"] if found else world,
        "recipe": cfg.recipe(),
        "sources": dict(fingerprints),
    }


def source_fingerprints(sources: Mapping[str, Source]) -> dict[str, str]:
    """What each source says of its content, by name; those that say nothing are left out."""
    return {name: source.fingerprint for name, source in sources.items() if source.fingerprint}


def check_same_run(found: checkpoint.Found, plan: StreamPlan, cfg: TrainConfig) -> None:
    """Raise ConfigError when ``found`` was written under another recipe or other training rows, or
    has more epochs done than are asked for.
    """
    stream = found.meta["stream"]
    old, new = dict(stream["recipe"]), cfg.recipe()
    if cfg.fit_gpu is not None and cfg.amp == "off":
        new["amp"] = old["amp"]  # chosen by the planner then, and kept by it now
    differing = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    if differing:
        pairs = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in differing)
        raise ConfigError(f"{found.path} was trained with other options ({pairs}); {_NEXT}")
    done = found.meta["progress"]["epoch"]
    if done > plan.epochs:
        raise ConfigError(
            f"{found.path} has {done} epochs done, --epochs {plan.epochs} is fewer; give {done} or "
            "more to go on, or a new run folder (or --no-resume) to start over"
        )
    if stream["rows_sha256"] != plan.rows_digest:
        raise ConfigError(
            f"{found.path} was trained on other rows ({stream['n_rows']} then, "
            f"{plan.rows.size} now); {_NEXT}"
        )


def check_resumable(task: Task, cfg: TrainConfig, world: int, run_dir: Path) -> None:
    """Raise what `fit` would of a checkpoint in ``run_dir``, before anything is written there."""
    found = checkpoint.newest(run_dir)
    if found:
        plan_from(task.train_rows, cfg, world, found)
        check_same_sources(found, source_fingerprints(task.sources()))


def check_same_sources(found: checkpoint.Found, fingerprints: Mapping[str, str]) -> None:
    """Raise ConfigError, naming them, when sources of the checkpoint's run held something else."""
    known: Mapping[str, str] = found.meta["stream"].get("sources", {})
    differing = [name for name in known if fingerprints.get(name, known[name]) != known[name]]
    if differing:
        raise ConfigError(
            f"{found.path} was trained on other {', '.join(sorted(differing))} than are given now; "
            "put back what it was trained on, or start over: a new run folder, or --no-resume"
        )


def check_place(micro: Micro, plan: StreamPlan, at: Cursor, rank: int) -> None:
    """Raise WorkerFailed when the feeder's slice is not the plan's next one, ``at``."""
    if micro.cursor != at or micro.global_rows != plan.step_size(at.step):
        raise WorkerFailed(
            f"the stream of rank {rank} gave epoch {micro.cursor.epoch} step "
            f"{micro.cursor.step} ({micro.global_rows} rows); the plan's next is epoch "
            f"{at.epoch} step {at.step} ({plan.step_size(at.step)} rows)"
        )


def in_pieces(
    micro: Micro, batch: Mapping[str, Tensor], limit: int, least: int = 1
) -> Iterator[tuple[Micro, dict[str, Tensor]]]:
    """A gathered micro batch in views of at most ``limit`` rows, of sizes that differ by at most 1.

    Cut here, not where rows are chosen: batches are read ahead, and a limit holds from now on.
    ``least``: see `raypipe.train.cut`, which says where a piece is a row above the limit.
    """
    n = len(micro.rows)
    pieces = split_micro(n, n_pieces(n, limit, least=least, widest=micro.widest))
    for index, piece in enumerate(pieces):
        rows = micro.rows[piece]
        last = micro.last and index == len(pieces) - 1
        counted = len(rows) if micro.counted else 0
        part = replace(micro, rows=rows, counted=counted, last=last)
        yield part, {name: tensor[piece] for name, tensor in batch.items()}


def micro_batches(slices: Iterable[StepSlice], cut: Cut, idle_row: int) -> Iterator[Micro]:
    """Each slice in ``cut``'s micro batches."""
    for part in slices:
        n = len(part.rows)
        if n == 0:
            idle = np.array([idle_row], dtype=np.int64)
            yield Micro(part.cursor, part.global_rows, idle, 0, True)
            continue
        pieces, widest = cut.micros(n, part.global_rows), cut.widest(part.global_rows)
        for index, piece in enumerate(pieces):
            rows, last = part.rows[piece], index == len(pieces) - 1
            largest = widest[index] if cut.in_step else None
            yield Micro(part.cursor, part.global_rows, rows, len(rows), last, largest)


def gathered(
    gatherer: Gatherer, micros: Iterable[Micro], stride: int = 0
) -> Generator[tuple[Micro, dict[str, Tensor]], None, None]:
    """Each micro batch with its tensors, which are valid until the next one is asked for.

    stride : see `raypipe.train.task.epoch_stride`.
    """
    waiting: deque[Micro] = deque()

    def rows() -> Iterator[np.ndarray]:
        for micro in micros:
            waiting.append(micro)
            yield micro.rows + stride * micro.cursor.epoch

    with closing(gatherer.batches(rows())) as batches:
        for batch in batches:
            yield waiting.popleft(), batch


def _recorded_rows_per_step(found: checkpoint.Found, cfg: TrainConfig, world: int) -> int:
    """The checkpoint's rows a step, if ``cfg`` makes the same of the first world or of this one."""
    recorded, first = (int(found.meta["stream"][key]) for key in ("rows_per_step", "world"))
    if recorded not in (cfg.rows_per_step(first), cfg.rows_per_step(world)):
        raise ConfigError(
            f"{found.path} takes {recorded} rows a step, batch_size {cfg.batch_size} x accumulate "
            f"{cfg.accumulate} on {first} workers make {cfg.rows_per_step(first)}; {_NEXT}"
        )
    return recorded


_NEXT = "resume with the run's own options, or start over: a new run folder, or --no-resume"
