"""Copies on another disk: byte for byte, sealed last, found through the catalog by node."""

from __future__ import annotations

import json
import signal
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_kit import make_spec, rows_of, start, whole

from raypipe import config
from raypipe.errors import (
    ConfigError,
    FingerprintMismatch,
    MissingInput,
    NoSpace,
    StoreCorrupt,
    StoreError,
    StoreLocked,
    StoreNotSealed,
)
from raypipe.store import (
    FeatureStore,
    Place,
    add_place,
    discard_store,
    locate,
    open_for_writing,
    open_locator,
    place_on,
    places_of,
    plan_replicas,
    replicate_store,
    require_room,
    this_node,
    verify,
)
from raypipe.store.catalog import remove_place
from raypipe.store.copy_commands import ReplicateConfig, replicate
from raypipe.store.layout import ShardPaths
from raypipe.store.lock import take_lock

COPIED = ["train.index.parquet", "train.manifest.json", "train.npy"]


def copy(store, to, **options):
    return [replicate_store(replica, **options) for replica in plan_replicas(store, to)]


def beside(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def spec(tmp_path):
    """A sealed store of 40 rows in cells of 4."""
    made = make_spec(tmp_path / "shared", rows=40, dtype="float16")
    whole(made, bad=[3])
    return made


def test_a_copy_is_a_store(tmp_path, spec):
    seen = []
    (path,) = copy(spec.path, tmp_path / "local", progress=seen.append)
    assert path == tmp_path / "local" / "train.npy"
    assert beside(path.parent) == COPIED
    assert path.read_bytes() == spec.path.read_bytes()
    one, other = FeatureStore.open(spec.path), FeatureStore.open(path)
    assert one.fingerprint == other.fingerprint
    assert one.index.equals(other.index)
    assert verify(path).ok
    assert sum(seen) == 40
    assert other.manifest["replica_of"]["path"] == str(spec.path)


def test_a_folder_keeps_its_tree(tmp_path, spec):
    other = make_spec(tmp_path / "shared", path=tmp_path / "shared" / "clip" / "synt.npy")
    whole(other)
    copy(tmp_path / "shared", tmp_path / "local")
    for path in (spec.path, other.path):
        assert verify(tmp_path / "local" / path.relative_to(tmp_path / "shared")).ok
    with pytest.raises(ConfigError, match="lies inside"):
        plan_replicas(tmp_path / "shared", tmp_path / "shared" / "copies")


def test_what_is_there_is_not_copied_again(tmp_path, spec):
    (path,) = copy(spec.path, tmp_path / "local")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    (again,) = plan_replicas(spec.path, tmp_path / "local")
    assert (again.step, again.need_bytes) == ("there", 0)
    copy(spec.path, tmp_path / "local")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


@pytest.mark.parametrize("damage", ["cut", "gone", "index"])
def test_a_damaged_copy_is_made_again(tmp_path, spec, damage):
    (path,) = copy(spec.path, tmp_path / "local")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "gone":
        path.unlink()
    else:
        ShardPaths.of(path).index.write_bytes(b"no table")
    (again,) = plan_replicas(spec.path, tmp_path / "local")
    assert again.step == "again"
    replicate_store(again)
    assert verify(path).ok
    assert beside(path.parent) == COPIED


def test_other_stores_are_refused(tmp_path, spec):
    other = make_spec(tmp_path / "other", rows=40, identity={"backbone": "clip"}, dtype="float16")
    whole(other)
    (path,) = copy(other.path, tmp_path / "local")
    with pytest.raises(FingerprintMismatch, match="is another store"):
        plan_replicas(spec.path, tmp_path / "local")
    assert path.read_bytes() == other.path.read_bytes()
    apart = make_spec(tmp_path / "apart", rows=40, dtype="float16")
    whole(apart, bad=[3, 4])
    assert apart.fingerprint == spec.fingerprint
    with pytest.raises(FingerprintMismatch, match="other bytes"):
        plan_replicas(spec.path, apart.path.parent)
    with pytest.raises(ConfigError, match="onto itself"):
        plan_replicas(spec.path, spec.path.parent)


def test_what_cannot_be_a_copy_is_left_alone(tmp_path, spec):
    local = tmp_path / "local"
    local.mkdir()
    np.save(local / "train.npy", np.zeros(3))
    before = (local / "train.npy").read_bytes()
    with pytest.raises(StoreError, match="without a manifest"):
        copy(spec.path, local)
    assert (local / "train.npy").read_bytes() == before
    assert beside(local) == ["train.npy"]
    same_size = bytearray(spec.path.read_bytes())
    same_size[-1] ^= 1
    (local / "train.npy").write_bytes(same_size)
    with pytest.raises(StoreError, match="without a manifest"):
        copy(spec.path, local)
    assert (local / "train.npy").read_bytes() == same_size
    (local / "train.npy").unlink()
    (local / "train.index.parquet").write_bytes(b"mine")
    with pytest.raises(StoreError, match="without a manifest"):
        copy(spec.path, local)
    being = make_spec(tmp_path, path=tmp_path / "being" / "train.npy", rows=40, dtype="float16")
    with open_for_writing(being, run_id="r"), pytest.raises(StoreError, match="being extracted"):
        copy(spec.path, tmp_path / "being")
    with pytest.raises(StoreNotSealed):
        plan_replicas(being.path, local)
    with pytest.raises(MissingInput):
        plan_replicas(tmp_path / "nothing.npy", local)


def test_another_copier_is_named(tmp_path, spec):
    (replica,) = plan_replicas(spec.path, tmp_path / "local")
    (tmp_path / "local").mkdir()
    lock = take_lock(ShardPaths.of(replica.target))
    with pytest.raises(StoreLocked):
        replicate_store(replica)
    lock.close()
    copy(spec.path, tmp_path / "local")
    replicate_store(replica)  # planned before the other made it
    assert beside(tmp_path / "local") == COPIED


def test_a_damaged_source_makes_no_copy(tmp_path, spec):
    with spec.path.open("r+b") as file:
        file.seek(128 + 30 * 13)
        file.write(b"\x11\x11")
    with pytest.raises(StoreCorrupt, match=r"rows \[12, 16\)"):
        copy(spec.path, tmp_path / "local")
    with pytest.raises(MissingInput):
        FeatureStore.open(tmp_path / "local" / "train.npy")
    assert beside(tmp_path / "local") == ["train.npy.partial"]
    whole(spec, overwrite=True)


@settings(max_examples=30)
@given(data=st.data(), threads=st.integers(1, 3))
def test_a_broken_off_copy_goes_on(tmp_path_factory, data, threads):
    """Whatever bytes lie under the temporary name: the copy is whole, right cells are kept."""
    folder = tmp_path_factory.mktemp("replicate")
    spec = make_spec(folder / "shared", rows=data.draw(st.integers(1, 30)))
    whole(spec)
    original = spec.path.read_bytes()
    begun = bytearray(original[: data.draw(st.integers(0, len(original)))])
    for at in data.draw(st.lists(st.integers(0, max(0, len(begun) - 1)), max_size=4)):
        if begun:
            begun[at] ^= 0x40
    begun += bytes(data.draw(st.integers(0, 50)))
    (folder / "local").mkdir()
    (folder / "local" / "train.npy.partial").write_bytes(begun)
    (path,) = copy(spec.path, folder / "local", threads=threads)
    assert path.read_bytes() == original
    assert verify(path, threads).ok


KILLED = """
import os, sys
from pathlib import Path
import raypipe.store.replicate as room
at, store, to = sys.argv[1:]
die = lambda *a, **k: os.kill(os.getpid(), 9)
if at in ("move", "write_atomic", "Manifest_write", "tidy"):
    if at == "Manifest_write":
        room.Manifest.write = die
    else:
        setattr(room, at, die)
seen = []
def progress(rows):
    seen.append(rows)
    if at == "rows" and sum(seen) > 10:
        die()
room.replicate_store(room.plan_replicas(Path(store), Path(to))[0], progress=progress)
"""


@pytest.mark.parametrize("at", ["rows", "move", "write_atomic", "Manifest_write", "tidy"])
def test_kill_9_leaves_no_copy_or_a_whole_one(tmp_path, spec, at):
    with start(KILLED, at, spec.path, tmp_path / "local") as process:
        assert process.wait(60) == -signal.SIGKILL
    path = tmp_path / "local" / "train.npy"
    if at == "tidy":
        assert verify(path).ok
    else:
        with pytest.raises(MissingInput):
            FeatureStore.open(path)
    copy(spec.path, tmp_path / "local")
    assert verify(path).ok
    assert path.read_bytes() == spec.path.read_bytes()


def test_room_is_asked_for_with_a_margin(tmp_path, spec, monkeypatch):
    replicas = plan_replicas(spec.path, tmp_path / "local")
    need = replicas[0].need_bytes
    assert need >= spec.nbytes
    monkeypatch.setattr("raypipe.store.space.free_bytes", lambda path: need + 1000)
    require_room(replicas, tmp_path, 1000)
    with pytest.raises(NoSpace, match="are to stay free"):
        require_room(replicas, tmp_path, 1001)
    cfg = ReplicateConfig(store=spec.path, to=tmp_path / "local", margin="2KB")
    with pytest.raises(NoSpace):
        replicate(cfg)
    assert not (tmp_path / "local").exists()


def test_command_and_catalog(tmp_path, spec, capsys, monkeypatch):
    args = [str(spec.path), "--to", str(tmp_path / "local"), "--node", "n1", "--margin", "0"]
    replicate(config.parse(ReplicateConfig, [*args, "--dry-run"], prog="p"))
    assert "would take" in capsys.readouterr().out
    assert not (tmp_path / "local").exists()
    replicate(config.parse(ReplicateConfig, args, prog="p"))
    assert "copied" in capsys.readouterr().out
    replicate(config.parse(ReplicateConfig, args, prog="p"))
    assert "was there" in capsys.readouterr().out
    place = Place("n1", tmp_path / "local" / "train.npy")
    assert places_of(spec.path, spec.fingerprint) == (place,)
    assert place_on(spec.path, spec.fingerprint, "n1") == place
    assert place_on(spec.path, spec.fingerprint, "n2") is None
    assert place_on(spec.path, "0" * 64, "n1") is None
    far = locate(spec.path, "n2")
    assert (far.path, far.node) == (spec.path, "")
    for monkey in (False, True):  # asked for from elsewhere, and on the node itself
        if monkey:
            monkeypatch.setenv("RAYPIPE_NODE", "n1")
            assert this_node() == "n1"
        near = locate(spec.path, "n1")
        assert (near.path, near.node, near.fingerprint) == (place.path, "n1", spec.fingerprint)
        np.testing.assert_array_equal(open_locator(near)[4:], rows_of(spec, 4, 40).astype("f2"))
    discard_store(place.path)
    with pytest.raises(StoreError, match="lists a copy on n1 that cannot be used"):
        locate(spec.path)
    remove_place(spec.path, spec.fingerprint, place)
    assert locate(spec.path).path == spec.path


def test_no_catalog(tmp_path, spec):
    replicate(ReplicateConfig(store=spec.path, to=tmp_path / "local", margin="0", catalog=False))
    assert places_of(spec.path, spec.fingerprint) == ()
    assert not ShardPaths.of(spec.path).places.exists()


def test_nodes_write_the_catalog_at_the_same_time(tmp_path, spec):
    places = [Place(f"n{k}", tmp_path / f"{k}.npy") for k in range(12)]
    threads = [
        threading.Thread(target=add_place, args=(spec.path, spec.fingerprint, place))
        for place in places
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert places_of(spec.path, spec.fingerprint) == tuple(sorted(places))
    assert beside(spec.path.parent) == sorted([*COPIED, "train.places.json"])


def test_a_catalog_of_another_store_says_nothing(tmp_path, spec):
    add_place(spec.path, "0" * 64, Place("n1", tmp_path / "x.npy"))
    assert places_of(spec.path, spec.fingerprint) == ()
    add_place(spec.path, spec.fingerprint, Place("n2", tmp_path / "y.npy"))
    listed = json.loads(ShardPaths.of(spec.path).places.read_text())
    assert [entry["node"] for entry in listed["places"]] == ["n2"]
    ShardPaths.of(spec.path).places.write_text("{}")
    with pytest.raises(StoreCorrupt, match="cannot be read"):
        places_of(spec.path, spec.fingerprint)
    with pytest.raises(ConfigError, match="absolute path"):
        add_place(spec.path, spec.fingerprint, Place("n1", tmp_path.relative_to("/")))
    discard_store(spec.path)
    assert not ShardPaths.of(spec.path).places.exists()
