"""How well a run predicts, as its page shows it: from what ``encode evaluate`` saved.

Reads evaluation/SPLIT/ of the run's folder: summary.json, vertices.parquet, rois.parquet. The other
sections of the page are ``sections``'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.report import plots
from raypipe.report.blocks import Block, Card, Note, Picture, Section, Table
from raypipe.report.saved import read_json

Floats = NDArray[np.float64]
Run = Mapping[str, Any]

_SPLITS = {"test": "test images", "val": "validation images"}


def score_cards(run_dir: Path, who: str) -> list[Card]:
    """Of the first split that was evaluated, the test images before validation; else none."""
    for split, words in _SPLITS.items():
        summary = _summary(run_dir, split)
        if summary is not None:
            return _cards(who, words, summary)
    return []


def _cards(who: str, words: str, summary: Run) -> list[Card]:
    scored = f"{summary['n_scored']:,} vertices, {summary['n_images']} {words}"
    left_out = summary.get("n_vertices", summary["n_scored"]) - summary["n_scored"]
    if left_out:
        scored += f"; undefined in {left_out:,} more"
    found = [Card(f"{who}: mean Pearson r", _number(summary["mean_r"]), scored)]
    if summary.get("recovered") is not None:
        of = f"{summary['mean_r_explainable']:.3f} of a mean ceiling of"
        detail = f"r {of} {summary['mean_ceiling_r']:.3f}, {summary['n_explainable']:,} vertices"
        if summary.get("n_counted_zero"):
            detail += f", {summary['n_counted_zero']:,} of them undefined and counted as 0"
        found.append(Card("of the noise ceiling", f"{summary['recovered']:.0%}", detail))
    return found


def score_section(run_dir: Path, run: Run) -> Section | None:
    """Correlations per ROI and vertex, of every split that was evaluated."""
    blocks: list[Block] = []
    for split, words in _SPLITS.items():
        summary = _summary(run_dir, split)
        if summary is not None:
            blocks += _outdated(summary, run) + _score_blocks(run_dir / "evaluation" / split, words)
    return Section("Prediction of held-out images", blocks) if blocks else None


def _outdated(summary: Run, run: Run) -> list[Block]:
    """A warning when training went on to a better epoch after the evaluation."""
    best = (run.get("result") or {}).get("best_epoch")
    if summary.get("checkpoint") != "best" or best is None or summary.get("epoch") == best:
        return []
    return [
        Note(
            f"These scores are of epoch {summary.get('epoch', -1) + 1}; training has since found a"
            f" better one, epoch {best + 1}. Run raypipe encode evaluate again."
        )
    ]


def _score_blocks(folder: Path, words: str) -> list[Block]:
    from pyarrow.parquet import read_table

    vertices = read_table(folder / "vertices.parquet")
    rois = read_table(folder / "rois.parquet").to_pylist()
    r, ceiling = _by_hemisphere(vertices)
    rows = _roi_values(vertices, rois, r)
    blocks: list[Block] = []
    if rows:
        blocks.append(
            Picture(
                plots.data_uri(plots.roi_bars(rows)),
                f"Bar chart of the mean correlation in {len(rows)} ROIs, a point for each vertex",
                f"Pearson correlation of predicted and measured responses over {words}, by ROI."
                " Bars are means over vertices, points single vertices (at most 300 an ROI).",
            )
        )
    blocks.append(
        Picture(
            plots.data_uri(plots.vertex_histogram(r, ceiling)),
            "Histogram of the correlations of all vertices, and each against its noise ceiling",
            f"All vertices, {words}."
            + (
                " Right: a vertex on the dashed line is predicted as well as its noise allows;"
                " with few images, some come to lie above it by chance."
                if ceiling
                else " No noise ceiling was given."
            ),
        )
    )
    blocks.append(_roi_table(rois, words))
    return blocks


def _by_hemisphere(vertices: Any) -> tuple[dict[str, Floats], dict[str, Floats] | None]:
    """hemisphere -> r, and -> ceiling of r where any vertex has one."""
    hemi = np.array(vertices.column("hemi").to_pylist())
    columns = {
        name: vertices.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
        for name in ("r", "nc")
    }
    names = list(dict.fromkeys(hemi.tolist()))
    r = {name: columns["r"][hemi == name] for name in names}
    if not np.isfinite(columns["nc"]).any():
        return r, None
    return r, {name: np.sqrt(columns["nc"][hemi == name]) for name in names}


def _roi_values(
    vertices: Any, rois: Sequence[Run], r: Mapping[str, Floats]
) -> list[plots.RoiValues]:
    """What the bar chart shows: all ROIs but streams, then the vertices in none."""
    member: dict[tuple[str, str], list[float]] = {}
    columns = (vertices.column(name).to_pylist() for name in ("hemi", "r", "rois"))
    for hemi, value, names in zip(*columns, strict=True):
        places = [name for name in names if not name.startswith("streams/")] or ["none/none"]
        for name in places:
            member.setdefault((hemi, name), []).append(np.nan if value is None else value)
    shown = []
    for record in rois:
        values = member.get((record["hemi"], f"{record['family']}/{record['roi']}"))
        if values and record["family"] not in ("streams", "all"):
            none = record["family"] == "none"
            shown.append(
                plots.RoiValues(
                    hemi=record["hemi"],
                    roi="in no ROI" if none else record["roi"],
                    family="" if none else record["family"],
                    r=np.array(values),
                    ceiling_r=record.get("mean_ceiling_r"),
                )
            )
    return shown


_COLUMNS = {
    "n_vertices": "vertices",
    "mean_r": "mean r",
    "q25_r": "25 %",
    "median_r": "median r",
    "q75_r": "75 %",
    "mean_ceiling_r": "ceiling of r",
    "recovered": "of ceiling",
    "median_r2_over_nc": "median r²/NC",
}


def _roi_table(rois: Sequence[Run], words: str) -> Table:
    shown = [name for name in _COLUMNS if any(record.get(name) is not None for record in rois)]
    rows = [
        [record["hemi"], record["family"], record["roi"], *(_cell(n, record[n]) for n in shown)]
        for record in rois
        if record["n_vertices"]
    ]
    return Table(
        ["hemi", "family", "ROI", *(_COLUMNS[name] for name in shown)],
        rows,
        f"All ROIs, {words} (also in rois.csv)",
        numeric_from=3,
        folded=True,
    )


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "n_vertices":
        return f"{value:,}"
    return f"{value:.0%}" if name == "recovered" else f"{value:.3f}"


def _summary(run_dir: Path, split: str) -> dict[str, Any] | None:
    path = run_dir / "evaluation" / split / "summary.json"
    return read_json(path, "evaluate the run again") if path.is_file() else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
