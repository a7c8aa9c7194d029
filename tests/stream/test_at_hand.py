"""Without Ray a store is read where the catalog says that this node has it, or not at all: one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raypipe.errors import MissingInput, StoreError
from raypipe.store import (
    FeatureStore,
    Place,
    RowSource,
    ShardSpec,
    ShardWriter,
    add_place,
    declare,
    open_for_writing,
    plan_replicas,
    replicate_store,
    stand_in,
)
from raypipe.stream import ArraySource, FeatureLoader, Gatherer
from raypipe.stream.at_hand import open_at_hand, ways_at_hand

ROWS, BAD = 40, 3
ELSEWHERE = r"x\.npy lies on the disks of A, B, not of C .*raypipe store replicate.*--runner ray"


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """40 rows on the disk of node A; row 3 is not valid."""
    path = tmp_path / "disk-of-A" / "x.npy"
    names = tuple(f"{row}.png" for row in range(ROWS))
    spec = ShardSpec(
        path=path, rows=ROWS, row_shape=(5,), dtype="float16", names=names, grid=10, identity={}
    )
    values = np.random.default_rng(0).standard_normal((ROWS, 5)).astype(np.float32)
    origins = [RowSource(f"{i:032x}", i, "truncated" if i == BAD else None) for i in range(ROWS)]
    with open_for_writing(spec, run_id="test") as run:
        with ShardWriter(run.target, "w") as out:
            for lo, hi in run.missing():
                out.write(lo, values[lo:hi], origins[lo:hi])
                run.accept(out.commit())
        run.seal()
    return FeatureStore.open(path)


@pytest.fixture
def at(store: FeatureStore, tmp_path: Path) -> Path:
    """Where all nodes see that A and B have it, and nothing else."""
    path = declare(store, "A", at=tmp_path / "catalogs" / "x.npy")
    add_place(path, store.fingerprint, Place("B", Path("/data/x.npy")))
    return path


def batches(loader: FeatureLoader) -> list[np.ndarray]:
    return [batch["x"].numpy() for batch in loader]


def test_this_nodes_copy_is_read_and_its_invalid_rows_are_left_out(
    store: FeatureStore, at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYPIPE_NODE", "A")
    wanted = batches(FeatureLoader({"x": store}, 8, seed=5, rows=np.flatnonzero(store.valid)))
    for given in (at, str(at), store, store.path):
        loader = FeatureLoader({"x": given}, 8, seed=5)
        assert loader.plan.rows.size == ROWS - 1
        np.testing.assert_equal(batches(loader), wanted)
    assert ways_at_hand({"x": ArraySource.of_locator(stand_in(at))}) == (
        f"on node A, x: local copy {store.path}"
    )


@pytest.mark.parametrize("rows", [None, range(8)])
def test_a_store_of_other_nodes_is_one_line_that_names_them(
    at: Path, rows: range | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYPIPE_NODE", "C")
    with pytest.raises(StoreError, match=ELSEWHERE) as caught:
        batches(FeatureLoader({"x": at}, 8, rows=rows))
    assert "\n" not in str(caught.value)
    source = ArraySource.of_locator(stand_in(at))
    for fail in (
        lambda: open_at_hand(source),
        lambda: Gatherer({"x": source}, 8),
        lambda: ways_at_hand({"x": source}),
    ):
        with pytest.raises(StoreError, match=ELSEWHERE):
            fail()
    with pytest.raises(MissingInput, match=r"x.npy on node A, /data/x.npy on node B; .*replicate"):
        FeatureStore.open(at)


def test_a_plain_file_of_another_node_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "lh.npy", np.arange(9))
    source = ArraySource(path=tmp_path / "lh.npy", dtype="int64", shape=(9,), offset=128, node="n7")
    monkeypatch.setenv("RAYPIPE_NODE", "C")
    with pytest.raises(StoreError, match=r"lh.npy lies on the disks of n7, not of C"):
        Gatherer({"x": source}, 4)
    monkeypatch.setenv("RAYPIPE_NODE", "n7")
    with Gatherer({"x": source}, 4) as gatherer:
        (batch,) = gatherer.batches([np.array([8, 2])])
    assert batch["x"].tolist() == [8, 2]


def test_a_copy_on_this_node_is_read_instead_of_the_shared_path(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = batches(FeatureLoader({"x": store.path}, 8))
    monkeypatch.setenv("RAYPIPE_NODE", "B")
    (replica,) = plan_replicas(store.path, tmp_path / "nvme")
    copy = replicate_store(replica)
    add_place(store.path, store.fingerprint, Place("B", copy))
    with store.path.open("r+b") as file:  # so that it is seen which one was read
        file.seek(store.locator().offset)
        file.write(bytes(ROWS))
    np.testing.assert_equal(batches(FeatureLoader({"x": store.path}, 8)), wanted)
    monkeypatch.setenv("RAYPIPE_NODE", "C")
    shared = batches(FeatureLoader({"x": store.path}, 8))
    assert not all(np.array_equal(*pair) for pair in zip(shared, wanted, strict=True))
    monkeypatch.setenv("RAYPIPE_NODE", "B")
    copy.unlink()
    with pytest.raises(StoreError, match=r"lists a copy on B that cannot be used"):
        batches(FeatureLoader({"x": store.path}, 8))


def test_rows_that_somebody_brings_need_no_copy_here(
    store: FeatureStore, at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYPIPE_NODE", "C")
    asked = []

    def bring(source: ArraySource) -> object:
        asked.append(source.path)
        return ArraySource.of_locator(store.locator()).open()

    loader = FeatureLoader({"x": at}, 8, rows=range(8), open_rows=bring)  # type: ignore[arg-type]
    assert len(batches(loader)) == 1 and asked == [at]


def test_a_plain_file_needs_no_catalog_and_costs_one_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "y.npy", np.arange(9))
    (tmp_path / "raw").write_bytes(bytes(72))
    raw = ArraySource(path=tmp_path / "raw", dtype="int64", shape=(9,), offset=0)
    read = Path.read_bytes
    looks: list[Path] = []
    monkeypatch.setattr(Path, "read_bytes", lambda self: (looks.append(self), read(self))[1])
    with Gatherer({"y": ArraySource.npy(tmp_path / "y.npy"), "raw": raw}, 4):
        assert looks == [tmp_path / "y.places.json"]
    assert ways_at_hand({"raw": raw}) == ""
