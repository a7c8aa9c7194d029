"""Journals torn at every byte, damaged at every byte; and what `Commits` makes of the rest."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_kit import make_spec

from raypipe.errors import ConfigError, StoreCorrupt
from raypipe.store.commits import Commits, RowTable
from raypipe.store.journal import (
    CommitRecord,
    JournalCount,
    RowSource,
    header_line,
    open_line,
    read_journal,
    seal_line,
)
from raypipe.store.layout import CellGrid
from raypipe.store.narrow import NarrowingError

FINGERPRINT = "ab" * 32
GRID = CellGrid(rows=10, grid=4, row_bytes=8, data_offset=128)


def record(cell: int, checksum: int = 7, **changes) -> CommitRecord:
    lo, hi = GRID.range(cell)
    sources = tuple(
        RowSource(f"{row:x}", row, "bad\n\x00é" if row == 5 else None) for row in range(lo, hi)
    )
    fields = {
        "lo": lo,
        "hi": hi,
        "checksum": f"{checksum:016x}",
        "attempt": 1,
        "epoch": 2,
        "writer": "w",
        "batch": 4,
        "error": NarrowingError(0.1, 1e-300, 3.0),
        "sources": sources,
        **changes,
    }
    return CommitRecord(**fields)


def journal(*records: CommitRecord) -> bytes:
    return header_line(FINGERPRINT, 2, "w") + b"".join(r.to_line() for r in records)


def read(path, raw: bytes) -> Commits:
    path.write_bytes(raw)
    return Commits.read(GRID, [path], FINGERPRINT)


@given(
    reason=st.none() | st.text(),
    error=st.tuples(*[st.floats(0, 1e30)] * 3),
    checksum=st.integers(0, 2**64 - 1),
    batch=st.integers(1, 99),
)
def test_a_record_survives_its_line(reason, error, checksum, batch):
    sources = tuple(RowSource("ff", 2**40, reason) for _ in range(4))
    told = record(0, checksum, error=NarrowingError(*error), batch=batch, sources=sources)
    line = told.to_line()
    assert line.count(b"\n") == 1
    assert CommitRecord.from_fields(open_line(line)) == told
    assert json.loads(line)["lo"] == 0  # any JSON reader can look


def test_torn_at_every_byte(tmp_path):
    lines = [header_line(FINGERPRINT, 2, "w"), *(record(cell).to_line() for cell in range(3))]
    ends = np.cumsum([len(line) for line in lines])
    raw = b"".join(lines)
    for cut in range(len(raw) + 1):
        commits = read(tmp_path / "j.jsonl", raw[:cut])
        # A line without its newline is whole all the same: its crc says so.
        wanted = max(0, int(np.sum(ends - 1 <= cut)) - 1)
        assert commits.done.sum() == wanted, cut
        assert list(commits.done[:wanted]) == [True] * wanted
        assert commits.count.torn + commits.count.damaged <= 1


def test_damaged_at_every_byte_loses_that_record_only(tmp_path):
    head = len(header_line(FINGERPRINT, 2, "w"))
    raw = journal(record(0), record(1), record(2))
    ends = np.cumsum([len(record(cell).to_line()) for cell in range(3)]) + head
    for at in range(head, len(raw)):
        for flip in (1, 0x80):
            broken = raw[:at] + bytes([raw[at] ^ flip]) + raw[at + 1 :]
            commits = read(tmp_path / "j.jsonl", broken)
            hit = int(np.searchsorted(ends, at, side="right"))
            lost = {hit, hit + 1} if raw[at : at + 1] == b"\n" else {hit}
            assert all(commits.done[cell] for cell in range(3) if cell not in lost), at
            assert (commits.checksum[commits.done] == 7).all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=400))
def test_noise_is_never_a_record(tmp_path, noise):
    commits = read(tmp_path / "j.jsonl", header_line(FINGERPRINT, 2, "w") + noise)
    assert not commits.done.any()
    after = read(tmp_path / "j.jsonl", journal(record(0)) + noise + b"\n" + record(2).to_line())
    assert list(after.done) == [True, False, True]


def test_whole_lines_that_say_nonsense_are_damaged(tmp_path):
    good = open_line(record(0).to_line())
    nonsense = [
        good | {"lo": 1},
        good | {"hi": 5},
        good | {"lo": -4, "hi": 0},
        good | {"lo": 12, "hi": 16},
        good | {"sources": []},
        good | {"xxh3": "zz"},
        good | {"error": [1]},
        {"hello": 1},
    ]
    raw = header_line(FINGERPRINT, 2, "w") + b"".join(map(seal_line, nonsense))
    commits = read(tmp_path / "j.jsonl", raw)
    assert not commits.done.any()
    assert commits.count.damaged == len(nonsense)


def test_a_journal_of_another_store_is_not_read(tmp_path):
    raw = header_line("cd" * 32, 2, "w") + record(0).to_line()
    commits = read(tmp_path / "j.jsonl", raw)
    assert not commits.done.any()
    assert commits.count.foreign == 1
    assert not read(tmp_path / "j.jsonl", record(0).to_line()).done.any()  # no first line at all
    assert not read(tmp_path / "j.jsonl", b"").done.any()


def test_rivals_are_settled_by_the_disk():
    commits = Commits(GRID)
    for checksum in (1, 2, 2, 3):
        commits.add(record(0, checksum, batch=checksum))
    commits.add(record(1))
    assert commits.disputed == [0]
    assert commits.resolve(0, 3)
    assert (commits.checksum[0], commits.batch[0]) == (3, 3)
    assert commits.disputed == []
    commits.add(record(0, 9))
    assert not commits.resolve(0, None)
    assert commits.missing() == [(0, 4), (8, 10)]
    commits.add(record(2, attempt=2))
    assert commits.disputed == [2]


def test_rows_done_counts_the_short_last_cell():
    commits = Commits(GRID)
    commits.add(record(2))
    assert commits.rows_done == 2
    commits.add(record(0))
    assert commits.rows_done == 6


@given(rows=st.integers(1, 60), grid=st.integers(1, 70), data=st.data())
def test_missing_and_done_part_the_rows(rows, grid, data):
    cells = CellGrid(rows=rows, grid=grid, row_bytes=4, data_offset=0)
    commits = Commits(cells)
    done = data.draw(st.sets(st.integers(0, len(cells) - 1)))
    for cell in done:
        lo, hi = cells.range(cell)
        assert cells.cell_at(lo, hi) == cell
        sources = tuple(RowSource("", 0) for _ in range(lo, hi))
        commits.add(CommitRecord(lo, hi, "0", 1, 1, "w", grid, NarrowingError(), sources))
    missing = [row for lo, hi in commits.missing() for row in range(lo, hi)]
    kept = [row for cell in sorted(done) for row in range(*cells.range(cell))]
    assert sorted(missing + kept) == list(range(rows))
    assert commits.rows_done == len(kept)


def test_row_table_gathers_sources():
    table = RowTable.of(10, [record(0).to_line(), record(1).to_line(), record(2).to_line()])
    assert table.reasons == {5: "bad\n\x00é"}
    assert table.size_bytes.tolist() == list(range(10))
    assert table.digest[9] == b"9"


def test_sources_that_are_none_stop_the_sealing():
    fields = open_line(record(0).to_line()) | {"sources": [["x"]] * 4}
    for raw in (b"torn", seal_line(fields), seal_line({"lo": 0})):
        with pytest.raises(StoreCorrupt, match="changed while it was read"):
            RowTable.of(10, [raw])


def test_fifty_thousand_records_are_read_in_moderate_memory(tmp_path):
    cells = CellGrid(rows=50_000, grid=1, row_bytes=4, data_offset=0)
    source = (RowSource("0" * 32, 100),)
    lines = (
        CommitRecord(k, k + 1, f"{k:x}", 1, 1, "w", 1, NarrowingError(), source).to_line()
        for k in range(50_000)
    )
    path = tmp_path / "j.jsonl"
    path.write_bytes(header_line(FINGERPRINT, 1, "w") + b"".join(lines))
    commits = Commits.read(cells, [path], FINGERPRINT)
    assert commits.done.all()
    assert commits.checksum[-1] == 49_999
    assert sum(1 for _ in read_journal(path, FINGERPRINT, JournalCount())) == 50_000


@pytest.mark.parametrize("digest", ["x" * 65, "é"])
def test_bad_digest(digest):
    with pytest.raises(ConfigError, match="hex characters"):
        RowSource(digest, 1)
    with pytest.raises(ConfigError, match="negative"):
        RowSource("", -1)


def test_spec_of_other_tests_is_the_default(tmp_path):
    assert len(make_spec(tmp_path).cells) == 3
