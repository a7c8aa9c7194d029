"""What ``--fit-gpu`` comes to for a task: the planner's choice, of micro batches that its model bears.

Smaller micro batches leave other remainders: three rows in twos are a two and a one, and batch norm on
maps of one pixel has no statistics of a single row. The rule is ``cut``'s. The model itself is asked, by
``trial``, only where a choice would break it: with one row, which that choice has room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from raypipe.errors import ConfigError
from raypipe.memory.guard import relieve
from raypipe.stream.plan import StreamPlan
from raypipe.stream.reading import OpenRows
from raypipe.train import rng
from raypipe.train.checkpoint import Found
from raypipe.train.config import TrainConfig
from raypipe.train.context import WorkerContext
from raypipe.train.cut import Cut
from raypipe.train.feed import plan_from
from raypipe.train.planner import Choice, Plan, predict, save_plan
from raypipe.train.precision import prepare
from raypipe.train.result import Progress
from raypipe.train.task import Task
from raypipe.train.techniques import Amp
from raypipe.train.trial import has_batch_norm, least_rows


@dataclass(frozen=True)
class Planned:
    """The options to train with, and what the table says of them."""

    cfg: TrainConfig
    lines: list[str]


def plan_for(task: Task, cfg: TrainConfig, ctx: WorkerContext, found: Found | None) -> Planned:
    """Measured on rank 0, before the model is there, and the same on every rank.

    A run that goes on from ``found`` keeps its arithmetic. Raises as `foretold`.
    """
    done = found is not None and Progress(**found.meta["progress"]).is_over(cfg)
    on_cuda = ctx.torch_device.type == "cuda"
    wanted = on_cuda if cfg.predict_memory is None else cfg.predict_memory
    if done or (cfg.fit_gpu is None and not wanted):
        return Planned(cfg, [])

    def look() -> Planned:
        plan, choice = foretold(task, cfg, ctx.torch_device, ctx.world, found, ctx.open_rows)
        save_plan(ctx.run_dir, plan, choice)
        return _planned(plan, choice)

    planned: Planned = ctx.on_main(look)
    return planned


def plan_here(
    task: Task, cfg: TrainConfig, device: torch.device, world: int, found: Found | None
) -> Planned:
    """`plan_for` before there are workers, for a dry run on this machine's own device."""
    return _planned(*foretold(task, cfg, device, world, found))


def foretold(
    task: Task,
    cfg: TrainConfig,
    device: torch.device,
    world: int,
    found: Found | None,
    open_rows: OpenRows | None = None,
) -> tuple[Plan, Choice | None]:
    """What steps take, and what is chosen under ``cfg.fit_gpu``, where there is one.

    Raises MemoryBudgetExceeded where nothing fits it, ConfigError for a checkpoint of another run.
    """
    plan = predict(task, cfg, device, world, open_rows)
    if cfg.fit_gpu_bytes is None:
        return plan, None
    kept = found.meta["stream"]["recipe"]["amp"] if found else None
    steps = plan_from(task.train_rows, cfg, world, found)
    return plan, choose(plan, task, steps, cfg.fit_gpu_bytes, amp=kept, open_rows=open_rows)


def choose(
    plan: Plan,
    task: Task,
    steps: StreamPlan,
    budget_bytes: int,
    *,
    amp: Amp | None = None,
    open_rows: OpenRows | None = None,
) -> Choice:
    """`Plan.choose` among the micro batches into which ``steps`` can be cut for the task's model."""
    choice = plan.choose(budget_bytes, amp=amp)
    may_go_in_step = plan.asked.sync_batch_norm and plan.world > 1
    if _bears(plan.world, steps, 2, may_go_in_step, choice.cfg.batch_size):
        return choice
    least, in_step = _asked(task, choice.cfg, plan, open_rows)
    bears = partial(_bears, plan.world, steps, least, in_step)
    if bears(choice.cfg.batch_size) or not any(map(bears, plan.sizes)):
        return choice  # what no other size would mend is refused before training, and told there
    return plan.choose(budget_bytes, amp=amp, bears=bears)


def _bears(world: int, steps: StreamPlan, least: int, in_step: bool, rows: int) -> bool:
    try:
        Cut(batch_size=rows, world=world, in_step=in_step, least=least).check(steps)
    except ConfigError:
        return False
    return True


def _asked(
    task: Task, cfg: TrainConfig, plan: Plan, open_rows: OpenRows | None
) -> tuple[int, bool]:
    """Rows that the model needs at once, and whether all workers must go in step."""
    device = torch.device(plan.device)
    ctx = WorkerContext(run_dir=Path(), device=plan.device, open_rows=open_rows)
    try:
        with rng.preserved(device):
            return _by_its_model(task, cfg, ctx, plan.world)
    finally:
        if device.type == "cuda":
            relieve()  # of the model too, which has gone with its function


def _by_its_model(task: Task, cfg: TrainConfig, ctx: WorkerContext, world: int) -> tuple[int, bool]:
    module = task.build_model()
    if cfg.sync_batch_norm and world > 1 and has_batch_norm(module):
        return 1, True  # statistics are of all workers' rows: two at least
    blocks = task.checkpoint_blocks(module) if cfg.checkpointing else ()
    return least_rows(task, cfg, ctx, prepare(module, blocks, cfg, ctx)), False


def _planned(plan: Plan, choice: Choice | None) -> Planned:
    lines = plan.lines(choice.cfg if choice else None)
    if choice is None:
        return Planned(plan.asked, lines)
    return Planned(choice.cfg, [*lines, choice.words(plan.asked)])
