"""How well an encoder predicts held-out responses: per vertex, per ROI, against the noise ceiling.

Prediction runs a batch at a time; only running sums stay in memory. The tables are written for
people (CSV) and for programs (Parquet, .npy); the report is built from these files alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raypipe.encoding.frozen import FrozenBackbone, tokens_of
from raypipe.encoding.readout import HEMIS, NONE
from raypipe.memory.guard import current, note, relieve
from raypipe.memory.policy import Throttle
from raypipe.report.metrics import PearsonSums, normalised_correlation
from raypipe.report.saved import write_bytes, write_json, write_npy
from raypipe.stream import Gatherer
from raypipe.stream.reading import Source

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Families = Mapping[str, Mapping[str, Mapping[str, NDArray[np.bool_]]]]  # family -> hemi -> roi


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores:
    """Correlations of one subject; per hemisphere (V,) float64.

    nc : explainable variance, or None where no noise ceiling was given
    """

    n_images: int
    r: Mapping[str, Floats]
    nc: Mapping[str, Floats] | None = None


def predictions(
    model: nn.Module,
    sources: Mapping[str, Source],
    rows: Rows,
    *,
    batch_size: int,
    device: str,
    backbone: FrozenBackbone | None = None,
) -> Iterator[tuple[Rows, dict[str, NDArray[np.float32]], dict[str, torch.Tensor]]]:
    """Yield (rows, predicted hemisphere -> (b, V) float32, the batch) in the order of ``rows``.

    Under memory pressure fewer than ``batch_size`` rows are computed at once from then on. Raises
    MemoryBudgetExceeded when the process's guard does.
    """
    model = model.to(device).eval()
    pieces = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    throttle = Throttle(batch_size)
    with Gatherer(sources, batch_size, device) as gatherer, torch.inference_mode():
        for piece, batch in zip(pieces, gatherer.batches(pieces), strict=True):
            limit = _next_limit(throttle, int(piece[0]))
            for lo in range(0, len(piece), limit):
                part = {name: tensor[lo : lo + limit] for name, tensor in batch.items()}
                predicted = model(tokens_of(part, backbone))
                answers = {hemi: predicted[hemi].float().cpu().numpy() for hemi in HEMIS}
                yield piece[lo : lo + limit], answers, part


def _next_limit(throttle: Throttle, row: int) -> int:
    """Rows that may be computed at once: the budget's boundary, asked at each batch."""
    if current().pressure():
        relieve()
        throttle.next(True)
    else:
        throttle.next(False)
    note(step=row, batch=throttle.limit, phase="predict")
    return throttle.limit


def correlate(
    model: nn.Module,
    sources: Mapping[str, Source],
    rows: Rows,
    *,
    batch_size: int,
    device: str,
    backbone: FrozenBackbone | None = None,
) -> dict[str, Floats]:
    """Pearson's r of each vertex over ``rows``; sources : tokens (or pixels), lh, rh."""
    sums = {hemi: PearsonSums.empty(sources[hemi].row_shape[0]) for hemi in HEMIS}
    steps = predictions(
        model, sources, rows, batch_size=batch_size, device=device, backbone=backbone
    )
    for _, predicted, batch in steps:
        for hemi in HEMIS:
            sums[hemi].add(predicted[hemi], batch[hemi].cpu().numpy())
    return {hemi: sums[hemi].correlation() for hemi in HEMIS}


def load_ceiling(paths: Mapping[str, Path] | None) -> dict[str, Floats] | None:
    """Explainable variance of each vertex, or None."""
    if paths is None:
        return None
    return {hemi: np.load(paths[hemi]).astype(np.float64) for hemi in HEMIS}


def roi_table(scores: Scores, families: Families) -> list[dict[str, Any]]:
    """One record an ROI and hemisphere, then "none" (in no ROI but streams) and "all" vertices.

    mean_r and its quartiles leave undefined correlations out: ``n_scored`` counts what they are of.
    Statistics against the ceiling count them as 0: ``n_counted_zero`` says how many.
    """
    records = []
    for family, rois in families.items():
        for roi in dict.fromkeys(name for hemi in HEMIS for name in rois[hemi]):
            for hemi in HEMIS:
                if roi in rois[hemi]:
                    records.append(_roi_record(scores, hemi, family, roi, rois[hemi][roi]))
    for hemi in HEMIS:
        every = np.ones(len(scores.r[hemi]), bool)
        records.append(_roi_record(scores, hemi, NONE, NONE, outside(families, hemi, every)))
        records.append(_roi_record(scores, hemi, "all", "all", every))
    return records


def outside(families: Families, hemi: str, every: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Vertices in no ROI of any family; streams, a coarser atlas over the same cortex, apart."""
    left = every.copy()
    for family, rois in families.items():
        if family != "streams":
            for mask in rois[hemi].values():
                left &= ~mask
    return left


def _roi_record(
    scores: Scores, hemi: str, family: str, roi: str, mask: NDArray[np.bool_]
) -> dict[str, Any]:
    r = scores.r[hemi][mask]
    defined = r[np.isfinite(r)]
    record: dict[str, Any] = {
        "hemi": hemi,
        "family": family,
        "roi": roi,
        "n_vertices": int(mask.sum()),
        "n_scored": int(defined.size),
        "mean_r": _or_none(np.mean, defined),
        "q25_r": _or_none(lambda v: np.percentile(v, 25), defined),
        "median_r": _or_none(np.median, defined),
        "q75_r": _or_none(lambda v: np.percentile(v, 75), defined),
    }
    if scores.nc is not None:
        record |= _against_ceiling(r, scores.nc[hemi][mask])
    return record


def _against_ceiling(r: Floats, nc: Floats) -> dict[str, Any]:
    """r against its ceiling over the vertices where a ceiling is known and not near zero.

    A vertex without a defined r (predictions that do not vary, or are not finite) counts as r = 0:
    nothing of it was recovered, and leaving it out would let a mostly dead encoder score high.
    ``recovered`` is mean r over mean ceiling: unlike the mean of ratios it is not ruled by the
    vertices whose ceiling is near zero. None only where no vertex can be explained.
    """
    undefined = ~np.isfinite(r)
    r = np.where(undefined, 0.0, r)
    normal = normalised_correlation(r, nc)
    used = np.isfinite(normal.r_over_ceiling)
    ceiling = np.sqrt(nc[used])
    recovered = float(r[used].mean() / ceiling.mean()) if used.any() else None
    return {
        "n_explainable": int(used.sum()),
        "n_counted_zero": int((used & undefined).sum()),
        "mean_r_explainable": _or_none(np.mean, r[used]),
        "mean_ceiling_r": _or_none(np.mean, ceiling),
        "recovered": recovered,
        "median_r_over_ceiling": _or_none(np.median, normal.r_over_ceiling[used]),
        "median_r2_over_nc": _or_none(np.median, normal.r2_over_ceiling[used]),
    }


def _or_none(statistic: Any, values: Floats) -> float | None:
    return float(statistic(values)) if values.size else None


def summarise(scores: Scores) -> dict[str, Any]:
    """The headline of one subject: all vertices of both hemispheres, and each by itself."""
    both = Scores(
        n_images=scores.n_images,
        r={"both": np.concatenate([scores.r[h] for h in HEMIS])},
        nc=None if scores.nc is None else {"both": np.concatenate([scores.nc[h] for h in HEMIS])},
    )
    dropped = ("hemi", "family", "roi")
    every = _roi_record(both, "both", "all", "all", np.ones(len(both.r["both"]), bool))
    summary = {k: v for k, v in every.items() if k not in dropped}
    return {"n_images": scores.n_images, **summary}


def save_scores(
    scores: Scores, families: Families, folder: Path, note: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the tables below ``folder``, summary.json last; returns the summary.

    {lh,rh}_r.npy (V,), vertices.parquet, rois.csv, rois.parquet, summary.json (``note`` added).
    """
    import pyarrow as pa

    (folder / "summary.json").unlink(missing_ok=True)  # an older one must not vouch for new tables
    for hemi in HEMIS:
        write_npy(folder / f"{hemi}_r.npy", scores.r[hemi].astype(np.float32))
    vertices = pa.table(_vertex_columns(scores, families), schema=_vertex_schema())
    records = roi_table(scores, families)
    rois = pa.Table.from_pylist(records, schema=_roi_schema(records[0]))
    write_bytes(folder / "vertices.parquet", _parquet(vertices))
    write_bytes(folder / "rois.parquet", _parquet(rois))
    write_bytes(folder / "rois.csv", _csv(rois))
    summary = {**summarise(scores), **note}
    write_json(folder / "summary.json", summary)
    return summary


def _vertex_schema() -> pa.Schema:
    """Fixed: a column without one defined value would otherwise have no type."""
    import pyarrow as pa

    r, nc = (pa.field(name, pa.float64()) for name in ("r", "nc"))
    hemi, vertex = pa.field("hemi", pa.string()), pa.field("vertex", pa.int64())
    return pa.schema([hemi, vertex, r, nc, pa.field("rois", pa.list_(pa.string()))])


def _roi_schema(record: Mapping[str, Any]) -> pa.Schema:
    import pyarrow as pa

    types = dict.fromkeys(("hemi", "family", "roi"), pa.string())
    types |= {name: pa.int64() for name in record if name.startswith("n_")}
    return pa.schema([(name, types.get(name, pa.float64())) for name in record])


def _parquet(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _csv(table: pa.Table) -> bytes:
    import pyarrow.csv as pa_csv

    buffer = io.BytesIO()
    pa_csv.write_csv(table, buffer)
    return buffer.getvalue()


def _vertex_columns(scores: Scores, families: Families) -> dict[str, Sequence[Any]]:
    """hemi, vertex, r, nc, rois ("family/roi" each), one entry a vertex, lh first."""
    columns: dict[str, list[Any]] = {name: [] for name in ("hemi", "vertex", "r", "nc", "rois")}
    for hemi in HEMIS:
        n = len(scores.r[hemi])
        member: list[list[str]] = [[] for _ in range(n)]
        for family, rois in families.items():
            for roi, mask in rois[hemi].items():
                for vertex in np.flatnonzero(mask):
                    member[vertex].append(f"{family}/{roi}")
        columns["hemi"] += [hemi] * n
        columns["vertex"] += range(n)
        columns["r"] += [None if np.isnan(v) else float(v) for v in scores.r[hemi]]
        nc = scores.nc[hemi] if scores.nc is not None else np.full(n, np.nan)
        columns["nc"] += [None if np.isnan(v) else float(v) for v in nc]
        columns["rois"] += member
    return dict(columns)
