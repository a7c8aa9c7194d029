"""The table of ``auto``, Slurm's rule, and who wins: auto < environment < file < flag."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raypipe.errors import ConfigError, UnknownName
from raypipe.memory.config import MemoryConfig, MemoryFlags, resolve
from raypipe.memory.limits import NodeLimits

GIB = 1024**3


def node(limit_gib: float, *, slurm: float | None = None, tasks: int | None = None) -> NodeLimits:
    return NodeLimits(
        physical_bytes=int(limit_gib * GIB),
        cgroup_bytes=None,
        slurm_bytes=None if slurm is None else int(slurm * GIB),
        slurm_tasks=tasks,
        shm_bytes=0,
        shm_free_bytes=0,
    )


def test_defaults() -> None:
    assert asdict(MemoryConfig()) == {
        "use_memmap": True,
        "memmap_threshold_gb": 1.0,
        "available_memory_buffer": 0.2,
        "shared_memory_parallel": True,
        "max_memory_per_process_gb": 8.0,
        "cleanup_temp_files": True,
        "monitor_memory_usage": True,
    }


@pytest.mark.parametrize(
    ("limit_gib", "threshold", "buffer", "each"),
    [
        (8, 0.5, 0.3, 4.0),
        (15.99, 0.5, 0.3, 4.0),
        (16, 1.0, 0.2, 8.0),
        (64, 1.0, 0.2, 8.0),
        (64.01, 2.0, 0.15, 16.0),
        (512, 2.0, 0.15, 16.0),
    ],
)
def test_auto_by_size(limit_gib: float, threshold: float, buffer: float, each: float) -> None:
    found = MemoryConfig.auto(node(limit_gib))
    assert found.memmap_threshold_gb == threshold
    assert found.available_memory_buffer == buffer
    assert found.max_memory_per_process_gb == each


def test_auto_goes_by_the_smallest_limit() -> None:
    limits = NodeLimits(
        physical_bytes=512 * GIB, cgroup_bytes=32 * GIB, slurm_bytes=None, slurm_tasks=None,
        shm_bytes=0, shm_free_bytes=0,
    )  # fmt: skip
    assert MemoryConfig.auto(limits).max_memory_per_process_gb == 8.0


@pytest.mark.parametrize(
    ("slurm", "tasks", "each", "threshold"),
    [
        (64, 4, 12.8, 1.0),
        (64, None, 51.2, 1.0),
        (16, 8, 1.6, 0.4),
        (8, 1, 6.4, 1.0),
        (200, 1, 160.0, 1.0),
    ],
)
def test_auto_under_slurm(slurm: float, tasks: int, each: float, threshold: float) -> None:
    limits = node(512, slurm=slurm, tasks=tasks)
    found = MemoryConfig.auto(limits)
    assert found.max_memory_per_process_gb == pytest.approx(each, rel=1e-12)
    assert found.memmap_threshold_gb == pytest.approx(threshold, rel=1e-12)


@given(
    physical=st.integers(GIB // 4, 4096 * GIB),
    slurm=st.none() | st.integers(GIB // 4, 4096 * GIB),
    tasks=st.none() | st.integers(1, 128),
)
def test_what_auto_gives_can_be_leased(physical: int, slurm: int | None, tasks: int | None) -> None:
    """One process always fits; under Slurm all of the node's tasks do, to the byte."""
    limits = NodeLimits(
        physical_bytes=physical, cgroup_bytes=None, slurm_bytes=slurm, slurm_tasks=tasks,
        shm_bytes=0, shm_free_bytes=0,
    )  # fmt: skip
    found = MemoryConfig.auto(limits)
    processes = (tasks or 1) if slurm is not None else 1
    assert 0 < found.budget_bytes * processes <= found.capacity_bytes(limits) <= limits.limit_bytes


def test_bytes() -> None:
    config = MemoryConfig(max_memory_per_process_gb=1.5, memmap_threshold_gb=0.25)
    assert config.budget_bytes == 3 * GIB // 2
    assert config.threshold_bytes == GIB // 4
    assert config.capacity_bytes(node(10)) == 8 * GIB


# ---- who wins

SIZES = ("max_memory_per_process", "memmap_threshold")
SWITCHES = ("use_memmap", "shared_memory_parallel", "cleanup_temp_files", "monitor_memory_usage")
NAMES = (*SIZES, "available_memory_buffer", *SWITCHES)


def values_of(name: str) -> st.SearchStrategy[Any]:
    """What a person may write for this option, as a flag's Python value."""
    if name in SIZES:
        return st.integers(2, 99_999).map(lambda n: f"{n}MiB")
    return st.floats(0, 0.99) if name == "available_memory_buffer" else st.booleans()


LAYER = st.fixed_dictionaries({}, optional={name: values_of(name) for name in NAMES})


def expected(name: str, value: Any) -> Any:
    """The field's value by plain reading."""
    return int(value.removesuffix("MiB")) / 1024 if name in SIZES else value


@given(in_environ=LAYER, in_file=LAYER, in_flags=LAYER)
def test_the_highest_layer_wins(
    in_environ: dict[str, Any], in_file: dict[str, Any], in_flags: dict[str, Any]
) -> None:
    limits = node(32)
    found = resolve(
        MemoryFlags(**in_flags),
        yaml.safe_load(yaml.safe_dump(in_file)),
        {f"RAYPIPE_{name.upper()}": str(value) for name, value in in_environ.items()},
        limits,
    )
    auto = asdict(MemoryConfig.auto(limits))
    for name in NAMES:
        field = f"{name}_gb" if name in SIZES else name
        layers = [("flag", in_flags), ("file", in_file), ("environment", in_environ)]
        word, value = next(
            ((word, expected(name, layer[name])) for word, layer in layers if name in layer),
            ("default" if name in SWITCHES else "auto", auto[field]),
        )
        assert getattr(found.config, field) == value
        assert found.sources[field].startswith(word)
    assert json.loads(json.dumps(found.record()))["config"] == asdict(found.config)


def test_sources_name_the_very_place() -> None:
    found = resolve(
        MemoryFlags(max_memory_per_process="6GiB"),
        {"memmap-threshold": "2GiB"},
        {"RAYPIPE_USE_MEMMAP": "off", "RAYPIPE_MAX_MEMORY_PER_PROCESS": "1GiB"},
        node(32),
    )
    assert found.config.budget_bytes == 6 * GIB and found.config.use_memmap is False
    assert found.sources["max_memory_per_process_gb"] == "flag --max-memory-per-process"
    assert found.sources["memmap_threshold_gb"] == "file, memmap-threshold"
    assert found.sources["use_memmap"] == "environment RAYPIPE_USE_MEMMAP"
    assert found.sources["available_memory_buffer"] == "auto (physical memory)"
    text = "\n".join(found.lines())
    assert "6.00 GiB" in text and "25.6 GiB" in text and "RAYPIPE_USE_MEMMAP" in text
    record = found.record()
    assert record["budget_bytes"] == 6 * GIB and record["limits"]["limit_bytes"] == 32 * GIB


def test_the_fields_own_names_in_a_file() -> None:
    file = asdict(MemoryConfig(max_memory_per_process_gb=3.5, use_memmap=False))
    assert asdict(resolve(file=file, environ={}, limits=node(32)).config) == file


def test_nothing_given_is_auto() -> None:
    found = resolve(environ={"RAYPIPE_USE_MEMMAP": ""}, file={"use_memmap": None}, limits=node(9))
    assert found.config == MemoryConfig.auto(node(9))


@pytest.mark.parametrize(
    ("flags", "file", "environ", "said"),
    [
        ({"max_memory_per_process": "6"}, {}, {}, ["--max-memory-per-process", "'6'", "6GiB"]),
        ({"max_memory_per_process": "0GiB"}, {}, {}, ["above 0", "flag"]),
        ({"max_memory_per_process": "six"}, {}, {}, ["'six'", "24GiB"]),
        ({"available_memory_buffer": 1.0}, {}, {}, ["1.0", "below 1", "--available-memory-buffer"]),
        ({}, {"max_memory_per_process": 6.0}, {}, ["6.0", "file", "unit"]),
        ({}, {"max_memory_per_process": True}, {}, ["True", "no size"]),
        ({}, {"max_memory_per_process_gb": -1}, {}, ["-1", "above 0", "file"]),
        ({}, {"memmap_threshold_gb": float("inf")}, {}, ["inf", "finite"]),
        ({}, {"use_memmap": "maybe"}, {}, ["'maybe'", "true nor false"]),
        ({}, {"memmap_threshold": "1GiB", "memmap_threshold_gb": 1}, {}, ["one option"]),
        ({}, {}, {"RAYPIPE_AVAILABLE_MEMORY_BUFFER": "x"}, ["'x'", "RAYPIPE_AVAILABLE", "number"]),
        ({}, {}, {"RAYPIPE_CLEANUP_TEMP_FILES": "2"}, ["'2'", "RAYPIPE_CLEANUP_TEMP_FILES"]),
    ],
)
def test_a_bad_value_names_value_rule_and_source(
    flags: dict[str, Any], file: dict[str, Any], environ: dict[str, str], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(MemoryFlags(**flags), file, environ, node(32))
    assert all(text in str(error.value) for text in said), str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_entry_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match="max_memory_per_process"):
        resolve(file={"max_memory": "6GiB"}, environ={}, limits=node(32))


@pytest.mark.parametrize(
    "bad",
    [{"available_memory_buffer": -0.1}, {"max_memory_per_process_gb": 0.0}, {"use_memmap": "yes"},
     {"memmap_threshold_gb": float("nan")}, {"max_memory_per_process_gb": "8"}],
)  # fmt: skip
def test_a_config_checks_itself(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        MemoryConfig(**bad)


def test_the_flags_are_a_command_line() -> None:
    args = ["--max-memory-per-process", "6GiB", "--use-memmap", "False"]
    given_flags = tyro.cli(MemoryFlags, args=args)
    assert given_flags == MemoryFlags(max_memory_per_process="6GiB", use_memmap=False)
    assert all(getattr(MemoryFlags(), field.name) is None for field in fields(MemoryFlags))


def test_importing_memory_costs_nothing_heavy() -> None:
    code = (
        "import sys, raypipe.memory as m; m.resolve(); m.charge_bytes(); m.gpu_memory(); "
        "m.MemoryMonitor(), m.MemoryTracker; "
        "print([n for n in ('torch', 'ray', 'matplotlib', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == "[]" and done.stderr == ""
