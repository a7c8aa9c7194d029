"""Images decoded by real actors: the same pixels as without Ray, also when an actor dies."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rival import rival

from raypipe.backbone import Preprocess
from raypipe.backbone.options import FeatureOptions
from raypipe.cluster import decoders
from raypipe.cluster.budget import WorkerMemory, verdicts
from raypipe.cluster.decode_actor import BASE_BYTES, PARTS, PICTURE_BYTES
from raypipe.cluster.decode_plan import (
    MOST_THREADS,
    Crew,
    bytes_on_a_machine,
    decoders_each,
    plan_decoders,
)
from raypipe.cluster.decoders import Decoders, RowOpener
from raypipe.cluster.pieces import Share
from raypipe.errors import BadImage, ConfigError, InputError, MemoryBudgetExceeded, WorkerFailed
from raypipe.memory.config import MemoryConfig, MemoryFlags, resolve
from raypipe.memory.limits import node_limits
from raypipe.segment.config import InputConfig
from raypipe.segment.crops import TERMS as CROP_TERMS
from raypipe.store import this_node
from raypipe.stream import ArraySource, Gatherer
from raypipe.stream.decoding import Terms
from raypipe.stream.mapped import MappedRows
from raypipe.stream.pixels import TERMS as IMAGE_TERMS
from raypipe.stream.pixels import PixelSource
from raypipe.stream.scan import scan

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
N = 12


@pytest.fixture
def source(tmp_path: Path) -> PixelSource:
    draw = np.random.default_rng(0)
    for i in range(N):
        pixels = draw.integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    return scan(sorted(tmp_path.iterdir()), Preprocess(resize=24, crop=24)).source(
        Preprocess(resize=24, crop=24), readers=2
    )


@pytest.fixture
def actors(source: PixelSource) -> Iterator[Decoders]:
    found = Decoders(source, Crew(2, 0.1, Share(3, 4)))
    yield found
    for actor in found.actors:
        ray.kill(actor)


def rows(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_actors_give_the_pixels_that_threads_give(source: PixelSource, actors: Decoders) -> None:
    asked = [rows(3, 0, 11, 7, 2), rows(5), rows(1, 1)]
    want = [source.open().start(some)() for some in asked]
    waits = [actors.start(some) for some in asked]  # all of them under way at once
    for wait, pixels in zip(waits, want, strict=True):
        np.testing.assert_array_equal(wait(), pixels)
    with Gatherer({"pixels": source}, 5, depth=2, open_rows=lambda _: actors) as gatherer:
        for batch, pixels in zip(gatherer.batches(asked), want, strict=True):
            np.testing.assert_array_equal(batch["pixels"].numpy(), pixels)
    with pytest.raises(ConfigError, match="has 12 images"):
        actors.check(rows(12))


def test_a_batch_that_is_given_up_is_not_waited_for(source: PixelSource) -> None:
    reader = Decoders(source, Crew(1, 1000.0, Share(4, 4)))  # no node has as many CPUs
    wait = reader.start(rows(0, 1))
    timer = threading.Timer(0.3, wait.cancel)
    timer.start()
    began = time.monotonic()
    with pytest.raises(CancelledError):
        wait()
    assert time.monotonic() - began < 10


def test_a_dead_actor_is_replaced_and_no_row_is_lost(source: PixelSource, actors: Decoders) -> None:
    asked = rows(*range(N))
    before = actors.actors
    os.kill(ray.get(before[0].ready.remote()), signal.SIGKILL)
    waits = [actors.start(asked) for _ in range(3)]
    want = source.open().start(asked)()
    for wait in waits:
        np.testing.assert_array_equal(wait(), want)
    after = actors.actors
    assert after[0] is not before[0] and after[1] is before[1]


def test_an_image_that_was_spoilt_meanwhile_is_named(
    source: PixelSource, actors: Decoders, tmp_path: Path
) -> None:
    (tmp_path / "04.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"04\.png cannot be read"):
        actors.start(rows(1, 4))()
    assert actors.start(rows(1, 2))().shape == (2, 24, 24, 3)  # and the actors live on
    shutil.copyfile(tmp_path / "05.png", tmp_path / "04.png")
    with pytest.raises(InputError, match="holds other bytes"):
        actors.start(rows(4))()


@dataclass(frozen=True, kw_only=True)
class Deadly(PixelSource):
    """Ends every process that decodes of it."""

    def decode_rows(self, rows: np.ndarray) -> np.ndarray:
        os._exit(1)


@dataclass(frozen=True, kw_only=True)
class DeadlyCrops(Deadly):
    """The same under another job's names."""

    @property
    def terms(self) -> Terms:
        return CROP_TERMS


@pytest.mark.parametrize(
    ("kind", "row", "option"), [(Deadly, "image", "--decode-threads"), (DeadlyCrops, "crop", "--readers")]
)  # fmt: skip
def test_images_that_end_every_actor_end_the_run(
    source: PixelSource, monkeypatch: pytest.MonkeyPatch, kind: type[Deadly], row: str, option: str
) -> None:
    monkeypatch.setattr(decoders, "MAX_TRIES", 2)
    said: list[str] = []
    reader = Decoders(kind(**vars(source)), Crew(1, 0.1, Share(4, 4)), say=said.append)
    told = (
        rf"died 2 times with {row}s 02\.png to 03\.png; .*fewer {option}, .* look at these {row}s"
    )
    with pytest.raises(WorkerFailed, match=told):
        reader.start(rows(2, 3))()
    assert len(said) == 2 and all("a new one takes its place" in text for text in said)


@dataclass(frozen=True, kw_only=True)
class Greedy(PixelSource):
    """Holds ``mib`` MiB while it decodes image 3."""

    mib: int

    def decode_rows(self, rows: np.ndarray) -> np.ndarray:
        held = np.ones(self.mib << 20, np.uint8) if 3 in rows else None
        time.sleep(0.5)  # several looks of the memory actor
        assert held is None or held[-1] == 1
        return super().decode_rows(rows)


def order(tmp_path: Path, budget: str) -> WorkerMemory:
    memory = resolve(MemoryFlags(max_memory_per_process=budget), environ={})
    return WorkerMemory(memory=memory, per_node=1, run_dir=tmp_path / "run")


def test_a_decoder_above_its_lease_is_ended_and_comes_back_with_a_larger_one(
    source: PixelSource, tmp_path: Path
) -> None:
    said: list[str] = []
    greedy = Greedy(**vars(source), mib=600)
    crew = Crew(1, 0.1, Share(4, 4), budget_bytes=700 << 20)
    memory = order(tmp_path, "2GiB")
    reader = Decoders(greedy, crew, memory=memory, name="small", say=said.append)
    np.testing.assert_array_equal(reader.start(rows(1, 2))(), source.open().start(rows(1, 2))())
    assert not said
    np.testing.assert_array_equal(reader.start(rows(3))(), source.open().start(rows(3))())
    assert len(said) == 1 and "a new one takes its place" in said[0]
    (verdict,) = verdicts(memory, "small-0")
    assert verdict.budget_bytes == 700 << 20 and verdict.phase == "decode"
    logs = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "run/memory").glob("*.csv"))
    assert logs == ["small-0", "small-1"]


def test_an_image_that_no_budget_of_the_run_holds_ends_it(
    source: PixelSource, tmp_path: Path
) -> None:
    greedy = Greedy(**vars(source), mib=900)
    crew = Crew(1, 0.1, Share(4, 4), budget_bytes=600 << 20)
    reader = Decoders(greedy, crew, memory=order(tmp_path, "800MiB"), name="big", say=print)
    with pytest.raises(
        MemoryBudgetExceeded, match=r"images 02\.png to 03\.png takes more.*of 800 MiB.*smaller"
    ):
        reader.start(rows(2, 3))()


def test_a_decoder_that_waits_for_its_memory_says_who_holds_it(
    source: PixelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # actors of the tests before hold their leases as long as their readers live
    monkeypatch.setattr(decoders, "SAY_STALLED_S", 1.0)
    said: list[str] = []

    def hear(text: str) -> None:
        said.append(text)
        if "has waited" in text:
            give_back()

    crew = Crew(1, 0.1, Share(4, 4), budget_bytes=700 << 20)
    with rival(tmp_path / "theirs") as (held, give_back):
        reader = Decoders(source, crew, memory=order(tmp_path, "2GiB"), name="held-up", say=hear)
        want = source.open().start(rows(1, 2))()
        np.testing.assert_array_equal(reader.start(rows(1, 2))(), want)
    assert re.fullmatch(
        rf"a decode actor has given nothing for \d s, of images 01\.png to 02\.png: held-up-0 on node "
        rf"{this_node()} has waited \d s for its memory there: 700 MiB are asked for, .*{held}",
        said[-1],
    ), said


def test_decoders_of_a_machine_are_counted_with_its_workers(source: PixelSource) -> None:
    def plan(budget_gb: float, source: PixelSource = source) -> dict[str, Crew]:
        config = MemoryConfig(max_memory_per_process_gb=budget_gb)
        return plan_decoders(
            [source], world=2, cpus=0.1, batch_rows=8, config=config, limits=node_limits()
        )

    (crew,) = plan(8).values()
    assert crew.count == 2  # the source says how many
    assert crew.under_way.piece_rows == 4  # a part for each of them
    assert crew.budget_bytes == BASE_BYTES + PICTURE_BYTES + PARTS * 4 * source.row_bytes
    assert bytes_on_a_machine(plan(8), 2) == 4 * crew.budget_bytes
    assert plan(1)[source.fingerprint].budget_bytes == 1 << 30


@given(
    free=st.floats(0, 64),
    world=st.integers(1, 16),
    room=st.integers(1 << 30, 1 << 36),
    each=st.integers(1 << 28, 1 << 31),
)
def test_decoders_take_their_part_of_the_memory(
    free: float, world: int, room: int, each: int
) -> None:
    count, _ = decoders_each(free, world, None, lambda count: each, room)
    alone, _ = decoders_each(free, world, None)
    assert 1 <= count <= alone
    assert count == 1 or world * count * each <= room
    assert count == alone or world * (count + 1) * each > room
    assert decoders_each(free, world, 5, lambda count: each, room)[0] == 5  # as was said


def test_an_actor_that_never_comes_is_said_and_given_up(
    source: PixelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(decoders, "SAY_STALLED_S", 0.2)
    monkeypatch.setattr(decoders, "STALLED_S", 0.4)
    reader = Decoders(
        source, Crew(1, 1000.0, Share(4, 4)), say=said.append
    )  # no node has as many CPUs
    with pytest.raises(WorkerFailed, match=r"given nothing for 0 s, of images 00\.png"):
        reader.start(rows(0))()
    assert "no CPU free" in said[0]


def test_an_actor_that_never_comes_is_done_without(
    source: PixelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its CPU is another's: what was given to it goes to those that are there, then nothing is."""
    reader = Decoders(source, Crew(1, 0.1, Share(2, 9)))
    monkeypatch.setattr(reader, "_crew", Crew(2, 1000.0, Share(2, 9)))
    absent = reader._new_seat(1 << 30)
    reader._seats.insert(0, absent)
    asked = rows(*range(N))
    want = source.open().start(asked)()
    for _ in range(2):
        np.testing.assert_array_equal(reader.start(asked)(), want)
    with reader._lock:
        assert {reader._next() for _ in range(4)} == {1}
    ray.kill(absent.actor)


def test_only_images_go_to_actors(source: PixelSource, tmp_path: Path) -> None:
    np.save(tmp_path / "plain.npy", np.zeros((3, 2), np.float32))
    opener = RowOpener({source.fingerprint: Crew(1, 0.1, Share(4, 4))})
    assert isinstance(opener(ArraySource.npy(tmp_path / "plain.npy")), MappedRows)
    assert opener(source) is opener(source)  # training and validation share them
    with pytest.raises(WorkerFailed, match="not those that the driver planned"):
        RowOpener({})(source)


@given(free=st.floats(-1, 512), world=st.integers(1, 64), wanted=st.none() | st.integers(1, 32))
def test_shares_leave_room_for_others(free: float, world: int, wanted: int | None) -> None:
    count, cpus = decoders_each(free, world, wanted)
    assert count >= 1 and 0 < cpus <= 1
    assert count * cpus * world <= max(0.8 * free, 0.01 * world) + 1e-6
    if wanted is None:
        assert count <= MOST_THREADS


def test_the_options_that_messages_name_are_the_jobs_own() -> None:
    for terms, config in ((CROP_TERMS, InputConfig), (IMAGE_TERMS, FeatureOptions)):
        names = {field.name for field in fields(config)}
        options = {terms.readers, *re.findall(r"--[a-z-]+", terms.smaller)}
        assert {option[2:].replace("-", "_") for option in options} <= names
