"""A fitted run of random weights, pages to predict, and the command in a process of its own, slowly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tifffile
import torch

from raypipe.cli import main
from raypipe.segment.model import UNetConfig, build_model
from raypipe.segment.normalise import Normalisation
from raypipe.segment.saved import SavedModel, save_model
from raypipe.tile.ledger import paths_of
from raypipe.train import checkpoint

TILES = 50  # of `write_pages` in tiles of 64 pixels
# A depth of 3 looks 22 pixels far and halves twice: stated, so that only one test measures it.
STATED = ("--halo", "24", "--align", "4")
PATIENCE_S = 100

# The command itself; its network naps before each window. Windows are square here, probes are not.
SLOWLY = """
import sys, time, torch
torch.set_num_threads(1)
from raypipe.cli import main
from raypipe.segment import predict_plan
load = predict_plan.load_fitted
def slow(*args):
    fitted = load(*args)
    def nap(_, given):
        height, width = given[0].shape[-2:]
        time.sleep(NAP if height == width else 0)
    fitted.module.register_forward_pre_hook(nap)
    return fitted
predict_plan.load_fitted = slow
sys.exit(main(sys.argv[1:]))
"""


def fitted_run(run_dir: Path, *, in_channels: int = 1) -> Path:
    """A run folder as fit leaves it; its threshold parts the pixels of a random image in halves."""
    run_dir.mkdir(parents=True)
    spec = UNetConfig(width=4, depth=3, in_channels=in_channels)
    how = Normalisation(kind="minmax", low=(10.0,) * in_channels, high=(250.0,) * in_channels)
    saved = SavedModel(
        spec=spec, normalisation=how, target="foreground", classes=2, ignore=None, seed=1
    )
    save_model(run_dir, saved)
    model = build_model(spec, 1).eval()
    with torch.inference_mode():
        middle = model(torch.rand(1, in_channels, 64, 64)).sigmoid().median()
    history = [{"epoch": 3, "val_threshold": float(middle)}]
    checkpoint.save(
        run_dir, "best", {"model": model.state_dict()}, {"progress": {"history": history}}
    )
    return run_dir


def write_pages(path: Path) -> np.ndarray:
    """Two compressed pages, (2, 300, 280) uint8."""
    pages = np.random.default_rng(0).integers(0, 255, (2, 300, 280), np.uint8)
    tifffile.imwrite(path, pages, photometric="minisblack", compression="zlib")
    return pages


def arguments(run_dir: Path, given: Path, out: Path, *more: str) -> list[str]:
    """Of the command, in this process's own runner, in tiles of 64 pixels."""
    flags = ["--run-dir", run_dir, "--input", given, "--output", out, "--runner", "local"]
    flags += ["--device", "cpu", "--chunk-size", "64", *more]
    return ["segment", "predict", *map(str, flags)]


def predict(*args: object) -> int:
    """The command in this process, on one thread, as `start` runs it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return main(arguments(*args))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)


def start(args: list[str], nap_s: float) -> subprocess.Popen[str]:
    """The command in a process of its own, at least ``nap_s`` a tile."""
    code = SLOWLY.replace("NAP", str(nap_s))
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell starts background jobs with SIGINT ignored, and the suite may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def recorded(out: Path) -> int:
    """Tiles that journals record."""
    journals = paths_of(out).journal.glob("*.jsonl")
    return sum(path.read_bytes().count(b'"tile"') for path in journals)


def wait_until(child: subprocess.Popen[str], happened: object, what: str) -> None:
    """Poll ``happened()`` while the child is alive."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what}: not in {PATIENCE_S} s"
        assert child.poll() is None, f"ended before {what}: {child.communicate()[1]}"
        time.sleep(0.005)
