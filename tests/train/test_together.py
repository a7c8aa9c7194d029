"""What several workers raise where more than one of them failed."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from raypipe.errors import MemoryBudgetExceeded
from raypipe.train.context import WorkerContext


def outcome(rank: int, errors: Sequence[Exception | None]) -> Any:
    """What rank ``rank`` gets of `WorkerContext.together` when each rank's ``act`` ends with its error."""

    class Group(WorkerContext):
        def collect(self, value: Any) -> list[Any]:
            assert value is errors[rank]
            return pickle.loads(pickle.dumps(list(errors)))

    def act() -> str:
        error = errors[rank]
        if error is not None:
            raise error
        return "done"

    ctx = Group(run_dir=Path(), rank=rank, world=len(errors))
    try:
        return ctx.together(act)
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "errors",
    [
        (None, MemoryBudgetExceeded("full"), ValueError("no such row")),
        (ValueError("no such row"), None, MemoryBudgetExceeded("full")),
        (None, None, OSError(5, "Input/output error")),
    ],
)
def test_all_raise_the_error_of_the_first_that_failed(errors: Sequence[Exception | None]) -> None:
    first = next(error for error in errors if error is not None)
    found = [outcome(rank, errors) for rank in range(3)]
    assert [(type(one), str(one)) for one in found] == [(type(first), str(first))] * 3
    assert found[errors.index(first)] is first, "with its traceback"


def test_where_none_failed_each_has_its_own_result() -> None:
    assert [outcome(rank, (None, None)) for rank in range(2)] == ["done", "done"]
