"""The loader's pure decision, and arrays in files: any dtype, shape and order comes back as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from raypipe import MemoryConfig, MemoryMappedArray
from raypipe.errors import InputError, MemoryBudgetExceeded, MissingInput, NoSpace, StoreCorrupt
from raypipe.fmri.loader.decide import place, room_bytes, series_bytes

GIB = 1 << 30


@given(
    array=st.integers(0, 4 * GIB),
    extra=st.integers(0, GIB),
    blocks=st.integers(0, GIB),
    room=st.integers(0, 6 * GIB),
    threshold=st.floats(0, 4),
    use=st.booleans(),
)
def test_a_placement_fits_and_follows_the_threshold(array, extra, blocks, room, threshold, use):
    config = MemoryConfig(use_memmap=use, memmap_threshold_gb=threshold)
    sizes = {"array_bytes": array, "in_memory_bytes": array + extra, "mapped_bytes": blocks}
    large = array >= config.threshold_bytes
    mapped = use and (large or array + extra > room)
    if (blocks if mapped else array + extra) > room:
        with pytest.raises(MemoryBudgetExceeded):
            place("x", **sizes, config=config, room=room)
        return
    found = place("x", **sizes, config=config, room=room)
    assert found.mapped == mapped
    assert found.need_bytes <= room
    assert ("mapped" if mapped else "into memory") in found.line("x")


def test_room_is_the_smaller_of_budget_and_node() -> None:
    config = MemoryConfig(max_memory_per_process_gb=4, available_memory_buffer=0.25)

    def room(available: int, charge: int) -> int:
        return room_bytes(
            config, limit_bytes=16 * GIB, available_bytes=available, charge_bytes=charge
        )

    assert room(16 * GIB, GIB) == 3 * GIB  # the budget less what is held
    assert room(5 * GIB, 0) == GIB  # the node less its buffer of 4 GiB
    assert room(2 * GIB, 0) == 0


def test_a_series_in_memory_grows_with_its_values_and_mapped_with_its_voxels() -> None:
    array, memory, mapped = series_bytes(1000, [300, 300], 2)
    assert array == 4 * 1000 * 600
    assert memory > array
    assert series_bytes(1000, [300] * 20, 2)[2] == mapped  # more runs, no more memory
    assert series_bytes(2000, [300, 300], 2)[1] > memory


ANY = arrays.arrays(
    st.sampled_from([np.dtype(d) for d in ("<i2", ">i2", "<f4", "<f8", "u1", "?", "<c8")]),
    arrays.array_shapes(min_dims=0, max_dims=4, max_side=5),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(data=ANY, fortran=st.booleans())
def test_a_mapped_array_is_the_array(tmp_path: Path, data: np.ndarray, fortran: bool) -> None:
    given_in = np.asarray(data, order="F" if fortran else "C")
    with MemoryMappedArray.of(tmp_path / "one.npy", given_in) as made:
        np.testing.assert_array_equal(made.array, data)
        assert made.array.dtype == data.dtype
        assert (made.shape, made.nbytes, made.size_gb) == (
            data.shape,
            data.nbytes,
            data.nbytes / GIB,
        )
        np.testing.assert_array_equal(np.load(made.path), data)
        np.testing.assert_array_equal(np.asarray(made), data)
    assert not list(tmp_path.iterdir())


def test_what_is_stored_is_on_the_disk_and_only_the_owner_removes(tmp_path: Path) -> None:
    made = MemoryMappedArray.create(tmp_path / "one.npy", (3, 4), np.float32, order="F")
    assert made.array.flags.f_contiguous
    assert (tmp_path / "one.npy").stat().st_blocks * 512 >= 48
    made.array[1] = 5
    made.flush()
    other = MemoryMappedArray.open(made.path)
    assert other.array[1].tolist() == [5] * 4
    with pytest.raises(ValueError, match="read-only"):
        other.array[0] = 1
    other.cleanup()
    assert made.path.exists()
    view = made.array[1]
    made.close()
    with pytest.raises(InputError, match="is closed; open it again"):
        made.array  # noqa: B018
    made.cleanup()
    made.cleanup()
    assert not made.path.exists()
    assert view.tolist() == [5] * 4
    with pytest.raises(MissingInput, match="its owner removed it"):
        MemoryMappedArray.open(made.path)


def test_what_is_no_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be mapped"):
        MemoryMappedArray.of(tmp_path / "no.npy", np.empty((0, 3)))
    with pytest.raises(InputError, match="cannot be mapped"):
        MemoryMappedArray.of(tmp_path / "no.npy", np.array([{}]))
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(StoreCorrupt, match="write it again"):
        MemoryMappedArray.open(tmp_path / "torn.npy")
    with pytest.raises(FileExistsError):
        MemoryMappedArray.create(tmp_path / "torn.npy", (2,), "f4")


def test_a_full_disk_leaves_no_file(small_disk: Path) -> None:
    for make in (
        lambda path: MemoryMappedArray.create(path, (1 << 18,), "f8"),
        lambda path: MemoryMappedArray.of(path, np.zeros(1 << 18)),
    ):
        with pytest.raises(NoSpace, match="are free"):
            make(small_disk / "big.npy")
        assert not list(small_disk.iterdir())
