"""How much memory a process may take, and when arrays are mapped instead of loaded.

``MemoryConfig`` holds the values, ``resolve`` finds them: the node's own limits, then environment
variables, a YAML file and flags, each above the last, and every value knows where it came from.
"GB" in a field's name means GiB (1024**3 bytes). What a node gives: ``limits``; who is held to the
budget, and how: ``guard`` and ``watch``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from raypipe.errors import ConfigError, UnknownName
from raypipe.memory.limits import NodeLimits, node_limits
from raypipe.units import format_bytes, parse_bytes

GIB = 1024**3
MIB = 1024**2
SLURM_SHARE = 0.8  # of a task's part: the rest is Ray's, Slurm's and the kernel's own

_SIZES = {
    "max_memory_per_process": "max_memory_per_process_gb",
    "memmap_threshold": "memmap_threshold_gb",
}
_OF_LIMITS = (*_SIZES.values(), "available_memory_buffer")  # what auto decides
_WORDS = {"1": True, "true": True, "yes": True, "on": True,
          "0": False, "false": False, "no": False, "off": False}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What a process may hold. Raises ConfigError when a value breaks its rule.

    available_memory_buffer   : share of the node's limit that is never given out
    max_memory_per_process_gb : the budget: a process above it is stopped
    memmap_threshold_gb       : arrays of this size and above are mapped from disk
    """

    use_memmap: bool = True
    memmap_threshold_gb: float = 1.0
    available_memory_buffer: float = 0.2
    shared_memory_parallel: bool = True
    max_memory_per_process_gb: float = 8.0
    cleanup_temp_files: bool = True
    monitor_memory_usage: bool = True

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _check(name, value, "")

    @classmethod
    def auto(cls, limits: NodeLimits | None = None) -> MemoryConfig:
        """What suits a node of these limits (default: this one), by its smallest limit.

        A budget is never above what the node gives out at all: on a node of 4 GiB the table's
        4 GiB could not be leased to anybody.
        """
        limits = limits or node_limits()
        limit_gb = limits.limit_bytes / GIB
        if limit_gb < 16:
            threshold, buffer, each = 0.5, 0.3, 4.0
        elif limit_gb <= 64:
            threshold, buffer, each = 1.0, 0.2, 8.0
        else:
            threshold, buffer, each = 2.0, 0.15, 16.0
        if limits.slurm_bytes is not None:
            each = limit_gb / (limits.slurm_tasks or 1) * SLURM_SHARE
            threshold = min(1.0, each / 4)
            buffer = min(buffer, 1 - SLURM_SHARE)  # the share has left that much alone already
        return cls(
            memmap_threshold_gb=threshold,
            available_memory_buffer=buffer,
            max_memory_per_process_gb=min(each, limit_gb * (1 - buffer)),
        )

    @property
    def budget_bytes(self) -> int:
        """What one process may be charged for."""
        return int(self.max_memory_per_process_gb * GIB)

    @property
    def threshold_bytes(self) -> int:
        """Arrays of this size and above are mapped."""
        return round(self.memmap_threshold_gb * GIB)

    def capacity_bytes(self, limits: NodeLimits) -> int:
        """What all processes of a node may hold together: its limit less the buffer."""
        # Rounded, where a budget is cut: a task's share times the tasks must fit to the byte.
        return round(limits.limit_bytes * (1 - self.available_memory_buffer))


@dataclass(frozen=True, kw_only=True)
class MemoryFlags:
    """Memory options; what is left out is decided by the node, see ``raypipe doctor``."""

    max_memory_per_process: str | None = None
    """Budget of each process, e.g. 6GiB: what outgrows it is stopped with the reason."""
    memmap_threshold: str | None = None
    """Arrays of this size and above are mapped from disk instead of loaded, e.g. 1GiB."""
    available_memory_buffer: float | None = None
    """Share of the node's memory that is left alone, 0 to below 1."""
    use_memmap: bool | None = None
    """Map large arrays from disk instead of loading them."""
    shared_memory_parallel: bool | None = None
    """Let the processes of a node read one mapped copy instead of one each."""
    cleanup_temp_files: bool | None = None
    """Remove temporary files when a run ends."""
    monitor_memory_usage: bool | None = None
    """Write each process's memory use beside the run and draw it in its report."""


_FLAG_NAMES = tuple(field.name for field in fields(MemoryFlags))


@dataclass(frozen=True, kw_only=True)
class ResolvedMemory:
    """The values in force, the limits they stand on, and field -> where each came from."""

    config: MemoryConfig
    limits: NodeLimits
    sources: Mapping[str, str]

    def lines(self) -> list[str]:
        """A table for a person: name, value, source; the node's limit first."""
        limits = self.limits
        rows = [("node limit", format_bytes(limits.limit_bytes), limits.limit_source)]
        rows.append(
            (
                "given out at most",
                format_bytes(self.config.capacity_bytes(limits)),
                "node limit less available_memory_buffer",
            )
        )
        for flag in _FLAG_NAMES:
            field = _SIZES.get(flag, flag)
            rows.append((flag, _shown(field, getattr(self.config, field)), self.sources[field]))
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return [f"{name:<{wide[0]}}  {value:>{wide[1]}}  {source}" for name, value, source in rows]

    def record(self) -> dict[str, Any]:
        """For run.json: values, sources, limits, and the budget in bytes."""
        limits = asdict(self.limits) | {
            "limit_bytes": self.limits.limit_bytes,
            "limit_source": self.limits.limit_source,
        }
        return {
            "config": asdict(self.config),
            "sources": dict(self.sources),
            "limits": limits,
            "budget_bytes": self.config.budget_bytes,
            "capacity_bytes": self.config.capacity_bytes(self.limits),
        }


def resolve(
    flags: MemoryFlags | None = None,
    file: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    limits: NodeLimits | None = None,
) -> ResolvedMemory:
    """The values in force: auto < environment (RAYPIPE_NAME) < file < flag.

    file : options by flag name (``max_memory_per_process: 6GiB``) or by the field's
        (``max_memory_per_process_gb: 6``).
    Raises ConfigError naming value, rule and source; UnknownName for an entry of the file.
    """
    limits = limits or node_limits(environ)
    values: dict[str, Any] = asdict(MemoryConfig.auto(limits))
    sources = dict.fromkeys(values, "default")
    sources |= dict.fromkeys(_OF_LIMITS, f"auto ({limits.limit_source})")
    for layer in (_of_environ(environ), _of_file(file or {}), _of_flags(flags or MemoryFlags())):
        for name, given, source in layer:
            field = _SIZES.get(name, name)
            values[field], sources[field] = _parsed(name, given, source), source
    return ResolvedMemory(config=MemoryConfig(**values), limits=limits, sources=sources)


Given = Iterator[tuple[str, Any, str]]  # name, value as given, source


def _of_environ(environ: Mapping[str, str]) -> Given:
    for flag in _FLAG_NAMES:
        variable = f"RAYPIPE_{flag.upper()}"
        if environ.get(variable):  # set to nothing is how a shell line switches one off
            yield flag, environ[variable], f"environment {variable}"


def _of_file(file: Mapping[str, Any]) -> Given:
    known = {*_FLAG_NAMES, *_SIZES.values()}
    seen: dict[str, str] = {}
    for key, value in file.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UnknownName.of("memory option", str(key), known, "in the configuration file")
        field = _SIZES.get(name, name)
        if field in seen:
            raise ConfigError(
                f"the configuration file gives {seen[field]} and {key}, which are one option; "
                "keep one of them"
            )
        seen[field] = str(key)
        if value is not None:
            yield name, value, f"file, {key}"


def _of_flags(flags: MemoryFlags) -> Given:
    for flag in _FLAG_NAMES:
        value = getattr(flags, flag)
        if value is not None:
            yield flag, value, f"flag --{flag.replace('_', '-')}"


def _parsed(name: str, given: Any, source: str) -> Any:
    """``given`` as the field's own type, checked."""
    field = _SIZES.get(name, name)
    if name in _SIZES:
        value: Any = _gib(name, given, source)
    elif field.endswith("_gb") or field == "available_memory_buffer":
        value = _float(name, given, source)
    else:
        value = _bool(name, given, source)
    _check(field, value, source)
    return value


def _gib(name: str, given: Any, source: str) -> float:
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise ConfigError(f"{name} {given!r} ({source}) is no size; write it with a unit: 6GiB")
    try:
        n_bytes = parse_bytes(given)
    except ConfigError as error:
        raise ConfigError(f"{name} {given!r} ({source}): {error}") from None
    if 0 < n_bytes < MIB:  # a bare number that was meant as GiB
        raise ConfigError(
            f"{name} {given!r} ({source}) is {n_bytes} bytes, below 1 MiB; write a unit: {given}GiB"
            if str(given).strip().isdigit()
            else f"{name} {given!r} ({source}) is below 1 MiB; give e.g. 6GiB"
        )
    return n_bytes / GIB


def _float(name: str, given: Any, source: str) -> float:
    try:
        if isinstance(given, bool):
            raise ValueError
        return float(given)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} {given!r} ({source}) is no number; write e.g. 0.2") from None


def _bool(name: str, given: Any, source: str) -> bool:
    value = given if isinstance(given, bool) else _WORDS.get(str(given).strip().lower())
    if value is None:
        raise ConfigError(f"{name} {given!r} ({source}) is neither true nor false; write one")
    return value


def _check(field: str, value: Any, source: str) -> None:
    """Raise ConfigError unless ``value`` keeps the rule of ``field``."""
    if field == "available_memory_buffer":
        good, rule = _finite(value) and 0 <= value < 1, "is a share: from 0 to below 1; give 0.2"
    elif field == "memmap_threshold_gb":
        good, rule = _finite(value) and value >= 0, "must be 0 or more, finite; give e.g. 1GiB"
    elif field == "max_memory_per_process_gb":
        good, rule = _finite(value) and value > 0, "must be above 0, finite; give e.g. 6GiB"
    else:
        good, rule = isinstance(value, bool), "must be true or false"
    if not good:
        raise ConfigError(f"{field} {value!r}{f' ({source})' if source else ''} {rule}")


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _shown(field: str, value: Any) -> str:
    if field.endswith("_gb"):
        return format_bytes(value * GIB)
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
