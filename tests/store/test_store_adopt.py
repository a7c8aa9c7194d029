"""Adopting a plain .npy: a store like any other afterwards, the file as it was, refusals."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_kit import start

import raypipe.store.scan as scan
from raypipe import config
from raypipe.errors import (
    ConfigError,
    MissingInput,
    NoSpace,
    StoreCorrupt,
    StoreError,
    StoreLocked,
)
from raypipe.store import FeatureStore, adopt, describe, from_bfloat16, plan_adoption, verify
from raypipe.store.commands import AdoptConfig, InfoConfig, adopt_file, info
from raypipe.store.layout import ShardPaths
from raypipe.store.lock import take_lock

BESIDE = ["x.index.parquet", "x.manifest.json", "x.npy"]


def saved(folder, array):
    path = folder / "x.npy"
    np.save(path, array)
    return path


def beside(path):
    return sorted(p.name for p in path.parent.iterdir())


def normal(*shape, dtype="f4"):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize(
    "dtype",
    ["f4", "f2", "f8", "?", "u1", "i1", "i2", "u2", "i4", "i8"],
    ids=lambda code: np.dtype(code).name,
)
def test_an_adopted_file_is_a_store_and_as_it_was(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 2, (300, 3, 5)).astype(dtype)
    path = saved(tmp_path, array)
    before = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
    adopt(plan_adoption(path))
    assert (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) == before
    assert beside(path) == BESIDE
    store = FeatureStore.open(path)
    assert store.logical_dtype == np.dtype(dtype).name
    np.testing.assert_array_equal(store[:], array)
    assert store.names == tuple(map(str, range(300)))
    assert store.valid.all()
    assert verify(path).ok
    assert describe(path)["state"] == "sealed"


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 9),
    dtype=st.sampled_from(["f2", "f4", "f8", "bfloat16"]),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_rows_that_are_not_finite_are_found_whatever_the_cells(
    tmp_path_factory, rows, width, dtype, threads, data
):
    """Against a loop over numpy.isfinite, with reads cut so that they end inside rows."""
    values = np.random.default_rng(rows).normal(size=(rows, width)).astype("f4")
    odd = st.sampled_from([np.nan, np.inf, -np.inf])
    for row in data.draw(st.lists(st.integers(0, rows - 1), max_size=5)):
        values[row, data.draw(st.integers(0, width - 1))] = data.draw(odd)
    if dtype == "bfloat16":
        array = (values.view("u4") >> 16).astype("u2")
        floats = from_bfloat16(array)
    else:
        array = floats = values.astype(dtype)
    path = saved(tmp_path_factory.mktemp("adopt"), array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_READ_BYTES", 8 * data.draw(st.integers(1, 4)))
        patch.setattr("raypipe.store.adoption._CELL_BYTES", data.draw(st.integers(1, 200)))
        adopt(plan_adoption(path, bfloat16=dtype == "bfloat16"), threads=threads)
    reasons = []
    for row in floats:
        nans, infs = int(np.isnan(row).sum()), int(np.isinf(row).sum())
        said = ", ".join([f"{nans} NaN"] * bool(nans) + [f"{infs} inf"] * bool(infs))
        reasons.append(f"not finite: {said}" if said else None)
    store = FeatureStore.open(path)
    assert store.index.column("reason").to_pylist() == reasons
    assert store.valid.tolist() == [reason is None for reason in reasons]
    assert store.manifest["invalid_rows"] == sum(reason is not None for reason in reasons)
    assert verify(path, threads).ok


def test_damage_after_adoption_is_found(tmp_path):
    path = saved(tmp_path, normal(5000, 256))
    adopt(plan_adoption(path))
    grid = FeatureStore.open(path).manifest["grid"]
    with path.open("r+b") as file:
        file.seek(128 + 3000 * 1024)
        file.write(b"\x01\x02\x03")
    (lo, hi) = (3000 // grid * grid, 3000 // grid * grid + grid)
    assert verify(path).bad_ranges == ((lo, min(hi, 5000)),)


def test_the_fingerprint_is_of_the_contents(tmp_path):
    prints = []
    for name, array in {"a": normal(9, 4), "b": normal(9, 4), "c": normal(9, 4) + 1}.items():
        (tmp_path / name).mkdir()
        path = saved(tmp_path / name, array)
        adopt(plan_adoption(path))
        prints.append(FeatureStore.open(path).fingerprint)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("shape", [(7,), (1, 1), (4, 2, 3, 2)])
def test_shapes(tmp_path, shape):
    path = saved(tmp_path, normal(*shape))
    adopt(plan_adoption(path))
    assert FeatureStore.open(path)[:].shape == shape
    assert verify(path).ok


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "a.png\nb c.png\nü.png"),
        ("names.csv", "a.png\nb c.png\nü.png\n"),
        ("names.csv", 'id,name\n1,a.png\n2,"b c.png"\n3,ü.png\n'),
    ],
)
def test_names(tmp_path, file, text):
    path = saved(tmp_path, normal(3, 2))
    (tmp_path / "names").mkdir()
    names = tmp_path / "names" / file
    names.write_text(text, encoding="utf-8")
    adopt(plan_adoption(path, names=names))
    assert FeatureStore.open(path).names == ("a.png", "b c.png", "ü.png")
    assert verify(path).ok


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("n.txt", "a\nb\n", "2 names for 3 rows"),
        ("n.txt", "a\n\nc\n", "name 2 is empty"),
        ("n.csv", "x,y\n1,2\n", "none is called 'name'"),
        ("n.csv", "id,name\n1,a\n2\n3,c\n", "line 3 has 1 columns"),
        ("n.txt", b"a\n\xff\nc\n", "cannot be read as UTF-8"),
        ("n.txt", None, "is not there"),
    ],
)
def test_names_that_do_not_fit(tmp_path, file, text, said):
    path = saved(tmp_path, normal(3, 2))
    names = tmp_path / file
    if text is not None:
        names.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ConfigError, MissingInput), match=said):
        plan_adoption(path, names=names)


@pytest.mark.parametrize(
    ("array", "kind", "said"),
    [
        (np.asfortranarray(normal(4, 3)), StoreError, "Fortran order"),
        (np.array([{}, []], object), StoreError, "Python objects"),
        (normal(4, 3).astype(">f4"), StoreError, "big-endian"),
        (normal(4, 3).astype("c8"), ConfigError, "holds complex64"),
        (np.zeros((0, 3), "f4"), ConfigError, "no empty axis"),
        (np.float32(1), ConfigError, r"shape \(\)"),
    ],
)
def test_refusals(tmp_path, array, kind, said):
    path = saved(tmp_path, array)
    with pytest.raises(kind, match=said):
        plan_adoption(path)
    assert beside(path) == ["x.npy"]


def test_more_refusals(tmp_path):
    with pytest.raises(MissingInput):
        plan_adoption(tmp_path / "x.npy")
    path = saved(tmp_path, normal(4, 3))
    with pytest.raises(ConfigError, match="only uint16"):
        plan_adoption(path, bfloat16=True)
    with path.open("ab") as file:
        file.write(b"tail")
    with pytest.raises(StoreCorrupt, match="its header says"):
        plan_adoption(path)
    os.truncate(path, 130)
    with pytest.raises(StoreCorrupt):
        plan_adoption(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(StoreCorrupt):
        plan_adoption(path)
    saved(tmp_path, normal(4, 3))
    (tmp_path / "x.npy.partial").touch()
    with pytest.raises(StoreError, match="left from the writing"):
        plan_adoption(path)


def test_a_store_is_not_adopted_again(tmp_path):
    path = saved(tmp_path, normal(4, 3))
    plan = plan_adoption(path)
    adopt(plan)
    manifest = (tmp_path / "x.manifest.json").read_bytes()
    for again in (lambda: plan_adoption(path), lambda: adopt(plan)):
        with pytest.raises(StoreError, match="is a store already"):
            again()
    assert (tmp_path / "x.manifest.json").read_bytes() == manifest
    assert beside(path) == BESIDE


def test_another_run_is_left_alone(tmp_path):
    path = saved(tmp_path, normal(4, 3))
    plan = plan_adoption(path)
    lock = take_lock(ShardPaths.of(path))
    with pytest.raises(StoreLocked):
        adopt(plan)
    lock.close()
    journal = tmp_path / "x.journal"
    journal.mkdir()
    (journal / "00000001-w.jsonl").write_text("kept")
    with pytest.raises(StoreError, match="left from the writing"):
        adopt(plan)
    assert (journal / "00000001-w.jsonl").read_text() == "kept"


def test_a_file_written_meanwhile_is_refused(tmp_path):
    path = saved(tmp_path, normal(4, 3))
    plan = plan_adoption(path)

    def touch(rows):
        time.sleep(0.01)
        path.write_bytes(path.read_bytes())

    with pytest.raises(StoreError, match="was written while it was read"):
        adopt(plan, progress=touch)
    assert beside(path) == ["x.npy"]


def test_an_index_of_somebody_is_not_overwritten(tmp_path):
    path = saved(tmp_path, normal(4, 3))
    (tmp_path / "x.index.parquet").write_bytes(b"mine")
    with pytest.raises(StoreError, match="without a manifest and names other rows"):
        adopt(plan_adoption(path))
    assert (tmp_path / "x.index.parquet").read_bytes() == b"mine"
    assert beside(path) == ["x.index.parquet", "x.npy"]


def test_no_space(tmp_path, monkeypatch):
    path = saved(tmp_path, normal(4, 3))
    monkeypatch.setattr("raypipe.store.space.free_bytes", lambda path: 1000)
    with pytest.raises(NoSpace):
        adopt(plan_adoption(path))
    assert beside(path) == ["x.npy"]


KILLED = """
import os, sys
from pathlib import Path
import raypipe.store.adoption as room
at, path = sys.argv[1], Path(sys.argv[2])
if at == "scan":
    kill = lambda rows: os.kill(os.getpid(), 9)
else:
    kill = lambda rows: None
    name = {"index": "_write_index", "manifest": "Manifest", "tidy": "tidy"}[at]
    setattr(room, name, lambda *a, **k: os.kill(os.getpid(), 9))
room.adopt(room.plan_adoption(path), progress=kill)
"""


@pytest.mark.parametrize("at", ["scan", "index", "manifest", "tidy"])
def test_kill_9_leaves_no_store_or_a_whole_one(tmp_path, at):
    path = saved(tmp_path, normal(40, 3))
    before = path.read_bytes()
    with start(KILLED, at, path) as process:
        assert process.wait(60) == -signal.SIGKILL
    if at == "tidy":
        assert verify(path).ok
    else:
        with pytest.raises(MissingInput):
            FeatureStore.open(path)
        adopt(plan_adoption(path))
        assert beside(path) == BESIDE
        assert verify(path).ok
    assert path.read_bytes() == before


def test_command(tmp_path, capsys):
    path = saved(tmp_path, normal(4, 3))
    cfg = config.parse(AdoptConfig, [str(path), "--dry-run"], prog="raypipe store adopt")
    adopt_file(cfg)
    assert "would be adopted  (4, 3) float32" in capsys.readouterr().out
    assert beside(path) == ["x.npy"]
    adopt_file(AdoptConfig(file=path))
    out = capsys.readouterr().out
    assert out.startswith(f"{path}  sealed  (4, 3) float32") and "adopted" in out
    info(InfoConfig(store=path))
    assert capsys.readouterr().out == out
    with pytest.raises(ConfigError, match="--threads 0"):
        AdoptConfig(file=path, threads=0)


def test_a_small_process_adopts_a_large_file(tmp_path):
    """Memory does not grow with the file: 400 MB of data, 150 MB of address space for data."""
    path = tmp_path / "x.npy"
    np.lib.format.open_memmap(path, "w+", "f4", (100_000, 1000))[::9999] = 1
    code = (
        "import sys, psutil; from pathlib import Path; from raypipe.store import adopt, plan_adoption;"
        "import pyarrow.parquet;"
        "me = psutil.Process(); rss = lambda: me.memory_info().rss - me.memory_info().shared;"
        "before = rss(); adopt(plan_adoption(Path(sys.argv[1])), threads=2); print(rss() - before)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
    ).stdout
    assert int(out) < 100e6
    assert verify(path).ok
