"""What ``raypipe fmri roi`` and ``raypipe fmri mvpa`` are asked to do; checked when made.

Options of cleaning, confounds and decoding belong to those parts and are nested here; on the command
line all are flat (``--detrend``, ``--strategy motion``, ``--n-permutations 1000``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from raypipe.errors import ConfigError
from raypipe.fmri.cache import default_cache
from raypipe.fmri.clean import CleanConfig
from raypipe.fmri.mvpa import MvpaConfig
from raypipe.fmri.mvpa.estimators import EstimatorConfig, check_fits
from raypipe.fmri.mvpa.scores import CLASS_SCORES, TARGET_SCORES
from raypipe.fmri.units import RoiSpec, Target, parse_roi, parse_sphere
from raypipe.read.bids import BidsQuery
from raypipe.read.confounds import ConfoundsConfig
from raypipe.units import parse_bytes

J = TypeVar("J", bound="FmriConfig")


def _per_run() -> CleanConfig:
    """What decoding needs: no drift, and voxels and runs on one scale."""
    return CleanConfig(detrend=True, standardize="zscore_sample")


@dataclass(frozen=True, kw_only=True)
class FmriConfig:
    """Inputs, regions and cleaning: what both commands share."""

    plans_memory: ClassVar[bool] = True  # a dry run says what fits, so it is told the budgets

    run_dir: Path
    """Where results go; the same command on the same folder goes on where it stopped."""
    bids_dir: Path | None = None
    """fMRIPrep output: sub-01/[ses-1/]func/…_desc-preproc_bold.nii.gz."""
    raw_dir: Path | None = None
    """The BIDS data set with events.tsv, if they are not in bids-dir."""
    table: Path | None = None
    """Instead: CSV or TSV, columns subject, bold and if at hand session, task, run, mask, confounds,
    events."""
    query: BidsQuery = field(default_factory=BidsQuery)
    """Which runs."""
    roi: tuple[str, ...] = ()
    """Regions: NAME=mask.nii.gz (the path may hold {subject}), or brain for the run's own mask."""
    atlas: str | None = None
    """Atlas image of numbered regions; the path may hold {subject}."""
    atlas_labels: tuple[str, ...] = ()
    """Its regions by number or name; all when left out."""
    atlas_names: Path | None = None
    """Table with columns index, name of the atlas."""
    sphere: tuple[str, ...] = ()
    """Spheres: NAME=x,y,z in mm."""
    radius_mm: float = 8.0
    """Radius of spheres; 6 to 10 is usual."""
    resample: bool = False
    """Take the nearest voxels of masks on another grid, which otherwise are refused."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """What is removed from each voxel's series."""
    confounds: ConfoundsConfig = field(default_factory=ConfoundsConfig)
    """Which confounds are removed."""
    cache: bool = True
    """Keep unpacked scans voxel by voxel; --no-cache reads every scan in one pass, storing nothing."""
    cache_dir: Path | None = None
    """Where; by default $RAYPIPE_CACHE_DIR, else ~/.cache/raypipe/voxels."""
    cache_quota: str | None = None
    """Most that all scans kept there may take, e.g. 200GiB; what was used longest ago goes."""
    workers: int | None = None
    """Processes, one core each; by default as many as cores, units and memory allow."""
    dry_run: bool = False
    """Check the inputs, print units, memory and disk, and stop."""

    def __post_init__(self) -> None:
        if (self.bids_dir is None) == (self.table is None):
            given = "neither" if self.table is None else "both"
            raise ConfigError(f"given are {given} of bids_dir and table; give one of them")
        if self.atlas is None and (self.atlas_labels or self.atlas_names):
            raise ConfigError("atlas_labels or atlas_names are given but no atlas; give --atlas")
        if self.bids_dir is None:
            self._check_table_alone()
        if not 0 < self.radius_mm < math.inf:
            raise ConfigError(
                f"radius_mm {self.radius_mm} is not above 0 and finite; 6 to 10 is usual"
            )
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers {self.workers} is below 1; give 1 or more")
        names = [spec.name for spec in self.named_rois()]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"ROI {twice!r} is given twice; name one of them otherwise")
        self.quota_bytes()

    def _check_table_alone(self) -> None:
        """What chooses files of a tree says nothing to a table."""
        if self.raw_dir is not None:
            raise ConfigError(
                f"raw_dir {self.raw_dir} is given without bids_dir; a table names its events itself"
            )
        if self.query.desc != BidsQuery().desc:
            raise ConfigError(
                f"desc {self.query.desc!r} is given without bids_dir; a table names its scans itself"
            )

    def named_rois(self) -> tuple[RoiSpec, ...]:
        """The ROIs that the options name; atlas regions are among them when their labels are given."""
        names = str(self.atlas_names or "")
        return (
            *(parse_roi(text) for text in self.roi),
            *(
                RoiSpec(name=label, kind="atlas", source=self.atlas, label=label, names=names)
                for label in self.atlas_labels
                if self.atlas is not None
            ),
            *(parse_sphere(text, self.radius_mm) for text in self.sphere),
        )

    def cache_folder(self) -> Path | None:
        """Where unpacked scans are kept; None: nowhere."""
        if not self.cache:
            return None
        return (self.cache_dir or default_cache()).absolute()

    def quota_bytes(self) -> int | None:
        """The cache's quota."""
        return None if self.cache_quota is None else parse_bytes(self.cache_quota)


@dataclass(frozen=True, kw_only=True)
class RoiConfig(FmriConfig):
    """Time series of regions, cleaned: one .npy a subject, run and region, and a table of them."""

    reduce: Literal["voxels", "mean"] = "voxels"
    """Every voxel's series, or their mean, taken before cleaning."""


@dataclass(frozen=True, kw_only=True)
class MvpaJobConfig(FmriConfig):
    """Decode labels or numbers from regions, subject by subject, and test the group."""

    clean: CleanConfig = field(default_factory=_per_run)
    """What is removed from each voxel's series, run by run."""
    target: tuple[str, ...] = ("all",)
    """What to decode: all classes, some (face,house), or number:COLUMN; several are a sweep."""
    labels: str | None = None
    """Table of one label a volume instead of events.tsv; the path may hold {subject} and {run}."""
    label_column: str | None = None
    """Column of the labels, or of events.tsv (trial_type)."""
    rest: tuple[str, ...] = ("rest",)
    """Labels that are no class."""
    delay_s: float | None = None
    """Seconds from an event to its response, 4 to 6 is usual; 0 where labels are delayed already.
    It has no default: say it."""
    each: Literal["volume", "trial"] = "volume"
    """A sample is one volume, or the mean of a trial's volumes."""
    mvpa: MvpaConfig = field(default_factory=MvpaConfig)
    """How it is decoded."""
    regressor: str = "ridge"
    """The model of number:COLUMN targets: ridge, svr or package.Class (without params)."""
    weight_maps: bool = False
    """Write maps of each linear model fitted to all samples: its weights, and the pattern they stand
    for (Haufe 2014), which is the one to interpret."""

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = self.targets()
        if not targets:
            raise ConfigError("no target is given; give e.g. --target face,house")
        if len({target.name for target in targets}) < len(targets):
            raise ConfigError(f"a target is given twice in {', '.join(self.target)}; leave one out")
        if self.delay_s is None:
            raise ConfigError(
                "delay_s is not given: the response follows its event by 4 to 6 s; give --delay-s, "
                "0 where the labels are delayed already"
            )
        if not 0 <= self.delay_s < math.inf:
            raise ConfigError(
                f"delay_s {self.delay_s} is below 0 or not finite; the response follows the event by 4 "
                "to 6 s"
            )
        self._check_decoding(targets)

    def _check_decoding(self, targets: tuple[Target, ...]) -> None:
        """Models and scores fit what is decoded: said now, not by every unit."""
        fitting: list[str] = []
        if any(target.column is None for target in targets):
            check_fits(self.mvpa.model, classes=True)
            fitting += CLASS_SCORES
        if any(target.column is not None for target in targets):
            check_fits(self._regressor(), classes=False)
            fitting += TARGET_SCORES
        for name in self.mvpa.scores:
            if name not in fitting:
                raise ConfigError(
                    f"score {name} fits none of the targets {', '.join(self.target)}; choose of "
                    f"{', '.join(fitting)}"
                )

    def targets(self) -> tuple[Target, ...]:
        """The targets by name."""
        return tuple(Target.parse(text) for text in self.target)

    def decoding_of(self, target: Target) -> MvpaConfig:
        """How ``target`` is decoded: numbers by the regressor, and scored as numbers."""
        fitting = CLASS_SCORES if target.column is None else TARGET_SCORES
        scores = tuple(name for name in self.mvpa.scores if name in fitting)
        model = self.mvpa.model if target.column is None else self._regressor()
        return replace(self.mvpa, model=model, scores=scores)

    def _regressor(self) -> EstimatorConfig:
        return replace(self.mvpa.model, estimator=self.regressor, params=())


def absolute(cfg: J) -> J:
    """``cfg`` with absolute paths: workers have a working directory of their own."""
    paths = ("run_dir", "bids_dir", "raw_dir", "table", "atlas_names", "cache_dir")
    found = {name: getattr(cfg, name) for name in paths}
    changed = {name: path.absolute() for name, path in found.items() if path is not None}
    rois = tuple(_absolute_roi(text) for text in cfg.roi)
    atlas = None if cfg.atlas is None else str(Path(cfg.atlas).absolute())
    made = replace(cfg, roi=rois, atlas=atlas, **changed)
    if isinstance(made, MvpaJobConfig) and made.labels is not None:
        return replace(made, labels=str(Path(made.labels).absolute()))
    return made


def _absolute_roi(text: str) -> str:
    spec = parse_roi(text)
    return text if spec.kind == "brain" else f"{spec.name}={Path(spec.source).absolute()}"
