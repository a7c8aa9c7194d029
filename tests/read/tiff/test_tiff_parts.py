"""The pure parts: where pages lie, which segments a crop touches, spans, orders of files."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.errors import ConfigError
from raypipe.read.tiff.join import tiff_files
from raypipe.read.tiff.kept import Kept
from raypipe.read.tiff.places import Spaced, largest, places
from raypipe.read.tiff.segments import Grid
from raypipe.read.tiff.span import span

sizes = st.integers(1, 40)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_places_give_back_what_was_put_in(offsets):
    found = places(offsets)
    assert [int(found[k]) for k in range(len(found))] == offsets
    assert largest(found) == max(offsets)


@given(st.integers(0, 99), st.integers(0, 10**12), st.integers(1, 10**9), st.integers(3, 10**6))
def test_even_places_are_small(first, second, step, n):
    listed = [first, *(second + k * step for k in range(min(n, 50) - 1))]
    found = places(listed)
    assert isinstance(found, Spaced)
    assert [found[k] for k in range(len(found))] == listed
    many = Spaced(first=first, second=second, step=step, n=n)
    assert many[n - 1] == second + (n - 2) * step
    assert len(pickle.dumps(many)) < 200


@given(st.data(), sizes, sizes, st.integers(1, 4), st.integers(1, 3))
def test_touched_segments_are_those_that_share_pixels(data, height, width, depth, separate):
    grid = Grid(
        depth=depth,
        height=height,
        width=width,
        seg_depth=data.draw(st.integers(1, depth)),
        seg_height=data.draw(sizes),
        seg_width=data.draw(sizes),
        tiled=True,
    )
    numbers = number_of_each_pixel(grid, separate)
    plane = data.draw(st.integers(0, separate * depth - 1))
    (top, bottom), (left, right) = (
        sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in (height, width)
    )
    found = list(grid.touched(plane, (top, bottom), (left, right)))
    crop = numbers[plane, top:bottom, left:right]
    assert sorted(one.index for one in found) == np.unique(crop).tolist()
    for one in found:
        own = numbers[plane] == one.index
        ys, xs = np.nonzero(own)
        assert (one.y0, one.x0) == (ys.min(), xs.min())
        inside = np.zeros_like(own)
        inside[slice(*one.rows), slice(*one.cols)] = True
        expected = own.copy()
        expected[:top] = expected[bottom:] = False
        expected[:, :left] = expected[:, right:] = False
        assert (inside == expected).all()
        assert one.whole == (expected == own).all()


def number_of_each_pixel(grid: Grid, separate: int) -> np.ndarray:
    """(separate * depth, height, width): TIFF 6.0's number of each pixel's segment, by a loop."""
    numbers = np.full((separate, grid.depth, grid.height, grid.width), -1)
    count = 0
    for sample in range(separate):
        for z in range(0, grid.depth, grid.seg_depth):
            for y in range(0, grid.height, grid.seg_height):
                for x in range(0, grid.width, grid.seg_width):
                    ends = z + grid.seg_depth, y + grid.seg_height, x + grid.seg_width
                    numbers[sample, z : ends[0], y : ends[1], x : ends[2]] = count
                    count += 1
    return numbers.reshape(-1, grid.height, grid.width)


def test_spans():
    assert span(slice(None), 9) == (0, 9)
    assert span(slice(2, 2), 9) == (2, 2)
    for wrong in (slice(-1, 3), slice(3, 2), slice(0, 10), slice(0, 9, 2), slice(None, None, -1)):
        with pytest.raises(ConfigError, match="asked of an axis of 9"):
            span(wrong, 9)


def test_what_is_kept_is_bounded():
    kept = Kept()
    one = np.zeros(100, np.uint8)
    for k in range(10):
        kept.put(k, one, limit_bytes=350)
        assert kept.held_bytes <= 350
    assert [k for k in range(10) if kept.get(k) is not None] == [7, 8, 9]
    kept.get(7)  # used last now
    kept.put(10, one, limit_bytes=350)
    assert kept.get(8) is None and kept.get(7) is not None
    kept.put(7, np.zeros(50, np.uint8), limit_bytes=350)  # the same key again
    assert kept.held_bytes == 250
    kept.put(11, np.zeros(400, np.uint8), limit_bytes=350)  # too large: not kept
    assert kept.get(11) is None
    kept.make_room(350, 350)
    assert kept.held_bytes == 0


@settings(max_examples=10)
@given(st.permutations([f"s{a}_f{b}.tif" for a in (1, 2, 10) for b in (9, 10, 100)]))
def test_files_in_the_order_of_their_numbers(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    for name in names:
        (folder / name).touch()
    expected = [f"s{a}_f{b}.tif" for a in (1, 2, 10) for b in (9, 10, 100)]
    assert [path.name for path in tiff_files(folder)] == expected
    listed = [folder / name for name in names]  # a list is taken as it is given
    assert list(tiff_files(listed)) == listed
