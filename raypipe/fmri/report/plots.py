"""Figures of decoding: scores by ROI with subjects as points, confusion matrices, where time went.

Each function takes values and returns a matplotlib ``Figure`` of its own, as ``raypipe.report.plots``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from scipy import stats

from raypipe.dress import COLOURS, DARK, GREY, WIDTH_IN, dress
from raypipe.fmri.report.results import RoiScores

ALPHA = 0.05
_BAND = "#d7dde5"


@dataclass(frozen=True, eq=False, kw_only=True)
class Confusion:
    """counts : (k, k) samples of true class (row) predicted as (column)."""

    title: str
    classes: tuple[str, ...]
    counts: NDArray[np.int64]


def scores_by_roi(rows: Sequence[RoiScores], score: str) -> Figure:
    """A row an ROI: subjects as points, their mean with its 95 % interval, chance, permutation band."""
    fig = Figure(figsize=(WIDTH_IN, 1.5 + 0.42 * len(rows)), layout="constrained")
    ax = fig.subplots()
    for at, row in enumerate(rows):
        _draw_row(ax, row, at)
    ax.set_yticks(range(len(rows)), [row.roi for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    dress(ax, "", f"{score}, each point a subject", "")
    ax.grid(axis="y", visible=False)
    _zoom(ax, rows)
    _legend(fig, rows)
    return fig


def _draw_row(ax: Axes, row: RoiScores, at: int) -> None:
    if row.band is not None:
        low, high = row.band
        ax.add_patch(Rectangle((low, at - 0.36), high - low, 0.72, color=_BAND, lw=0, zorder=1))
    ax.plot([row.chance] * 2, [at - 0.42, at + 0.42], color=DARK, ls=(0, (3, 2)), lw=1.3, zorder=2)
    found = np.isfinite(row.values)
    height = at + spread(row.values[found])
    sure = (row.p[found] < ALPHA) | np.isnan(row.p[found])
    face = [COLOURS[0] if s else "white" for s in sure]
    ax.scatter(
        row.values[found], height, s=34, c=face, edgecolors=COLOURS[0], lw=1.3, alpha=0.9, zorder=3
    )
    mean, half = row.mean, half_interval(row.values[found])
    if np.isfinite(half):
        ax.plot([mean - half, mean + half], [at, at], color=COLOURS[1], lw=2.2, zorder=4)
    ax.plot([mean] * 2, [at - 0.26, at + 0.26], color=COLOURS[1], lw=3, zorder=4)
    if np.isfinite(row.q):
        told, colour = (f"q {row.q:.2g} ", DARK) if row.q < ALPHA else ("n.s. ", GREY)
        ax.annotate(
            told, (1.0, at), xycoords=("axes fraction", "data"), ha="left", va="center",
            xytext=(6, 0), textcoords="offset points", fontsize=10, color=colour,
            fontweight="bold" if row.q < ALPHA else "normal",
        )  # fmt: skip


def spread(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Heights in ±0.22 that keep equal values apart; the same for the same values."""
    order = np.argsort(values, kind="stable")
    heights = np.empty(len(values))
    heights[order] = np.resize([-0.15, 0.15, 0.0, -0.22, 0.22, -0.07, 0.07], len(values))
    return heights


def half_interval(values: NDArray[np.float64]) -> float:
    """Half of the mean's 95 % confidence interval by Student's t; NaN for one value."""
    n = len(values)
    if n < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))


def _zoom(ax: Axes, rows: Sequence[RoiScores]) -> None:
    shown = [row.values[np.isfinite(row.values)] for row in rows]
    edges = [row.chance for row in rows] + [x for row in rows if row.band for x in row.band]
    values = np.concatenate([*shown, edges])
    low, high = float(values.min()), float(values.max())
    pad = 0.05 * max(high - low, 0.05)
    ax.set_xlim(low - pad, high + pad)


def _legend(fig: Figure, rows: Sequence[RoiScores]) -> None:
    tested = any(np.isfinite(row.p).any() for row in rows)
    point = {"marker": "o", "ls": "", "ms": 6, "mec": COLOURS[0]}
    handles: list[Patch | Line2D] = [
        Line2D([], [], mfc=COLOURS[0], **point, label="subject, p < 0.05" if tested else "subject"),  # type: ignore[arg-type]
    ]
    if tested:
        handles.append(Line2D([], [], mfc="white", **point, label="subject, p ≥ 0.05"))  # type: ignore[arg-type]
    handles.append(Line2D([], [], color=COLOURS[1], lw=2.6, label="mean, 95 % interval"))
    handles.append(Line2D([], [], color=DARK, ls=(0, (3, 2)), lw=1.3, label="chance"))
    if any(row.band for row in rows):
        handles.append(Patch(color=_BAND, lw=0, label="mean of permuted labels, 95 %"))
    fig.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=9.5)


def confusions(found: Sequence[Confusion]) -> Figure:
    """Matrices side by side, up to four a line, in percent of each true class."""
    columns = min(len(found), 4 if max(len(one.classes) for one in found) <= 4 else 3)
    lines = -(-len(found) // columns)
    side = WIDTH_IN / max(columns, 2)
    fig = Figure(figsize=(WIDTH_IN, lines * (0.88 * side + 0.3)), layout="constrained")
    axes = fig.subplots(lines, columns, squeeze=False).ravel()
    pictures = [
        _draw_confusion(ax, one, small=columns > 2) for ax, one in zip(axes, found, strict=False)
    ]
    for ax in axes[len(found) :]:
        ax.set_visible(False)
    bar = fig.colorbar(pictures[0], ax=list(axes), shrink=0.6, pad=0.01, aspect=30)
    bar.set_label("% of the true class", fontsize=9.5)
    bar.outline.set_visible(False)
    return fig


def _draw_confusion(ax: Axes, one: Confusion, *, small: bool) -> AxesImage:
    total = one.counts.sum(axis=1, keepdims=True)
    share = 100 * np.divide(one.counts, total, out=np.zeros(one.counts.shape), where=total > 0)
    picture = ax.imshow(share, cmap="Blues", vmin=0, vmax=100)
    k = len(one.classes)
    if k <= 10:
        for i, j in np.ndindex(share.shape):
            ink = "white" if share[i, j] > 55 else DARK
            size = 10 if k <= 4 else 8 if k <= 8 else 6.5
            ax.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=size, color=ink)
    size = 9 if k <= 4 else 8 if k <= 10 else 6
    ax.set_xticks(range(k), one.classes, fontsize=size)
    if k > 2 or small:
        for label in ax.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(k), one.classes, fontsize=size)
    ax.set_title(one.title, fontsize=10.5, fontweight="bold", color=DARK, loc="left")
    ax.set_xlabel("predicted", fontsize=9)
    ax.set_ylabel("true", fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return picture


def seconds_by_subject(reading: Mapping[str, float], decoding: Mapping[str, float]) -> Figure:
    """Stacked bars a subject: seconds in which scans were read and cleaned, and decoded."""
    names = list(reading)
    fig = Figure(figsize=(WIDTH_IN, 1.1 + 0.34 * len(names)), layout="constrained")
    ax = fig.subplots()
    first = np.array([reading[name] for name in names])
    second = np.array([decoding.get(name, 0.0) for name in names])
    ax.barh(range(len(names)), first, color=COLOURS[5], label="read and cleaned")
    ax.barh(range(len(names)), second, left=first, color=COLOURS[0], label="decoded")
    ax.set_yticks(range(len(names)), [f"subject {name}" for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    dress(ax, "", "worker seconds, all units of the subject", "")
    ax.grid(axis="y", visible=False)
    fig.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9.5)
    return fig
