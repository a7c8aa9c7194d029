"""Batches of stored features for a plain PyTorch loop: no Ray, no processes, the plan's own order.

`FeatureLoader` is iterated as a DataLoader is; `FeatureDataset` is the same behind torch's
IterableDataset, for code that wants a DataLoader around it. Where in the stream one is counts rows,
not steps: so a run resumes in the middle of an epoch with another batch size or number of ranks,
with exactly the rows that no rank has seen.

The order is `raypipe.stream.plan`'s, the reading `raypipe.stream.gather`'s.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from raypipe.errors import ConfigError
from raypipe.store import FeatureStore
from raypipe.stream.gather import Gatherer
from raypipe.stream.layout import Join, lay_out
from raypipe.stream.plan import StreamPlan, deal
from raypipe.stream.reading import OpenRows, Source
from raypipe.stream.rows import ComputedRows
from raypipe.stream.source import as_source, store_of

_ENDLESS = 2**62
# One batch with the user, three being read: with two, the threads waited for the user's thread to wake
# up between theirs and ask for the next (a tenth of the speed on two cores). More where a batch is
# copied sooner than a thread wakes.
_DEPTH, _DEPTH_OF_SMALL, _SMALL_BYTES = 4, 8, 4 << 20


class FeatureLoader:
    """One epoch of batches each time it is iterated: dicts of tensors (n, *row_shape) by name.

    ``sources``: name -> `ArraySource`, an open store, or the path of a ``.npy``; they share their
    row numbers. ``batch_size``: rows a batch on this rank. ``rows``: which rows (ints, a range, or a
    part that `split_rows` gives); None: all, but those that a store marks as invalid. ``rank``,
    ``world``: this process among those that share the rows. ``shuffle``: False gives ascending rows.
    ``window``: see `StreamPlan`. ``epochs``: where to stop counting epochs; None: nowhere.
    ``device``, ``dtype``, ``join``, ``threads``, ``sort_reads``, ``read_ahead``, ``open_rows``: see
    `Gatherer`. A store of which the catalog lists a copy on this node's disk is read from there.

    The order is that of ``StreamPlan(rows, seed, batch_size * world, epochs, window)``. An epoch
    ends with a smaller batch (unless ``drop_last``); a rank that gets none of its rows is given an
    empty batch, so that all ranks make as many steps. For a mean over all ranks that weighs rows
    alike, divide a batch's summed loss by `global_rows`, and sum over the ranks (DDP averages
    gradients: multiply by ``world``).

    A batch is the caller's as long as anything refers to it. The epoch counts up by itself;
    `set_epoch` sets it. Iterating anew ends an iteration that is under way.
    Raises ConfigError, and as `Gatherer`: StoreError for a store on other nodes' disks only.
    """

    def __init__(
        self,
        sources: Mapping[str, Source | FeatureStore | Path | str],
        batch_size: int,
        *,
        seed: int = 0,
        rows: ArrayLike | range | ComputedRows | None = None,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        window: int = 0,
        dtype: str | torch.dtype | Mapping[str, str | torch.dtype] | None = None,
        join: Mapping[str, Join | tuple[tuple[str, ...], int]] | None = None,
        drop_last: bool = False,
        epochs: int | None = None,
        threads: int | None = None,
        sort_reads: bool | None = None,
        read_ahead: int | None = None,
        open_rows: OpenRows | None = None,
    ) -> None:
        deal(0, rank, world)
        if not sources or batch_size < 1:
            raise ConfigError(
                f"loader of {len(sources)} sources, batch_size={batch_size}: give at least one"
            )
        if not shuffle and window:
            raise ConfigError(f"window={window} without shuffle: leave one of them out")
        self.sources = {name: as_source(given) for name, given in sources.items()}
        lay_out(self.sources, dtype=dtype, join=join)  # a wrong one is refused here
        chosen = _all_rows(sources, self.sources) if rows is None else rows
        epochs_ = _ENDLESS if epochs is None else epochs
        self.plan = StreamPlan(chosen, seed, batch_size * world, epochs_, window)
        _check_rows(self.plan, self.sources)
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.device, self.shuffle, self.drop_last = torch.device(device), shuffle, drop_last
        #: Rows of the batch given last, over all ranks.
        self.global_rows = 0
        if read_ahead is None and window:
            read_ahead = -(-window // self.plan.rows_per_step)  # a window's blocks, in long reads
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "join": join,
            "threads": threads,
            "sort_reads": sort_reads,
            "read_ahead": read_ahead,
            "open_rows": open_rows,
        }
        self._epoch = 0
        self._first = 0  # the position that the next iteration begins at
        self._begun = 0  # the one that the last iteration began at
        self._seen = 0  # positions of this epoch that were given to all ranks
        self._gatherer: tuple[int, Gatherer] | None = None
        self._running: weakref.ref[Generator[dict[str, Tensor]]] | None = None

    @property
    def epoch(self) -> int:
        """The epoch under way, or the next one after an epoch's end."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be ``epoch``, from its start, unless it is the one resumed."""
        if not 0 <= epoch < self.plan.epochs:
            raise ConfigError(f"epoch {epoch}: this loader has epochs 0 to {self.plan.epochs - 1}")
        if epoch != self._epoch or not self._first:
            self._epoch = epoch
            self._first = self._begun = self._seen = 0

    def __len__(self) -> int:
        """Batches of the iteration under way or, before one, of the next: all, or what remains."""
        n = self._end() - self._begun
        return -(-n // self.plan.rows_per_step) if not self.drop_last else self._whole(n)

    def __iter__(self) -> Generator[dict[str, Tensor]]:
        return self.share(0, 1)

    def share(self, part: int, parts: int) -> Generator[dict[str, Tensor]]:
        """Every ``parts``-th batch of the epoch from batch ``part`` on, for worker processes."""
        if not self._first and self._finished(self._seen):  # every batch was taken, not the end
            self._epoch += 1
        if self._epoch >= self.plan.epochs:
            raise ConfigError(
                f"all {self.plan.epochs} epochs were given; use set_epoch, or allow for more"
            )
        running = self._running() if self._running else None
        if running is not None:
            running.close()
        first, self._first = self._first, 0
        self._begun = self._seen = first
        batches = self._batches(self._epoch, self._steps(first), part, parts)
        self._running = weakref.ref(batches)
        return batches

    def _batches(
        self, epoch: int, firsts: range, part: int, parts: int
    ) -> Generator[dict[str, Tensor]]:
        """``firsts``: the position at which each step begins."""
        rows = islice(self._rows(epoch, firsts), part, None, parts)
        with closing(self._open().batches(rows)) as batches:
            for first in firsts[part::parts]:
                # Not kept in a name here: the caller alone decides how long it lives.
                held = [next(batches)]
                self._seen = self._step_end(first)
                self.global_rows = self._seen - first
                yield held.pop()
        self._epoch, self._begun, self._seen = epoch + 1, 0, 0

    def _steps(self, first: int) -> range:
        step = self.plan.rows_per_step
        end = self._end()
        return range(
            first, first + self._whole(end - first) * step if self.drop_last else end, step
        )

    def _finished(self, position: int) -> bool:
        return position > 0 and position >= self._steps(position).stop

    def _whole(self, n: int) -> int:
        return n // self.plan.rows_per_step

    def _end(self) -> int:
        return self.plan.rows.size

    def _step_end(self, first: int) -> int:
        return min(first + self.plan.rows_per_step, self._end())

    def _rows(self, epoch: int, firsts: range) -> Iterator[np.ndarray]:
        """This rank's rows of each step."""
        if self.shuffle:
            end = self._step_end(firsts[-1]) if firsts else firsts.start
            steps = self.plan.in_steps(epoch, firsts.start, end)
        else:
            steps = (self.plan.rows[first : self._step_end(first)] for first in firsts)
        return (rows[deal(rows.size, self.rank, self.world)] for rows in steps)

    def _open(self) -> Gatherer:
        """This process's gatherer: one that came along in a fork has no threads any more."""
        if self._gatherer is None or self._gatherer[0] != os.getpid():
            batch_bytes = self.batch_size * sum(s.row_bytes for s in self.sources.values())
            depth = _DEPTH_OF_SMALL if batch_bytes < _SMALL_BYTES else _DEPTH
            opened = Gatherer(
                self.sources, self.batch_size, self.device, depth, lend=True, **self._options
            )
            self._gatherer = os.getpid(), opened
        return self._gatherer[1]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: after the batch given last. Plain numbers and strings.

        The same on every rank that was given as many batches.
        """
        epoch, position = self._epoch, max(self._seen, self._first)
        if self._finished(position):
            epoch, position = epoch + 1, 0
        return {"epoch": epoch, "position": position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the last batch that ``state`` has seen, also with another batch size or world.

        Raises ConfigError when it is of another order, other rows or other sources.
        """
        identity = self._identity()
        differing = [
            f"{key} {state.get(key)!r} -> {now!r}"
            for key, now in identity.items()
            if state.get(key) != now
        ]
        if differing:
            raise ConfigError(
                f"the stream's state is of another run ({', '.join(differing)}); give the options "
                "it was made with, or start over without it"
            )
        self.close()
        self._epoch = int(state["epoch"])
        self._first = self._begun = self._seen = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.plan.seed,
            "window": self.plan.window,
            "shuffle": self.shuffle,
            "rows_sha256": self.plan.rows_digest,
            "sources": {name: source.fingerprint for name, source in self.sources.items()},
        }

    def close(self) -> None:
        """End an iteration under way and stop the threads; batches stay, iterating opens anew."""
        running = self._running() if self._running else None
        if running is not None:
            running.close()
        if self._gatherer is not None and self._gatherer[0] == os.getpid():
            self._gatherer[1].close()
        self._gatherer = self._running = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_gatherer": None, "_running": None}


class FeatureDataset(IterableDataset[dict[str, Tensor]]):
    """`FeatureLoader` as torch's IterableDataset, for ``DataLoader(dataset, batch_size=None)``.

    Takes the arguments of `FeatureLoader`, which is its ``loader``. ``num_workers=0`` is the fast
    way: threads gather already. With worker processes each gives every n-th batch, which DataLoader
    puts together in the plan's order, a copy more a batch; then the epoch does not count up by
    itself (call `set_epoch` before each), and there is no `state_dict`, for batches are fetched
    before they are seen.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.loader = FeatureLoader(*args, **options)
        # [epoch, whether a worker process reads], seen by workers that stay alive over epochs too.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        if worker is None:
            return iter(self.loader)
        self._shared[1] = 1
        self.loader.set_epoch(int(self._shared[0]))
        return self.loader.share(worker.id, worker.num_workers)

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def global_rows(self) -> int:
        """See `FeatureLoader`."""
        return self.loader.global_rows

    def set_epoch(self, epoch: int) -> None:
        """See `FeatureLoader`."""
        self.loader.set_epoch(epoch)
        self._shared[0] = epoch

    def state_dict(self) -> dict[str, Any]:
        """See `FeatureLoader`. Raises ConfigError once worker processes have read."""
        if self._shared[1]:
            raise ConfigError(
                "no state_dict with worker processes, which are ahead of what you have seen; use "
                "num_workers=0"
            )
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `FeatureLoader`."""
        self.loader.load_state_dict(state)
        self._shared[0] = self.loader.epoch


def _all_rows(
    given: Mapping[str, Source | FeatureStore | Path | str], sources: Mapping[str, Source]
) -> range | np.ndarray:
    """All rows of the sources but those that a store marks as invalid, which hold NaN."""
    sizes = {name: source.n_rows for name, source in sources.items()}
    if len(set(sizes.values())) != 1:
        listed = ", ".join(f"{name} {n}" for name, n in sizes.items())
        raise ConfigError(f"sources of {listed} rows; give the rows that they share")
    n = next(iter(sizes.values()))
    valid: np.ndarray | None = None
    for one in given.values():
        store = store_of(one)
        if store is not None and store.manifest.get("invalid_rows", 0):
            valid = store.valid if valid is None else valid & store.valid
    return range(n) if valid is None else np.flatnonzero(valid)


def _check_rows(plan: StreamPlan, sources: Mapping[str, Source]) -> None:
    last = int(plan.rows[-1])
    for name, source in sources.items():
        if last >= source.n_rows:
            raise ConfigError(
                f"row {last} asked of {name}, which has {source.n_rows}; give rows it has"
            )
