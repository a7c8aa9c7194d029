"""The grid: every pixel written once, windows inside the padded image, equal to a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.errors import ConfigError
from raypipe.tile.grid import AxisGrid, TileGrid, reading, reflected


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """size, tile, halo, align of any axis."""
    align = draw(st.integers(1, 9))
    tile = align * draw(st.integers(1, 6))
    return draw(st.integers(1, 90)), tile, draw(st.integers(0, 30)), align


@given(st.lists(axes(), min_size=1, max_size=3))
def test_every_pixel_is_written_exactly_once(numbers: list[tuple[int, int, int, int]]) -> None:
    numbers = [(min(s, 25), t, h, a) for s, t, h, a in numbers]
    grid = TileGrid.of(*zip(*numbers, strict=True))
    written = np.zeros(grid.shape, int)
    for number, tile in enumerate(grid):
        assert tile.number == number
        written[tile.keep] += 1
    assert (written == 1).all()


@given(axes())
def test_windows_lie_inside_the_padded_axis_and_hold_the_halo(
    numbers: tuple[int, int, int, int],
) -> None:
    size, tile, halo, align = numbers
    axis = AxisGrid(size=size, tile=tile, halo=halo, align=align)
    assert axis.padded % align == 0 and 0 <= axis.padded - size < align
    for k in range(len(axis)):
        keep, read = axis.keep(k), axis.read(k)
        assert read.stop - read.start == axis.window
        assert read.start % align == 0 and read.stop % align == 0
        assert 0 <= read.start <= keep.start < keep.stop <= read.stop <= axis.padded
        # An end is the image's own or at least a halo off.
        assert read.start == 0 or keep.start - read.start >= halo
        assert read.stop == axis.padded or read.stop - keep.stop >= halo


@given(axes(), st.integers(0, 2**31))
def test_a_local_function_is_what_a_plain_loop_makes_of_the_padded_axis(
    numbers: tuple[int, int, int, int], seed: int
) -> None:
    """A moving sum over ``halo`` pixels to either side, zeros beyond the padded axis."""
    size, tile, halo, align = numbers
    axis = AxisGrid(size=size, tile=tile, halo=halo, align=align)
    image = np.random.default_rng(seed).integers(-99, 99, size)
    padded = np.pad(image, (0, axis.padded - size), mode="reflect" if size > 1 else "edge")

    def model(values: np.ndarray) -> np.ndarray:
        out = np.zeros_like(values)
        for i in range(len(values)):
            out[i] = values[max(0, i - halo) : i + halo + 1].sum()
        return out

    made = np.zeros_like(image)
    for cell in TileGrid((axis,)):
        span, order = reading(cell.read[0], size)
        window = image[span] if order is None else image[span][order]
        made[cell.keep] = model(window)[cell.inner]
    assert np.array_equal(made, model(padded)[:size])


@given(st.integers(1, 40), st.integers(0, 130))
def test_reflection_is_numpys(size: int, beyond: int) -> None:
    mode = "reflect" if size > 1 else "edge"
    wanted = np.pad(np.arange(size), (0, beyond), mode=mode)
    assert np.array_equal(reflected(slice(0, size + beyond), size), wanted)


def test_a_tile_off_the_alignment_is_refused_with_one_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"tile 100 is no multiple of 16.*take 112"):
        AxisGrid(size=500, tile=100, halo=3, align=16)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="size 0"):
        AxisGrid(size=0, tile=1)
    with pytest.raises(ConfigError, match="halo -1"):
        AxisGrid(size=5, tile=1, halo=-1)
