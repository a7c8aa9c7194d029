"""encoding/: predict brain responses from image features, and measure how well.

``config`` what to do, ``data`` features and responses side by side, ``features`` whether stored or
computed, ``readout`` and ``model`` the encoders, ``task`` what the training loop is given, ``score``
correlations and tables, ``run`` and ``assess`` the jobs. ``planted`` makes a small dataset whose
answer is known. Neither torch nor Ray is loaded by importing this package.
"""

from __future__ import annotations

from raypipe.encoding.config import EvaluateConfig, FitConfig, ModelConfig, PredictConfig
from raypipe.encoding.planted import PlantedConfig, make_planted_dataset

__all__ = [
    "EvaluateConfig",
    "FitConfig",
    "ModelConfig",
    "PlantedConfig",
    "PredictConfig",
    "make_planted_dataset",
]
