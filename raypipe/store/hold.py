"""A run's hold on a shard's place: the run lock, the owner record, and the epoch behind the fence.

First the lock is taken, which another run may have (``lock``). Then the place is looked at, and
may be refused; only then is the epoch raised, from where on the fence (``fence``) lets nobody write
but this run's writers. What is written, and when, is ``run``.
"""

from __future__ import annotations

import contextlib
import secrets

from raypipe.store.durable import make_dirs, remove
from raypipe.store.fence import Fence, FenceState
from raypipe.store.flocks import Flock
from raypipe.store.layout import ShardPaths
from raypipe.store.lock import Owner, take_lock
from raypipe.store.manifest import Manifest


class Hold:
    """Nothing is held until `lock`, and nothing after `release`.

    epoch : of this run, 0 until `take_over`. token : random, of this run; see ``fence``.
    """

    def __init__(self, paths: ShardPaths, run_id: str) -> None:
        self.epoch = 0
        self.token = secrets.token_hex(8)
        self._paths, self._run_id = paths, run_id
        self._lock: Flock | None = None
        self._owner: Owner | None = None
        self._fence: Fence | None = None
        self._shut_out: tuple[str, ...] = ()

    @property
    def admits_writers(self) -> bool:
        """Whether the fence is this run's."""
        return self._fence is not None

    def lock(self) -> None:
        """Take the run lock. Raises StoreLocked, naming the owner."""
        make_dirs(self._paths.folder)
        self._lock = take_lock(self._paths)

    def take_over(self, manifest: Manifest | None) -> None:
        """Raise the epoch, durably, and wait until no earlier writer is inside a write."""
        make_dirs(self._paths.journal)
        self._fence = Fence(self._paths.fence, create=True)
        self.epoch = _latest_epoch(self._paths, manifest, self._fence) + 1
        self._owner = Owner.me(self._run_id, self.epoch)
        self._owner.write(self._paths.owner)
        self.raise_fence()

    def raise_fence(self, *, closed: bool = False) -> None:
        """Put this run's epoch up; ``closed`` refuses its own writers too."""
        assert self._fence is not None
        self._fence.raise_to(FenceState(self.epoch, self.token, closed, self._shut_out))

    def shut_out(self, writer_id: str) -> None:
        """Refuse one writer of this run for good; waits for its write in flight."""
        self._shut_out = (*self._shut_out, writer_id)
        self.raise_fence()

    def disown(self) -> None:
        """Leave no owner record behind: nothing is there any more that would be owned."""
        self._owner = None

    def back_out(self) -> None:
        """Let go after a refusal; the lock's file goes too, if nothing was taken over yet."""
        if self._lock is not None and self.epoch == 0:
            remove([self._paths.lock])
        self.release()

    def release(self) -> None:
        """Let go. The lock is the last to go."""
        if self._owner is not None:
            with contextlib.suppress(OSError):  # a full disk must not hide the error before it
                self._owner.release(self._paths.owner)
            self._owner = None
        for held in (self._fence, self._lock):
            if held is not None:
                held.close()
        self._fence = self._lock = None


def _latest_epoch(paths: ShardPaths, manifest: Manifest | None, fence: Fence) -> int:
    """The highest epoch that anything on the disk knows of: any one of these may have been lost."""
    owner, state = Owner.read(paths.owner), fence.read()
    known = [0, owner.epoch if owner else 0, state.epoch if state else 0]
    known += [int(manifest.fields.get("epoch", 0))] if manifest else []
    heads = (path.name.split("-")[0] for path in paths.journals())
    return max(known + [int(head) for head in heads if head.isdigit()])
