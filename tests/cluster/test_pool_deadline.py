"""The pool's deadline, by a clock in the test's hands and without Ray: an answer that is there counts."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from raypipe.cluster import pool as pool_file
from raypipe.cluster import seat as seat_file
from raypipe.cluster.pool import RayPool
from raypipe.cluster.seat import Seat
from raypipe.errors import WorkerFailed
from raypipe.runner import Done, Needs

START_S = 100.0


@dataclass(frozen=True)
class Item:
    key: int


@dataclass(eq=False)
class Call:
    answer: Any


class Actor:
    """Has its answers at once."""

    def __init__(self) -> None:
        self.open = SimpleNamespace(remote=lambda shared: Call("ticket"))
        self.step = SimpleNamespace(remote=lambda item, after: Call([Done(item.key)]))


class Cluster:
    """Ray, the clock, and a first answer that comes ``loads_s`` after it was asked for."""

    def __init__(self, loads_s: float) -> None:
        self.now, self._loads_s = 0.0, loads_s

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[Any, Any]:
        if self.now == 0.0:
            self.now = self._loads_s
            return (refs, []) if self._loads_s < 2 * START_S else ([], refs)
        return refs[:1], refs[1:]

    def put(self, value: Any) -> Any:
        return value

    def get(self, ref: Call) -> Any:
        return ref.answer

    def monotonic(self) -> float:
        return self.now

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


@pytest.fixture
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RayPool:
    """Of one worker, that loads."""
    cluster = Cluster(request.param)
    for name in ("ray", "time"):
        monkeypatch.setattr(pool_file, name, cluster)
        monkeypatch.setattr(seat_file, name, cluster)
    monkeypatch.setattr(pool_file, "landed", lambda answer: None)
    pool = RayPool(
        lambda: pytest.fail("made here"),
        Needs(workers=1, device="cpu", cpus=1.0),
        on_event=lambda text: None,
        start_timeout_s=START_S,
    )
    pool._seats = [Seat(actor=Actor(), name="w", memory=None, loading=Call((7, "node")))]
    return pool


@pytest.mark.parametrize("pool", [START_S + 1], indirect=True)
def test_a_worker_that_came_while_nobody_looked_is_not_late(pool: RayPool) -> None:
    """A driver that was busy, or stopped, past the deadline."""
    done = list(pool.run([Item(0), Item(1)], "shared"))
    assert [one.key for one in done] == [0, 1] and pool.pids == [7]


@pytest.mark.parametrize("pool", [3 * START_S], indirect=True)
def test_one_that_has_not_come_by_then_is(pool: RayPool) -> None:
    with pytest.raises(WorkerFailed, match="no worker started in 100 s"):
        list(pool.run([Item(0)], "shared"))
