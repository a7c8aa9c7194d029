"""Figures of a run: learning curves, per-ROI bars over vertices, correlation against ceiling.

Each function takes arrays and returns a matplotlib ``Figure`` of its own: no pyplot, no global
state. Colours are Okabe and Ito's, told apart by colour-blind readers; text is sized for a page
1000 pixels wide. What is drawn when is decided in ``sections``.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raypipe.dress import COLOURS as PALETTE
from raypipe.dress import DARK, GREY, WIDTH_IN, dress

Floats = NDArray[np.float64]

COLOURS = {"lh": PALETTE[0], "rh": PALETTE[1], "train": PALETTE[0], "val": PALETTE[1]}
HEMI_NAMES = {"lh": "left hemisphere", "rh": "right hemisphere"}
_MAX_POINTS = 300  # a row of the ROI plot saturates beyond; the subset is seeded


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What a training run logged.

    step, step_loss, lr : (n_steps,), step counted over the whole run
    epoch_end           : (n_epochs,) step at which an epoch ended
    val                 : name -> (n_epochs,), e.g. val_loss, val_r
    best_epoch          : index into the epochs, or None
    """

    step: Floats
    step_loss: Floats
    lr: Floats
    epoch_end: Floats
    val: Mapping[str, Floats] = field(default_factory=dict)
    best_epoch: int | None = None


@dataclass(frozen=True, kw_only=True)
class RoiValues:
    """One ROI of one hemisphere: its vertices' correlations (n,) and mean ceiling of r, or None."""

    hemi: str
    roi: str
    family: str
    r: Floats
    ceiling_r: float | None = None


def learning_curves(curves: Curves) -> Figure:
    """Training and validation loss, and beside them the validation correlation and learning rate."""
    fig = Figure(figsize=(WIDTH_IN, 3.7), layout="constrained")
    left, right = fig.subplots(1, 2)
    _draw_loss(left, curves)
    _mark_best(left, curves)
    scores = {name: values for name, values in curves.val.items() if name != "val_loss"}
    if scores:
        _draw_scores(right, curves, scores)
        _mark_best(right, curves, label=False)
    else:
        right.plot(curves.step, curves.lr, color=DARK, lw=1.6)
        dress(right, "Learning rate", "optimiser step", "learning rate")
    return fig


def _draw_loss(ax: Axes, curves: Curves) -> None:
    ax.plot(curves.step, curves.step_loss, color=COLOURS["train"], lw=0.9, alpha=0.35)
    smooth = _smooth(curves.step_loss)
    ax.plot(curves.step, smooth, color=COLOURS["train"], lw=2, label="training (running mean)")
    if "val_loss" in curves.val:
        values = curves.val["val_loss"]
        ax.plot(
            curves.epoch_end, values, "o-", ms=4, lw=2, color=COLOURS["val"], label="validation"
        )
    dress(ax, "Loss", "optimiser step", "mean squared error, both hemispheres")
    finite = np.concatenate([curves.step_loss, curves.val.get("val_loss", np.empty(0))])
    finite = finite[np.isfinite(finite)]
    if finite.size and finite.min() > 0 and finite.max() > 20 * finite.min():
        ax.set_yscale("log")
    _legend(ax, "best")


def _draw_scores(ax: Axes, curves: Curves, scores: Mapping[str, Floats]) -> None:
    for name, values in scores.items():
        hemi = name.removeprefix("val_r_")
        if name == "val_r" and len(scores) > 1:
            continue  # the mean of the two curves that are drawn
        colour = COLOURS.get(hemi, "#009E73")
        label = HEMI_NAMES.get(hemi, name.removeprefix("val_").replace("_", " "))
        ax.plot(curves.epoch_end, values, "o-", ms=4, lw=2, color=colour, label=label)
    dress(ax, "Validation correlation", "optimiser step", "Pearson r, mean over vertices")
    _legend(ax, "lower right")


def _mark_best(ax: Axes, curves: Curves, *, label: bool = True) -> None:
    if curves.best_epoch is None or curves.best_epoch >= len(curves.epoch_end):
        return
    at = curves.epoch_end[curves.best_epoch]
    ax.axvline(at, color=GREY, ls=(0, (4, 3)), lw=1.2, zorder=0)
    if not label:
        return
    note = f" best epoch ({curves.best_epoch + 1})"
    late = at > np.mean(ax.get_xlim())
    ax.annotate(
        note.strip() + " " if late else note,
        (at, 0.97),
        xycoords=("data", "axes fraction"),
        ha="right" if late else "left",
        va="top",
        fontsize=9.5,
        color=GREY,
    )


def _smooth(values: Floats) -> Floats:
    """Centred running mean over a twentieth of the run, shorter at both ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    lo, hi = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return np.asarray((sums[hi] - sums[lo]) / (hi - lo))


def roi_bars(rows: Sequence[RoiValues]) -> Figure:
    """Mean correlation of each ROI (bar) over the correlations of its vertices (points).

    ROIs stand in the order given, families set apart; a black line marks the ROI's mean ceiling.
    """
    places, labels = _roi_places(rows)
    fig = Figure(
        figsize=(WIDTH_IN, 1.3 + 0.37 * max(places.values(), default=1)), layout="constrained"
    )
    ax = fig.subplots()
    rng = np.random.default_rng(0)
    hemis = [hemi for hemi in ("lh", "rh") if any(row.hemi == hemi for row in rows)]
    shift = {"lh": -0.2, "rh": 0.2} if len(hemis) == 2 else dict.fromkeys(hemis, 0.0)
    for row in rows:
        _draw_roi(ax, row, places[row.family, row.roi] + shift[row.hemi], rng)
    ax.set_yticks(list(places.values()), [roi for _, roi in places])
    ax.set_ylim(max(places.values(), default=0) + 0.7, -0.7)
    for at, family in labels:
        ax.annotate(family, (1.01, at), xycoords=("axes fraction", "data"), va="center",
                    fontsize=9.5, color=GREY)  # fmt: skip
    ax.axvline(0, color=DARK, lw=1)
    dress(ax, "", "Pearson r on held-out images", "")
    ax.grid(axis="y", visible=False)
    _roi_legend(fig, hemis, any(row.ceiling_r is not None for row in rows))
    return fig


def _roi_places(
    rows: Sequence[RoiValues],
) -> tuple[dict[tuple[str, str], float], list[tuple[float, str]]]:
    """(family, roi) -> height, a gap after each family; and where the family's name goes."""
    places: dict[tuple[str, str], float] = {}
    spans: dict[str, list[float]] = {}
    at, last = 0.0, None
    for row in rows:
        if (row.family, row.roi) in places:
            continue
        at += 0.55 if last not in (None, row.family) else 0.0
        places[row.family, row.roi] = at
        spans.setdefault(row.family, []).append(at)
        at, last = at + 1.0, row.family
    return places, [(float(np.mean(span)), family) for family, span in spans.items()]


def _draw_roi(ax: Axes, row: RoiValues, at: float, rng: np.random.Generator) -> None:
    values = row.r[np.isfinite(row.r)]
    if not values.size:
        return
    colour = COLOURS[row.hemi]
    ax.barh(at, values.mean(), height=0.36, color=colour, alpha=0.45, lw=0)
    shown = values if values.size <= _MAX_POINTS else rng.choice(values, _MAX_POINTS, replace=False)
    jitter = rng.uniform(-0.13, 0.13, shown.size)
    ax.scatter(shown, at + jitter, s=7, color=colour, alpha=0.6, lw=0, rasterized=True)
    if row.ceiling_r is not None and np.isfinite(row.ceiling_r):
        ax.plot([row.ceiling_r] * 2, [at - 0.19, at + 0.19], color="black", lw=1.8)


def _roi_legend(fig: Figure, hemis: Sequence[str], ceiling: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [
        Patch(color=COLOURS[hemi], alpha=0.55, lw=0, label=HEMI_NAMES[hemi]) for hemi in hemis
    ]
    handles.append(Line2D([], [], color=GREY, marker="o", ms=4, ls="", label="one vertex"))
    if ceiling:
        handles.append(Line2D([], [], color="black", lw=1.8, label="mean noise ceiling"))
    fig.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10)


def vertex_histogram(
    r: Mapping[str, Floats], ceiling_r: Mapping[str, Floats] | None = None
) -> Figure:
    """How the correlations of all vertices spread, and beside it each against its ceiling.

    r, ceiling_r : hemisphere -> (V,), NaN where undefined.
    """
    fig = Figure(figsize=(WIDTH_IN, 3.9), layout="constrained")
    axes = fig.subplots(1, 2 if ceiling_r else 1, squeeze=False)[0]
    for hemi, values in r.items():
        finite = values[np.isfinite(values)]
        label = HEMI_NAMES[hemi]
        if finite.size:
            label += f", median {np.median(finite):.2f}"
        edges = np.linspace(-1, 1, 81 if values.size > 2000 else 51)
        axes[0].hist(finite, edges, histtype="step", lw=2, color=COLOURS[hemi], label=label)
    _zoom(axes[0], np.concatenate(list(r.values())))
    dress(axes[0], "All vertices", "Pearson r on held-out images", "number of vertices")
    axes[0].margins(y=0.25)
    _legend(axes[0], "upper left")
    if ceiling_r:
        _draw_against_ceiling(axes[1], r, ceiling_r)
    return fig


def _zoom(ax: Axes, values: Floats) -> None:
    finite = values[np.isfinite(values)]
    if finite.size:
        ax.set_xlim(min(-0.1, float(finite.min()) - 0.05), min(1.0, float(finite.max()) + 0.08))


def _draw_against_ceiling(
    ax: Axes, r: Mapping[str, Floats], ceiling_r: Mapping[str, Floats]
) -> None:
    ax.plot([0, 1], [0, 1], color=DARK, lw=1.4, ls=(0, (4, 3)), label="at the ceiling", zorder=3)
    n = sum(values.size for values in r.values())
    for hemi, values in r.items():
        size, alpha = (9, 0.55) if n < 5000 else (3, 0.15)
        x, colour = ceiling_r[hemi], COLOURS[hemi]
        ax.scatter(x, values, s=size, alpha=alpha, lw=0, color=colour, rasterized=True)
    dress(ax, "Against the noise ceiling", "ceiling of r, √(explainable variance)", "Pearson r")
    ax.set_xlim(-0.02, 1.0)
    _legend(ax, "upper left")


def _legend(ax: Axes, place: str) -> None:
    """On white, so that no line runs through the words."""
    ax.legend(fontsize=10, loc=place, facecolor="white", edgecolor="none", framealpha=0.9)


def png(fig: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG: the same bytes for the same figure (no date, no version inside)."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def data_uri(fig: Figure, dpi: int = 150) -> str:
    """The figure as a ``data:`` address, for a page that must stand alone."""
    return "data:image/png;base64," + base64.b64encode(png(fig, dpi)).decode("ascii")
