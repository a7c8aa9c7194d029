"""A stack as a handle: small, the same in other processes and threads; what reading it holds."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from tiff_kit import KINDS, spaced, values

from raypipe.memory.guard import relieve
from raypipe.read.tiff import load_tiff_stack, open_tiff
from raypipe.read.tiff.kept import kept
from raypipe.read.tiff.opened import opened

_CHILD = """
import pickle, sys
stack = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps(stack[-1, 3:20, 5:]))
"""


@pytest.mark.parametrize("name", ["contiguous", "deflate", "big-endian, tiled", "pages apart"])
def test_a_handle_sent_to_another_process(tmp_path, name):
    path = KINDS[name].write(tmp_path, values())
    stack = load_tiff_stack(path)
    np.asarray(stack)  # that it was read here changes nothing of what is sent
    sent = pickle.dumps(stack)
    assert len(sent) < 2000
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], input=sent, capture_output=True, check=True
    )
    np.testing.assert_array_equal(pickle.loads(done.stdout), values()[-1, 3:20, 5:])


@pytest.mark.parametrize("name", ["contiguous", "deflate", "LZW with predictor", "tiled volume"])
def test_ten_readers_in_threads(tmp_path, name):
    expected = values((30, 64, 80))
    stack = open_tiff(KINDS[name].write(tmp_path, expected))

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            frame, top, left = rng.integers(0, (30, 40, 50))
            crop = stack.read(frame, slice(top, top + 20), slice(left, left + 30))
            if not (crop == expected[frame, top : top + 20, left : left + 30]).all():
                return False
        return True

    with ThreadPoolExecutor(10) as threads:
        assert all(threads.map(read, range(10)))


def test_one_open_file_a_process(tmp_path):
    path = KINDS["deflate"].write(tmp_path, values())
    copies = [pickle.loads(pickle.dumps(open_tiff(path))) for _ in range(5)]
    for stack in copies:
        stack.read(1, slice(3, 5))
    assert len({opened(stack.parts[0]) for stack in copies}) == 1
    now = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert now.count(str(path)) == 1


def test_a_fork_reads_on(tmp_path):
    stack = open_tiff(KINDS["deflate"].write(tmp_path, values()))
    stack.read(0, slice(0, 3))
    pid = os.fork()
    if pid == 0:
        same = (stack.read(2, slice(1, 4)) == values()[2, 1:4]).all()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "tile": (128, 128)}])
def test_a_crop_reads_little_of_a_large_page(tmp_path, options):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 60000, (256, 16384)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image, **options)
    stack = open_tiff(tmp_path / "a.tif")
    stack.read(0, slice(0, 1), slice(0, 1))
    before = bytes_read()
    crop = stack.read(0, slice(100, 200), slice(1000, 1100))
    took = bytes_read() - before
    np.testing.assert_array_equal(crop, image[100:200, 1000:1100])
    assert took < image.nbytes / 30  # four tiles of 256, or 100 rows of 200 bytes


def test_neighbouring_crops_decode_a_strip_once(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", values((64, 64)), compression="deflate", rowsperstrip=16)
    stack, decoded = open_tiff(tmp_path / "a.tif"), []
    stack.read(0, slice(0, 1))
    decoder = opened(stack.parts[0])._decoder
    function = decoder.function
    monkeypatch.setitem(
        decoder.__dict__,
        "function",
        lambda data, at, **more: (decoded.append(at), function(data, at, **more))[1],
    )
    for left in range(0, 64, 16):
        stack.read(0, slice(20, 40), slice(left, left + 16))
    assert decoded == [1, 2]
    assert 0 < kept.held_bytes <= 64 * 64 * 2
    relieve()
    assert kept.held_bytes == 0


@pytest.mark.parametrize("compression", ["deflate", "lzw", "zstd"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("predictor", [False, True])
def test_whole_strips_are_decompressed_where_they_belong(
    tmp_path, monkeypatch, compression, order, predictor
):
    expected = values((3, 40, 50))
    options = {"compression": compression, "byteorder": order, "predictor": predictor}
    tifffile.imwrite(
        tmp_path / "a.tif", expected, rowsperstrip=16, photometric="minisblack", **options
    )
    stack = open_tiff(tmp_path / "a.tif")
    stack.read(0, slice(0, 1))
    decoder = opened(stack.parts[0])._decoder
    monkeypatch.setitem(decoder.__dict__, "function", None)  # tifffile's, which copies
    np.testing.assert_array_equal(stack.read(1), expected[1])
    np.testing.assert_array_equal(stack.read(2, slice(16, 40)), expected[2, 16:])


def test_many_plain_pages_are_not_walked(tmp_path):
    expected = values((3000, 4, 5))
    path = spaced(tmp_path, expected)
    before = int(Path("/proc/self/io").read_text().split()[5])  # read calls
    stack = load_tiff_stack(path)
    calls = int(Path("/proc/self/io").read_text().split()[5]) - before
    assert calls < 100
    assert len(pickle.dumps(stack)) < 2000
    np.testing.assert_array_equal(stack[::301, 1], expected[::301, 1])


_HELD = """
import sys
import numpy as np
from raypipe.read.tiff import load_tiff_stack
from raypipe.memory.guard import relieve

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10

def walk(stack, rows, cols):
    most = total = 0
    for frame in range(len(stack)):
        part = stack[frame, rows, cols]
        most, total = max(most, anonymous()), total + int(part.sum())
        del part
    return most, total

stack = load_tiff_stack(sys.argv[1])
crop, whole = (slice(3, 20), slice(5, 40)), (slice(None), slice(None))
stack[0, :1]
between = relieve if sys.argv[2] == "first" else lambda: None
if sys.argv[2] == "again":
    walk(stack, *crop)
    walk(stack, *whole)
between()
before = anonymous()
crops, _ = walk(stack, *crop)
between()
frames, total = walk(stack, *whole)
all_of_it = np.asarray(stack)
print(crops - before, frames - before, anonymous() - before, stack[0].nbytes)
assert total == all_of_it.sum()
"""


def held(path: Path, when: str) -> tuple[int, ...]:
    """Growth of a child's anonymous memory: crops, then frames, then all; and a page's bytes."""
    argv = [sys.executable, "-c", _HELD, str(path), when]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


@pytest.mark.parametrize("kind", ["plain", "strip", "tiles"])
def test_reading_holds_less_than_two_pages(tmp_path, kind):
    options = {"plain": {}, "strip": {"compression": "deflate", "rowsperstrip": 512}}.get(
        kind, {"compression": "lzw", "tile": (128, 128)}
    )
    tifffile.imwrite(tmp_path / "a.tif", values((10, 512, 512)), **options)
    crops, frames, all_of_it, page = held(tmp_path / "a.tif", "first")
    assert crops < 2 * page
    assert frames < 2 * page
    assert all_of_it > 9 * page  # it can be seen when a stack is held


def test_a_real_compressed_stack_holds_less_than_two_pages(real_data):
    path = real_data / "nuclei" / "img3d.tif"
    if not path.is_file():
        pytest.skip(f"the real stack is not at {path}; set RAYPIPE_REAL_DATA")
    # A page has 7 KB: what the interpreter itself takes at first, some 20 KB, was taken before.
    crops, frames, _, page = held(path, "again")
    assert crops < 2 * page
    assert frames < 2 * page
    # So small a stack fits into what malloc holds anyway: of arrays, count every byte.
    kept.give_back()
    tracemalloc.start()
    try:
        stack = load_tiff_stack(path)
        for frame in range(len(stack)):
            whole = stack[frame]
            assert page <= array_bytes() < 2 * page
            del whole
            crop = stack[frame, 3:20, 5:40]
            assert crop.nbytes <= array_bytes() < 2 * page
            del crop
    finally:
        tracemalloc.stop()


def array_bytes() -> int:
    """Bytes of NumPy's arrays made since tracemalloc began."""
    arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    found = tracemalloc.take_snapshot().filter_traces([arrays])
    return sum(trace.size for trace in found.traces)
