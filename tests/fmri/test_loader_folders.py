"""The loader's temporary files: they go away, also after errors and kills, and a full disk is told."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loader_kit import (
    MAPPING,
    MEMORY,
    assert_close,
    bold,
    by_nilearn,
    mask,
    open_loader,
)

from raypipe import (
    MemoryConfig,
    MemoryEfficientContext,
)
from raypipe.errors import (
    InputError,
    NoSpace,
)


def test_with_no_cache_nothing_stays(tmp_path: Path) -> None:
    scan = bold(tmp_path)
    for memory in (MEMORY, MAPPING):
        with open_loader(tmp_path, memory, cache=False) as loader:
            assert_close(loader.extract_roi_timeseries_memmap(scan, mask()), by_nilearn(scan, {}))
    assert not (tmp_path / "cache").exists()
    assert not list((tmp_path / "temp").iterdir())


def test_a_context_cleans_up_also_after_an_error(tmp_path: Path) -> None:
    scan = bold(tmp_path)
    context = MemoryEfficientContext(
        None, MAPPING, cache=False, temp_dir=tmp_path / "temp", say=lambda text: None
    )
    with pytest.raises(ZeroDivisionError), context as loader:
        series = loader.extract_roi_timeseries_memmap(scan, mask())
        shared = loader.create_shared_memmap(series)
        assert shared.path.exists()
        raise ZeroDivisionError
    assert not list((tmp_path / "temp").iterdir())
    assert_close(series, by_nilearn(scan, {}))  # what was given out stays readable
    with pytest.raises(InputError, match="cleaned up"):
        loader.extract_roi(scan, mask())
    loader.cleanup()


def test_cleanup_can_be_left_to_the_user(tmp_path: Path) -> None:
    keeping = MemoryConfig(cleanup_temp_files=False, available_memory_buffer=0.0)
    said: list[str] = []
    with open_loader(tmp_path, keeping, say=said.append) as loader:
        made = loader.create_shared_memmap(np.arange(5))
    assert "kept in" in said[-1]
    np.testing.assert_array_equal(np.load(made.path), np.arange(5))
    with open_loader(tmp_path) as loader:  # the next one does not sweep it either
        loader.create_shared_memmap(np.arange(5))
    assert made.path.exists()


def test_a_killed_owners_folder_goes_with_the_next_loader(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal, numpy as np; from raypipe import MemoryEfficientLoader as L;"
        "loader = L(temp_dir=sys.argv[1]); loader.create_shared_memmap(np.zeros(9));"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True)
    assert len(list(tmp_path.glob("raypipe-fmri-*/*.npy"))) == 1
    with (
        open_loader(tmp_path, temp_dir=tmp_path) as first,
        open_loader(tmp_path, temp_dir=tmp_path) as two,
    ):
        first.create_shared_memmap(np.zeros(9))
        two.create_shared_memmap(np.zeros(9))
        assert len(list(tmp_path.glob("raypipe-fmri-*"))) == 2  # of the living
    assert not list(tmp_path.glob("raypipe-fmri-*"))


def test_a_full_disk_is_told_as_one(tmp_path: Path, small_disk: Path) -> None:
    scan = bold(tmp_path)
    with open_loader(tmp_path, MAPPING, temp_dir=small_disk) as loader:
        with pytest.raises(NoSpace, match="bytes"):
            loader.create_shared_memmap(np.zeros(1 << 20))
        (small_disk / "filler").write_bytes(bytes((1 << 20) - (16 << 10)))
        with pytest.raises(NoSpace):
            loader.load_fmri_memmap(scan)
    assert not list(small_disk.glob("raypipe-*"))


def test_a_shared_map_is_a_handle(tmp_path: Path) -> None:
    with open_loader(tmp_path) as loader:
        made = loader.create_shared_memmap(np.zeros((64, 1024)), writable=True)
        handle = pickle.dumps(made)
        assert len(handle) < 1000
        code = (
            "import pickle, sys; one = pickle.loads(bytes.fromhex(sys.argv[1]));"
            "one.array[3] = 7; one.cleanup()"  # not the owner: the file stays
        )
        subprocess.run([sys.executable, "-c", code, handle.hex()], check=True)
        assert made.array[3].min() == 7 == made.array.max()
