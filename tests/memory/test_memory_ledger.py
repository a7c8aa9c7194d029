"""The ledger against its promises: never over capacity, nothing starves, the dead hold nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from raypipe.errors import ConfigError
from raypipe.memory.ledger import Granted, Lease, Ledger, Queued, Refused

CAPACITY = 100
keys = st.integers(0, 9)


class LedgerMachine(RuleBasedStateMachine):
    """Any order of events. A lease's holder is its key modulo 3."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(CAPACITY)
        self.arrived: list[Lease] = []

    @rule(key=keys, n_bytes=st.integers(1, 130), priority=st.integers(0, 2))
    def request(self, key: int, n_bytes: int, priority: int) -> None:
        known = {lease.key for lease in (*self.ledger.leases, *self.ledger.queue)}
        found = self.ledger.request(key, key % 3, n_bytes, priority)
        if isinstance(found, Refused):
            assert n_bytes > CAPACITY or key in known
        elif key not in known:
            self.arrived.append(Lease(key=key, holder=key % 3, n_bytes=n_bytes, priority=priority))
        if isinstance(found, Queued):
            assert self.ledger.queue[found.position].key == key
            assert key not in {lease.key for lease in self.ledger.leases}
        if isinstance(found, Granted):
            assert found.lease in self.ledger.leases

    @rule(key=keys)
    def release(self, key: int) -> None:
        self.ledger.release(key)
        self.arrived = [lease for lease in self.arrived if lease.key != key]

    @rule(holder=st.integers(0, 2))
    def died(self, holder: int) -> None:
        self.ledger.holder_died(holder)
        self.arrived = [lease for lease in self.arrived if lease.holder != holder]

    @invariant()
    def never_over_capacity(self) -> None:
        assert self.ledger.free_bytes >= 0

    @invariant()
    def nothing_is_lost_or_held_twice(self) -> None:
        there = [lease.key for lease in (*self.ledger.leases, *self.ledger.queue)]
        assert sorted(there) == sorted(lease.key for lease in self.arrived)

    @rule()
    def the_next_one_waits_only_for_room(self) -> None:
        if self.ledger.queue:
            first, free = self.ledger.queue[0], self.ledger.free_bytes
            found = self.ledger.request(first.key, first.holder, first.n_bytes, first.priority)
            assert isinstance(found, Granted) == (first.n_bytes <= free)

    @invariant()
    def the_queue_is_by_priority_then_arrival(self) -> None:
        arrival = {lease.key: at for at, lease in enumerate(self.arrived)}
        order = [(lease.priority, arrival[lease.key]) for lease in self.ledger.queue]
        assert order == sorted(order)


TestLedger = LedgerMachine.TestCase


def ask_all_again(ledger: Ledger) -> None:
    """As those who wait do, in an order that is not the queue's."""
    for lease in sorted(ledger.queue, key=lambda lease: str(lease.key), reverse=True):
        ledger.request(lease.key, lease.holder, lease.n_bytes, lease.priority)


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40))
def test_nothing_starves(sizes: list[int]) -> None:
    """While small ones keep coming, a request is served after those before it, and no other."""
    ledger = Ledger(CAPACITY)
    for key, size in enumerate(sizes):
        ledger.request(key, key, size)
    served: list[int] = []
    for late in range(len(sizes)):
        granted = [lease.key for lease in ledger.leases]
        served += [key for key in granted if key not in served and isinstance(key, int)]
        ledger.request(f"late {late}", "late", 1)
        ledger.release(granted[0])
        ask_all_again(ledger)
    mine = [key for key in served if key < len(sizes)]
    assert mine == sorted(mine)
    assert len(mine) == len(sizes)


def test_a_lower_priority_number_is_served_first() -> None:
    ledger = Ledger(CAPACITY)
    ledger.request("a", 1, 100)
    assert ledger.request("b", 2, 50, priority=1) == Queued(0)
    assert ledger.request("c", 3, 50) == Queued(0)
    assert ledger.request("b", 2, 50, priority=1) == Queued(1)
    ledger.release("a")
    assert ledger.leases == (), "granted only to who asks"
    assert ledger.request("b", 2, 50, priority=1) == Queued(1)
    assert isinstance(ledger.request("c", 3, 50), Granted)
    assert isinstance(ledger.request("b", 2, 50, priority=1), Granted)


def test_what_can_never_be_granted_is_refused_also_while_it_waits() -> None:
    ledger = Ledger(CAPACITY)
    found = ledger.request("a", 1, CAPACITY + 1)
    assert isinstance(found, Refused)
    assert "101 B are asked for" in found.text
    ledger.request("b", 1, 60)
    assert ledger.request("c", 2, 60) == Queued(0)
    ledger.limit_to(50)
    assert isinstance(ledger.request("c", 2, 60), Refused)
    assert ledger.queue == ()
    with pytest.raises(ConfigError, match="0 bytes"):
        ledger.request("d", 1, 0)


def test_what_a_predecessor_granted_counts_even_beyond_the_capacity() -> None:
    ledger = Ledger(CAPACITY)
    ledger.restore([Lease(key=n, holder=n, n_bytes=60) for n in range(2)])
    assert ledger.free_bytes == -20
    assert isinstance(ledger.request(1, 1, 60), Granted), "asked again, it is the same lease"
    assert ledger.request(2, 2, 10) == Queued(0)
    ledger.holder_died(0)
    assert isinstance(ledger.request(2, 2, 10), Granted)


def test_what_another_runs_buffer_holds_back_waits_and_is_not_refused() -> None:
    ledger = Ledger(15)
    assert isinstance(ledger.request("b", "b", 10, refuse_above=15), Granted)
    assert isinstance(ledger.request("a", "a", 20, refuse_above=100), Queued)
    assert isinstance(ledger.request("c", "c", 200, refuse_above=100), Refused)
    ledger.release("b")
    ledger.limit_to(100)
    assert isinstance(ledger.request("a", "a", 20, refuse_above=100), Granted)
