"""Rows of other nodes' disks: the way is the catalog's, the bytes are the file's, trouble has a name.

Most tests take this machine's one Ray node for both sides: the reader only says that it is another.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorUnavailableError, ActorUnschedulableError, RayActorError

from raypipe.cluster import remote_rows
from raypipe.cluster import stalls as stalls_file
from raypipe.cluster.pieces import PIECE_BYTES, Share, divide
from raypipe.cluster.remote_rows import Copy, Patience, RemoteRows
from raypipe.cluster.shards import Shards, open_shards
from raypipe.cluster.stalls import Stalls
from raypipe.errors import (
    ConfigError,
    MemoryBudgetExceeded,
    MissingInput,
    StoreError,
    WorkerFailed,
    in_one_line,
)
from raypipe.store import FeatureStore, Placement, declare, stand_in, this_node
from raypipe.store.adoption import adopt, plan_adoption
from raypipe.stream import ArraySource, Gatherer
from raypipe.stream.reading import RowReader
from raypipe.train.follow import TrainProgress, log_aloud

N = 90
# It reads the source as a file, so it is of no use where that is not seen.
SEES_BOTH = r"raypipe store replicate, on a node that sees both"


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of (90, 5, 7) float16 on the disk of this node."""
    path = tmp_path_factory.mktemp("disk") / "x.npy"
    values = np.random.default_rng(3).standard_normal((N, 5, 7)).astype(np.float16)
    np.save(path, values)
    adopt(plan_adoption(path))
    return path


@given(
    store=st.integers(1, 1 << 34),
    readers=st.integers(1, 64),
    row=st.integers(1, 1 << 28),
    rows=st.integers(1, 4096),
    makers=st.integers(1, 8),
)
def test_all_readers_together_fit_half_an_object_store(
    store: int, readers: int, row: int, rows: int, makers: int
) -> None:
    if row > store // 2 // readers:
        with pytest.raises(MemoryBudgetExceeded, match=SEES_BOTH):
            divide(store, readers, row, rows)
        return
    share = divide(store, readers, row, rows, makers=makers)
    assert 1 <= share.piece_rows <= -(-rows // makers) and share.pieces >= 1
    assert share.pieces * share.piece_rows * row * readers <= store // 2
    assert share.piece_rows == 1 or share.piece_rows * row <= PIECE_BYTES


@pytest.mark.parametrize(
    ("errors", "rows_come"),
    [
        ([ActorUnavailableError("cut off", None)] * 2, True),
        # What a lost node came to, seen on a cluster: first the one, after 15 s the other.
        ([ActorUnavailableError("cut off", None), ActorUnschedulableError("no node")], False),
    ],
)
def test_a_node_cut_off_is_asked_again_and_a_lost_one_is_the_end(
    errors: list[Exception], rows_come: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(ref: np.ndarray) -> np.ndarray:
        if errors:
            raise errors.pop(0)
        return ref

    fake = SimpleNamespace(wait=lambda refs, timeout: (refs, []), get=get)
    monkeypatch.setattr(remote_rows, "ray", fake)
    monkeypatch.setattr(remote_rows, "ASK_AGAIN_S", 0.0)
    server = SimpleNamespace(read=SimpleNamespace(remote=lambda source, rows: rows))
    source = ArraySource(path=Path("/x.npy"), dtype="uint8", shape=(9, 1), offset=0, node="B")
    reader = RemoteRows(source, "x", [Copy(source, server)], Share(8, 2), print)
    wait = reader.start(np.arange(8))
    if rows_come:
        np.testing.assert_array_equal(wait(), np.arange(8))
    else:
        gone = r"x: /x.npy on node B .* gone for good .*: no node.*" + SEES_BOTH
        with pytest.raises(WorkerFailed, match=gone):
            wait()


@pytest.mark.parametrize("cut_off", [False, True])
@pytest.mark.usefixtures("heeded_sigint")
def test_a_batch_that_is_not_wanted_is_let_go_of_within_seconds(
    cut_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a server that gives no answer, and from a node that Ray does not reach."""

    def wait(refs: list[object], timeout: float) -> tuple[list[object], list[object]]:
        if cut_off:
            return refs, []
        time.sleep(timeout)
        return [], refs

    def get(ref: object) -> None:
        raise ActorUnavailableError("cut off", None)

    monkeypatch.setattr(remote_rows, "ray", SimpleNamespace(wait=wait, get=get))
    monkeypatch.setattr(remote_rows, "ASK_AGAIN_S", 60.0)
    server = SimpleNamespace(read=SimpleNamespace(remote=lambda source, rows: rows))
    source = ArraySource(path=Path("/x.npy"), dtype="uint8", shape=(9, 1), offset=0, node="B")
    reader = RemoteRows(source, "x", [Copy(source, server)], Share(2, 3), print)
    with Gatherer({"x": source}, 8, depth=2, open_rows=lambda source: reader) as gatherer:
        batches = gatherer.batches([np.arange(8), np.arange(8)])
        give_up = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        give_up.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    assert time.monotonic() - began < 3.0
    request = reader.start(np.arange(8))
    assert len(request.asked) == 3  # the whole share: nothing of what was dropped counts
    request.cancel()
    assert not request.asked and not request.left
    with pytest.raises(CancelledError):
        request()


class Nodes:
    """Servers that give no answer before ``comes`` (seconds, by reader), of which their own nodes have it
    from ``made`` on; waiting for them takes no time.
    """

    def __init__(self) -> None:
        self.now, self.comes, self.made = 1000.0, dict[str, float](), dict[str, float]()

    def wait(self, refs: list[Any], timeout: float, fetch_local: bool = True) -> tuple[Any, Any]:
        at = self.comes.get(refs[0][0], np.inf)
        if self.now >= (at if fetch_local else self.made.get(refs[0][0], at)):
            return refs, []
        self.now += timeout
        time.sleep(0.0001)  # other threads
        return [], refs

    def get(self, ref: Any, timeout: float | None = None) -> np.ndarray:
        return ref[1].astype(np.uint8)

    def monotonic(self) -> float:
        return self.now

    time = monotonic


class TestSeveralThatStall:
    @pytest.fixture
    def nodes(self, monkeypatch: pytest.MonkeyPatch) -> Nodes:
        nodes = Nodes()
        monkeypatch.setattr(remote_rows, "ray", nodes)
        monkeypatch.setattr(remote_rows, "time", nodes)
        monkeypatch.setattr(stalls_file, "time", nodes)
        return nodes

    def reader(self, name: str, say: Callable[[str], None], stalls: Stalls) -> RemoteRows:
        source = ArraySource(
            path=Path(f"/{name}.npy"), dtype="uint8", shape=(9, 1), offset=0, node=name.upper()
        )
        read = SimpleNamespace(remote=lambda source, rows: (name, rows[:, None]))
        copy = Copy(source, SimpleNamespace(read=read))
        return RemoteRows(source, name, [copy], Share(8, 3), say, stalls=stalls)

    def test_each_is_named_though_one_is_waited_for_and_the_end_names_all(
        self, nodes: Nodes
    ) -> None:
        said, stalls = list[tuple[float, str]](), Stalls()
        readers = {
            name: self.reader(name, lambda text: said.append((nodes.now, text)), stalls)
            for name in "abc"
        }
        began = nodes.comes["b"] = nodes.now
        with (
            Gatherer(
                {name: reader.source for name, reader in readers.items()}, 8, threads=1,
                open_rows=lambda source: readers[source.path.stem],
            ) as gatherer,
            pytest.raises(WorkerFailed) as stop,
        ):  # fmt: skip
            next(gatherer.batches([np.arange(8)]))
        for name in "ac":
            at, text = next(word for word in said if word[1].startswith(name))
            assert 20 <= at - began <= 30
            assert text == (
                f"{name}: has waited {at - began:.0f} s for 8 rows of /{name}.npy on node "
                f"{name.upper()}; ends after 600 s"
            )
        assert {text[0] for _, text in said} == {"a", "c"}
        assert len(said) <= 2 * 11, "a word a minute"
        told = in_one_line(stop.value)
        assert re.match(
            r"a: 8 rows of /a.npy on node A did not come in 60\d s; c: 8 rows of /c.npy on node C did "
            r"not come in 60\d s; see to ",
            told,
        )
        assert told.count("/c.npy") == 1 and "/b.npy" not in told
        assert re.search(SEES_BOTH + r"\)$", told)

    def test_the_clock_runs_from_when_rows_were_asked_for_or_the_last_ones_came(
        self, nodes: Nodes
    ) -> None:
        said: list[str] = []
        reader = self.reader("a", said.append, Stalls())
        wait = reader.start(np.arange(8))
        nodes.now += 599.5  # another reader is waited for
        began = nodes.now
        with pytest.raises(WorkerFailed, match=r"did not come in 60\d s"):
            wait()
        assert nodes.now - began <= 2.0 and len(said) == 1
        slow = [
            reader.start(np.arange(8)) for _ in range(3)
        ]  # the last comes 1500 s after it was asked
        for wait in slow:
            nodes.comes["a"] = nodes.now + 500
            np.testing.assert_array_equal(wait()[:, 0], np.arange(8))

    def test_what_is_made_elsewhere_has_the_whole_time_for_its_way_here(self, nodes: Nodes) -> None:
        """Nobody fetched it: a file here hung for longer than a reader is waited for."""
        said: list[str] = []
        reader = self.reader("a", said.append, Stalls())
        wait, never = reader.start(np.arange(8)), reader.start(np.arange(8))
        nodes.made["a"] = nodes.now
        nodes.now += 700
        nodes.comes["a"] = nodes.now + 5
        np.testing.assert_array_equal(wait()[:, 0], np.arange(8))
        assert not said
        nodes.now += 700
        del nodes.comes["a"]
        began = nodes.now
        with pytest.raises(WorkerFailed, match=r"did not come in 60\d s"):
            never()
        assert 600 <= nodes.now - began <= 610

    def test_what_has_come_or_is_not_wanted_is_never_late(self, nodes: Nodes) -> None:
        said, stalls = list[str](), Stalls()
        mine, other = (self.reader(name, said.append, stalls) for name in "ab")
        wait, dropped = mine.start(np.arange(8)), other.start(np.arange(8))
        dropped.cancel()
        nodes.comes["a"] = nodes.now
        nodes.now += 100
        stalls.look()
        assert not said and not stalls.all_late()
        assert wait().shape == (8, 1)
        kept = other.start(np.arange(8))
        nodes.now += 25
        stalls.look()
        assert len(said) == 1 and said[0].startswith("b: has waited 25 s")
        del other, kept  # nobody has that reader any more
        nodes.now += 100
        stalls.look()
        assert len(said) == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
class TestOneNode:
    """The rows lie on this machine, the reader calls itself elsewhere."""

    @pytest.fixture
    def source(self, rows_file: Path, tmp_path: Path) -> ArraySource:
        at = declare(FeatureStore.open(rows_file), at=tmp_path / "catalogs" / "x.npy")
        return ArraySource.of_locator(stand_in(at))

    @pytest.fixture
    def said(self) -> list[str]:
        return []

    @pytest.fixture
    def shards(self, source: ArraySource, said: list[str]) -> Iterator[Shards]:
        patience = Patience(first_word_s=0.5, again_s=0.5, give_up_s=100.0)
        with open_shards(
            {"x": source}, batch_rows=8, workers=1, memory=None, say=said.append, patience=patience
        ) as shards:
            yield shards

    def test_batches_are_the_files_rows_and_a_killed_server_is_started_again(
        self,
        shards: Shards,
        source: ArraySource,
        rows_file: Path,
        said: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        whole = np.load(rows_file)
        assert not source.path.exists()
        assert shards.words() == f"on node {this_node()}, x: local copy {rows_file}"
        mapped = shards.open_rows(source, turn=0, say=said.append)
        assert not isinstance(mapped, RemoteRows)
        assert said[0] == f"row servers start on node {this_node()} for x"
        assert re.match(
            rf"row servers are ready after \d+\.\d s: rows are read on {this_node()} ", said[1]
        )
        assert "in all half of an object store" in said[1] and len(said) == 2
        monkeypatch.setenv("RAYPIPE_NODE", "elsewhere")
        assert f"x: rows of {rows_file} from node" in shards.words()
        asked = [np.random.default_rng(k).integers(0, N, 8) for k in range(30)]
        (server,) = shards.servers.values()

        def opened(given: ArraySource) -> RowReader:
            reader = shards.open_rows(given, turn=0, say=said.append)
            assert isinstance(reader, RemoteRows)
            return reader

        with Gatherer({"x": source}, 8, depth=3, threads=2, open_rows=opened) as gatherer:
            for k, (rows, batch) in enumerate(zip(asked, gatherer.batches(asked), strict=True)):
                np.testing.assert_array_equal(batch["x"].numpy(), whole[rows])
                if k == 10:  # the same rows once more, from a new process
                    os.kill(ray.get(server.ready.remote()), signal.SIGKILL)
        with pytest.raises(ConfigError, match="which has 90"):
            opened(source).check(np.array([N]))

    def test_what_every_node_has_needs_no_server_where_no_node_will_come(
        self, source: ArraySource, rows_file: Path, said: list[str]
    ) -> None:
        with open_shards(
            {"x": source}, batch_rows=8, workers=1, memory=None, say=said.append, grows=False
        ) as shards:
            assert not shards.servers and not said
            opened = shards.open_rows(source, turn=0, say=said.append)
            assert opened.source.path == rows_file and not isinstance(opened, RemoteRows)

    @pytest.mark.parametrize("share", [Share(3, 2), Share(1, 1), Share(8, 1)])
    def test_pieces_make_the_batch_and_no_more_than_the_share_is_under_way(
        self, shards: Shards, source: ArraySource, rows_file: Path, share: Share
    ) -> None:
        """Dropped batches give their room back."""
        whole = np.load(rows_file).view(np.uint8).reshape(N, -1)
        node, server = next(iter(shards.servers.items()))
        copy = Copy(replace(source, path=rows_file, node=node), server)
        reader = RemoteRows(source, "x", [copy], share, print)
        batches = [np.arange(k, k + 8) for k in range(6)]
        waits = [reader.start(rows) for rows in batches]
        under_way = sum(len(wait.asked) for wait in waits)  # type: ignore[attr-defined]
        assert under_way == share.pieces
        del waits[1]
        for first in (0, 2, 3, 4, 5):
            block = waits.pop(0)()
            np.testing.assert_array_equal(block, whole[first : first + 8])

    def test_a_stalled_server_is_named_and_then_given_up(
        self,
        shards: Shards,
        source: ArraySource,
        said: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        ((node, server),) = shards.servers.items()
        pid = ray.get(server.ready.remote())
        monkeypatch.setenv("RAYPIPE_NODE", "elsewhere")
        reader = shards.open_rows(source, turn=0, say=said.append)
        assert isinstance(reader, RemoteRows)
        os.kill(pid, signal.SIGSTOP)
        try:
            wait = reader.start(np.arange(8))
            threading.Timer(1.0, os.kill, (pid, signal.SIGCONT)).start()
            assert wait().shape == (8, 70)
            words = [text for text in said if "has waited" in text]
            assert words and all(f"8 rows of {reader._copies[0].words}" in text for text in words)
            assert f"on node {node}" in words[0]
            os.kill(pid, signal.SIGSTOP)
            reader._patience = Patience(give_up_s=2.0)
            wait = reader.start(np.arange(8))
            with pytest.raises(
                WorkerFailed, match=rf"on node {node} did not come in 2 s.*" + SEES_BOTH
            ):
                wait()
        finally:
            os.kill(pid, signal.SIGCONT)

    def test_a_server_gone_for_good_is_one_clear_error_or_the_next_copy(
        self,
        shards: Shards,
        source: ArraySource,
        said: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("RAYPIPE_NODE", "elsewhere")
        reader = shards.open_rows(source, turn=0, say=said.append)
        assert isinstance(reader, RemoteRows)
        (server,) = shards.servers.values()
        copy = reader._copies[0]
        wait = reader.start(np.arange(8))
        wait()
        ray.kill(server)
        with pytest.raises(RayActorError):  # it may answer a little longer
            while True:
                ray.get(server.ready.remote())
        with pytest.raises(
            WorkerFailed, match=r"x: .*x.npy on node .* gone for good.*" + SEES_BOTH
        ):
            reader.start(np.arange(8))()
        with open_shards({"x": source}, batch_rows=8, workers=1, memory=None, say=print) as anew:
            (other,) = anew.servers.values()
            two = RemoteRows(
                source, "x", [copy, replace(copy, server=other)], Share(8, 2), said.append
            )
            assert two.start(np.arange(8))().shape == (8, 70)
            assert "is lost; goes on with" in said[-1]

    def test_what_is_not_there_is_named_before_training(
        self, source: ArraySource, rows_file: Path, tmp_path: Path
    ) -> None:
        options = {"batch_rows": 8, "workers": 1, "memory": None, "say": print}
        gone = replace(source, path=tmp_path / "gone.npy", node=this_node())
        with (
            pytest.raises(
                StoreError, match=rf"node {this_node()} does not have .*gone.npy.*" + SEES_BOTH
            ),
            open_shards({"x": gone}, **options),  # type: ignore[arg-type]
        ):
            pass
        far = replace(source, path=rows_file, node="n7")
        with (
            pytest.raises(MissingInput, match=r"x: .* lies on the disk of n7 only.*" + SEES_BOTH),
            open_shards({"x": far}, **options),  # type: ignore[arg-type]
        ):
            pass


def test_plain_files_need_no_server_and_no_ray(rows_file: Path) -> None:
    source = ArraySource.npy(rows_file)
    said: list[str] = []
    with open_shards(
        {"x": source}, batch_rows=8, workers=9, memory=None, say=said.append
    ) as shards:
        assert shards.words() == "" and not shards.servers
        opened = shards.open_rows(source, turn=0, say=said.append)
    assert not isinstance(opened, RemoteRows) and not said
    assert Placement.of(source.path).way("any").kind == "shared"


def test_what_is_said_before_training_is_shown_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainProgress(1, tmp_path) as progress:
        log_aloud(tmp_path, progress.tick)("row servers start on node A for x")
        assert capsys.readouterr().err == "row servers start on node A for x\n"
    assert (tmp_path / "train.log").read_text() == "row servers start on node A for x\n"


@pytest.mark.ray
@pytest.mark.slow
def test_three_nodes_with_a_source_each_train_as_one_node_does(tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    path = Path(__file__).with_name("remote_rows_cluster.py")
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path)],
        env=environ, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all good" in done.stdout
