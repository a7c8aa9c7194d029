"""A row server within its budget: ended when it is not, larger the next time, and then said."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from rival import rival

from raypipe.cluster import budget as budget_file
from raypipe.cluster import serving as serving_file
from raypipe.cluster import turn as turn_file
from raypipe.cluster.budget import Lease, Share, WorkerMemory, verdicts
from raypipe.cluster.remote_rows import RemoteRows
from raypipe.cluster.row_server import BASE_BYTES, RowServer, grown_bytes
from raypipe.cluster.shards import Shards, open_shards
from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.config import MemoryFlags, resolve
from raypipe.store import FeatureStore, declare, stand_in, this_node
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


def shards(
    source: ArraySource, memory: WorkerMemory, say: Callable[[str], None] = print
) -> AbstractContextManager[Shards]:
    return open_shards({"x": source}, batch_rows=8, workers=1, memory=memory, say=say)


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
        monkeypatch.setattr(serving_file, "RowServer", Greedy)

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


class Impatient(RowServer):
    """Waits for its lease for a few seconds only."""

    lease_wait_s = 4.0


HAS_THE_TURN = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
from raypipe.cluster.turn import _take
mine = _take("the killed run", print)
ray.get(mine.who.remote())
print("mine", flush=True)
time.sleep(100)
"""


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
class TestTwoRuns:
    def test_one_whose_memory_another_holds_says_so_and_ends_with_exit_code_3(
        self, source: ArraySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving_file, "RowServer", Impatient)
        monkeypatch.setattr(serving_file, "SAY_EVERY_S", 1.0)
        said: list[str] = []
        with (
            rival(tmp_path / "theirs") as (held, _),
            pytest.raises(
                MemoryBudgetExceeded,
                match=rf"row-server-\S+ on node {this_node()} did not get its memory in 4 s: .*{held}",
            ) as stop,
            shards(source, order(tmp_path, "1GiB"), said.append),
        ):
            pass
        assert stop.value.exit_code == 3
        waits = [text for text in said if "for its memory there: 768 MiB are asked for" in text]
        assert waits and re.search(held, waits[0]) and this_node() in waits[0], said

    def test_the_second_waits_its_turn_holding_nothing_until_the_firsts_workers_are_in(
        self, source: ArraySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(turn_file, "TURN_WAIT_S", 2.0)
        said: list[str] = []
        mine = order(tmp_path / "second", "1GiB")
        who = rf"{tmp_path}/first/run \(process {os.getpid()} on {this_node()}\), since \d+ s"
        with shards(source, order(tmp_path / "first", "1GiB")) as first:
            with (
                pytest.raises(
                    MemoryBudgetExceeded,
                    match=rf"second/run .* did not get its turn .* in 2 s: {who} still takes its own",
                ) as stop,
                shards(source, mine, said.append),
            ):
                pass
            assert stop.value.exit_code == 3
            assert len(said) == 1 and re.search(rf"waits for its turn .*: {who}", said[0]), said
            first.workers_are_in()
            monkeypatch.setattr(turn_file, "TURN_WAIT_S", 30.0)
            with shards(source, mine, said.append) as second:
                assert remote(second, source).start(np.arange(8))().shape == (8, 20)
                assert remote(first, source).start(np.arange(8))().shape == (8, 20)

    def test_a_turn_ends_with_the_driver_that_has_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(turn_file, "TURN_WAIT_S", 30.0)
        address = ray.get_runtime_context().gcs_address
        said: list[str] = []
        with subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", HAS_THE_TURN, address],
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdout is not None and other.stdout.readline() == "mine\n"
            threading.Timer(1.5, other.kill).start()
            with turn_file.turn("this run", said.append):
                assert other.wait(10) == -signal.SIGKILL
        assert len(said) == 1 and "the killed run, since" in said[0]


@pytest.mark.parametrize(("starting", "priority"), [(True, 0), (False, -1)])
def test_a_server_of_a_run_that_starts_waits_behind_who_asked_before(
    starting: bool, priority: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that Ray started again comes before workers that wait: its run goes on."""
    asked: list[int] = []

    @contextmanager
    def leased(order: WorkerMemory, name: str, share: Share, *_: object) -> Iterator[None]:
        asked.append(share.priority)
        yield

    monkeypatch.setattr(budget_file, "leased", leased)
    lease = Lease(order=order(tmp_path, "1GiB"), label="x", budget_bytes=1 << 30)
    server = RowServer([], lease)
    server.ready(starting)
    server.ready()
    assert asked == [priority]


@given(ended=st.integers(0, 9), lease_mib=st.integers(1, 4096), most_mib=st.integers(600, 4096))
def test_a_lease_doubles_up_to_the_runs_budget(ended: int, lease_mib: int, most_mib: int) -> None:
    memory = order(Path("/nowhere"), f"{most_mib}MiB")
    lease_bytes = min(lease_mib, most_mib) << 20
    lease = Lease(order=memory, label="x", budget_bytes=lease_bytes)
    grown = grown_bytes(lease, ended)
    assert lease_bytes <= grown <= most_mib << 20
    assert grown == most_mib << 20 or grown == lease_bytes << ended
