"""Exports, read back with each format's own reader, bit for bit; nothing half-written, ever."""

from __future__ import annotations

import json
import signal
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from export_kit import (
    FOLDERS,
    READ,
    equal_bits,
    leftovers,
    need_package,
    read_parquet,
    read_webdataset,
)
from store_kit import make_spec, start, whole

from raypipe import config
from raypipe.errors import (
    ConfigError,
    MissingInput,
    NoSpace,
    StoreCorrupt,
    StoreError,
    StoreLocked,
    StoreNotSealed,
)
from raypipe.store import (
    FeatureStore,
    adopt,
    export_store,
    from_bfloat16,
    open_for_writing,
    plan_adoption,
    plan_export,
)
from raypipe.store.copy_commands import ExportConfig, export
from raypipe.store.formats import FORMATS, FormatOptions


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip(tmp_path, to, float32, dtype):
    need_package(to)
    spec = make_spec(tmp_path / "store", rows=37, dtype=dtype)
    store = FeatureStore.open(whole(spec, bad=[5]))
    options = FormatOptions(
        chunk_rows=3 if to == "zarr" else 1,
        shard_bytes={"zarr": 500, "webdataset": 20_000}.get(to),
    )
    out, seen = tmp_path / "out" / "x", []
    plan = plan_export(spec.path, to, out, float32=float32, options=options)
    assert export_store(plan, seen.append) == out
    values, columns = READ[to](out)
    wanted = np.asarray(store.array)
    if float32:
        wanted = from_bfloat16(wanted) if dtype == "bfloat16" else wanted.astype("f4")
    equal_bits(np.asarray(values), wanted)
    if columns is not None:
        for key, column in columns.items():
            assert column == store.index.column(key).to_pylist(), key
    assert sum(seen) == 37
    size = sum(p.stat().st_size for p in [out, *out.rglob("*")] if p.is_file())
    assert size <= plan.need_bytes
    assert leftovers(out.parent) == []


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "i2", "u2", "i4", "i8", "f8"])
@pytest.mark.parametrize("shape", [(11,), (11, 4)])
def test_adopted_files_of_any_dtype_go_out_too(tmp_path, to, dtype, shape):
    need_package(to)
    array = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    adopt(plan_adoption(tmp_path / "x.npy"))
    out = tmp_path / "out"
    export_store(plan_export(tmp_path / "x.npy", to, out))
    wanted = array.view("u1") if (to, dtype) == ("parquet", "?") else array
    equal_bits(np.asarray(READ[to](out)[0]), wanted)


def test_odd_bits_survive(tmp_path):
    """-0.0, subnormals and a NaN's payload, which a format that compares values would lose."""
    bits = np.array([0x8000, 0x0000, 0x0001, 0x7E01, 0xFE55, 0x7C00], "u2")
    np.save(tmp_path / "x.npy", np.tile(bits, (4, 1)).view("f2"))
    np.save(tmp_path / "z.npy", np.full((4, 6), -0.0, "f4"))
    for name in ("x", "z"):
        path = tmp_path / f"{name}.npy"
        adopt(plan_adoption(path))
        for to in FORMATS:
            need_package(to)
            out = tmp_path / f"{name}-as-{to}"
            export_store(plan_export(path, to, out))
            equal_bits(np.asarray(READ[to](out)[0]), np.load(path))


def test_blocks_of_one_row_and_of_many_give_the_same(tmp_path, monkeypatch):
    spec = make_spec(tmp_path / "store", rows=37, dtype="float16")
    whole(spec)
    outs = []
    for block_bytes in (1, 70, 10_000):
        monkeypatch.setattr("raypipe.store.formats.base.BLOCK_BYTES", block_bytes)
        out = tmp_path / f"{block_bytes}.npy"
        export_store(plan_export(spec.path, "npy", out))
        outs.append(out.read_bytes())
        parquet = tmp_path / f"{block_bytes}.parquet"
        export_store(plan_export(spec.path, "parquet", parquet))
        equal_bits(read_parquet(parquet)[0], np.load(spec.path))
    assert outs == [spec.path.read_bytes()] * 3


def test_bfloat16_is_named_in_each_format(tmp_path):
    spec = make_spec(tmp_path / "store", dtype="bfloat16")
    whole(spec)
    for to in ("parquet", "zarr", "webdataset"):
        need_package(to)
        export_store(plan_export(spec.path, to, tmp_path / to))
    metadata = json.loads(pq.read_schema(tmp_path / "parquet").metadata[b"raypipe"])
    group = json.loads((tmp_path / "zarr" / "zarr.json").read_text())["attributes"]["raypipe"]
    listing = json.loads((tmp_path / "webdataset" / "export.json").read_text())
    for facts in (metadata, group, listing):
        assert (facts["dtype"], facts["fingerprint"]) == ("bfloat16", spec.fingerprint)
    with tarfile.open(tmp_path / "webdataset" / "train-000000.tar") as tar:
        assert json.load(tar.extractfile("000000003.json"))["dtype"] == "bfloat16"


def test_webdataset_shards_are_of_the_size_asked_and_the_same_again(tmp_path):
    spec = make_spec(tmp_path / "store", rows=40, row_shape=(100,))
    whole(spec)
    for name in ("a", "b"):
        options = FormatOptions(shard_bytes=30_000)
        export_store(plan_export(spec.path, "webdataset", tmp_path / name, options=options))
    shards = sorted(p.name for p in (tmp_path / "a").glob("*.tar"))
    assert len(shards) > 2
    for shard in shards:
        assert (tmp_path / "a" / shard).stat().st_size <= 30_000 + tarfile.RECORDSIZE
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()


def test_zarr_files_are_few_with_shards_and_one_a_chunk_without(tmp_path):
    pytest.importorskip("zarr")
    spec = make_spec(tmp_path / "store", rows=40)
    whole(spec)
    for shard_bytes, files in ((None, 1), (0, 40)):
        out = tmp_path / str(shard_bytes)
        options = FormatOptions(shard_bytes=shard_bytes)
        export_store(plan_export(spec.path, "zarr", out, options=options))
        assert len([p for p in (out / "features" / "c").rglob("*") if p.is_file()]) == files


@pytest.mark.parametrize("to", FORMATS)
def test_nothing_is_overwritten_unasked(tmp_path, to):
    need_package(to)
    spec = make_spec(tmp_path / "store")
    whole(spec)
    out = tmp_path / "out"
    export_store(plan_export(spec.path, to, out))
    with pytest.raises(StoreError, match="is there already"):
        plan_export(spec.path, to, out)
    export_store(plan_export(spec.path, to, out, float32=True, overwrite=True))
    equal_bits(np.asarray(READ[to](out)[0]), np.asarray(np.load(spec.path)))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("to", FORMATS)
def test_a_folder_of_somebody_is_never_replaced(tmp_path, to):
    need_package(to)
    spec = make_spec(tmp_path / "store")
    whole(spec)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("all my work")
    with pytest.raises(StoreError, match="no such export"):
        plan_export(spec.path, to, tmp_path / "home", overwrite=True)
    with pytest.raises(StoreError, match="is a store; choose another"):
        plan_export(spec.path, to, spec.path, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "all my work"


def test_refusals(tmp_path):
    with pytest.raises(MissingInput):
        plan_export(tmp_path / "x.npy", "npy", tmp_path / "y.npy")
    np.save(tmp_path / "x.npy", np.zeros((3, 2), "i4"))
    adopt(plan_adoption(tmp_path / "x.npy"))
    with pytest.raises(ConfigError, match="does not hold exactly"):
        plan_export(tmp_path / "x.npy", "npy", tmp_path / "y.npy", float32=True)
    with open_for_writing(make_spec(tmp_path), run_id="r") as run, pytest.raises(StoreNotSealed):
        plan_export(run.spec.path, "npy", tmp_path / "y.npy")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    spec = make_spec(tmp_path / "store")
    whole(spec)
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ConfigError, match=r"pip install 'raypipe\[export\]'"):
        plan_export(spec.path, "zarr", tmp_path / "out")


@pytest.mark.parametrize("to", FORMATS)
def test_damaged_rows_are_not_exported(tmp_path, to):
    need_package(to)
    spec = make_spec(tmp_path / "store")
    whole(spec)
    with spec.path.open("r+b") as file:
        file.seek(128 + 5 * 60)
        file.write(b"\xff")
    out = tmp_path / "out"
    with pytest.raises(StoreCorrupt, match=r"rows \[4, 8\)"):
        export_store(plan_export(spec.path, to, out))
    assert not out.exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("to", FORMATS)
def test_no_space_is_said_before_anything_is_written(tmp_path, to, monkeypatch):
    need_package(to)
    spec = make_spec(tmp_path / "store", rows=400)
    whole(spec)
    plan = plan_export(spec.path, to, tmp_path / "out")
    monkeypatch.setattr("raypipe.store.space.free_bytes", lambda path: plan.need_bytes - 1)
    with pytest.raises(NoSpace, match=f"needs {plan.need_bytes} bytes"):
        export_store(plan)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_two_of_the_same_export_do_not_meet(tmp_path):
    spec = make_spec(tmp_path / "store")
    whole(spec)
    plan = plan_export(spec.path, "npy", tmp_path / "y.npy")

    def second(rows):
        with pytest.raises(StoreLocked):
            export_store(plan)

    export_store(plan, second)
    assert (tmp_path / "y.npy").read_bytes() == spec.path.read_bytes()


KILLED = """
import os, sys
from pathlib import Path
import raypipe.store.export as room
from raypipe.store.formats import FormatOptions
to, at, store, out = sys.argv[1:]
options = FormatOptions(shard_bytes=3000 if to in ("zarr", "webdataset") else None)
die = lambda *a: os.kill(os.getpid(), 9)
if at == "rename":
    room._put = die
elif at == "between":
    real = Path.replace
    Path.replace = lambda a, b: die() if a.name.endswith("raypipe-partial") else real(a, b)
plan = room.plan_export(Path(store), to, Path(out), options=options, overwrite=True)
seen = []
def progress(rows):
    seen.append(rows)
    if at == "rows" and (len(seen) == 2 or sum(seen) == 40):
        die()
room.export_store(plan, progress)
"""


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("at", ["rows", "rename", "between"])
def test_kill_9_leaves_the_old_export_and_the_command_runs_again(tmp_path, to, at):
    need_package(to)
    spec = make_spec(tmp_path / "store", rows=40, dtype="float16")
    whole(spec)
    out = tmp_path / "out"
    export_store(plan_export(spec.path, to, out, float32=True))
    with start(KILLED, to, at, spec.path, out) as process:
        assert process.wait(60) == -signal.SIGKILL
    if at == "between" and to in FOLDERS:
        assert not out.exists()
    else:
        assert READ[to](out)[0].dtype == np.float32
    export_store(plan_export(spec.path, to, out, overwrite=True))
    equal_bits(np.asarray(READ[to](out)[0]), np.load(spec.path))
    assert leftovers(tmp_path) == []


def test_the_earlier_export_comes_back_when_the_next_one_fails(tmp_path):
    spec = make_spec(tmp_path / "store", rows=40)
    whole(spec)
    out = tmp_path / "out"
    export_store(plan_export(spec.path, "webdataset", out))
    with start(KILLED, "webdataset", "between", spec.path, out) as process:
        process.wait(60)
    assert not out.exists()
    spec.path.write_bytes(spec.path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(StoreCorrupt):
        export_store(plan_export(spec.path, "webdataset", out, overwrite=True))
    assert len(read_webdataset(out)[0]) == 40


SMALL_THEN_LARGE = """
import sys
from pathlib import Path
from raypipe.store import export_store, plan_export
from raypipe.store.formats import FormatOptions
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
to, folder = sys.argv[1], Path(sys.argv[2])
options = FormatOptions(shard_bytes=16 << 20 if to in ("zarr", "webdataset") else None)
peaks = []
for name in ("small", "large"):
    export_store(plan_export(folder / f"{name}.npy", to, folder / "out" / name, options=options))
    peaks.append(peak())
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_memory_does_not_grow_with_the_store(tmp_path, to):
    need_package(to)
    for name, rows in (("small", 32), ("large", 160)):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", "f4", (rows, 1 << 18))[::7] = 1
        adopt(plan_adoption(tmp_path / f"{name}.npy"))
    with start(SMALL_THEN_LARGE, to, tmp_path) as process:
        grown = int(process.communicate(timeout=250)[0])
    assert grown < 64 << 20, "128 MiB more were exported"


def test_command(tmp_path, capsys):
    spec = make_spec(tmp_path / "store")
    whole(spec)
    out = tmp_path / "y.npy"
    args = [str(spec.path), "--to", "npy", "--out", str(out)]
    export(config.parse(ExportConfig, [*args, "--dry-run"], prog="p"))
    assert "would be written  (10, 3, 5) float32 as npy  at most 728 B" in capsys.readouterr().out
    assert not out.exists()
    export(config.parse(ExportConfig, args, prog="p"))
    assert "written" in capsys.readouterr().out
    assert out.read_bytes() == spec.path.read_bytes()
    with pytest.raises(ConfigError, match="only zarr has chunks"):
        ExportConfig(store=out, to="npy", out=out, chunk_rows=2)
    with pytest.raises(ConfigError, match="npy has no shards"):
        ExportConfig(store=out, to="npy", out=out, shard_size="1GiB")
