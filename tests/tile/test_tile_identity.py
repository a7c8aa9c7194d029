"""What tells results apart: functions by code and values, not by how they are printed."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch

from raypipe.errors import ConfigError
from raypipe.tile.identity import digest_of_function

LARGE = np.zeros(5000)


def adding(value: Any) -> Callable[..., Any]:
    return lambda pixels: pixels + value


def long(at: int) -> np.ndarray:
    """5000 numbers, of which NumPy prints six."""
    made = np.zeros(5000)
    made[at] = 1
    return made


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (adding(long(1000)), adding(long(2000))),
        (adding(torch.from_numpy(long(1000))), adding(torch.from_numpy(long(2000)))),
        (adding({"a": [long(1000)]}), adding({"a": [long(2000)]})),
        (functools.partial(np.add, 1), functools.partial(np.add, 2)),
        (lambda p: [q + 1 for q in p], lambda p: [q + 2 for q in p]),
        (lambda p: (lambda q: q + 1)(p), lambda p: (lambda q: q + 2)(p)),
        (lambda p: np.minimum(p, 1), lambda p: np.maximum(p, 1)),
        (torch.Tensor.float, torch.Tensor.double),
    ],
)
def test_what_differs_is_told_apart(one: Any, other: Any) -> None:
    assert digest_of_function(one) == digest_of_function(one)
    assert digest_of_function(one) != digest_of_function(other)


def test_keyword_defaults_count() -> None:
    def make(k: int) -> Callable[..., Any]:
        def scaled(pixels: Any, *, by: int = k) -> Any:
            return pixels * by

        return scaled

    assert digest_of_function(make(2)) != digest_of_function(make(3))


def helper(pixels: Any) -> Any:
    return pixels + LARGE


def through_helper(pixels: Any) -> Any:
    return helper(pixels) if len(pixels) else through_helper(pixels)


def test_globals_count_also_those_of_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of_function(through_helper)
    assert isinstance(through_helper, FunctionType)
    monkeypatch.setitem(globals(), "LARGE", long(2000))
    assert digest_of_function(through_helper) != before


def test_another_process_says_the_same() -> None:
    code = (
        "from raypipe.tile.identity import digest_of_function as d\n"
        "def f(p): return p in {'a', 'b', 'c'} and d\n"
        "print(d(f))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(said) == 1


def test_what_cannot_be_pickled_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds a lock that cannot be pickled"):
        digest_of_function(adding(threading.Lock()))
