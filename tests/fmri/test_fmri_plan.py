"""Decisions before anything is read: what fits, how many workers, which units go together."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mvpa_kit import design_of, planted
from run_kit import mvpa_config

from raypipe.errors import MemoryBudgetExceeded
from raypipe.fmri import inputs as inputs_module
from raypipe.fmri.mvpa import EstimatorConfig, MvpaConfig, decode
from raypipe.fmri.mvpa.estimators import maps_at_most, solver_rows, solver_squares
from raypipe.fmri.plan import (
    Batch,
    Need,
    ScanFacts,
    UnitFacts,
    decide,
    in_order,
    need_of,
    pack,
    parts_of,
    peak_bytes,
    series_bytes,
    split,
)
from raypipe.fmri.units import Target, Unit
from raypipe.memory.config import MemoryFlags, ResolvedMemory, resolve
from raypipe.memory.limits import NodeLimits
from raypipe.runner import Machines

MIB, GIB = 1 << 20, 1 << 30
SCAN = ScanFacts(
    name="bold.nii.gz",
    compressed=True,
    n_volumes=320,
    itemsize=2,
    grid_voxels=91 * 109 * 91,
    masked_voxels=227_000,
    cached=False,
)


def memory(total_gib: int, **flags: str) -> ResolvedMemory:
    limits = NodeLimits(
        physical_bytes=total_gib * GIB,
        cgroup_bytes=None,
        slurm_bytes=None,
        slurm_tasks=None,
        shm_bytes=0,
        shm_free_bytes=0,
    )
    return resolve(MemoryFlags(**flags), environ={}, limits=limits)  # type: ignore[arg-type]


def own(cores: int) -> Machines:
    """One machine, as Ray is started on it."""
    return Machines(nodes=(("", cores),))


def batch(n_rois: int, number: int = 0, subject: str = "01") -> Batch:
    units = tuple(Unit(subject=subject, roi=f"r{i}", target="all") for i in range(n_rois))
    return Batch(
        subject=subject,
        number=number,
        runs=(),
        units=units,
        mapped=frozenset(),
        at_once=n_rois,
        need_bytes=0,
    )


@given(
    needs=st.lists(
        st.builds(
            Need,
            held=st.integers(0, 200 * MIB),
            reading=st.integers(0, 200 * MIB),
            working=st.integers(0, 200 * MIB),
        ),
        max_size=12,
    )
)
def test_every_group_fits_and_every_region_is_in_one(needs: list[Need]) -> None:
    named = {f"r{i}": need for i, need in enumerate(needs)}
    limit = peak_bytes([]) + 500 * MIB
    groups = pack(named, limit)
    assert [roi for group in groups for roi in group] == list(named)
    assert all(peak_bytes([named[roi] for roi in group]) <= limit for group in groups)
    for group, after in pairwise(groups):  # no group could take one more
        assert peak_bytes([named[roi] for roi in (*group, after[0])]) > limit


def test_a_region_that_fits_no_worker_is_refused_before_reading() -> None:
    need = need_of(200_000, [SCAN] * 8, [UnitFacts(n_samples=1000, n_folds=8)], mapped=False)
    with pytest.raises(MemoryBudgetExceeded, match=r"ROI brain needs .* in one worker"):
        pack({"brain": need}, 4 * GIB)


@given(voxels=st.integers(1, 100_000), n_scans=st.integers(1, 12), more=st.integers(1, 1000))
def test_needs_grow_with_voxels_and_mapped_series_are_free(
    voxels: int, n_scans: int, more: int
) -> None:
    unit = UnitFacts(n_samples=100, n_folds=4)
    of = [need_of(v, [SCAN] * n_scans, [unit], mapped=False) for v in (voxels, voxels + more)]
    assert peak_bytes(of[:1]) < peak_bytes(of[1:])
    assert of[0].held == series_bytes(voxels, [SCAN] * n_scans)
    assert need_of(voxels, [SCAN] * n_scans, [unit], mapped=True).held == 0
    keeps = replace(unit, keeps_folds=True, n_folds=50)
    assert need_of(voxels, [SCAN], [keeps], mapped=False).working > 50 * 8 * 100 * voxels
    shown = need_of(voxels, [SCAN] * n_scans, [replace(unit, n_maps=3)], mapped=False)
    assert shown.working - of[0].working >= 2 * 8 * 3 * voxels, "weights and their patterns stay"


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("estimator", ["svc", "sklearn.linear_model.RidgeClassifier"])
def test_a_unit_with_weight_maps_stays_within_its_plan(estimator: str, gaps: bool) -> None:
    """All that NumPy allocates, scikit-learn's arrays too, from the patterns on."""
    voxels, n_folds = 20_000, 4
    config = MvpaConfig(model=EstimatorConfig(estimator=estimator))
    decode(*planted(3), config, weights=True)  # what is imported and compiled is planned apart
    patterns, design = planted(3, n_voxels=voxels)
    patterns[:, 3::50] = np.nan if gaps else 0.0
    tracemalloc.start()
    try:
        found = decode(patterns.copy(), design, config, weights=True).weights
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found is not None and np.isnan(found.weights).any() == gaps
    unit = UnitFacts(
        n_samples=len(design), n_folds=n_folds, keeps_folds=estimator != "svc", n_maps=3
    )
    planned = need_of(voxels, [SCAN], [unit], mapped=False).working
    assert planned / 3 < peak <= planned


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_logistic_unit_stays_within_its_plan(n_classes: int, weights: bool) -> None:
    """Few samples, so that most of it is the solver's."""
    voxels, model = 20_000, EstimatorConfig(estimator="logistic")
    config = MvpaConfig(model=model)
    decode(*planted(n_classes, 2, 2), config, weights=weights)
    patterns, design = planted(n_classes, 2, 2, n_voxels=voxels)
    tracemalloc.start()
    try:
        decode(patterns.copy(), design, config, weights=weights)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    unit = UnitFacts(
        n_samples=len(design), n_folds=2, keeps_folds=True,
        n_maps=maps_at_most(model, n_classes) if weights else 0,
        solver_rows=solver_rows(model, n_classes, len(design)),
    )  # fmt: skip
    planned = need_of(voxels, [SCAN], [unit], mapped=False).working
    assert planned / 3 < peak <= planned


IMPORTED = "sklearn.discriminant_analysis.LinearDiscriminantAnalysis"


@pytest.mark.parametrize(
    ("estimator", "params", "voxels", "n_classes"),
    [
        ("lda", "", 50, 3), ("lda", "", 300, 3), ("lda", "", 600, 2),
        (IMPORTED, "solver=lsqr shrinkage=0.5", 300, 3), (IMPORTED, "solver=lsqr", 300, 3),
        (IMPORTED, "solver=eigen shrinkage=auto", 300, 3), (IMPORTED, "", 300, 3),
        ("sklearn.discriminant_analysis.QuadraticDiscriminantAnalysis",
         "solver=eigen shrinkage=auto", 200, 4),
    ],
)  # fmt: skip
def test_a_model_with_covariances_stays_within_its_plan(
    estimator: str, params: str, voxels: int, n_classes: int
) -> None:
    """With permutations: a model that was fitted is gone before the next one. What compiled code holds
    is in no trace: test_mvpa_solver_memory asks the process.
    """
    model = EstimatorConfig(estimator=estimator, params=tuple(params.split()))
    config = MvpaConfig(model=model, n_permutations=2, scores=("accuracy",))
    patterns, design = planted(n_classes, 3, 8, n_voxels=voxels)
    decode(patterns[:, :20], design, config)
    tracemalloc.start()
    try:
        decode(patterns.copy(), design, config)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    unit = UnitFacts(
        n_samples=len(design), n_folds=3, keeps_folds=True,
        solver_rows=solver_rows(model, n_classes, len(design)),
        solver_squares=solver_squares(model, n_classes),
    )  # fmt: skip
    planned = need_of(voxels, [SCAN], [unit], mapped=False).working
    assert planned / 1.5 < peak <= planned


def test_a_covariance_that_no_worker_holds_is_refused(tmp_path: Path) -> None:
    """12,000 voxels and 40 samples: 70 MiB of patterns and Gram matrices, 4.3 GiB of covariances."""
    labels = np.tile(np.array(["a", "b"]), 20)
    design = design_of(labels, np.repeat(np.arange(4), 10))
    needs = {}
    for estimator in ("svc", "lda"):
        mvpa = MvpaConfig(model=EstimatorConfig(estimator=estimator))
        cfg = mvpa_config(tmp_path, tmp_path, mvpa=mvpa)
        facts = inputs_module._unit_facts(cfg, Target(name="all"), design)
        needs[estimator] = need_of(12_000, [SCAN], [facts], mapped=False)
    assert pack({"V1": needs["svc"]}, 2 * GIB) == [("V1",)]
    with pytest.raises(MemoryBudgetExceeded, match=r"ROI V1 needs 4\.\d+ GiB in one worker"):
        pack({"V1": needs["lda"]}, 2 * GIB)


@pytest.mark.parametrize(
    ("cores", "n_units", "largest", "workers"),
    [(8, 100, GIB, 8), (8, 3, GIB, 3), (2, 100, GIB, 2), (8, 100, 4 * GIB, 3), (8, 1, GIB, 1)],
)
def test_as_many_workers_as_cores_units_and_memory_allow(
    cores: int, n_units: int, largest: int, workers: int
) -> None:
    found = decide(
        memory(20), machines=own(cores), asked=None, n_units=n_units, largest_bytes=largest
    )
    assert found.workers == workers
    assert largest <= found.limit_bytes < found.budget_bytes
    assert found.workers * found.budget_bytes <= 16 * GIB  # a fifth is left alone


def test_a_stated_number_of_workers_is_kept_or_refused() -> None:
    assert decide(memory(20), machines=own(1), asked=4, n_units=9, largest_bytes=GIB).workers == 4
    with pytest.raises(MemoryBudgetExceeded, match=r"largest unit needs 4.00 GiB.*4 worker"):
        decide(memory(20), machines=own(8), asked=4, n_units=9, largest_bytes=4 * GIB)
    small = memory(20, max_memory_per_process="1GiB")
    with pytest.raises(MemoryBudgetExceeded, match=r"largest unit needs 1.00 GiB"):
        decide(small, machines=own(8), asked=None, n_units=9, largest_bytes=GIB)


@given(
    nodes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=5),
    n_units=st.integers(1, 60),
    largest=st.integers(1, 9 * GIB),
)
def test_a_cluster_gets_as_many_workers_as_its_machines_hold(
    nodes: list[tuple[str, int]], n_units: int, largest: int
) -> None:
    """Against a plain packing: Ray fills node after node with workers of so many cores."""
    machines = Machines(nodes=tuple(nodes), grows=True)
    try:
        found = decide(
            memory(20), machines=machines, asked=None, n_units=n_units, largest_bytes=largest
        )
    except MemoryBudgetExceeded:
        assert decide_limit(1) < largest
        return
    packed: dict[str, int] = dict.fromkeys("abc", 0)
    for name, cores in nodes:
        free = float(cores)
        while free >= found.cores:
            free, packed[name] = free - found.cores, packed[name] + 1
    room = sum(packed.values())
    assert found.workers <= max(1, min(n_units, sum(cores for _, cores in nodes)))
    assert found.workers <= max(1, room)
    most = min(found.workers, max(packed.values()) or found.workers)
    assert most * found.budget_bytes <= 16 * GIB
    assert largest <= found.limit_bytes


def decide_limit(workers: int) -> int:
    return decide(
        memory(20), machines=own(9), asked=workers, n_units=9, largest_bytes=1
    ).limit_bytes


def test_workers_of_a_cluster_are_those_of_all_its_nodes() -> None:
    two = Machines(nodes=(("a", 8), ("b", 8)), grows=True)
    found = decide(memory(80), machines=two, asked=None, n_units=100, largest_bytes=GIB)
    assert (found.workers, found.cores) == (16, 1)
    spread = decide(memory(80), machines=two, asked=None, n_units=4, largest_bytes=GIB)
    assert (spread.workers, spread.cores) == (4, 4), "two on each, not four on one"
    large = decide(memory(20), machines=two, asked=None, n_units=100, largest_bytes=4 * GIB)
    assert (large.workers, large.cores) == (4, 4), "of more, four would meet on one machine"
    one_machine = Machines(nodes=(("a", 8), ("a", 8)), grows=True)
    shared = decide(memory(20), machines=one_machine, asked=None, n_units=99, largest_bytes=4 * GIB)
    assert shared.workers == 3, "two nodes of Ray, one machine's memory"
    more = decide(memory(80), machines=two, asked=20, n_units=99, largest_bytes=GIB)
    assert (more.workers, more.cores) == (20, 1), "a cluster may grow"
    here = decide(memory(80), machines=own(2), asked=4, n_units=99, largest_bytes=GIB)
    assert (here.workers, here.cores) == (4, 0.5), "this machine does not: all four get a place"


def test_the_decision_is_told_in_one_line() -> None:
    line = decide(memory(20), machines=own(2), asked=None, n_units=9, largest_bytes=GIB).line(GIB)
    assert "2 worker(s) of 8.00 GiB" in line
    assert "from 1.00 GiB on are mapped" in line
    off = memory(20, use_memmap="no")
    assert "nothing is mapped" in decide(
        off, machines=own(1), asked=None, n_units=1, largest_bytes=1
    ).line(1)


@given(n=st.integers(1, 40), parts=st.integers(1, 60))
def test_split_loses_nothing_and_is_even(n: int, parts: int) -> None:
    units = [Unit(subject="1", roi=f"{i}") for i in range(n)]
    cut = split(units, parts)
    assert [unit for part in cut for unit in part] == units
    sizes = {len(part) for part in cut}
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert len(cut) == min(n, parts)


def test_scans_are_unpacked_once_but_all_workers_get_work() -> None:
    cached = parts_of(9, streamed=False, may_store=True, workers=4, subjects=2)
    assert cached == 9  # from the cache, each unit is an item of its own
    assert parts_of(9, streamed=True, may_store=True, workers=4, subjects=8) == 1
    assert parts_of(9, streamed=True, may_store=True, workers=4, subjects=1) == 4
    assert parts_of(9, streamed=True, may_store=False, workers=4, subjects=1) == 1


def test_workers_unpack_different_subjects_first() -> None:
    counts = (("a", 3), ("b", 1), ("c", 2))
    lists = [[batch(1, n, subject) for n in range(count)] for subject, count in counts]
    keys = [one.key for one in in_order(lists, {"b", "c"})]
    assert keys == [("b", 0), ("c", 0), ("a", 0), ("a", 1), ("a", 2), ("c", 1)]


def test_less_memory_means_fewer_regions_at_once_down_to_one() -> None:
    seen = [batch(5)]
    while seen[-1].at_once > 1:
        seen.append(seen[-1].with_less_memory())
    assert [one.at_once for one in seen] == [5, 3, 2, 1]
    assert {one.key for one in seen} == {("01", 0)}
    with pytest.raises(MemoryBudgetExceeded, match="one ROI of subject 01"):
        seen[-1].with_less_memory()
    assert batch(5).at_most(seen[1]).at_once == 3
    assert batch(2).at_most(seen[1]).at_once == 2
