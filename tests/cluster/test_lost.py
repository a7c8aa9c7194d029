"""An actor that died and one that never came to its node end in the same line, or are passed over alike.

The errors are Ray's own where a session is there: a node that does not exist is asked for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayError,
    RaySystemError,
    RuntimeEnvSetupError,
)

from raypipe.cluster import node_memory, remote_guard, serving
from raypipe.cluster.awaited import Awaited, memory_waits
from raypipe.cluster.node_memory import (
    call,
    make_everywhere,
    node_actor,
    verdict_of,
    why_waiting,
)
from raypipe.cluster.serving import _await_ready
from raypipe.errors import WorkerFailed
from raypipe.memory.node import Waiting

NOWHERE = "ab" * 28
LOST = [
    ActorDiedError(),
    ActorUnschedulableError("no node"),
    RuntimeEnvSetupError("no packages"),
    OutOfMemoryError("Ray's monitor ended it"),
]


class Handle:
    """Any method of any actor."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: name)


def fake_ray(error: RayError) -> SimpleNamespace:
    def get(ref: object, timeout: float | None = None) -> None:
        raise error

    return SimpleNamespace(
        get=get,
        wait=lambda refs, **options: (refs, []),
        get_actor=lambda name, namespace: Handle(),
        nodes=lambda: [{"NodeID": NOWHERE, "Alive": True}],
        is_initialized=lambda: True,
    )


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
class TestEachError:
    def test_memory_actors(self, error: RayError, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(node_memory, "ray", fake_ray(error))
        monkeypatch.setattr(node_memory, "node_actor", lambda node_id: Handle())
        assert make_everywhere() == {}
        assert verdict_of(NOWHERE, 1) is None
        assert why_waiting({"x": NOWHERE}) == {}
        with pytest.raises(WorkerFailed, match="memory actor of node abababab did not answer"):
            call(NOWHERE, "admit", None, 0.1)

    def test_a_lease_of_an_actor_that_is_gone_is_given_back_to_nobody(
        self, error: RayError, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        monkeypatch.setattr(remote_guard, "ray", fake_ray(error))
        slot = SimpleNamespace(path=tmp_path / "slot")
        slot.path.touch()
        assert remote_guard._joined.acquire(blocking=False)
        remote_guard._leave(NOWHERE, SimpleNamespace(holder=1), slot)  # type: ignore[arg-type]
        assert not slot.path.exists() and not remote_guard._joined.locked()

    def test_row_servers(self, error: RayError, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(serving, "ray", fake_ray(error))
        with pytest.raises(WorkerFailed, match="row server of node B did not start") as caught:
            _await_ready({"B": Handle()}, {}, {"B": NOWHERE}, print)
        assert "\n" not in str(caught.value)


def test_why_one_waits_is_told_by_the_nodes_that_can_and_never_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A control store that is slow, no actor, two of an older raypipe, a broken answer; one that knows."""
    answers = {
        "older": "",
        "idle": None,
        "broken": RaySystemError("cut off"),
        "n1": Waiting(7, "1 GiB"),
    }

    def get_actor(name: str, namespace: str) -> SimpleNamespace:
        node = name.removeprefix("raypipe-memory-")
        if node in ("slow", "none"):
            raise GetTimeoutError("5 s") if node == "slow" else ValueError("no such actor")
        asked = SimpleNamespace(remote=lambda label: node)
        return SimpleNamespace() if node == "oldest" else SimpleNamespace(why_waiting=asked)

    def get(ref: str) -> object:
        if isinstance(answers[ref], Exception):
            raise answers[ref]
        return answers[ref]

    fake = SimpleNamespace(get_actor=get_actor, get=get, wait=lambda refs, **options: (refs, []))
    monkeypatch.setattr(node_memory, "ray", fake)
    nodes = ["slow", "none", "oldest", *answers]
    told = memory_waits([Awaited(who=f"{n}'s", label=f"of {n}", ray_node=n) for n in nodes])
    assert told == {"of n1": "n1's has waited 7 s for its memory there: 1 GiB"}


def test_row_servers_are_ended_though_their_calls_cannot_be_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[object] = []

    def cancel(ref: object) -> None:
        raise RaySystemError("cut off")

    fake = SimpleNamespace(
        is_initialized=lambda: True,
        wait=lambda refs, **options: ([], refs),
        cancel=cancel,
        kill=killed.append,
    )
    monkeypatch.setattr(serving, "ray", fake)
    servers = {"A": Handle(), "B": Handle()}
    with pytest.raises(RaySystemError):
        serving._end(servers.values())
    assert killed == list(servers.values())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_node_that_is_lost_before_its_actor_came(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"NodeID": NOWHERE, "Alive": True}])
    with pytest.raises(ActorUnschedulableError):  # what Ray really says
        ray.get(node_actor(NOWHERE).state.remote(), timeout=60)
    assert set(make_everywhere()) == {node["NodeID"] for node in nodes if node["Alive"]}
    assert verdict_of(NOWHERE, 1) is None
    with pytest.raises(WorkerFailed, match="memory actor of node abababab did not answer") as told:
        call(NOWHERE, "admit", None, 1.0)
    assert not isinstance(told.value.__cause__, GetTimeoutError) and "\n" not in str(told.value)
