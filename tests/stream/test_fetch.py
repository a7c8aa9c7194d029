"""A reader that hangs keeps nobody: whatever else ends an iteration does so at once, and no row that
comes too late is written over a batch that came after it.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raypipe.backbone import Preprocess
from raypipe.errors import ConfigError
from raypipe.stream import ArraySource, Gatherer, MappedRows, job
from raypipe.stream.fetch import Fetch
from raypipe.stream.pixels import PixelSource
from raypipe.stream.scan import scan

SOON_S = 3.0
N, WIDTH = 64, 300_000  # 1.2 MB a row: a batch is read in several pieces


class Stalling:
    """A reader of ``source`` that answers with ``value`` in every number, from batch ``first`` on when
    `answer` is set; at once before that.
    """

    def __init__(self, source: ArraySource, first: int) -> None:
        self.source, self._first = source, first
        self.answer = threading.Event()
        self.value, self.asked, self.came_late = 1.0, 0, 0

    def check(self, rows: np.ndarray) -> None:
        """It has any row."""

    def start(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        stalls, value = self.asked >= self._first, self.value
        self.asked += 1

        def wait() -> np.ndarray:
            if stalls:
                assert self.answer.wait(60)
                self.came_late += 1
            return np.full((rows.size, WIDTH), value, np.float32)

        return wait


class Cancelling(Stalling):
    """Its batches can be cancelled: it looks now and then, as the protocol has it."""

    cancelled = 0

    def start(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        reader, wait, dropped = self, super().start(rows), threading.Event()
        stalls = self.asked > self._first

        class Waiting:
            def __call__(self) -> np.ndarray:
                while stalls and not reader.answer.wait(0.5):
                    if dropped.is_set():
                        raise CancelledError
                return wait()

            def cancel(self) -> None:
                dropped.set()
                reader.cancelled += 1

        return Waiting()


@pytest.fixture
def file(tmp_path: Path) -> ArraySource:
    np.save(tmp_path / "near.npy", np.arange(N, dtype=np.float32))
    return ArraySource.npy(tmp_path / "near.npy")


@pytest.fixture(params=[Stalling, Cancelling])
def reader(request: pytest.FixtureRequest) -> Iterator[Stalling]:
    source = ArraySource(path=Path("far"), dtype="float32", shape=(N, WIDTH), offset=0)
    made: Stalling = request.param(source, first=2)
    guard = threading.Timer(20, made.answer.set)  # without the mend: an end, and a late one
    guard.start()
    yield made
    guard.cancel()
    made.answer.set()


def opened(
    reader: Stalling,
    file: ArraySource,
    threads: int = 2,
    say: Callable[[str], None] | None = None,
) -> Gatherer:
    return Gatherer(
        {"far": reader.source, "near": file},
        4,
        threads=threads,
        open_rows=lambda s: reader if s is reader.source else s.open(),
        say=say,
    )


class UsersOwn(Exception):
    """What the caller's loop raises."""


@pytest.mark.parametrize("end", ["its own error", "ctrl-c", "close"])
@pytest.mark.usefixtures("heeded_sigint")
def test_the_end_of_a_loop_waits_for_no_stalled_reader(
    reader: Stalling, file: ArraySource, end: str
) -> None:
    gatherer = opened(reader, file)
    batches = gatherer.batches(np.arange(k, k + 4) for k in range(20))
    next(batches)
    next(batches)
    began = time.monotonic()
    if end == "its own error":
        with pytest.raises(UsersOwn):
            batches.throw(UsersOwn())
    elif end == "ctrl-c":
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    gatherer.close()  # with the iteration under way, where nothing else has ended it
    assert time.monotonic() - began < SOON_S
    with pytest.raises((CancelledError, StopIteration, RuntimeError)):  # it is closed
        next(batches)
    if isinstance(reader, Cancelling):
        assert reader.cancelled >= 1


def test_rows_that_come_too_late_are_written_nowhere(reader: Stalling, file: ArraySource) -> None:
    with opened(reader, file) as gatherer:
        batches = gatherer.batches(np.arange(k, k + 4) for k in range(20))
        next(batches)
        next(batches)
        time.sleep(0.2)  # the pieces wait in the reader by now
        began = time.monotonic()
        batches.close()
        assert time.monotonic() - began < SOON_S
        reader.value, reader._first = 2.0, 10**9
        again = gatherer.batches(np.arange(k, k + 4) for k in range(3))
        first = next(again)
        reader.answer.set()
        time.sleep(0.3)
        if not isinstance(reader, Cancelling):
            assert reader.came_late >= 1  # so there was something that could have been written
        for batch in (first, *again):
            assert (batch["far"] == 2.0).all()
        for slot in gatherer._slots:
            assert (slot.tensors["far"] == 2.0).all()


def test_a_gatherer_goes_on_with_all_its_threads_after_a_stalled_batch(
    reader: Stalling, file: ArraySource
) -> None:
    with opened(reader, file, threads=1) as gatherer:
        batches = gatherer.batches(np.arange(k, k + 4) for k in range(20))
        next(batches)
        next(batches)
        time.sleep(0.2)  # the one thread waits in the reader by now
        began = time.monotonic()
        batches.close()
        reader._first = 10**9
        (batch,) = gatherer.batches([np.array([5, 6])])
        assert batch["near"].tolist() == [5, 6]
        assert time.monotonic() - began < SOON_S
    assert not reader.answer.is_set()


def test_another_sources_error_is_raised_while_a_reader_of_the_same_batch_stalls(
    reader: Stalling, file: ArraySource
) -> None:
    reader._first = 0
    began = time.monotonic()
    # In two pieces: the first waits for the reader, the second asks the file for a row it has not.
    with (
        opened(reader, file) as gatherer,
        pytest.raises(ConfigError, match=f"rows 2..{N} asked of .*near.npy"),
    ):
        list(gatherer.batches([np.array([0, 1, 2, N])]))
    assert time.monotonic() - began < SOON_S


def test_a_batch_dropped_before_it_is_waited_for_is_never_called(reader: Stalling) -> None:
    fetch = Fetch(reader, np.arange(3))
    fetch.cancel()
    fetch.cancel()
    for _ in range(2):  # every piece is told
        with pytest.raises(CancelledError):
            fetch.block()
    assert reader.came_late == 0


def test_all_who_wait_for_a_cancelled_batch_are_told(reader: Stalling) -> None:
    reader._first = 0
    fetch, told = Fetch(reader, np.arange(3)), []

    def wait() -> None:
        try:
            fetch.block()
        except CancelledError:
            told.append(time.monotonic())

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    fetch.cancel()
    for thread in threads:
        thread.join(SOON_S)
    assert len(told) == 3 and max(told) - began < SOON_S
    fetch.cancel()  # too late to matter


def test_a_readers_own_error_comes_through_its_thread(file: ArraySource) -> None:
    reader = Stalling(file, 0)
    reader.start = lambda rows: lambda: [][0]  # type: ignore[method-assign,misc]
    fetch = Fetch(reader, np.arange(3))
    for _ in range(2):
        with pytest.raises(IndexError):
            fetch.block()


def test_images_on_a_disk_that_hangs_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    source = scan(sorted(tmp_path.iterdir()), Preprocess()).source(Preprocess(), readers=1)
    disk, begun = threading.Event(), []

    def hang(self: PixelSource, row: int, out: np.ndarray) -> None:
        begun.append(row)
        assert disk.wait(20)

    monkeypatch.setattr(PixelSource, "decode_row", hang)
    fetch = Fetch(source.open(), np.array([0, 1]))
    threading.Timer(0.3, fetch.cancel).start()
    began = time.monotonic()
    with pytest.raises(CancelledError):
        fetch.block()
    assert time.monotonic() - began < SOON_S
    disk.set()
    time.sleep(0.1)
    assert begun == [0]  # the second image was not begun any more


def test_what_does_not_come_is_named_unless_its_reader_does_so_itself(
    file: ArraySource, reader: Stalling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network share that hangs: nothing fails, and nothing comes."""
    assert job.FIRST_WORD_S <= 30
    monkeypatch.setattr(job, "FIRST_WORD_S", 0.15)
    monkeypatch.setattr(job, "AGAIN_S", 0.15)
    said: list[str] = []
    with Gatherer({"near": file}, 4, say=said.append) as gatherer:
        list(gatherer.batches([np.arange(4)]))
    assert not said
    take = MappedRows.take

    def hang(self: MappedRows, rows: np.ndarray, out: np.ndarray) -> None:
        time.sleep(0.5)
        take(self, rows, out)

    with monkeypatch.context() as patch, Gatherer({"near": file}, 4, say=said.append) as gatherer:
        patch.setattr(MappedRows, "take", hang)
        (batch,) = gatherer.batches([np.arange(4)])
        assert batch["near"].tolist() == [0, 1, 2, 3]
    assert len(said) > 1
    for text in said:
        assert re.match(r"near: has waited \d+ s for 4 rows of ", text) and str(file.path) in text
    reader._first = 0
    for names_itself in (False, True):
        said.clear()
        looks = list[int]()
        reader.look = lambda looks=looks: looks.append(1)  # type: ignore[attr-defined]
        reader.names_itself = names_itself  # type: ignore[attr-defined]
        reader.answer.clear()
        threading.Timer(0.5, reader.answer.set).start()
        with opened(reader, file, say=said.append) as gatherer:
            list(gatherer.batches([np.arange(4)]))
        assert looks  # whatever the batch waits for, a reader is asked whether its rows are late
        assert bool(said) != names_itself
        told = re.compile(r"far: has waited \d+ s for 4 rows of far;")  # beside other work, seconds
        assert all(told.match(text) for text in said), said
