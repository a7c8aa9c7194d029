"""Whose turn it is to take memory for row servers and for the workers beside them: one run's at a time.

A run holds its row servers' leases while its workers wait for theirs. Two runs that each held some, on
whatever nodes, would wait for each other until both gave up. So a run that needs row servers takes its
turn first, holding nothing, and gives it on when the last of its workers has its lease. From there on it
trains, and ends some time: to wait for that is bounded (`budget`). Runs without row servers hold nothing
while they wait (`budget.budgeted_together`), and take no turn.

The turn is an actor of one name: that it is there is the lock. It belongs to the driver that made it, so
Ray ends it with that driver. Not covered: workers that begin anew in the middle of a training, which
wait beside their servers, and runs of other clusters on the same machine. Their waits are bounded too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError

from raypipe.cluster.lost import ACTOR_LOST
from raypipe.cluster.node_memory import CALL_TIMEOUT_S, NAMESPACE
from raypipe.cluster.remote_guard import LeaseTimeout

NAME = "raypipe-turn"
# As long as one run may take: its row servers 720 s, Ray Train a place 1200 s, its workers' leases 600 s.
TURN_WAIT_S = 2700.0
SAY_EVERY_S = 30.0
LOOK_AGAIN_S = 0.5


class Turn:
    """That ``run`` has its turn. An ordinary class: `turn` makes it an actor."""

    def __init__(self, run: str) -> None:
        self._run, self._since = run, time.monotonic()

    def who(self) -> str:
        """For the others."""
        return f"{self._run}, since {time.monotonic() - self._since:.0f} s"


@contextmanager
def turn(run: str, say: Callable[[str], None]) -> Iterator[Any]:
    """Wait for the turn of ``run``, named for people, and keep it for the block or until `give_on`.

    Raises LeaseTimeout, which names who has it, after `TURN_WAIT_S`.
    """
    mine = _take(run, say)
    try:
        yield mine
    finally:
        give_on(mine)


def give_on(mine: Any) -> None:
    """It is the next run's, whichever looks first. In any process of this one; twice does no harm."""
    if ray.is_initialized():
        ray.kill(mine)


def _take(run: str, say: Callable[[str], None]) -> Any:
    began = next_word = time.monotonic()
    while True:
        try:
            return ray.remote(Turn).options(name=NAME, namespace=NAMESPACE, num_cpus=0).remote(run)
        except ActorAlreadyExistsError:
            who = _who()
        now = time.monotonic()
        if now - began >= TURN_WAIT_S:
            raise LeaseTimeout(
                f"{run} did not get its turn to take memory for row servers in {TURN_WAIT_S:.0f} s: "
                f"{who} still takes its own; wait until that run trains or has ended, or end it, then "
                "run the same command again"
            )
        if now >= next_word:
            say(
                f"waits for its turn to take memory for row servers: {who} takes its own; ends after "
                f"{TURN_WAIT_S:.0f} s"
            )
            next_word = now + SAY_EVERY_S
        time.sleep(LOOK_AGAIN_S)


def _who() -> str:
    try:
        other = ray.get_actor(NAME, namespace=NAMESPACE)
        return str(ray.get(other.who.remote(), timeout=CALL_TIMEOUT_S))
    except (ValueError, *ACTOR_LOST, GetTimeoutError):  # it ends, or starts, in this moment
        return "another run"
