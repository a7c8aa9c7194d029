"""``score_block``: cross-validated scores of every sphere of a block, with runs held out.

Voxels are read once a block and scaled once a fold, for all its spheres. Models, folds, permutations
and scores are those of ``raypipe.fmri.mvpa``; permutation i is the same in every sphere, so the highest
score of each over all spheres corrects for their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError
from raypipe.fmri.mvpa import Design, EstimatorConfig, Fold, MvpaConfig, make_folds
from raypipe.fmri.mvpa.decode import score_names
from raypipe.fmri.mvpa.engines import (
    Answers,
    Engine,
    RefitEngine,
    RidgeEngine,
    SvcEngine,
    SvrEngine,
    scaled,
)
from raypipe.fmri.mvpa.estimators import check_fits
from raypipe.fmri.mvpa.folds import mixing_danger
from raypipe.fmri.mvpa.permute import count_reached, permutations
from raypipe.fmri.mvpa.scores import rate
from raypipe.fmri.searchlight.gram import GramWalk
from raypipe.fmri.searchlight.plan import Block, SearchlightConfig
from raypipe.fmri.sources import SeriesSource, Voxels

Floats = NDArray[np.float64]

_RATED_AT_ONCE = 4 << 20  # bytes of predictions that are collected before they are rated


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockScores:
    """What a block found.

    centres : (n,) flat indices; n_voxels : (n,) finite voxels of each sphere
    scores : score -> (n,), mean over folds, NaN for a sphere without voxels
    reached : score -> (n,) permutations that score as high or higher
    null_max : score -> (n_permutations,) the highest score of any sphere of the block
    """

    number: int
    centres: Voxels
    n_voxels: NDArray[np.int64]
    scores: Mapping[str, Floats]
    reached: Mapping[str, NDArray[np.int64]]
    null_max: Mapping[str, Floats]
    warning: str | None = None


def score_block(
    block: Block, reader: SeriesSource, design: Design, config: SearchlightConfig
) -> BlockScores:
    """Read the block's voxels and score its spheres. design : of the reader's volumes."""
    decode = config.decode
    check_fits(decode.model, design.is_classes)
    names, folds = score_names(design, decode), make_folds(design, decode)
    patterns = design.samples(reader.read(block.voxels))  # (n_samples, n_voxels)
    finite = np.logical_and.reduce(np.isfinite(patterns), axis=0)
    patterns[:, ~finite] = 0.0
    members = [part[finite[part]] for part in map(block.spheres.of, range(len(block.centres)))]
    labels = _labels(design, decode)
    tally = _Tally(names, len(members), labels)
    for fold in folds:
        _score_fold(patterns, members, fold, decode, tally)
    found = tally.means()
    return BlockScores(
        number=block.number,
        centres=block.centres,
        n_voxels=np.array([part.size for part in members], np.int64),
        scores={name: each[:, 0] for name, each in found.items()},
        reached={name: count_reached(each[:, 0], each[:, 1:]) for name, each in found.items()},
        null_max={name: _highest(each[:, 1:]) for name, each in found.items()},
        warning=mixing_danger(folds, design, patterns[:, finite]),
    )


def _labels(design: Design, config: MvpaConfig) -> NDArray[np.generic]:
    """(1 + n_permutations, n_samples): the labels as they are, then permuted."""
    labels = design.encoded()
    if config.n_permutations == 0:
        return labels[np.newaxis]
    drawn = permutations(design, config.n_permutations, exchange=config.exchange, seed=config.seed)
    return np.concatenate((labels[np.newaxis], labels[drawn]))


def _score_fold(
    patterns: Floats,
    members: Sequence[NDArray[np.int32]],
    fold: Fold,
    config: MvpaConfig,
    tally: _Tally,
) -> None:
    """Fit and test all spheres; patterns : (n_samples, n_voxels)."""
    order = np.concatenate((fold.train, fold.test))
    both = scaled(patterns, Fold(train=fold.train, test=order), config.scale)[1]
    voxel_major = np.ascontiguousarray(both.T)  # a sphere's voxels are runs of memory
    walk = GramWalk(voxel_major, len(fold.train))
    for sphere, own in enumerate(members):
        if own.size:
            tally.add(sphere, fold, sphere_engine(voxel_major, own, walk, fold, config.model))
    tally.rate(fold)


def sphere_engine(
    patterns: Floats,
    members: NDArray[np.int32],
    walk: GramWalk,
    fold: Fold,
    model: EstimatorConfig,
) -> Engine:
    """By the Gram matrix where the model needs it, or where it is the smaller system."""
    n = len(fold.train)
    ridge = model.estimator in ("ridge", "ridge_classifier")
    if model.estimator in ("svc", "svr") or (ridge and members.size >= n):
        gram = walk.at(members)
        made = {"svc": SvcEngine, "svr": SvrEngine}.get(model.estimator, RidgeEngine)
        engine: Engine = made.of_gram(gram[:n], gram[n:], fold, model)  # type: ignore[attr-defined]
        return engine
    own = patterns[members].T
    if ridge:
        return RidgeEngine(own[:n], own[n:], fold, model)
    return RefitEngine(own[:n], own[n:], fold, model.build())


class _Tally:
    """Scores of spheres and label vectors, added up over the folds in which they are defined.

    Predictions are collected and rated many at a time: rating one alone costs more than the fit.
    """

    def __init__(self, names: Sequence[str], n_spheres: int, labels: NDArray[np.generic]) -> None:
        """labels : (p, n_samples), the true ones first."""
        shape = (n_spheres, len(labels))
        self._labels = labels
        self._total = {name: np.zeros(shape) for name in names}
        self._count = {name: np.zeros(shape, np.int64) for name in names}
        self._rows: list[int] = []
        self._answers: list[Answers] = []
        self._bytes = 0

    def add(self, sphere: int, fold: Fold, engine: Engine) -> None:
        """Take the answers of a sphere to all label vectors."""
        answers = engine.answer(self._labels)
        self._rows.append(sphere)
        self._answers.append(answers)
        self._bytes += answers.predicted.nbytes
        self._bytes += 0 if answers.decision is None else answers.decision.nbytes
        if self._bytes >= _RATED_AT_ONCE:
            self.rate(fold)

    def rate(self, fold: Fold) -> None:
        """Rate what was collected, all of one fold."""
        if not self._rows:
            return
        true = np.tile(self._labels[:, fold.test], (len(self._rows), 1))
        predicted = np.concatenate([one.predicted for one in self._answers])
        given = [one.decision for one in self._answers if one.decision is not None]
        decision = np.concatenate(given) if given else None
        for name, total in self._total.items():
            values = rate(name, true, predicted, decision).reshape(len(self._rows), -1)
            defined = ~np.isnan(values)
            total[self._rows] += np.where(defined, values, 0.0)
            self._count[name][self._rows] += defined
        self._rows, self._answers, self._bytes = [], [], 0

    def means(self) -> dict[str, Floats]:
        """Score -> (n_spheres, p) means over folds; NaN where none is defined."""
        return {
            name: np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
            for (name, total), count in zip(self._total.items(), self._count.values(), strict=True)
        }


def _highest(null: Floats) -> Floats:
    """(n, p) -> (p,) highest over spheres; -infinity where none is defined."""
    return np.where(np.isnan(null), -np.inf, null).max(axis=0, initial=-np.inf)


class SearchlightWorker:
    """What a runner hands blocks to: opened once, called per block."""

    def __init__(self, reader: SeriesSource, design: Design, config: SearchlightConfig) -> None:
        if len(design.volumes) and design.volumes.max() >= reader.n_volumes:
            raise InputError(
                f"the design names volume {design.volumes.max()}, the series {reader.n_volumes}; they "
                "are of different scans"
            )
        self._reader, self._design, self._config = reader, design, config

    def __call__(self, block: Block) -> BlockScores:
        return score_block(block, self._reader, self._design, self._config)
