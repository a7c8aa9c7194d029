"""Algonauts' ROI mappings, ``mapping_FAMILY.npy``: a pickled dict int -> name, read without trust.

``np.load(allow_pickle=True)`` runs whatever a file asks for. Here no callable named by the file is
ever called, numpy's own included: the few names that such an array needs are met by inert stand-ins
that only note what they were given. Anything else is refused by name.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from raypipe.errors import InputError, MissingInput

_MAX_BYTES = 1 << 20  # the real files hold about 500 bytes; a large one is not a mapping


class _Dtype:
    """Stands in for numpy.dtype: keeps the type code, and the byte order that its state brings."""

    def __init__(self, code: str = "", *_flags: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    """Stands in for numpy's array rebuild: keeps shape and items of an object array."""

    def __init__(self, *_template: object) -> None:
        self.shape: tuple[int, ...] = ()
        self.items: object = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, self.shape, _dtype, _fortran, self.items = state


def _scalar(dtype: _Dtype, data: object = b"") -> int | str:
    """A numpy integer or string scalar as Python's own, from its type code and bytes."""
    raw = data if isinstance(data, bytes) else b""
    code = dtype.code if isinstance(dtype, _Dtype) else ""
    if re.fullmatch(r"[iu][1248]", code) and len(raw) == int(code[1]):
        return int.from_bytes(raw, "big" if dtype.order == ">" else "little", signed=code[0] == "i")
    if re.fullmatch(r"U\d+", code) and len(raw) == 4 * int(code[1:]):
        return raw.decode("utf-32-be" if dtype.order == ">" else "utf-32-le").rstrip("\0")
    raise pickle.UnpicklingError(f"a numpy scalar of type {code!r} is neither int nor str")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes as pickle protocols 0 to 2 write them; other codecs than latin1 are refused."""
    if encoding.replace("-", "") != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not admitted")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], object] = {
    (f"numpy.{core}.multiarray", name): stand_in
    for core in ("core", "_core")
    for name, stand_in in (("_reconstruct", _Array), ("scalar", _scalar))
} | {
    ("numpy", "ndarray"): None,  # only ever handed to _reconstruct as its template
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


# Python's own unpickler, not the C one, whose memo can be told to take gigabytes by six bytes.
class _Restricted(pickle._Unpickler):
    """An unpickler that knows the names above and no others."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is not admitted"
            ) from None


def load_roi_mapping(path: Path) -> dict[int, str]:
    """The mapping vertex label -> ROI name in ``path``, a 0-d object array holding one dict.

    Raises MissingInput when the file is absent, InputError when it is anything but such a mapping;
    a pickle that asks for other code is refused by that code's name, and nothing of it runs.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInput(f"ROI mapping {path} does not exist; copy it from the Algonauts data")
    try:
        return _checked(_unpickle(path))
    except (MemoryError, RecursionError, Exception) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"ROI mapping {path} is not a plain dict of int to name: {reason}; "
            "take the file from the Algonauts data again"
        ) from error


def _unpickle(path: Path) -> object:
    """The one object in a 0-d object .npy, by the restricted unpickler."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"it holds {path.stat().st_size} bytes, a mapping at most {_MAX_BYTES}")
    stream = io.BytesIO(path.read_bytes())
    version = npy_format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f".npy version {version} is not one that numpy writes for objects")
    read_header = (
        npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    )
    shape, _fortran, dtype = read_header(stream)
    if shape != () or dtype != np.dtype(object):
        raise ValueError(f"it is an array of shape {shape} and dtype {dtype}, not one object")
    return _Restricted(stream).load()


def _checked(loaded: object) -> dict[int, str]:
    """The dict inside the stand-in array, after proof that it maps int to str."""
    if not isinstance(loaded, _Array) or loaded.shape != ():
        raise ValueError("the pickle is not a 0-d array")
    items = loaded.items
    mapping = items[0] if isinstance(items, list) and len(items) == 1 else None
    if not isinstance(mapping, dict):
        raise ValueError(f"the array holds {type(mapping).__name__}, not dict")
    for label, name in mapping.items():
        if type(label) is not int or type(name) is not str:
            raise ValueError(f"entry {label!r}: {name!r} is not int: str")
    return mapping
