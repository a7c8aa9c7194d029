"""Real kills of `raypipe segment predict`: the same command ends with the bytes of an unbroken run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
from predict_kit import (
    STATED,
    TILES,
    arguments,
    fitted_run,
    predict,
    recorded,
    start,
    wait_until,
    write_pages,
)

NAMES = ("out.tif", "out.ome.tif")


@dataclass(frozen=True)
class Job:
    """run_dir, given : of every run here; unbroken : file name -> bytes of a run that nobody disturbed."""

    run_dir: Path
    given: Path
    unbroken: dict[str, bytes]

    def args(self, out: Path) -> list[str]:
        return arguments(self.run_dir, self.given, out, *STATED)

    def run(self, out: Path) -> int:
        return predict(self.run_dir, self.given, out, *STATED)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("predict-kill")
    made = Job(fitted_run(folder / "run"), folder / "in.tif", {})
    write_pages(made.given)
    for name in NAMES:
        assert made.run(folder / name) == 0
        made.unbroken[name] = (folder / name).read_bytes()
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_driver_is_gone_on_with(
    job: Job, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    child = start(job.args(out), 0.03)
    wait_until(child, lambda: recorded(out), "the first tiles")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    kept = recorded(out)
    assert 0 < kept < TILES, "the kill must fall inside the run, or nothing was shown"
    assert not out.exists(), "an unfinished result must not stand under its name"
    assert job.run(out) == 0
    assert f"{kept} of {TILES} tiles are there already" in capsys.readouterr().err
    assert out.read_bytes() == job.unbroken[name]
    with tifffile.TiffFile(out) as file:
        assert file.is_bigtiff and file.pages[0].is_tiled and file.is_ome == (".ome." in name)
        pixels = file.asarray()
    assert pixels.shape == (2, 300, 280) and np.unique(pixels).tolist() == [0, 1]
    record = json.loads((tmp_path / f"{name}.predict" / "run.json").read_text())
    assert record["kept"] == record["result"]["kept"] == kept
    assert record["result"]["tiles"] == TILES - kept
    assert [one["result"] for one in record["earlier"]] == [None]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        name,
        f"{name}.predict",
        f"{name}.tiles.json",
    ]


def test_ctrl_c_exits_130_and_the_same_command_goes_on(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out.tif"
    child = start(job.args(out), 0.03)
    wait_until(child, lambda: recorded(out), "the first tiles")
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=100)
    assert child.returncode == 130, stderr
    assert stderr.splitlines()[-1].startswith("raypipe: interrupted")
    assert 0 < recorded(out) < TILES and not out.exists()
    assert job.run(out) == 0
    assert out.read_bytes() == job.unbroken["out.tif"]


def test_a_disk_that_fills_up_in_the_run_exits_3_and_the_same_command_goes_on(
    job: Job, mount: Callable[[str, str], Path]
) -> None:
    """The pixels' place was taken before: what meets the full disk is a journal."""
    place = mount("tmpfs", "size=4m")
    out = place / "out.tif"
    log = place / "out.tif.predict" / "memory" / "worker.csv"
    child = start(job.args(out), 0.05)
    wait_until(child, lambda: log.exists() and log.read_text().count("\n") > 1, "the memory log")
    assert not recorded(out), "the disk must be full before the first record"
    with (place / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    _, stderr = child.communicate(timeout=100)
    assert child.returncode == 3, stderr
    assert "bytes" in stderr.splitlines()[-1] and "free" in stderr.splitlines()[-1]
    assert not out.exists()
    (place / "filler").unlink()
    assert job.run(out) == 0
    assert out.read_bytes() == job.unbroken["out.tif"]


def test_a_disk_too_small_is_refused_before_a_byte_is_written(
    job: Job, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "in.npy", np.zeros((1200, 1200), np.uint8))
    given = job.run_dir, tmp_path / "in.npy", small_disk / "out.npy", *STATED
    assert predict(*given, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "exactly 1440128 bytes" in told
    assert "too few, it would be refused with exit code 3" in told
    assert predict(*given) == 3
    assert "too few; free some" in capsys.readouterr().err
    assert list(small_disk.iterdir()) == []
