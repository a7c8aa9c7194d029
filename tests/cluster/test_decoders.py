"""Images decoded by real actors: the same pixels as without Ray, also when an actor dies."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raypipe.backbone import Preprocess
from raypipe.cluster import decoders
from raypipe.cluster.decoders import Decoders, RowOpener, decoder_share
from raypipe.errors import BadImage, ConfigError, WorkerFailed
from raypipe.stream import ArraySource, Gatherer
from raypipe.stream.mapped import MappedRows
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
    found = Decoders(source, 2, 0.1)
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


def test_a_dead_actor_is_replaced_and_no_row_is_lost(source: PixelSource, actors: Decoders) -> None:
    asked = rows(*range(N))
    before = actors.actors
    os.kill(ray.get(before[0].pid.remote()), signal.SIGKILL)
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
    with pytest.raises(decoders.RaypipeError, match="holds other bytes"):
        actors.start(rows(4))()


@dataclass(frozen=True, kw_only=True)
class Deadly(PixelSource):
    """Ends every process that decodes of it."""

    def decode_rows(self, rows: np.ndarray) -> np.ndarray:
        os._exit(1)


def test_images_that_end_every_actor_end_the_run(
    source: PixelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "MAX_TRIES", 2)
    said: list[str] = []
    reader = Decoders(Deadly(**vars(source)), 1, 0.1, say=said.append)
    with pytest.raises(WorkerFailed, match=r"died 2 times with images 02\.png to 03\.png"):
        reader.start(rows(2, 3))()
    assert len(said) == 2 and all("a new one takes its place" in text for text in said)


def test_an_actor_that_never_comes_is_said_and_given_up(
    source: PixelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(decoders, "SAY_STALLED_S", 0.2)
    monkeypatch.setattr(decoders, "STALLED_S", 0.4)
    reader = Decoders(source, 1, 1000.0, say=said.append)  # no node has as many CPUs
    with pytest.raises(WorkerFailed, match=r"given nothing for 0 s, of images 00\.png"):
        reader.start(rows(0))()
    assert "no CPU free" in said[0]


def test_only_images_go_to_actors(source: PixelSource, tmp_path: Path) -> None:
    np.save(tmp_path / "plain.npy", np.zeros((3, 2), np.float32))
    opener = RowOpener(1, 1.0)
    assert isinstance(opener(ArraySource.npy(tmp_path / "plain.npy")), MappedRows)
    assert opener(source) is opener(source)  # training and validation share them


@given(free=st.floats(-1, 512), world=st.integers(1, 64), wanted=st.none() | st.integers(1, 32))
def test_shares_leave_room_for_others(free: float, world: int, wanted: int | None) -> None:
    share = decoder_share(free, world, wanted)
    assert share.count >= 1 and 0 < share.cpus <= 1
    assert share.count * share.cpus * world <= max(0.8 * free, 0.01 * world) + 1e-6
    if wanted is None:
        assert share.count <= decoders.MOST_THREADS
