"""A run that was ended goes on where it was; one that does not fit is refused; several workers share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor, nn

import raypipe
from raypipe.errors import (
    ConfigError,
    Fenced,
    FingerprintMismatch,
    MemoryBudgetExceeded,
    NoSpace,
    StoreError,
    StoreLocked,
)
from raypipe.store import space
from raypipe.tile.config import TileConfig
from raypipe.tile.engine import infer
from raypipe.tile.grid import TileGrid
from raypipe.tile.ledger import DONE, TileRun, TileWriter, paths_of
from raypipe.tile.output import OutputSpec
from raypipe.tile.source import open_source
from raypipe.tile.worker import TileItem

HERE = Path(__file__).parent


class Slow(nn.Module):
    """The mean of a pixel's neighbours, slowly; counts its windows."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.mean = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        nn.init.constant_(self.mean.weight, 1 / 9)
        self.seconds, self.windows = seconds, 0

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 70:  # not while it is measured
            self.windows += len(x)
            time.sleep(self.seconds)
        return self.mean(x)


def image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((500, 500)).astype(np.float32)


def run(out: Path, model: nn.Module, **options: object) -> np.ndarray:
    """70 pixels and a halo of 1 to either side: 64 tiles."""
    options = {"halo": 1, "align": 1, **options}
    return raypipe.process_large_image(image(), model, 70, out, **options)


def wanted() -> np.ndarray:
    with torch.inference_mode():
        return Slow()(torch.from_numpy(image())[None, None])[0, 0].numpy()


@pytest.mark.parametrize("name", ["out.npy", "out.zarr"])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from test_tile_resume import run, Slow\n"
        f"run(Path({str(out)!r}), Slow(0.05))\n"
    )
    with (tmp_path / "err").open("w") as err:
        child = subprocess.Popen([sys.executable, "-c", code], stderr=err, env={**os.environ})
        journal, deadline = paths_of(out).journal, time.monotonic() + 100
        while sum(p.read_bytes().count(b'"tile"') for p in journal.glob("*.jsonl")) < 8:
            assert child.poll() is None and time.monotonic() < deadline, (
                tmp_path / "err"
            ).read_text()
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not out.exists() and paths_of(out).partial.exists()
    model = Slow()
    got = np.asarray(run(out, model)[:])
    assert 0 < model.windows <= 56
    np.testing.assert_allclose(got, wanted(), rtol=0, atol=1e-6)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["err", name, f"{name}.tiles.json"]


def test_a_finished_result_is_found(tmp_path: Path) -> None:
    first, again = Slow(), Slow()
    run(tmp_path / "out.npy", first)
    before = (tmp_path / "out.npy").stat()
    run(tmp_path / "out.npy", again)
    after = (tmp_path / "out.npy").stat()
    assert first.windows == 64 and again.windows == 0 and before.st_mtime_ns == after.st_mtime_ns


def test_another_model_does_not_go_on_with_it(tmp_path: Path) -> None:
    out, other = tmp_path / "out.npy", Slow()
    nn.init.constant_(other.mean.weight, 1.0)
    run(out, Slow())
    with pytest.raises(FingerprintMismatch, match="begun with other model"):
        run(out, other)
    with pytest.raises(FingerprintMismatch, match="halo"):
        run(out, Slow(), halo=2)
    got = run(out, other, overwrite=True)
    np.testing.assert_allclose(got, 9 * wanted(), rtol=0, atol=1e-5)


def test_overwrite_computes_a_finished_result_anew(tmp_path: Path) -> None:
    again = Slow()
    run(tmp_path / "out.npy", Slow())
    run(tmp_path / "out.npy", again, overwrite=True)
    assert again.windows == 64


@pytest.mark.parametrize("kind", ["file", "map", "memory"])
def test_an_input_that_changed_anywhere_is_another(tmp_path: Path, kind: str) -> None:
    """200 pixels between the windows that are sampled."""
    path, pixels = tmp_path / "in.npy", image()

    def once() -> None:
        given = {"file": path, "map": np.load(path, mmap_mode="r"), "memory": pixels}
        raypipe.process_large_image(
            given[kind], Slow(), 70, tmp_path / "out.npy", halo=1, align=1, axes="YX"
        )

    np.save(path, pixels)
    once()
    once()
    pixels[60, 150:350] += 1
    np.save(path, pixels)
    with pytest.raises(FingerprintMismatch, match="begun with other input"):
        once()


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.npy").write_text("mine")
    with pytest.raises(StoreError, match="was not written by this"):
        run(tmp_path / "out.npy", Slow())
    assert (tmp_path / "out.npy").read_text() == "mine"


def test_what_is_overwritten_is_there_until_the_new_one_is_complete(tmp_path: Path) -> None:
    class Failing(Slow):
        def forward(self, x: Tensor) -> Tensor:
            if self.windows >= 40:
                raise RuntimeError("ended")
            return super().forward(x)

    out, bias = tmp_path / "out.npy", nn.Parameter(torch.tensor([2.0]))
    run(out, Slow())
    failing, other = Failing(), Slow()
    failing.mean.bias = other.mean.bias = bias
    failing.__class__.__name__ = (
        other.__class__.__name__
    )  # printed alike, so one goes on for the other
    with pytest.raises(RuntimeError, match="ended"):
        run(out, failing, overwrite=True)
    np.testing.assert_allclose(np.load(out), wanted(), rtol=0, atol=1e-6)
    with pytest.raises(StoreError, match="is an older result"):
        run(out, other)
    got = run(out, other, overwrite=True)
    assert 0 < other.windows < 64  # it went on with what the first had committed
    np.testing.assert_allclose(got, wanted() + 2, rtol=0, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "out.npy.tiles.json"]


def test_a_result_named_before_it_said_so_is_gone_on_with(tmp_path: Path) -> None:
    """A crash between the last rename and the manifest: the file is the run's own."""
    run(tmp_path / "out.npy", Slow())
    manifest, again = tmp_path / "out.npy.tiles.json", Slow()
    manifest.write_text(manifest.read_text().replace('"done"', '"writing"'))
    np.testing.assert_allclose(run(tmp_path / "out.npy", again), wanted(), rtol=0, atol=1e-6)


def test_a_foreign_file_is_overwritten_only_by_a_complete_result(tmp_path: Path) -> None:
    (tmp_path / "out.npy").write_text("mine")
    with opened(tmp_path / "out.npy", overwrite=True) as begun:
        assert (tmp_path / "out.npy").read_text() == "mine"
        assert begun.missing_bytes() == 100 * 9, (
            "its own file is preallocated, the other does not count"
        )
        write_all(begun)
        begun.finish()
    assert (np.load(tmp_path / "out.npy") == 7).all()


def test_a_result_that_got_its_name_is_not_asked_room_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended between the last rename and the manifest, on a disk that is then full."""
    out, write_manifest = tmp_path / "a.npy", TileRun._write_manifest

    def ends(run: TileRun, state: str) -> None:
        if state == DONE:
            raise KeyboardInterrupt
        write_manifest(run, state)

    with monkeypatch.context() as patch, opened(out) as first:
        patch.setattr(TileRun, "_write_manifest", ends)
        write_all(first)
        with pytest.raises(KeyboardInterrupt):
            first.finish()
    assert out.exists() and not first.paths.partial.exists()
    assert json.loads(first.paths.manifest.read_text())["state"] == "writing"
    other = TileRun(first.spec, {"model": "b"}, "run")
    assert other.missing_bytes() >= first.spec.nbytes, "nothing of it is there"
    monkeypatch.setattr(space, "free_bytes", lambda path: 100 * 9)
    with opened(out) as second:
        assert second.kept == 9 and not len(second.missing())
        second.finish()
    assert (np.load(out) == 7).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.npy.tiles.json"]


@pytest.mark.parametrize("name", ["in.npy", "in.zarr"])
def test_the_input_is_never_the_output(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "in.npy":
        np.save(path, image())
    else:
        zarr.save_array(str(path), image())
    link = tmp_path / ("link" + path.suffix)
    link.symlink_to(path)
    for out in (path, link):
        with pytest.raises(ConfigError, match="is the input itself"):
            raypipe.process_large_image(path, Slow(), 70, out, axes="YX", overwrite=True)
    if name == "in.npy":
        mapped = np.load(path, mmap_mode="r")[10:]
        with pytest.raises(ConfigError, match="is the input itself"):
            raypipe.process_large_image(mapped, Slow(), 70, path, overwrite=True)
    kept = np.load(path) if name == "in.npy" else zarr.open_array(str(path), mode="r")[:]
    assert np.array_equal(kept, image())


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(small_disk: Path) -> None:
    with pytest.raises(NoSpace, match="too few"):
        raypipe.process_large_image(
            image().repeat(2, 0), Slow(), 70, small_disk / "out.npy", halo=1, align=1
        )
    assert list(small_disk.iterdir()) == []


def test_what_a_zarr_has_on_the_disk_is_not_asked_for_again(tmp_path: Path) -> None:
    """A run that goes on where little is left free must not be refused."""
    run(tmp_path / "out.zarr", Slow())
    spec = OutputSpec(
        path=tmp_path / "out.zarr", grid=TileGrid.of((500, 500), (70, 70), (1, 1), (1, 1)), frames=1,
        channels=1, dtype="float32", keep_frames=False, keep_channels=False,
    )  # fmt: skip
    fresh = TileRun(spec, {}, "run")
    assert fresh.missing_bytes() == 4 * 560 * 560 + 100 * 64  # chunks at the end are stored whole
    (tmp_path / "out.zarr").rename(fresh.paths.partial)
    stored = sum(p.stat().st_size for p in fresh.paths.partial.rglob("*") if p.is_file())
    assert stored >= 4 * 560 * 560 and fresh.missing_bytes() == 100 * 64


def write_all(begun: TileRun) -> None:
    """Every tile, of sevens, committed."""
    writer = TileWriter(begun.target, "w")
    for number in range(len(begun.done)):
        box = begun.spec.grid.tile(number).keep
        writer.write(number, np.full((1, *(s.stop - s.start for s in box)), 7))
    writer.commit()
    writer.close()
    begun.accept(range(len(begun.done)))


def opened(out: Path, *, overwrite: bool = False) -> TileRun:
    grid = TileGrid.of((50, 60), (20, 20), (0, 0), (1, 1))
    spec = OutputSpec(
        path=out,
        grid=grid,
        frames=1,
        channels=1,
        dtype="uint8",
        keep_frames=False,
        keep_channels=False,
    )
    made = TileRun(spec, {"model": "a"}, "run")
    made.open(overwrite=overwrite)
    return made


def test_only_what_is_on_the_disk_counts(tmp_path: Path) -> None:
    """A committed tile whose bytes changed since is computed again; one not committed too."""
    out = tmp_path / "a.npy"
    with opened(out) as first:
        writer = TileWriter(first.target, "w")
        for number in range(4):
            writer.write(number, np.full((1, 20, 20), number + 1))
            if number < 3:
                writer.commit()
        writer.close()
    with paths_of(out).partial.open("r+b") as file:
        file.seek(128 + 60 * 3 + 25)  # a pixel of tile 1
        file.write(b"\xff")
    with opened(out) as second:
        assert second.kept == 2 and list(second.missing()) == [1, *range(3, 9)]
        with pytest.raises(StoreError, match="lacks 7 of 9 tiles"):
            second.finish()


def test_one_run_at_a_time_and_old_writers_are_shut_out(tmp_path: Path) -> None:
    with opened(tmp_path / "a.npy") as first:
        old = TileWriter(first.target, "w")
        with pytest.raises(StoreLocked, match="is being written by pid"):
            opened(tmp_path / "a.npy")
    with opened(tmp_path / "a.npy"), pytest.raises(Fenced, match="superseded"):
        old.write(0, np.zeros((1, 20, 20), np.uint8))
    old.close()


def test_items_shrink_until_they_cannot() -> None:
    item = TileItem(frame=0, tiles=(3, 4), batch_limit=2)
    smaller = item.with_less_memory()
    assert smaller.batch_limit == 1 and smaller.key == item.key == (0, 3)
    assert item.at_most(smaller) == smaller
    with pytest.raises(MemoryBudgetExceeded, match="smaller chunk_size"):
        smaller.with_less_memory()


def test_a_device_out_of_memory_halves_the_batch(tmp_path: Path) -> None:
    class Large(Slow):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    np.testing.assert_allclose(run(tmp_path / "o.npy", Large(), batch=4), wanted(), atol=1e-6)


def test_what_it_was_made_of_is_kept(tmp_path: Path) -> None:
    run(tmp_path / "out.npy", Slow())
    fields = json.loads((tmp_path / "out.npy.tiles.json").read_text())
    assert fields["state"] == "done" and fields["identity"]["halo"] == [1, 1]


@pytest.mark.ray
def test_workers_share_the_tiles(ray_session: None, tmp_path: Path) -> None:
    from raypipe.cluster.runner import RayRunner

    path = tmp_path / "in.npy"
    np.save(path, image())
    model = nn.Conv2d(1, 1, 3, padding=1)
    cfg = TileConfig(chunk_size=70, workers=2, device="cpu", halo=1, align=1)
    found = infer(
        open_source(path, 2),
        model,
        tmp_path / "out.tif",
        cfg,
        RayRunner(joined=False, on_event=print),
        keep_frames=False,
    )
    with torch.inference_mode():
        whole = model(torch.from_numpy(image())[None, None])[0, 0].numpy()
    from tifffile import imread

    assert found.tiles == 49 and found.shape == (500, 500)  # 80 pixels: TIFF wants multiples of 16
    np.testing.assert_allclose(imread(found.path), whole, rtol=0, atol=1e-6)
