"""``raypipe doctor``: the limits of this machine as the system states them, and what will hurt."""

from __future__ import annotations

import sys
from dataclasses import replace

import psutil
import pytest

from raypipe.cli import main
from raypipe.doctor import problems
from raypipe.memory.limits import node_limits
from raypipe.units import format_bytes


def test_it_shows_limits_and_budgets_with_their_sources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYPIPE_MAX_MEMORY_PER_PROCESS", "3GiB")
    assert main(["doctor", "--runner", "local", "--available-memory-buffer", "0.5"]) == 0
    captured = capsys.readouterr()
    assert format_bytes(psutil.virtual_memory().total) in captured.out
    assert "/dev/shm" in captured.out
    assert "no Ray" in captured.out
    assert "environment RAYPIPE_MAX_MEMORY_PER_PROCESS" in captured.err
    assert "flag --available-memory-buffer" in captured.err


def test_a_bad_budget_is_named_with_its_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYPIPE_MAX_MEMORY_PER_PROCESS", "3QiB")
    assert main(["doctor", "--runner", "local"]) == 2
    said = capsys.readouterr().err
    assert "3QiB" in said
    assert "environment RAYPIPE_MAX_MEMORY_PER_PROCESS" in said


def test_a_small_shared_memory_is_a_problem_with_a_remedy() -> None:
    small = replace(node_limits(), shm_bytes=64 * 1024**2)
    assert any("--shm-size" in problem for problem in problems(small))
    assert not any("--shm-size" in p for p in problems(replace(small, shm_bytes=2**31)))


def test_a_watch_that_cannot_be_compiled_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("compiled" in problem for problem in problems(node_limits()))
    monkeypatch.setitem(sys.modules, "raypipe.memory.stare", None)
    assert any("install numba again" in problem for problem in problems(node_limits()))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_it_shows_what_ray_sees(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "object store" in out
    assert "memory monitor" in out
