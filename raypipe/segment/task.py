"""What the training loop is given: the network, its crops, the loss and the validation sums.

Everything is decided on the driver; a worker only opens the files named here. Batches are
``crop`` (b, channels + 1, h, w) float32, as `raypipe.segment.crops` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from raypipe.segment.crops import CropSource
from raypipe.segment.histogram import best_threshold
from raypipe.segment.labels import IGNORE
from raypipe.segment.loss import LossConfig, segmentation_loss
from raypipe.segment.metrics import metrics_of, pixel_sums
from raypipe.segment.model import ModelSpec, build_model, checkpoint_blocks
from raypipe.stream.reading import Source

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class SegmentTask:
    """``raypipe.train.Task`` for segmentation. The first ``n_train`` samples of ``crops`` train."""

    crops: CropSource
    n_train: int
    spec: ModelSpec
    loss_config: LossConfig
    seed: int

    @property
    def train_rows(self) -> range:
        """Samples of epoch 0; the loop moves on by ``epoch_stride``."""
        return range(self.n_train)

    @property
    def val_rows(self) -> np.ndarray:
        """The grid cells of the validation pictures."""
        return np.arange(self.n_train, self.crops.samples, dtype=np.int64)

    @property
    def epoch_stride(self) -> int:
        """Every epoch has row numbers of its own: another crop, other augmentation."""
        return self.crops.samples

    def build_model(self) -> nn.Module:
        """A new network, of the spec and the seed alone."""
        return build_model(self.spec, self.seed)

    def sources(self) -> dict[str, Source]:
        """The crops."""
        return {"crop": self.crops}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """(b,): each crop's own loss, over the pixels that count."""
        image, labels = parted(batch)
        return segmentation_loss(model(image), labels, self._loss)

    def val_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss weighed by pixels, and the counts behind Dice and its threshold."""
        image, labels = parted(batch)
        logits = model(image).float()
        pixels = (labels != IGNORE).sum((1, 2)).double()
        loss = segmentation_loss(logits, labels, self._loss).double()
        sums = pixel_sums(logits, labels, ignore_label=IGNORE)
        return {"pixels": pixels.sum(), "loss": (loss * pixels).sum(), **sums}

    def val_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """val_loss; over all validation pixels val_dice, val_iou, val_pr_auc; for one class val_dice is
        that at val_threshold, the best one, and val_dice_half that at one half.
        """
        found = metrics_of({name: sums[name] for name in ("counts", "scores", "images")})
        metrics = {"val_loss": float(sums["loss"] / sums["pixels"])}
        metrics |= {f"val_{name}": found[name] for name in ("dice", "iou", "pr_auc")}
        if self.spec.classes == 1:
            chosen = best_threshold(sums["scores"][0])
            metrics |= {"val_dice_half": found["dice"], "val_dice": chosen.dice}
            metrics["val_threshold"] = chosen.probability
        return metrics

    def epoch_cost(self, metrics: Mapping[str, float]) -> float:
        """The best epoch is that of the highest validation Dice."""
        return -metrics["val_dice"]

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """What may be recomputed instead of kept."""
        return checkpoint_blocks(model)

    @property
    def _loss(self) -> LossConfig:
        return replace(self.loss_config, ignore_label=IGNORE)


def parted(batch: Batch) -> tuple[Tensor, Tensor]:
    """(image (b, c, h, w) float32, labels (b, h, w) int64) of a batch."""
    crop = batch["crop"]
    keep = torch.channels_last if _is_channels_last(crop) else torch.contiguous_format
    return crop[:, :-1].contiguous(memory_format=keep), crop[:, -1].long()


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
