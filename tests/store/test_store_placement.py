"""Which way a reader goes is said by the catalog, from any node, with no file opened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe import config
from raypipe.errors import ConfigError, MissingInput, StoreCorrupt, StoreError
from raypipe.store import (
    FeatureStore,
    Place,
    PlacedStore,
    Placement,
    adopt,
    declare,
    open_or_placed,
    plan_adoption,
    stand_in,
)
from raypipe.store.catalog import add_place, locate, read_catalog, remove_place
from raypipe.store.place_commands import PlaceConfig, place

NODES = st.sampled_from("ABCD")


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    path = tmp_path / "disk" / "dino" / "train.npy"
    path.parent.mkdir(parents=True)
    np.save(path, np.arange(24, dtype=np.float32).reshape(6, 4))
    adopt(plan_adoption(path))
    return FeatureStore.open(path)


@given(
    shared=st.booleans(),
    nodes=st.lists(NODES, unique=True),
    me=NODES,
    turn=st.integers(0, 9),
)
def test_the_way_is_own_copy_then_shared_path_then_another_node(
    shared: bool, nodes: list[str], me: str, turn: int
) -> None:
    places = tuple(Place(node, Path(f"/nvme-{node}/x.npy")) for node in nodes)
    if not (shared or places):
        return  # `Placement.of` refuses it
    way = Placement(path=Path("/s/x.npy"), shared=shared, places=places).way(me, turn)
    if me in nodes:
        assert (way.kind, way.places) == ("local", (Place(me, Path(f"/nvme-{me}/x.npy")),))
    elif shared:
        assert (way.kind, way.places) == ("shared", (Place("", Path("/s/x.npy")),))
    else:
        assert way.kind == "remote" and sorted(way.places) == sorted(places)
        assert way.places[0] == places[turn % len(places)]


def test_a_store_on_nodes_disks_is_planned_from_its_catalog_alone(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = declare(store, "A", at=tmp_path / "seen-by-all" / "train.npy")
    add_place(at, store.fingerprint, Place("B", Path("/data/train.npy")))
    assert sorted(path.name for path in at.parent.glob("[!.]*")) == [
        "train.places.json",
        "train.places.parquet",
    ]
    found = stand_in(at)
    assert (found.path, found.shape, found.dtype) == (at, (6, 4), "float32")
    assert (found.offset, found.fingerprint) == (store.locator().offset, store.fingerprint)
    placement = Placement.of(at, store.fingerprint)
    assert placement.listed and not placement.shared
    assert [p.node for p in placement.places] == ["A", "B"]
    assert placement.way("C", 1).words == "rows of /data/train.npy from node B"
    with pytest.raises(StoreError, match="lies on the disks of A, B, not of C"):
        locate(at, "C")
    monkeypatch.setenv("RAYPIPE_NODE", "A")
    assert (locate(at).path, locate(at).node) == (store.path, "A")
    placement.check(placement.places[0])
    with pytest.raises(StoreError, match=r"lists a copy on B .* replicate"):
        placement.check(placement.places[1])
    with pytest.raises(StoreError, match="is of another store now"):
        Placement.of(at, "0" * 64)
    for listed in placement.places:
        remove_place(at, store.fingerprint, listed)
    with pytest.raises(StoreError, match="names no node that has the store"):
        Placement.of(at, store.fingerprint)


def test_plain_files_and_files_placed_by_hand(tmp_path: Path, store: FeatureStore) -> None:
    plain = tmp_path / "y.npy"
    assert Placement.of(plain).way("A").words == f"shared {plain}"
    assert Placement.of(tmp_path / "raw.bin", "abc").shared
    there = Placement.of(plain, node="A")
    assert there.way("A").words == f"local copy {plain}"
    assert there.way("B").words == f"rows of {plain} from node A"
    there.check(Place("A", plain))  # no manifest: it is checked when it is mapped
    add_place(store.path, "0" * 64, Place("A", plain))  # of what lay there before
    assert Placement.of(store.path, store.fingerprint).way("A").kind == "shared"


def test_a_file_at_the_catalogs_place_is_not_passed_over(
    store: FeatureStore, tmp_path: Path
) -> None:
    np.save(tmp_path / "train.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="is a file, and would be passed over"):
        declare(store, "A", at=tmp_path / "train.npy")
    assert declare(store, "A") == store.path
    assert Placement.of(store.path, store.fingerprint).way("B").kind == "remote"


def test_the_command(
    store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, seen = tmp_path / "disk", tmp_path / "seen"
    for node in ("A", "B"):
        place(
            config.parse(PlaceConfig, [str(root), "--catalog", str(seen), "--node", node], prog="p")
        )
    assert f"{seen / 'dino' / 'train.npy'}  on node B  {store.path}" in capsys.readouterr().out
    catalog = read_catalog(seen / "dino" / "train.npy")
    assert catalog is not None and not catalog.shared
    assert catalog.places == (Place("A", store.path), Place("B", store.path))
    assert json.loads((seen / "dino" / "train.places.json").read_text())["shape"] == [6, 4]
    with pytest.raises(MissingInput, match="is not there"):
        place(PlaceConfig(store=tmp_path / "none"))
    with pytest.raises(ConfigError, match="--node is empty"):
        PlaceConfig(store=root, node="")


def test_a_catalog_of_another_store_is_not_replaced_in_silence(
    store: FeatureStore, tmp_path: Path
) -> None:
    at = tmp_path / "seen-by-all" / "train.npy"
    declare(store, "A", at=at)
    path = tmp_path / "disk" / "clip" / "train.npy"
    path.parent.mkdir()
    np.save(path, np.ones((6, 4), np.float32))
    adopt(plan_adoption(path))
    other = FeatureStore.open(path)
    with pytest.raises(ConfigError, match=r"is of another store .* lies on A; give this"):
        declare(other, "B", at=at)
    with pytest.raises(ConfigError, match="is of another store"):
        add_place(at, other.fingerprint, Place("B", path))
    found = read_catalog(at)
    assert found is not None and found.fingerprint == store.fingerprint
    # Made anew where it lay, it may: nothing that is listed is left of the old one.
    store.path.unlink()
    store.path.with_name("train.manifest.json").unlink()
    np.save(store.path, np.zeros((6, 4), np.float32))
    adopt(plan_adoption(store.path))
    declare(FeatureStore.open(store.path), "A", at=at)
    found = read_catalog(at)
    assert found is not None and found.fingerprint != store.fingerprint


def test_a_catalog_says_all_of_a_store_but_its_rows(store: FeatureStore, tmp_path: Path) -> None:
    at = declare(store, "A", at=tmp_path / "seen-by-all" / "train.npy")
    assert isinstance(open_or_placed(store.path), FeatureStore)
    declare(store, "A")  # and where it lies, it is still opened there
    assert isinstance(open_or_placed(store.path), FeatureStore)
    for file in [store.path, *store.path.parent.glob("train.*")]:
        file.unlink(missing_ok=True)
    found = open_or_placed(at)
    assert isinstance(found, PlacedStore) and found.path == at
    assert (found.names, found.valid.tolist()) == (store.names, store.valid.tolist())
    assert (found.shape, found.logical_dtype) == (store.shape, store.logical_dtype)
    assert found.fingerprint == store.fingerprint
    assert found.manifest == {k: store.manifest[k] for k in ("identity", "token_layout")}
    assert found.locator() == stand_in(at)
    note = at.with_name("train.places.parquet")
    data = note.read_bytes()
    note.unlink()  # as of a catalog that an earlier raypipe wrote
    with pytest.raises(StoreError, match=r"places.parquet.* is not there; .* raypipe store place"):
        open_or_placed(at)
    note.write_bytes(data[:-9])
    with pytest.raises(StoreCorrupt, match="cannot be read"):
        open_or_placed(at)


def test_a_note_of_another_store_is_not_believed_and_is_made_anew(
    store: FeatureStore, tmp_path: Path
) -> None:
    at = tmp_path / "seen-by-all" / "train.npy"
    declare(store, "A", at=at)
    note = at.with_name("train.places.parquet")
    old = note.read_bytes()
    for file in [store.path, *store.path.parent.glob("train.*")]:
        file.unlink(missing_ok=True)
    np.save(store.path, np.ones((9, 4), np.float32))
    adopt(plan_adoption(store.path))
    again = FeatureStore.open(store.path)
    declare(again, "A", at=at)
    found = open_or_placed(at)
    assert (len(found.names), found.fingerprint) == (9, again.fingerprint)
    note.write_bytes(old)
    with pytest.raises(StoreError, match="is of another store"):
        open_or_placed(at)


def test_a_note_follows_rows_that_were_mended(store: FeatureStore, tmp_path: Path) -> None:
    """Their fingerprint is the same: names, shape and recipe."""
    at = tmp_path / "seen-by-all" / "train.npy"
    declare(store, "A", at=at)
    note = at.with_name("train.places.parquet")
    table = pq.read_table(note)
    broken = pa.array([False] + [True] * (table.num_rows - 1))
    index = table.schema.get_field_index("valid")
    pq.write_table(table.set_column(index, table.schema.field("valid"), broken), note)
    assert not PlacedStore.open(stand_in(at)).valid.all()
    declare(store, "A", at=at)
    assert PlacedStore.open(stand_in(at)).valid.tolist() == store.valid.tolist()
