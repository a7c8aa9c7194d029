"""Verification by many threads says what a plain loop over the file says."""

from __future__ import annotations

import os

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from store_kit import make_spec, whole

import raypipe.store.checksum as checksum
from raypipe import config
from raypipe.errors import ConfigError, StoreCorrupt
from raypipe.store import verify
from raypipe.store.commands import VerifyConfig, verify_stores
from raypipe.store.layout import CellGrid


@settings(max_examples=60)
@given(
    rows=st.integers(1, 60),
    grid=st.integers(1, 9),
    row_bytes=st.integers(1, 40),
    cut=st.integers(0, 300),
    threads=st.integers(1, 4),
    read=st.integers(1, 200),
    task=st.integers(1, 400),
    data=st.data(),
)
def test_checksums_are_those_of_a_plain_loop(
    tmp_path_factory, rows, grid, row_bytes, cut, threads, read, task, data
):
    """Any cells, in any order, of a file that may end early, with reads and tasks of any size."""
    cells = CellGrid(rows=rows, grid=grid, row_bytes=row_bytes, data_offset=7)
    content = np.random.default_rng(rows).bytes(cells.file_bytes)[: max(0, cells.file_bytes - cut)]
    path = tmp_path_factory.mktemp("checksum") / "file"
    path.write_bytes(content)
    wanted = data.draw(st.permutations(range(len(cells))))[: data.draw(st.integers(0, 20))]
    if data.draw(st.booleans()):
        wanted = list(range(len(cells)))
    expected = []
    for cell in wanted:
        offset, length = cells.extent(cell)
        piece = content[offset : offset + length]
        expected.append((cell, xxhash.xxh3_64_intdigest(piece) if len(piece) == length else None))
    fd = os.open(path, os.O_RDONLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksum, "_READ_BYTES", read)
        patch.setattr(checksum, "TASK_BYTES", task)
        found = list(checksum.cell_checksums(fd, cells, wanted, threads))
    os.close(fd)
    assert found == expected


@pytest.mark.parametrize("threads", [None, 1, 2, 4])
def test_the_same_damage_is_found_by_any_number_of_threads(tmp_path, threads, monkeypatch):
    monkeypatch.setattr(checksum, "TASK_BYTES", 100)
    spec = make_spec(tmp_path, rows=40)
    whole(spec)
    with spec.path.open("r+b") as file:
        for row in (1, 13, 17, 39):
            file.seek(128 + row * 60 + row)
            file.write(b"\xfe")
    assert verify(spec.path, threads).bad_ranges == ((0, 4), (12, 20), (36, 40))
    os.truncate(spec.path, 128 + 30 * 60)
    report = verify(spec.path, threads)
    assert report.bad_ranges == ((0, 4), (12, 20), (28, 40))
    assert "has 1928 bytes" in report.problems[0]


def test_command(tmp_path, capsys):
    spec = make_spec(tmp_path)
    whole(spec)
    verify_stores(config.parse(VerifyConfig, [str(tmp_path), "--threads", "3"], prog="p"))
    assert "ok" in capsys.readouterr().out
    spec.path.write_bytes(spec.path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(StoreCorrupt, match="1 of 1 shards are damaged"):
        verify_stores(VerifyConfig(store=tmp_path))
    with pytest.raises(ConfigError):
        VerifyConfig(store=tmp_path, threads=0)
    assert checksum.default_threads() <= 4
