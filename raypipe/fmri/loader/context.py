"""How a loader is opened: for the length of a block, or with its memory options said first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raypipe.errors import InputError
from raypipe.fmri.loader.core import MemoryEfficientLoader
from raypipe.fmri.loader.places import Data
from raypipe.memory import MemoryConfig, MemoryFlags, ResolvedMemory, resolve


class MemoryEfficientContext:
    """``with MemoryEfficientContext(data) as loader``: temporary files go at the end, also after an
    error. Takes the arguments of MemoryEfficientLoader.
    """

    def __init__(
        self, data: Data = None, memory: MemoryConfig | None = None, **options: Any
    ) -> None:
        self._arguments = (data, memory), options
        self._loader: MemoryEfficientLoader | None = None

    def __enter__(self) -> MemoryEfficientLoader:
        arguments, options = self._arguments
        self._loader = MemoryEfficientLoader(*arguments, **options)
        return self._loader

    def __exit__(self, *_: object) -> None:
        if self._loader is not None:
            self._loader.cleanup()


def create_memory_efficient_loader(
    data: Data = None,
    *,
    memory: MemoryConfig | ResolvedMemory | None = None,
    flags: MemoryFlags | None = None,
    say: Callable[[str], None] = print,
    **options: Any,
) -> MemoryEfficientLoader:
    """A loader whose memory options, and where each came from, are said first.

    flags : e.g. MemoryFlags(max_memory_per_process="6GiB"), above the environment and the node
    """
    if memory is None:
        memory = resolve(flags)
    elif flags is not None:
        raise InputError("memory and flags are both given; give one of them")
    if isinstance(memory, ResolvedMemory):
        say("\n  ".join(["memory", *memory.lines()]))
        memory = memory.config
    return MemoryEfficientLoader(data, memory, say=say, **options)
