"""A file that is cut short in the middle of reading is an error: what is read, said and let go of.

That no process ends of it is shown in processes of their own, by test_truncation_process.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from raypipe.errors import StoreCorrupt
from raypipe.stream import ArraySource, Gatherer, MappedRows, guarded, scatter

GUARDED = guarded._handler() is not None
needs_guard = pytest.mark.skipif(not GUARDED, reason="no guard on this system")


@pytest.fixture
def kernel_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raypipe.stream.mapped.guard", lambda start, n_bytes: None)


@pytest.fixture(params=[pytest.param("guarded", marks=needs_guard), "kernel"])
def way(request: pytest.FixtureRequest) -> str:
    if request.param == "kernel":
        request.getfixturevalue("kernel_copies")
    return str(request.param)


@pytest.fixture
def small(tmp_path: Path) -> tuple[MappedRows, np.ndarray]:
    array = np.random.default_rng(0).standard_normal((3000, 768)).astype(np.float16)
    np.save(tmp_path / "a.npy", array)
    return ArraySource.npy(tmp_path / "a.npy").open(), array


def taken(mapped: MappedRows, rows: np.ndarray) -> np.ndarray:
    out = np.empty((rows.size, mapped.source.row_bytes), np.uint8)
    mapped.take(rows, out)
    return out.view(mapped.source.stored_dtype)


ASKED = (
    np.random.default_rng(1).integers(0, 3000, 2500),  # more than one call of the kernel takes
    np.arange(1000, 2999),
    np.array([7, 8, 9, 3, 4, 2999]),
    np.array([5]),
)


@pytest.mark.usefixtures("way")
def test_rows_and_parts_of_them_are_read(small: tuple[MappedRows, np.ndarray]) -> None:
    mapped, array = small
    for rows in ASKED:
        assert np.array_equal(taken(mapped, rows), array[rows])
    part = np.empty(1000, np.uint8)
    mapped.part(5, 2, part)
    assert np.array_equal(part, array[5].view(np.uint8)[2:1002])


@pytest.mark.usefixtures("kernel_copies")
@pytest.mark.parametrize("system", ["forbids it", "has no such call"])
def test_scattered_rows_are_read_without_the_systems_help(
    small: tuple[MappedRows, np.ndarray], system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        scatter, "_copy", None if system == "has no such call" else lambda *given: -1
    )
    mapped, array = small
    for rows in ASKED:
        assert np.array_equal(taken(mapped, rows), array[rows])


@pytest.mark.usefixtures("way")
def test_a_cut_after_the_look_at_the_size_is_told(
    small: tuple[MappedRows, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, _ = small
    size = 128 + 100 * 1536
    monkeypatch.setattr(mapped, "check", lambda rows: os.truncate(mapped.source.path, size))
    for rows in (np.array([1, 2000]), np.arange(90, 110)):
        with pytest.raises(StoreCorrupt, match=f"holds {size} bytes.*cut short"):
            taken(mapped, rows)
    with pytest.raises(StoreCorrupt, match="cut short"):
        mapped.part(2000, 0, np.empty(10, np.uint8))


@pytest.mark.usefixtures("way")
def test_a_file_that_grew_back_is_not_trusted_until_it_is_opened_again(
    small: tuple[MappedRows, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, array = small
    path, whole, rows = mapped.source.path, mapped.source.end_byte, np.array([1, 2000])
    with monkeypatch.context() as patch:
        patch.setattr(mapped, "check", lambda rows: os.truncate(path, 128 + 100 * 1536))
        with pytest.raises(StoreCorrupt):
            taken(mapped, rows)
    np.save(path.with_name("b.npy"), array)
    path.write_bytes(path.with_name("b.npy").read_bytes())
    mapped.give_back()
    mapped.ask_for(rows)
    mapped.resident(rows)
    for asked in (rows, np.array([1])):
        with pytest.raises(StoreCorrupt, match=f"cut short while .* has {whole} bytes again"):
            taken(mapped, asked)
        with pytest.raises(StoreCorrupt, match="open it again"):
            mapped.part(1, 0, np.empty(10, np.uint8))
    assert np.array_equal(taken(mapped.source.open(), rows), array[rows])


@pytest.mark.usefixtures("way")
def test_other_files_and_runs_do_not_suffer(
    small: tuple[MappedRows, np.ndarray], tmp_path: Path
) -> None:
    mapped, array = small
    np.save(tmp_path / "b.npy", array)
    other, rows = ArraySource.npy(tmp_path / "b.npy"), np.arange(2000, 2300)
    orders = [rows] * 40
    with Gatherer({"b": other}, 300) as going, Gatherer({"a": mapped.source}, 300) as cut:
        batches = going.batches(orders)
        next(batches)
        with pytest.raises(StoreCorrupt, match="cut short"):
            for _ in cut.batches(orders):
                os.truncate(mapped.source.path, 4096)
        left = [np.array_equal(batch["b"].numpy(), array[rows]) for batch in batches]
        assert left == [True] * 39


@needs_guard
def test_addresses_are_let_go_of_before_they_are_unmapped(
    small: tuple[MappedRows, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def maps() -> str:
        return Path("/proc/self/maps").read_text()

    first, array = small
    release, seen = guarded.GuardedRange.release, list[str]()
    monkeypatch.setattr(
        guarded.GuardedRange, "release", lambda self: (seen.append(maps()), release(self))
    )
    mapped = first.source.open()
    range_, view = mapped._guard, mapped.array
    assert range_ is not None and id(range_) in guarded._ranges
    line = f"{range_.start:x}-{range_.end:x} "
    del mapped
    gc.collect()
    assert id(range_) not in guarded._ranges
    assert len(seen) == 1 and line in seen[0] and line not in maps()
    assert np.array_equal(view, array)  # a map of its own


@pytest.mark.usefixtures("kernel_copies")
def test_a_disk_that_fails_is_an_error_of_the_file(
    small: tuple[MappedRows, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, _ = small
    monkeypatch.setattr(scatter, "_copy", None)
    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(StoreCorrupt, match=r"a\.npy cannot be read at byte .*Input/output"):
        taken(mapped, np.array([1, 2]))


@needs_guard
def test_a_fault_in_a_whole_file_is_an_error_of_the_disk(
    small: tuple[MappedRows, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, _ = small
    assert mapped._guard is not None
    mapped._guard.cut_at = mapped._guard.start + 5000
    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(StoreCorrupt, match=r"cannot be read at byte 5000 \(Input/output"):
        taken(mapped, np.array([1, 2]))


def fails(*given: object) -> int:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("lacks", ["linux", "glibc", "machine", "its place"])
def test_where_there_is_no_guard_the_kernel_copies(
    lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> str:
        raise ValueError(name)

    if lacks == "linux":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif lacks == "glibc":
        monkeypatch.setattr(os, "confstr", unknown)
    elif lacks == "machine":
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    if lacks == "its place":
        monkeypatch.setattr(guarded._Handler, "install", lambda self: False)
    else:
        monkeypatch.setattr(guarded, "_handler", guarded._handler.__wrapped__)
    array = np.arange(3000).reshape(30, 100)
    np.save(tmp_path / "a.npy", array)
    mapped = ArraySource.npy(tmp_path / "a.npy").open()
    assert mapped._guard is None
    assert np.array_equal(taken(mapped, np.array([7, 29, 3])), array[[7, 29, 3]])
