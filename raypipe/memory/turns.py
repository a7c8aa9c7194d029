"""Whose turn it is to gather leases: of the groups of workers that need all of theirs, one a time.

The workers of one training run wait for each other once they have their leases. Two runs that each
hold some, on whatever nodes, would wait for ever for what the other holds. So a group gathers only
in its turn: until all its members are seated, no other group begins. Workers that do not wait for
each other need no turn.

Pure bookkeeping: asked, never asking. Kept by one node of a cluster (``cluster.node_memory``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

# Members ask several times a second: a group that none of them asks for has died or waits no more.
SILENT_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One member of a group. group : its name; of : how many members it has."""

    group: str
    member: int
    of: int


@dataclass(kw_only=True)
class _Group:
    heard_at: float
    seated: set[int] = field(default_factory=set)


class Turns:
    """Gives the turn to groups in the order in which they first asked."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._groups: dict[str, _Group] = {}  # in the order of their first asking

    def ask(self, seat: Seat) -> str:
        """The group whose turn it is, for a member that has no lease yet; asked again and again."""
        now = self._clock()
        self._drop_silent(now)
        group = self._groups.setdefault(seat.group, _Group(heard_at=now))
        group.heard_at = now
        if seat.member in group.seated:  # it began anew, and the others with it
            group.seated.clear()
        return next(iter(self._groups))

    def seated(self, seat: Seat) -> None:
        """That member has its lease. The last one of its group ends the turn."""
        group = self._groups.get(seat.group)
        if group is not None:
            group.heard_at = self._clock()
            group.seated.add(seat.member)
            if len(group.seated) >= seat.of:
                del self._groups[seat.group]

    def _drop_silent(self, now: float) -> None:
        silent = [name for name, group in self._groups.items() if now - group.heard_at > SILENT_S]
        for name in silent:
            del self._groups[name]
