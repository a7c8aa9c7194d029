"""The most that this process was charged for during a block, by looking every few milliseconds.

For records: the kernel keeps a high-water mark of resident pages only, maps of files among them. Who is
kept to a budget, and by whom, is ``raypipe.memory``.
"""

from __future__ import annotations

import threading

from raypipe.memory.probe import charge_bytes

_EVERY_S = 0.005


class Peak:
    """``with Peak() as peak: …`` and then ``peak.bytes``; what comes and goes between looks is missed."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()

    def __enter__(self) -> Peak:
        self.bytes = charge_bytes()
        self._thread = threading.Thread(target=self._look, name="raypipe-peak", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, charge_bytes())

    def _look(self) -> None:
        while not self._done.wait(_EVERY_S):
            self.bytes = max(self.bytes, charge_bytes())
