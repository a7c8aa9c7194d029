"""`ray job submit -- python jobs/extract.py …` gives the digests of the command line."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STEP_S = 180


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_env(**more: str) -> dict[str, str]:
    """Ours, without what would point to another cluster."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"  # a job's `python` is this environment's
    return {
        **kept,
        "PATH": path,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        **more,
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Algonauts-layout subject: 12 training and 5 test images."""
    subject = tmp_path_factory.mktemp("data") / "subj03"
    rng = np.random.default_rng(3)
    for split, kind, n in [("training", "train", 12), ("test", "test", 5)]:
        folder = subject / f"{split}_split" / f"{split}_images"
        folder.mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (48, 48, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{kind}-{i + 1:04d}_nsd-{i:05d}.png")
    return subject.parent


@pytest.fixture(scope="module")
def by_command_line(
    images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.Popen[str]]:
    """Where an extraction by the command line writes, and its process, which is not waited for."""
    out = tmp_path_factory.mktemp("cli")
    argv = [sys.executable, "-m", "raypipe", "extract", *flags(images, out)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return out, subprocess.Popen(argv, env=clean_env(), cwd=ROOT, **streams)


@pytest.fixture(scope="module")
def head(by_command_line: object) -> Iterator[str]:
    """A head of our own on loopback: own ports, own temp folder, ended by its own process.

    It takes a while to come up: what does not need it has begun before.
    """
    temp = Path(tempfile.mkdtemp(prefix="rp-"))  # short: Ray's sockets lie below it
    dashboard = free_port()
    args = [
        *("start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--port={free_port()}"),
        # The agent that takes jobs: its default port belongs to the suite's own Ray session.
        f"--dashboard-agent-listen-port={free_port()}",
        *(
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={temp}",
            "--object-store-memory=100000000",
        ),
    ]
    log = (temp / "head.log").open("w")
    # Its end would wait up to 30 s for work to leave the node; nobody is left who has any.
    env = clean_env(RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0")
    process = subprocess.Popen([BIN / "ray", *args], env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + STEP_S
    while not _answers(dashboard):
        assert process.poll() is None, (temp / "head.log").read_text()
        assert time.monotonic() < deadline, "the head did not come up"
        time.sleep(0.3)
    yield address
    process.terminate()
    process.wait(timeout=60)
    log.close()
    shutil.rmtree(temp, ignore_errors=True)


def _answers(port: int) -> bool:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.npy"))
    }


def flags(images: Path, out: Path) -> list[str]:
    return [
        *("--data-dir", str(images), "--output-dir", str(out), "--subj", "03"),
        *("--backbone", "resnet18", "--weights", "random:0", "--batch-size", "4"),
        *("--device", "cpu", "--max-memory-per-process", "2GiB"),  # two find room, anywhere
    ]


def submit(head: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Submit and wait; the head answers before its job agent does, so "no agent yet" is asked again."""
    deadline = time.monotonic() + STEP_S
    while True:
        done = subprocess.run(
            [BIN / "ray", "job", "submit", "--address", head, "--working-dir", ".", "--", *command],
            cwd=ROOT,
            env=clean_env(),
            capture_output=True,
            text=True,
            timeout=STEP_S,
        )
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)


@dataclass(frozen=True)
class Ends:
    """How three commands ended that ran at the same time: none of them waits for another."""

    job: Path
    cli: Path
    submitted: subprocess.CompletedProcess[str]
    failing: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def ends(
    head: str,
    images: Path,
    by_command_line: tuple[Path, subprocess.Popen[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Ends:
    """An extraction as a job, one of a subject that is not there, and one by the command line."""
    job, bad = (tmp_path_factory.mktemp(name) for name in ("job", "bad"))
    unknown = [arg if arg != "03" else "07" for arg in flags(images, bad)]
    cli, process = by_command_line
    with ThreadPoolExecutor(2) as beside:
        submitted, failing = (
            beside.submit(submit, head, "python", "jobs/extract.py", *given)
            for given in (flags(images, job), unknown)
        )
        _, said = process.communicate(timeout=STEP_S)
        assert process.returncode == 0, said
        return Ends(job, cli, submitted.result(), failing.result())


def test_a_submitted_extraction_has_the_digests_of_the_command_line(ends: Ends) -> None:
    assert ends.submitted.returncode == 0, ends.submitted.stdout + ends.submitted.stderr
    assert "succeeded" in ends.submitted.stdout
    assert digests(ends.job) == digests(ends.cli)
    assert sorted(digests(ends.job)) == [
        "resnet18_layer4/03/synt.npy",
        "resnet18_layer4/03/train.npy",
    ]


def test_a_failing_job_says_why_in_its_log(ends: Ends) -> None:
    assert ends.failing.returncode == 1, "Ray passes any failure on as 1"
    assert "unknown subject 'subj07'" in ends.failing.stdout + ends.failing.stderr
