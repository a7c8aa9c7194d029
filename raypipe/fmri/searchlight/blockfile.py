"""Blocks of a run that are done: ``blocks/<unit>/<number>.npz``, whole or not there.

A file holds the key of what it was computed from, so a changed input, option or cut makes it count as
absent. It is written under a temporary name and renamed when all of it is on the disk.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from raypipe.fmri.ledger import write_whole
from raypipe.fmri.masks import Voxels
from raypipe.fmri.searchlight.score import BlockScores
from raypipe.fmri.units import Unit

FOLDER = "blocks"
_BY_SCORE = ("scores", "reached", "null_max")


@dataclass(frozen=True, eq=False, kw_only=True)
class SavedBlock:
    """A block's scores and what they cost.

    not_finite, constant : how many of its centres' own voxels; n_samples : after scrubbing
    chance : score -> what guessing gives
    """

    scores: BlockScores
    seconds: float
    seconds_reading: float
    peak_anon_bytes: int
    not_finite: int
    constant: int
    n_samples: int
    n_folds: int
    chance: dict[str, float]
    ways: tuple[str, ...]
    warnings: tuple[str, ...]


def block_path(run_dir: Path, unit: Unit, number: int) -> Path:
    """Where block ``number`` of the map ``unit`` lies."""
    return run_dir / FOLDER / unit.unit_id / f"{number:05d}.npz"


def block_key(map_key: str, mask_hash: str, centres: Voxels) -> str:
    """Of a block: of its map's inputs and options, the mask's voxels and its centres."""
    digest = xxhash.xxh3_128(f"{map_key} {mask_hash}".encode())
    digest.update(np.ascontiguousarray(centres, np.int64).tobytes())
    return str(digest.hexdigest())


def save_block(path: Path, key: str, block: SavedBlock) -> Path:
    """Write it; the block is done from here on."""
    found = block.scores
    arrays: dict[str, Any] = {
        "key": key,
        "number": found.number,
        "centres": found.centres,
        "n_voxels": found.n_voxels,
        "warning": found.warning or "",
        "names": list(found.scores),
        "ways": list(block.ways),
        "warnings": list(block.warnings),
        "chance": [block.chance[name] for name in found.scores],
    }
    for name in ("seconds", "seconds_reading", "peak_anon_bytes", "not_finite", "constant"):
        arrays[name] = getattr(block, name)
    arrays |= {"n_samples": block.n_samples, "n_folds": block.n_folds}
    for field in _BY_SCORE:
        for name, values in getattr(found, field).items():
            arrays[f"{field}.{name}"] = values
    return write_whole(path, lambda file: np.savez(file, **arrays))


def key_of(path: Path) -> str | None:
    """The key of the block at ``path``; None where there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return str(found["key"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (EOFError, ValueError, KeyError, zipfile.BadZipFile):  # cut off: computed again
        return None


def load_block(path: Path) -> SavedBlock:
    """What ``save_block`` wrote."""
    with np.load(path, allow_pickle=False) as found:
        names = [str(name) for name in found["names"]]
        by_score: dict[str, dict[str, NDArray[Any]]] = {
            field: {name: found[f"{field}.{name}"] for name in names} for field in _BY_SCORE
        }
        scores = BlockScores(
            number=int(found["number"]),
            centres=found["centres"],
            n_voxels=found["n_voxels"],
            scores=by_score["scores"],
            reached=by_score["reached"],
            null_max=by_score["null_max"],
            warning=str(found["warning"]) or None,
        )
        return SavedBlock(
            scores=scores,
            seconds=float(found["seconds"]),
            seconds_reading=float(found["seconds_reading"]),
            peak_anon_bytes=int(found["peak_anon_bytes"]),
            not_finite=int(found["not_finite"]),
            constant=int(found["constant"]),
            n_samples=int(found["n_samples"]),
            n_folds=int(found["n_folds"]),
            chance=dict(zip(names, found["chance"].tolist(), strict=True)),
            ways=tuple(str(way) for way in found["ways"]),
            warnings=tuple(str(text) for text in found["warnings"]),
        )
