"""A row server within its budget: ended when it is not, larger the next time, and then said."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from raypipe.cluster import shards as shards_file
from raypipe.cluster.budget import Lease, WorkerMemory, verdicts
from raypipe.cluster.remote_rows import RemoteRows
from raypipe.cluster.row_server import BASE_BYTES, RowServer, grown_bytes
from raypipe.cluster.shards import Shards, open_shards
from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.config import MemoryFlags, resolve
from raypipe.store import FeatureStore, declare, stand_in
from raypipe.store.adoption import adopt, plan_adoption
from raypipe.stream import ArraySource

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
N, GREEDY_ROW = 20, 13


class Greedy(RowServer):
    """Holds 600 MiB while it reads one row."""

    def read(self, source: ArraySource, rows: np.ndarray) -> np.ndarray:
        self.ready()
        held = np.ones(600 << 20 if GREEDY_ROW in rows else 0, np.uint8)
        return super().read(source, rows) * held[:1].max(initial=1)


def order(tmp_path: Path, budget: str) -> WorkerMemory:
    memory = resolve(MemoryFlags(max_memory_per_process=budget), environ={})
    return WorkerMemory(memory=memory, per_node=1, run_dir=tmp_path / "run")


@pytest.fixture
def source(tmp_path: Path) -> ArraySource:
    """A store on the disk of this node alone, by its catalog."""
    path = tmp_path / "disk" / "x.npy"
    path.parent.mkdir()
    np.save(path, np.arange(N * 5, dtype=np.float32).reshape(N, 5))
    adopt(plan_adoption(path))
    at = declare(FeatureStore.open(path), at=tmp_path / "catalogs" / "x.npy")
    return ArraySource.of_locator(stand_in(at))


def shards(source: ArraySource, memory: WorkerMemory) -> AbstractContextManager[Shards]:
    return open_shards({"x": source}, batch_rows=8, workers=1, memory=memory, say=print)


def remote(shards: Shards, source: ArraySource) -> RemoteRows:
    """As a worker on another node opens it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYPIPE_NODE", "elsewhere")
        reader = shards.open_rows(source, turn=0, say=print)
    assert isinstance(reader, RemoteRows)
    return reader


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
class TestKills:
    @pytest.fixture(autouse=True)
    def greedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shards_file, "RowServer", Greedy)

    def test_one_above_its_lease_comes_back_with_a_larger_one(
        self, source: ArraySource, tmp_path: Path
    ) -> None:
        memory = order(tmp_path, "2GiB")
        with shards(source, memory) as opened:
            rows = np.arange(10, 18)
            got = remote(opened, source).start(rows)().view(np.float32)
            np.testing.assert_array_equal(got, rows[:, None] * 5 + np.arange(5))
            (lease,) = opened.leases.values()
        (verdict,) = verdicts(memory, lease.label)
        assert lease.budget_bytes == verdict.budget_bytes < 2 * BASE_BYTES
        assert verdict.phase == "read rows"

    def test_one_that_no_budget_of_the_run_holds_ends_it_with_the_verdict(
        self, source: ArraySource, tmp_path: Path
    ) -> None:
        with shards(source, order(tmp_path, "800MiB")) as opened:
            reader = remote(opened, source)
            assert reader.start(np.arange(8))().shape == (8, 20)
            with pytest.raises(
                MemoryBudgetExceeded,
                match=r"x: row-server-.* in read rows.* of 800 MiB.*larger --max",
            ):
                reader.start(np.arange(8, 16))()


@given(ended=st.integers(0, 9), lease_mib=st.integers(1, 4096), most_mib=st.integers(600, 4096))
def test_a_lease_doubles_up_to_the_runs_budget(ended: int, lease_mib: int, most_mib: int) -> None:
    memory = order(Path("/nowhere"), f"{most_mib}MiB")
    lease_bytes = min(lease_mib, most_mib) << 20
    lease = Lease(order=memory, label="x", budget_bytes=lease_bytes)
    grown = grown_bytes(lease, ended)
    assert lease_bytes <= grown <= most_mib << 20
    assert grown == most_mib << 20 or grown == lease_bytes << ended
