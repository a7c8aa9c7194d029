"""Which files a source reads: so that none of them is the output, and that a change of them shows.

What lies in memory has none; of a source of another kind nothing is known.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.errors import ConfigError


def files_of(source: Any) -> tuple[Path, ...]:
    """Files, and folders of Zarr arrays, that ``source`` (``raypipe.tile.source``) reads."""
    given = getattr(source, "array", getattr(source, "stack", None))
    return tuple(Path(path).absolute() for path in _behind(given))


def _behind(given: Any) -> Iterator[str | os.PathLike[str]]:
    given = getattr(given, "source", given)  # a lazy stack's frames
    while isinstance(given, np.ndarray):
        if isinstance(given, np.memmap) and given.filename is not None:
            yield given.filename
            return
        given = given.base
    if hasattr(given, "parts"):
        yield from (part.path for part in given.parts)
    elif isinstance(getattr(given, "path", None), Path):
        yield given.path
    elif hasattr(getattr(given, "store", None), "root"):
        yield Path(given.store.root) / given.path
    elif hasattr(getattr(given, "file", None), "filename"):
        yield given.file.filename


def check_place(source: Any, out: Path) -> None:
    """Raises ConfigError where ``out`` cannot become a result: what is read, or a folder of another kind."""
    check_apart(source, out)
    if out.is_dir() and out.suffix != ".zarr":
        raise ConfigError(
            f"output {out} is a folder, a {out.suffix} is a file; give the name of a file in it"
        )


def check_apart(source: Any, out: Path) -> None:
    """Raises ConfigError when writing ``out`` would destroy what is read."""
    for path in files_of(source):
        around = [path, *path.parents] if out.is_dir() else [path]
        if out.exists() and any(p.exists() and p.samefile(out) for p in around):
            raise ConfigError(f"output {out} is the input itself; choose another name")
