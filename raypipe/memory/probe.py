"""What this process is charged for: the bytes that the kernel cannot take back.

charge = RssAnon (``statm``) + pinned host bytes of torch + /dev/shm/torch_PID_*; beside it what the
GPUs hold (``gpu``). torch is asked only where a caller has loaded it: nothing here imports it.
``MemoryMonitor`` answers in the words of ``MemoryConfig``; a record over time is ``tracker``'s.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from raypipe.memory.config import GIB, MemoryConfig
from raypipe.memory.gpu import GpuMemory, gpu_memory, initialised_cuda
from raypipe.memory.limits import NodeLimits, available_bytes, node_limits
from raypipe.memory.statm import ENFORCES, ProcessProbe, Reading, anon_bytes
from raypipe.units import format_bytes

__all__ = [
    "ENFORCES", "Charge", "GpuMemory", "MemoryInfo", "MemoryMonitor", "ProcessProbe", "Reading",
    "anon_bytes", "charge", "charge_bytes", "gpu_memory", "pinned_bytes", "torch_shm_bytes",
]  # fmt: skip

_SHM = Path("/dev/shm")


class Charge(NamedTuple):
    """What a process is charged for, by kind; ``file_bytes`` is shown, and never charged."""

    anon_bytes: int
    pinned_bytes: int
    shm_bytes: int
    file_bytes: int

    @property
    def total_bytes(self) -> int:
        """The charge."""
        return self.anon_bytes + self.pinned_bytes + self.shm_bytes


def charge() -> Charge:
    """What this process is charged for, by kind."""
    anon, file = own_reading()
    return Charge(anon, pinned_bytes(), torch_shm_bytes(), file)


def charge_bytes() -> int:
    """What this process is charged for."""
    return charge().total_bytes


def pinned_bytes() -> int:
    """Page-locked host bytes that torch's allocator holds in this process, cached ones too.

    0 where torch is not loaded or has not begun to use CUDA: this never starts it.
    """
    cuda = initialised_cuda()
    stats = cuda.host_memory_stats_as_nested_dict() if cuda is not None else {}
    return int(stats.get("allocated_bytes", {}).get("current", 0))


def torch_shm_bytes(pid: int | None = None) -> int:
    """Bytes that the shared tensors of ``pid`` (default: this process) hold in /dev/shm.

    Counts blocks in use. A tensor shared by file descriptor, whose file is unlinked at once, has
    no name there and is not seen.
    """
    pid = os.getpid() if pid is None else pid
    prefix = f"torch_{pid}_"
    try:
        names = [name for name in os.listdir(_SHM) if name.startswith(prefix)]  # noqa: PTH208
    except FileNotFoundError:
        return 0
    if not names:
        return 0
    began = _began_at(pid)
    return sum(_blocks_bytes(_SHM / name, began) for name in names)


def _began_at(pid: int) -> float:
    """When a process began, seconds since 1970: files before that are of another one's number."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return math.inf


_own: ProcessProbe | None = None


def own_reading() -> Reading:
    """This process's pages, by a probe that is kept; a forked child gets its own."""
    global _own
    if _own is None or _own.pid != os.getpid():
        _own = ProcessProbe(os.getpid())
    return _own.read()


def _blocks_bytes(file: Path, began: float) -> int:
    try:
        found = file.stat()
    except FileNotFoundError:
        return 0  # freed between listing and looking
    # A second for the clock tick that a start is rounded to.
    return found.st_blocks * 512 if found.st_ctime >= began - 1 else 0


@dataclass(frozen=True, kw_only=True)
class MemoryInfo:
    """A moment of this process on this node.

    available_bytes : what can be allocated now, by the machine and its control groups
    """

    limits: NodeLimits
    available_bytes: int
    charge: Charge
    budget_bytes: int
    gpus: tuple[GpuMemory, ...]

    @property
    def available_gb(self) -> float:
        """``available_bytes`` in GiB."""
        return self.available_bytes / GIB

    @property
    def total_gb(self) -> float:
        """The node's smallest limit in GiB."""
        return self.limits.limit_bytes / GIB

    @property
    def headroom_bytes(self) -> int:
        """What this process may still take; below 0 it is above its budget."""
        return self.budget_bytes - self.charge.total_bytes


class MemoryMonitor:
    """Answers before something large is done; ``config`` defaults to what suits this node."""

    def __init__(self, config: MemoryConfig | None = None) -> None:
        self.limits = node_limits()
        self.config = config or MemoryConfig.auto(self.limits)

    def get_memory_info(self) -> MemoryInfo:
        """Read everything once: about a millisecond, more where there are GPUs."""
        return MemoryInfo(
            limits=self.limits,
            available_bytes=available_bytes(),
            charge=charge(),
            budget_bytes=self.config.budget_bytes,
            gpus=gpu_memory(),
        )

    def check_memory_threshold(self, required_gb: float) -> bool:
        """Whether ``required_gb`` GiB more fit: on the node, its buffer kept, and in the budget."""
        buffer = self.limits.limit_bytes * self.config.available_memory_buffer
        free = available_bytes() - buffer
        return required_gb * GIB <= min(free, self.config.budget_bytes - charge_bytes())

    def suggest_memmap(self, size_gb: float) -> bool:
        """Whether an array of ``size_gb`` GiB is better mapped: large, or more than fits."""
        if not self.config.use_memmap:
            return False
        large = size_gb >= self.config.memmap_threshold_gb
        return large or not self.check_memory_threshold(size_gb)

    def log_memory_usage(self, operation: str) -> str:
        """One line on what is held; printed to stderr unless monitor_memory_usage is off."""
        info = self.get_memory_info()
        line = f"{operation}: {describe(info)}"
        if self.config.monitor_memory_usage:
            print(line, file=sys.stderr, flush=True)
        return line


def describe(info: MemoryInfo) -> str:
    """``1.2 GiB of 8.00 GiB, file pages 3.1 GiB, 12.0 GiB available``, then each GPU."""
    parts = [
        f"{format_bytes(info.charge.total_bytes)} of {format_bytes(info.budget_bytes)}",
        f"file pages {format_bytes(info.charge.file_bytes)}",
        f"{format_bytes(info.available_bytes)} available",
    ]
    parts += [
        f"GPU {gpu.index} {format_bytes(gpu.used_bytes)} of {format_bytes(gpu.total_bytes)}"
        for gpu in info.gpus
    ]
    if info.headroom_bytes < 0:
        over = f"ABOVE its budget by {format_bytes(-info.headroom_bytes)}"
        parts.append(over if ENFORCES else f"{over} (measured only: this is not Linux)")
    return ", ".join(parts)


class SharedTensors:
    """Which processes have shared tensors by name, asked again and again: /dev/shm/torch_PID_*."""

    def __init__(self) -> None:
        self._changed_ns, self._pids = -1, frozenset[int]()

    def pids(self) -> frozenset[int]:
        """Their ids; the folder is listed only after it has changed."""
        try:
            changed_ns = _SHM.stat().st_mtime_ns
            if changed_ns != self._changed_ns:
                names = os.listdir(_SHM)  # noqa: PTH208
                pids = (name.split("_")[1] for name in names if name.startswith("torch_"))
                self._pids = frozenset(int(pid) for pid in pids if pid.isdigit())
                # The clock of files moves every few milliseconds: a later change may bear this time.
                settled = time.time_ns() - changed_ns > 100_000_000
                self._changed_ns = changed_ns if settled else -1
        except FileNotFoundError:
            self._pids = frozenset()
        return self._pids
