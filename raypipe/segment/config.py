"""Options of the segmentation room: which images, what is learned, which model, what is evaluated.

Frozen and checked when made. Field names are the command line's flags (groups add no prefix), so no
two groups may share one; the loss's own are ``loss.LossConfig``, augmentation's ``augment``'s, training's
``raypipe.train.TrainConfig``'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raypipe.errors import ConfigError
from raypipe.memory.config import MemoryFlags
from raypipe.segment.augment import AugmentConfig
from raypipe.segment.channels import check_axes
from raypipe.segment.instances import InstanceConfig
from raypipe.segment.labels import Target, n_outputs
from raypipe.segment.loss import LossConfig
from raypipe.segment.model import ModelSpec, spec_of
from raypipe.segment.normalise import Kind
from raypipe.segment.split import SplitBy
from raypipe.train import TrainConfig

_SIZES = ("width", "depth", "up", "dropout")  # of NetworkConfig: our own U-Net's
_MOST_CLASSES = 2**15 - 1  # `labels.to_plane` gives int16


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Which images, how they are divided, and how pixels and masks are read."""

    data: Path
    """Folder with {train,val,test}/{images,masks}, or a table with columns image, mask and, where
    wanted, split, frames, rows, cols (ranges such as 0:256)."""
    axes: str | None = None
    """A letter a dimension of the image files (TIFF), of F (frames) C Y X, e.g. CYX where pages are
    channels; left out, files that say it (OME, ImageJ) are followed, and other pages are pictures."""
    target: Target = "foreground"
    """What masks say: object or not; object, its boundary or neither; or a class a value."""
    classes: int = 2
    """--target classes: how many, background included."""
    split_by: SplitBy = "source"
    """Divide by file, or by page: neighbouring pages of a stack may then stand on two sides."""
    val_fraction: float = 0.2
    """Part of the files (or pages) that choose the epoch, where nothing else says which."""
    split_seed: int = 0
    """Seed of that choice."""
    normalise: Kind = "percentile"
    """Pixel values between two percentiles, or the extremes, of the training images become 0 to 1."""
    low_percentile: float = 1.0
    """What becomes 0; 1 and 99.8 are StarDist's."""
    high_percentile: float = 99.8
    """What becomes 1."""
    crop: int = 256
    """Pixels a side of what is trained on at once."""
    coverage: float = 1.0
    """Training crops an epoch, over the number that covers the images once."""
    readers: int | None = None
    """Threads that make crops (on Ray: actors); as many as suit when left out."""

    def __post_init__(self) -> None:
        if self.axes is not None:
            object.__setattr__(self, "axes", check_axes(self.axes))
        if self.crop < 8:
            raise ConfigError(f"crop {self.crop} is below 8 pixels; 128 to 512 are usual")
        if self.target == "classes" and self.classes < 2:
            raise ConfigError(f"classes {self.classes} with target classes; give 2 or more")
        if self.classes > _MOST_CLASSES:
            raise ConfigError(f"classes {self.classes}; give {_MOST_CLASSES} at most")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction {self.val_fraction} is outside 0..1; 0.2 is usual")
        if not 0 <= self.low_percentile < self.high_percentile <= 100:
            raise ConfigError(
                f"percentiles {self.low_percentile} to {self.high_percentile}; give 0 <= low < high <= 100"
            )
        if not 0 < self.coverage <= 1e6:
            raise ConfigError(f"coverage {self.coverage}; give a number above 0, 1 is usual")
        if self.split_seed < 0 or (self.readers is not None and self.readers < 1):
            raise ConfigError(
                f"split_seed {self.split_seed}, readers {self.readers}; give 0 or more, and 1 or more"
            )

    @property
    def outputs(self) -> int:
        """Maps that the model gives."""
        return n_outputs(self.target, self.classes)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network; sizes are those of our own U-Net."""

    model: str = "unet"
    """unet, or smp:NAME:ENCODER of segmentation-models-pytorch (an extra)."""
    width: int = 64
    """Channels of the first level; each level below has twice as many."""
    depth: int = 5
    """Levels."""
    up: Literal["transposed", "bilinear"] = "transposed"
    """Up-sampling: learned, or bilinear."""
    dropout: float = 0.0
    """In the deepest level."""
    encoder_weights: str | None = None
    """smp: published weights, or a file; random when left out."""

    def __post_init__(self) -> None:
        for name in _SIZES if self.model.startswith("smp:") else ():
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ConfigError(
                    f"{name} {value} with model {self.model}: sizes are of our own U-Net; leave it out,"
                    " or choose --model unet"
                )

    def spec(self, in_channels: int, classes: int) -> ModelSpec:
        """The model's spec. Raises UnknownName, ConfigError."""
        return spec_of(
            self.model,
            in_channels=in_channels,
            classes=classes,
            encoder_weights=self.encoder_weights,
            **({} if self.model != "unet" else self._sizes()),
        )

    def _sizes(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in _SIZES}


def default_train() -> TrainConfig:
    """A cosine over 100 epochs of AdamW at 1e-3, gradients clipped at norm 1: a batch-norm U-Net
    bears that rate, and the nuclei of docs/segment.md were fitted with it.
    """
    return TrainConfig(
        epochs=100, batch_size=8, lr=1e-3, schedule="cosine", weight_decay=1e-4, clip_norm=1.0
    )


@dataclass(frozen=True, kw_only=True)
class SegmentFitConfig:
    """Fit a segmentation network on images and masks."""

    run_dir: Path
    """Folder of the run."""
    inputs: InputConfig
    """The data."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The model."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What training lowers."""
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    """What training crops go through."""
    train: TrainConfig = field(default_factory=default_train)
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
        if self.workers < 1:
            raise ConfigError(f"workers {self.workers} is below 1; give 1 or more")
        self.loss.check_outputs(self.inputs.outputs)


@dataclass(frozen=True, kw_only=True)
class SegmentEvaluateConfig:
    """Score a fitted network on whole pictures: pixels and objects, and a report."""

    run_dir: Path
    """A folder made by segment fit."""
    split: Literal["auto", "val", "test"] = "auto"
    """Pictures: test where there are some, else val."""
    data: Path | None = None
    """Where the data lie now, if they were moved since the fit."""
    checkpoint: Literal["best", "last"] = "best"
    """best has the highest validation Dice; last is where training ended."""
    objects: InstanceConfig = field(default_factory=InstanceConfig)
    """How objects are cut out of the foreground."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    memory: MemoryFlags = field(default_factory=MemoryFlags)
    """Budgets; what is not given comes from RAYPIPE_… in the environment, or from the machine."""
