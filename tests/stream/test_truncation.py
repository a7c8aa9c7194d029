"""A file that is cut short in the middle of reading is an error, never the end of the process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from raypipe.errors import StoreCorrupt
from raypipe.stream import ArraySource, scatter
from raypipe.stream.mapped import MappedRows

# Reads without a pause while a thread cuts the file and makes it whole again, at random moments.
CHILD = """
    import os, sys, threading, time
    import numpy as np
    from raypipe.errors import StoreCorrupt
    from raypipe.stream import Gatherer, Join

    CUTS = 60
    small, large, rng = *sys.argv[1:], np.random.default_rng(0)

    def cut(path, stop):
        times, whole = np.random.default_rng(1), os.path.getsize(path)
        for size in times.integers(4096, whole, CUTS).tolist():
            time.sleep(times.uniform(0, 0.004))
            os.truncate(path, size)
            time.sleep(times.uniform(0, 0.002))
            os.truncate(path, whole)
        stop.set()

    def read(path, batch, **more):
        n, caught, stop = len(np.load(path, mmap_mode="r")), 0, threading.Event()
        with Gatherer({"a": path, "b": path}, batch, threads=2, **more) as gatherer:
            thread = threading.Thread(target=cut, args=(path, stop))
            thread.start()
            while not stop.is_set():
                try:
                    for _ in gatherer.batches(rng.integers(0, n, batch) for _ in range(50)):
                        pass
                except StoreCorrupt as error:
                    assert "cut short" in str(error), error
                    caught += 1
            thread.join()
        return caught

    joined = {"x": Join(("a", "b"))}
    print(
        read(small, 1024),
        read(small, 1024, dtype="float32"),
        read(small, 1024, sort_reads=True, join=joined),
        read(large, 8),
        read(large, 8, dtype="float32"),
        read(large, 8, sort_reads=True),
        read(large, 8, join=joined),
    )
    sys.exit(3)
"""


def test_a_file_cut_in_the_middle_of_a_copy_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    files = [tmp_path / "small.npy", tmp_path / "large.npy"]
    for path, row in zip(files, [(768,), (300, 768)], strict=True):
        count = 6_000_000 // (2 * int(np.prod(row)))
        np.save(path, np.ones((count, *row), np.float16))
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert child.returncode == 3, (child.returncode, child.stderr)
    assert all(int(caught) > 0 for caught in child.stdout.split()), child.stdout


@pytest.fixture
def small(tmp_path: Path) -> tuple[MappedRows, np.ndarray]:
    array = np.random.default_rng(0).standard_normal((3000, 768)).astype(np.float16)
    np.save(tmp_path / "a.npy", array)
    return ArraySource.npy(tmp_path / "a.npy").open(), array


def taken(mapped: MappedRows, rows: np.ndarray) -> np.ndarray:
    out = np.empty((rows.size, mapped.source.row_bytes), np.uint8)
    mapped.take(rows, out)
    return out.view(mapped.source.stored_dtype)


@pytest.mark.parametrize("system", ["as it is", "forbids it", "has no such call"])
def test_scattered_rows_are_read_with_and_without_the_systems_help(
    small: tuple[MappedRows, np.ndarray], system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if system != "as it is":
        monkeypatch.setattr(
            scatter, "_copy", None if system == "has no such call" else lambda *given: -1
        )
    mapped, array = small
    for rows in (
        np.random.default_rng(1).integers(0, 3000, 2500),  # more than one call takes
        np.arange(1000, 2999),
        np.array([7, 8, 9, 3, 4, 2999]),
        np.array([5]),
    ):
        assert np.array_equal(taken(mapped, rows), array[rows])


def test_what_is_missing_is_told_where_the_size_seemed_right(
    small: tuple[MappedRows, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, array = small
    monkeypatch.setattr(mapped, "_check_size", lambda: None)  # as if cut just after the look
    os.truncate(mapped.source.path, 128 + 100 * 1536)
    assert np.array_equal(taken(mapped, np.array([1, 99])), array[[1, 99]])
    for rows in (np.array([1, 2000]), np.arange(90, 110)):
        with pytest.raises(StoreCorrupt, match=f"holds {128 + 100 * 1536} bytes"):
            taken(mapped, rows)
    with pytest.raises(StoreCorrupt, match="cut short"):
        mapped.part(2000, 0, np.empty(10, np.uint8))


def test_a_disk_that_fails_is_an_error_of_the_file(
    small: tuple[MappedRows, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object) -> int:
        raise OSError(5, "Input/output error")

    mapped, _ = small
    monkeypatch.setattr(scatter, "_copy", None)
    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(StoreCorrupt, match=r"a\.npy cannot be read at byte .*Input/output"):
        taken(mapped, np.array([1, 2]))
