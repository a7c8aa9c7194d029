"""The page's section on memory: RUN/memory/*.csv and verdicts -> a figure, a table, what was stopped.

Logs are written by ``raypipe.memory.tracker``, verdicts by the node's memory actor. A run without
either has no section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.memory.history import History, read_histories
from raypipe.memory.verdict import Verdict, read_all
from raypipe.report.blocks import Block, Card, Note, Picture, Section, Table
from raypipe.units import format_bytes, format_seconds

FOLDER = "memory"
_MAX_TOLD = 5  # verdicts in full; a run that is retried often says the same again and again


def memory_section(run_dir: Path, run: Mapping[str, Any]) -> Section | None:
    """Budget against use; None where nothing was logged. Raises StoreCorrupt."""
    histories, stopped = read_histories(run_dir / FOLDER), _verdicts(run_dir)
    blocks: list[Block] = _told(stopped)
    if histories:
        blocks += [_picture(histories, stopped), _peaks(histories, stopped)]
    if resolved := _resolved(run):
        blocks.append(resolved)
    return Section("Memory", blocks) if histories or stopped else None


def memory_card(run_dir: Path) -> Card | None:
    """The largest charge of any process, against its budget; None where nothing was logged."""
    histories = read_histories(run_dir / FOLDER)
    if not histories:
        return None
    ended = _ended(_verdicts(run_dir))
    peak, largest = max(
        ((_peak(h, ended.get(h.name)), h) for h in histories), key=lambda pair: pair[0]
    )
    detail = largest.name
    if largest.budget:
        detail = f"of a budget of {format_bytes(largest.budget)}, in {largest.name}"
    return Card("Peak memory of a process", format_bytes(peak), detail)


def _verdicts(run_dir: Path) -> list[Verdict]:
    folder = run_dir / FOLDER
    return read_all(folder) if folder.is_dir() else []


def _ended(stopped: Sequence[Verdict]) -> dict[str, Verdict]:
    """Log name -> verdict: a worker's log is called LABEL-PID."""
    return {f"{verdict.label}-{verdict.pid}": verdict for verdict in stopped}


def _told(stopped: Sequence[Verdict]) -> list[Block]:
    said = list(dict.fromkeys(verdict.message() for verdict in stopped))
    notes: list[Block] = [Note(text) for text in said[-_MAX_TOLD:]]
    if len(said) > _MAX_TOLD:
        notes.insert(0, Note(f"{len(said)} processes were stopped; the last {_MAX_TOLD}:"))
    return notes


def _picture(histories: Sequence[History], stopped: Sequence[Verdict]) -> Picture:
    # matplotlib is loaded only when there is something to draw
    from raypipe.memory.figure import Kill, memory_figure
    from raypipe.report.plots import data_uri

    kills = [Kill(time_s=v.when, usage_bytes=v.usage_bytes) for v in stopped]
    caption = (
        "What each process held that the kernel could not take back (RssAnon, pinned host memory,"
        " shared tensors): the largest sample of each interval. Pages mapped from files are not"
        " charged."
    )
    if kills:
        caption += " A cross marks a process that was stopped, at the charge it had reached."
    return Picture(
        data_uri(memory_figure(histories, kills)),
        f"Memory of {len(histories)} process(es) over time, the budget as a dashed line",
        caption,
    )


def _peaks(histories: Sequence[History], stopped: Sequence[Verdict]) -> Table:
    ended = _ended(stopped)
    gpus = any(h.gpu_peak_bytes for h in histories)
    header = ["process", "end", "phase at the peak", "peak", "budget", "headroom", "file pages"]
    header += ["GPU peak"] if gpus else []
    header += ["node's least free", "logged for"]
    rows = [_peak_row(h, ended.get(h.name), gpus=gpus) for h in histories]
    return Table(header, rows, "Peaks", numeric_from=3)


def _peak_row(h: History, verdict: Verdict | None, *, gpus: bool) -> list[str]:
    peak = _peak(h, verdict)
    row = [
        h.name,
        "stopped" if verdict else "–",
        h.phase[h.at_peak] or "–",
        format_bytes(peak),
        format_bytes(h.budget) if h.budget else "none",
        _headroom(h.budget, peak),
        format_bytes(float(np.nanmax(h.file_bytes))),
    ]
    if gpus:
        row.append(
            format_bytes(max((float(v.max()) for v in h.gpu_peak_bytes.values()), default=0))
        )
    row.append(format_bytes(float(np.nanmin(h.available_bytes))))
    return [*row, format_seconds(float(h.time_s[-1] - h.time_s[0]))]


def _peak(h: History, verdict: Verdict | None) -> int:
    # Between its last sample and its end a process grows: the verdict saw more than its log.
    return max(int(h.peak_bytes[h.at_peak]), verdict.usage_bytes if verdict else 0)


def _headroom(budget: int | None, peak: int) -> str:
    if not budget:
        return "–"
    left = budget - peak
    return f"{left / budget:.0%}" if left >= 0 else f"{format_bytes(-left)} over"


def _resolved(run: Mapping[str, Any]) -> Table | None:
    """The values in force and where each came from, as ``ResolvedMemory.record`` saves them."""
    record = run.get("memory")
    if not isinstance(record, Mapping) or not record.get("sources"):
        return None
    limits = record.get("limits") or {}
    rows = [
        [name, str(record["config"][name]), source] for name, source in record["sources"].items()
    ]
    if limits.get("limit_bytes"):
        node = [format_bytes(limits["limit_bytes"]), str(limits.get("limit_source"))]
        rows.insert(0, ["node limit", *node])
    return Table(["option", "value", "source"], rows, "Memory options", numeric_from=3, folded=True)
