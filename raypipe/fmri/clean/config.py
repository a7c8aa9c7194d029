"""Options of cleaning a time series, in nilearn's words; checked when made.

What each does to a run, and in which order, is ``plan.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from raypipe.errors import ConfigError

BUTTERWORTH_ORDER = 5  # nilearn's


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """What is done to each voxel's time series, run by run; by default nothing."""

    detrend: bool = False
    """Subtract the mean and the linear trend."""
    filter: Literal["butterworth", "cosine"] | None = None
    """Remove frequencies: by a zero-phase filter of order 5, or as slow cosines among confounds."""
    low_pass_hz: float | None = None
    """Frequencies above this go; butterworth only."""
    high_pass_hz: float | None = None
    """Frequencies below this go; 0.008 to 0.01 is usual."""
    t_r_s: float | None = None
    """Seconds from volume to volume; a filter needs it."""
    standardize: Literal["zscore_sample", "psc"] | None = None
    """Last: mean 0 and sample standard deviation 1, or percent of the voxel's own mean."""
    standardize_confounds: bool = True
    """Give confounds mean 0 and standard deviation 1 before they are removed."""
    ensure_finite: bool = False
    """Read NaN and infinity as 0; otherwise their voxels come out as NaN."""
    extrapolate: bool = False
    """Butterworth: guess scrubbed volumes at a run's ends, instead of leaving them out."""
    scrub_interpolation: Literal["nilearn", "all"] = "nilearn"
    """Butterworth: which scrubbed volumes are interpolated before the filter. "all" is what is meant.
    nilearn (0.14.1, and before) leaves a scrubbed volume as it is when its mirror image in the run,
    volume T-1-i, is scrubbed too; "nilearn" does the same and warns wherever that happens."""

    def __post_init__(self) -> None:
        _read_bool(self, "standardize", "zscore_sample")
        _read_bool(self, "filter", None)
        self._check_choices()
        self._check_filter()

    def _check_choices(self) -> None:
        for name, known in (
            ("standardize", (None, "zscore_sample", "psc")),
            ("filter", (None, "butterworth", "cosine")),
            ("scrub_interpolation", ("nilearn", "all")),
        ):
            if getattr(self, name) not in known:
                choices = ", ".join("false" if one is None else str(one) for one in known)
                raise ConfigError(f"{name} {getattr(self, name)!r} is not known; give {choices}")

    def _check_filter(self) -> None:
        low, high = self.low_pass_hz, self.high_pass_hz
        for name in ("low_pass_hz", "high_pass_hz", "t_r_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} {value} is not above 0 and finite; give such a number")
        if self.filter is None and (low is not None or high is not None):
            raise ConfigError(
                "a cutoff frequency is given but no filter; give filter butterworth or cosine"
            )
        if self.filter == "cosine" and (high is None or low is not None):
            raise ConfigError(
                "filter cosine takes high_pass_hz and no low_pass_hz; butterworth takes both"
            )
        if self.filter == "butterworth" and low is None and high is None:
            raise ConfigError("filter butterworth has no cutoff; give low_pass_hz or high_pass_hz")
        if low is not None and high is not None and high >= low:
            raise ConfigError(
                f"high_pass_hz {high} is not below low_pass_hz {low}: nothing would be left; "
                "exchange them"
            )

    def sampling_hz(self) -> float:
        """Volumes a second; raises ConfigError without t_r_s or for a cutoff it cannot resolve."""
        if self.t_r_s is None:
            raise ConfigError(f"filter {self.filter} needs t_r_s, seconds a volume; give it")
        nyquist = 0.5 / self.t_r_s
        for name in ("low_pass_hz", "high_pass_hz"):
            value = getattr(self, name)
            if value is not None and value >= nyquist:
                raise ConfigError(
                    f"{name} {value} is not below {nyquist:g} Hz, half the sampling rate of a TR of "
                    f"{self.t_r_s:g} s; give a lower one or leave it out"
                )
        return 1.0 / self.t_r_s


def _read_bool(config: CleanConfig, name: str, if_true: str | None) -> None:
    """nilearn's False is None here; its True, where it has one, is ``if_true``."""
    value = getattr(config, name)
    if value is False or (value is True and if_true is not None):
        object.__setattr__(config, name, if_true if value else None)
