"""What a few real rows show of a model before its first step: which parameters the loss never
reaches, and whether one row is enough for its batch norm.

A trial leaves nothing behind: gradients, buffers and generators are as before. It runs the prepared
model without DDP, because DDP is what has to know: it waits at the second step for a gradient that
does not come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from raypipe.memory import guard
from raypipe.stream import Gatherer
from raypipe.train import rng
from raypipe.train.config import TrainConfig
from raypipe.train.context import WorkerContext
from raypipe.train.cut import Cut
from raypipe.train.limit import is_out_of_memory
from raypipe.train.task import Task, check_per_row

if TYPE_CHECKING:
    from raypipe.train.precision import Prepared

# torch's words of a batch norm that sees one number a channel.
_ONE_VALUE = "more than 1 value per channel"


def unreached(
    task: Task,
    cfg: TrainConfig,
    ctx: WorkerContext,
    prepared: Prepared,
    batch_limit: int | None = None,
) -> tuple[str, ...]:
    """Names of the trainable parameters that get no gradient, on any rank; the same on all.

    A weight of a branch that these rows do not take is among them: it may get one later.
    batch_limit : rows computed at once, where a worker before this one was ended for its memory
    """
    limit = min(cfg.batch_size, batch_limit or cfg.batch_size)
    # Two rows where a micro batch has as many: batch norm may need them.
    n = min(2, limit)
    guard.note(batch=limit, phase="train")  # whoever is ended here begins anew with half of it
    # Read before anything is computed: SyncBN's forward waits for all ranks.
    batch = ctx.together(lambda: prepared.place(_first_rows(task, ctx, n)))

    def look() -> list[str]:
        with _unchanged(prepared.module, ctx), _eager(cfg):
            try:
                with prepared.autocast():
                    loss = task.loss(prepared.module, batch)
            except ValueError as error:
                if n > 1 or _ONE_VALUE not in str(error):
                    raise
                return []  # one row is too few for this model: `Cut.check` says so
            check_per_row(loss, n).float().sum().backward()
            named = prepared.module.named_parameters()
            return [name for name, p in named if p.requires_grad and p.grad is None]

    of_all = ctx.collect(ctx.together(look))
    return tuple(sorted({name for names in of_all for name in names}))


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any of its parts takes statistics over a batch."""
    norms = nn.modules.batchnorm._BatchNorm
    return any(isinstance(part, norms) for part in module.modules())


def least_rows(task: Task, cfg: TrainConfig, ctx: WorkerContext, prepared: Prepared) -> int:
    """Rows that a micro batch needs: 2 where batch norm sees maps of one pixel, else 1."""
    if not has_batch_norm(prepared.module):
        return 1

    batch = ctx.together(lambda: prepared.place(_first_rows(task, ctx, 1)))

    def look() -> int:
        with _unchanged(prepared.module, ctx), _eager(cfg):
            try:
                with prepared.autocast():
                    task.loss(prepared.module, batch)
            except (ValueError, RuntimeError, IndexError, TypeError, AssertionError) as error:
                if is_out_of_memory(error):
                    raise
                return 2  # not with one row; what fails with more as well, the first step tells
        return 1

    return max(ctx.collect(ctx.together(look)))


def cut_for(task: Task, cfg: TrainConfig, ctx: WorkerContext, prepared: Prepared) -> Cut:
    """How steps have to be cut for this model."""
    least = least_rows(task, cfg, ctx, prepared)
    in_step = prepared.synced_norms > 0
    return Cut(batch_size=cfg.batch_size, world=ctx.world, in_step=in_step, least=least)


def _first_rows(task: Task, ctx: WorkerContext, n: int) -> dict[str, Tensor]:
    """The first ``n`` rows of training (the same again where there are fewer)."""
    rows = np.resize(np.asarray(task.train_rows[:n]), n)
    device, opener = ctx.torch_device, ctx.open_rows
    with Gatherer(task.sources(), n, device, depth=2, open_rows=opener) as gatherer:
        return {
            name: tensor.clone()
            for batch in gatherer.batches([rows])
            for name, tensor in batch.items()
        }


@contextmanager
def _unchanged(module: nn.Module, ctx: WorkerContext) -> Iterator[None]:
    before = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        with rng.preserved(ctx.torch_device):
            yield
    finally:
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _eager(cfg: TrainConfig) -> AbstractContextManager[object]:
    """A compiled model as it was written: else a graph would be made for this one batch."""
    if not cfg.compile:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
