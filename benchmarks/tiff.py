"""Reading TIFF stacks: frames and crops a second, memory held, and the time to open many pages.

Ours (`raypipe.load_tiff_stack`) against tifffile: ``imread`` of the whole, and its pages one by one
off an open file. Each turn is a process of its own, which reads the same file twice and counts the
second time; anonymous memory is polled every millisecond, over what the process held before it
opened the file. Keys, for plain, deflate and lzw: NAME_frames_per_s, NAME_frames_to_pages (ours to
tifffile's page by page), NAME_crops_per_s (256x256 at random places), NAME_mib, NAME_imread_mib, and
page_mib; open_even_ms and open_deflate_ms for 20,000 pages, each with _tifffile_ms.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import emit, parser, say

PAGE = (1024, 1024)
KINDS = {
    "plain": {},
    "deflate": {"compression": "deflate", "predictor": True},
    "lzw": {"compression": "lzw", "tile": (256, 256)},
}


def main() -> None:
    """Make the files, run the turns, print the line."""
    options = parser(__doc__)
    options.add_argument("--pages", type=int, default=100, help="pages of 2 MiB a stack")
    options.add_argument("--many", type=int, default=20_000, help="pages of the stacks opened")
    options.add_argument("--turn", nargs=2, help="(a process of the benchmark's own)")
    args = options.parse_args()
    if args.turn:
        print(json.dumps(turn(*args.turn)))
        return
    with tempfile.TemporaryDirectory() as folder:
        metrics = {**stacks(Path(folder), args.pages), **openings(Path(folder), args.many)}
    emit("tiff", {**metrics, "page_mib": PAGE[0] * PAGE[1] * 2 / 2**20}, args.json)


def stacks(folder: Path, n: int) -> dict[str, float]:
    """Frames, crops and memory of each kind of file."""
    import tifffile

    rng, metrics = np.random.default_rng(0), {}
    path = folder / "stack.tif"
    for kind, options in KINDS.items():
        page = (rng.integers(-9, 10, PAGE).cumsum(axis=1) + 20_000).astype(np.uint16)
        tifffile.imwrite(path, np.stack([np.roll(page, k, axis=0) for k in range(n)]), **options)
        found = {how: run(how, path) for how in ("frames", "crops", "pages", "imread")}
        say(f"{kind}: {found}")
        metrics |= {
            f"{kind}_frames_per_s": round(found["frames"]["rate"], 1),
            f"{kind}_frames_to_pages": round(found["frames"]["rate"] / found["pages"]["rate"], 2),
            f"{kind}_crops_per_s": round(found["crops"]["rate"]),
            f"{kind}_mib": round(max(found["frames"]["mib"], found["crops"]["mib"]), 2),
            f"{kind}_imread_mib": round(found["imread"]["mib"], 1),
        }
    return metrics


def openings(folder: Path, n: int) -> dict[str, float]:
    """Milliseconds until the shape of ``n`` small pages is known."""
    import tifffile

    pages = np.random.default_rng(0).integers(0, 200, (n, 32, 32)).astype(np.uint16)
    path, metrics = folder / "many.tif", {}
    for name, compression in (("even", None), ("deflate", "deflate")):
        with tifffile.TiffWriter(path) as file:
            for page in pages:
                file.write(page, contiguous=False, metadata=None, compression=compression)
        for how in ("open", "open_tifffile"):
            metrics[f"{how.replace('open', f'open_{name}')}_ms"] = round(run(how, path)["ms"], 1)
    return metrics


def run(how: str, path: Path) -> dict[str, float]:
    """A turn in a fresh process."""
    argv = [sys.executable, __file__, "--turn", how, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def turn(how: str, path: str) -> dict[str, float]:
    """Read ``path`` in one way."""
    import tifffile

    from raypipe.read.tiff import load_tiff_stack, open_tiff

    if how.startswith("open"):
        began = time.perf_counter()
        assert len(open_tiff(path) if how == "open" else tifffile.TiffFile(path).series[0])
        return {"ms": (time.perf_counter() - began) * 1e3}
    most, done, before = [0], threading.Event(), anonymous()
    watch = threading.Thread(target=poll, args=(most, done))
    watch.start()
    for _ in range(2):
        read: Callable[[], int] = {
            "frames": lambda: sum(frame[0, 0] > 0 for frame in load_tiff_stack(path)),
            "crops": lambda: crops(open_tiff(path)),
            "pages": lambda: sum(
                page.asarray()[0, 0] > 0 for page in tifffile.TiffFile(path).pages
            ),
            "imread": lambda: len(tifffile.imread(path)),
        }[how]
        began = time.perf_counter()
        n = read()
        took = time.perf_counter() - began
    done.set()
    watch.join()
    return {"rate": float(n / took), "mib": (most[0] - before) / 2**20}


def crops(stack: object, n: int = 400) -> int:
    """``n`` crops of 256x256 at random."""
    rng = np.random.default_rng(1)
    for _ in range(n):
        top, left = rng.integers(0, PAGE[0] - 256, 2).tolist()
        frame = int(rng.integers(stack.shape[0]))
        stack.read(frame, slice(top, top + 256), slice(left, left + 256))
    return n


def poll(most: list[int], done: threading.Event) -> None:
    """The highest anonymous memory until ``done``."""
    while not done.wait(0.001):
        most[0] = max(most[0], anonymous())


def anonymous() -> int:
    """RssAnon, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise OSError("no RssAnon in /proc/self/status; run this on Linux")


if __name__ == "__main__":
    main()
