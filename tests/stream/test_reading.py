"""Rows that are in no file here: a reader's batches equal plain indexing, as a file's do."""

from __future__ import annotations

import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raypipe.errors import ConfigError, StoreCorrupt, WorkerFailed
from raypipe.stream import ArraySource, FeatureLoader, Gatherer, Join, MappedRows
from raypipe.stream.reading import OpenRows, RowReader, Source


@dataclass(frozen=True)
class Numbers:
    """A source without a file: row i is drawn from seed i."""

    n_rows: int
    row_shape: tuple[int, ...]
    dtype: str = "float16"
    fingerprint: str = ""

    @property
    def stored_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape)) * self.stored_dtype.itemsize

    def open(self) -> RowReader:
        return Reader(self)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        found = [np.random.default_rng(row).standard_normal(self.row_shape) for row in rows]
        return np.array(found).astype(self.dtype).reshape(len(rows), *self.row_shape)


class Reader:
    """Answers each batch after a delay of its own, from a thread of its own."""

    def __init__(self, source: Numbers, delay: Callable[[int], float] = lambda index: 0.0) -> None:
        self.source, self._delay = source, delay
        self.asked: list[np.ndarray] = []
        self.waited: list[int] = []
        self.threads: set[threading.Thread] = set()

    def check(self, rows: np.ndarray) -> None:
        if rows.min() < 0 or rows.max() >= self.source.n_rows:
            raise ConfigError(f"rows {rows.min()}..{rows.max()} of {self.source.n_rows}")

    def start(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        self.threads.add(threading.current_thread())
        index = len(self.asked)
        self.asked.append(rows.copy())
        found: list[np.ndarray] = []

        def read() -> None:
            time.sleep(self._delay(index))
            found.append(self.source.rows(rows))

        thread = threading.Thread(target=read)
        thread.start()

        def wait() -> np.ndarray:
            self.waited.append(index)
            thread.join()
            return found.pop()

        return wait


def opener(*readers: RowReader) -> OpenRows:
    """Opens these readers' sources by them, and all others as they open themselves."""
    return lambda source: next((r for r in readers if r.source is source), None) or source.open()


def drawn(count: int, size: int, n: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, n, size) for _ in range(count)]


@pytest.mark.parametrize("row_shape", [(), (5,), (3, 4), (40, 700)])
@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("sort_reads", [None, True])
def test_a_readers_batches_equal_plain_indexing(
    row_shape: tuple[int, ...], dtype: str | None, sort_reads: bool | None
) -> None:
    source = Numbers(50, row_shape)
    asked = [*drawn(7, 6, 50), np.array([3]), np.array([], dtype=np.int64)]
    with Gatherer({"a": source}, 6, dtype=dtype, sort_reads=sort_reads) as gatherer:
        for rows, batch in zip(asked, gatherer.batches(asked), strict=True):
            assert np.array_equal(batch["a"].numpy(), source.rows(rows).astype(dtype or "float16"))


@given(
    batches=st.lists(st.lists(st.integers(0, 29), max_size=8), max_size=8),
    delays=st.lists(st.sampled_from([0.0, 0.002, 0.01]), min_size=8, max_size=8),
    threads=st.integers(1, 3),
    depth=st.integers(2, 4),
    lend=st.booleans(),
    sort_reads=st.sampled_from([None, True, False]),
    read_ahead=st.sampled_from([None, 2]),
    dtype=st.sampled_from([None, "float32"]),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_options_and_delays_give_the_batches_of_plain_indexing(
    tmp_path: Path, batches: list[list[int]], delays: list[float], **options: object
) -> None:
    array = np.arange(30 * 70_000, dtype=np.float32).reshape(30, 7, 10_000)
    path = tmp_path / "a.npy"
    if not path.exists():
        np.save(path, array)
    far = Reader(Numbers(30, (7, 9_000), "float32"), delays.__getitem__)
    near = Numbers(30, (2,))
    sources = {"a": path, "far": far.source, "near": near}
    join = {"x": Join(("far", "a"))}
    rows = [np.array(one, dtype=np.int64) for one in batches]
    with Gatherer(sources, 8, join=join, open_rows=opener(far), **options) as gatherer:
        for one, batch in zip(rows, gatherer.batches(rows), strict=True):
            whole = np.concatenate([far.source.rows(one), array[one]], axis=2)
            assert np.array_equal(batch["x"].numpy(), whole)
            assert np.array_equal(
                batch["near"].numpy(), near.rows(one).astype(options["dtype"] or "float16")
            )


@pytest.mark.parametrize(("depth", "lend"), [(2, False), (4, False), (4, True)])
def test_all_batches_of_the_ring_are_under_way_at_once_in_the_callers_thread(
    depth: int, lend: bool
) -> None:
    # The first comes last: batches are handed out in order all the same.
    reader = Reader(Numbers(50, (5,)), lambda index: 0.2 if index == 0 else 0.0)
    asked = drawn(6, 3, 50)
    with Gatherer(
        {"a": reader.source}, 3, depth=depth, lend=lend, threads=1, open_rows=opener(reader)
    ) as gatherer:
        batches = gatherer.batches(asked)
        first = next(batches)
        assert len(reader.asked) == depth - lend
        assert np.array_equal(first["a"].numpy(), reader.source.rows(asked[0]))
        list(batches)
    assert reader.threads == {threading.current_thread()}
    assert all(map(np.array_equal, reader.asked, asked))
    assert sorted(reader.waited) == list(range(6))  # once each, however many pieces there are


def test_delays_overlap() -> None:
    reader = Reader(Numbers(9, (5,)), lambda index: 0.1)
    with Gatherer({"a": reader.source}, 2, depth=8, open_rows=opener(reader)) as gatherer:
        began = time.perf_counter()
        assert len(list(gatherer.batches(drawn(16, 2, 9)))) == 16
        assert time.perf_counter() - began < 0.8  # one after the other: 1.6 s


def test_a_batch_is_waited_for_once_by_all_its_pieces() -> None:
    reader = Reader(Numbers(9, (300_000,), "float32"), lambda index: 0.05)
    with Gatherer({"a": reader.source}, 8, threads=4, open_rows=opener(reader)) as gatherer:
        (batch,) = gatherer.batches([np.arange(8)])
        assert np.array_equal(batch["a"].numpy(), reader.source.rows(np.arange(8)))
    assert reader.waited == [0]


class Failing(Reader):
    """Fails at batch ``at``, in ``start``, or in the wait."""

    def __init__(self, source: Numbers, at: int, start: bool) -> None:
        super().__init__(source)
        self._at, self._start = at, start

    def start(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        wait = super().start(rows)

        def fail() -> np.ndarray:
            raise WorkerFailed(f"no answer for batch {self._at}")

        if len(self.asked) - 1 != self._at:
            return wait
        return fail() if self._start else fail  # type: ignore[return-value]


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_error_is_raised_in_place_of_its_batch_and_the_gatherer_goes_on(
    at: int, start: bool
) -> None:
    reader = Failing(Numbers(50, (200_000,), "float32"), at, start)
    asked = drawn(6, 4, 50)
    with Gatherer({"a": reader.source}, 4, threads=2, open_rows=opener(reader)) as gatherer:
        batches = gatherer.batches(asked)
        for rows in asked[:at]:
            assert np.array_equal(next(batches)["a"].numpy(), reader.source.rows(rows))
        with pytest.raises(WorkerFailed, match=f"batch {at}"):
            next(batches)
        assert next(batches, None) is None
        (batch,) = gatherer.batches([np.array([7, 7])])
        assert np.array_equal(batch["a"].numpy(), reader.source.rows(np.array([7, 7])))


def test_rows_that_the_reader_does_not_have_are_refused_by_its_check() -> None:
    reader = Reader(Numbers(50, (5,)))
    with Gatherer({"a": reader.source}, 4, open_rows=opener(reader)) as gatherer:
        batches = gatherer.batches([np.array([1]), np.array([3, 50])])
        next(batches)
        with pytest.raises(ConfigError, match=r"3\.\.50"):
            next(batches)
        with pytest.raises(ConfigError, match="batch of 5 rows"):
            list(gatherer.batches([np.arange(5)]))
    assert len(reader.asked) == 1


@pytest.mark.parametrize("found", [np.zeros((2, 5), "f8"), np.zeros((1, 5), "f2")])
def test_a_reader_that_gives_other_bytes_is_an_error(found: np.ndarray) -> None:
    reader = Reader(Numbers(50, (5,)))
    reader.start = lambda rows: lambda: found  # type: ignore[method-assign]
    with (
        Gatherer({"a": reader.source}, 4, open_rows=opener(reader)) as gatherer,
        pytest.raises(StoreCorrupt, match=f"{found.nbytes} bytes for 2 rows of 10"),
    ):
        list(gatherer.batches([np.array([1, 2])]))


def test_held_batches_stay_and_fetched_blocks_go() -> None:
    reader = Reader(Numbers(50, (5,)))
    blocks: list[weakref.ref[np.ndarray]] = []
    start = reader.start

    def kept(rows: np.ndarray) -> Callable[[], np.ndarray]:
        wait = start(rows)

        def answer() -> np.ndarray:
            found = wait()
            blocks.append(weakref.ref(found))
            return found

        return answer

    reader.start = kept  # type: ignore[method-assign]
    asked = drawn(9, 4, 50)
    with Gatherer({"a": reader.source}, 4, lend=True, open_rows=opener(reader)) as gatherer:
        held = [batch["a"] for batch in gatherer.batches(asked)]
        gc.collect()
        assert len(blocks) == 9
        assert not any(block() is not None for block in blocks)
    for rows, batch in zip(asked, held, strict=True):
        assert np.array_equal(batch.numpy(), reader.source.rows(rows))


def test_an_iteration_that_ends_early_lets_go_of_what_is_under_way() -> None:
    reader = Reader(Numbers(50, (5,)), lambda index: 0.02)
    with Gatherer({"a": reader.source}, 4, open_rows=opener(reader)) as gatherer:
        batches = gatherer.batches(drawn(9, 4, 50))
        next(batches)
        batches.close()
        (batch,) = gatherer.batches([np.array([9])])
        assert np.array_equal(batch["a"].numpy(), reader.source.rows(np.array([9])))


def test_the_loader_reads_through_a_reader_and_shards_side_by_side(tmp_path: Path) -> None:
    far = Numbers(40, (6,), fingerprint="f")
    near = np.arange(40, dtype=np.float32)
    np.save(tmp_path / "y.npy", near)
    opened: list[Source] = []

    def open_rows(source: Source) -> MappedRows | RowReader:
        opened.append(source)
        return source.open()

    loader = FeatureLoader(
        {"x": far, "y": tmp_path / "y.npy"}, 8, seed=3, rows=range(1, 40), open_rows=open_rows
    )
    seen = []
    for batch in loader:
        rows = batch["y"].long().numpy()
        seen.extend(rows.tolist())
        assert np.array_equal(batch["x"].numpy(), far.rows(rows))
    assert sorted(seen) == list(range(1, 40))
    assert {type(source) for source in opened} == {Numbers, ArraySource}
    assert loader.state_dict()["sources"]["x"] == "f"
    loader.close()
    again = FeatureLoader({"x": far}, 8)  # a source that opens itself travels in a pickle
    copy = pickle.loads(pickle.dumps(again))
    assert torch.equal(next(iter(copy))["x"], next(iter(again))["x"])


def test_readers_are_asked_for_no_empty_batch() -> None:
    reader = Reader(Numbers(50, (5,)))

    def rows() -> Iterator[np.ndarray]:
        yield np.array([], dtype=np.int64)
        yield np.array([4])

    with Gatherer({"a": reader.source}, 4, open_rows=opener(reader)) as gatherer:
        assert [tuple(batch["a"].shape) for batch in gatherer.batches(rows())] == [(0, 5), (1, 5)]
    assert len(reader.asked) == 1
