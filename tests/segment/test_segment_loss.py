"""The losses against loops over single pixels, in float64 with the textbook formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from raypipe.errors import ConfigError, InputError
from raypipe.segment.loss import LossConfig, segmentation_loss

IGNORED = 7


def pixel_loss(z: np.ndarray, label: int, cfg: LossConfig) -> float:
    """Of one pixel; z : (K,) logits."""
    if len(z) == 1:
        p = 1 / (1 + math.exp(-z[0]))
        p_true = p if label else 1 - p
        weight = cfg.positive_weight if label else 1.0
    else:
        p_true = math.exp(z[label]) / sum(math.exp(v) for v in z)
        weight = cfg.class_weights[label] if cfg.class_weights else 1.0
    focal = (1 - p_true) ** cfg.focal_gamma if cfg.loss == "focal" else 1.0
    return -weight * focal * math.log(p_true)


def by_loop(logits: np.ndarray, target: np.ndarray, cfg: LossConfig) -> list[float]:
    """(b,) of logits (b, K, h, w), target (b, h, w)."""
    b, n_classes, height, width = logits.shape
    losses = []
    for image in range(b):
        entropy, n = 0.0, 0
        overlap, predicted, there = (np.zeros(n_classes) for _ in range(3))
        for y in range(height):
            for x in range(width):
                label = int(target[image, y, x])
                if label == cfg.ignore_label:
                    continue
                label = int(label > 0) if n_classes == 1 else label
                z = logits[image, :, y, x].astype(float)
                entropy, n = entropy + pixel_loss(z, label, cfg), n + 1
                for k in range(n_classes):
                    if n_classes == 1:
                        p, t = 1 / (1 + math.exp(-z[0])), label
                    else:
                        p, t = math.exp(z[k]) / sum(math.exp(v) for v in z), int(label == k)
                    overlap[k] += p * t
                    predicted[k] += p
                    there[k] += t
        if n == 0:
            losses.append(0.0)
            continue
        s = cfg.dice_smooth
        dice = 1 - (2 * overlap + s) / (predicted + there + s)
        used = dice if n_classes == 1 or cfg.dice_background else dice[1:]
        losses.append(cfg.pixel_weight * entropy / n + cfg.dice_weight * used.mean())
    return losses


def images(n_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (3, n_classes, 4, 5)).astype(np.float32)
    target = rng.integers(0, max(n_classes, 2), (3, 4, 5)).astype(np.uint8)
    target[0, :2, :3] = IGNORED
    target[2] = IGNORED
    return torch.from_numpy(logits), torch.from_numpy(target)


CASES: list[dict[str, Any]] = [
    {},
    {"pixel_weight": 0.3, "dice_weight": 2.0, "dice_smooth": 1e-3},
    {"loss": "focal"},
    {"loss": "focal", "focal_gamma": 0.5, "dice_weight": 0.0},
]


@pytest.mark.parametrize("options", [*CASES, {"positive_weight": 4.0}])
def test_one_class_equals_the_loop(options: dict[str, Any]) -> None:
    cfg = LossConfig(ignore_label=IGNORED, **options)
    logits, target = images(1)
    found = segmentation_loss(logits, target, cfg)
    assert found.tolist() == pytest.approx(by_loop(logits.numpy(), target.numpy(), cfg), rel=1e-5)
    assert found[2] == 0


@pytest.mark.parametrize(
    "options", [*CASES, {"class_weights": (0.5, 1.0, 3.0)}, {"dice_background": True}]
)
def test_several_classes_equal_the_loop(options: dict[str, Any]) -> None:
    cfg = LossConfig(ignore_label=IGNORED, **options)
    logits, target = images(3)
    found = segmentation_loss(logits, target[:, None], cfg)
    assert found.tolist() == pytest.approx(by_loop(logits.numpy(), target.numpy(), cfg), rel=1e-5)


@pytest.mark.parametrize("n_classes", [1, 3])
@pytest.mark.parametrize("loss", ["entropy", "focal"])
def test_gradients_equal_finite_differences(n_classes: int, loss: Any) -> None:
    cfg = LossConfig(ignore_label=IGNORED, loss=loss)
    logits, target = images(n_classes)
    leaf = logits.clone().requires_grad_()
    segmentation_loss(leaf, target, cfg)[0].backward()
    assert leaf.grad is not None
    step = 1e-4
    for place in [(0, 0, 3, 4), (0, n_classes - 1, 2, 1), (0, 0, 0, 0)]:  # the last is ignored
        ends = []
        for sign in (1, -1):
            moved = logits.double().numpy().copy()
            moved[place] += sign * step
            ends.append(by_loop(moved, target.numpy(), cfg)[0])
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(leaf.grad[place]) == pytest.approx(slope, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("loss", ["entropy", "focal"])
@pytest.mark.parametrize("n_classes", [1, 2])
def test_certain_pixels_have_finite_losses_and_gradients(n_classes: int, loss: Any) -> None:
    logits = torch.full((1, n_classes, 2, 2), 200.0)
    logits[:, 0] = -200.0
    target = torch.tensor([[[0, 1], [0, 1]]])
    leaf = logits.requires_grad_()
    found = segmentation_loss(leaf, target, LossConfig(loss=loss, focal_gamma=0.5))
    found.sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(found).all() and torch.isfinite(leaf.grad).all()


def test_an_images_loss_does_not_depend_on_its_batch() -> None:
    logits, target = images(2)
    whole = segmentation_loss(logits, target, LossConfig(ignore_label=IGNORED))
    for i in range(3):
        alone = segmentation_loss(
            logits[i : i + 1], target[i : i + 1], LossConfig(ignore_label=IGNORED)
        )
        assert torch.equal(alone[0], whole[i])


def test_half_precision_is_lifted_to_float32() -> None:
    logits, target = images(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = segmentation_loss(logits.bfloat16(), target)
    assert found.dtype == torch.float32
    assert torch.equal(found, segmentation_loss(logits.bfloat16().float(), target))


def test_a_mask_of_255_is_foreground_and_every_integer_type_is_taken() -> None:
    logits, _ = images(1)
    ones = torch.randint(0, 2, (3, 4, 5), generator=torch.Generator().manual_seed(1))
    expected = segmentation_loss(logits, ones)
    for mask in (ones.to(torch.uint8) * 255, ones.to(torch.uint16), ones.bool(), ones.int()):
        assert torch.equal(segmentation_loss(logits, mask), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "hinge"},
        {"pixel_weight": -1.0},
        {"pixel_weight": 0.0, "dice_weight": 0.0},
        {"dice_smooth": 0.0},
        {"class_weights": (1.0, 0.0)},
        {"positive_weight": math.nan},
    ],
)
def test_options_that_break_their_rule_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        LossConfig(**options)


def test_shapes_and_weights_that_do_not_fit_are_refused() -> None:
    logits, target = images(3)
    with pytest.raises(InputError, match="masks of shape"):
        segmentation_loss(logits, target[:, :3])
    with pytest.raises(ConfigError, match="3 classes"):
        segmentation_loss(logits, target % 3, LossConfig(class_weights=(1.0, 2.0)))
