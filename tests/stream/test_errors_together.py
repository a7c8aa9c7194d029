"""Several sources of one batch fail at once: all are told, the first is raised, nobody waits long."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raypipe.errors import RaypipeError, WorkerFailed, in_one_line
from raypipe.stream import ArraySource, Gatherer

SOON_S = 3.0
N = 64


@pytest.fixture
def file(tmp_path: Path) -> ArraySource:
    np.save(tmp_path / "near.npy", np.arange(N, dtype=np.float32))
    return ArraySource.npy(tmp_path / "near.npy")


class Breaking:
    """A reader that says ``text`` after a while: when it is asked, or in the wait; "" brings rows."""

    def __init__(self, name: str, text: str, *, after_s: float = 0.05, asked: bool = False) -> None:
        self.source = ArraySource(path=Path(name), dtype="float32", shape=(N, 3), offset=0)
        self._text, self._after_s, self._asked = text, after_s, asked

    def check(self, rows: np.ndarray) -> None:
        """It has any row."""

    def start(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        def wait() -> np.ndarray:
            time.sleep(self._after_s)
            if self._text:
                raise WorkerFailed(self._text)
            return np.zeros((rows.size, 3), np.float32)

        if self._asked:
            wait()
        return wait


def ended_by(readers: list[Breaking], threads: int = 1, **files: ArraySource) -> Exception:
    """The error of a batch of these readers, and of files of which it asks for row N."""
    by_source = {reader.source: reader for reader in readers}
    sources = {**{str(reader.source.path): reader.source for reader in readers}, **files}
    asked = np.array([0, 1, 2, N if files else 3])
    with (
        Gatherer(
            sources, 4, threads=threads, open_rows=lambda s: by_source.get(s) or s.open()
        ) as gatherer,
        pytest.raises(RaypipeError) as stop,
    ):
        list(gatherer.batches([asked]))
    return stop.value


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_two_readers_of_one_batch_that_fail_are_both_told(asked: bool, threads: int) -> None:
    first, second = "x: node A is gone", "y: node B is gone"
    readers = [Breaking("x", first, asked=asked), Breaking("y", second, after_s=0.2, asked=asked)]
    error = ended_by(readers, threads)
    assert str(error) == first and error.__notes__ == [f"also: {second}"]
    travelled = pickle.loads(pickle.dumps(error))  # as out of a worker
    assert in_one_line(travelled) == f"{first}; also: {second}"


@pytest.mark.parametrize(
    "other",
    [
        Breaking("y", "", after_s=0.2),  # its rows come
        Breaking("y", "x: node A is gone"),  # the same trouble
        Breaking("y", "too late to be heard", after_s=30),
    ],
)
def test_what_is_no_second_error_is_not_told_as_one(other: Breaking) -> None:
    began = time.monotonic()
    error = ended_by([Breaking("x", "x: node A is gone"), other])
    assert in_one_line(error) == "x: node A is gone"
    assert time.monotonic() - began < SOON_S


def test_a_file_and_a_reader_and_two_files_are_all_told(file: ArraySource, tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.zeros((N, 2), np.float32))
    short = ArraySource.npy(tmp_path / "short.npy")
    error = ended_by([Breaking("far", "far: node A is gone")], near=file, short=short)
    assert "near.npy" in str(error)
    told = " ".join(error.__notes__)
    assert "far: node A is gone" in told and "short.npy" in told
    assert len(error.__notes__) == 2
