"""One look for all figures: width, colours (Okabe and Ito's), axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN = 9.6  # shown 1000 px wide: 1 inch is 104 px, so 10 pt text comes out 14 px high
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7a6a00")
GREY, DARK = "#6b7280", "#1f2937"


def dress(ax: Axes, title: str, x: str, y: str) -> None:
    """Title and labels (quantity and unit) in the size they are shown at, a quiet frame and grid."""
    ax.set_title(title, fontsize=12, fontweight="bold", color=DARK, loc="left")
    ax.set_xlabel(x, fontsize=10.5)
    ax.set_ylabel(y, fontsize=10.5)
    ax.tick_params(labelsize=10, color=GREY)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.grid(color="#e5e7eb", lw=0.8)
    ax.set_axisbelow(True)
