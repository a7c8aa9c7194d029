"""Gathered batches equal plain indexing; buffers are not reused too early; failures surface."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raypipe.errors import ConfigError, MissingInput, StoreCorrupt, StoreError
from raypipe.memory.guard import relieve
from raypipe.memory.probe import ProcessProbe
from raypipe.stream import ArraySource, Gatherer


def saved(path: Path, array: np.ndarray) -> ArraySource:
    np.save(path, array)
    return ArraySource.npy(path)


@pytest.fixture
def numbers(tmp_path: Path) -> ArraySource:
    """20 rows (2, 3) float32; row i holds i everywhere."""
    return saved(tmp_path / "n.npy", np.full((20, 2, 3), np.arange(20)[:, None, None], np.float32))


def firsts(gatherer: Gatherer, rows: list[list[int]]) -> list[list[float]]:
    """The first number of each row of each batch."""
    batches = gatherer.batches(np.array(r, dtype=np.int64) for r in rows)
    return [batch["a"].flatten(1)[:, 0].tolist() for batch in batches]


@pytest.mark.parametrize(
    "dtype",
    ["float16", "float32", "float64", "bool", "uint8", "int8", "int16", "uint16", "int32", "int64"],
)
@pytest.mark.parametrize("row_shape", [(), (5,), (3, 2)])
def test_every_dtype_equals_plain_indexing(
    tmp_path: Path, dtype: str, row_shape: tuple[int, ...]
) -> None:
    array = (np.random.default_rng(0).standard_normal((11, *row_shape)) * 50).astype(dtype)
    rows = np.array([10, 0, 3, 3])
    with Gatherer({"a": saved(tmp_path / "a.npy", array)}, 4) as gatherer:
        (batch,) = gatherer.batches([rows])
        assert np.array_equal(batch["a"].numpy(), array[rows])
        assert batch["a"].dtype == getattr(torch, dtype)


def test_a_map_gives_its_pages_back_and_reads_them_again(tmp_path: Path) -> None:
    array = np.arange(4 << 20, dtype=np.int64).reshape(1024, -1)
    mapped = saved(tmp_path / "a.npy", array).open()
    view = mapped.array
    with ProcessProbe(os.getpid()) as probe:
        assert int(view.sum()) == int(array.sum())
        full = probe.read().file_bytes
        relieve()
        assert probe.read().file_bytes < full - array.nbytes // 2
    assert np.array_equal(view, array)


def test_bfloat16_bits_become_bfloat16_numbers(tmp_path: Path) -> None:
    values = torch.randn(6, 4).bfloat16()
    np.save(tmp_path / "b.npy", values.view(torch.uint16).numpy())
    source = ArraySource.npy(tmp_path / "b.npy", dtype="bfloat16")
    with Gatherer({"a": source}, 3) as gatherer:
        (batch,) = gatherer.batches([np.array([5, 1])])
        assert batch["a"].dtype == torch.bfloat16
        assert torch.equal(batch["a"], values[[5, 1]])


@given(
    batches=st.lists(st.lists(st.integers(0, 19), max_size=6), max_size=9), depth=st.integers(2, 5)
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_batches_come_in_order_and_whole(
    numbers: ArraySource, batches: list[list[int]], depth: int
) -> None:
    with Gatherer({"a": numbers}, 6, depth=depth) as gatherer:
        assert firsts(gatherer, batches) == batches


def test_a_batch_in_use_is_not_overwritten(numbers: ArraySource) -> None:
    with Gatherer({"a": numbers}, 2) as gatherer:
        for index, batch in enumerate(gatherer.batches(np.array([i]) for i in range(20))):
            time.sleep(0.002)  # the thread runs as far ahead as it may
            assert (batch["a"] == index).all()


@pytest.mark.parametrize("depth", [2, 3])
def test_rows_are_asked_for_in_the_callers_thread_and_not_too_early(
    numbers: ArraySource, depth: int
) -> None:
    asked: list[int] = []

    def rows() -> Iterator[np.ndarray]:
        for index in range(10):
            assert threading.current_thread() is threading.main_thread()
            asked.append(index)
            yield np.array([index])

    with Gatherer({"a": numbers}, 1, depth=depth) as gatherer:
        for index, _ in enumerate(gatherer.batches(rows())):
            assert len(asked) == min(10, index + depth)


def test_the_next_batch_is_read_while_the_caller_works(
    numbers: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gatherer({"a": numbers}, 1, depth=2) as gatherer:
        fill, threads = gatherer._fill, []

        def slow_fill(job, lo, hi):  # type: ignore[no-untyped-def]
            threads.append(threading.current_thread())
            time.sleep(0.05)
            return fill(job, lo, hi)

        monkeypatch.setattr(gatherer, "_fill", slow_fill)
        started = time.monotonic()
        for _ in gatherer.batches(np.array([i]) for i in range(8)):
            time.sleep(0.05)
        assert time.monotonic() - started < 0.05 * 13  # 16 one after the other, 9 overlapped
        assert threading.main_thread() not in threads


def test_buffers_are_reused(numbers: ArraySource) -> None:
    with Gatherer({"a": numbers}, 4, depth=3) as gatherer:
        places = {b["a"].data_ptr() for b in gatherer.batches([np.array([0])] * 12)}
        assert len(places) == 3
        assert gatherer.buffer_bytes == 3 * 4 * 6 * 4


def test_a_misaligned_source_is_read_right_without_a_copy(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    (tmp_path / "raw").write_bytes(b"abc" + array.tobytes())
    source = ArraySource(path=tmp_path / "raw", dtype="float32", shape=(4, 3), offset=3)
    with Gatherer({"a": source}, 4) as gatherer:
        (batch,) = gatherer.batches([np.array([3, 1])])
        assert np.array_equal(batch["a"].numpy(), array[[3, 1]])


def test_a_locator_becomes_a_source(numbers: ArraySource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYPIPE_NODE", "n1")  # where it is read
    locator = SimpleNamespace(
        path=str(numbers.path),
        dtype="float32",
        shape=[20, 2, 3],
        offset=numbers.offset,
        node="n1",
        fingerprint="f",
    )
    source = ArraySource.of_locator(locator)
    assert (source.node, source.fingerprint, source.shape) == ("n1", "f", (20, 2, 3))
    with Gatherer({"a": pickle.loads(pickle.dumps(source))}, 2) as gatherer:
        assert firsts(gatherer, [[7, 2]]) == [[7, 2]]


def test_the_map_is_read_only_and_the_file_untouched(numbers: ArraySource) -> None:
    array = numbers.open().array
    assert array.shape == (20, 2, 3)
    assert not array.flags.writeable
    with Gatherer({"a": numbers}, 2) as gatherer:
        for batch in gatherer.batches([np.array([1])]):
            batch["a"].fill_(99)
    assert np.load(numbers.path)[1, 0, 0] == 1


def test_a_truncated_file_is_refused_when_opened(numbers: ArraySource) -> None:
    os.truncate(numbers.path, numbers.path.stat().st_size - 1)
    with pytest.raises(StoreCorrupt, match="extract or copy it again"):
        ArraySource.npy(numbers.path)
    with pytest.raises(StoreCorrupt, match="cut short"):
        numbers.open()
    os.truncate(numbers.path, 0)
    with pytest.raises(StoreCorrupt, match="cut short"):
        numbers.open()


def test_a_file_truncated_under_the_map_is_an_error_not_a_signal(numbers: ArraySource) -> None:
    with Gatherer({"a": numbers}, 2) as gatherer:
        batches = gatherer.batches(np.array([i]) for i in range(20))
        next(batches)
        os.truncate(numbers.path, 130)
        with pytest.raises(StoreCorrupt, match="130 bytes"):
            list(batches)


def test_files_that_cannot_be_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"no\.npy"):
        ArraySource.npy(tmp_path / "no.npy")
    np.save(tmp_path / "f.npy", np.asfortranarray(np.ones((3, 4))))
    with pytest.raises(StoreError, match="Fortran"):
        ArraySource.npy(tmp_path / "f.npy")
    np.save(tmp_path / "be.npy", np.ones(3, ">f4"))
    with pytest.raises(ConfigError, match="little-endian"):
        ArraySource.npy(tmp_path / "be.npy")
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(StoreCorrupt):
        ArraySource.npy(tmp_path / "o.npy")
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(StoreCorrupt):
        ArraySource.npy(tmp_path / "text.npy")
    np.savez(tmp_path / "z.npz", a=np.ones(3))
    with pytest.raises(StoreError):
        ArraySource.npy(tmp_path / "z.npz")
    np.save(tmp_path / "c.npy", np.ones(3, np.complex64))
    with pytest.raises(ConfigError, match="complex64"):
        ArraySource.npy(tmp_path / "c.npy")
    np.save(tmp_path / "s.npy", np.float32(3))
    with pytest.raises((StoreError, ConfigError)):
        ArraySource.npy(tmp_path / "s.npy")
    np.save(tmp_path / "ok.npy", np.ones(3, np.float32))
    with pytest.raises(ConfigError, match="cannot be read as bfloat16"):
        ArraySource.npy(tmp_path / "ok.npy", dtype="bfloat16")
    with pytest.raises(ConfigError, match="empty axis"):
        ArraySource(path=tmp_path / "ok.npy", dtype="float32", shape=(3, 0), offset=0)
    gone = ArraySource(path=tmp_path / "gone", dtype="float32", shape=(3,), offset=0)
    with pytest.raises(MissingInput):
        gone.open()


@pytest.mark.parametrize("rows", [[-1], [20], [3, 99]])
def test_rows_the_file_does_not_have_are_refused(numbers: ArraySource, rows: list[int]) -> None:
    with Gatherer({"a": numbers}, 4) as gatherer:
        with pytest.raises(ConfigError, match="which has 20"):
            firsts(gatherer, [[1], rows, [2]])
        assert firsts(gatherer, [[1]]) == [[1]]  # and the gatherer is still good


def test_too_large_a_batch_is_refused(numbers: ArraySource) -> None:
    with Gatherer({"a": numbers}, 2) as gatherer, pytest.raises(ConfigError, match="3 rows"):
        firsts(gatherer, [[1, 2, 3]])


def test_an_error_of_the_callers_iterator_surfaces(numbers: ArraySource) -> None:
    def rows() -> Iterator[np.ndarray]:
        yield np.array([1])
        raise KeyError("feeder")

    with Gatherer({"a": numbers}, 2) as gatherer, pytest.raises(KeyError, match="feeder"):
        list(gatherer.batches(rows()))


def test_one_stream_of_batches_at_a_time(numbers: ArraySource) -> None:
    with Gatherer({"a": numbers}, 2) as gatherer:
        first = gatherer.batches(np.array([i]) for i in range(20))
        next(first)
        with pytest.raises(ConfigError, match="already"):
            next(gatherer.batches([np.array([1])]))
        first.close()  # abandoned half-way
        assert firsts(gatherer, [[4], [5]]) == [[4], [5]]


def test_closing_with_a_stream_open_does_not_hang(numbers: ArraySource) -> None:
    gatherer = Gatherer({"a": numbers}, 2)
    batches = gatherer.batches(np.array([i]) for i in range(20))
    next(batches)
    gatherer.close()
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("raypipe-gather")]


@pytest.mark.parametrize(("max_rows", "depth"), [(0, 3), (2, 1)])
def test_bad_sizes_are_refused(numbers: ArraySource, max_rows: int, depth: int) -> None:
    with pytest.raises(ConfigError, match="give at least"):
        Gatherer({"a": numbers}, max_rows, depth=depth)
    with pytest.raises(ConfigError, match="0 sources"):
        Gatherer({}, 1)


def test_gathering_a_large_file_stays_within_its_buffers(tmp_path: Path) -> None:
    """RssAnon, the memory that the kernel cannot take back, does not grow with the file."""
    array = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float16, (256, 128, 1024))
    array[:] = 1  # 64 MiB
    array.flush()
    del array

    def anon_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))

    with Gatherer({"a": ArraySource.npy(tmp_path / "big.npy")}, 4, depth=3) as gatherer:
        before = anon_bytes()
        for batch in gatherer.batches(np.arange(i, i + 4) for i in range(0, 256, 4)):
            assert batch["a"][0, 0, 0] == 1
        assert anon_bytes() - before < gatherer.buffer_bytes + (4 << 20)


def test_importing_stream_brings_neither_torch_nor_ray() -> None:
    code = "import sys, raypipe.stream; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_batches_are_right_and_belong_to_the_caller(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((64, 256, 128)).astype(np.float16)
    source = saved(tmp_path / "a.npy", array)
    order = [np.random.default_rng(i).permutation(64)[:16] for i in range(30)]
    with Gatherer({"a": source}, 16, "cuda") as gatherer:
        batches = list(gatherer.batches(order))
    for rows, batch in zip(order, batches, strict=True):
        assert batch["a"].is_cuda
        assert np.array_equal(batch["a"].cpu().numpy(), array[rows])
