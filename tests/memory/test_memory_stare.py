"""The compiled look against a plain loop, on files that say what statm would."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.memory.probe import ProcessProbe
from raypipe.memory.watched import LONGEST_TICKS, NEAR_TICKS

pytest.importorskip("numba")
from raypipe.memory.stare import anon_pages, stare

TICK_NS = 1000


def says(text: bytes, opened: ExitStack) -> int:
    fd = os.memfd_create("statm")
    opened.callback(os.close, fd)
    os.write(fd, text)
    return fd


def pages_of(fd: int) -> int:
    return int(anon_pages(fd, np.empty(128, np.uint8)))


@given(st.lists(st.integers(0, 2**40), min_size=7, max_size=7))
def test_it_reads_the_numbers_that_statm_holds(fields: list[int]) -> None:
    with ExitStack() as opened:
        fd = says(" ".join(map(str, fields)).encode() + b"\n", opened)
        assert pages_of(fd) == fields[1] - fields[2]


@pytest.mark.parametrize("text", [b"", b"12", b"12 7", b"12 7 "])
def test_what_is_no_statm_is_no_number_of_pages(text: bytes) -> None:
    with ExitStack() as opened:
        assert pages_of(says(text, opened)) == -1
    assert pages_of(-1) == -1


def test_it_agrees_with_the_interpreted_look_and_sees_an_end() -> None:
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child,
        ProcessProbe(child.pid) as probe,
    ):
        deadline = time.monotonic() + 10
        while (now := probe.anon_pages()) != pages_of(probe.fileno()) or now == 0:
            assert time.monotonic() < deadline
        child.kill()
        child.wait()
        assert pages_of(probe.fileno()) <= 0


@given(st.data())
def test_it_looks_when_a_plain_loop_would_and_stops_where_it_would(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 5))
    numbers = st.lists(st.integers(0, 100), min_size=n, max_size=n)
    pages, low, high = data.draw(numbers), data.draw(numbers), data.draw(numbers)
    every = data.draw(st.lists(st.integers(1, LONGEST_TICKS), min_size=n, max_size=n))
    tick, most = data.draw(st.integers(0, 1000)), data.draw(st.integers(0, 20))
    # The plain loop: one tick at a time.
    passed, looked, left = 0, [False] * n, [False] * n
    while passed < most and not any(left):
        now = tick + passed
        following = min([e - now % e for e in every] + [most - passed])
        if following > NEAR_TICKS:
            break
        passed += following
        for i in range(n):
            if (now + following) % every[i] == 0:
                inside = low[i] <= pages[i] < high[i]
                looked[i], left[i] = looked[i] or inside, not inside
    with ExitStack() as opened:
        fds = [says(b"%d %d 0 0" % (i, pages[i]), opened) for i in range(n)]
        seen_ns, found = np.zeros(n, np.int64), np.zeros(n, np.uint8)
        arrays = [np.array(one, np.int64) for one in (every, low, high)]
        bell = np.zeros(1, np.uint8)
        fds_array = np.array(fds, np.int32)
        assert stare(fds_array, *arrays, seen_ns, found, bell, tick, TICK_NS, most) == passed
    assert found.tolist() == left
    assert (seen_ns > 0).tolist() == looked


def test_it_comes_back_when_rung_without_the_lock_of_the_interpreter() -> None:
    bell = np.zeros(1, np.uint8)
    with ExitStack() as opened:
        fds = np.array([says(b"9 5 0 0", opened)], np.int32)
        one, high = np.ones(1, np.int64), np.full(1, 9, np.int64)
        threading.Timer(0.1, lambda: bell.fill(1)).start()
        began = time.monotonic_ns()
        seen_ns, left = np.zeros(1, np.int64), np.zeros(1, np.uint8)
        passed = stare(fds, one, one, high, seen_ns, left, bell, 0, 1_000_000, 60_000)
    assert 0 < passed < 60_000
    assert left[0] == 0
    assert seen_ns[0] > began
