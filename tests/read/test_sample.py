"""By what a file is known to have changed."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from raypipe.read.sample import BLOCK_BYTES, content_sample, file_state, sample_offsets


@given(st.integers(0, 1 << 40))
def test_a_sample_takes_in_both_ends(size: int) -> None:
    offsets = sample_offsets(size)
    assert offsets[0][0] == 0
    assert sum(offsets[-1]) == size
    assert all(at >= 0 and at + length <= size for at, length in offsets)
    assert sum(length for _, length in offsets) <= 16 * BLOCK_BYTES
    assert [at for at, _ in offsets] == sorted({at for at, _ in offsets})


def test_a_change_behind_the_same_size_and_time_is_in_the_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(100))
    state, sample = file_state(path), content_sample(path, 100)
    stat = path.stat()
    assert state == (100, stat.st_mtime_ns)
    path.write_bytes(bytes(99) + b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_state(path) == state
    assert content_sample(path, 100) != sample
