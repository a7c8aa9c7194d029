"""Maps of a linear model over its region: ``maps/<unit>_weights.nii.gz`` and ``maps/<unit>_pattern.nii.gz``.

NaN outside the region. A model of several classes has a volume for each of its decisions (a pair of
classes, or a class against the rest), named in ``volumes`` of the .json beside it. The weights are not
drawn on the page: a large one may be there to cancel noise.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from raypipe.fmri.ledger import write_whole
from raypipe.fmri.maps import map_image
from raypipe.fmri.masks import Grid
from raypipe.fmri.mvpa import Weights
from raypipe.fmri.series import Subject
from raypipe.fmri.units import Unit
from raypipe.store.durable import remove

_KINDS = {"pattern": ("activation pattern", True), "weights": ("weight", False)}


def save_weights(run_dir: Path, unit: Unit, subject: Subject, found: Weights | None) -> list[Path]:
    """Write both maps of ``unit``, on the grid of its first run; for None, older ones go."""
    folder = run_dir / "maps"
    if found is None:
        for kind in _KINDS:  # and no other map that begins alike
            remove(folder.glob(f"{unit.unit_id}_{kind}.*"))
        return []
    grid, voxels = Grid.of(subject.scans[0]), subject.regions[0].voxels[unit.roi]
    files: list[Path] = []
    for kind, (what, drawn) in _KINDS.items():
        values = found.patterns if kind == "pattern" else found.weights
        shown = values[0] if len(values) == 1 else values.T  # (n_voxels,) or (n_voxels, m)
        of = f" of {found.names[0]}" if len(values) == 1 else ""
        told: dict[str, Any] = {
            "title": f"sub-{unit.subject} {unit.roi}: {unit.target}, {kind}{of}",
            "score": what,
            "space": subject.runs[0].space or "",
            "volumes": list(found.names),
            "drawn": drawn,
        }
        path = folder / f"{unit.unit_id}_{kind}.nii.gz"
        packed = _packed(map_image(shown, voxels, grid, outside=float("nan")))
        files.append(_write(path, packed))
        files.append(
            _write(
                path.with_name(f"{unit.unit_id}_{kind}.json"), json.dumps(told, indent=1).encode()
            )
        )
    return files


def _packed(image: Any) -> bytes:
    return gzip.compress(image.to_bytes(), 6, mtime=0)


def _write(path: Path, data: bytes) -> Path:
    return write_whole(path, lambda file: file.write(data))
