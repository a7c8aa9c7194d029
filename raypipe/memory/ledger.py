"""The leases of one node: who may start with how many bytes, and who waits.

Pure bookkeeping: asked, never asking. A lease belongs to a holder (a process), and goes when the
holder says so or is found dead. Requests are served strictly by (priority, arrival): a small one
never passes a large one of its priority, so the large one's turn comes. A lease is granted in the
answer to its own request, never behind the back of who waits: so whoever keeps this ledger can
write each one down, and look at what other ledgers of the machine have given out, first. Where it
lives and who finds the dead: ``memory.node``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from raypipe.errors import ConfigError
from raypipe.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Lease:
    """``n_bytes`` for ``holder``; key : one lease's own name, chosen by who asks."""

    key: Hashable
    holder: Hashable
    n_bytes: int
    priority: int = 0


@dataclass(frozen=True)
class Granted:
    """The bytes are reserved until ``release``."""

    lease: Lease


@dataclass(frozen=True)
class Queued:
    """Ask again with the same key; position : requests that are served before, 0 is next."""

    position: int


@dataclass(frozen=True)
class Refused:
    """It will never be granted; text : why."""

    text: str


class Ledger:
    """Reserves ``capacity_bytes``. The sum of what it grants never passes that."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._leases: dict[Hashable, Lease] = {}
        self._queue: list[tuple[int, int, Lease]] = []  # (priority, arrival, what is asked for)
        self._arrivals = 0

    @property
    def leases(self) -> tuple[Lease, ...]:
        """What is granted, oldest first."""
        return tuple(self._leases.values())

    @property
    def queue(self) -> tuple[Lease, ...]:
        """What is waited for, next one first."""
        return tuple(lease for _, _, lease in self._queue)

    @property
    def free_bytes(self) -> int:
        """What is not granted; below 0 after ``restore`` or ``limit_to`` beyond the capacity."""
        return self.capacity_bytes - sum(lease.n_bytes for lease in self._leases.values())

    def request(
        self,
        key: Hashable,
        holder: Hashable,
        n_bytes: int,
        priority: int = 0,
        *,
        refuse_above: int | None = None,
    ) -> Granted | Queued | Refused:
        """Ask, or ask again, for a lease; of two priorities the lower number is served first.

        refuse_above : what can never be granted, in bytes, where the present capacity is another's
        and will pass. Raises ConfigError for a size that is not above 0.
        """
        if n_bytes <= 0:
            raise ConfigError(f"a lease of {n_bytes} bytes is none; ask for more than 0")
        wanted = Lease(key=key, holder=holder, n_bytes=n_bytes, priority=priority)
        known = self._leases.get(key) or next((w for w in self.queue if w.key == key), None)
        if known is not None and known != wanted:
            return Refused(
                f"lease {key} is {format_bytes(known.n_bytes)} of {known.holder} already; give it "
                "back before asking for another"
            )
        if key in self._leases:
            return Granted(self._leases[key])
        most = self.capacity_bytes if refuse_above is None else refuse_above
        if n_bytes > most:
            self.release(key)
            return Refused(
                f"{format_bytes(n_bytes)} are asked for, this node gives out {format_bytes(most)} in"
                " all"
            )
        if known is None:
            self._queue.append((priority, self._arrivals, wanted))
            self._queue.sort(key=lambda entry: entry[:2])
            self._arrivals += 1
        position = [waiting.key for waiting in self.queue].index(key)
        if position > 0 or n_bytes > self.free_bytes:
            return Queued(position)
        self._queue.pop(0)
        self._leases[key] = wanted
        return Granted(wanted)

    def take_less(self, key: Hashable, n_bytes: int) -> Granted | Queued:
        """For who waits: be content with ``n_bytes``, in the same place of the queue."""
        at = [lease.key for lease in self.queue].index(key)
        priority, arrival, lease = self._queue[at]
        self._queue[at] = (priority, arrival, replace(lease, n_bytes=n_bytes))
        found = self.request(key, lease.holder, n_bytes, priority)
        assert not isinstance(found, Refused)
        return found

    def release(self, key: Hashable) -> None:
        """Give a lease back, or stop waiting for it; an unknown key is nobody's."""
        self._leases.pop(key, None)
        self._queue = [entry for entry in self._queue if entry[2].key != key]

    def holder_died(self, holder: Hashable) -> None:
        """All that ``holder`` held or waited for is free."""
        self._leases = {k: lease for k, lease in self._leases.items() if lease.holder != holder}
        self._queue = [entry for entry in self._queue if entry[2].holder != holder]

    def restore(self, leases: Iterable[Lease]) -> None:
        """Take in what was granted by a predecessor. Never refused: those bytes are in use.

        If they are more than the capacity, nothing new starts until they fit again.
        """
        for lease in leases:
            self._leases[lease.key] = lease
            self._queue = [entry for entry in self._queue if entry[2].key != lease.key]

    def limit_to(self, capacity_bytes: int) -> None:
        """Another capacity from here on; what is granted stays."""
        self.capacity_bytes = capacity_bytes
