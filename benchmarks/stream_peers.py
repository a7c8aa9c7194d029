"""The peers of benchmarks/stream.py: each makes its own format of the rows, and delivers batches.

Each is set up as its documentation advises for local files read in random order: no compression,
shuffle on, batches made in the worker processes where it can, the number of workers that was best.
Nothing here imports raypipe: a peer may live in an environment of its own.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stream_data import Rows, files_under

SHARD_BYTES = 64_000_000
Batches = Iterator[Any]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a contender is told: the ``.npy``, its own ``folder``, rows, worker processes."""

    npy: Path
    folder: Path
    rows: Rows
    n: int
    workers: int = 0
    cold: bool = False
    seconds: float = 0.0  # about how long it will be read

    @property
    def shard_rows(self) -> int:
        """Rows of a shard: about ``SHARD_BYTES``, and at least eight shards."""
        return max(1, min(SHARD_BYTES // self.rows.row_bytes, self.n // 8))

    @property
    def shuffle_rows(self) -> int:
        """Rows of a shuffle buffer, for those that cannot shuffle globally."""
        return 10 * self.rows.batch


@dataclass(frozen=True, kw_only=True)
class Peer:
    """``package``: distribution that names the version. ``module``: what it is imported as."""

    package: str
    module: str
    batches: Callable[[Turn], Batches]
    prepare: Callable[[Turn], None] | None = None
    workers: tuple[int, ...] = (0, 2)


def _loader(dataset: Any, make: Any, turn: Turn, **options: Any) -> Batches:
    """Epoch after epoch of a torch DataLoader or of what is derived from it."""
    if turn.workers:
        options.update(persistent_workers=True, prefetch_factor=2)
    loader = make(dataset, num_workers=turn.workers, **options)
    while True:
        yield from loader


class _MappedDataset:
    """One row of the map at a time, as most scripts have it."""

    def __init__(self, npy: Path) -> None:
        self.npy, self.array = npy, np.load(npy, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> Any:
        import torch

        return torch.from_numpy(np.array(self.array[i]))

    def __reduce__(self) -> Any:
        return _MappedDataset, (self.npy,)


def _dataloader(turn: Turn) -> Batches:
    from torch.utils.data import DataLoader

    data = _MappedDataset(turn.npy)
    return _loader(data, DataLoader, turn, batch_size=turn.rows.batch, shuffle=True)


def _prepare_ray(turn: Turn) -> None:
    mapped = np.load(turn.npy, mmap_mode="r")
    for first in range(0, turn.n, turn.shard_rows):
        np.save(turn.folder / f"{first:09d}.npy", mapped[first : first + turn.shard_rows])


def _ray_blocks(turn: Turn) -> Batches:
    """Tensor blocks: held in the object store when hot, read from the files when cold."""
    import ray

    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(
        address="local",
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=int(2 * turn.n * turn.rows.row_bytes + 500e6),
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Whole paths: a folder's listing would ask for extensions; "data" is read_numpy's column.
    dataset = ray.data.read_numpy([str(file) for file in files_under(turn.folder)])
    if not turn.cold:
        dataset = dataset.materialize()
    while True:
        for batch in dataset.iter_torch_batches(
            batch_size=turn.rows.batch,
            prefetch_batches=2,
            local_shuffle_buffer_size=turn.shuffle_rows,
        ):
            yield batch["data"]


def _prepare_webdataset(turn: Turn) -> None:
    import webdataset as wds

    mapped = np.load(turn.npy, mmap_mode="r")
    pattern = str(turn.folder / "%06d.tar")
    with wds.ShardWriter(pattern, maxcount=turn.shard_rows, maxsize=2**40, verbose=0) as sink:
        for i, row in enumerate(mapped):
            sink.write({"__key__": f"{i:09d}", "npy": np.asarray(row)})


def _webdataset(turn: Turn) -> Batches:
    import torch
    import webdataset as wds

    urls = [str(file) for file in files_under(turn.folder)]
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .shuffle(turn.shuffle_rows)
        .decode()
        .to_tuple("npy")
        .batched(turn.rows.batch, collation_fn=_stack)
    )
    loader = _loader(dataset, wds.WebLoader, turn, batch_size=None)
    return (batch if isinstance(batch, torch.Tensor) else batch[0] for batch in loader)


def _stack(samples: list[tuple[np.ndarray]]) -> Any:
    import torch

    return torch.from_numpy(np.stack([sample[0] for sample in samples]))


def _prepare_mosaicml(turn: Turn) -> None:
    from streaming import MDSWriter

    mapped = np.load(turn.npy, mmap_mode="r")
    kind = f"ndarray:{turn.rows.dtype}:{','.join(map(str, turn.rows.row_shape))}"
    limit = turn.shard_rows * (turn.rows.row_bytes + 16)
    with MDSWriter(out=str(turn.folder), columns={"x": kind}, size_limit=limit) as out:
        for row in mapped:
            out.write({"x": np.asarray(row)})


def _mosaicml(turn: Turn) -> Batches:
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(
        local=str(turn.folder), shuffle=True, batch_size=turn.rows.batch
    )
    make = streaming.StreamingDataLoader
    loader = _loader(dataset, make, turn, batch_size=turn.rows.batch)
    return (batch["x"] for batch in loader)


def _prepare_litdata(turn: Turn) -> None:
    import litdata

    litdata.optimize(
        fn=functools.partial(_torch_row, str(turn.npy)),
        inputs=list(range(turn.n)),
        output_dir=str(turn.folder),
        chunk_bytes=turn.shard_rows * turn.rows.row_bytes,
        num_workers=1,
        mode="overwrite",
    )


@functools.cache
def _mapped(npy: str) -> np.ndarray:
    return np.load(npy, mmap_mode="r")


def _torch_row(npy: str, i: int) -> Any:
    import torch

    return torch.from_numpy(np.array(_mapped(npy)[i]))


def _litdata(turn: Turn) -> Batches:
    import litdata

    dataset = litdata.StreamingDataset(str(turn.folder), shuffle=True, drop_last=False)
    make = litdata.StreamingDataLoader
    return _loader(dataset, make, turn, batch_size=turn.rows.batch)


def _prepare_zarr(turn: Turn) -> None:
    import zarr

    mapped = np.load(turn.npy, mmap_mode="r")
    array = zarr.create_array(
        str(turn.folder),
        shape=mapped.shape,
        dtype=mapped.dtype,
        chunks=(1, *turn.rows.row_shape),
        compressors=None,
        overwrite=True,
    )
    step = max(turn.rows.batch, turn.shard_rows)
    for first in range(0, turn.n, step):
        array[first : first + step] = mapped[first : first + step]


class _ZarrDataset:
    """A batch of rows by one orthogonal selection: its chunks are read concurrently."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._array: tuple[int, Any] = (0, None)  # zarr's loop thread does not survive a fork

    def __getitem__(self, rows: list[int]) -> Any:
        import torch
        import zarr

        if self._array[0] != os.getpid():
            self._array = os.getpid(), zarr.open_array(str(self.folder), mode="r")
        return torch.from_numpy(self._array[1].oindex[np.sort(rows)])


def _zarr(turn: Turn) -> Batches:
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    order = BatchSampler(RandomSampler(range(turn.n)), turn.rows.batch, drop_last=False)
    return _loader(_ZarrDataset(turn.folder), DataLoader, turn, sampler=order, batch_size=None)


PEERS = {
    "dataloader": Peer(package="torch", module="torch", batches=_dataloader),
    "ray_blocks": Peer(
        package="ray",
        module="ray.data",
        batches=_ray_blocks,
        prepare=_prepare_ray,
        workers=(0,),
    ),
    "webdataset": Peer(
        package="webdataset",
        module="webdataset",
        batches=_webdataset,
        prepare=_prepare_webdataset,
    ),
    "mosaicml": Peer(
        package="mosaicml-streaming",
        module="streaming",
        batches=_mosaicml,
        prepare=_prepare_mosaicml,
    ),
    "litdata": Peer(
        package="litdata", module="litdata", batches=_litdata, prepare=_prepare_litdata
    ),
    "zarr": Peer(package="zarr", module="zarr", batches=_zarr, prepare=_prepare_zarr),
}


def quiet() -> None:
    """Peers warn of read-only arrays and of their own options: not of what is measured."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def first_batches(batches: Batches, count: int) -> list[Any]:
    """The next ``count`` batches, as arrays of their own."""
    return [np.array(batch) for batch in itertools.islice(batches, count)]
