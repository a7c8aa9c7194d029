"""Real Ray, real kills: what an extraction leaves behind is whole, and ends byte-identical."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from raypipe.cluster.runner import RayRunner
from raypipe.errors import NoSpace, StoreLocked
from raypipe.extract.config import ExtractConfig
from raypipe.extract.run import extract
from raypipe.store import verify

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MakeConfig = Callable[..., ExtractConfig]
RUN_S = 120


def shard(out: Path, images: Path) -> Path:
    return out / "resnet18_layer4" / images.name / "train.npy"


def committed(path: Path) -> int:
    """Cells that journals of ``path`` record; 0 before the first."""
    journals = path.with_name("train.journal").glob("*.jsonl")
    return sum(max(0, len(file.read_bytes().splitlines()) - 1) for file in journals)


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + RUN_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {RUN_S} s"
        time.sleep(0.005)


def actors() -> list[int]:
    """Workers of our pools, below this process: not those of another run on this machine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and "PooledWorker" in process.cmdline()[0]:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def command(cfg: ExtractConfig, *more: str) -> list[str]:
    flags = [
        *("--data-dir", str(cfg.data_dir), "--output-dir", str(cfg.output_dir)),
        *("--backbone", cfg.backbone, "--weights", cfg.weights, "--device", "cpu"),
        *("--batch-size", str(cfg.batch_size), *more),
    ]
    return [sys.executable, "-m", "raypipe", "extract", *flags]


def on_session(cfg: ExtractConfig) -> None:
    """What the command would do, on the suite's Ray: no second one starts."""
    extract(cfg, RayRunner(joined=False, on_event=print))


@pytest.fixture(scope="module")
def unbroken_shard(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that nobody disturbed, by the command line."""
    out = tmp_path_factory.mktemp("unbroken")
    cfg = ExtractConfig(
        data_dir=images, output_dir=out, backbone="resnet18", weights="random:0", batch_size=4
    )
    subprocess.run(command(cfg), check=True, capture_output=True, timeout=RUN_S)
    return shard(out, images)


@pytest.fixture(scope="module")
def unbroken(unbroken_shard: Path) -> bytes:
    """Its bytes."""
    return unbroken_shard.read_bytes()


@pytest.mark.usefixtures("ray_session")
def test_a_killed_actor_is_replaced_and_the_bytes_are_the_same(
    config: MakeConfig, unbroken: bytes
) -> None:
    cfg = config()
    path = shard(cfg.output_dir, cfg.data_dir)
    events: list[str] = []
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: committed(path), "the first commit")
        killed.extend(actors())
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    extract(cfg, RayRunner(joined=False, on_event=events.append))
    killer.join()
    assert any(f"worker {killed[0]} failed" in event for event in events)
    assert path.read_bytes() == unbroken
    assert verify(path).ok


def test_a_killed_driver_leaves_a_store_that_the_same_command_finishes(
    config: MakeConfig, unbroken: bytes
) -> None:
    cfg = config()
    path = shard(cfg.output_dir, cfg.data_dir)
    driver = subprocess.Popen(
        command(cfg), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: committed(path), "the first commit")
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait(timeout=RUN_S)
    assert not path.exists(), "an unfinished store must not stand under its final name"
    assert committed(path)
    again = subprocess.run(command(cfg), capture_output=True, text=True, timeout=RUN_S)
    assert again.returncode == 0, again.stderr
    kept = re.search(r"(\d+) of 48 rows are committed already", again.stderr)
    assert kept, again.stderr
    assert 0 < int(kept[1]) < 48, "the kill must fall inside the run, or nothing was shown"
    assert path.read_bytes() == unbroken
    assert verify(path).ok


def _heed_sigint() -> None:
    """A shell starts background jobs with SIGINT ignored, and the suite may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("to_all", [False, True], ids=["the driver", "its whole group"])
def test_ctrl_c_exits_130_and_resumes(config: MakeConfig, unbroken: bytes, to_all: bool) -> None:
    """A terminal sends it to every process of the group."""
    cfg = config()
    path = shard(cfg.output_dir, cfg.data_dir)
    driver = subprocess.Popen(
        command(cfg),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_sigint,
    )
    wait_for(lambda: committed(path), "the first commit")
    if to_all:
        os.killpg(driver.pid, signal.SIGINT)
    else:
        driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate(timeout=RUN_S)
    assert driver.returncode == 130, stderr
    assert "the same command resumes" in stderr
    on_session(cfg)
    assert path.read_bytes() == unbroken


def test_a_second_run_on_one_store_fails_at_once_and_names_the_owner(config: MakeConfig) -> None:
    cfg = config()
    path = shard(cfg.output_dir, cfg.data_dir)
    with subprocess.Popen(
        command(cfg), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        wait_for(lambda: path.with_name("train.owner.json").exists(), "the first run's claim")
        first.send_signal(signal.SIGSTOP)  # it keeps the store for as long as the second one looks
        second = subprocess.run(
            command(cfg, "--runner", "local"), capture_output=True, text=True, timeout=RUN_S
        )
        first.send_signal(signal.SIGCONT)
        assert second.returncode == StoreLocked.exit_code
        assert str(first.pid) in second.stderr
        assert first.wait(timeout=RUN_S) == 0
    assert verify(path).ok


@pytest.mark.usefixtures("ray_session")
def test_a_disk_too_small_is_refused_before_a_byte_is_written(
    config: MakeConfig, small_disk: Path
) -> None:
    with pytest.raises(NoSpace, match=r"[0-9]+ bytes.*free") as stop:
        on_session(config(output_dir=small_disk / "features"))
    assert stop.value.exit_code == 3
    assert not list(small_disk.rglob("*.npy*"))


@pytest.mark.usefixtures("ray_session")
def test_a_disk_that_fills_up_in_the_run_exits_3_and_resumes(
    config: MakeConfig, unbroken: bytes, mount: Callable[[str, str], Path]
) -> None:
    """The data are preallocated: what meets the full disk is a journal."""
    place = mount("tmpfs", "size=8m")
    cfg = config(output_dir=place / "features")
    path = shard(cfg.output_dir, cfg.data_dir)
    run = subprocess.Popen(
        command(cfg), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: path.with_name("train.npy.partial").exists(), "preallocation")
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    _, stderr = run.communicate(timeout=RUN_S)
    assert run.returncode == 3, stderr
    assert "bytes" in stderr.splitlines()[-1]
    assert "free" in stderr.splitlines()[-1]
    assert not path.exists()
    filler.unlink()
    on_session(cfg)
    assert path.read_bytes() == unbroken


def test_numpy_alone_reads_the_store(unbroken_shard: Path, tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "assert not any('raypipe' in m for m in sys.modules)\n"
        f"a = np.load({str(unbroken_shard)!r}, mmap_mode='r')\n"
        "print(a.shape, a.dtype, type(a).__name__)"
    )
    alone = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert alone.stdout.strip() == "(48, 49, 512) float16 memmap"


@pytest.mark.usefixtures("ray_session")
def test_actors_share_the_work(config: MakeConfig, unbroken: bytes) -> None:
    """Two workers, one thread each, write into one file; the sums differ by threads alone."""
    cfg = config(workers=2)
    on_session(cfg)
    ours = np.load(shard(cfg.output_dir, cfg.data_dir))
    reference = np.load(io.BytesIO(unbroken))
    np.testing.assert_allclose(ours.astype("f4"), reference.astype("f4"), rtol=2e-3, atol=1e-3)
