"""A file that is cut short in the middle of reading is an error, never the end of the process; and a
SIGBUS that is not ours ends it as it would without us.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from raypipe.stream import guarded

GUARDED = guarded._handler() is not None
needs_guard = pytest.mark.skipif(not GUARDED, reason="no guard on this system")

# Reads without a pause while a thread cuts the file, at random moments and whole pages, and writes
# the rest again: whenever the file is as long as it should be, it holds ones.
CHILD = """
    import os, sys, threading, time
    import numpy as np
    from raypipe.errors import StoreCorrupt
    from raypipe.stream import ArraySource, Gatherer, Join, guarded, mapped

    cuts, rng, faults = int(sys.argv[4]), np.random.default_rng(0), []
    check = sys.argv[3] == "guarded"  # the kernel pins pages that it copies, and zeroes them
    if not check:
        mapped.guard = lambda start, n_bytes: None
    cover = guarded._Handler._cover
    guarded._Handler._cover = lambda self, at: faults.append(at) or cover(self, at)

    def cut(path, stop):
        times, whole = np.random.default_rng(1), path.read_bytes()
        with open(path, "r+b", buffering=0) as file:
            for size in (times.integers(1, len(whole) >> 12, cuts) << 12).tolist():
                time.sleep(times.uniform(0, 0.012))
                file.truncate(size)
                time.sleep(times.uniform(0, 0.002))
                assert os.pwrite(file.fileno(), whole[size:], size) == len(whole) - size
        stop.set()

    def read(source, batch, **more):
        caught, stop = 0, threading.Event()
        Gatherer({"a": source, "b": source}, batch, **more).close()  # imports what it needs
        thread = threading.Thread(target=cut, args=(source.path, stop))
        thread.start()
        while not stop.is_set():
            try:
                with Gatherer({"a": source, "b": source}, batch, threads=2, **more) as gatherer:
                    asked = (rng.integers(0, source.n_rows, batch) for _ in range(10**9))
                    for tensors in gatherer.batches(asked):
                        if check:
                            assert all(tensor.min() == 1 for tensor in tensors.values())
                        if stop.is_set():
                            break
            except StoreCorrupt as error:
                assert "cut short" in str(error), error
                caught += 1
                time.sleep(0.001)
        thread.join()
        return caught

    small, large = map(ArraySource.npy, sys.argv[1:3])
    joined = {"x": Join(("a", "b"))}
    print(
        read(small, 1024),
        read(small, 1024, dtype="float32"),
        read(small, 1024, sort_reads=True, join=joined),
        read(large, 8),
        read(large, 8, dtype="float32"),
        read(large, 8, sort_reads=True),
        read(large, 8, join=joined),
    )
    print(len(faults))
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("way", "cuts"), [pytest.param("guarded", 60, marks=needs_guard), ("kernel", 12)]
)
def test_a_file_cut_in_the_middle_of_a_copy_is_an_error_and_not_a_signal(
    tmp_path: Path, way: str, cuts: int
) -> None:
    files = [tmp_path / "small.npy", tmp_path / "large.npy"]
    for path, row in zip(files, [(768,), (300, 768)], strict=True):
        count = 6_000_000 // (2 * int(np.prod(row)))
        np.save(path, np.ones((count, *row), np.float16))
    child = run(CHILD, *files, way, cuts)
    assert child.returncode == 3, (child.returncode, child.stderr)
    assert child.stderr == ""
    caught, faults = child.stdout.splitlines()
    assert all(int(count) > 0 for count in caught.split()), child.stdout
    assert (int(faults) > 0) == (way == "guarded")


# `outside` is SIGBUS in no guarded map.
CASES = """
    import atexit, ctypes, faulthandler, mmap, os, resource, signal, sys
    import numpy as np
    from raypipe.errors import StoreCorrupt
    from raypipe.stream import ArraySource, guarded

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path, other = sys.argv[1:]
    source = ArraySource.npy(path)

    def outside():
        view = np.memmap(other, np.uint8, "r")
        os.truncate(other, 0)
        return int(view[5000])

    def is_guarded(mapped):
        whole = os.path.getsize(path)
        check = mapped.check
        mapped.check = lambda rows: check(rows) or os.truncate(path, 4096)
        try:
            mapped.take(np.arange(mapped.source.n_rows), np.empty_like(mapped._bytes))
        except StoreCorrupt:
            os.truncate(path, whole)
            return mapped._guard.cut_at is not None
"""
DIES = {
    "nobody was there": "mapped = source.open(); outside()",
    "faulthandler was": "faulthandler.enable(); mapped = source.open(); outside()",
    "the interpreter is at its end": """
        def end():
            assert source.open()._guard is None
            outside()

        atexit.register(end)  # called after what is registered later
        mapped = source.open()
    """,
    "faulthandler came and the next map is guarded": """
        first = source.open()
        faulthandler.enable()
        second = source.open()
        assert is_guarded(second)
        outside()
    """,
    "faulthandler came and the present map is guarded": """
        mapped = source.open()
        faulthandler.enable()
        mapped.take(np.arange(2), np.empty_like(mapped._bytes[:2]))
        assert guarded._handler()._is_present()
        outside()
    """,
    "faulthandler came twice": """
        for _ in range(2):
            first = source.open()
            faulthandler.enable()
            second = source.open()
            faulthandler.disable()
        third = source.open()
        assert is_guarded(third)
        faulthandler.enable()
        fourth = source.open()
        outside()
    """,
    "sent, nobody was there": "mapped = source.open(); os.kill(os.getpid(), signal.SIGBUS)",
    "sent, faulthandler was": """
        faulthandler.enable()
        mapped = source.open()
        os.kill(os.getpid(), signal.SIGBUS)
    """,
    "the view of the user": """
        mapped = source.open()
        view = mapped.array
        os.truncate(path, 4096)
        print(view[-1], file=sys.stderr)
    """,
    "a map where a guarded one was": """
        mapped = source.open()
        start, size = mapped._start, len(mapped._map)
        assert is_guarded(source.open())
        del mapped
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        fixed = mmap.MAP_SHARED | 16
        at = libc.mmap(start, size, mmap.PROT_READ, fixed, os.open(other, os.O_RDONLY), 0)
        assert at == start
        os.truncate(other, 0)
        print(ctypes.string_at(start, 1), file=sys.stderr)
    """,
}


@needs_guard
@pytest.mark.parametrize("case", DIES)
def test_sigbus_that_is_not_ours_goes_to_whoever_was_there(case: str, tmp_path: Path) -> None:
    path, other = tmp_path / "a.npy", tmp_path / "other"
    np.save(path, np.ones((300, 768), np.float16))
    other.write_bytes(bytes(1 << 20))
    child = run(CASES + textwrap.indent(textwrap.dedent(DIES[case]), " " * 4), path, other)
    assert child.returncode == -signal.SIGBUS, (child.returncode, child.stderr)
    if "faulthandler" in case:
        assert child.stderr.count("Fatal Python error: Bus error") == 1, child.stderr
        assert 'File "<string>"' in child.stderr
    else:
        assert child.stderr == ""


@needs_guard
def test_a_handler_of_the_program_is_called_when_it_is_sent(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((300, 768), np.float16))
    child = run(
        CASES
        + """
    signal.signal(signal.SIGBUS, lambda *given: print("called"))
    mapped = source.open()
    os.kill(os.getpid(), signal.SIGBUS)
    os.kill(os.getpid(), signal.SIGBUS)
    assert is_guarded(source.open())
    """,
        tmp_path / "a.npy",
        tmp_path,
    )
    assert (child.returncode, child.stdout) == (0, "called\ncalled\n"), child.stderr


@needs_guard
def test_a_forked_process_is_guarded_as_well(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((300, 768), np.float16))
    child = run(
        CASES
        + """
    mapped = source.open()
    if (pid := os.fork()) == 0:
        os._exit(5 if is_guarded(mapped) else 6)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert mapped._guard.cut_at is None
    mapped.take(np.arange(2), np.empty_like(mapped._bytes[:2]))
    """,
        tmp_path / "a.npy",
        tmp_path,
    )
    assert child.returncode == 0, child.stderr


def run(script: str, *given: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, given)],
        capture_output=True,
        text=True,
        timeout=200,
    )
