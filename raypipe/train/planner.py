"""The memory planner: what a step needs under each set of techniques, and which set fits a budget.

`predict` measures the sets by ``footprint`` and makes the table that is printed before training;
`Plan.choose` is what ``--fit-gpu`` does with it (``choose`` for a task). Both leave the rows of an
optimiser step, and so the run itself, as they are: a smaller micro batch means more of them.

The sets, and which of two is the milder, are ``techniques``'. A set is chosen before a milder one
only where it lets more of the asked micro batch be computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from raypipe.errors import MemoryBudgetExceeded
from raypipe.report.saved import read_json, write_json
from raypipe.stream.reading import OpenRows
from raypipe.train import rng
from raypipe.train.config import TrainConfig
from raypipe.train.footprint import SIZES, Footprint, measure
from raypipe.train.limit import is_out_of_memory
from raypipe.train.precision import has_convolutions
from raypipe.train.task import Task
from raypipe.train.techniques import Amp, Techniques, mixed_type, techniques_of
from raypipe.units import format_bytes

PLAN_FILE = "memory_plan.json"
# What a CUDA process takes beside torch's allocator: the context, cuBLAS and cuDNN. 0.3 to 0.6 GiB
# by driver and card; an assumption, and named in the table.
CUDA_CONTEXT_BYTES = 640 << 20


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One set of techniques: its footprint, or why there is none."""

    techniques: Techniques
    footprint: Footprint | None = None
    why_not: str = ""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """``cfg`` with the chosen techniques, micro batch and accumulation; the peak they come to."""

    cfg: TrainConfig
    name: str
    peak_bytes: int
    budget_bytes: int

    def words(self, asked: TrainConfig) -> str:
        """One line for people."""
        return (
            f"--fit-gpu {format_bytes(self.budget_bytes)}: {self.name}, micro batches of"
            f" {self.cfg.batch_size} x {self.cfg.accumulate} (asked: {Techniques.of(asked).name},"
            f" {asked.batch_size} x {asked.accumulate}); {format_bytes(self.peak_bytes)} predicted"
        )

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "budget_bytes": self.budget_bytes,
            "predicted_peak_bytes": self.peak_bytes,
            "techniques": self.name,
            "batch_size": self.cfg.batch_size,
            "accumulate": self.cfg.accumulate,
            **asdict(Techniques.of(self.cfg)),
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The predictions for one task, one worker of ``world``, on ``device``; the mildest first.

    convolutions : whether the model has any; without, channels_last is as good as off.
    """

    asked: TrainConfig
    device: str
    world: int
    predictions: tuple[Prediction, ...]
    convolutions: bool = True

    def peak_bytes(self, prediction: Prediction, rows: int) -> int:
        """Of one worker with micro batches of ``rows`` rows, the context of CUDA included."""
        assert prediction.footprint is not None
        peak = prediction.footprint.peak_bytes(rows, accumulates=self._accumulates(rows))
        return peak + self._context_bytes

    @property
    def sizes(self) -> list[int]:
        """Rows of a micro batch, the most first: they divide a step's."""
        n = self._rows_a_step
        return [rows for rows in range(n, 0, -1) if n % rows == 0]

    def choose(
        self,
        budget_bytes: int,
        *,
        amp: Amp | None = None,
        bears: Callable[[int], bool] = lambda rows: True,
    ) -> Choice:
        """The mildest set and the largest micro batch that take at most ``budget_bytes``.

        ``amp``: the one that a resumed run was trained with, which it must keep. ``bears``: whether a
        micro batch may have so many rows; one of `sizes` at least. Raises MemoryBudgetExceeded when
        not even the fewest fit.
        """
        sizes = [rows for rows in self.sizes if bears(rows)]
        usable = [p for p in self._candidates(amp) if p.footprint is not None]
        best: tuple[int, Prediction] | None = None
        for prediction in usable:
            fits = (n for n in sizes if self.peak_bytes(prediction, n) <= budget_bytes)
            rows = next(fits, 0)
            capped = min(rows, self.asked.batch_size)
            if rows and (best is None or capped > min(best[0], self.asked.batch_size)):
                best = rows, prediction
        if best is None:
            raise MemoryBudgetExceeded(self._refusal(usable, budget_bytes, sizes))
        rows, chosen = best
        cfg = replace(
            self.asked,
            batch_size=rows,
            accumulate=self._rows_a_step // rows,
            **asdict(chosen.techniques),
        )
        return Choice(
            cfg=cfg,
            name=chosen.techniques.name,
            peak_bytes=self.peak_bytes(chosen, rows),
            budget_bytes=budget_bytes,
        )

    def lines(self, chosen: TrainConfig | None = None) -> list[str]:
        """The table: a line a set; ``chosen`` (default: what was asked) is marked."""
        cfg = chosen or self.asked
        rows = cfg.batch_size
        outside = f", {format_bytes(self._context_bytes)} of CUDA's own" * bool(self._context_bytes)
        head = f"memory of a step, {self._how}; a worker's tensors{outside}"
        table = [("techniques", "fixed", "each row", f"peak at {rows}")]
        for p in self.predictions:
            mark = "  <-" if p.techniques == self._set_of(cfg) else ""
            table.append((p.techniques.name, *self._cells(p, rows, mark)))
        width = max(len(cells[0]) for cells in table)
        text = [
            f"  {name:<{width}}  {fixed:>9}  {row:>9}  {peak}" for name, fixed, row, peak in table
        ]
        return [head, *text]

    def record(self) -> dict[str, Any]:
        """For run.json: what each set was predicted to take with the asked micro batch."""
        rows = self.asked.batch_size
        return {
            "device": self.device,
            "batch_size": rows,
            "peak_bytes": {
                p.techniques.name: self.peak_bytes(p, rows) if p.footprint else p.why_not
                for p in self.predictions
            },
        }

    def _cells(self, p: Prediction, rows: int, mark: str) -> tuple[str, str, str]:
        if p.footprint is None:
            return "-", "-", p.why_not
        line = p.footprint.line(rows, accumulates=self._accumulates(rows))
        peak = format_bytes(self.peak_bytes(p, rows)) + mark
        if not p.footprint.aligned:
            peak += "  (other kernels at 3 rows than at 2: less certain)"
        if p.footprint.ran and self._counted:
            peak += f"  (measured by real steps: {p.footprint.ran})"
        return format_bytes(line.fixed + self._context_bytes), format_bytes(line.a_row), peak

    def _candidates(self, amp: Amp | None) -> list[Prediction]:
        """Sets that hold all that was asked for, and a resumed run's AMP."""
        asked = self._set_of(self.asked)
        held = [p for p in self.predictions if asked.within(p.techniques)]
        return [p for p in held if amp in (None, p.techniques.amp)]

    def _refusal(
        self, usable: Sequence[Prediction], budget_bytes: int, sizes: Sequence[int]
    ) -> str:
        fewest = sizes[-1]
        needs = {p.techniques.name: self.peak_bytes(p, fewest) for p in usable}
        if not needs:
            return (
                f"--fit-gpu {format_bytes(budget_bytes)}: {self.device} cannot hold {SIZES[0]} rows"
                " under any set of techniques; train a smaller model, or on a larger device"
            )
        name = min(needs, key=needs.__getitem__)
        synced = self.asked.sync_batch_norm and self.world > 1
        norm = f"SyncBN over {self.world} workers" if synced else "this model's batch norm"
        few = "one row" if fewest == 1 else f"{fewest} rows, {norm} bears no fewer,"
        return (
            f"--fit-gpu {format_bytes(budget_bytes)}: micro batches of {few} need at least"
            f" {format_bytes(needs[name])} ({name}); give a budget of at least that, or make the"
            " model smaller"
        )

    @property
    def _how(self) -> str:
        """Steps that were run are measured; of shapes bytes are counted, and nothing is run."""
        at = f"at {SIZES[0]} and {SIZES[1]} rows on {self.device}"
        reasons = self._ran - {""}
        if not self._counted:
            return f"measured {at}" + (f" by real steps ({min(reasons)})" if reasons else "")
        rest = ", but for sets that real steps were run of" if reasons else ""
        return f"counted {at} by shapes alone{rest}"

    @property
    def _counted(self) -> bool:
        """Whether any set was counted by shapes, which is done for a CPU only."""
        return self.device.startswith("cpu") and "" in self._ran

    @property
    def _ran(self) -> set[str]:
        """Why steps were run, "" where they were not."""
        return {p.footprint.ran for p in self.predictions if p.footprint}

    def _set_of(self, cfg: TrainConfig) -> Techniques:
        return Techniques.of(cfg).possible(blocks=True, convolutions=self.convolutions)

    def _accumulates(self, rows: int) -> bool:
        return self.world > 1 or rows < self._rows_a_step

    @property
    def _rows_a_step(self) -> int:
        return self.asked.rows_per_step(1)

    @property
    def _context_bytes(self) -> int:
        return CUDA_CONTEXT_BYTES if self.device.startswith("cuda") else 0


def predict(
    task: Task,
    cfg: TrainConfig,
    device: torch.device,
    world: int = 1,
    open_rows: OpenRows | None = None,
) -> Plan:
    """Measure ``task`` under each set of techniques on ``device``, one after the other.

    ``open_rows``: see `WorkerContext`.

    Leaves the global generators as they were. Raises what the task raises under the set that is
    asked for; another set that fails has its reason in the table.
    """
    with rng.preserved(device):
        module = task.build_model()
        convolutions = has_convolutions(module)
        blocks = cfg.checkpointing or len(task.checkpoint_blocks(module)) > 0
        del module
        asked = Techniques.of(cfg).possible(blocks=blocks, convolutions=convolutions)
        found: dict[Techniques, Prediction] = {}
        for techniques in techniques_of(cfg, mixed_type(cfg, device)):
            possible = techniques.possible(blocks=blocks, convolutions=convolutions)
            if possible not in found:
                found[possible] = _predicted(
                    task, cfg, device, possible, open_rows, asked=possible == asked
                )
            elif techniques not in found:
                found[techniques] = Prediction(
                    techniques=techniques, why_not=techniques.why_not(possible)
                )
    return Plan(
        asked=cfg,
        device=str(device),
        world=world,
        predictions=tuple(found.values()),
        convolutions=convolutions,
    )


def _predicted(
    task: Task,
    cfg: TrainConfig,
    device: torch.device,
    techniques: Techniques,
    open_rows: OpenRows | None,
    *,
    asked: bool,
) -> Prediction:
    """asked : the set that training was asked for, whose errors are raised."""
    try:
        footprint = measure(task, replace(cfg, **asdict(techniques)), device, open_rows)
    except Exception as error:
        if is_out_of_memory(error):
            why = f"{device} cannot hold {SIZES[1]} rows of it"
        elif asked:
            raise
        else:  # a kernel without bf16, a view that NHWC breaks: training goes on without this set
            why = f"not measured, {type(error).__name__}: {' '.join(str(error).split())[:100]}"
        return Prediction(techniques=techniques, why_not=why)
    return Prediction(techniques=techniques, footprint=footprint)


def save_plan(run_dir: Path, plan: Plan, choice: Choice | None) -> None:
    """Leave RUN/memory_plan.json for the driver, which may be on another machine."""
    write_json(run_dir / PLAN_FILE, {**plan.record(), "chosen": choice and choice.record()})


def saved_plan(run_dir: Path) -> dict[str, Any] | None:
    """What `save_plan` left in ``run_dir``, if it left anything."""
    path = run_dir / PLAN_FILE
    return read_json(path, "start the training again") if path.is_file() else None


@contextmanager
def device_budget(device: torch.device, budget_bytes: int | None) -> Iterator[None]:
    """Hold torch's CUDA allocator to ``budget_bytes`` less the context; beyond it, it says out of
    memory. Elsewhere, and without a budget, nothing.
    """
    if device.type != "cuda" or budget_bytes is None:
        yield
        return
    index = device.index or 0  # alone in torch, this setting takes no "cuda" without a number
    total = torch.cuda.get_device_properties(index).total_memory
    part = min(1.0, max(0, budget_bytes - CUDA_CONTEXT_BYTES) / total)
    before = torch.cuda.get_per_process_memory_fraction(index)
    torch.cuda.set_per_process_memory_fraction(part, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)
