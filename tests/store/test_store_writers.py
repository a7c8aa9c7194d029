"""Writers of one store: several at once, what they refuse, what their journals come to."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from store_kit import (
    abandon,
    make_spec,
    rows_of,
    sources_of,
    start,
    whole,
)

from raypipe.errors import ConfigError, StoreError
from raypipe.store import RowSource, ShardWriter, open_for_writing


def test_a_retried_cell_is_held_against_the_disk_when_sealing(tmp_path):
    """A worker that was not fenced overwrote an heir's cell with the bits of a halved batch."""
    spec = make_spec(tmp_path)
    with open_for_writing(spec, run_id="r") as run:
        with ShardWriter(run.target, "lost") as lost, ShardWriter(run.target, "heir") as heir:
            heir.write(0, rows_of(spec, 0, 10), sources_of(0, 10), attempt=2)
            heir.commit()
            lost.write(0, rows_of(spec, 0, 4) + 1e-3, sources_of(0, 4))
            with pytest.raises(StoreError, match=r"first \[0, 4\), 1 ranges have other bytes"):
                run.seal()
            assert run.missing() == [(0, 4)]
            lost.commit()  # now both are on record, and the disk says which one counts
        run.seal(verify=True)
    np.testing.assert_array_equal(np.load(spec.path)[:4], rows_of(spec, 0, 4) + np.float32(1e-3))


PEER = """
import pickle, sys
from store_kit import make_spec, rows_of, sources_of
from raypipe.store import ShardWriter
target, spec = pickle.loads(bytes.fromhex(sys.argv[1])), make_spec(sys.argv[2], rows=203)
part = int(sys.argv[3])
with ShardWriter(target, f"peer-{part}") as out:
    for lo in range(4 * part, 203, 8):
        hi = min(lo + 4, 203)
        out.write(lo, rows_of(spec, lo, hi), sources_of(lo, hi))
        out.commit()
"""


def test_several_processes_write_one_file(tmp_path):
    spec = make_spec(tmp_path, rows=203)
    with open_for_writing(spec, run_id="r") as run:
        target = pickle.dumps(run.target)
        assert len(target) < 2000
        peers = [start(PEER, target.hex(), tmp_path, part) for part in range(2)]
        for peer in peers:
            assert peer.wait() == 0
            peer.stdout.close()
        run.seal(verify=True)
    np.testing.assert_array_equal(np.load(spec.path), rows_of(spec, 0, 203))


def test_a_namesake_gets_a_journal_of_its_own(tmp_path):
    spec = make_spec(tmp_path)
    with open_for_writing(spec, run_id="r") as run:
        for lo, hi in run.missing():
            with ShardWriter(run.target, "same") as out:
                out.write(lo, rows_of(spec, lo, hi), sources_of(lo, hi))
                out.commit()
        names = [p.name for p in spec.paths.journals()]
        assert [n for n in names if "same" in n] == [
            "00000001-same-2.jsonl",
            "00000001-same-3.jsonl",
            "00000001-same.jsonl",
        ]
        run.seal()


@pytest.mark.parametrize("writer_id", ["", "a/b", "..\n", "x" * 101, "é"])
def test_writer_ids_are_file_names(tmp_path, writer_id):
    run = open_for_writing(make_spec(tmp_path), run_id="r")
    with run, pytest.raises(ConfigError, match="writer id"):
        ShardWriter(run.target, writer_id)


def test_what_write_refuses(tmp_path):
    spec = make_spec(tmp_path)
    good, source = rows_of(spec, 0, 4), RowSource("00", 1)
    with open_for_writing(spec, run_id="r") as run, ShardWriter(run.target, "w") as out:
        for lo, rows, rule in [
            (1, good, "no whole cells"),
            (0, good[:3], "no whole cells"),
            (8, good, "no whole cells"),
            (-4, good, "no whole cells"),
            (0, good[:0], "no whole cells"),
            (0, good.astype("f8"), "float64"),
            (0, good[:, :2], "takes float32"),
        ]:
            with pytest.raises(StoreError, match=rule):
                out.write(lo, rows, [source] * len(rows))
        with pytest.raises(StoreError, match="3 sources for 4 rows"):
            out.write(0, good, [source] * 3)
        assert out.commit() == []
        for value in (np.nan, np.inf, -np.inf):
            rows = good.copy()
            rows[2, 1, 1] = value
            with pytest.raises(StoreError, match=r"row 6 holds"):
                out.write(4, rows, [source] * 4)
            bad = [source, source, RowSource("", 0, "cannot decode"), source]
            out.write(4, rows, bad)  # an invalid row may hold anything
        assert [record.lo for record in out.commit()] == [4]
    with pytest.raises(StoreError, match="it is closed"):
        out.write(0, good, [source] * 4)


def test_a_failed_rewrite_takes_the_cell_back(tmp_path):
    """The first chunk of the bad rows is in the file already: the good record would be a lie."""
    spec = make_spec(tmp_path, row_shape=(70_000,))
    good = rows_of(spec, 0, 8)
    with open_for_writing(spec, run_id="r") as run, ShardWriter(run.target, "w") as out:
        out.write(0, good, sources_of(0, 8))
        bad = good[:4] + 1
        bad[3, -1] = np.nan
        with pytest.raises(StoreError, match="row 3 holds nan"):
            out.write(0, bad, sources_of(0, 4))
        assert [record.lo for record in out.commit()] == [4]


def test_recovery_leaves_one_journal(tmp_path):
    spec = make_spec(tmp_path)
    for epoch in (1, 2, 3):
        run = open_for_writing(spec, run_id="r")
        lo, hi = run.missing()[0]
        with ShardWriter(run.target, "w") as out:
            out.write(lo, rows_of(spec, lo, hi), sources_of(lo, hi))
            out.commit()
        abandon(run)
        merged = [f"{epoch:08d}-recovered.jsonl"] if epoch > 1 else []
        assert [p.name for p in spec.paths.journals()] == [*merged, f"{epoch:08d}-w.jsonl"]
    whole(spec)


def test_rows_that_are_not_contiguous(tmp_path):
    spec = make_spec(tmp_path, row_shape=(3, 70_000), rows=8)
    rows = np.random.default_rng(0).normal(size=(70_000, 3, 8)).astype("f4").T
    rows = rows.transpose(0, 1, 2)
    assert not rows.flags.c_contiguous
    with open_for_writing(spec, run_id="r") as run:
        with ShardWriter(run.target, "w") as out:
            out.write(0, rows, sources_of(0, 8, bad=[2]))
            records = out.commit()
        assert [(r.lo, r.hi) for r in records] == [(0, 4), (4, 8)]
        run.seal(verify=True)
    stored = np.load(spec.path)
    keep = np.arange(8) != 2
    np.testing.assert_array_equal(stored[keep], rows[keep])
    assert np.isnan(stored[2]).all()


def test_spec_checks_itself(tmp_path):
    for changes, rule in [
        ({"dtype": "float64"}, "not one of"),
        ({"grid": 0}, "at least 1"),
        ({"rows": 0}, "at least 1"),
        ({"row_shape": (3, 0)}, "at least 1"),
        ({"names": ("a",)}, "1 names for 10 rows"),
        ({"identity": {"x": {1, 2}}}, "not plain JSON"),
        ({"identity": {"x": float("nan")}}, "not plain JSON"),
        ({"path": tmp_path / "train.bin"}, "does not end in .npy"),
        ({"names": ("\udcff",) * 10}, "not valid UTF-8"),
    ]:
        with pytest.raises(ConfigError, match=rule):
            make_spec(tmp_path, **changes)


def test_fingerprint_covers_what_decides_the_bytes(tmp_path):
    spec = make_spec(tmp_path)
    same = [
        {"provenance": {"torch": "3"}},
        {"token_layout": {"cls": 0}},
        {"identity": dict(reversed(spec.identity.items()))},
        {"path": tmp_path / "elsewhere.npy"},
    ]
    other = [
        {"grid": 5},
        {"dtype": "float16"},
        {"row_shape": (5, 3)},
        {"identity": {}},
        {"names": tuple(reversed(spec.names))},
        {"names": ("a\nb", *spec.names[1:])},
    ]
    assert {make_spec(tmp_path, **c).fingerprint for c in same} == {spec.fingerprint}
    assert len({make_spec(tmp_path, **c).fingerprint for c in other} | {spec.fingerprint}) == 7
