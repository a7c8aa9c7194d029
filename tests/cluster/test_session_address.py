"""A cluster that does not answer is told at once, by its address; Ray itself would try for minutes.

And what Ray is told of a session of our own, no other hears of.
"""

from __future__ import annotations

import os
import socket
import time
from types import SimpleNamespace

import pytest
import ray

from raypipe.cluster.session import WATCH_NODES, open_session
from raypipe.errors import InputError


@pytest.fixture(autouse=True)
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has none, whatever ran before in this one."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "localhost:99999"]
)
def test_an_address_where_nothing_listens_is_named(address: str) -> None:
    named, started = address.format(port=free_port()), time.monotonic()
    with (
        pytest.raises(InputError, match=f"no Ray cluster answers at '{named}'") as told,
        open_session(named),
    ):
        pass
    assert time.monotonic() - started < 10
    assert "\n" not in str(told.value)
    assert told.value.exit_code == 2


def test_an_address_of_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match="correct --address or RAY_ADDRESS"), open_session():
        pass


@pytest.mark.parametrize(
    ("named", "set_by_user", "said"),
    [(False, None, "0"), (False, "1", "1"), (True, None, None), (True, "1", "1")],
)
def test_only_this_machine_is_not_watched_for_being_taken_away(
    named: bool, set_by_user: str | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv(WATCH_NODES, raising=False)
    if set_by_user:
        monkeypatch.setenv(WATCH_NODES, set_by_user)
    monkeypatch.setattr(ray, "init", lambda **options: SimpleNamespace(dashboard_url=""))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with open_session("auto" if named else None):
        assert os.environ.get(WATCH_NODES) == said
    assert os.environ.get(WATCH_NODES) == set_by_user
