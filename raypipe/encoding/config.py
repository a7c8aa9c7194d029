"""Options of the brain encoder: what to fit, on which features, what to evaluate.

Frozen and checked when made. Field names are the command line's flags (groups add no prefix), so
no two groups may share one; training options proper are ``raypipe.train.TrainConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raypipe.backbone.options import FeatureOptions
from raypipe.errors import ConfigError
from raypipe.memory.config import MemoryFlags
from raypipe.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder and its sizes; defaults are those of Adeli et al. 2023 for DINOv2 ViT-B."""

    model: Literal["transformer", "linear"] = "transformer"
    """Encoder: learned ROI queries over patch tokens, or one linear layer on pooled tokens."""
    readout: Literal["rois_all", "hemis"] = "rois_all"
    """Queries: one an ROI and one for the vertices in none, or one a hemisphere."""
    layers: int = 1
    """Cross-attention layers."""
    heads: int = 16
    """Attention heads; must divide d_model."""
    d_model: int = 768
    """Width of queries and attention; tokens of another width are projected to it."""
    ffn: int = 1024
    """Width of the feed-forward layer."""
    dropout: float = 0.1
    """Dropout in attention and feed-forward layers; before the layer in the linear encoder."""
    standardise: bool = True
    """Centre and scale each token channel by the training images' statistics."""
    linear_pool: Literal["mean", "cls", "grid"] = "mean"
    """What the linear encoder reads: the mean patch, the CLS token, or a grid of mean patches."""
    linear_grid: int = 4
    """Cells a side for linear_pool grid."""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "d_model", "ffn", "linear_grid"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} is below 1; give 1 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"dropout {self.dropout} is outside 0..1; 0.1 is usual, 0 turns it off"
            )
        if self.model == "transformer" and (self.d_model % self.heads or self.d_model % 4):
            raise ConfigError(
                f"d_model {self.d_model} must be a multiple of heads {self.heads} and of 4"
            )


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Fit a brain encoder on features, stored or computed from images, and measured responses."""

    data_dir: Path
    """Folder that holds subj01, subj02, … (Algonauts layout), or one subject's own folder."""
    run_dir: Path
    """Folder of the run; with several subjects each gets RUN_DIR/subjXX."""
    features_dir: Path | None = None
    """Root of the feature stores, the output-dir of raypipe extract; not with --on-the-fly."""
    feature: str | None = None
    """The features' folder below features-dir, e.g. dinov2_q_last; not with --on-the-fly."""
    on_the_fly: bool = False
    """Train straight from the images: no store; every epoch runs them through the backbone again."""
    images: FeatureOptions = field(default_factory=FeatureOptions)
    """On the fly: which features, named as for raypipe extract."""
    subj: tuple[str, ...] = ()
    """Subjects, e.g. 01 02; all that are there when left out."""
    val_fraction: float = 0.1
    """Part of the valid training images held out to choose the epoch; saved as split.json."""
    split_seed: int = 0
    """Seed of that choice; the same seed gives the same images on every machine."""
    encoder: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it is trained."""
    workers: int = 1
    """Training processes (data-parallel), one a GPU on CUDA."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    resume: bool = True
    """Go on from the run folder's last checkpoint; --no-resume starts over."""
    dry_run: bool = False
    """Check the inputs, print the model and the disk and memory that the run will take, and stop."""

    def __post_init__(self) -> None:
        named = [n for n in ("features_dir", "feature") if getattr(self, n) is not None]
        if len(named) != (0 if self.on_the_fly else 2):
            raise ConfigError(
                f"given are {', '.join(named) or 'no stored features'}"
                f"{' and on_the_fly' if self.on_the_fly else ''}; give --features-dir and --feature"
                " for stored features, or --on-the-fly and neither"
            )
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction {self.val_fraction} is outside 0..1; 0.1 is usual")
        if self.split_seed < 0:
            raise ConfigError(f"split_seed {self.split_seed} is negative; give 0 or more")
        if self.workers < 1:
            raise ConfigError(f"workers {self.workers} is below 1; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class ApplyConfig:
    """A fitted encoder and where to apply it: what evaluate and predict share."""

    run_dir: Path
    """A folder made by encode fit: of one subject, or of several."""
    split: Literal["test", "val"] = "test"
    """Images: the test split, or the validation part of the training split."""
    checkpoint: Literal["best", "last"] = "best"
    """best has the lowest validation loss; last is where training ended."""
    data_dir: Path | None = None
    """Where the data lie now, if they were moved since the fit."""
    features_dir: Path | None = None
    """Where the feature stores lie now, if they were moved since the fit; or were made after a fit
    on the fly, which otherwise is applied on the fly too."""
    weights: str | None = None
    """Of a fit on the fly: where the backbone's weights lie now, if they were moved since."""
    eval_batch: int = 32
    """Images a forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    memory: MemoryFlags = field(default_factory=MemoryFlags)
    """Budgets; what is not given comes from RAYPIPE_… in the environment, or from the machine."""

    def __post_init__(self) -> None:
        if self.eval_batch < 1:
            raise ConfigError(f"eval_batch {self.eval_batch} is below 1; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ApplyConfig):
    """Score a fitted encoder on images it was not trained on: per vertex, per ROI, and a report."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ApplyConfig):
    """Write predicted responses: lh_pred_SPLIT.npy and rh_pred_SPLIT.npy, float32 (images, vertices).

    For the test split these are the Algonauts 2023 submission's files.
    """

    output_dir: Path | None = None
    """Where to write; by default predictions/ in each subject's run folder."""
