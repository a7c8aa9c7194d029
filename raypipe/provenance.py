"""What a person needs to repeat a run: versions, command, commit, machine, time."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import raypipe
from raypipe import config as configs

_PACKAGES = (
    "ray", "torch", "torchvision", "timm", "open_clip_torch", "numpy", "pillow", "scikit-learn",
    "scipy", "nibabel", "nilearn", "numba",
)  # fmt: skip


def run_record(cfg: Any) -> dict[str, Any]:
    """The facts of this run as JSON types; ``cfg`` is the resolved configuration."""
    return {
        "raypipe": raypipe.__version__,
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "command": [_program(), *sys.argv[1:]],
        "git_commit": git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config_class": type(cfg).__name__,
        "config": configs.to_dict(cfg),
    }


def _program() -> str:
    """``raypipe``, also when it was started as ``python -m raypipe``; else the script's name."""
    name = Path(sys.argv[0]).name
    return "raypipe" if name == "__main__.py" else name


def versions() -> dict[str, str]:
    """Installed versions of the packages whose numbers depend on them."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of the raypipe checkout this runs from; None when it is an installed package."""
    root = Path(raypipe.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
