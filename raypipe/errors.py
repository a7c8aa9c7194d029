"""The error tree: every failure that a person can meet, and the exit code it leaves behind.

RaypipeError                       4
├── InputError                     2   what was asked for is not usable as it stands
│   ├── ConfigError                    an option's value breaks its rule
│   ├── MissingInput                   a file or folder is not there
│   ├── UnknownName                    no such backbone, layer, subject, ROI (nearest names are offered)
│   ├── BadImage                       an image cannot be decoded
│   ├── WeightsUnavailable             weights are not at hand, or not of this model
│   ├── DeviceUnavailable              the device asked for is not on this machine
│   └── StoreError                     a store cannot be used
│       ├── FingerprintMismatch            it was made with another configuration
│       ├── StoreLocked                    another run owns it
│       ├── StoreNotSealed                 it is not finished
│       └── StoreCorrupt                   its bytes are not what its manifest says
├── ResourceError                  3   a limit would be, or was, exceeded
│   ├── NoSpace                        the disk does not hold what the run needs
│   └── MemoryBudgetExceeded           a process outgrew its budget, also at batch 1
├── WorkerFailed                   4   a worker failed for good, after bounded retries
├── Fenced                         4   this writer's run was superseded by a newer one
└── Interrupted                  130   stopped by a person; the same command resumes

RaypipeWarning                         the work goes on, but its result may not mean what it seems to

A message is one line: the value received, the rule it broke, the next step. Where several things
failed at once the first is raised, and the others are its notes (`together`, `in_one_line`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class RaypipeError(Exception):
    """Base of all errors that raypipe raises on purpose."""

    exit_code = 4


class InputError(RaypipeError):
    """What was asked for is not usable as it stands."""

    exit_code = 2


class ConfigError(InputError):
    """An option's value breaks its rule."""


class MissingInput(InputError):
    """A file or folder is not there."""


class UnknownName(InputError):
    """No such name; the message offers the nearest ones."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownName:
        """Build the message ``unknown KIND 'name'; nearest: a, b; HINT``."""
        names = sorted(set(known))
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:8]
        text = f"unknown {kind} {name!r}; nearest: {', '.join(near) or 'none'}"
        return cls(f"{text}; {hint}" if hint else text)


class BadImage(InputError):
    """An image cannot be decoded."""


class WeightsUnavailable(InputError):
    """Weights are not at hand, or do not fit the model."""


class DeviceUnavailable(InputError):
    """The device asked for is not on this machine."""


class StoreError(InputError):
    """A store cannot be used."""


class FingerprintMismatch(StoreError):
    """The store was made with another configuration."""


class StoreLocked(StoreError):
    """Another run owns the store."""


class StoreNotSealed(StoreError):
    """The store is not finished."""


class StoreCorrupt(StoreError):
    """The store's bytes are not what its manifest says."""


class ResourceError(RaypipeError):
    """A limit would be, or was, exceeded."""

    exit_code = 3


class NoSpace(ResourceError):
    """The disk does not hold what the run needs."""


class MemoryBudgetExceeded(ResourceError):
    """A process outgrew its memory budget, also at batch 1."""


class WorkerFailed(RaypipeError):
    """A worker failed for good, after bounded retries."""


class Fenced(RaypipeError):
    """This writer's run was superseded by a newer one."""


class Interrupted(RaypipeError):
    """Stopped by a person; the same command resumes."""

    exit_code = 130


class RaypipeWarning(UserWarning):
    """The work goes on, but its result may not mean what it seems to."""


def together(errors: Sequence[Exception]) -> Exception:
    """The first of ``errors``, with what the others say as its notes, each once.

    Notes are in a traceback, go along in a pickle, and are told by `in_one_line`.
    """
    first, *others = errors
    said = {str(first), *getattr(first, "__notes__", ())}
    for other in others:
        note = f"also: {in_one_line(other)}"
        if not {note, str(other)} & said:
            first.add_note(note)
            said |= {note, str(other)}
    return first


def in_one_line(error: BaseException) -> str:
    """What a person is told of ``error``: its message, then its notes."""
    return "; ".join((str(error), *getattr(error, "__notes__", ())))
