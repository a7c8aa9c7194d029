"""Extraction against a bare loop, and its memory against the number of images.

ratio_to_bare: images/s of `raypipe extract` (Ray, one worker, decode, store, commit; start-up not
counted) over images/s of a loop that only runs the same model on the same decoded batches, before
and after ours in each round and halted in between; Ray runs only while ours does, so what it costs
is charged to ours. Median of the rounds. Run it alone on the machine.
peak_anon_mib_N: largest RssAnon of the extraction worker over N images, sampled every 5 ms.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from common import emit, median, parser, say
from PIL import Image

from raypipe.backbone import resolve
from raypipe.backbone.model import load
from raypipe.extract.config import ExtractConfig
from raypipe.extract.run import ExtractSummary, extract
from raypipe.launch import LaunchConfig, open_runner
from raypipe.memory import anon_bytes
from raypipe.read import list_images, read_image

DISTINCT = 50
TURN_S = 25.0
WORKER = "ray::PooledWorker"


def make_images(folder: Path, n: int, side: int) -> Path:
    """``n`` PNG images of ``side`` pixels: photographs' statistics do not matter, decoding does."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(min(n, DISTINCT)):
        coarse = rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"image-{i:05d}.png", compress_level=1)
    for i in range(DISTINCT, n):
        (folder / f"image-{i:05d}.png").hardlink_to(folder / f"image-{i % DISTINCT:05d}.png")
    return folder


def ours(images: Path, out: Path, backbone: str, batch: int, device: str) -> ExtractSummary:
    """``raypipe extract`` with one worker, into a fresh store."""
    cfg = ExtractConfig(
        data_dir=images,
        output_dir=out,
        backbone=backbone,
        weights="random:0",
        batch_size=batch,
        workers=1,
        device=device,  # type: ignore[arg-type]
    )
    with open_runner(LaunchConfig()) as runner:
        return extract(cfg, runner)


def bare_child(images: Path, log: Path, backbone: str, batch: int, device: str) -> None:
    """The bare loop, as a process: the model alone on batches decoded beforehand, until killed.

    Warms up, stops itself, and from then on writes the time of each batch's end.
    """
    spec = resolve(backbone)
    model = load(spec, weights="random:0", device=device)
    decoded = np.stack([spec.preprocess.host(read_image(p).pixels) for p in list_images(images)])
    batches = [torch.from_numpy(decoded[i : i + batch]) for i in range(0, len(decoded), batch)]
    model.forward(batches[0])
    os.kill(os.getpid(), signal.SIGSTOP)
    with log.open("w") as file:
        for pixels in itertools.cycle(batches):
            model.forward(pixels)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            file.write(f"{time.monotonic()} {len(pixels)}\n")
            file.flush()


def paired(images: Path, root: Path, backbone: str, batch: int, device: str) -> tuple[float, float]:
    """Images/s of (ours, bare): the bare loop runs before and after ours, and stands still meanwhile."""
    log, out = root / "bare.log", root / "store"
    shutil.rmtree(out, ignore_errors=True)
    args = [str(images), str(log), backbone, str(batch), device]
    child = subprocess.Popen([sys.executable, __file__, "--bare-child", *args])
    while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
        if child.poll() is not None:
            sys.exit("the bare loop ended before it began: see above")
        time.sleep(0.2)
    try:
        turns = [_turn(child)]
        summary = ours(images, out, backbone, batch, device)
        turns.append(_turn(child))
    finally:  # halted, it would outlive us
        child.kill()
        child.wait()
    ends = [line.split() for line in log.read_text().splitlines()]
    last = float(ends[-1][0])
    bare_s = sum(min(end, last) - begin for begin, end in turns if begin < last)
    return summary.rate, sum(int(n) for _, n in ends) / bare_s


def _turn(child: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Let the bare loop run for a while; from when to when."""
    began = time.monotonic()
    child.send_signal(signal.SIGCONT)
    time.sleep(TURN_S)
    child.send_signal(signal.SIGSTOP)
    return began, time.monotonic()


def peak_anon_mib(images: Path, out: Path, device: str) -> float:
    """Largest RssAnon of the extraction worker, MiB."""
    watch = _Watch(WORKER)
    with watch:
        ours(images, out, "resnet18", 16, device)
    return watch.peak_bytes / 2**20


class _Watch:
    """Samples RssAnon of this process's descendants of one name while the block runs."""

    def __init__(self, name: str) -> None:
        self._name, self._stop = name, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self.peak_bytes:
            sys.exit(f"no process named {self._name} was seen: the figure would be empty")

    def _sample(self) -> None:
        pids: list[int] = []
        looked = 0.0
        while not self._stop.wait(0.005):
            if time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                below = psutil.Process().children(recursive=True)
                pids = [p.pid for p in below if _titled(p, self._name)]
            for pid in pids:
                try:
                    self.peak_bytes = max(self.peak_bytes, anon_bytes(pid))
                except ProcessLookupError:
                    continue


def _titled(process: psutil.Process, name: str) -> bool:
    try:
        return any(part.startswith(name) for part in process.cmdline()[:1])
    except psutil.Error:
        return False


def main() -> None:
    if sys.argv[1:2] == ["--bare-child"]:
        images, log, backbone, batch, device = sys.argv[2:]
        bare_child(Path(images), Path(log), backbone, int(batch), device)
        return
    args = parser(__doc__)
    args.add_argument("--images", type=int, default=48, help="images a round of the full model")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--batch", type=int, default=8)
    args.add_argument("--backbone", default="dinov2_q")
    args.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = args.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        images_dir = make_images(root / "images", options.images, 425)
        rounds = []
        for _ in range(options.rounds):
            model = (options.backbone, options.batch, options.device)
            rounds.append(paired(images_dir, root, *model))
            say(f"ours {rounds[-1][0]:.4g}, bare {rounds[-1][1]:.4g} images/s")
        metrics: dict[str, object] = {
            "ours_images_per_s": median([o for o, _ in rounds]),
            "bare_images_per_s": median([b for _, b in rounds]),
            "ratio_to_bare": median([o / b for o, b in rounds]),
            "ratios": [o / b for o, b in rounds],
            "backbone": options.backbone,
            "batch": options.batch,
        }
        for n in (200, 2000):
            folder = make_images(root / f"images-{n}", n, 224)
            metrics[f"peak_anon_mib_{n}"] = peak_anon_mib(folder, root / f"out-{n}", options.device)
            say(f"peak of the worker over {n} images: {metrics[f'peak_anon_mib_{n}']:.0f} MiB")
    emit("extract", metrics, options.json)


if __name__ == "__main__":
    main()
