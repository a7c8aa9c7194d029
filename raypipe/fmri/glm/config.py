"""Options of a general linear model, in nilearn's terms; checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from raypipe.errors import ConfigError, UnknownName

Hrf = Literal[
    "glover",
    "glover + derivative",
    "glover + derivative + dispersion",
    "spm",
    "spm + derivative",
    "spm + derivative + dispersion",
    "fir",
]


@dataclass(frozen=True, kw_only=True)
class GlmConfig:
    """How a run is modelled. The defaults are those of nilearn's FirstLevelModel."""

    t_r_s: float
    """Seconds from volume to volume."""
    hrf: Hrf = "glover"
    """The response to a brief event; derivatives allow for its delay and width."""
    fir_delays: tuple[int, ...] = (0,)
    """hrf fir: after how many volumes the response is sampled."""
    drift: Literal["cosine", "polynomial"] | None = "cosine"
    """Slow drift that is modelled; the constant always is."""
    high_pass_hz: float = 0.01
    """drift cosine: frequencies below this count as drift."""
    drift_order: int = 1
    """drift polynomial: its degree."""
    slice_time_ref: float = 0.0
    """When in its TR a volume is taken to be measured, 0 to 1: what slice-time correction chose."""
    min_onset_s: float = -24.0
    """Events earlier than this before the first volume are left out."""
    noise: Literal["ar1", "ols"] = "ar1"
    """Noise with a memory of one volume, per voxel; or white noise (ordinary least squares)."""
    bins: int = 100
    """noise ar1: voxels whose coefficients agree to 1/bins share one."""
    scaling: Literal["percent", "none"] = "percent"
    """Series in percent of the voxel's mean (never below 1, as in nilearn), or as they are."""

    def __post_init__(self) -> None:
        for name, known in (
            ("hrf", get_args(Hrf)),
            ("noise", ("ar1", "ols")),
            ("scaling", ("percent", "none")),
            ("drift", ("cosine", "polynomial", None)),
        ):
            if getattr(self, name) not in known:
                raise UnknownName.of(name, str(getattr(self, name)), [str(one) for one in known])
        if not self.t_r_s > 0 or not self.high_pass_hz > 0:
            raise ConfigError(
                f"t_r_s {self.t_r_s} and high_pass_hz {self.high_pass_hz} must be above 0"
            )
        if not 0 <= self.slice_time_ref <= 1:
            raise ConfigError(f"slice_time_ref {self.slice_time_ref} is not within 0 to 1")
        if self.bins < 1 or self.drift_order < 0:
            raise ConfigError(
                f"bins {self.bins} and drift_order {self.drift_order} must be 1 and 0 or more"
            )
        if self.hrf == "fir" and not self.fir_delays:
            raise ConfigError("hrf fir has no fir_delays; give e.g. 0 1 2 3 4 5")
