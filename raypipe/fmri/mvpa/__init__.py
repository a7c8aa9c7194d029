"""Multivariate pattern analysis: what can be decoded from an ROI, and how sure that is.

``design.py`` says which volumes are samples of what; ``estimators.py`` which model; ``folds.py`` how
runs are held out; ``engines.py`` fits a fold, once or for many permuted labels; ``scores.py`` rates
predictions; ``decode.py`` puts it together; ``weights.py`` maps a model back to voxels.
"""

from __future__ import annotations

from raypipe.fmri.mvpa.config import MvpaConfig
from raypipe.fmri.mvpa.decode import decode
from raypipe.fmri.mvpa.design import Design
from raypipe.fmri.mvpa.estimators import EstimatorConfig
from raypipe.fmri.mvpa.folds import Fold, make_folds
from raypipe.fmri.mvpa.results import MvpaResult
from raypipe.fmri.mvpa.sampling import design_of_events, design_of_volumes
from raypipe.fmri.mvpa.weights import Weights, weight_maps

__all__ = [
    "Design",
    "EstimatorConfig",
    "Fold",
    "MvpaConfig",
    "MvpaResult",
    "Weights",
    "decode",
    "design_of_events",
    "design_of_volumes",
    "make_folds",
    "weight_maps",
]
