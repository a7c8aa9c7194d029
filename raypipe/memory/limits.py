"""What this node really gives: the smallest of its memory, its control groups' and Slurm's limits.

A group is bounded by all groups above it, so every one up to the mount point is read: cgroup v2
(memory.max), v1 (memory.limit_in_bytes) or both at once, as on hybrid hosts. Mount points come from
/proc/self/mountinfo, for in a container the group's path and the mount do not begin at one place.
``root`` stands for "/", so that tests bring files of their own. What to do with it: ``config``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from raypipe.errors import ConfigError
from raypipe.units import parse_bytes

# v1 says "no limit" as the largest page count (2**63 less a page): no machine holds an EiB.
_UNLIMITED_BYTES = 1 << 60
_COUNTS = re.compile(r"(\d+)(?:\(x(\d+)\))?\Z")
_ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class NodeLimits:
    """The bounds of this node, in bytes; None where there is no such bound.

    slurm_tasks : tasks that Slurm starts on this node and that share slurm_bytes
    shm_bytes, shm_free_bytes : size of /dev/shm and what is left of it; 0 where there is none
    cgroup, slurm_job : which group and which job those bounds are of
    """

    physical_bytes: int
    cgroup_bytes: int | None
    slurm_bytes: int | None
    slurm_tasks: int | None
    shm_bytes: int
    shm_free_bytes: int
    slurm_source: str = "SLURM_MEM_PER_NODE"
    cgroup: str = ""
    slurm_job: str = ""

    @property
    def shared_by(self) -> str:
        """Names all processes of this machine that share ``limit_bytes``: those of one control
        group, of one Slurm job, or "", all of them.
        """
        names = {"physical memory": "", "cgroup": f"cgroup {self.cgroup}"}
        return names.get(self.limit_source, f"Slurm job {self.slurm_job}")

    @property
    def limit_bytes(self) -> int:
        """The smallest known bound."""
        return self._smallest()[0]

    @property
    def limit_source(self) -> str:
        """Which bound that is: "physical memory", "cgroup", "SLURM_MEM_PER_NODE" …"""
        return self._smallest()[1]

    def _smallest(self) -> tuple[int, str]:
        found = [
            (self.physical_bytes, "physical memory"),
            (self.cgroup_bytes, "cgroup"),
            (self.slurm_bytes, self.slurm_source),
        ]
        return min(
            ((size, name) for size, name in found if size is not None), key=lambda pair: pair[0]
        )


def node_limits(environ: Mapping[str, str] = os.environ, root: Path = _ROOT) -> NodeLimits:
    """Read this node's bounds. Raises ConfigError when a Slurm variable cannot be understood."""
    physical = _meminfo(root)["total"]
    slurm_bytes, source = _slurm_memory(environ, physical)
    groups = [(cap, str(g.folder)) for g in _groups(root) if (cap := g.limit_bytes()) is not None]
    cap, group = min(groups, default=(None, ""))
    size, free = _shm(root)
    return NodeLimits(
        physical_bytes=physical,
        cgroup_bytes=cap,
        slurm_bytes=slurm_bytes,
        slurm_tasks=_slurm_tasks(environ),
        shm_bytes=size,
        shm_free_bytes=free,
        slurm_source=source,
        cgroup=group,
        slurm_job=environ.get("SLURM_JOB_ID", ""),
    )


def available_bytes(root: Path = _ROOT) -> int:
    """Bytes that can be allocated now: of the machine, and of every limited group on the way up.

    Page cache that the kernel drops on demand counts as available in both.
    """
    found = [_meminfo(root)["available"]]
    for group in _groups(root):
        cap = group.limit_bytes()
        if cap is not None:
            found.append(max(0, cap - group.held_bytes()))
    return min(found)


# ---- the machine


def _meminfo(root: Path) -> dict[str, int]:
    file = root / "proc/meminfo"
    if not file.exists():
        import psutil

        memory = psutil.virtual_memory()
        return {"total": int(memory.total), "available": int(memory.available)}
    pairs = (line.split(":") for line in file.read_text().splitlines() if ":" in line)
    kib = {name: int(rest.split()[0]) for name, rest in pairs if name.startswith("Mem")}
    available = kib.get("MemAvailable", kib["MemFree"])  # kernels before 3.14 have no estimate
    return {"total": kib["MemTotal"] * 1024, "available": available * 1024}


def _shm(root: Path) -> tuple[int, int]:
    try:
        found = os.statvfs(root / "dev/shm")
    except FileNotFoundError:
        return 0, 0
    return found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail


# ---- control groups


class _Group(NamedTuple):
    """The folder of one control group."""

    folder: Path
    v2: bool

    def limit_bytes(self) -> int | None:
        """Its own bound, or of v1 also what the kernel says of groups above that are hidden."""
        if self.v2:
            caps = [_number(self.folder / "memory.max")]
        else:
            above = _stat(self.folder).get("hierarchical_memory_limit")
            caps = [_number(self.folder / "memory.limit_in_bytes"), above]
        return min((n for n in caps if n is not None and n < _UNLIMITED_BYTES), default=None)

    def held_bytes(self) -> int:
        """What it uses and the kernel cannot drop: usage less inactive page cache."""
        name, key = (
            ("memory.current", "inactive_file")
            if self.v2
            else ("memory.usage_in_bytes", "total_inactive_file")
        )
        return (_number(self.folder / name) or 0) - _stat(self.folder).get(key, 0)


def _groups(root: Path) -> Iterator[_Group]:
    """This process's memory groups, each followed by those above it, up to the mount point."""
    file = root / "proc/self/cgroup"
    if not file.exists():
        return
    mounts = _mounts(root)
    for line in file.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        v2 = controllers == ""
        if (not v2 and "memory" not in controllers.split(",")) or v2 not in mounts:
            continue
        top, point = mounts[v2]
        base = root / point.lstrip("/")
        folder = base / _below(path, top)
        for group in (folder, *folder.parents):
            if group.is_dir():
                yield _Group(group, v2)
            if group == base:
                break


def _below(path: str, top: str) -> str:
    """``path`` of a group, seen from a mount that shows the tree from ``top`` on."""
    inside = path == top or path.startswith(top.rstrip("/") + "/")
    # A group outside of what is mounted (/../x in a namespace): the mount point is all we can see.
    return path[len(top.rstrip("/")) :].strip("/") if inside and ".." not in path else ""


def _mounts(root: Path) -> dict[bool, tuple[str, str]]:
    """is v2 -> (first group that is shown, mount point)."""
    file = root / "proc/self/mountinfo"
    if not file.exists():
        return {True: ("/", "/sys/fs/cgroup"), False: ("/", "/sys/fs/cgroup/memory")}
    found: dict[bool, tuple[str, str]] = {}
    for line in file.read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = [*right.split(), "", "", ""][:3]
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            top, point = left.split()[3:5]
            found.setdefault(kind == "cgroup2", (top, point.replace("\\040", " ")))
    return found


def _number(file: Path) -> int | None:
    """The number in ``file``; None for "max" and where there is no such file."""
    try:
        text = file.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None  # the root group has no limit file
    return None if text == "max" else int(text)


def _stat(folder: Path) -> dict[str, int]:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}


# ---- Slurm


def _slurm_memory(environ: Mapping[str, str], physical_bytes: int) -> tuple[int | None, str]:
    """Bytes that Slurm gave this job on this node, and the variable that says so."""
    if text := environ.get("SLURM_MEM_PER_NODE"):
        # --mem=0 asks for the whole node.
        return _slurm_bytes("SLURM_MEM_PER_NODE", text) or physical_bytes, "SLURM_MEM_PER_NODE"
    for each, count in (
        ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
        ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE"),
    ):
        if text := environ.get(each):
            if not environ.get(count):
                raise ConfigError(
                    f"{each}={text} is set and {count} is not: the node's memory is their product;"
                    f" export {count}, or unset {each}"
                )
            size = _slurm_bytes(each, text) * _slurm_count(count, environ[count], environ)
            return size or physical_bytes, f"{each} x {count}"
    return None, "SLURM_MEM_PER_NODE"


def _slurm_tasks(environ: Mapping[str, str]) -> int | None:
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if text := environ.get(name):
            return _slurm_count(name, text, environ)
    return None


def _slurm_bytes(name: str, text: str) -> int:
    """Slurm counts in MiB where it writes no unit."""
    try:
        return int(text) * 1024**2 if text.isdigit() else parse_bytes(text)
    except ConfigError:
        raise ConfigError(
            f"{name}={text!r} is no size; Slurm writes MiB, e.g. 16384, or 16G: correct or unset it"
        ) from None


def _slurm_count(name: str, text: str, environ: Mapping[str, str]) -> int:
    """``2(x3),1`` is 2, 2, 2, 1: this node's number, or the largest where no node is named.

    The largest number of tasks makes the smallest budget a task, which is safe on every node.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNTS.match(part.strip())
        if match is None or not int(match[1]):
            raise ConfigError(
                f"{name}={text!r} is no count above 0; Slurm writes 2, 2(x3) or 2(x3),1: "
                "correct or unset it"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    node = environ.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else max(counts)
