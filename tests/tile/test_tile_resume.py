"""A run that was ended goes on where it was; one that does not fit, or is not ours, is refused."""

from __future__ import annotations

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
from tile_runs import Slow, image, run, wanted
from torch import Tensor, nn

import raypipe
from raypipe.errors import ConfigError, FingerprintMismatch, StoreError
from raypipe.tile.ledger import paths_of

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["out.npy", "out.zarr"])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from tile_runs import run, Slow\n"
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
    # Named alike, so one goes on for the other.
    Failing.__name__, Failing.__module__ = Slow.__name__, Slow.__module__
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


def test_a_device_out_of_memory_halves_the_batch(tmp_path: Path) -> None:
    class Large(Slow):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    np.testing.assert_allclose(run(tmp_path / "o.npy", Large(), batch=4), wanted(), atol=1e-6)
