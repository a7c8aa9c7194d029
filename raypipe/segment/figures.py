"""Figures of a segmentation run: learning curves, example pictures with outlines, scores a picture.

Each function takes arrays and returns a matplotlib ``Figure`` of its own, sized for a page 1000 pixels
wide; what is drawn when is decided in ``page``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raypipe.dress import COLOURS, DARK, GREY, WIDTH_IN, dress
from raypipe.report.plots import Curves
from raypipe.segment.labels import outermost

TRUE_COLOUR, FOUND_COLOUR = COLOURS[4], COLOURS[5]
_MOST_SHOWN = 512  # pixels a side: a page shows no more of a picture at this width


def training_curves(curves: Curves) -> Figure:
    """Loss of training and validation, and beside it validation Dice and IoU."""
    fig = Figure(figsize=(WIDTH_IN, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    left.plot(curves.step, curves.step_loss, color=COLOURS[0], lw=0.9, alpha=0.6, label="training")
    left.plot(
        curves.epoch_end,
        curves.val["val_loss"],
        "o-",
        ms=3,
        lw=2,
        color=COLOURS[1],
        label="validation",
    )
    dress(left, "Loss", "optimiser step", "loss, mean over crops")
    for name, colour in (("dice", COLOURS[2]), ("iou", COLOURS[3])):
        values = curves.val.get(f"val_{name}")
        if values is not None:
            label = {"dice": "Dice", "iou": "IoU at one half"}[name]
            right.plot(curves.epoch_end, values, "o-", ms=3, lw=2, color=colour, label=label)
    dress(right, "Validation pixels", "optimiser step", "score")
    right.set_ylim(top=1)
    for ax in (left, right):
        _mark(ax, curves)
        ax.legend(fontsize=10, facecolor="white", edgecolor="none")
    return fig


def _mark(ax: Axes, curves: Curves) -> None:
    if curves.best_epoch is not None and curves.best_epoch < len(curves.epoch_end):
        ax.axvline(
            curves.epoch_end[curves.best_epoch], color=GREY, ls=(0, (4, 3)), lw=1.2, zorder=0
        )


def example_pictures(examples: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Each picture twice: outlines of the true objects, and of those found.

    examples : "image_N" (h, w), "true_N" and "found_N" (h, w) whole numbers, 0 background.
    """
    numbers = sorted(int(key.partition("_")[2]) for key in examples if key.startswith("image_"))
    fig = Figure(figsize=(WIDTH_IN, 4.9 * len(numbers)), layout="constrained")
    axes = fig.subplots(len(numbers), 2, squeeze=False)
    for row, number in zip(axes, numbers, strict=True):
        image = _shown(examples[f"image_{number}"]).astype(np.float64)
        low, high = np.percentile(image, (1, 99.8))
        for ax, kind, colour in zip(
            row, ("true", "found"), (TRUE_COLOUR, FOUND_COLOUR), strict=True
        ):
            ax.imshow(
                image, cmap="gray", vmin=low, vmax=max(high, low + 1e-9), interpolation="nearest"
            )
            edge = outermost(_shown(examples[f"{kind}_{number}"]))
            ax.imshow(_coloured(edge, colour), interpolation="nearest")
            ax.set_title(f"{names[number]}: {kind}", fontsize=10, color=DARK, loc="left")
            ax.set_axis_off()
    return fig


def _shown(pixels: np.ndarray) -> np.ndarray:
    return pixels[:_MOST_SHOWN, :_MOST_SHOWN]


def _coloured(edge: np.ndarray, colour: str) -> np.ndarray:
    """(h, w, 4): ``colour`` where ``edge`` is, else clear."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    layer = np.zeros((*edge.shape, 4))
    layer[edge] = (*rgb, 1.0)
    return layer


def precision_over_iou(ap: Mapping[float, float | None]) -> Figure:
    """Average precision of objects at each IoU that a match must reach."""
    fig = Figure(figsize=(WIDTH_IN * 0.6, 3.2), layout="constrained")
    ax = fig.subplots()
    ax.plot(
        list(ap), [np.nan if v is None else v for v in ap.values()], "o-", lw=2, color=COLOURS[0]
    )
    dress(ax, "Objects", "IoU that a match must reach", "average precision")
    ax.set_ylim(0, 1.02)
    return fig
