"""Narrowing against torch's own casts, and its measured error against float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raypipe.errors import StoreError
from raypipe.store.narrow import CHUNK, Narrower, NarrowingError, from_bfloat16, to_bfloat16

ANY_BITS = hnp.arrays(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1))
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(ANY_BITS)
def test_bfloat16_is_torchs(bits):
    values = bits.view(np.float32)
    mine = torch.from_numpy(to_bfloat16(values).copy()).view(torch.bfloat16).float().numpy()
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(mine, theirs)  # NaN equals NaN here
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values)), mine)


def test_bfloat16_ties_go_to_even_and_every_nan_stays_nan():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], "<u4")
    narrowed = to_bfloat16(bits.view("<f4"))
    assert [hex(b) for b in narrowed[:3]] == ["0x3f80", "0x3f82", "0x3f81"]
    assert np.isnan(from_bfloat16(narrowed[3:])).all()


def test_bfloat16_round_trips_all_its_own_values():
    every = np.arange(2**16, dtype="<u2")
    back = to_bfloat16(from_bfloat16(every))
    nan = np.isnan(from_bfloat16(every))
    np.testing.assert_array_equal(back[~nan], every[~nan])
    assert np.isnan(from_bfloat16(back[nan])).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@settings(max_examples=200)
@given(data=st.data())
def test_values_and_errors(dtype, data):
    values = data.draw(hnp.arrays(np.float32, st.integers(1, 30), elements=FINITE))
    exact = values.astype("f8")
    theirs = torch.from_numpy(values).to(getattr(torch, dtype)).double().numpy()
    narrower = Narrower(dtype)
    if not np.isfinite(theirs).all():
        with pytest.raises(StoreError, match=f"beyond {dtype}'s largest"):
            narrower(values)
        return
    narrow, error = narrower(values)
    back = narrow.astype("f8") if dtype == "float16" else from_bfloat16(narrow).astype("f8")
    np.testing.assert_array_equal(back, theirs)
    gap = np.abs(theirs - exact)
    relative = np.divide(gap, np.abs(exact), out=np.zeros_like(gap), where=exact != 0)
    assert error.absolute == gap.max()
    assert error.relative == pytest.approx(relative.max(), rel=1e-5, abs=0)
    normal = np.abs(exact) >= narrower.smallest_normal
    assert error.relative_normal <= narrower.round_off
    if normal.all():
        assert error.relative_normal == error.relative
    assert error.relative_normal >= relative[normal].max(initial=0) * (1 - 1e-5)


def test_scratch_is_reused_and_fixed():
    narrower = Narrower("float16")
    first, _ = narrower(np.ones(CHUNK, np.float32))
    second, _ = narrower(np.zeros(CHUNK, np.float32))
    assert first.base is second.base


def test_merge_takes_the_larger():
    merged = NarrowingError(1, 0, 3).merge(NarrowingError(0, 2, 1))
    assert merged == NarrowingError(1, 2, 3)
