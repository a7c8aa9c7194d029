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
    RuntimeEnvSetupError,
)

from raypipe.cluster import node_memory, remote_guard, serving
from raypipe.cluster.node_memory import (
    call,
    make_everywhere,
    node_actor,
    verdict_of,
    why_waiting,
)
from raypipe.cluster.serving import _await_ready
from raypipe.errors import WorkerFailed

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
