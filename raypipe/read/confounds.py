"""Confounds of a run -> (T, k) and the volumes to keep: by nilearn's load_confounds, or by column.

What cleaning does with them is ``raypipe.fmri.clean``.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import ConfigError, InputError, MissingInput, RaypipeWarning, UnknownName
from raypipe.read.runfiles import RunFiles

if TYPE_CHECKING:
    import pandas as pd

STRATEGIES = ("motion", "high_pass", "wm_csf", "global_signal", "compcor", "ica_aroma", "scrub")


@dataclass(frozen=True, kw_only=True)
class ConfoundsConfig:
    """Which confounds; in the words and with the defaults of nilearn's load_confounds."""

    strategy: tuple[str, ...] = ()
    """Kinds of noise: motion, high_pass, wm_csf, global_signal, compcor, ica_aroma, scrub."""
    columns: tuple[str, ...] = ()
    """Instead: columns of the confounds table by name; for tables that are not fMRIPrep's."""
    motion: Literal["basic", "power2", "derivatives", "full"] = "full"
    """basic (6), power2 (12), derivatives (12) or full (24 columns)."""
    wm_csf: Literal["basic", "power2", "derivatives", "full"] = "basic"
    """basic (2), power2, derivatives (4) or full (8 columns)."""
    global_signal: Literal["basic", "power2", "derivatives", "full"] = "basic"
    """basic (1), power2, derivatives (2) or full (4 columns)."""
    compcor: Literal[
        "anat_combined", "anat_separated", "temporal",
        "temporal_anat_combined", "temporal_anat_separated",
    ] = "anat_combined"  # fmt: skip
    """Which CompCor components; high_pass must be among the strategy."""
    n_compcor: int | None = None
    """How many of them; all when left out."""
    ica_aroma: Literal["full", "basic"] = "full"
    """full needs the smoothAROMAnonaggr scan, basic takes its noise components."""
    scrub: int = 5
    """Drop stretches between scrubbed volumes that are shorter than this."""
    fd_threshold_mm: float = 0.5
    """Framewise displacement above which scrub drops a volume."""
    std_dvars_threshold: float = 1.5
    """Standardised DVARS above which scrub drops a volume."""

    def __post_init__(self) -> None:
        if self.strategy and self.columns:
            raise ConfigError("strategy and columns exclude each other; give one of them")
        for name in self.strategy:
            if name not in STRATEGIES:
                raise UnknownName.of("confounds strategy", name, STRATEGIES)
        if "compcor" in self.strategy and "high_pass" not in self.strategy:
            raise ConfigError(
                "strategy compcor needs high_pass beside it: fMRIPrep's components are of filtered "
                "series; give --strategy compcor high_pass"
            )
        self._check_choices()
        self._check_numbers()

    def _check_choices(self) -> None:
        for name, kind in get_type_hints(ConfoundsConfig).items():
            known = get_args(kind)
            if get_origin(kind) is Literal and getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} {getattr(self, name)!r} is not known; give {', '.join(known)}"
                )

    def _check_numbers(self) -> None:
        if self.n_compcor is not None and self.n_compcor < 1:
            raise ConfigError(
                f"n_compcor {self.n_compcor} is below 1; leave it out for all components"
            )
        if self.scrub < 0:
            raise ConfigError(f"scrub {self.scrub} is below 0 volumes; 5 is usual")
        for name in ("fd_threshold_mm", "std_dvars_threshold"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} {getattr(self, name)} is not above 0 and finite; 0.5 mm and 1.5 are usual"
                )


@dataclass(frozen=True, eq=False, kw_only=True)
class Confounds:
    """A run's confounds. values : (T, k) float64; kept : volumes left by scrubbing, None for all."""

    names: tuple[str, ...]
    values: NDArray[np.float64]
    kept: NDArray[np.int64] | None


def read_confounds(run: RunFiles, config: ConfoundsConfig) -> Confounds | None:
    """The confounds of ``run``; None when none are asked for.

    A first row without value takes the second row's, as in load_confounds, and a RaypipeWarning says
    so. Raises MissingInput without a table, InputError where it has not what is asked for.
    """
    path = confounds_file(run, config)
    if path is None:
        return None
    return _by_column(path, config.columns) if config.columns else _by_strategy(run, path, config)


def confounds_file(run: RunFiles, config: ConfoundsConfig) -> Path | None:
    """The table that ``read_confounds`` will read, None for none; raises MissingInput without one."""
    if not config.strategy and not config.columns:
        return None
    if run.confounds is None:
        raise MissingInput(
            f"{run.name} has no confounds table beside {run.bold}; run without confounds or copy it"
        )
    return run.confounds


def confounds_files(run: RunFiles, config: ConfoundsConfig) -> list[Path]:
    """All files that ``read_confounds`` will read: the table, and of CompCor which components are whose."""
    path = confounds_file(run, config)
    if path is None:
        return []
    beside = path.with_suffix(".json")
    return [path, beside] if "compcor" in config.strategy and beside.is_file() else [path]


def _by_column(path: Path, columns: tuple[str, ...]) -> Confounds:
    table = _table(path)
    for name in columns:
        if name not in table:
            raise UnknownName.of("confound", name, table.columns, f"{path} has not that column")
    chosen = table[list(columns)]
    values = chosen.to_numpy(np.float64, copy=True)
    first = np.isnan(values[0])
    _say_filled([name for name, empty in zip(columns, first, strict=True) if empty], path)
    if len(values) > 1:
        values[0, first] = values[1, first]
    return Confounds(names=columns, values=values, kept=None)


def _by_strategy(run: RunFiles, path: Path, config: ConfoundsConfig) -> Confounds:
    from nilearn.interfaces.fmriprep import load_confounds

    try:
        _check_own(run, path, config)
        frame, kept = load_confounds(
            str(run.bold),
            strategy=config.strategy,
            motion=config.motion,
            scrub=config.scrub,
            fd_threshold=config.fd_threshold_mm,
            std_dvars_threshold=config.std_dvars_threshold,
            wm_csf=config.wm_csf,
            global_signal=config.global_signal,
            compcor=config.compcor,
            n_compcor="all" if config.n_compcor is None else config.n_compcor,
            ica_aroma=config.ica_aroma,
            demean=False,  # nilearn's advice for signal.clean, which centres them
        )
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"confounds of {run.name} cannot be read: {reason}") from error
    names = tuple(str(name) for name in frame.columns)
    table = _table(path)
    _say_filled([n for n in names if n in table and table[n].isna().iloc[0]], path)
    return Confounds(
        names=names,
        values=frame.to_numpy(np.float64),
        kept=None if kept is None else np.asarray(kept, np.int64),
    )


def _check_own(run: RunFiles, path: Path, config: ConfoundsConfig) -> None:
    """load_confounds looks beside the scan: refuse a run whose table, named elsewhere, is another."""
    from nilearn.interfaces.fmriprep.load_confounds_utils import get_confounds_file

    aroma = "ica_aroma" in config.strategy and config.ica_aroma == "full"
    own = Path(get_confounds_file(str(run.bold), flag_full_aroma=aroma, flag_tedana=False))
    if own.resolve() != path.resolve():
        raise InputError(
            f"strategy reads {own}, but {path} is named for {run.name}; name that file, or give --columns"
        )


def _table(path: Path) -> pd.DataFrame:
    import pandas as pd  # slow to import: a scan without confounds does not wait for it

    try:
        table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", na_values="n/a")
    except (OSError, ValueError) as error:
        raise InputError(f"confounds {path} are not a readable table: {error}") from error
    if table.empty:
        raise InputError(f"confounds {path} have no rows; copy the table again")
    return table


def _say_filled(names: list[str], path: Path) -> None:
    if names:
        told = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        warnings.warn(
            f"{len(names)} confounds of {path} have no value in the first row ({told}); it is taken "
            "from the second, as nilearn's load_confounds does",
            RaypipeWarning,
            stacklevel=4,
        )
