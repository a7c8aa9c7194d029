"""What an actor that is not ready waits for, in words for who waits for it.

An actor's own words go to a stderr that nobody sees. So it says first of all where it landed (`here`),
and who waits for it asks that node's memory actor why it has no lease yet: how much is asked for and
free, which process of which run holds it. For `pool`, `decoders` and `serving`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from raypipe.cluster.node_memory import why_waiting
from raypipe.store import this_node

# Who asks has work to hand out, or a batch that may be given up meanwhile.
ASK_S = 2.0


@dataclass(frozen=True)
class Spot:
    """A node: ``name`` is raypipe's id, for people; ``ray_node`` Ray's."""

    name: str
    ray_node: str


@dataclass(frozen=True, kw_only=True)
class Awaited:
    """An actor that is waited for. who : for people. label : of its lease, unlike any other run's.

    ends_s : how long it waits for its lease at most; None where that is not its end.
    """

    who: str
    label: str
    ray_node: str
    ends_s: float | None = None


def here() -> Spot:
    """Where this process is: an actor's first answer, before it waits for anything."""
    return Spot(this_node(), ray.get_runtime_context().get_node_id())


def landed(answer: Any) -> Spot | None:
    """What an actor's `here` came to; None while it has no process, or when it is gone."""
    if not ray.wait([answer], timeout=0)[0]:
        return None
    try:
        return ray.get(answer)
    except RayError:
        return None


def memory_waits(awaited: Sequence[Awaited]) -> dict[str, str]:
    """By label, a line on each that waits for its memory, in the order of ``awaited``; not on others."""
    waits = why_waiting({one.label: one.ray_node for one in awaited}, ASK_S)
    lines = {}
    for one in awaited:
        if (wait := waits.get(one.label)) is not None:
            end = f"; ends after {one.ends_s:.0f} s" if one.ends_s is not None else ""
            lines[one.label] = (
                f"{one.who} has waited {wait.seconds:.0f} s for its memory there: {wait.text}{end}"
            )
    return lines
