"""What training lowers, one number an image, so that batches and accumulation change nothing.

One class (sigmoid): BCE + soft Dice; K classes (softmax): cross-entropy + soft Dice; or focal loss
(Lin et al. 2017) in place of the first. All is computed in float32, whatever the logits are.

    dice = 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)      over the image's valid pixels
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from raypipe import config as configs
from raypipe.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss's terms and weights. Raises ConfigError when a value breaks its rule."""

    loss: Literal["entropy", "focal"] = "entropy"
    """The term of single pixels: (binary) cross-entropy, or focal loss, which weighs easy pixels
    less. The Dice term stands beside either."""
    pixel_weight: float = 0.5
    """Weight of the pixels' term."""
    dice_weight: float = 0.5
    """Weight of the Dice term; 0 leaves it out. Halves: as in nnU-Net, scaled to sum to one."""
    positive_weight: float = 1.0
    """One class: how much more a foreground pixel counts in the pixels' term."""
    class_weights: tuple[float, ...] = ()
    """K classes: each one's weight in the pixels' term; none: all alike."""
    focal_gamma: float = 2.0
    """Focal loss: the power of (1 - p); 2 is the paper's best."""
    dice_background: bool = False
    """K classes: whether the background has a share in the Dice term (nnU-Net leaves it out)."""
    dice_smooth: float = 1.0
    """Pixels added to both sides of the Dice quotient, so that an empty mask has a gradient."""
    ignore_label: int | None = None
    """Pixels of this label count nowhere."""

    def __post_init__(self) -> None:
        if self.loss not in ("entropy", "focal"):
            raise ConfigError(f"loss={self.loss!r}: one of entropy, focal")
        for name in ("pixel_weight", "dice_weight", "focal_gamma"):
            self._require(name, getattr(self, name) >= 0, "give 0 or more")
        for name in ("positive_weight", "dice_smooth"):
            self._require(name, getattr(self, name) > 0, "give a number above 0")
        self._require(
            "pixel_weight", self.pixel_weight + self.dice_weight > 0, "both weights are 0"
        )
        positive = all(math.isfinite(w) and w > 0 for w in self.class_weights)
        self._require("class_weights", positive, "give numbers above 0")

    def check_outputs(self, outputs: int) -> None:
        """Raise ConfigError when an option does not apply to a model of ``outputs`` maps."""
        n = len(self.class_weights)
        if outputs == 1:
            rule = "is for several classes, and --target foreground has one map; leave it out"
            self._require("class_weights", not n, rule)
            self._require("dice_background", not self.dice_background, rule)
        else:
            rule = (
                f"is for --target foreground, and there are {outputs} classes; give class_weights"
            )
            self._require("positive_weight", self.positive_weight == 1, rule)
            rule = f"{n} weights for {outputs} classes: give one for each, background first"
            self._require("class_weights", n in (0, outputs), rule)

    def _require(self, name: str, holds: bool, rule: str) -> None:
        value = getattr(self, name)
        if not holds or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(f"loss {name}={value!r}: {rule}")


def applied(options: Mapping[str, Any], outputs: int) -> dict[str, Any]:
    """`LossConfig` as plain values, with what changes nothing for ``outputs`` maps at its default."""
    idle = ["class_weights", "dice_background"] if outputs == 1 else ["positive_weight"]
    idle += [] if options.get("loss") == "focal" else ["focal_gamma"]
    plain = configs.to_dict(LossConfig())
    return {**options, **{name: plain[name] for name in idle}}


def segmentation_loss(logits: Tensor, target: Tensor, config: LossConfig | None = None) -> Tensor:
    """(b,) float32, each image's own loss.

    logits : (b, K, h, w). target : (b, h, w) or (b, 1, h, w), any integer type: for K = 1 the
    foreground is what is above 0, for more the class, 0 <= class < K. An image without valid pixels
    has loss 0. Raises InputError for shapes that do not fit.
    """
    cfg = config or LossConfig()
    labels, valid = labels_of(logits, target, cfg.ignore_label)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        term = _binary_terms if logits.shape[1] == 1 else _class_terms
        pixel, dice = term(logits, labels, valid, cfg)
        seen = valid.sum((1, 2))
        mean = pixel.sum((1, 2)) / seen.clamp(min=1)
        return cfg.pixel_weight * mean + cfg.dice_weight * dice * (seen > 0)


def labels_of(logits: Tensor, target: Tensor, ignore_label: int | None) -> tuple[Tensor, Tensor]:
    """(labels, valid) of ``target``: (b, h, w) int64 with 0 where not valid, and (b, h, w) bool.

    For one class labels are 0 and 1. Raises InputError when the shapes do not fit.
    """
    b, n_classes, *sides = logits.shape
    plane = target.squeeze(1) if target.ndim == 4 else target
    if plane.shape != (b, *sides):
        raise InputError(
            f"masks of shape {tuple(target.shape)} for logits {tuple(logits.shape)}:"
            " give (b, h, w) or (b, 1, h, w) of the same images"
        )
    # uint16 has no comparison on CUDA; every other type has
    plane = plane.long()
    valid = (
        torch.ones_like(plane, dtype=torch.bool) if ignore_label is None else plane != ignore_label
    )
    labels = (plane > 0).long() if n_classes == 1 else plane
    return labels * valid, valid


def _binary_terms(
    logits: Tensor, labels: Tensor, valid: Tensor, cfg: LossConfig
) -> tuple[Tensor, Tensor]:
    """Of one class: each pixel's term (b, h, w), 0 where not valid, and the images' Dice (b,)."""
    score, truth = logits[:, 0], labels.float()
    weight = None if cfg.positive_weight == 1 else score.new_tensor(cfg.positive_weight)
    pixel = F.binary_cross_entropy_with_logits(score, truth, pos_weight=weight, reduction="none")
    p = torch.sigmoid(score)
    if cfg.loss == "focal":
        # 1 - p of the true side, by the sigmoid of the other sign: no cancellation.
        pixel = pixel * _power(torch.sigmoid(score * (1 - 2 * truth)), cfg.focal_gamma)
    return pixel * valid, _dice((p * valid)[:, None], truth[:, None], cfg.dice_smooth)


def _class_terms(
    logits: Tensor, labels: Tensor, valid: Tensor, cfg: LossConfig
) -> tuple[Tensor, Tensor]:
    """Of K classes: as `_binary_terms`."""
    n_classes = logits.shape[1]
    cfg.check_outputs(n_classes)
    log_p = F.log_softmax(logits, dim=1)
    true_log_p = log_p.gather(1, labels[:, None])[:, 0]
    pixel = -true_log_p
    if cfg.loss == "focal":
        pixel = pixel * _power(-torch.expm1(true_log_p), cfg.focal_gamma)
    if cfg.class_weights:
        pixel = pixel * logits.new_tensor(cfg.class_weights)[labels]
    first = 0 if cfg.dice_background else 1
    truth = F.one_hot(labels, n_classes).movedim(-1, 1)[:, first:] * valid[:, None]
    return pixel * valid, _dice(log_p.exp()[:, first:] * valid[:, None], truth, cfg.dice_smooth)


def _power(doubt: Tensor, gamma: float) -> Tensor:
    """``doubt`` ** ``gamma``, with a finite gradient at 0 for a gamma below 1 too."""
    return doubt.clamp(min=torch.finfo(doubt.dtype).tiny) ** gamma


def _dice(p: Tensor, truth: Tensor, smooth: float) -> Tensor:
    """(b,) soft Dice loss, mean over the classes; p, truth : (b, classes, h, w), 0 where not valid."""
    overlap = (p * truth).sum((2, 3))
    total = p.sum((2, 3)) + truth.sum((2, 3))
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean(1)
