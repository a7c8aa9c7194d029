"""A model with its optimiser, and what one step does to them: the arithmetic of training.

One optimiser step over W workers and M micro batches each, R rows in all:
    each micro batch:  backward of sum(per-row losses) * W / R   (DDP then averages over W)
    then:              unscale, clip, AdamW, rescale, average the weights (``ema``)
so that the gradient is that of the mean over all R rows, however they are dealt.

Which rows, when to save and when to stop is ``loop``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raypipe.errors import ConfigError, WorkerFailed
from raypipe.stream import Gatherer, deal
from raypipe.train import rng
from raypipe.train.checkpoint import Found
from raypipe.train.config import TrainConfig
from raypipe.train.context import WorkerContext
from raypipe.train.ema import WeightAverage
from raypipe.train.feed import Micro
from raypipe.train.limit import BatchLimit
from raypipe.train.precision import prepare
from raypipe.train.task import Task, check_per_row
from raypipe.train.trial import unreached


@dataclass(frozen=True)
class StepNotes:
    """What an optimiser step tells beside its loss; ``grad_norm`` is before clipping, on device."""

    grad_norm: Tensor | None
    scale: float | None
    skipped: bool


class Engine:
    """``task``'s model on this worker, its AdamW and its loss scaler."""

    def __init__(
        self,
        task: Task,
        cfg: TrainConfig,
        ctx: WorkerContext,
        made: Callable[[nn.Module], None] = lambda module: None,
        batch_limit: int | None = None,
    ) -> None:
        """made : called with the prepared model before anything else holds its tensors.
        batch_limit : rows computed at once, where memory allows no more.
        """
        self.task, self.cfg, self.ctx = task, cfg, ctx
        rng.seed_all(cfg.seed)  # the same weights on every rank
        module = task.build_model()
        blocks = task.checkpoint_blocks(module) if cfg.checkpointing else ()
        self.prepared = prepare(
            module,
            blocks,
            cfg,
            ctx,
            lambda prepared: unreached(task, cfg, ctx, prepared, batch_limit),
        )
        self.module = self.prepared.module
        made(self.module)
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        if not trainable:
            raise ConfigError("the task's model has no parameter to train")
        self.trainable = trainable
        self.optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, weight_decay=cfg.weight_decay)
        averaged = cfg.ema_decay is not None
        self.buffers = _StepBuffers(self.module)
        self.average = WeightAverage(self.module, cfg.ema_decay or 0.0) if averaged else None
        rng.seed_all(cfg.seed, 1 + ctx.rank)  # dropout: another draw on every rank
        self.note_whole()

    def note_whole(self) -> None:
        """Called between two steps: torch's generators are noted, so that a checkpoint from the middle of
        the next step goes on from here. ``moved`` is set as soon as that step may have changed weights.
        """
        self.moved, self._drawn = False, rng.torch_state(self.ctx.torch_device)

    def backward(self, micro: Micro, batch: dict[str, Tensor]) -> Tensor:
        """Add the micro batch's gradient; the sum of its rows' losses, float32 on device."""
        self.buffers.begin()
        with self.prepared.sync(micro.last):
            with self.prepared.autocast():
                loss = self.task.loss(self.prepared.model, self.prepared.place(batch))
            total = check_per_row(loss, len(micro.rows)).float().sum()
            if micro.counted == 0:
                total = total * 0.0
            share = total * (self.ctx.world / micro.global_rows)
            self.prepared.scaler.scale(share).backward()
        return total.detach()

    def update(self, lr: float) -> StepNotes:
        """Clip, step and clear; under fp16 the scaler skips a step whose gradient overflowed."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scaler = self.prepared.scaler
        grad_norm = None
        if self.cfg.clip_norm is not None:
            scaler.unscale_(self.optimizer)  # the norm of the true gradient, not the scaled one
            grad_norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.cfg.clip_norm)
        before = scaler.get_scale() if scaler.is_enabled() else None
        self.moved = True
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.done()
        skipped = before is not None and scaler.get_scale() < before
        if self.average is not None and not skipped:
            self.average.update()
        return StepNotes(grad_norm, before, skipped)

    def clear(self) -> None:
        """Drop what a step that starts over has done: gradients, and moved batch-norm statistics."""
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.undo()

    def validate(self, gatherer: Gatherer, limit: BatchLimit) -> dict[str, float]:
        """The task's metrics over all validation rows of all workers, on every rank.

        Of the averaged weights, where there are any. Raises MemoryBudgetExceeded on every rank when one
        row at once is too many for one of them.
        """
        self.module.eval()
        try:
            with torch.no_grad(), self._judged():
                self._share_buffers()
                sums = self.ctx.together(
                    lambda: limit.retry(lambda: self._val_sums(gatherer, limit.rows))
                )
        finally:
            self.module.train()
        for key in sorted(sums):
            self.ctx.add_up(sums[key])
        metrics = self.task.val_metrics({key: total.cpu() for key, total in sums.items()})
        if "val_loss" not in metrics:
            raise ConfigError(f"the task's metrics {sorted(metrics)} hold no val_loss")
        return {key: float(value) for key, value in metrics.items()}

    def val_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The task's sums over one batch, float64."""
        with self.prepared.autocast():
            sums = self.task.val_sums(self.module, self.prepared.place(batch))
        return {key: value.detach().double() for key, value in sums.items()}

    def _val_sums(self, gatherer: Gatherer, batch_rows: int) -> dict[str, Tensor]:
        rows = self.task.val_rows
        part = deal(len(rows), self.ctx.rank, self.ctx.world)
        mine = part.stop - part.start
        # A rank without rows computes one that does not count, to know the sums' names and sizes.
        first, used = (part.start, mine) if mine else (0, 1)
        count = -(-used // batch_rows)
        cuts = (deal(used, index, count) for index in range(count))  # rows as they are needed
        pieces = (rows[first + cut.start : first + cut.stop] for cut in cuts)
        sums: dict[str, Tensor] = {}
        with closing(gatherer.batches(pieces)) as batches:
            for batch in batches:
                for key, value in self.val_batch(batch).items():
                    sums[key] = sums[key] + value if key in sums else value.clone()
        return sums if mine else {key: torch.zeros_like(v) for key, v in sums.items()}

    def _judged(self) -> AbstractContextManager[None]:
        """The module with the weights that are validated, and kept where they are the best."""
        return nullcontext() if self.average is None else self.average.applied()

    def _share_buffers(self) -> None:
        """Rank 0's buffers everywhere: batch-norm statistics drift apart between forwards."""
        if self.ctx.world > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def model_state(self) -> dict[str, Tensor]:
        """The bare module's state_dict, on the CPU; it shares memory with a model that is there."""
        return {key: value.detach().cpu() for key, value in self.module.state_dict().items()}

    def judged_state(self) -> dict[str, Tensor]:
        """`model_state` of the weights that were validated; it shares memory with them."""
        with self._judged():
            return self.model_state()

    def training_state(self, *, alone: bool = False) -> dict[str, Any]:
        """All else that resuming needs; collective, because each rank has its own generators, unless
        this rank has to do ``alone``. torch's generators are those of the last `note_whole`.
        """
        own = rng.capture(self.ctx.torch_device) | self._drawn
        states = [None] * self.ctx.rank + [own] if alone else self.ctx.collect(own)
        scaler = self.prepared.scaler.state_dict()
        state = {"optimizer": self.optimizer.state_dict(), "scaler": scaler, "rng": states}
        return state if self.average is None else state | {"average": self.average.state_dict()}

    def load(self, found: Found) -> None:
        """Go on from a checkpoint. Raises ConfigError when it is of another model."""
        try:
            self.module.load_state_dict(found.load("model"))
            state = found.load("state")
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"{found.path} does not fit this model ({reason}); train it in a new run folder"
            ) from error
        if state["scaler"]:
            self.prepared.scaler.load_state_dict(state["scaler"])
        states = state["rng"]
        own = states[self.ctx.rank] if self.ctx.rank < len(states) else None
        if own is not None:  # a rank that is new, or of which nothing was saved, keeps its own seed
            rng.restore(own, self.ctx.torch_device)
        self.note_whole()


class _StepBuffers:
    """``module``'s buffers as they were before the step that is under way."""

    def __init__(self, module: nn.Module) -> None:
        self._live = list(module.buffers())
        self._before = [buffer.detach().clone() for buffer in self._live]
        self._in_step = False

    def begin(self) -> None:
        """Before each micro batch: the first one of a step notes what is there."""
        if not self._in_step and self._live:
            torch._foreach_copy_(self._before, self._live)
        self._in_step = True

    def done(self) -> None:
        """The step's end: what it moved stays."""
        self._in_step = False

    def undo(self) -> None:
        """Put back what was there, if a step is under way."""
        if self._in_step and self._live:
            torch._foreach_copy_(self._live, self._before)
        self._in_step = False


def check_finite(loss: float, where: str, cfg: TrainConfig) -> None:
    """Raise WorkerFailed when a loss is NaN or infinite: nothing learnt after it can be trusted."""
    if loss != loss or loss in (float("inf"), float("-inf")):
        advice = "lower lr" if cfg.amp == "off" else f"lower lr, or train without amp {cfg.amp}"
        raise WorkerFailed(f"the loss is {loss} at {where}; {advice}, or look for NaN in the data")
