"""What ``raypipe fmri betas`` is asked to do; checked when made.

Inputs, regions and confounds are those of the other commands. Drift, confounds and scrubbed volumes are
part of the model, so nothing is cleaned before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from raypipe.errors import ConfigError
from raypipe.fmri.clean import CleanConfig
from raypipe.fmri.config import FmriConfig
from raypipe.fmri.glm.blocks import BUDGET_BYTES
from raypipe.fmri.glm.config import GlmConfig, Hrf
from raypipe.fmri.glm.items import LEAST_BYTES
from raypipe.fmri.units import slug
from raypipe.units import format_bytes, parse_bytes

DRIFT_HZ, DRIFT_ORDER = 0.01, 1  # nilearn's


@dataclass(frozen=True, kw_only=True)
class BetasConfig(FmriConfig):
    """Model each run: a pattern a trial, as samples to decode, or maps of conditions.

    Trials: 4-D images of one volume a trial, and a table that fmri mvpa takes. Conditions: effects, t and
    z of each trial type, or of the contrasts, over all runs of a subject.
    """

    method: Literal["lss", "lsa", "conditions"] = "lss"
    """A model for each trial (lss, steadier where trials follow within seconds), one with all trials
    (lsa), or one regressor a trial type (conditions)."""
    contrast: tuple[str, ...] = ()
    """Of conditions: 'face - house' or NAME='face - house'; each trial type when left out."""
    keep: tuple[str, ...] = ()
    """Trial types that get a beta a trial, all when left out; the others are conditions."""
    others: Literal["condition", "all"] = "condition"
    """lss: what stands for the other trials, a regressor of each type or one of all."""
    label_column: str = "trial_type"
    """Column of events.tsv."""
    rest: tuple[str, ...] = ("rest",)
    """Types that are not modelled."""
    hrf: Hrf = "glover"
    """The response to a brief event; derivatives allow for its delay and width."""
    drift: Literal["cosine", "polynomial", "none"] = "cosine"
    """Slow drift that is modelled; the constant always is."""
    drift_hz: float = DRIFT_HZ
    """drift cosine: frequencies below this count as drift."""
    drift_order: int = DRIFT_ORDER
    """drift polynomial: its degree."""
    slice_time_ref: float = 0.0
    """When in its TR a volume is taken to be measured, 0 to 1: what slice-time correction chose."""
    noise: Literal["ar1", "ols"] = "ar1"
    """Noise with a memory of one volume, per voxel; or white noise."""
    scaling: Literal["percent", "none"] = "percent"
    """Series in percent of the voxel's mean, or as they are."""
    block_memory: str = f"{BUDGET_BYTES >> 20}MiB"
    """For a block of voxels being fitted; fewer are taken at once where it is small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if replace(self.clean, t_r_s=None) != CleanConfig():
            raise ConfigError(
                "cleaning options are given, but a model removes drift and confounds itself; leave them "
                "out (--drift, --drift-hz and --strategy are the model's)"
            )
        if not self.cache:
            raise ConfigError(
                "a model reads each scan block by block, so it needs the cache; leave --no-cache out, or "
                "give --cache-dir on a disk with room"
            )
        if self.contrast and self.method != "conditions":
            raise ConfigError(
                f"contrast {self.contrast[0]!r} is of conditions, the method is {self.method}; leave it "
                "out, or give --method conditions"
            )
        if self.keep and self.method == "conditions":
            raise ConfigError(
                f"keep {self.keep[0]!r} is of trials; leave it out, or choose lss or lsa"
            )
        if self.hrf == "fir":
            raise ConfigError(
                "hrf fir has no single value a trial or condition; choose glover or spm"
            )
        self._check_model()
        names = [name for name, _ in self.contrasts()]
        if len({slug(name) for name in names}) < len(names):
            raise ConfigError(
                f"a contrast is given twice in {', '.join(names)}, or two would have the same files; leave "
                "one out, or name it NAME='face - house'"
            )
        self.model(1.0)
        self.budget_bytes()

    def _check_model(self) -> None:
        """Options of the model by the names they have here, and those that would say nothing."""
        if not 0 < self.drift_hz < math.inf:
            raise ConfigError(
                f"drift_hz {self.drift_hz} is not above 0 and finite; 0.01 is usual, or --drift none"
            )
        if self.drift_order < 0:
            raise ConfigError(
                f"drift_order {self.drift_order} is below 0; 1 to 3 is usual, or --drift none"
            )
        if not 0 <= self.slice_time_ref <= 1:
            raise ConfigError(
                f"slice_time_ref {self.slice_time_ref} is not within 0 to 1; 0.5 is the middle of the TR"
            )
        for name, value, usual, drift in (
            ("drift_hz", self.drift_hz, DRIFT_HZ, "cosine"),
            ("drift_order", self.drift_order, DRIFT_ORDER, "polynomial"),
        ):
            if value != usual and self.drift != drift:
                raise ConfigError(
                    f"{name} {value} says nothing to drift {self.drift}; leave it out, or choose "
                    f"--drift {drift}"
                )
        if self.others != "condition" and self.method != "lss":
            raise ConfigError(
                f"others {self.others} is of lss, the method is {self.method}; leave it out"
            )

    def contrasts(self) -> list[tuple[str, str]]:
        """(name, expression) of each."""
        parts = [text.partition("=") for text in self.contrast]
        for text, (name, mark, words) in zip(self.contrast, parts, strict=True):
            if not name.strip() or (mark and not words.strip()):
                raise ConfigError(
                    f"contrast {text!r} is not NAME='face - house'; give a name and an expression"
                )
        return [(name.strip(), (words or name).strip()) for name, _, words in parts]

    def model(self, t_r_s: float) -> GlmConfig:
        """The model of runs of this TR."""
        return GlmConfig(
            t_r_s=t_r_s,
            hrf=self.hrf,
            drift=None if self.drift == "none" else self.drift,
            high_pass_hz=self.drift_hz,
            drift_order=self.drift_order,
            slice_time_ref=self.slice_time_ref,
            noise=self.noise,
            scaling=self.scaling,
        )

    def budget_bytes(self) -> int:
        """Of a block."""
        found = parse_bytes(self.block_memory)
        if found < LEAST_BYTES:
            raise ConfigError(
                f"block_memory {self.block_memory!r} is below {format_bytes(LEAST_BYTES)}; 256MiB is "
                "usual"
            )
        return found
