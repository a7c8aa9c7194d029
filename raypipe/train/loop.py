"""The training loop: steps in the plan's order, validation after each epoch, checkpoints, stopping.

Runs the same in one process and in each of many (DDP). It takes its rows as `StepSlice`s from
whoever feeds it, a local plan or Ray Data, and checks that they are the plan's: the right step, and
over all ranks the right number of rows. Arithmetic is ``engine``'s, what a step came to ``numbers``',
files are ``saving``'s and ``checkpoint``'s, how many rows are computed at once is ``limit``'s, what
that takes is foretold by ``planner``, and what is kept where it is too much is ``rescue``'s.

The test split has no way in here: the best epoch is the one of lowest ``val_loss``, or of lowest
``epoch_cost`` where the task has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial

import torch
from torch import Tensor

from raypipe.errors import ConfigError, MemoryBudgetExceeded, WorkerFailed
from raypipe.memory import guard
from raypipe.stream import Cursor, Gatherer, StepSlice
from raypipe.stream.gather import ring_bytes
from raypipe.stream.reading import Source
from raypipe.train import checkpoint, limit, rng
from raypipe.train.choose import Planned, plan_for
from raypipe.train.config import TrainConfig
from raypipe.train.context import WorkerContext
from raypipe.train.engine import Engine, check_finite
from raypipe.train.feed import (
    Micro,
    check_place,
    check_same_sources,
    gathered,
    in_pieces,
    micro_batches,
    plan_from,
    source_fingerprints,
    stream_record,
)
from raypipe.train.metrics import METRICS_FILE, MetricsLog, plain
from raypipe.train.numbers import StepNumbers
from raypipe.train.planner import device_budget
from raypipe.train.precision import format_table, settings_table, use_device
from raypipe.train.rescue import Rescue
from raypipe.train.result import FitResult, Progress
from raypipe.train.saving import Saver, begin, log_fields
from raypipe.train.schedule import learning_rate
from raypipe.train.task import Task, epoch_cost, epoch_stride
from raypipe.train.trial import cut_for

# One batch in use, one being read. Not more: feeders may block at the start of an epoch until all
# ranks ask for it (Ray Data), and a rank that looked two batches ahead could ask, and wait, before
# a step whose gradients the others wait for.
_DEPTH = 2


def buffer_bytes(sources: Mapping[str, Source], batch_size: int) -> int:
    """Host bytes of the batches that `fit` gathers ahead: a ring to train, one to validate."""
    return 2 * ring_bytes(sources, batch_size, _DEPTH)


def fit(
    task: Task,
    cfg: TrainConfig,
    ctx: WorkerContext,
    slices: Callable[[Cursor], Iterator[StepSlice]],
    *,
    resume: bool = True,
    batch_limit: int | None = None,
) -> FitResult:
    """Train ``task`` on this worker, together with the others of ``ctx``, which call the same.

    ``slices(cursor)`` is called once and gives this rank's slices of `training_plan` from that
    cursor to the end. ``resume`` goes on from RUN/last where there is one; False removes what the
    run folder holds of an earlier run. ``batch_limit``: rows computed at once, where a worker before
    this one was ended for its memory. Raises ConfigError, StoreCorrupt (no whole checkpoint),
    NoSpace, DeviceUnavailable, WorkerFailed (loss not finite; rows missing from the stream),
    MemoryBudgetExceeded (nothing fits ``cfg.fit_gpu``; one row at once is too many).
    """
    ctx.check_group()
    use_device(ctx.torch_device, cfg)
    if len(task.val_rows) == 0:
        raise ConfigError("no validation rows: the best epoch is chosen on them; hold some out")
    try:
        with rng.preserved(ctx.torch_device):
            found = begin(ctx, resume)
            planned = plan_for(task, cfg, ctx, found)
            with device_budget(ctx.torch_device, cfg.fit_gpu_bytes):
                return _Fit(task, planned, ctx, found, batch_limit).run(slices)
    except RuntimeError as error:
        if not limit.is_out_of_memory(error):
            raise
        raise limit.out_of_memory(
            limit.short(error), "not in a micro batch, which could be halved"
        ) from error


class _Fit:
    """One call of `fit`, from its start or checkpoint to its end."""

    def __init__(
        self,
        task: Task,
        planned: Planned,
        ctx: WorkerContext,
        found: checkpoint.Found | None,
        batch_limit: int | None,
    ) -> None:
        cfg = planned.cfg
        self.task, self.cfg, self.ctx, self.planned = task, cfg, ctx, planned
        self.started, self.stride = ctx.clock(), epoch_stride(task)
        self.plan = plan_from(task.train_rows, cfg, ctx.world, found)
        made_of = ctx.together(lambda: source_fingerprints(task.sources()))
        if found:
            ctx.together(lambda: check_same_sources(found, made_of))
        self.engine = Engine(task, cfg, ctx, batch_limit=batch_limit)
        self.cut = cut_for(task, cfg, ctx, self.engine.prepared)
        self.cut.check(self.plan)
        self.progress = Progress()
        self.stream = stream_record(self.plan, cfg, ctx.world, found, made_of)
        self.found, self.batch_limit = found, batch_limit
        if found:
            self.engine.load(found)
            self.progress = Progress(**found.meta["progress"])
        self.earlier_seconds = self.progress.seconds
        self.exhausted: MemoryBudgetExceeded | None = None
        self.step_micros: list[Micro] = []
        self._start_step()

    def run(self, slices: Callable[[Cursor], Iterator[StepSlice]]) -> FitResult:
        """Do the steps that are left."""
        log_path = self.ctx.run_dir / METRICS_FILE if self.ctx.is_main else None
        self._announce()
        self.limit = limit.BatchLimit(self.cfg.batch_size, self.batch_limit, self.ctx)
        with MetricsLog(log_path, *log_fields(self.found)) as self.log, ExitStack() as stack:
            self._keep_books()
            if not self.progress.is_over(self.cfg):
                train, self.val = self.ctx.together(lambda: self._open(stack))
                steps = slices(self.progress.cursor)
                done, failure = limit.attempt(lambda: self._steps(steps, train))
                if done is None:
                    raise self.rescue.elsewhere(failure)
        return self._result()

    def _keep_books(self) -> None:
        cfg, ctx, progress, log = self.cfg, self.ctx, self.progress, self.log
        self.numbers = StepNumbers(cfg, ctx, progress, log, self._seconds)
        self.saver = Saver(
            cfg, ctx, self.engine, progress, log,
            stream=self.stream, started=self.started, seconds=self._seconds,
        )  # fmt: skip
        self.rescue = Rescue(ctx, self.engine, progress, self.numbers, self.saver)

    def _open(self, stack: ExitStack) -> tuple[Gatherer, Gatherer]:
        """For training, and for validation: one ring has a batch of the next epoch in it by then."""
        what = (self.task.sources(), self.cfg.batch_size, self.ctx.torch_device, _DEPTH)
        new = partial(Gatherer, *what, open_rows=self.ctx.open_rows, say=self.ctx.say)
        train = stack.enter_context(new(read_ahead=self.cfg.read_ahead(self.ctx.world)))
        return train, stack.enter_context(new())

    def _steps(self, slices: Iterator[StepSlice], train: Gatherer) -> None:
        """All steps that are left, or those until someone asks to stop."""
        self.engine.module.train()
        if self.progress.owes_validation:
            self._end_epoch()
            if self._is_over():
                return
        micros = micro_batches(slices, self.cut, int(self.plan.rows[0]))
        with closing(gathered(train, micros, self.stride)) as stream:
            for micro, batch in stream:
                check_place(micro, self.plan, self.progress.cursor, self.ctx.rank)
                self._compute(micro, batch)
                if micro.last and self._end_step(micro):
                    return
        at = self.progress.cursor
        raise WorkerFailed(
            f"the stream of rank {self.ctx.rank} ended before epoch {at.epoch} step {at.step} of "
            f"{self.plan.epochs} x {self.plan.steps_per_epoch}; its feeder dropped rows"
        )

    def _compute(self, micro: Micro, batch: dict[str, Tensor]) -> None:
        """The micro batch's gradients, in pieces within the limit.

        A device that runs out of memory may have added half a piece's gradients: the step is then
        computed again from its first row. Not where other workers wait for its gradients.
        """
        if not self.step_micros:
            guard.note(step=self.progress.global_step, phase="train")
            self._at_boundary()
        self.step_micros.append(micro)
        if self.ctx.world == 1:
            try:
                self.limit.retry(lambda: self._add(micro, batch), self._step_again)
            except MemoryBudgetExceeded:
                self.rescue.alone()
                raise
            return
        done, failure = limit.attempt(lambda: self._add(micro, batch))
        if done is None:
            self.rescue.alone()
            raise limit.out_of_memory(failure, "with several workers no step is redone")

    def _at_boundary(self) -> None:
        """Ask whether memory allows another step. Where it does not, what was learnt is saved: the
        same command with more memory goes on.

        Several workers save and stop together, two steps later (`StepNumbers`): until then the one
        without memory computes as little at once as it can.
        """
        try:
            self.limit.at_boundary()
        except MemoryBudgetExceeded as error:
            if self.ctx.world == 1:
                self.rescue.alone()
                raise
            self.exhausted = self.exhausted or error
            self.limit.follow(1, "memory is over its budget")
        if self.cut.in_step:
            rows = self.ctx.smallest(self.limit.rows)
            self.limit.follow(rows, "another worker's memory is short")

    def _add(self, micro: Micro, batch: dict[str, Tensor]) -> None:
        for part, rows in in_pieces(micro, batch, self.limit.rows, self.cut.least):
            self.loss_sum += self.engine.backward(part, rows)
            self.counted += part.counted

    def _step_again(self) -> None:
        """All of the step's micro batches so far; the validation's buffers are idle meanwhile."""
        self.engine.clear()
        self._zero_sums()
        with closing(gathered(self.val, iter(self.step_micros), self.stride)) as stream:
            for micro, batch in stream:
                self._add(micro, batch)

    def _start_step(self) -> None:
        self.step_micros = []
        self._zero_sums()

    def _zero_sums(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.ctx.torch_device)
        self.counted = 0

    def _end_step(self, micro: Micro) -> bool:
        """Update, log, and where it is time validate and save; True when the run ends here."""
        progress, numbers = self.progress, self.numbers
        done, failure = limit.attempt(lambda: self._update(micro))
        if done is None:
            raise self.rescue.in_update(failure)
        at = progress.cursor.advance(self.plan.steps_per_epoch)
        ended = at.epoch > progress.epoch
        progress.epoch, progress.step, progress.owes_validation = at.epoch, at.step, ended
        progress.global_step += 1
        self.engine.note_whole()
        if ended:
            numbers.settle()
            self._end_epoch()
        elif numbers.stopping or numbers.save_is_due or self.saver.is_due_by_steps():
            numbers.settle()
            numbers.save_is_due = False
            self.saver.save(best=False)
        return self._is_over()

    def _is_over(self) -> bool:
        """Whether the run ends here. Raises MemoryBudgetExceeded when the memory of a worker is what
        ends it: on all of them, after they have saved.
        """
        if self.progress.is_over(self.cfg):
            return True
        if self.numbers.exhausted:
            raise self.exhausted or limit.stopped_together(self.ctx, self.progress.global_step)
        return self.numbers.stopping

    def _update(self, micro: Micro) -> None:
        """The optimiser's step; its numbers are on their way, those of the step before are read."""
        lr = learning_rate(self.cfg, self.progress.global_step, self.plan.steps_per_epoch)
        notes = self.engine.update(lr)
        over = self.exhausted is not None
        wishes = self.ctx.should_stop(), self.saver.is_due_by_time(), over
        rest = torch.tensor([self.counted, *wishes], dtype=torch.float64)
        sums = self.ctx.add_up(torch.cat([self.loss_sum[None], rest.to(self.loss_sum.device)]))
        record = {
            "kind": "step",
            "epoch": micro.cursor.epoch,
            "step": micro.cursor.step,
            "global_step": self.progress.global_step,
            "lr": lr,
            "rows": micro.global_rows,
        }
        if self.limit.rows < self.cfg.batch_size:
            record["micro_batch"] = self.limit.rows
        self.numbers.follow(record, sums, notes)
        self._start_step()

    def _end_epoch(self) -> None:
        """Validate, note the best, save, and report."""
        progress, epoch = self.progress, self.progress.epoch - 1
        guard.note(phase="validate")
        try:
            metrics = self.engine.validate(self.val, self.limit)
        except MemoryBudgetExceeded:
            self.rescue.together()
            raise
        self.engine.note_whole()
        val_loss = metrics["val_loss"]
        check_finite(val_loss, f"the validation of epoch {epoch}", self.cfg)
        cost = epoch_cost(self.task, metrics)
        check_finite(cost, f"the choice of epoch {epoch}", self.cfg)
        best = progress.best_cost is None or cost < progress.best_cost
        with self.rescue.booking():
            if best:
                progress.best_cost, progress.best_val_loss = cost, val_loss
                progress.best_epoch = epoch
            record = plain({**progress.epoch_record(metrics, best), "seconds": self._seconds()})
            progress.history.append(record)
            self.log.append(record)
            progress.owes_validation, self.numbers.save_is_due = False, False
            progress.epoch_loss_sum, progress.epoch_rows = 0.0, 0
            self.saver.save(best=best)
        self.ctx.report({**record, "checkpoint": str(self.ctx.run_dir / "last")})

    def _seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.earlier_seconds + self.ctx.clock() - self.started

    def _announce(self) -> None:
        if not self.ctx.is_main:
            return
        table = settings_table(
            self.cfg,
            world=self.ctx.world,
            device=self.ctx.device,
            n_train=self.plan.rows.size,
            n_val=len(self.task.val_rows),
            rows_per_step=self.plan.rows_per_step,
            prepared=self.engine.prepared,
        )
        if self.found:
            table.append(("resumed", f"{self.found.path} at {self.progress.words}"))
        self.ctx.say("\n".join(["training", format_table(table), *self.planned.lines]))

    def _result(self) -> FitResult:
        return self.progress.result(
            self.ctx.run_dir,
            cfg=self.cfg,
            seconds=self._seconds(),
            n_parameters=sum(p.numel() for p in self.engine.trainable),
        )
