"""What one training step holds at once, measured at a tiny and a small batch, known for any other.

Every operation's outputs are watched, forward, backward, update and validation, and the bytes that
live after each are noted. The same operations run at every batch size, and each of those numbers is
a straight line in the batch; so two sizes give all lines, and the peak at any batch is the highest
of them. A line through the two peaks alone would not do: at 2 rows the peak often lies where the
gradients are whole, at 64 where the activations are.

Saved-tensor hooks are not enough here: they miss what a checkpointed block keeps as its arguments,
the gradients of activations, and temporaries. (The tests hold their count beside this one.)

What a kernel takes inside itself is not seen; on CUDA the allocator's own peak is read beside, and
the difference is added. On a CPU there is nothing of the kind to read, and a step of a large network
takes a minute: so it is run there on tensors without memory (``shapes``), which gives the same counts
in a second. Where rows are small, a task looks at values, or a backbone is frozen, real steps are run.

Which techniques to measure, and the choice between them: ``planner``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raypipe.memory.guard import relieve
from raypipe.stream import Cursor, Gatherer
from raypipe.stream.gather import ring_bytes
from raypipe.stream.reading import OpenRows
from raypipe.train.config import TrainConfig
from raypipe.train.context import WorkerContext
from raypipe.train.engine import Engine
from raypipe.train.feed import Micro
from raypipe.train.shapes import Shapes
from raypipe.train.task import Task, frozen_tensors

# Not one row: operations take short cuts at size 1 (nothing to copy, nothing to broadcast).
SIZES = (2, 3)
# Numbers in a row from which shapes are quicker on a CPU: each operation on them costs about 0.3 ms,
# whatever its size (a toy encoder took 11 s by shapes, 0.8 s for real).
SHAPES_FROM = 1 << 14
# A sweep of Python's objects takes 0.2 s: not for less than this.
_SMALL_BYTES = 64 << 20
# "first" fills the gradients, "more" adds to them: a step of one micro batch has no "more".
_ROW_PHASES = ("first", "more", "validate")

# Row numbers and the batch of them.
Piece = tuple[np.ndarray, dict[str, Tensor]]


@dataclass(frozen=True)
class Line:
    """Bytes as a straight line in the batch: ``fixed + a_row * rows``."""

    fixed: float
    a_row: float

    def at(self, rows: int) -> float:
        """Bytes at ``rows`` rows."""
        return self.fixed + self.a_row * rows


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A training step's memory on its device.

    static_bytes : parameters, buffers, AdamW moments and frozen weights; phases : the lines that are
    the highest at some batch, by phase; batch_row_bytes : a row of each batch that is gathered
    ahead; outside : what the device's allocator held beyond all this (0 on the CPU); aligned :
    whether both sizes ran the same operations (otherwise a line goes through the two peaks);
    ran : why steps were run for real where shapes alone would be quicker, if they were.
    """

    static_bytes: int
    phases: Mapping[str, tuple[Line, ...]]
    batch_row_bytes: int = 0
    outside: Line = field(default=Line(0, 0))
    aligned: bool = True
    ran: str = ""

    def line(self, rows: int, *, accumulates: bool) -> Line:
        """The line that is the highest at ``rows`` rows: fixed bytes, and bytes a row there.

        ``accumulates``: a step has more than one micro batch (or more than one worker, whose
        gradient buckets stay).
        """
        used = [p for p in self.phases if accumulates or p != "more"]
        top = max((line for p in used for line in self.phases[p]), key=lambda line: line.at(rows))
        rest = self.static_bytes + self.outside.fixed
        return Line(top.fixed + rest, top.a_row + self.batch_row_bytes + self.outside.a_row)

    def peak_bytes(self, rows: int, *, accumulates: bool) -> int:
        """The most that a step of micro batches of ``rows`` rows holds at once."""
        return round(self.line(rows, accumulates=accumulates).at(rows))


class LiveBytes(TorchDispatchMode):
    """While on, counts the bytes of storages on ``device`` that came into being and still live.

    ``timeline`` : the count after each operation. ``ignored``: tensors that were there before.
    """

    def __init__(self, device: torch.device, ignored: Iterable[Tensor]) -> None:
        super().__init__()
        self.live_bytes = 0
        self.timeline: list[int] = []
        self._device_type = device.type
        self._held: dict[int, tuple[int, Any]] = {}
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch loads its compiler, 1.5 s and more, at the first operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, then look at what it returned."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device_type:
                self._see(leaf.untyped_storage())
        self.timeline.append(self.live_bytes)
        return out

    def taken_timeline(self) -> np.ndarray:
        """The timeline since the last call, (operations,) int64."""
        taken, self.timeline = np.array(self.timeline, np.int64), []
        return taken

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._ignored:
            return
        if key in self._held:  # seen before; an ``out=`` may have grown it
            before, gone = self._held[key]
        else:
            # The storage's Python object lives as long as the storage does, in whatever hands.
            before, gone = 0, weakref.ref(storage, lambda _: self._forget(key))
        self._held[key] = (n_bytes, gone)
        self.live_bytes += n_bytes - before

    def _forget(self, key: int) -> None:
        n_bytes, _ = self._held.pop(key)
        self.live_bytes -= n_bytes


def measure(
    task: Task, cfg: TrainConfig, device: torch.device, open_rows: OpenRows | None = None
) -> Footprint:
    """Run a few steps of ``cfg`` at `SIZES` on a model of its own, which is then dropped.

    Draws from the global generators (see `raypipe.train.rng.preserved`). Raises what the task
    raises, and torch.OutOfMemoryError.
    """
    # No fp16 step is skipped here; a compiled step is predicted as the plain one it replaces.
    quiet = replace(cfg, init_scale=1.0, compile=False)
    frozen = frozen_tensors(task, device)  # loaded by now, whether or not another measurement did
    batches = list(_batches(task, device, open_rows))
    why = _why_real(batches, frozen)
    if device.type == "cpu" and not why:
        try:
            return _by_shapes(task, quiet, batches)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        # Whatever a model's own checks raise of tensors without values: its true faults show below.
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    ran = why if device.type == "cpu" else ""
    return replace(_by_steps(task, quiet, device, frozen, batches), ran=ran)


def _why_real(batches: Sequence[Piece], frozen: Sequence[Tensor]) -> str:
    """Why steps on the CPU are better run for real; "" when they are not."""
    if frozen:
        return "a frozen backbone"
    numbers = sum(tensor[0].numel() for tensor in batches[0][1].values())
    return "rows are small" if numbers < SHAPES_FROM else ""


def _by_shapes(task: Task, cfg: TrainConfig, batches: Sequence[Piece]) -> Footprint:
    # A loss scale is a value that each step asks for; either half type has the same bytes.
    cfg = replace(cfg, amp="bf16") if cfg.amp == "fp16" else cfg
    shapes = Shapes()
    engine = Engine(task, cfg, WorkerContext(run_dir=Path()), made=shapes.drop_values)
    bare = [(rows, {k: shapes.of(t) for k, t in batch.items()}) for rows, batch in batches]
    with shapes:
        return _measured(engine, [], 0, bare)


def _by_steps(
    task: Task,
    cfg: TrainConfig,
    device: torch.device,
    frozen: Sequence[Tensor],
    batches: Sequence[Piece],
) -> Footprint:
    # Both batches and the frozen weights are counted with the model.
    before = _allocated(device) - sum(t.nbytes for t in frozen)
    before -= sum(t.nbytes for _, b in batches for t in b.values())
    small = False
    try:
        engine = Engine(task, cfg, WorkerContext(run_dir=Path(), device=str(device)))
        footprint = _measured(engine, frozen, before, batches)
        small = footprint.static_bytes < _SMALL_BYTES
        return footprint
    finally:
        # Checkpointed blocks refer to themselves, so the model would stay until Python looks.
        if device.type == "cuda" or not small:
            relieve()


def _measured(
    engine: Engine, frozen: Sequence[Tensor], before: int, batches: Sequence[Piece]
) -> Footprint:
    """before : bytes that the device's allocator held without all of this."""
    device = engine.ctx.torch_device
    engine.module.train()
    for _ in _phases(engine, *batches[0], update=True):
        pass  # moments, casts' caches and libraries come into being
    static = [*_static(engine), *frozen]
    passes: list[dict[str, np.ndarray]] = []
    beyond: list[int] = []
    for rows, batch in batches:
        _reset_peak(device)
        mode = LiveBytes(device, [*static, *(t for _, b in batches for t in b.values())])
        with mode:
            update = not passes  # no row is left by then: once is enough, and it may take long
            steps = _phases(engine, rows, batch, update=update)
            phases = {name: mode.taken_timeline() for name in steps}
        passes.append(phases)
        # The lines count no batch; the allocator holds both that lie here.
        known = sum(t.nbytes for t in static) + max(int(p.max()) for p in phases.values())
        known += sum(t.nbytes for _, b in batches for t in b.values())
        beyond.append(max(0, _peak(device) - before - known))
    aligned = all(len(passes[0][name]) == len(passes[1][name]) for name in _ROW_PHASES)
    lines = {name: _lines(*(p[name] for p in passes), aligned=aligned) for name in _ROW_PHASES}
    return Footprint(
        static_bytes=sum(tensor.nbytes for tensor in static),
        phases={**lines, "update": (Line(float(passes[0]["update"].max()), 0.0),)},
        batch_row_bytes=_batch_row_bytes(engine.task, device),
        outside=_through(*beyond, at_least=0),
        aligned=aligned,
    )


def _phases(
    engine: Engine, rows: np.ndarray, batch: dict[str, Tensor], *, update: bool
) -> Iterator[str]:
    """Two micro batches of one step, its update, and a validation batch; yields after each."""
    for name, last in (("first", False), ("more", True)):
        micro = Micro(Cursor(), 2 * len(rows), rows, len(rows), last)
        engine.backward(micro, batch)
        yield name
    if update:
        engine.update(0.0)
        yield "update"
    engine.buffers.done()  # with or without the update: both sizes run the same operations
    engine.clear()
    engine.module.eval()
    with torch.no_grad():
        engine.val_batch(batch)
    engine.module.train()
    yield "validate"


def _batches(task: Task, device: torch.device, open_rows: OpenRows | None) -> Iterator[Piece]:
    """Real rows of training, `SIZES` of them (the same ones again where there are fewer)."""
    pieces = [np.resize(np.asarray(task.train_rows[:size]), size) for size in SIZES]
    with Gatherer(task.sources(), max(SIZES), device, depth=2, open_rows=open_rows) as gatherer:
        for rows, batch in zip(pieces, gatherer.batches(pieces), strict=True):
            yield rows, {name: tensor.clone() for name, tensor in batch.items()}


def _static(engine: Engine) -> list[Tensor]:
    """Parameters, buffers, moments and averages, each storage once."""
    state = [t for s in engine.optimizer.state.values() for t in s.values()]
    averages = engine.average.tensors() if engine.average else []
    parts = [*engine.module.parameters(), *engine.module.buffers(), *state, *averages]
    tensors = [t for t in parts if isinstance(t, Tensor)]
    return list({t.untyped_storage()._cdata: t for t in tensors}.values())


def _batch_row_bytes(task: Task, device: torch.device) -> int:
    """Of all batches that lie on ``device`` at once, for each row of one.

    On CUDA the one in use and the one that is being copied; on the CPU the rings of two Gatherers
    of two batches, for training and for validation.
    """
    return ring_bytes(task.sources(), 1, 2 if device.type == "cuda" else 4)


def _lines(tiny: np.ndarray, small: np.ndarray, *, aligned: bool) -> tuple[Line, ...]:
    """The straight lines through two timelines (operations,) that are the highest at some batch."""
    if not aligned:
        return (_through(int(tiny.max()), int(small.max()), at_least=0),)
    rows = SIZES[1] - SIZES[0]
    slopes = (small - tiny) / rows
    fixed = tiny - slopes * SIZES[0]
    batches = np.unique(np.geomspace(1, 1 << 20, 400).astype(np.int64))
    top = {int(np.argmax(fixed + slopes * batch)) for batch in batches}
    return tuple(Line(float(fixed[i]), float(slopes[i])) for i in sorted(top))


def _through(tiny: int, small: int, *, at_least: float) -> Line:
    slope = max(at_least, (small - tiny) / (SIZES[1] - SIZES[0]))
    return Line(max(0.0, small - slope * SIZES[1]), slope)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
