"""A linear support vector machine on a given Gram matrix, for many label vectors; compiled.

scikit-learn's SVC spends most of a small fit on checks, copies and its kernel cache. On one Gram matrix a
fold, of 1000 voxels, it gains 4.9 to 6.8 times over refitting scaler and SVC at 216 samples, where this
gains 12 to 18; 4.8 and 5.1 at 864 (benchmarks/fmri.py, perm_svc_*). A permutation test is to be 5 times
faster at least, and the library alone is on that line: so this is kept.
It is the same problem by the same algorithm as LIBSVM's: sequential minimal optimisation with second-order
choice of the pair (Fan, Chen and Lin 2005), shrinking, inner products in float32, the same start and
tolerance. So it goes the same way and ends in the same place, not only near the same optimum, but where two
steps are equally good (a few voxels of noise): there rounding chooses, and both end within the tolerance.
With no weight strictly between the bounds any offset of an interval is optimal: this takes its middle;
LIBSVM, when rounding leaves it a weight of 1e-16, an edge.
Importing this compiles it (see ``raypipe.fmri.compiled``).
"""

from __future__ import annotations

import numpy as np

from raypipe.fmri.compiled import compiled

TOLERANCE = 1e-3  # of the optimality conditions; LIBSVM's
_TINY = 1e-12  # stands for a curvature of 0 between two samples with one pattern
_STEPS_PER_SAMPLE = 100_000  # never reached in practice; LIBSVM's bound is ten million steps


@compiled("void(float64[::1], int64, float64, float64)")
def _shift(alpha: np.ndarray, t: int, by: float, c: float) -> None:
    """Add ``by`` to alpha[t]; at a bound it is exactly that bound."""
    value = alpha[t] + by
    edge = 1e-12 * c
    alpha[t] = 0.0 if value <= edge else c if value >= c - edge else value


@compiled("float64(float64[::1], float64[::1], float64[::1], float64)")
def _offset(sign: np.ndarray, alpha: np.ndarray, pull: np.ndarray, c: float) -> float:
    """The mean pull of samples between the bounds, or the middle of what the bounds allow."""
    total, free, low, high = 0.0, 0, -np.inf, np.inf
    for t in range(sign.size):
        if 0.0 < alpha[t] < c:
            total += pull[t]
            free += 1
        elif (alpha[t] <= 0.0) == (sign[t] > 0):  # may go up only
            low = max(low, pull[t])
        else:
            high = min(high, pull[t])
    return total / free if free else (low + high) / 2.0


@compiled(
    "UniTuple(float64, 2)(float64[::1], float64[::1], float64[::1], float64, int64[::1], int64)"
)
def _limits(
    sign: np.ndarray, alpha: np.ndarray, pull: np.ndarray, c: float, live: np.ndarray, n_live: int
) -> tuple[float, float]:
    """The largest pull of what may go up, the smallest of what may go down, among live samples."""
    high, low = -np.inf, np.inf
    for a in range(n_live):
        t = live[a]
        if alpha[t] < c if sign[t] > 0 else alpha[t] > 0.0:
            high = max(high, pull[t])
        if alpha[t] > 0.0 if sign[t] > 0 else alpha[t] < c:
            low = min(low, pull[t])
    return high, low


@compiled(
    "int64(float64[::1], float64[::1], float64[::1], float64, float64, float64, int64[::1], int64)"
)
def _shrink(
    sign: np.ndarray,
    alpha: np.ndarray,
    pull: np.ndarray,
    c: float,
    high: float,
    low: float,
    live: np.ndarray,
    n_live: int,
) -> int:
    """Set aside samples at a bound that will hardly leave it; return how many stay live (in front)."""
    a = 0
    while a < n_live:
        t = live[a]
        at_zero, at_c = alpha[t] <= 0.0, alpha[t] >= c
        only_down = at_c if sign[t] > 0 else at_zero
        only_up = at_zero if sign[t] > 0 else at_c
        if (only_down and pull[t] > high) or (only_up and pull[t] < low):
            n_live -= 1
            live[a], live[n_live] = live[n_live], t
        else:
            a += 1
    return n_live


@compiled("void(float32[:, ::1], float64[::1], float64[::1], float64[::1], int64[::1], int64)")
def _recall(
    gram: np.ndarray,
    sign: np.ndarray,
    alpha: np.ndarray,
    pull: np.ndarray,
    live: np.ndarray,
    n_live: int,
) -> None:
    """Compute the pull of the samples that were set aside."""
    for a in range(n_live, sign.size):
        t = live[a]
        total = sign[t]
        for k in range(sign.size):
            total -= alpha[k] * sign[k] * np.float64(gram[t, k])
        pull[t] = total


@compiled(
    "Tuple((int64, int64, float64))(float32[:, ::1], float64[::1], float64[::1], float64[::1],"
    " float64[::1], float64, int64[::1], int64)"
)
def _choose(
    gram: np.ndarray,
    square: np.ndarray,
    sign: np.ndarray,
    alpha: np.ndarray,
    pull: np.ndarray,
    c: float,
    live: np.ndarray,
    n_live: int,
) -> tuple[int, int, float]:
    """(i, j, gap): i may go up and is pulled most, j may go down and gains most with it; j -1 for none."""
    i, high = -1, -np.inf
    for a in range(n_live):
        t = live[a]
        up = alpha[t] < c if sign[t] > 0 else alpha[t] > 0.0
        if up and pull[t] >= high:
            i, high = t, pull[t]
    j, low, best = -1, np.inf, 0.0
    for a in range(n_live):
        t = live[a]
        down = alpha[t] > 0.0 if sign[t] > 0 else alpha[t] < c
        if down:
            low = min(low, pull[t])
            gap = high - pull[t]
            if gap > 0:
                gain = gap * gap / max(square[i] + square[t] - 2.0 * gram[i, t], _TINY)
                if gain >= best:
                    j, best = t, gain
    return i, j, high - low


@compiled(
    "Tuple((float64, int64))(float32[:, ::1], float64[::1], float64[::1], float64, float64,"
    " float64[::1], float64[::1], int64[::1])"
)
def solve(
    gram: np.ndarray,
    square: np.ndarray,
    sign: np.ndarray,
    c: float,
    tolerance: float,
    alpha: np.ndarray,
    pull: np.ndarray,
    live: np.ndarray,
) -> tuple[float, int]:
    """Fit two classes; return the offset and the number of steps, -1 if they did not suffice.

    gram : (n, n) float32; square : (n,) its diagonal; sign : (n,) -1 or 1
    alpha : (n,) weights in 0..c, written; pull, live : (n,) work space
    The decision of x is sum(alpha * sign * k(x, .)) - offset.
    """
    n = sign.size
    for t in range(n):
        alpha[t], pull[t], live[t] = 0.0, sign[t], t  # pull is -sign times the gradient
    n_live, until, recalled = n, min(n, 1000) + 1, False
    for step in range(_STEPS_PER_SAMPLE * n):
        until -= 1
        if until == 0:
            until = min(n, 1000)
            high, low = _limits(sign, alpha, pull, c, live, n_live)
            if not recalled and high - low <= 10 * tolerance:
                recalled = True
                _recall(gram, sign, alpha, pull, live, n_live)
                n_live = n
            n_live = _shrink(sign, alpha, pull, c, high, low, live, n_live)
        i, j, gap = _choose(gram, square, sign, alpha, pull, c, live, n_live)
        if j < 0 or gap < tolerance:
            _recall(gram, sign, alpha, pull, live, n_live)
            n_live = n
            i, j, gap = _choose(gram, square, sign, alpha, pull, c, live, n_live)
            if j < 0 or gap < tolerance:
                return -_offset(sign, alpha, pull, c), step
            until = 1
        move = (pull[i] - pull[j]) / max(square[i] + square[j] - 2.0 * gram[i, j], _TINY)
        move = min(move, c - alpha[i] if sign[i] > 0 else alpha[i])
        move = min(move, alpha[j] if sign[j] > 0 else c - alpha[j])
        _shift(alpha, i, sign[i] * move, c)
        _shift(alpha, j, -sign[j] * move, c)
        if n_live == n:
            for t in range(n):
                pull[t] -= move * (np.float64(gram[i, t]) - np.float64(gram[j, t]))
        else:
            for a in range(n_live):
                t = live[a]
                pull[t] -= move * (np.float64(gram[i, t]) - np.float64(gram[j, t]))
    return -_offset(sign, alpha, pull, c), -1


@compiled(
    "int64(float64[:, ::1], float64[:, ::1], int64[:, ::1], int64, float64, float64,"
    " float64[:, :, ::1])"
)
def decide(
    gram: np.ndarray,
    test: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    c: float,
    tolerance: float,
    out: np.ndarray,
) -> int:
    """Fit every pair of classes for every label vector; return how many fits did not converge.

    gram : (n, n); test : (m, n) inner products with the training samples; labels : (p, n)
    out : (p, m, n_pairs) decisions, above 0 for the first class of the pair, written
    """
    n, failed = gram.shape[0], 0
    own, part, diagonal = np.empty(n, np.int64), np.empty(n * n, np.float32), np.empty(n)
    sign, alpha, pull, live = np.empty(n), np.empty(n), np.empty(n), np.empty(n, np.int64)
    for p in range(labels.shape[0]):
        pair = 0
        for a in range(n_classes):
            for b in range(a + 1, n_classes):
                size = 0
                for k in (a, b):  # ordered by class, as LIBSVM does
                    for t in range(n):
                        if labels[p, t] == k:
                            own[size], sign[size] = t, 1.0 if k == a else -1.0
                            size += 1
                inner = part[: size * size].reshape(size, size)
                for s in range(size):
                    diagonal[s] = gram[own[s], own[s]]
                    for t in range(size):
                        inner[s, t] = gram[own[s], own[t]]
                offset, steps = solve(
                    inner,
                    diagonal[:size],
                    sign[:size],
                    c,
                    tolerance,
                    alpha[:size],
                    pull[:size],
                    live[:size],
                )
                failed += steps < 0
                for x in range(test.shape[0]):
                    total = -offset
                    for s in range(size):
                        total += alpha[s] * sign[s] * test[x, own[s]]
                    out[p, x, pair] = total
                pair += 1
    return failed
