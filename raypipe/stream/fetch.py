"""A batch's rows on their way from a reader: waited for once, by whoever comes first, or given up.

A batch is given up when something else ends the iteration (another source's error, the caller's own,
Ctrl-C): then nobody stays with a reader that hangs. What a reader is: `raypipe.stream.reading`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError

import numpy as np

from raypipe.stream.reading import Cancellable, Fetched, RowReader

# What made one reader fail (a node, a network) makes the next one fail in the same moment.
HEAR_S = 0.5


class Fetch:
    """``rows`` (n,) of ``reader``: started when made. Raises as `RowReader.check` and
    `RowReader.start`.
    """

    def __init__(self, reader: RowReader, rows: np.ndarray) -> None:
        reader.check(rows)
        self._source, self._rows = reader.source, rows.size
        started = reader.start(rows)
        self._call: Cancellable | None = (
            started if isinstance(started, Cancellable) else _Aside(started)
        )
        self._lock = threading.Lock()
        self._asked = self._cancelled = False
        self._block: Fetched | None = None
        self._error: Exception | None = None

    def block(self) -> Fetched:
        """The rows, once they are there; the same block, or the same error, for every caller.

        CancelledError after `cancel`, within about a second for those who wait already.
        """
        with self._lock:
            if not self._asked:
                self._asked = True
                self._wait()
            if self._error is not None:
                raise self._error
            assert self._block is not None
            return self._block

    def _wait(self) -> None:
        call = self._call
        try:
            if self._cancelled or call is None:
                raise CancelledError
            self._block = Fetched(self._source, self._rows, call())
        except Exception as error:  # every piece of the batch is told
            self._error = error
        self._call = None  # it may hold the rows

    def cancel(self) -> None:
        """Nobody wants the rows any more. Does not wait, and may come in any thread, twice too."""
        self._cancelled = True
        call = self._call
        if call is not None:
            call.cancel()

    def forget(self) -> None:
        """Let go of the rows, which are copied: a batch that waits its turn holds no second one."""
        self._block = None


def hear(fetches: Mapping[str, Fetch]) -> dict[str, Exception]:
    """What went wrong with ``fetches``, of a batch that has failed: errors that come in `HEAR_S`.

    Who has not answered by then is cancelled, and not waited for.
    """
    told: dict[str, Exception] = {}

    def listen(name: str, fetch: Fetch) -> None:
        try:
            fetch.block()
        except CancelledError:
            pass
        except Exception as error:
            told[name] = error

    threads = [
        threading.Thread(target=listen, args=each, name="raypipe-hear", daemon=True)
        for each in fetches.items()
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + HEAR_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    for fetch in fetches.values():
        fetch.cancel()
    return dict(told)


class _Aside:
    """The call of a reader that cannot be cancelled: whoever waits for it can leave all the same.

    It is made in a daemon thread, which stays with the reader until that comes to an end, and keeps
    no process alive. It writes nowhere: the rows that it brings too late are dropped.
    """

    def __init__(self, call: Callable[[], np.ndarray]) -> None:
        self._call: Callable[[], np.ndarray] | None = call
        self._over = threading.Event()
        self._cancelled = False
        self._found: np.ndarray | None = None
        self._error: BaseException | None = None

    def __call__(self) -> np.ndarray:
        call, self._call = self._call, None
        if call is not None and not self._cancelled:
            name = "raypipe-fetch"
            threading.Thread(target=self._run, args=(call,), name=name, daemon=True).start()
            del call  # it is the thread's: it may hold the rows
            self._over.wait()
        if self._error is not None:
            raise self._error
        found, self._found = self._found, None
        if found is None:
            raise CancelledError
        return found

    def cancel(self) -> None:
        """As `Cancellable.cancel`."""
        self._cancelled, self._call = True, None
        self._over.set()

    def _run(self, call: Callable[[], np.ndarray]) -> None:
        try:
            found = call()
            if not self._cancelled:
                self._found = found
        except BaseException as error:  # raised in the thread that waits
            self._error = error
        self._over.set()
