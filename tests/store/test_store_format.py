"""What a sealed shard is: a plain .npy that anyone reads, with a manifest and an index that fit."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from store_kit import SEALED_FILES, beside, fill, make_spec, rows_of, sources_of, whole

from raypipe.errors import (
    ConfigError,
    MissingInput,
    StoreCorrupt,
    StoreNotSealed,
)
from raypipe.memory.guard import relieve
from raypipe.store import (
    FeatureStore,
    ShardWriter,
    describe,
    find_shards,
    from_bfloat16,
    open_for_writing,
    open_locator,
    verify,
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip(tmp_path, dtype):
    import torch

    spec = make_spec(tmp_path, dtype=dtype)
    store = FeatureStore.open(whole(spec, bad=[3]))
    wanted = torch.from_numpy(rows_of(spec, 0, 10)).to(getattr(torch, dtype)).float().numpy()
    stored = from_bfloat16(store.array) if dtype == "bfloat16" else np.asarray(store.array)
    assert store.logical_dtype == dtype
    keep = np.arange(10) != 3
    np.testing.assert_array_equal(stored[keep].astype(np.float32), wanted[keep])
    assert np.isnan(stored[3]).all()
    np.testing.assert_array_equal(store.valid, keep)
    assert store.names == spec.names
    assert store.index.column("reason").to_pylist()[3] == "truncated"
    assert store.index.column("size_bytes").to_pylist() == list(range(10))
    assert store.manifest["invalid_rows"] == 1
    assert beside(spec) == SEALED_FILES
    assert verify(spec.path).ok


def test_pages_given_back_and_flushes_change_no_byte(tmp_path):
    spec = make_spec(tmp_path)
    with open_for_writing(spec, run_id="test") as run:
        with ShardWriter(run.target, "w") as out:
            out.flush()  # nothing was written
            out.write(0, rows_of(spec, 0, 4), sources_of(0, 4))
            out.flush()
            assert run.missing() == [(0, 4), (4, 8), (8, 10)], "a flush commits nothing"
        fill(run)
        run.seal()
    store = FeatureStore.open(spec.path)
    before = store[:]
    copy = before.copy()
    relieve()
    np.testing.assert_array_equal(before, copy)
    np.testing.assert_array_equal(before, rows_of(spec, 0, 10))


def test_np_load_in_a_python_without_raypipe(tmp_path):
    path = whole(make_spec(tmp_path, dtype="float16"))
    code = (
        "import sys, numpy as np; a = np.load(sys.argv[1], mmap_mode='r'); "
        "assert type(a) is np.memmap and 'raypipe' not in sys.modules; "
        "print(a.dtype, a.shape, float(a[9].astype('f8').sum()))"
    )
    argv = [sys.executable, "-I", "-c", code, str(path)]
    out = subprocess.run(argv, check=True, capture_output=True, text=True, cwd="/").stdout
    wanted = rows_of(make_spec(tmp_path), 9, 10).astype(np.float16).astype("f8").sum()
    assert out == f"float16 (10, 3, 5) {float(wanted)}\n"


def test_the_bytes_are_those_of_np_save(tmp_path):
    spec = make_spec(tmp_path)
    path = whole(spec)
    np.save(tmp_path / "numpy.npy", rows_of(spec, 0, 10))
    assert path.read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_import_loads_neither_torch_nor_ray_nor_pyarrow():
    code = (
        "import sys, raypipe.store; "
        "assert not {'torch', 'ray', 'pyarrow', 'pandas'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_manifest_describes(tmp_path):
    spec = make_spec(
        tmp_path, dtype="float16", token_layout={"cls": 1}, provenance={"torch": "2.15"}
    )
    whole(spec)
    fields = json.loads(spec.paths.manifest.read_text())
    assert fields["format"] == "raypipe-store"
    assert fields["state"] == "sealed"
    assert fields["shape"] == [10, 3, 5]
    assert fields["token_layout"] == {"cls": 1}
    assert fields["provenance"] == {"torch": "2.15"}
    assert len(fields["checksums"]["values"]) == 3
    exact = rows_of(spec, 0, 10).astype("f8")
    narrowed = exact.astype(np.float16).astype("f8")
    worst = np.max(np.abs(narrowed - exact) / np.abs(exact))
    assert fields["narrowing"]["max_relative_error"] == pytest.approx(worst, rel=1e-5)
    assert fields["narrowing"]["max_absolute_error"] == np.max(np.abs(narrowed - exact))


def test_halved_batches_are_listed_joined(tmp_path):
    from raypipe.store import ShardWriter

    spec = make_spec(tmp_path, rows=18)
    with open_for_writing(spec, run_id="r") as run, ShardWriter(run.target, "w") as out:
        for lo, hi in run.missing():
            batch = {0: 2, 4: 2, 8: 1}.get(lo)
            out.write(lo, rows_of(spec, lo, hi), [_source()] * (hi - lo), batch=batch)
        out.commit()
        run.seal()
    assert FeatureStore.open(spec.path).manifest["halved"] == [[0, 8, 2], [8, 12, 1]]


def _source():
    from raypipe.store import RowSource

    return RowSource("00", 1)


def test_store_pickles_as_a_locator(tmp_path):
    spec = make_spec(tmp_path, rows=1000, row_shape=(64,))
    store = FeatureStore.open(whole(spec))
    raw = pickle.dumps(store)
    assert len(raw) < 1000
    again = pickle.loads(raw)
    np.testing.assert_array_equal(again[5:7], store[5:7])
    assert not again.array.flags.writeable
    locator = store.locator("node-1")
    assert (locator.node, locator.offset, locator.shape) == ("node-1", 128, (1000, 64))
    with pytest.raises(StoreCorrupt, match="was replaced since"):
        open_locator(replace(locator, fingerprint="0" * 64))


def test_open_by_folder_and_split(tmp_path):
    spec = make_spec(tmp_path)
    whole(spec)
    assert len(FeatureStore.open(spec.path.parent, "train")) == 10
    with pytest.raises(MissingInput, match=r"no store at .*synt\.npy"):
        FeatureStore.open(spec.path.parent, "synt")
    with pytest.raises(ConfigError, match=r"does not end in \.npy"):
        FeatureStore.open(spec.path.parent)


def test_foreign_npy_has_no_manifest(tmp_path):
    np.save(tmp_path / "train.npy", np.zeros(3))
    with pytest.raises(MissingInput, match=r"has no manifest train\.manifest\.json"):
        FeatureStore.open(tmp_path / "train.npy")


def test_unfinished_store_says_how_far_it_is(tmp_path):
    spec = make_spec(tmp_path)
    with open_for_writing(spec, run_id="r") as run:
        from raypipe.store import ShardWriter

        with ShardWriter(run.target, "w") as out:
            out.write(4, rows_of(spec, 4, 8), [_source()] * 4)
            out.commit()
        with pytest.raises(StoreNotSealed, match="4 of 10 rows"):
            FeatureStore.open(spec.path)
        with pytest.raises(StoreNotSealed):
            verify(spec.path)
        facts = describe(spec.path)
        assert (facts["state"], facts["rows_done"]) == ("writing", 4)
        assert facts["owner"]["alive"] is True
        assert not spec.path.exists()
    assert describe(spec.path)["owner"]["alive"] is False


def test_describe_and_find(tmp_path):
    one = make_spec(tmp_path)
    other = make_spec(tmp_path, path=tmp_path / "clip_vit_512" / "02" / "synt.npy")
    whole(one)
    whole(other)
    (tmp_path / "clip_vit_512" / "02" / "other.npy").write_bytes(b"no store")
    assert find_shards(tmp_path) == [other.path, one.path]
    assert find_shards(one.path) == [one.path]
    facts = json.loads(json.dumps(describe(one.path)))
    assert (facts["rows_done"], facts["state"]) == (10, "sealed")
    with pytest.raises(MissingInput):
        describe(tmp_path / "nothing.npy")
    with pytest.raises(MissingInput, match="is not there"):
        find_shards(tmp_path / "nowhere")


@pytest.mark.parametrize("cut", [0, 5, 127, 128, 200, -1])
def test_cut_file_is_an_error_not_a_bus_error(tmp_path, cut):
    path = whole(make_spec(tmp_path))
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(StoreCorrupt):
        FeatureStore.open(path)
    report = verify(path)
    assert not report.ok
    assert report.problems
    path.write_bytes(data + b"\0")
    with pytest.raises(StoreCorrupt, match=r"has 729 bytes, 728 are due"):
        FeatureStore.open(path)


def test_verify_finds_every_flipped_byte(tmp_path):
    spec = make_spec(tmp_path, row_shape=(2,))
    path = whole(spec)
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        report = verify(path)
        assert not report.ok, at
        if at >= 128:
            row = (at - 128) // 8
            assert report.bad_ranges == ((row // 4 * 4, min(row // 4 * 4 + 4, 10)),)
    path.write_bytes(good)
    report = verify(path, threads=1)
    assert report.ok
    assert report.bytes_read == len(good) - 128
    path.unlink()
    assert verify(path).bad_ranges == ((0, 10),)


def test_verify_checks_index_and_manifest(tmp_path):
    spec = make_spec(tmp_path)
    path = whole(spec)
    index = spec.paths.index.read_bytes()
    spec.paths.index.write_bytes(index[:-1])
    assert verify(path).problems
    spec.paths.index.unlink()
    assert "cannot be read" in verify(path).problems[0]
    with pytest.raises(StoreCorrupt, match="cannot be read"):
        FeatureStore.open(path).valid.sum()
    spec.paths.index.write_bytes(index)
    assert verify(path).ok
    text = spec.paths.manifest.read_text()
    spec.paths.manifest.write_text(text.replace('"dinov2_q"', '"dinov2_k"'))
    with pytest.raises(StoreCorrupt, match="changed by hand"):
        verify(path)
    spec.paths.manifest.write_text(text[: len(text) // 2])
    with pytest.raises(StoreCorrupt, match="is not JSON"):
        FeatureStore.open(path)
    spec.paths.manifest.write_text(text.replace('"halved"', '"halfed"'))
    with pytest.raises(StoreCorrupt, match="lacks halved"):
        FeatureStore.open(path)
    spec.paths.manifest.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(StoreCorrupt, match="format version 2"):
        FeatureStore.open(path)


def test_same_rows_same_bytes_of_data_and_index(tmp_path):
    one, other = make_spec(tmp_path / "a"), make_spec(tmp_path / "b")
    whole(one, bad=[7])
    with open_for_writing(other, run_id="z") as run:
        fill(run, bad=[7], writer="another")
        run.seal(verify=True)
    assert one.path.read_bytes() == other.path.read_bytes()
    assert one.paths.index.read_bytes() == other.paths.index.read_bytes()
