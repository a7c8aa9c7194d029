"""The inner loops of cleaning, compiled: scrub, detrend and filter of a tile of voxels; scaling.

A recursive filter depends on its last value, so one voxel at a time leaves the processor waiting:
64 voxels are filtered side by side, in float64 (in float32 a high-pass at 0.01 Hz has no digits
left). Per voxel and volume that took 7 ns here, scipy's loop over one voxel 35 ns, and nilearn, which
enters scipy once a voxel, 500 ns. Importing this compiles it (see ``raypipe.fmri.compiled``).
"""

from __future__ import annotations

import numpy as np

from raypipe.fmri.compiled import compiled

LANES = 64  # 16, 32 and 64 took 0.9, 0.62 and 0.55 s for a whole brain of 320 volumes
NOT_FINITE, CONSTANT = 1, 2  # bits of a voxel's flag


@compiled(
    "void(float64[:, ::1], int64, int64, float64[:, ::1], float64[:, ::1], float64[:, :, ::1])"
)
def _pass(
    tile: np.ndarray, first: int, step: int, sos: np.ndarray, zi: np.ndarray, state: np.ndarray
) -> None:
    """Filter ``tile`` (n, LANES) in place, from row ``first`` on by ``step`` (1 or -1).

    state : (n_sections, 2, LANES), overwritten; it starts as after an endless run of the first row
    """
    n, sections = tile.shape[0], sos.shape[0]
    for s in range(sections):
        for lane in range(LANES):
            state[s, 0, lane] = zi[s, 0] * tile[first, lane]
            state[s, 1, lane] = zi[s, 1] * tile[first, lane]
    for i in range(n):
        row = tile[first + i * step]
        for s in range(sections):
            b0, b1, b2, a1, a2 = sos[s, 0], sos[s, 1], sos[s, 2], sos[s, 4], sos[s, 5]
            near, far = state[s, 0], state[s, 1]
            for lane in range(LANES):
                x = row[lane]
                y = b0 * x + near[lane]
                near[lane] = b1 * x - a1 * y + far[lane]
                far[lane] = b2 * x - a2 * y
                row[lane] = y


@compiled("void(float64[:, ::1], int64, int64)")
def _odd_ends(tile: np.ndarray, edge: int, n: int) -> None:
    """Continue rows [edge, edge + n) of ``tile`` by ``edge`` rows on both sides, point-mirrored."""
    last = edge + n - 1
    for i in range(1, edge + 1):
        for lane in range(LANES):
            tile[edge - i, lane] = 2 * tile[edge, lane] - tile[edge + i, lane]
            tile[last + i, lane] = 2 * tile[last, lane] - tile[last - i, lane]


@compiled("void(float64[:, ::1], int64, int64, float64[::1])")
def _detrend(tile: np.ndarray, edge: int, n: int, mean: np.ndarray) -> None:
    """Subtract ``mean`` (LANES,) and the linear trend from rows [edge, edge + n)."""
    centre, norm = (n - 1) / 2.0, 0.0
    slope = np.zeros(LANES)
    for i in range(n):
        time = i - centre
        norm += time * time
        for lane in range(LANES):
            slope[lane] += time * (tile[edge + i, lane] - mean[lane])
    for i in range(n):
        time = (i - centre) / norm
        for lane in range(LANES):
            tile[edge + i, lane] -= mean[lane] + time * slope[lane]


@compiled("void(float64[:, ::1], int64, int64[::1], int64[::1], int64[::1], float64[::1])")
def _fill(
    tile: np.ndarray,
    edge: int,
    fill: np.ndarray,
    start: np.ndarray,
    source: np.ndarray,
    weight: np.ndarray,
) -> None:
    """Interpolate the places ``fill`` of the series (see ``scrub.Scrub``)."""
    for i in range(fill.size):
        row = tile[edge + fill[i]]
        row[:] = 0.0
        for j in range(start[i], start[i + 1]):
            for lane in range(LANES):
                row[lane] += weight[j] * tile[edge + source[j], lane]


@compiled("void(float64[:, ::1], int64, int64[::1], int64, uint8[::1])")
def _flag(tile: np.ndarray, edge: int, keep: np.ndarray, voxels: int, flags: np.ndarray) -> None:
    """Set the flags of the tile's voxels from the places that are kept, as they were read."""
    low, high, bad = tile[edge + keep[0]].copy(), tile[edge + keep[0]].copy(), np.zeros(LANES)
    for i in range(keep.size):
        for lane in range(LANES):
            x = tile[edge + keep[i], lane]
            low[lane], high[lane] = min(low[lane], x), max(high[lane], x)
            bad[lane] += 0.0 if np.isfinite(x) else 1.0
    for lane in range(voxels):
        if bad[lane] > 0:
            flags[lane] |= NOT_FINITE
        elif low[lane] == high[lane]:
            flags[lane] |= CONSTANT


@compiled(
    "void(float64[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], float64[::1],"
    " boolean, float64[:, ::1], float64[:, ::1], int64, float64[:, ::1], float64[::1], uint8[::1])"
)
def prepare(
    series: np.ndarray,
    enter: np.ndarray,
    keep: np.ndarray,
    fill: np.ndarray,
    start: np.ndarray,
    source: np.ndarray,
    weight: np.ndarray,
    detrend: bool,
    sos: np.ndarray,
    zi: np.ndarray,
    edge: int,
    out: np.ndarray,
    means: np.ndarray,
    flags: np.ndarray,
) -> None:
    """Scrub, detrend and filter ``series`` (v, T) into ``out`` (v, m), a tile of voxels at a time.

    sos, zi : the filter and its steady state, no sections for no filter; edge : rows of odd extension
    means : (v,) means before detrending, written; flags : (v,) bits set as ``_flag`` does
    """
    voxels, n = series.shape[0], enter.size
    tile = np.empty((n + 2 * edge, LANES))
    state = np.empty((sos.shape[0], 2, LANES))
    mean = np.empty(LANES)
    for v in range(0, voxels, LANES):
        width = min(LANES, voxels - v)
        if width < LANES:
            tile[:] = 0.0
        for lane in range(width):
            for i in range(n):
                tile[edge + i, lane] = series[v + lane, enter[i]]
        _flag(tile, edge, keep, width, flags[v : v + width])
        _fill(tile, edge, fill, start, source, weight)
        mean[:] = 0.0
        for i in range(n):
            for lane in range(LANES):
                mean[lane] += tile[edge + i, lane]
        mean /= n
        means[v : v + width] = mean[:width]
        if detrend and n > 1:
            _detrend(tile, edge, n, mean)
        if sos.shape[0]:
            _odd_ends(tile, edge, n)
            _pass(tile, 0, 1, sos, zi, state)
            _pass(tile, n + 2 * edge - 1, -1, sos, zi, state)
        for lane in range(width):
            for i in range(keep.size):
                out[v + lane, i] = tile[edge + keep[i], lane]


@compiled("void(float64[:, ::1], uint8[::1], boolean, float32[:, :], float64[::1])")
def centre(
    series: np.ndarray, flags: np.ndarray, zscore: bool, out: np.ndarray, means: np.ndarray
) -> None:
    """Write ``series`` (v, m) less its mean into ``out`` (v, m); for ``zscore`` over its deviation too.

    means : (v,), written. A constant voxel's z-score is 0, not the scaled rounding error of a mean.
    """
    m = series.shape[1]
    for v in range(series.shape[0]):
        row = series[v]
        mean, square = 0.0, 0.0
        for i in range(m):
            mean += row[i]
        mean /= m
        means[v] = mean
        for i in range(m):
            square += (row[i] - mean) * (row[i] - mean)
        scale = 1.0
        if zscore:
            deviation = np.sqrt(square / (m - 1))
            if deviation >= 2.220446049250313e-16:  # nilearn's limit; NaN must stay NaN
                scale = 1.0 / deviation
            if flags[v] & CONSTANT:
                scale = 0.0
        for i in range(m):
            out[v, i] = (row[i] - mean) * scale
