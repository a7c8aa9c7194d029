"""Labels or events -> a design. The haemodynamic delay is always said: it has no default.

A neural event shows in the signal some 4 to 6 s later. Which volumes count for it is therefore a choice
of the analysis; trial-wise betas, where the response's shape is a model, are made elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raypipe.errors import ConfigError, InputError
from raypipe.fmri.mvpa.design import Design, Rows
from raypipe.read.events import Events

Each = Literal["volume", "trial"]


def design_of_volumes(
    labels: ArrayLike,
    runs: ArrayLike,
    *,
    delay_volumes: int,
    rest: Sequence[str] = ("rest",),
    each: Each = "volume",
    trials: bool = False,
) -> Design:
    """A design of one label a volume; volumes labelled ``rest`` are no samples.

    labels, runs : (T,); the volume v takes the label of v - delay_volumes if that is in its run
    each : a sample a volume, or a sample a stretch of one label (a block)
    trials : each volume is one (betas): two of one label in a row are no block, and their labels
    are permuted one by one
    """
    names, numbers = np.asarray(labels), np.asarray(runs, np.int64)
    if names.ndim != 1 or names.shape != numbers.shape:
        raise InputError(
            f"{names.shape} labels and {numbers.shape} runs; give one of each a volume"
        )
    if delay_volumes < 0:
        raise ConfigError(
            f"delay of {delay_volumes} volumes is below 0; the response follows the event"
        )
    target = np.arange(len(names))
    source = target - delay_volumes
    valid = (source >= 0) & (numbers[np.maximum(source, 0)] == numbers)
    if names.dtype.kind in "USO":
        valid[valid] = ~np.isin(names[source[valid]].astype(str), list(rest))
    volumes, shown = target[valid], source[valid]
    labels_of = (
        names[shown].astype(np.str_) if names.dtype.kind in "USO" else names[shown].astype(float)
    )
    blocks = (target if trials else _stretches(names, numbers))[shown]
    one_each = Design(
        labels=labels_of,
        runs=numbers[volumes],
        blocks=blocks,
        start=np.arange(len(volumes) + 1, dtype=np.int64),
        volumes=volumes.astype(np.int64),
    )
    return one_each if each == "volume" else _merged(one_each)


def design_of_events(
    events: Sequence[Events],
    n_volumes: Sequence[int],
    *,
    t_r_s: float,
    delay_s: float,
    each: Each = "trial",
    keep: Sequence[str] = (),
) -> Design:
    """A design of events.tsv, one a run, over runs of ``n_volumes`` put end to end.

    A volume, its time being the middle of its acquisition, belongs to an event when it lies within
    [onset + delay, onset + delay + duration); an event shorter than a TR has the one nearest volume.
    keep : trial types that are samples; all when empty
    """
    if len(events) != len(n_volumes):
        raise InputError(f"{len(events)} events tables for {len(n_volumes)} runs; give one a run")
    if not t_r_s > 0 or delay_s < 0:
        raise ConfigError(f"t_r_s {t_r_s} and delay_s {delay_s} must be above 0, and 0 or above")
    labels: list[str] = []
    runs: list[int] = []
    parts: list[Rows] = []
    first = 0
    for run, (table, n) in enumerate(zip(events, n_volumes, strict=True)):
        for onset, duration, kind in zip(
            table.onset_s, table.duration_s, table.trial_type, strict=True
        ):
            volumes = _volumes_of(onset + delay_s, duration, t_r_s, n)
            if volumes.size and (not keep or kind in keep):
                labels.append(str(kind))
                runs.append(run)
                parts.append(volumes + first)
        first += n
    return _of_trials(labels, runs, parts, each)


def _merged(design: Design) -> Design:
    """One sample a block: the mean of its volumes."""
    order = np.argsort(design.blocks, kind="stable")
    _, first, count = np.unique(design.blocks[order], return_index=True, return_counts=True)
    head = order[first]
    return Design(
        labels=design.labels[head],
        runs=design.runs[head],
        blocks=design.blocks[head],
        start=np.concatenate(([0], np.cumsum(count))).astype(np.int64),
        volumes=design.volumes[order],
    )


def _volumes_of(begin_s: float, duration_s: float, t_r_s: float, n_volumes: int) -> Rows:
    """The volumes whose middle lies in [begin, begin + duration), or the nearest to its middle."""
    low = int(np.ceil(begin_s / t_r_s - 0.5))
    high = int(np.ceil((begin_s + duration_s) / t_r_s - 0.5))
    if high <= low:
        low = int(np.floor((begin_s + duration_s / 2) / t_r_s))
        high = low + 1
    return np.arange(max(low, 0), min(high, n_volumes), dtype=np.int64)


def _of_trials(labels: list[str], runs: list[int], parts: list[Rows], each: Each) -> Design:
    count = np.array([len(part) for part in parts], np.int64)
    repeat = count if each == "volume" else np.ones(len(parts), np.int64)
    volumes = np.concatenate([np.empty(0, np.int64), *parts])
    size = np.ones(len(volumes), np.int64) if each == "volume" else count
    return Design(
        labels=np.repeat(np.array(labels, dtype=np.str_), repeat),
        runs=np.repeat(np.array(runs, np.int64), repeat),
        blocks=np.repeat(np.arange(len(parts)), repeat),
        start=np.concatenate(([0], np.cumsum(size))).astype(np.int64),
        volumes=volumes,
    )


def _stretches(labels: NDArray[np.generic], runs: Rows) -> Rows:
    """(T,) the number of the unbroken stretch of one label in one run."""
    change = (labels[1:] != labels[:-1]) | (runs[1:] != runs[:-1])
    return np.concatenate(([0], np.cumsum(change))).astype(np.int64)
