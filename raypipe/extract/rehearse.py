"""What an extraction will take in memory, found by doing a little of it: ``extract --dry-run``.

The very worker of the run computes a few cells of the real images in the runner's own pool, into
stores in the temporary folder that are removed again; a thread samples what the process holds.
Not from shapes: allocator arenas, oneDNN's scratch and Ray's own share of an actor have no formula.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from raypipe.backbone import BackboneSpec
from raypipe.backbone.libraries import published
from raypipe.backbone.weights import Hub
from raypipe.errors import WorkerFailed
from raypipe.extract.config import ExtractConfig
from raypipe.extract.plan import RangeItem
from raypipe.extract.stores import ExtractPlan
from raypipe.extract.worker import Described, Extracted, ExtractWorker, Shared, WorkerSetup
from raypipe.memory import ProcessProbe, anon_bytes
from raypipe.memory.guard import current
from raypipe.memory.policy import Limits
from raypipe.runner import Done, Needs, Runner
from raypipe.store import ShardRun, ShardSpec, open_for_writing
from raypipe.units import format_bytes, format_seconds

# By the third cell one is decoded, one computed and one written at once; the allocators need a few
# more to settle. Measured against whole runs of 200 and 2,000 images: within 5 %.
MIN_CELLS = 4
MAX_CELLS = 16
ENOUGH_S = 20.0
TEMPORARY_BYTES = 512 * 1024**2
SAMPLE_EVERY_S = 0.002
MAX_STATS = 5000  # files whose size is looked at, for the largest: a second or two on NFS
GROUP = "rehearsal"


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """What a rehearsal found, up to some cell.

    rows : computed so far; rate : images/s once warm; peak_bytes : largest RssAnon of the worker,
    which budget_bytes limits; gpu_bytes : peak (allocated, reserved) of torch's allocator;
    halved_to : see Extracted; place, place_bytes : where its stores were, and their size.
    """

    rows: int
    rate: float
    peak_bytes: int
    budget_bytes: int | None
    gpu_bytes: tuple[int, int] | None
    halved_to: int | None
    place: str
    place_bytes: int

    def line(self) -> str:
        """``646 MiB a worker process (rehearsed on 64 images), 1.20 GiB on the GPU``."""
        text = f"{format_bytes(self.peak_bytes)} a worker process (rehearsed on {self.rows} images"
        if self.halved_to is not None:
            text += f", memory was short: batch {self.halved_to}"
        text += ")"
        if self.gpu_bytes is not None:
            allocated, reserved = map(format_bytes, self.gpu_bytes)
            text += (
                f", {allocated} on the GPU ({reserved} reserved; CUDA's own context comes on top)"
            )
        return text

    def budget_line(self) -> str:
        """What part of the worker's budget that is, and what follows."""
        if self.budget_bytes is None:
            return "a worker process has no memory budget here"
        share = self.peak_bytes / self.budget_bytes
        text = f"{share:.0%} of its budget of {format_bytes(self.budget_bytes)}"
        if self.peak_bytes >= Limits.of(self.budget_bytes).soft_bytes:
            text += ": memory will be short and batches will be halved; give a smaller --batch-size"
        return text

    def place_line(self, rows: int, workers: int) -> str:
        """Where it was rehearsed, and how long ``rows`` images will take."""
        seconds = rows / (self.rate * workers)
        return (
            f"rehearsed in {self.place} ({format_bytes(self.place_bytes)}, removed again); "
            f"{self.rate:.3g} images/s a worker: about {format_seconds(seconds)} for {rows} images"
        )


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Makes the worker that rehearses where it lands.

    stores : by layer, what its temporary store holds; paths are relative to the temporary folder;
    loads_twice : the run's weights, for which others stand in, are held twice while they load.
    """

    setup: WorkerSetup
    stores: Mapping[str, ShardSpec]
    loads_twice: bool = False

    def __call__(self) -> RehearsalWorker:
        return RehearsalWorker(self)


class RehearsalWorker:
    """An ExtractWorker that is watched (``runner.StepWorker``); each item is one cell.

    Reports a ``Rehearsed`` with each item. Enough cells done, it passes over the rest.
    """

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal
        self._place: Path | None = None
        self._runs: list[ShardRun] = []
        self._cells: list[tuple[float, int]] = []  # (when it was computed, rows) of each
        self._began = 0.0
        self._peak = _Peak()
        try:
            self._worker: ExtractWorker = rehearsal.setup()
        except BaseException:
            self._peak.stop()
            raise
        if rehearsal.loads_twice:
            self._peak.at_least(anon_bytes() + 4 * self._worker.describe().n_parameters)

    def describe(self) -> Described:
        """What the watched worker says of its backbone."""
        return self._worker.describe()

    def open(self, shared: object) -> str:
        """Make the temporary stores; ``shared`` is not used. Raises NoSpace."""
        _remove_left_over()
        self._place = Path(tempfile.mkdtemp(prefix=_prefix(os.getpid())))
        try:
            targets = {}
            for layer, spec in self._rehearsal.stores.items():
                placed = replace(spec, path=self._place / spec.path)
                self._runs.append(open_for_writing(placed, run_id=GROUP))
                targets[layer] = self._runs[-1].target
            sha256 = self._worker.describe().weights_sha256
            return self._worker.open(Shared({GROUP: targets}, sha256))
        except BaseException:
            self._clear()
            raise

    def step(self, item: RangeItem, upcoming: RangeItem | None) -> list[Done]:
        """Compute a cell, or, when there were enough, pass over it; the last one clears up."""
        try:
            done = [Done(item.key)] if self._has_enough() else self._compute(item, upcoming)
        except BaseException:
            with suppress(Exception):  # let what is being written end before its folder goes
                self._worker.drain()
            self._clear()
            raise
        return done if upcoming is not None else [*done, *self.drain()]

    def drain(self) -> list[Done]:
        """Wait for what is being written, then remove it."""
        try:
            return [self._report(one) for one in self._worker.drain()]
        finally:
            self._clear()

    def close(self) -> None:
        """End the worker's threads; nothing is left in the temporary folder."""
        try:
            self._worker.close()
        finally:
            self._clear()
            self._peak.stop()

    def _has_enough(self) -> bool:
        return len(self._cells) >= MIN_CELLS and time.monotonic() - self._began > ENOUGH_S

    def _compute(self, item: RangeItem, upcoming: RangeItem | None) -> list[Done]:
        self._began = self._began or time.monotonic()
        done = self._worker.step(item, upcoming)
        self._cells.append((time.monotonic(), item.hi - item.lo))
        return [self._report(one) for one in done]

    def _report(self, done: Done) -> Done:
        extracted: Extracted = done.payload
        found = Rehearsed(
            rows=sum(rows for _, rows in self._cells),
            rate=self._rate(),
            peak_bytes=self._peak.bytes,
            budget_bytes=current().budget_bytes,
            gpu_bytes=_gpu_bytes(self._rehearsal.setup.device),
            halved_to=extracted.halved_to,
            place=f"{platform.node()}:{self._place}",
            place_bytes=sum(spec.nbytes for spec in self._rehearsal.stores.values()),
        )
        return Done(done.key, found)

    def _rate(self) -> float:
        """Images/s from the second cell on, where there is one: the first one pays for warming up."""
        began, cells = self._began, self._cells
        if len(cells) > 1:
            began, cells = cells[0][0], cells[1:]
        return sum(rows for _, rows in cells) / max(cells[-1][0] - began, 1e-9)

    def _clear(self) -> None:
        for run in self._runs:
            run.close()
        self._runs = []
        if self._place is not None:
            shutil.rmtree(self._place, ignore_errors=True)


class _Peak:
    """The largest RssAnon of this process since it was made, by a thread."""

    def __init__(self) -> None:
        self.bytes = anon_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak", daemon=True)
        self._thread.start()

    def at_least(self, n_bytes: int) -> None:
        """Count ``n_bytes`` as if they had been seen."""
        self.bytes = max(self.bytes, n_bytes)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        with ProcessProbe(os.getpid()) as probe:
            while not self._stop.wait(SAMPLE_EVERY_S):
                self.at_least(probe.read().anon_bytes)


def rehearse(
    cfg: ExtractConfig, plan: ExtractPlan, runner: Runner, setup: WorkerSetup, needs: Needs
) -> Rehearsed:
    """Compute a few cells of ``plan`` in a pool of one worker of ``runner``, with the budget that
    it would have among the workers that ``needs`` asks for.

    Published weights are not fetched: random ones of the same shapes stand in. Raises what the run
    itself would raise for these images, and NoSpace, WorkerFailed, DeviceUnavailable.
    """
    stands_in, grid = setup.weights == "pretrained", cfg.batch_size
    group = max(plan.groups, key=lambda group: len(group.paths))
    paths = choose_images(group.paths, grid=grid, row_bytes=plan.row_bytes_in_all)
    rehearsal = Rehearsal(
        setup=replace(setup, weights="random:0") if stands_in else setup,
        stores={layer: _spec(cfg, plan, layer, paths) for layer in plan.layouts},
        loads_twice=stands_in and _loads_twice(plan.spec),
    )
    items = [
        RangeItem(GROUP, lo, min(lo + grid, len(paths)), grid, paths[lo : lo + grid])
        for lo in range(0, len(paths), grid)
    ]
    try:
        one = replace(needs, workers=1, stands_for=needs.workers)
        with runner.pool(rehearsal, one) as pool:
            found = [done.payload for done in pool.run(items, None) if done.payload is not None]
    finally:
        _remove_left_over()  # of a worker that was ended on this machine
    if not found:
        raise WorkerFailed("the rehearsal reported nothing; see Ray's worker logs (--verbose)")
    return found[-1]


def choose_images(paths: Sequence[Path], *, grid: int, row_bytes: int) -> tuple[Path, ...]:
    """A cell of the largest files, which take the most to decode, then some evenly over all."""
    by_room = TEMPORARY_BYTES // max(grid * row_bytes, 1)
    cells = min(MAX_CELLS, max(MIN_CELLS, by_room), math.ceil(len(paths) / grid))
    n_rows = min(cells * grid, len(paths))
    looked_at = _evenly(paths, min(len(paths), MAX_STATS))
    largest = sorted(looked_at, key=_size_bytes, reverse=True)[:grid]
    rest = n_rows - len(largest)
    return (*largest, *(_evenly(paths, rest) if rest > 0 else ()))


def _loads_twice(spec: BackboneSpec) -> bool:
    """Whether published weights are in memory twice for a moment: pickles are, safetensors are
    mapped (ViT-B, 330 MiB, measured: 1073 MiB while loading a .pth, 742 a .safetensors).

    Raises WeightsUnavailable when none are published.
    """
    source = published(spec)
    name = source.files[0] if isinstance(source, Hub) else source.url
    return not name.endswith(".safetensors")


def _evenly(paths: Sequence[Path], n: int) -> list[Path]:
    return [paths[i * len(paths) // n] for i in range(n)]


def _size_bytes(path: Path) -> int:
    """0 for what cannot be looked at: reading it will say so."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _spec(cfg: ExtractConfig, plan: ExtractPlan, layer: str, paths: Sequence[Path]) -> ShardSpec:
    return ShardSpec(
        path=Path(plan.spec.folder(layer)) / "train.npy",
        rows=len(paths),
        row_shape=plan.row_shape(layer),
        dtype=cfg.store_dtype,
        names=tuple(path.name for path in paths),
        grid=cfg.batch_size,
        identity={"rehearsal": True},
    )


def _gpu_bytes(device: str) -> tuple[int, int] | None:
    """Peak (allocated, reserved) of torch's allocator; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _prefix(pid: int) -> str:
    return f"raypipe-rehearsal-{platform.node()}-{pid}-"


def _remove_left_over() -> None:
    """Remove folders of rehearsals on this machine that were killed before they could."""
    start = f"raypipe-rehearsal-{platform.node()}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{start}*"):
        pid = folder.name.removeprefix(start).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
