"""Opens a runner: in this process, or on Ray (the default)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from raypipe.runner import LocalRunner, Runner


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where to run."""

    runner: Literal["ray", "local"] = "ray"
    """ray (started on this machine when no cluster is named), or local: this process only."""
    address: str | None = None
    """Ray cluster to join, e.g. auto or 10.0.0.1:6379; by default RAY_ADDRESS."""
    verbose: bool = False
    """Show Ray's own messages too."""


@contextmanager
def open_runner(cfg: LaunchConfig) -> Iterator[Runner]:
    """The runner that ``cfg`` names, for the length of the block. Raises InputError."""
    if cfg.runner == "local":
        yield LocalRunner()
        return
    from raypipe.cluster.runner import RayRunner
    from raypipe.cluster.session import open_session

    with open_session(cfg.address, verbose=cfg.verbose):
        joined = bool(cfg.address or os.environ.get("RAY_ADDRESS"))
        yield RayRunner(joined=joined, on_event=_say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
