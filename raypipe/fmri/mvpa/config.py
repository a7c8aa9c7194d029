"""Options of decoding; checked when made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from raypipe.errors import ConfigError, UnknownName
from raypipe.fmri.mvpa.estimators import EstimatorConfig
from raypipe.fmri.mvpa.scores import CLASS_SCORES, TARGET_SCORES


@dataclass(frozen=True, kw_only=True)
class MvpaConfig:
    """How patterns are decoded and how sure the score is."""

    model: EstimatorConfig = field(default_factory=EstimatorConfig)
    """The model."""
    cv: Literal["leave_one_run_out", "runs", "shuffled"] = "leave_one_run_out"
    """What is held out: each run; n_folds groups of runs; or samples whatever their run, which is
    wrong for time series (neighbours of a volume would be in training and test) and warns."""
    n_folds: int = 5
    """Folds of cv runs and shuffled."""
    scale: Literal["zscore", "centre", "none"] = "zscore"
    """Each voxel by mean and deviation of the fold's training samples."""
    scores: tuple[str, ...] = ()
    """accuracy, balanced_accuracy, roc_auc; or r, r2. All that fit the design when left out."""
    n_permutations: int = 0
    """Permuted labels for the p value; 1000 gives 0.001 at best."""
    exchange: Literal["block", "sample"] = "block"
    """What is permuted within each run: blocks, since volumes of one block were not assigned
    independently; or single samples. The same where each sample is a trial of its own."""
    seed: int = 0
    """Seed of permutations and shuffled folds; permutation i is the same in any division of work."""

    def __post_init__(self) -> None:
        if self.n_folds < 2:
            raise ConfigError(f"n_folds {self.n_folds} is below 2; 5 is usual")
        if self.n_permutations < 0:
            raise ConfigError(f"n_permutations {self.n_permutations} is below 0; give 0 for none")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is below 0; give 0 or more")
        for name in self.scores:
            if name not in (*CLASS_SCORES, *TARGET_SCORES):
                raise UnknownName.of("score", name, (*CLASS_SCORES, *TARGET_SCORES))
