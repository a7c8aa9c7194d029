"""General linear models of time series: condition maps and trial-wise betas, a block of voxels at a time.

``designs.py`` makes regressors of events and confounds; ``projection.py`` and ``noise_fit.py`` fit them
under white or AR(1) noise; ``contrasts.py`` asks, ``fit.py`` answers for whole brains; ``betas.py`` gives
one pattern a trial, by least squares all or separate, as samples for ``raypipe.fmri.mvpa``.
"""

from __future__ import annotations

from raypipe.fmri.glm.betas import TrialBetas, TrialRun, trial_betas
from raypipe.fmri.glm.config import GlmConfig
from raypipe.fmri.glm.contrasts import GlmResult, StatMap
from raypipe.fmri.glm.designs import DesignMatrix, condition_design, frame_times, nuisance_design
from raypipe.fmri.glm.fit import GlmRun, fit_glm

__all__ = [
    "DesignMatrix",
    "GlmConfig",
    "GlmResult",
    "GlmRun",
    "StatMap",
    "TrialBetas",
    "TrialRun",
    "condition_design",
    "fit_glm",
    "frame_times",
    "nuisance_design",
    "trial_betas",
]
