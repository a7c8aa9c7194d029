"""What a dry run predicts, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from raypipe.errors import BadImage, DeviceUnavailable, NoSpace
from raypipe.extract import rehearse as rehearse_module
from raypipe.extract.config import ExtractConfig
from raypipe.extract.rehearse import Rehearsed, choose_images
from raypipe.extract.run import extract
from raypipe.runner import LocalRunner

MakeConfig = Callable[..., ExtractConfig]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder that a rehearsal uses."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def found(out: str) -> str:
    return next(line for line in out.splitlines() if line.startswith("predicted peak"))


def test_it_predicts_memory_and_leaves_nothing(
    config: MakeConfig, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(dry_run=True, image_size=64)
    extract(cfg, LocalRunner())
    out = capsys.readouterr().out
    line = found(out)
    assert re.search(
        r"predicted peak: [\d.]+ [MG]iB a worker process \(rehearsed on 48 images\)", line
    )
    assert f"rehearsed in {os.uname().nodename}:{temporary}" in out
    assert not list(temporary.glob("raypipe-*"))
    assert not cfg.output_dir.exists()


def test_the_disk_figure_is_the_finished_files_to_the_byte(
    config: MakeConfig, capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"  # the last cell is no whole one
    photos.mkdir()
    for image in sorted(images.iterdir())[:30]:
        (photos / image.name).symlink_to(image)
    cfg = config(
        data_dir=photos, backbone="timm:resnet18", layer=("layer2", "layer4"), image_size=64
    )
    extract(replace(cfg, dry_run=True), None)
    told = int(re.search(r"disk exactly (\d+) bytes", capsys.readouterr().out)[1])  # type: ignore[index]
    extract(cfg, LocalRunner())
    stores = list(cfg.output_dir.rglob("*.npy"))
    assert len(stores) == 2
    assert told == sum(path.stat().st_size for path in stores)
    (page,) = cfg.output_dir.glob("runs/*/report.html")
    assert page.stat().st_size > 10_000


def test_published_weights_are_not_fetched(
    config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("a dry run must not download")

    monkeypatch.setattr("raypipe.backbone.model.locate", never)
    extract(config(dry_run=True, image_size=64, weights="pretrained"), LocalRunner())
    assert "rehearsed on 48 images" in found(capsys.readouterr().out)


def test_without_a_runner_it_says_so(
    config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(config(dry_run=True, image_size=64), None)
    assert "not rehearsed (no runner was given), disk exactly" in found(capsys.readouterr().out)


def test_a_missing_device_is_named(
    config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_here(self: LocalRunner, device: str) -> str:
        raise DeviceUnavailable(f"--device {device}: no GPU here")

    monkeypatch.setattr(LocalRunner, "resolve_device", none_here)
    extract(config(dry_run=True, image_size=64, device="cuda"), LocalRunner())
    assert "not rehearsed (--device cuda: no GPU here)" in found(capsys.readouterr().out)


def test_a_full_temporary_folder_is_named(
    config: MakeConfig,
    temporary: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: object, **options: object) -> None:
        raise NoSpace("needs 5 bytes, 4 are free")

    monkeypatch.setattr(rehearse_module, "open_for_writing", full)
    extract(config(dry_run=True, image_size=64), LocalRunner())
    assert "not rehearsed (needs 5 bytes, 4 are free)" in found(capsys.readouterr().out)
    assert not list(temporary.glob("raypipe-*"))


def test_what_would_fail_the_run_fails_the_rehearsal_and_leaves_nothing(
    config: MakeConfig, temporary: Path, images: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for image in images.iterdir():
        (photos / image.name).write_bytes(image.read_bytes())
    (photos / "image-040.png").write_bytes(b"\x89PNG torn")
    cfg = config(data_dir=photos, dry_run=True, image_size=64, on_bad_image="fail")
    with pytest.raises(BadImage, match=r"image-040\.png"):
        extract(cfg, LocalRunner())
    assert not list(temporary.glob("raypipe-*"))


def test_enough_is_enough(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rehearse_module, "ENOUGH_S", 0.0)
    extract(config(dry_run=True, image_size=64), LocalRunner())
    assert "rehearsed on 16 images" in found(capsys.readouterr().out), "four cells of four"


def test_folders_of_killed_rehearsals_are_removed(config: MakeConfig, temporary: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = rehearse_module._prefix
    left, living, foreign = (
        temporary / f"{name(ended.pid)}a", temporary / f"{name(os.getppid())}b",
        temporary / "raypipe-rehearsal-elsewhere-1-c",
    )  # fmt: skip
    for folder in (left, living, foreign):
        folder.mkdir()
    extract(config(dry_run=True, image_size=64), LocalRunner())
    assert sorted(temporary.glob("raypipe-*")) == sorted([living, foreign])


def test_the_largest_files_are_among_the_chosen(tmp_path: Path) -> None:
    paths = []
    for i in range(100):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(bytes(5000 if i in (13, 77) else 10))
    chosen = choose_images(paths, grid=2, row_bytes=1)
    assert set(chosen[:2]) == {paths[13], paths[77]}
    assert len(chosen) == 2 * rehearse_module.MAX_CELLS
    assert len(set(chosen[2:])) == len(chosen) - 2, "the others are spread, each once"
    assert len(choose_images(paths[:5], grid=2, row_bytes=1)) == 5
    assert len(choose_images(paths, grid=2, row_bytes=2**30)) == 2 * rehearse_module.MIN_CELLS


def test_a_gpu_and_a_halved_batch_are_told() -> None:
    rehearsed = Rehearsed(
        rows=64, rate=10.0, peak_bytes=646 * 2**20, budget_bytes=2**30, halved_to=8,
        gpu_bytes=(2**30, 3 * 2**29), place="box:/tmp/x", place_bytes=2**20,
    )  # fmt: skip
    assert rehearsed.line() == (
        "646 MiB a worker process (rehearsed on 64 images, memory was short: batch 8), 1.00 GiB on "
        "the GPU (1.50 GiB reserved; CUDA's own context comes on top)"
    )
    assert rehearsed.budget_line() == "63% of its budget of 1.00 GiB"
    close = replace(rehearsed, peak_bytes=900 * 2**20)
    assert "batches will be halved" in close.budget_line()
    assert "about 50 s for 1000 images" in rehearsed.place_line(1000, workers=2)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_on_ray_a_killed_rehearsal_is_done_again_and_cleared_up(
    config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    from raypipe.cluster.runner import RayRunner

    killed: list[Path] = []
    mine = f"raypipe-rehearsal-{os.uname().nodename}-*"

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for folder in Path("/tmp").glob(mine):
                pid = int(folder.name.removeprefix(mine[:-1]).partition("-")[0])
                if pid in {child.pid for child in psutil.Process().children(recursive=True)}:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(folder)
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    events: list[str] = []
    extract(config(dry_run=True), RayRunner(joined=False, on_event=events.append))
    killer.join()
    assert killed
    assert any("failed" in event for event in events)
    assert re.search(
        r"[\d.]+ [MG]iB a worker process \(rehearsed on \d+ images\)", capsys.readouterr().out
    )
    assert not killed[0].exists()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", "timm:vit_tiny_patch16_224"])
def test_the_prediction_is_within_a_tenth_of_the_run(
    config: MakeConfig, tmp_path: Path, backbone: str
) -> None:
    """Each in a process of its own, whose peak is sampled from outside."""
    program = """
import sys, threading, time
from pathlib import Path
from raypipe.extract.config import ExtractConfig
from raypipe.extract.run import extract
from raypipe.memory import anon_bytes
from raypipe.runner import LocalRunner
peak, over = [0], threading.Event()
def sample():
    while not over.wait(0.003):
        peak[0] = max(peak[0], anon_bytes())
thread = threading.Thread(target=sample)
thread.start()
data, out, backbone, dry = sys.argv[1:]
extract(ExtractConfig(data_dir=Path(data), output_dir=Path(out), backbone=backbone,
        weights="random:0", image_size=224, device="cpu", dry_run=dry == "dry"), LocalRunner())
over.set()
thread.join()
print("sampled", peak[0])
"""

    def run(kind: str) -> str:
        words = [str(config().data_dir), str(tmp_path / "out"), backbone, kind]
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = re.search(r"predicted peak: ([\d.]+) MiB", run("dry"))
    measured = re.search(r"sampled (\d+)", run("run"))
    assert told is not None
    assert measured is not None
    assert float(told[1]) == pytest.approx(int(measured[1]) / 2**20, rel=0.1)
