"""Maps on the glass brain and on slices, drawn by nilearn.

A map is ``maps/NAME.nii.gz``; ``maps/NAME.json`` beside it may say what it is::

    title      in words                       score, chance   of a map of scores
    space      the scans' space, e.g. MNI152NLin2009cAsym; "" or absent: the scanner's own
    volumes    what each volume of a map of several is;  drawn : false for a map that no page shows

Scores are drawn less chance, so that zero, which is not drawn, is no information; weights as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from matplotlib.figure import Figure
from nibabel.affines import apply_affine
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from raypipe.dress import DARK, WIDTH_IN
from raypipe.errors import StoreCorrupt
from raypipe.report.saved import read_json

_N_SLICES = 7


@dataclass(frozen=True, eq=False, kw_only=True)
class BrainMap:
    """values : a 3-D image, 0 where there is nothing; what : the quantity and unit of its colours."""

    name: str
    title: str
    what: str
    standard: bool
    image: Any

    @property
    def empty(self) -> bool:
        """Whether nothing would be drawn."""
        return not np.any(np.asarray(self.image.dataobj))

    def extreme(self) -> str:
        """The largest value and where it lies, in words."""
        values = np.asarray(self.image.dataobj)
        at = np.unravel_index(np.argmax(np.abs(values)), values.shape)
        x, y, z = apply_affine(self.image.affine, at)
        return f"largest {values[at]:.3g} at x {x:.0f}, y {y:.0f}, z {z:.0f} mm"


def map_files(run_dir: Path) -> list[Path]:
    """Maps of the run, those of the group first."""
    files = [*(run_dir / "maps").glob("*.nii.gz"), *(run_dir / "maps").glob("*.nii")]
    return sorted(files, key=lambda path: (not path.name.startswith("group"), path.name))


def read_map(path: Path) -> BrainMap:
    """Raises StoreCorrupt for a file that is no 3-D image."""
    values, affine = _read(path)
    if values.ndim != 3:
        raise StoreCorrupt(f"map {path} has shape {values.shape}; a map is one volume: remove it")
    return _brain_map(path, values, affine, described(path), "")


def read_maps(path: Path) -> list[BrainMap]:
    """The maps of a file whose volumes are named; one map of any other. Raises StoreCorrupt."""
    told = described(path)
    volumes = [str(name) for name in told.get("volumes") or ()]
    values, affine = _read(path)
    if values.ndim != 4 or values.shape[3] != len(volumes):
        return [read_map(path)]
    return [
        _brain_map(path, values[..., place], affine, told, name)
        for place, name in enumerate(volumes)
    ]


def described(path: Path) -> dict[str, Any]:
    """What ``NAME.json`` says of a map; nothing where there is none."""
    side = path.with_name(f"{_name(path)}.json")
    return read_json(side, "remove it, or run again") if side.is_file() else {}


def _name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _read(path: Path) -> tuple[NDArray[np.float64], Any]:
    try:
        image = nibabel.load(path)
        values = np.asarray(image.dataobj, np.float64)
    except (ImageFileError, OSError, EOFError) as error:
        raise StoreCorrupt(f"map {path} cannot be read ({error}); remove it, run again") from error
    single = values.ndim == 4 and values.shape[3] == 1
    return (values[..., 0] if single else values), image.affine


def _brain_map(
    path: Path, values: NDArray[np.float64], affine: Any, told: Mapping[str, Any], volume: str
) -> BrainMap:
    chance = told.get("chance")
    inside = np.isfinite(values) & (values != 0)
    shown = np.where(inside, values - (chance or 0.0), 0.0)
    what = str(told.get("score") or "value")
    title = str(told.get("title") or _name(path).replace("_", " "))
    return BrainMap(
        name=_name(path),
        title=f"{title}: {volume}" if volume else title,
        what=what if chance is None else f"{what} less chance ({chance:.3g})",
        standard="MNI" in str(told.get("space") or ""),
        image=nibabel.Nifti1Image(shown.astype(np.float32), affine),
    )


def draw_map(one: BrainMap) -> Figure:
    """Four projections on the glass brain over a line of slices, on one scale around zero."""
    from nilearn import plotting

    values = np.abs(np.asarray(one.image.dataobj))
    top = float(np.quantile(values[values > 0], 0.995))
    fig = Figure(figsize=(WIDTH_IN, 4.4))
    common = {
        "figure": fig,
        "vmin": -top,
        "vmax": top,
        "cmap": "RdBu_r",
        "threshold": 1e-9,
        "annotate": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nilearn's on dtypes and empty slices: nothing is computed
        glass = plotting.plot_glass_brain(
            one.image, display_mode="lyrz", axes=(0.0, 0.47, 0.9, 0.47), plot_abs=False,
            colorbar=False, **common,
        )  # fmt: skip
        slices = plotting.plot_stat_map(
            one.image, display_mode="z", cut_coords=cuts(one.image), axes=(0.0, 0.0, 0.9, 0.45),
            colorbar=False, black_bg=False, draw_cross=False,
            **({} if one.standard else {"bg_img": None}), **common,
        )  # fmt: skip
    for display in (glass, slices):
        display.annotate(size=9)
    _colours(fig, top, one.what)
    fig.text(0.01, 0.97, one.title, fontsize=11, fontweight="bold", color=DARK, va="top")
    return fig


def cuts(image: Any) -> Sequence[float]:
    """(7,) heights z in mm, spread over where the map has values."""
    values = np.asarray(image.dataobj)
    at = np.argwhere(values != 0)
    z = apply_affine(image.affine, at)[:, 2]
    low, high = np.quantile(z, (0.03, 0.97))
    return [round(float(cut)) for cut in np.linspace(low, high, _N_SLICES)]


def _colours(fig: Figure, top: float, what: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = fig.add_axes((0.915, 0.12, 0.014, 0.72))
    bar = fig.colorbar(ScalarMappable(Normalize(-top, top), "RdBu_r"), cax=axes)
    bar.set_label(what, fontsize=9)
    bar.ax.tick_params(labelsize=8.5)
    bar.outline.set_visible(False)
