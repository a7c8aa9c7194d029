"""Turns: two groups never hold parts of what both need, and nobody waits for the dead."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raypipe.memory.ledger import Granted, Ledger
from raypipe.memory.turns import SILENT_S, Seat, Turns


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    nodes=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
)
def test_all_groups_are_served_whatever_the_order(
    sizes: list[int], nodes: int, order: object
) -> None:
    """Each node has room for 4 at once, a group keeps its leases until all its members have one.

    Without turns this stops: see the next test.
    """
    assert _run(sizes, nodes, order, Turns(clock=lambda: 0.0)) == set(range(len(sizes)))


def test_without_turns_two_groups_wait_for_each_other() -> None:
    ledger = Ledger(3)
    for member in range(2):
        for group in "ab":
            ledger.request((group, member), group, 1)
    assert len(ledger.leases) == 3
    assert len(ledger.queue) == 1, "of two groups of two in a room for three, one does not gather"
    ledger = Ledger(2)
    granted = [ledger.request((group, 0), group, 1) for group in "ab"]
    assert all(isinstance(found, Granted) for found in granted)
    assert not isinstance(ledger.request(("a", 1), "a", 1), Granted)
    assert not isinstance(ledger.request(("b", 1), "b", 1), Granted)


def _run(sizes: list[int], nodes: int, order: object, turns: Turns) -> set[int]:
    """Members ask in a random order until nobody gets on any more; the groups that gathered."""
    ledgers = [Ledger(4) for _ in range(nodes)]
    waiting = [(group, member) for group, size in enumerate(sizes) for member in range(size)]
    held: dict[int, list[int]] = {group: [] for group in range(len(sizes))}
    finished: set[int] = set()
    quiet = 0
    while waiting and quiet < 20:
        order.shuffle(waiting)  # type: ignore[attr-defined]
        quiet += 1
        for group, member in list(waiting):
            seat = Seat(group=str(group), member=member, of=sizes[group])
            if turns.ask(seat) != str(group):
                continue
            ledger = ledgers[(group + member) % nodes]
            if isinstance(ledger.request((group, member), (group, member), 1), Granted):
                turns.seated(seat)
                waiting.remove((group, member))
                held[group].append(member)
                quiet = 0
            if len(held[group]) == sizes[group]:  # it trains, and ends
                finished.add(group)
                for each in range(sizes[group]):
                    ledgers[(group + each) % nodes].release((group, each))
    return finished


def test_a_group_that_died_does_not_hold_the_turn() -> None:
    now = [0.0]
    turns = Turns(clock=lambda: now[0])
    a, b = Seat(group="a", member=0, of=2), Seat(group="b", member=0, of=2)
    assert turns.ask(a) == "a"
    turns.seated(a)
    assert turns.ask(b) == "a"
    now[0] = SILENT_S
    assert turns.ask(b) == "a"
    now[0] = SILENT_S * 1.1
    assert turns.ask(b) == "b"


def test_a_group_that_begins_anew_is_not_complete_by_its_former_members() -> None:
    turns = Turns(clock=lambda: 0.0)
    seats = [Seat(group="a", member=member, of=3) for member in range(3)]
    for seat in seats[:2]:
        turns.ask(seat)
        turns.seated(seat)
    turns.ask(seats[0])  # its process died, and comes again
    turns.seated(seats[0])
    turns.ask(seats[2])
    turns.seated(seats[2])
    assert turns.ask(Seat(group="b", member=0, of=2)) == "a"
    turns.ask(seats[1])
    turns.seated(seats[1])
    assert turns.ask(Seat(group="b", member=0, of=2)) == "b"
