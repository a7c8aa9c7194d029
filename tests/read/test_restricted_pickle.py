"""ROI mappings: what numpy writes is read; what an attacker writes never runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy_format

from raypipe.errors import InputError, MissingInput
from raypipe.read import load_roi_mapping

MAPPING = {0: "Unknown", 1: "V1v", 2: "V1d", -3: "größer"}


def write_object(path: Path, pickled: bytes, shape: tuple[int, ...] = ()) -> Path:
    with path.open("wb") as stream:
        header = {"descr": "|O", "fortran_order": False, "shape": shape}
        npy_format.write_array_header_1_0(stream, header)
        stream.write(pickled)
    return path


def boxed(value: object) -> np.ndarray:
    box = np.empty((), dtype=object)
    box[()] = value
    return box


class Call:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def test_what_numpy_saves(tmp_path: Path) -> None:
    path = tmp_path / "m.npy"
    np.save(path, boxed(MAPPING), allow_pickle=True)
    assert load_roi_mapping(path) == MAPPING


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_all_protocols_and_numpy_scalars(tmp_path: Path, protocol: int) -> None:
    entries = {
        np.int64(-(2**40)): np.str_("a"),
        np.uint8(255): "b",
        np.dtype(">i4").type(7): np.str_("größer"),
        3: "",
    }
    path = write_object(tmp_path / "m.npy", pickle.dumps(boxed(entries), protocol))
    loaded = load_roi_mapping(path)
    assert loaded == {int(key): str(value) for key, value in entries.items()}
    assert {type(item) for pair in loaded.items() for item in pair} == {int, str}


def test_names_of_older_numpy(tmp_path: Path) -> None:
    """The real files were written by numpy 1.x, which called its core otherwise."""
    data = pickle.dumps(boxed(MAPPING), 3)
    assert b"numpy._core.multiarray" in data
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert load_roi_mapping(write_object(tmp_path / "m.npy", old)) == MAPPING


def test_code_is_refused_by_name_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    attacks = {
        "posix.system": Call(os.system, f"touch {marker}"),
        "builtins.eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.getattr": Call(getattr, os, "system"),
        "numpy.load": Call(np.load, str(marker), None, True),
        "builtins.bytearray": Call(bytearray, 10),
    }
    for name, attack in attacks.items():
        if name == "builtins.getattr":
            attack = Call(getattr, "", "upper")  # a module itself cannot be pickled
        for value in (attack, {1: attack}, {attack: "x"}):
            try:
                pickled = pickle.dumps(boxed(value), 4)
            except TypeError:
                continue
            with pytest.raises(InputError, match="not admitted") as caught:
                load_roi_mapping(write_object(tmp_path / "m.npy", pickled))
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_bare_malicious_pickle_beside_the_array(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = write_object(tmp_path / "m.npy", pickle.dumps(Call(os.mkdir, str(marker))))
    with pytest.raises(InputError, match=r"posix\.mkdir"):
        load_roi_mapping(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"\x80\x04",
        b"\x80\x04cnumpy\nndarray\nK\x01\x85R.",  # ndarray called with a size: it is nothing to call
        b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93(J\xff\xff\xff\x7f\x85tR.",
        b"r\xff\xff\xff\x7f.",  # the C unpickler would ask for 32 GiB of memo
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a bytearray of 8 EiB
        b"Pid\n.",  # persistent id
        b"\x82\x01.",  # extension registry
        b"(" * 2000 + b"t" * 1999 + b".",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00zliXtR.",
        pickle.dumps([1, 2]),
        pickle.dumps({1: "a"}),  # a dict, but no array around it
    ],
)
def test_malformed_pickles_are_one_line(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(InputError) as caught:
        load_roi_mapping(write_object(tmp_path / "m.npy", pickled))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        [1],
        "x",
        {1: 2},
        {"a": "b"},
        {True: "a"},
        {1: None},
        {1.0: "a"},
        {1: b"a"},
        {(1,): "a"},
        {1: {2: "a"}},
    ],
)
def test_other_contents_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(InputError):
        load_roi_mapping(write_object(tmp_path / "m.npy", pickle.dumps(boxed(value))))


def test_other_arrays_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.npy"
    with pytest.raises(MissingInput, match=r"m\.npy"):
        load_roi_mapping(path)
    for array in (np.arange(3), np.array({1: "a"}, dtype=object)[None], np.array(1.5)):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(InputError):
            load_roi_mapping(path)
    for data in (
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x07\x00",
        b"PK\x03\x04",
        b"\x93NUMPY\x01\x00\xff\xff{",
    ):
        path.write_bytes(data)
        with pytest.raises(InputError):
            load_roi_mapping(path)
    path.write_bytes(b"\x93NUMPY\x01\x00" + bytes(2 << 20))
    with pytest.raises(InputError, match="at most"):
        load_roi_mapping(path)


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=80),
    cut=st.integers(0, 400),
    place=st.integers(0, 400),
    byte=st.integers(0, 255),
)
def test_no_bytes_get_past(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int, place: int, byte: int
) -> None:
    good = pickle.dumps(boxed(MAPPING), 2)
    changed = bytearray(good[: cut or None] if cut % 3 == 0 else good)
    if changed:
        changed[place % len(changed)] = byte
    for pickled in (bytes(changed), data):
        path = write_object(tmp_path_factory.getbasetemp() / "fuzz.npy", pickled)
        try:
            loaded = load_roi_mapping(path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert all(type(k) is int and type(v) is str for k, v in loaded.items())
