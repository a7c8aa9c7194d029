"""A few numbers between one worker and its node's watch: a tiny mapped file, one a process.

The watch writes ``pressure``, ``beat`` and ``sentence``; the worker writes what it does. Either
side reads the other's in a fraction of a microsecond, without a call. The file outlives both, so
what a watch wrote last can be read by its successor. Pickles as its path.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import NamedTuple

_NUMBERS = 16
_PHASE_BYTES = 64
_SIZE = 8 * _NUMBERS + _PHASE_BYTES
_PRESSURE, _BEAT, _PINNED, _BATCH, _LARGEST_BATCH, _RELIEFS = range(6)
_SENTENCE = 8  # first of five numbers


class Sentence(NamedTuple):
    """What a process held when its watch ended it; when_ns : since 1970."""

    when_ns: int
    anon_bytes: int
    pinned_bytes: int
    shm_bytes: int
    file_bytes: int


class Slot:
    """One process's numbers. Raises FileNotFoundError for a path that nobody created."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        # An aligned item of eight bytes is stored by one instruction: no reader sees half of it.
        self._numbers = memoryview(self._map)[: 8 * _NUMBERS].cast("Q")

    @classmethod
    def create(cls, path: Path) -> Slot:
        """A new one, all zero, in the place of whatever is at ``path``."""
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(bytes(_SIZE))
        temporary.replace(path)
        return cls(path)

    def __reduce__(self) -> tuple[type[Slot], tuple[Path]]:
        return Slot, (self.path,)

    def close(self) -> None:
        """Let go of the mapping; the file stays."""
        self._numbers.release()
        self._map.close()

    # ---- the watch's side

    @property
    def pressure(self) -> bool:
        """Whether the worker has to take less."""
        return self._numbers[_PRESSURE] != 0

    @pressure.setter
    def pressure(self, value: bool) -> None:
        self._numbers[_PRESSURE] = value

    @property
    def beats(self) -> int:
        """Looks that the watch has taken: one that stands still is not watching."""
        return self._numbers[_BEAT]

    def beat(self) -> None:
        """Count a look."""
        self._numbers[_BEAT] += 1

    @property
    def sentence(self) -> Sentence | None:
        """Why the process was ended, if it was."""
        found = Sentence(*self._numbers[_SENTENCE : _SENTENCE + len(Sentence._fields)])
        return found if found.when_ns else None

    @sentence.setter
    def sentence(self, value: Sentence) -> None:
        for at in range(len(value) - 1, -1, -1):  # the time last: it makes the others valid
            self._numbers[_SENTENCE + at] = value[at]

    # ---- the worker's side

    @property
    def pinned_bytes(self) -> int:
        """Page-locked host memory, which only the process itself can count."""
        return self._numbers[_PINNED]

    @pinned_bytes.setter
    def pinned_bytes(self, value: int) -> None:
        self._numbers[_PINNED] = value

    @property
    def batch(self) -> int | None:
        """Items computed at once, as last said."""
        return self._numbers[_BATCH] or None

    @batch.setter
    def batch(self, value: int) -> None:
        self._numbers[_BATCH] = value
        self._numbers[_LARGEST_BATCH] = max(value, self._numbers[_LARGEST_BATCH])

    @property
    def largest_batch(self) -> int | None:
        """The largest ``batch`` ever said."""
        return self._numbers[_LARGEST_BATCH] or None

    @property
    def reliefs(self) -> int:
        """How often the worker emptied its caches."""
        return self._numbers[_RELIEFS]

    @reliefs.setter
    def reliefs(self, value: int) -> None:
        self._numbers[_RELIEFS] = value

    @property
    def phase(self) -> str:
        """What the worker does, in its own words."""
        raw = self._map[8 * _NUMBERS :]
        return raw.split(b"\0", 1)[0].decode("utf-8", "replace")

    @phase.setter
    def phase(self, value: str) -> None:
        raw = value.encode()[: _PHASE_BYTES - 1]
        self._map[8 * _NUMBERS :] = raw.ljust(_PHASE_BYTES, b"\0")
