"""What every benchmark shares: the machine in words, versions, and the one JSON line at the end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from raypipe.provenance import git_commit, versions


def machine() -> dict[str, object]:
    """Processor, cores, memory and GPU; no host name and no path."""
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, help="also write the result to this file")
    return made


def emit(name: str, metrics: Mapping[str, object], file: Path | None) -> None:
    """Print the result as the last line, and write it to ``file``."""
    result = {
        "name": name,
        "commit": git_commit(),
        "command": _command(),
        "machine": machine(),
        "versions": versions(),
        "metrics": dict(metrics),
    }
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def say(text: str) -> None:
    """What happens meanwhile goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def median(figures: Sequence[float]) -> float:
    """The median, as a float."""
    return float(statistics.median(figures))


def _command() -> str:
    """As one would give it in the repository's root; no path of this machine."""
    args = list(sys.argv[1:])
    if "--json" in args:
        args[args.index("--json") + 1] = "FILE"
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *args])
