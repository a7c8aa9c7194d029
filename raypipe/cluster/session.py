"""Opens a Ray session: the cluster that an address or a job names, or one started on this machine.

A session that was started here is ended here; one that was joined is only left. Nothing calls
``ray stop``: other people's work may run on the same machine.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import ray

from raypipe.errors import InputError
from raypipe.runner import Machines

# Only locators and descriptors pass through the object store; Ray's default (30 % of the memory)
# would be taken from the page cache that the feature stores are read through.
LOCAL_OBJECT_STORE_BYTES = 256 * 1024**2
REACH_S = 20.0  # a head node that is up answers in milliseconds, also across a campus
# Each start of Ray Train's workers starts a process beside them that looks for nodes about to be
# taken away. Nobody takes this machine away, and the process begins with 2 s of a core.
WATCH_NODES = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


@contextmanager
def open_session(address: str | None = None, *, verbose: bool = False) -> Iterator[None]:
    """Join or start Ray for the length of the block; a session already open is used as it is.

    Raises InputError when ``address`` (or RAY_ADDRESS) names a cluster that does not answer.
    """
    if ray.is_initialized():
        yield
        return
    _quiet(verbose)
    level = logging.INFO if verbose else logging.ERROR
    named = address or os.environ.get("RAY_ADDRESS")
    # Ray starts workers at nice 15: beside anything else on the machine they got half of what the
    # script they replace gets. Only the session that we start ourselves can be told.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        if named:
            _check_reachable(named)
            # Inside a job RAY_ADDRESS is set by Ray, and any sizing argument would raise.
            context = ray.init(address=named, logging_level=level, log_to_driver=verbose)
        else:
            context = ray.init(
                address="local",
                include_dashboard=False,
                logging_level=level,
                log_to_driver=verbose,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        if not named:
            raise
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"no Ray cluster answers at {named!r} ({first}); start it, correct --address or "
            "RAY_ADDRESS, or drop both to run on this machine"
        ) from error
    global _dashboard
    _dashboard = bool(context.dashboard_url)
    try:
        with nullcontext() if named else _told(WATCH_NODES, "0"):
            yield
    finally:
        for close in _before_end:
            close()
        ray.shutdown()
        _dashboard = None


@contextmanager
def _told(name: str, value: str) -> Iterator[None]:
    """``name`` in the environment for the length of the block; a value that the user set stays."""
    ours = name not in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if ours:
            os.environ.pop(name, None)


def _check_reachable(address: str) -> None:
    """Raises ConnectionError where nothing listens: Ray itself goes on trying for minutes."""
    host, mark, port = address.removeprefix("ray://").rpartition(":")
    if not mark or not port.isdigit():  # auto: Ray knows where
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error)) from error


def is_open() -> bool:
    """Whether this process has a session."""
    return bool(ray.is_initialized())


_dashboard: bool | None = None


def has_dashboard() -> bool:
    """Whether Ray's state can be asked for in the session; taken for granted in one that somebody else
    opened.
    """
    return _dashboard is not False


def own_machine() -> Machines:
    """What a session that is started here would have, without starting it."""
    from ray._private.utils import get_num_cpus  # what ray.init itself asks

    return Machines(nodes=(("", int(get_num_cpus(override_docker_cpu_warning=True))),))


_before_end: list[Callable[[], None]] = []


def before_end(close: Callable[[], None]) -> None:
    """Have ``close`` called before a session of `open_session` ends: for what calls Ray, and so would
    start it again, when it is let go afterwards.
    """
    _before_end.append(close)


def hush() -> None:
    """Only errors from Ray's loggers, unless the session asked for more: its libraries set levels of
    their own when they are imported, which may be later than the session is opened.
    """
    if _hushed:
        for name in ("ray", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)


_hushed = False


def _quiet(verbose: bool) -> None:
    """Ray's own chatter is off unless asked for; a value that the user set stays."""
    global _hushed
    _hushed = not verbose
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if verbose:
        return
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    hush()
