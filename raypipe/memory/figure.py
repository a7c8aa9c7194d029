"""Draws memory logs: each process's charge over time, the budget dashed, kills marked.

One matplotlib ``Figure`` of its own, no pyplot, no global state; import this only to draw. Where a
budget dwarfs what was used, a second panel shows the use itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raypipe.dress import COLOURS, DARK, WIDTH_IN, dress
from raypipe.memory.history import History
from raypipe.units import format_bytes

_DWARFED = 0.4  # of the budget: with less in use, lines lie too low to be told apart
_SMALL_UNITS = ((1024**3, "GiB"), (1024**2, "MiB"))


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A process that was stopped: when (seconds since 1970) and at what charge."""

    time_s: float
    usage_bytes: int


def memory_figure(histories: Sequence[History], kills: Sequence[Kill] = ()) -> Figure:
    """Charge of every process against its budget, and below it the GPUs where there are any.

    Raises ValueError for no history at all.
    """
    if not histories:
        raise ValueError("no memory log to draw; give at least one History")
    start = min(float(h.time_s[0]) for h in histories)
    colours = _colours(histories)
    gpus = any(_used(h.gpu_peak_bytes) for h in histories)
    fig = Figure(figsize=(WIDTH_IN, 3.9 + 3.2 * gpus), layout="constrained")
    panels = 2 if _dwarfed(histories, kills) else 1
    grid = fig.add_gridspec(1 + gpus, panels)
    for at in range(panels):
        ax = fig.add_subplot(grid[0, at])
        _draw_host(ax, histories, colours, start, kills, budget=at == 0)
    if gpus:
        _draw_gpus(fig.add_subplot(grid[1, :]), histories, colours, start)
    _legend(fig, histories, colours, kills)
    return fig


def _colours(histories: Sequence[History]) -> dict[str, str]:
    """The largest processes get a colour; beyond seven, grey."""
    peaks = {h.name: float(np.nanmax(h.peak_bytes)) for h in histories}
    large = sorted(sorted(peaks), key=lambda name: -peaks[name])[: len(COLOURS)]
    shades = iter(COLOURS)
    return {h.name: next(shades) if h.name in large else "#b6bac2" for h in histories}


def _dwarfed(histories: Sequence[History], kills: Sequence[Kill]) -> bool:
    budgets = [h.budget for h in histories if h.budget]
    return bool(budgets) and _largest(histories, kills) < _DWARFED * min(budgets)


def _largest(histories: Sequence[History], kills: Sequence[Kill]) -> float:
    peaks = [float(np.nanmax(h.peak_bytes)) for h in histories]
    return max([*peaks, *(kill.usage_bytes for kill in kills)])


def _draw_host(
    ax: Axes,
    histories: Sequence[History],
    colours: Mapping[str, str],
    start: float,
    kills: Sequence[Kill],
    *,
    budget: bool,
) -> None:
    budgets = sorted({h.budget for h in histories if h.budget}) if budget else []
    top = max([_largest(histories, kills), *budgets])
    unit, unit_name = next((u for u in _SMALL_UNITS if top >= u[0]), _SMALL_UNITS[-1])
    scale, scale_name = _time_axis(histories, start)
    for h in sorted(histories, key=lambda h: colours[h.name] in COLOURS):
        at = (h.time_s - start) / scale
        many = len(at) > 1
        ax.plot(at, h.peak_bytes / unit, color=colours[h.name], lw=1.7, marker="" if many else "o")
    for kill in kills:
        ax.plot((kill.time_s - start) / scale, kill.usage_bytes / unit, "X", ms=10, color="#b91c1c",
                mec="white", zorder=5, clip_on=False)  # fmt: skip
    for value in budgets:
        ax.axhline(value / unit, color=DARK, ls=(0, (6, 4)), lw=1.5)
        ax.annotate(f"budget {format_bytes(value)}", (1, value / unit), (-4, 3),
                    xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                    va="bottom", fontsize=10, color=DARK,
                    bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1})  # fmt: skip
    ax.set_ylim(0, top / unit * 1.15)
    ax.set_xlim(left=0)
    title = "Use against the budget" if budgets else "Use alone, enlarged"
    dress(ax, title if budget is False or budgets else "Use", scale_name, f"charge, {unit_name}")


def _draw_gpus(
    ax: Axes, histories: Sequence[History], colours: Mapping[str, str], start: float
) -> None:
    scale, scale_name = _time_axis(histories, start)
    peaks = [v for h in histories for v in h.gpu_peak_bytes.values()]
    top = max(float(np.nanmax(v)) for v in peaks)
    unit, unit_name = next((u for u in _SMALL_UNITS if top >= u[0]), _SMALL_UNITS[-1])
    for h in histories:
        for index in _used(h.gpu_peak_bytes):
            at, colour = (h.time_s - start) / scale, colours[h.name]
            ax.plot(at, h.gpu_allocated_bytes[index] / unit, color=colour, lw=1.7)
            ax.plot(at, h.gpu_peak_bytes[index] / unit, color=colour, lw=1.4, ls=(0, (1, 1.5)))
    ax.set_ylim(0, top / unit * 1.15)
    ax.set_xlim(left=0)
    title = "GPU: allocated (solid) and its peak so far (dotted)"
    dress(ax, title, scale_name, f"tensors, {unit_name}")


def _used(peaks: Mapping[int, NDArray[np.float64]]) -> list[int]:
    """Devices on which the process held anything."""
    return [index for index, values in peaks.items() if np.nanmax(values) > 0]


def _time_axis(histories: Sequence[History], start: float) -> tuple[float, str]:
    seconds = max(float(h.time_s[-1]) for h in histories) - start
    if seconds > 3 * 3600:
        return 3600.0, "hours since the run began"
    return (
        (60.0, "minutes since the run began")
        if seconds > 300
        else (1.0, "seconds since the run began")
    )


def _legend(
    fig: Figure, histories: Sequence[History], colours: Mapping[str, str], kills: Sequence[Kill]
) -> None:
    from matplotlib.lines import Line2D

    named = [h.name for h in histories if colours[h.name] in COLOURS]
    handles = [Line2D([], [], color=colours[name], lw=2.2, label=name) for name in named]
    if len(named) < len(histories):
        text = f"{len(histories) - len(named)} more, all smaller"
        handles.append(Line2D([], [], color="#b6bac2", lw=2.2, label=text))
    if kills:
        handles.append(Line2D([], [], color="#b91c1c", marker="X", ms=9, ls="", label="stopped"))
    fig.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10)
