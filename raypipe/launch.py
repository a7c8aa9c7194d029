"""Opens a runner: in this process, or on Ray (the default)."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from raypipe.memory.config import MemoryFlags, ResolvedMemory, resolve
from raypipe.runner import LocalRunner, Prospect, Runner


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where to run."""

    runner: Literal["ray", "local"] = "ray"
    """ray (started on this machine when no cluster is named), or local: this process only."""
    address: str | None = None
    """Ray cluster to join, e.g. auto or 10.0.0.1:6379; by default RAY_ADDRESS."""
    verbose: bool = False
    """Show Ray's own messages too."""
    memory: MemoryFlags = field(default_factory=MemoryFlags)
    """Budgets; what is not given comes from RAYPIPE_… in the environment, or from the machine."""


def resolve_memory(flags: MemoryFlags, from_file: Collection[str] = ()) -> ResolvedMemory:
    """The budgets of a run. from_file : options among ``flags`` that a --config file set."""
    file = {name: getattr(flags, name) for name in from_file if hasattr(flags, name)}
    return resolve(replace(flags, **dict.fromkeys(file)), file)


@contextmanager
def open_runner(cfg: LaunchConfig, from_file: Collection[str] = ()) -> Iterator[Runner]:
    """The runner that ``cfg`` names, for the length of the block. Raises InputError.

    from_file : options that a --config file set, to say so beside their values.
    """
    memory = resolve_memory(cfg.memory, from_file)
    _say("\n  ".join(["memory budgets", *memory.lines()]))
    if cfg.runner == "local":
        yield LocalRunner(memory)
        return
    from raypipe.cluster.runner import RayRunner
    from raypipe.cluster.session import open_session

    with open_session(cfg.address, verbose=cfg.verbose):
        yield RayRunner(joined=_joins(cfg), on_event=_say, memory=memory)


@contextmanager
def open_prospect(
    cfg: LaunchConfig, from_file: Collection[str] = ()
) -> Iterator[Runner | Prospect]:
    """What the runner that ``cfg`` names would have, for the length of the block; raises InputError.

    A cluster that is named is asked; Ray on this machine is not started for it.
    """
    memory = resolve_memory(cfg.memory, from_file)
    if cfg.runner == "local":
        yield LocalRunner(memory)
        return
    from raypipe.cluster.session import is_open, open_session, own_machine

    if not _joins(cfg) and not is_open():
        yield Prospect(memory=memory, machines=own_machine())
        return
    from raypipe.cluster.runner import RayRunner

    with open_session(cfg.address, verbose=cfg.verbose):
        yield RayRunner(joined=_joins(cfg), on_event=_say, memory=memory)


def _joins(cfg: LaunchConfig) -> bool:
    """Whether it is somebody's cluster."""
    return bool(cfg.address or os.environ.get("RAY_ADDRESS"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
