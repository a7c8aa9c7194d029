"""Casting, joining, file order, several threads, lending: always the same as plain indexing."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raypipe.errors import ConfigError, StoreCorrupt
from raypipe.stream import ArraySource, Gatherer, Join
from raypipe.stream.gather import ring_bytes
from raypipe.stream.mapped import MappedRows, reads_too_much

SHAPES = [(), (7,), (3, 5), (2, 3, 4), (40, 700), (9, 40_000)]


def saved(path: Path, array: np.ndarray, dtype: str | None = None) -> ArraySource:
    np.save(path, array)
    return ArraySource.npy(path, dtype=dtype)


def random(shape: tuple[int, ...], dtype: str = "float16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("row_shape", SHAPES)
@pytest.mark.parametrize("sort_reads", [True, False])
@pytest.mark.parametrize(
    ("stored", "cast"),
    [
        ("float16", None),
        ("float16", "float32"),
        ("float16", torch.bfloat16),
        ("float32", "float16"),
        ("bfloat16", "float32"),
        ("float64", "bfloat16"),
    ],
)
def test_cast_and_sorted_batches_equal_plain_indexing(
    tmp_path: Path,
    row_shape: tuple[int, ...],
    sort_reads: bool,
    stored: str,
    cast: str | torch.dtype | None,
) -> None:
    values = torch.from_numpy(random((13, *row_shape), "float64")).to(getattr(torch, stored))
    raw = values.view(torch.uint16) if stored == "bfloat16" else values
    np.save(tmp_path / "a.npy", raw.numpy())
    source = ArraySource.npy(tmp_path / "a.npy", dtype="bfloat16" if raw is not values else None)
    rows = [np.array([12, 0, 3, 3, 7, 1]), np.array([5]), np.array([2, 3, 4])]
    options = {"dtype": cast, "sort_reads": sort_reads, "threads": 2}
    with Gatherer({"a": source}, 6, **options) as gatherer:
        for asked, batch in zip(rows, gatherer.batches(rows), strict=True):
            expected = values[asked]
            if cast is not None:
                expected = expected.to(cast if not isinstance(cast, str) else getattr(torch, cast))
            assert batch["a"].dtype == expected.dtype
            assert torch.equal(batch["a"], expected)


@pytest.mark.parametrize("axis", [1, 2, 3, -1, -2, -3])
@pytest.mark.parametrize("sort_reads", [True, False])
@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("scale", [1, 60])  # small rows through the stage, large ones straight
def test_joined_sources_equal_a_concatenation(
    tmp_path: Path, axis: int, sort_reads: bool, dtype: str | None, scale: int
) -> None:
    arrays = {}
    for index, name in enumerate("abc"):
        shape = [11, 3, 4, 5 * scale]
        shape[axis] += index
        arrays[name] = random(tuple(shape), seed=index)
    weights = random((11,), "float32")
    sources = {name: saved(tmp_path / f"{name}.npy", array) for name, array in arrays.items()}
    sources["w"] = saved(tmp_path / "w.npy", weights)
    rows = np.array([10, 2, 2, 0, 9])
    join = {"x": Join(("b", "a", "c"), axis)}
    with Gatherer(sources, 5, join=join, dtype=dtype, sort_reads=sort_reads) as gatherer:
        (batch,) = gatherer.batches([rows])
        whole = np.concatenate([arrays[name] for name in "bac"], axis=axis)[rows]
        assert set(batch) == {"x", "w"}
        assert np.array_equal(batch["x"].numpy(), whole.astype(dtype or "float16"))
        assert batch["x"].is_contiguous()
        assert np.array_equal(batch["w"].numpy(), weights[rows])


def test_joins_and_casts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    a = saved(tmp_path / "a.npy", random((5, 3, 4)))
    b = saved(tmp_path / "b.npy", random((5, 3, 4), "float32"))
    c = saved(tmp_path / "c.npy", random((5, 2, 7)))
    for join, says in [
        ({"x": Join(("a", "no"))}, "no source 'no'"),
        ({"x": Join(("a", "b"))}, "float16 and float32"),
        ({"x": Join(("a", "c"))}, "do not fit"),
        ({"x": Join(("a", "a"))}, "used twice"),
        ({"b": Join(("a", "c"), 1)}, "name"),
        ({"x": Join((), 1)}, "no source"),
    ]:
        with pytest.raises(ConfigError, match=says):
            Gatherer({"a": a, "b": b, "c": c}, 2, join=join)
    for axis in (0, 3, -3):
        with pytest.raises(ConfigError, match="axis 0 counts rows"):
            Gatherer({"a": a, "b": b}, 2, join={"x": Join(("a", "b"), axis)}, dtype="float32")
    with pytest.raises(ConfigError, match="complex64"):
        Gatherer({"a": a}, 2, dtype="complex64")
    with pytest.raises(ConfigError, match="no source 'z'"):
        Gatherer({"a": a}, 2, dtype={"z": "float32"})
    with pytest.raises(ConfigError, match="threads=0"):
        Gatherer({"a": a}, 2, threads=0)


def test_one_dtype_leaves_whole_numbers_and_a_mapping_names_them(tmp_path: Path) -> None:
    sources = {
        "x": saved(tmp_path / "x.npy", random((5, 3))),
        "id": saved(tmp_path / "i.npy", np.arange(5)),
    }
    with Gatherer(sources, 2, dtype="float32") as gatherer:
        (batch,) = gatherer.batches([np.array([4, 1])])
        assert (batch["x"].dtype, batch["id"].dtype) == (torch.float32, torch.int64)
    with Gatherer(sources, 2, dtype={"id": torch.float32}) as gatherer:
        (batch,) = gatherer.batches([np.array([4, 1])])
        assert (batch["x"].dtype, batch["id"].tolist()) == (torch.float16, [4.0, 1.0])


@given(
    batches=st.lists(st.lists(st.integers(0, 29), max_size=8), max_size=12),
    threads=st.integers(1, 4),
    depth=st.integers(2, 4),
    sort_reads=st.sampled_from([None, True, False]),
    read_ahead=st.sampled_from([None, 0, 1, 5]),
    lend=st.booleans(),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_options_give_the_batches_of_plain_indexing(
    tmp_path: Path, batches: list[list[int]], threads: int, depth: int, **options: object
) -> None:
    array = np.arange(30 * 200_000, dtype=np.float32).reshape(30, -1)  # 0.8 MB a row: in pieces
    path = tmp_path / "a.npy"
    if not path.exists():
        np.save(path, array)
    with Gatherer({"a": path}, 8, depth=depth, threads=threads, **options) as gatherer:
        asked = [np.array(rows, dtype=np.int64) for rows in batches]
        for rows, batch in zip(asked, gatherer.batches(asked), strict=True):
            assert np.array_equal(batch["a"].numpy()[:, ::9999], array[rows][:, ::9999])


def test_a_file_truncated_under_several_threads_is_an_error(tmp_path: Path) -> None:
    array = random((64, 500_000))
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", array)
    sources = {name: tmp_path / f"{name}.npy" for name in "ab"}

    def rows() -> Iterator[np.ndarray]:
        os.truncate(tmp_path / "b.npy", 4096)
        yield from (np.arange(i, i + 8) for i in range(0, 56, 8))

    with Gatherer(sources, 8, threads=4, join={"x": Join(("a", "b"))}) as gatherer:
        with pytest.raises(StoreCorrupt, match="4096 bytes"):
            list(gatherer.batches(rows()))
        os.truncate(tmp_path / "b.npy", 128 + array.nbytes)  # as long again, with holes
        with pytest.raises(StoreCorrupt, match="open it again"):
            list(gatherer.batches([np.array([63, 5])]))


@pytest.mark.parametrize("hold", ["tensor", "slice", "numpy", "graph"])
def test_lent_batches_are_not_overwritten_while_anything_refers_to_them(
    tmp_path: Path, hold: str
) -> None:
    array = np.full((40, 6), np.arange(40)[:, None], np.float32)
    weight = torch.ones(6, requires_grad=True)
    with Gatherer({"a": saved(tmp_path / "a.npy", array)}, 2, lend=True) as gatherer:
        held = []
        for batch in gatherer.batches(np.array([i, i]) for i in range(40)):
            tensor = batch["a"]
            held.append(
                {
                    "tensor": lambda t: t,
                    "slice": lambda t: t[1:, 2:3],
                    "numpy": lambda t: t.numpy()[1:],
                    "graph": lambda t: (t * weight).sum(),
                }[hold](tensor)
            )
        del batch, tensor
        again = list(gatherer.batches(np.array([39, 39]) for _ in range(9)))  # nor by the next run
        if hold == "graph":
            for index, loss in enumerate(held):
                (grad,) = torch.autograd.grad(loss, weight)
                assert (grad == 2 * index).all()
        else:
            assert all(bool((one == index).all()) for index, one in enumerate(held))
        assert all(bool((batch["a"] == 39).all()) for batch in again)


def test_lent_memory_comes_back_and_is_used_again(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.npy", random((40, 6), "float32"))
    with Gatherer({"a": source, "b": source}, 2, lend=True) as gatherer:
        for _ in range(3):
            places = {batch["a"].data_ptr() for batch in gatherer.batches([np.array([1])] * 20)}
            assert len(places) <= 3
        held = [batch["a"] for batch in gatherer.batches([np.array([1])] * 20)]
        assert len({tensor.data_ptr() for tensor in held}) == 20
        del held
        gc.collect()
        assert len(gatherer._turns._returned) >= 17
        list(gatherer.batches([np.array([1])] * 2))
        assert len(gatherer._turns._free) <= 3


def test_a_batch_outlives_its_gatherer(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.npy", np.full((4, 6), 3, np.float32))
    with Gatherer({"a": source}, 2, lend=True) as gatherer:
        (batch,) = gatherer.batches([np.array([1, 2])])
    del gatherer
    gc.collect()
    assert (batch["a"] == 3).all()


def test_bytes_are_known_before(tmp_path: Path) -> None:
    sources = {
        "x": saved(tmp_path / "x.npy", random((5, 3))),
        "y": saved(tmp_path / "y.npy", random((5, 4))),
    }
    options = {"dtype": "float32", "join": {"z": Join(("x", "y"))}}
    assert ring_bytes(sources, 2, 3) == 3 * 2 * 7 * 2
    assert ring_bytes(sources, 2, 3, **options) == 3 * 2 * 7 * 4
    assert ring_bytes(sources, 2, 3, cast_on_device=True, **options) == 3 * 2 * 7 * 2
    with Gatherer(sources, 2, **options, threads=1) as gatherer:
        ring = sum(t.nbytes for slot in gatherer._slots for t in slot.tensors.values())
        assert ring == ring_bytes(sources, 2, 3, **options)
        assert 0 < gatherer.buffer_bytes - ring <= 1 << 20


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise here")
def test_cold_rows_are_seen_asked_for_and_read(tmp_path: Path) -> None:
    array = random((64, 300_000))
    source = saved(tmp_path / "a.npy", array)
    with source.path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = source.open()
    rows = np.arange(0, 64, 7)
    if mapped.resident(rows) is not False:
        pytest.skip("the file system keeps its pages, or does not tell")
    mapped.ask_for(rows)
    for _ in range(500):
        if mapped.resident(rows):
            break
        time.sleep(0.02)
    assert mapped.resident(rows)
    mapped.ask_for(np.array([-5, 10**9]))  # a hint about nothing
    with Gatherer({"a": source}, 16, read_ahead=2) as gatherer:
        asked = [np.random.default_rng(i).permutation(64)[:16] for i in range(6)]
        for order, batch in zip(asked, gatherer.batches(asked), strict=True):
            assert np.array_equal(batch["a"].numpy(), array[order])


def test_a_cold_batch_is_read_in_file_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = random((30, 20_000))
    taken: list[int] = []
    take = MappedRows.take
    monkeypatch.setattr(
        MappedRows, "take", lambda self, rows, out: (taken.extend(rows), take(self, rows, out))[1]
    )
    monkeypatch.setattr(MappedRows, "resident", lambda self, rows: False)
    source = saved(tmp_path / "a.npy", array[:, :100])
    with Gatherer({"a": source}, 9) as gatherer:
        asked = np.array([7, 1, 29, 3])
        (batch,) = gatherer.batches([asked])
        assert taken == sorted(asked)
        assert np.array_equal(batch["a"].numpy(), array[asked, :100])


def test_single_pages_are_faulted_in_only_for_small_rows_of_files_beyond_memory() -> None:
    gib = 1 << 30
    assert reads_too_much(3 << 10, 100 * gib, 64 * gib)
    assert not reads_too_much(3 << 10, 10 * gib, 64 * gib)
    assert not reads_too_much(1 << 20, 100 * gib, 64 * gib)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_on_cuda_the_device_casts_what_was_joined(tmp_path: Path, dtype: str | None) -> None:
    arrays = {name: random((64, 33, 128), seed=i) for i, name in enumerate("ab")}
    sources = {name: saved(tmp_path / f"{name}.npy", array) for name, array in arrays.items()}
    order = [np.random.default_rng(i).permutation(64)[:16] for i in range(20)]
    join = {"x": Join(("a", "b"), 2)}
    with Gatherer(sources, 16, "cuda", dtype=dtype, join=join, lend=True) as gatherer:
        assert all(slot.tensors["x"].dtype == torch.float16 for slot in gatherer._slots)
        batches = list(gatherer.batches(order))
    for rows, batch in zip(order, batches, strict=True):
        whole = torch.from_numpy(np.concatenate([arrays["a"], arrays["b"]], axis=2)[rows])
        assert batch["x"].is_cuda
        assert torch.equal(batch["x"].cpu(), whole.to(getattr(torch, dtype or "float16")))
