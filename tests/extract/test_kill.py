"""Real Ray, real kills: what an extraction leaves behind is whole, and ends byte-identical.

Two of the commands start their own Ray: one whose driver is killed, one interrupted with all its
processes. What the others show does not depend on whose Ray it is: they join the suite's. One that
starts its own and is not disturbed is in tests/jobs.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
from real_kills import killing

from raypipe.cluster.runner import RayRunner
from raypipe.errors import NoSpace, StoreLocked
from raypipe.extract.config import ExtractConfig
from raypipe.extract.run import extract
from raypipe.store import verify

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("no_page")]

MakeConfig = Callable[..., ExtractConfig]
RUN_S = 120


def shard(out: Path, images: Path) -> Path:
    return out / "resnet18_layer4" / images.name / "train.npy"


def committed(path: Path) -> int:
    """Cells that journals of ``path`` record; 0 before the first."""
    journals = path.with_name("train.journal").glob("*.jsonl")
    return sum(max(0, len(file.read_bytes().splitlines()) - 1) for file in journals)


def owner_of(path: Path) -> int:
    """The process that says it holds the store at ``path``."""
    return int(json.loads(path.with_name("train.owner.json").read_bytes())["pid"])


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + RUN_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {RUN_S} s"
        time.sleep(0.005)


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


@dataclass(frozen=True)
class Started:
    """The command line at work, in a process group of its own."""

    cfg: ExtractConfig
    path: Path
    process: subprocess.Popen[str]

    @classmethod
    def of(cls, cfg: ExtractConfig, *more: str) -> Started:
        process = subprocess.Popen(
            command(cfg, *more),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_sigint,
        )
        return cls(cfg, shard(cfg.output_dir, cfg.data_dir), process)

    def end(self) -> str:
        """Wait for its end; what it said."""
        return self.process.communicate(timeout=RUN_S)[1]


def _heed_sigint() -> None:
    """A shell starts background jobs with SIGINT ignored, and the suite may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def when_each_has_committed(runs: Sequence[Started], then: Callable[[Started], None]) -> None:
    """``then`` with each run at its own first commit; they are under way at the same time."""
    waiting = list(runs)

    def one_more() -> bool:
        for run in [run for run in waiting if committed(run.path)]:
            then(run)
            waiting.remove(run)
        return not waiting

    wait_for(one_more, "the first commit")


# Beside another run each has to find room for its worker, on small machines too.
BESIDE = ("--max-memory-per-process", "2GiB")


@pytest.fixture(scope="module")
def joining(ray_session: None) -> tuple[str, ...]:
    """Flags of a command that starts no Ray."""
    return ("--address", str(ray.get_runtime_context().gcs_address), *BESIDE)


@pytest.fixture(scope="module")
def beginning(
    images: Path, joining: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Started, Started]:
    """Two runs that start together: nobody disturbs the first, the second's driver is killed."""
    configs = [
        ExtractConfig(
            data_dir=images,
            output_dir=tmp_path_factory.mktemp(name),
            backbone="resnet18",
            weights="random:0",
            batch_size=4,
        )
        for name in ("unbroken", "killed")
    ]
    killed, whole = Started.of(configs[1], *BESIDE), Started.of(configs[0], *joining)
    when_each_has_committed([killed], lambda run: run.process.kill())
    killed.end()
    said = whole.end()
    assert whole.process.returncode == 0, said
    return whole, killed


@pytest.fixture(scope="module")
def unbroken_shard(beginning: tuple[Started, Started]) -> Path:
    """The store of a run that nobody disturbed, by the command line."""
    return beginning[0].path


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
    with killing(lambda: committed(path)) as killed:
        extract(cfg, RayRunner(joined=False, on_event=events.append))
    assert any(f"worker {killed.pid} failed" in event for event in events)
    assert path.read_bytes() == unbroken
    assert verify(path).ok


def test_a_killed_drivers_store_is_finished_by_the_same_command_and_no_other_meanwhile(
    beginning: tuple[Started, Started], unbroken: bytes, joining: tuple[str, ...]
) -> None:
    """The one that finishes it owns it: another run fails at once and names the owner."""
    killed = beginning[1]
    assert killed.process.returncode == -signal.SIGKILL
    assert not killed.path.exists(), "an unfinished store must not stand under its final name"
    assert committed(killed.path)
    assert owner_of(killed.path) == killed.process.pid, "the dead one's claim is still there"
    again = Started.of(killed.cfg, *joining)
    wait_for(lambda: owner_of(killed.path) == again.process.pid, "the next run's claim")
    again.process.send_signal(signal.SIGSTOP)  # it keeps the store while the other one looks
    other = subprocess.run(
        command(killed.cfg, "--runner", "local"), capture_output=True, text=True, timeout=RUN_S
    )
    again.process.send_signal(signal.SIGCONT)
    assert other.returncode == StoreLocked.exit_code
    assert str(again.process.pid) in other.stderr
    said = again.end()
    assert again.process.returncode == 0, said
    kept = re.search(r"(\d+) of 48 rows are committed already", said)
    assert kept, said
    assert 0 < int(kept[1]) < 48, "the kill must fall inside the run, or nothing was shown"
    assert killed.path.read_bytes() == unbroken
    assert verify(killed.path).ok


def test_ctrl_c_exits_130_and_resumes(
    config: MakeConfig, unbroken: bytes, tmp_path: Path, joining: tuple[str, ...]
) -> None:
    """To the driver alone; and as a terminal sends it, to every process of the group, Ray's too."""
    group = Started.of(config(output_dir=tmp_path / "group"), *BESIDE)
    alone = Started.of(config(output_dir=tmp_path / "alone"), *joining)

    def interrupt(run: Started) -> None:
        (os.kill if run is alone else os.killpg)(run.process.pid, signal.SIGINT)

    when_each_has_committed([alone, group], interrupt)
    for run in (alone, group):
        said = run.end()
        assert run.process.returncode == 130, said
        assert "the same command resumes" in said
        assert not run.path.exists(), "it must fall inside the run"
        on_session(run.cfg)
        assert run.path.read_bytes() == unbroken


@pytest.mark.usefixtures("ray_session")
def test_a_disk_too_small_is_refused_before_a_byte_is_written(
    config: MakeConfig, small_disk: Path
) -> None:
    with pytest.raises(NoSpace, match=r"[0-9]+ bytes.*free") as stop:
        on_session(config(output_dir=small_disk / "features"))
    assert stop.value.exit_code == 3
    assert not list(small_disk.rglob("*.npy*"))


def test_a_disk_that_fills_up_in_the_run_exits_3_and_resumes(
    config: MakeConfig,
    unbroken: bytes,
    mount: Callable[[str, str], Path],
    joining: tuple[str, ...],
) -> None:
    """The data are preallocated: what meets the full disk is a journal."""
    place = mount("tmpfs", "size=8m")
    run = Started.of(config(output_dir=place / "features"), *joining)
    wait_for(lambda: run.path.with_name("train.npy.partial").exists(), "preallocation")
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    said = run.end()
    assert run.process.returncode == 3, said
    assert "bytes" in said.splitlines()[-1]
    assert "free" in said.splitlines()[-1]
    assert not run.path.exists()
    filler.unlink()
    on_session(run.cfg)
    assert run.path.read_bytes() == unbroken


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
