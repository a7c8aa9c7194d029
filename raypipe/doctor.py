"""``raypipe doctor``: what this machine gives, what Ray sees of it, and the budgets that follow.

For the question before a run: will my workers fit? Everything shown is read here and now.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass

from raypipe.memory.gpu import gpu_memory
from raypipe.memory.limits import NodeLimits, node_limits
from raypipe.provenance import versions
from raypipe.runner import Runner
from raypipe.units import format_bytes

# Below this torch's and Ray's shared memory meet their end early (containers start with 64 MiB).
LEAST_SHM_BYTES = 1024**3


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Show memory limits, /dev/shm, GPUs, what Ray sees, and the resolved budgets."""


def doctor(cfg: DoctorConfig, runner: Runner) -> None:
    """Print all of it; problems come last, each with what to do. The budgets were said on opening
    the runner.
    """
    limits = node_limits()
    memory = runner.memory
    _table("machine", _machine(limits))
    _table("GPUs", _gpus())
    _table(f"runner {runner.name}", runner.facts())
    capacity = memory.config.capacity_bytes(limits)
    fit = capacity // memory.config.budget_bytes
    print(
        f"leases\n  {format_bytes(capacity)} on this node: {fit} worker(s) of"
        f" {format_bytes(memory.config.budget_bytes)}; more workers get smaller shares, unless the"
        " budget was stated"
    )
    for problem in problems(limits):
        print(f"! {problem}")


def problems(limits: NodeLimits) -> list[str]:
    """What will hurt, in one line each: the value, the rule, the next step."""
    found = []
    if limits.shm_bytes < LEAST_SHM_BYTES:
        found.append(
            f"/dev/shm holds {format_bytes(limits.shm_bytes)}, Ray wants at least "
            f"{format_bytes(LEAST_SHM_BYTES)}; start the container with --shm-size=2g or more"
        )
    if platform.system() != "Linux":
        found.append(
            f"{platform.system()}: budgets are measured and warned about, not enforced; Linux is "
            "where a worker that outgrows its budget is ended"
        )
        return found
    try:
        importlib.import_module("raypipe.memory.stare")
    except Exception as error:  # numba has many ways to fail on an unusual machine
        found.append(
            f"the watch over budgets cannot be compiled ({type(error).__name__}: {error}): it takes "
            "3 to 4 % of a core instead of 2 with 16 workers near their limits; install numba again"
        )
    return found


def _machine(limits: NodeLimits) -> Iterable[tuple[str, str]]:
    yield "host", f"{platform.node()}, {platform.system()} {platform.release()}"
    yield "cores", str(os.cpu_count())
    yield "physical memory", format_bytes(limits.physical_bytes)
    yield "cgroup limit", _or_none(limits.cgroup_bytes)
    yield "Slurm limit", _or_none(limits.slurm_bytes)
    yield "limit that counts", f"{format_bytes(limits.limit_bytes)} ({limits.limit_source})"
    yield (
        "/dev/shm",
        f"{format_bytes(limits.shm_bytes)}, {format_bytes(limits.shm_free_bytes)} free",
    )
    yield from versions().items()


def _gpus() -> list[tuple[str, str]]:
    found = [
        (str(gpu.index), f"{gpu.name}, {format_bytes(gpu.total_bytes)}") for gpu in gpu_memory()
    ]
    return found or [("none", "extraction and training run on the CPU")]


def _or_none(n_bytes: int | None) -> str:
    return "none" if n_bytes is None else format_bytes(n_bytes)


def _table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    print(title)
    pairs = list(rows)
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print(f"  {name:<{width}}  {value}")
