"""The units of a run: one subject, one ROI, one target. What each is called, and what is asked of it.

Text from the command line becomes ``RoiSpec`` and ``Target`` here. Which voxels an ROI has is
``rois.py``; whether a unit is done is ``ledger.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raypipe.errors import ConfigError, InputError

BRAIN = "brain"
_NUMBER = "number:"


@dataclass(frozen=True, kw_only=True)
class RoiSpec:
    """An ROI by name. source : text that may hold {subject}, {session}, {task}, {run}.

    kind    : a mask image; a label of an atlas image; a sphere; or the run's own brain mask
    label   : of the atlas, a name or a number; names : table of the atlas' label names
    centre_mm, radius_mm : of a sphere
    """

    name: str
    kind: Literal["mask", "atlas", "sphere", "brain"]
    source: str = ""
    label: str = ""
    names: str = ""
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    radius_mm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is decoded. classes : of the label column, all of them when empty; column : of numbers."""

    name: str
    classes: tuple[str, ...] = ()
    column: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """``all``; ``face,house``; or ``number:COLUMN`` for a regression target."""
        if text.startswith(_NUMBER):
            column = text.removeprefix(_NUMBER)
            if not column:
                raise ConfigError(f"target {text!r} names no column; write e.g. number:rating")
            return cls(name=column, column=column)
        classes = tuple(part.strip() for part in text.split(",") if part.strip())
        if classes == ("all",):
            return cls(name="all")
        if len(set(classes)) < 2:
            raise ConfigError(
                f"target {text!r} is not all, two classes or more (face,house) or number:COLUMN; "
                "correct it"
            )
        return cls(name="-".join(classes), classes=classes)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One unit. target : its name, "" for time series; key : hash of inputs and options."""

    subject: str
    roi: str
    target: str = ""
    key: str = ""

    @property
    def unit_id(self) -> str:
        """``sub-01_roi-V1_target-face-house``: the name of its files."""
        parts = [f"sub-{slug(self.subject)}", f"roi-{slug(self.roi)}"]
        return "_".join([*parts, *([f"target-{slug(self.target)}"] if self.target else [])])


def check_distinct(units: Sequence[Unit]) -> None:
    """Raises InputError when two units would have the same files."""
    seen: dict[str, Unit] = {}
    for unit in units:
        other = seen.setdefault(unit.unit_id, unit)
        if other is not unit:
            raise InputError(
                f"ROI {other.roi!r} target {other.target!r} and ROI {unit.roi!r} target "
                f"{unit.target!r} would both be {unit.unit_id}; name one of them otherwise"
            )


def parse_roi(text: str) -> RoiSpec:
    """``brain``, ``NAME=mask.nii.gz``, or a path whose file name is the ROI's."""
    if text == BRAIN:
        return RoiSpec(name=BRAIN, kind="brain")
    name, mark, source = text.partition("=")
    if not mark:
        name, source = re.sub(r"\.nii(\.gz)?$", "", Path(text).name), text
    if not name or not source:
        raise ConfigError(f"roi {text!r} is not NAME=FILE; write e.g. V1=masks/v1.nii.gz")
    return RoiSpec(name=name, kind="mask", source=source)


def parse_sphere(text: str, radius_mm: float) -> RoiSpec:
    """``NAME=x,y,z`` in millimetres, as the scan's affine counts them."""
    name, _, where = text.partition("=")
    try:
        x, y, z = (float(part) for part in where.split(","))
    except ValueError:
        raise ConfigError(f"sphere {text!r} is not NAME=x,y,z in mm; e.g. FFA=40,-52,-18") from None
    if not name:
        raise ConfigError(f"sphere {text!r} has no name; write e.g. FFA=40,-52,-18")
    if not all(map(math.isfinite, (x, y, z))):
        raise ConfigError(f"sphere {text!r} has no finite centre; give x,y,z in mm")
    return RoiSpec(name=name, kind="sphere", centre_mm=(x, y, z), radius_mm=radius_mm)


def slug(text: str) -> str:
    """``text`` as a part of a file name: letters, digits, dots and hyphens only."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "x"
