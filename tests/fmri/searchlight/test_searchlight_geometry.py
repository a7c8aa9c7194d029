"""Spheres against a plain loop over all pairs of voxels; blocks cover all centres once, within budget."""

from __future__ import annotations

import itertools
import pickle

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.errors import ConfigError, InputError, MemoryBudgetExceeded
from raypipe.fmri.masks import Grid, sphere_voxels
from raypipe.fmri.searchlight import SearchlightConfig, plan_searchlight
from raypipe.fmri.searchlight.geometry import inside_mask, sphere_offsets, spheres
from raypipe.fmri.searchlight.plan import block_bytes


def _loop(centre: int, mask: np.ndarray, grid: Grid, radius_mm: float) -> list[int]:
    """The mask's voxels within the radius of a centre: the distance of every one."""
    ijk = np.stack(np.unravel_index(np.append(mask, centre), grid.shape))
    places = nibabel.affines.apply_affine(grid.affine, ijk.T)
    far = np.linalg.norm(places[:-1] - places[-1], axis=1)
    return [int(voxel) for voxel, mm in zip(mask, far, strict=True) if mm <= radius_mm + 1e-8]


@st.composite
def _worlds(draw: st.DrawFn) -> tuple[Grid, np.ndarray, float]:
    """A small grid, oblique and anisotropic, a mask on it and a radius."""
    shape = tuple(draw(st.integers(1, 5)) for _ in range(3))
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(rng.uniform(1, 4, 3))
    if draw(st.booleans()):
        affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ affine[:3, :3]
        affine[0, 1] += draw(st.sampled_from([0.0, 0.7]))  # sheared
    affine[:3, 3] = rng.uniform(-90, 90, 3)
    size = int(np.prod(shape))
    mask = np.flatnonzero(rng.random(size) < draw(st.sampled_from([0.3, 1.0])))
    mask = mask if mask.size else np.array([size - 1])
    return Grid(shape=shape, affine=affine), mask, draw(st.floats(0.5, 9.0))  # type: ignore[arg-type]


@given(_worlds())
@settings(max_examples=60)
def test_spheres_hold_what_a_plain_loop_finds(world: tuple[Grid, np.ndarray, float]) -> None:
    grid, mask, radius_mm = world
    found = spheres(mask, sphere_offsets(grid, radius_mm), inside_mask(mask, grid), grid)
    assert len(found) == len(mask)
    for i, centre in enumerate(mask):
        assert found.voxels[found.of(i)].tolist() == _loop(centre, mask, grid, radius_mm)
    assert (np.diff(found.voxels) > 0).all()


def test_a_whole_step_away_is_inside_and_one_mask_agrees_with_masks() -> None:
    grid = Grid(shape=(7, 7, 7), affine=np.diag([3.0, 3.0, 3.0, 1.0]))
    assert len(sphere_offsets(grid, 3.0)) == 7
    assert len(sphere_offsets(grid, 2.9)) == 1
    assert len(sphere_offsets(grid, 6.0)) == 33
    everything = np.arange(343)
    centre = np.ravel_multi_index((3, 3, 3), grid.shape)
    own = spheres(
        np.array([centre]), sphere_offsets(grid, 7.5), inside_mask(everything, grid), grid
    )
    np.testing.assert_array_equal(own.voxels, sphere_voxels((9, 9, 9), 7.5, grid))


@given(_worlds(), st.integers(1, 9), st.integers(1, 40))
@settings(max_examples=60)
def test_blocks_hold_every_centre_once_within_budget(
    world: tuple[Grid, np.ndarray, float], most: int, voxels: int
) -> None:
    grid, mask, radius_mm = world
    offsets = sphere_offsets(grid, radius_mm)
    budget = block_bytes(voxels, len(offsets), 50, 8)
    config = SearchlightConfig(radius_mm=radius_mm, centres_a_block=most, budget_bytes=budget)
    largest = max(len(_loop(centre, mask, grid, radius_mm)) for centre in mask)
    if largest > voxels:
        with pytest.raises(MemoryBudgetExceeded, match="a smaller radius"):
            plan_searchlight(mask, grid, config, n_volumes=50, n_samples=8)
        return
    plan = plan_searchlight(mask, grid, config, n_volumes=50, n_samples=8)
    blocks = [pickle.loads(pickle.dumps(block)) for block in plan.blocks()]
    assert [block.number for block in blocks] == list(range(len(plan)))
    assert sorted(itertools.chain(*(block.centres for block in blocks))) == mask.tolist()
    for block in blocks:
        assert len(block.centres) <= most
        assert len(block.voxels) <= voxels
        for i, centre in enumerate(block.centres):
            assert block.voxels[block.spheres.of(i)].tolist() == _loop(
                centre, mask, grid, radius_mm
            )


def test_a_block_is_a_lump_walked_from_neighbour_to_neighbour() -> None:
    grid = Grid(shape=(16, 16, 16), affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    config = SearchlightConfig(radius_mm=6.0, centres_a_block=512)
    plan = plan_searchlight(np.arange(4096), grid, config, n_volumes=10, n_samples=10)
    assert len(plan) == 8
    for block in plan.blocks():
        ijk = np.stack(np.unravel_index(block.centres, grid.shape))
        assert np.ptp(ijk, axis=1).tolist() == [7, 7, 7]
        assert (np.abs(np.diff(ijk, axis=1)).sum(axis=0) == 1).all()


def test_wrong_centres_and_radii_are_refused() -> None:
    grid = Grid(shape=(3, 3, 3), affine=np.eye(4))
    config = SearchlightConfig(radius_mm=1.0)
    with pytest.raises(InputError, match="1 of 2 centres lie outside"):
        plan_searchlight(
            np.arange(5), grid, config, n_volumes=5, n_samples=5, centres=np.array([1, 9])
        )
    with pytest.raises(ConfigError, match="not above 0"):
        SearchlightConfig(radius_mm=0.0)
    with pytest.raises(InputError, match="does not lie in a grid"):
        inside_mask(np.array([27]), grid)
