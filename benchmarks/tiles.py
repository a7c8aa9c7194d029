"""Tiled inference: error against the whole image, peak memory by image size, throughput.

Contenders, each with the same U-Net (random weights, eval mode, float32): tiles without overlap, tiles
blended linearly over 32 pixels, MONAI's sliding_window_inference (overlap 0.25 and 0.5, Gaussian), and
`raypipe.process_large_image`'s engine with a measured halo.

max_error, monai_max_error (the better of its two), no_overlap_max_error, linear32_max_error: largest
absolute difference from the whole image's result, whose standard deviation is output_std.
peak_mib_2k, _8k, _32k: largest RssAnon of a process that imports, measures and infers one image, a sparse
.npy of that many pixels a side, into a BigTIFF on the disk; a U-Net of width 4 keeps 32k within minutes.
flat_percent: from the smallest to the largest of them; base_mib: after the imports.
mpx_to_bare: our megapixels/s, reading the .npy and writing a .npy with all syncs, over those of the bare
model on whole windows from memory, of which every pixel counts, the halo too. mpx_to_same_windows: the
same, with only the pixels that tiles keep counted on both sides. mpx_to_monai: over MONAI's faster overlap,
with windows of the same size, which stays in memory and runs after ours, in an interpreter of its own.
The three sizes come last, take 10 minutes or more, and need no quiet machine; --skip-memory leaves them
out. MONAI comes with the bench extra, or by BENCH_PYTHON_MONAI.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import emit, median, parser, say
from torch import nn

from raypipe.memory import ProcessProbe
from raypipe.runner import LocalRunner
from raypipe.segment.model import UNetConfig, build_model
from raypipe.tile import ArraySource, Field, TileConfig, TileGrid, infer, measure
from raypipe.tile.blend import contribution
from raypipe.tile.source import read_window

SIZES = {"2k": 2048, "8k": 8192, "32k": 32768}
MIB = 2**20
ERROR = {"side": 1000, "tile": 256, "width": 16, "depth": 4}
SPEED = {"side": 4096, "tile": 2048, "width": 8, "depth": 3}
MEMORY = {"tile": 1024, "width": 4, "depth": 3}


def unet(width: int, depth: int) -> nn.Module:
    """A U-Net in eval mode whose batch norms have seen something."""
    model = build_model(UNetConfig(width=width, depth=depth), seed=0)
    rng = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1, generator=rng)
            part.running_var.uniform_(0.5, 2.0, generator=rng)
    return model.eval()


def noise(side: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((side, side)).astype(np.float32)


def whole(model: nn.Module, image: np.ndarray, align: int) -> np.ndarray:
    """(rows, cols): what the reflected image gives in one pass."""
    padded = np.pad(image, [(0, -n % align) for n in image.shape], mode="reflect")
    with torch.inference_mode():
        out = model(torch.from_numpy(padded)[None, None])[0, 0].numpy()
    return out[: image.shape[0], : image.shape[1]]


def by_tiles(model: nn.Module, image: np.ndarray, grid: TileGrid, blend: bool) -> np.ndarray:
    """A plain loop over the tiles; with or without linear blending."""
    source, out = ArraySource(image, "YX"), np.zeros_like(image)
    everywhere = tuple(slice(0, n) for n in image.shape)
    for tile in grid:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.ascontiguousarray(read_window(source, 0, tile.read)))
            window = model(pixels[None])[0, 0].numpy()
        if blend:
            to, of, weight = contribution(grid, tile, everywhere, "linear")
            out[to] += weight * window[of]
        else:
            out[tile.keep] = window[tile.inner]
    return out


def ours(model: nn.Module, source: object, out: Path, field: Field, tile: int) -> float:
    """Seconds from the call to the finished file, model already measured."""
    for old in out.parent.glob(out.name + "*"):
        old.unlink()
    cfg = TileConfig(chunk_size=tile, halo=field.halo, align=field.align, device="cpu")
    began = time.monotonic()
    infer(source, model, out, cfg, LocalRunner(), keep_frames=False)
    return time.monotonic() - began


def errors(folder: Path, peer: Peer) -> dict[str, float]:
    """Every contender's largest difference from the whole image."""
    model, image = unet(ERROR["width"], ERROR["depth"]), noise(ERROR["side"])
    field = measure(model, 1)
    wanted, shape, tile = whole(model, image, field.align[0]), image.shape, ERROR["tile"]
    say(f"U-Net {ERROR}: radius {field.radius}, align {field.align}")
    ours(model, ArraySource(image, "YX"), folder / "ours.npy", field, tile)
    bare = TileGrid.of(shape, (tile,) * 2, (0, 0), field.align)
    blended = TileGrid.of(shape, (tile,) * 2, (32, 32), field.align)
    found = {
        "max_error": np.load(folder / "ours.npy"),
        "no_overlap_max_error": by_tiles(model, image, bare, False),
        "linear32_max_error": by_tiles(model, image, blended, True),
    }
    figures = {name: float(np.abs(got - wanted).max()) for name, got in found.items()}
    window = min(tile + 2 * field.halo[0], shape[0])
    figures |= peer.errors(ERROR, window, wanted, folder)
    return figures | {"output_std": float(wanted.std()), "radius": float(max(field.radius))}


def speed(of: dict[str, int], folder: Path, peer: Peer, rounds: int) -> dict[str, float]:
    """Megapixels a second, in turns, and ratios of one round."""
    side, tile = of["side"], of["tile"]
    model = unet(of["width"], of["depth"])
    field = measure(model, 1)
    np.save(folder / "in.npy", noise(side))
    image = np.load(folder / "in.npy", mmap_mode="r")
    grid = TileGrid.of(image.shape, (tile,) * 2, field.halo, field.align)
    source, window = ArraySource(image, "YX"), grid.window[0]
    batches = [torch.from_numpy(read_window(source, 0, t.read).copy())[None] for t in grid]

    def bare() -> float:
        began = time.monotonic()
        with torch.inference_mode():
            for batch in batches:
                model(batch)
        return time.monotonic() - began

    bare()
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for turn in range(rounds):
        turns: list[tuple[str, Callable[[], float]]] = [
            ("ours", lambda: ours(model, source, folder / "out.npy", field, tile)),
            ("bare", bare),
        ]
        for name, run in turns if turn % 2 == 0 else turns[::-1]:
            seconds[name].append(run())
    for name, took in peer.seconds(of, window, rounds, folder).items():
        seconds[name] = took
    mpx = {name: side * side / 1e6 / median(took) for name, took in seconds.items()}
    strict = len(grid) * window * window / (side * side)
    figures = {f"mpx_s_{name}": value for name, value in mpx.items()}
    monai = [value for name, value in mpx.items() if name.startswith("monai")]
    return figures | {
        "mpx_to_bare": mpx["ours"] / (mpx["bare"] * strict),
        "mpx_to_same_windows": mpx["ours"] / mpx["bare"],
        **({"mpx_to_monai": mpx["ours"] / max(monai)} if monai else {}),
    }


class Peer:
    """MONAI, by the interpreter that has it; what it cannot do is said."""

    def __init__(self) -> None:
        self.python = os.environ.get("BENCH_PYTHON_MONAI", sys.executable)
        done = self._run(["--child", "version"])
        self.version = done or "missing"

    def _run(self, args: list[str]) -> str:
        argv = [self.python, "-W", "ignore", __file__, *args]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            say(f"MISSING peer monai: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            return ""
        return done.stdout.rpartition("@@")[2].strip()

    def errors(self, of: dict[str, int], window: int, wanted: np.ndarray, folder: Path) -> dict:
        """Of both overlaps, and the better one."""
        np.save(folder / "wanted.npy", wanted)
        told = self._run(["--child", "errors", json.dumps([of, window, str(folder)])])
        found = json.loads(told) if told else {}
        return found | ({"monai_max_error": min(found.values())} if found else {})

    def seconds(self, of: dict[str, int], window: int, rounds: int, folder: Path) -> dict:
        """By overlap, a list of rounds."""
        told = self._run(["--child", "seconds", json.dumps([of, window, rounds, str(folder)])])
        return json.loads(told) if told else {}


def monai_child(what: str, spec: str) -> None:
    """Runs in MONAI's interpreter; prints one JSON object after @@."""
    import monai
    from monai.inferers import sliding_window_inference

    if what == "version":
        print("@@" + monai.__version__)
        return
    of, window, *rest = json.loads(spec)
    model, folder = unet(of["width"], of["depth"]), Path(rest[-1])
    image = torch.from_numpy(noise(of["side"]))[None, None]

    def run(overlap: float) -> np.ndarray:
        with torch.inference_mode():
            out = sliding_window_inference(
                image, (window, window), 1, model, overlap=overlap, mode="gaussian"
            )
        return out[0, 0].numpy()

    if what == "errors":
        wanted = np.load(folder / "wanted.npy")
        found = {
            f"monai{int(100 * k)}_max_error": float(np.abs(run(k) - wanted).max())
            for k in (0.25, 0.5)
        }
        print("@@" + json.dumps(found))
        return
    took: dict[str, list[float]] = {"monai25": [], "monai50": []}
    for _ in range(rest[0]):
        for name, overlap in (("monai25", 0.25), ("monai50", 0.5)):
            began = time.monotonic()
            run(overlap)
            took[name].append(time.monotonic() - began)
    print("@@" + json.dumps(took))


def memory_child(side: int, folder: Path) -> None:
    """One image of ``side``, from a sparse .npy into a BigTIFF."""
    from raypipe import process_large_image

    print("imported", flush=True)
    sys.stdin.readline()
    model = unet(MEMORY["width"], MEMORY["depth"])
    process_large_image(folder / "in.npy", model, MEMORY["tile"], folder / "out.tif", device="cpu")


def sparse(path: Path, side: int) -> None:
    """Zeros that take no room, with a header."""
    shape = (side, side)
    with path.open("wb") as file:
        fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, fields)
        file.truncate(file.tell() + 4 * side * side)


def peak(side: int, folder: Path) -> tuple[float, float, float]:
    """(largest RssAnon, that after the imports, seconds), of a child; looked at every 5 ms."""
    sparse(folder / "in.npy", side)
    argv = [sys.executable, __file__, "--child", "memory", json.dumps([side, str(folder)])]
    began = time.monotonic()
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    child.stdout.readline()
    probe = ProcessProbe(child.pid)
    base = most = probe.read().anon_bytes
    child.stdin.write("go\n")
    child.stdin.flush()
    while child.poll() is None:
        try:
            most = max(most, probe.read().anon_bytes)
        except ProcessLookupError:
            break
        time.sleep(0.005)
    probe.close()
    if child.wait():
        raise SystemExit(f"the child for {side} pixels ended with code {child.returncode}")
    took = time.monotonic() - began
    _check_zero_image(folder, side)
    for path in folder.glob("*"):
        path.unlink()
    return most / MIB, base / MIB, took


def _check_zero_image(folder: Path, side: int) -> None:
    """Of zeros, a radius off every border, the result repeats with the strides: a small image has it."""
    from raypipe import load_tiff_stack

    model = unet(MEMORY["width"], MEMORY["depth"])
    middle = whole(model, np.zeros((512, 512), np.float32), 4)[256:320, 256:320]
    out = load_tiff_stack(folder / "out.tif")
    shown = np.asarray(out[side // 2 : side // 2 + 64, side // 4 : side // 4 + 64])
    if not np.allclose(shown, middle, rtol=0, atol=1e-5):
        raise SystemExit(f"the streamed output of {side} pixels is not the whole image's")


def memory(folder: Path, sizes: list[str]) -> dict[str, float]:
    """Peaks by size."""
    figures, peaks = {}, []
    for name in sizes:
        most, base, took = peak(SIZES[name], folder)
        say(f"{name}: peak {most:.0f} MiB, {base:.0f} after imports, {took:.0f} s")
        peaks.append(most)
        figures |= {f"peak_mib_{name}": most, f"seconds_{name}": took, "base_mib": base}
    return figures | {"flat_percent": 100 * (max(peaks) / min(peaks) - 1)}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    made.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    made.add_argument("--side", type=int, default=SPEED["side"], help="of the image timed")
    made.add_argument("--tile", type=int, default=SPEED["tile"], help="of the tiles timed")
    made.add_argument("--skip-errors", action="store_true")
    made.add_argument("--skip-memory", action="store_true")
    made.add_argument("--skip-speed", action="store_true")
    made.add_argument("--folder", type=Path, help="on a disk with 5 GB to spare")
    made.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.child:
        child(args.child)
        return
    torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp(prefix="tiles-", dir=args.folder))
    try:
        peer = Peer()
        figures: dict[str, object] = {"monai": peer.version}
        if not args.skip_errors:
            figures |= errors(folder, peer)
        for path in folder.glob("*"):
            path.unlink()
        if not args.skip_speed:
            figures |= speed(
                SPEED | {"side": args.side, "tile": args.tile}, folder, peer, args.rounds
            )
        for path in folder.glob("*"):
            path.unlink()
        if not args.skip_memory:
            figures |= memory(folder, args.sizes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    emit("tiles", figures, args.json)


def child(args: list[str]) -> None:
    what, spec = args[0], args[1] if len(args) > 1 else ""
    if what == "memory":
        side, folder = json.loads(spec)
        memory_child(side, Path(folder))
    else:
        monai_child(what, spec)


if __name__ == "__main__":
    main()
