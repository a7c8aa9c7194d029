"""Small NIfTI files whose raw values anyone can recompute, written byte by byte."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (5, 6, 7, 9)
AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2.5, -72], [0, 0, 0, 1]])


def raw_values(shape=SHAPE, dtype="<i2", seed=0) -> np.ndarray:
    """Values of ``shape`` that use the whole of a small dtype's range."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return rng.normal(1000, 50, shape).astype(dtype)
    info = np.iinfo(dtype)
    low, high = max(info.min, -30000), min(info.max, 30000)
    return rng.integers(low, high, shape, endpoint=True).astype(dtype)


def write_scan(
    path: Path,
    raw: np.ndarray,
    *,
    slope: float = np.nan,
    inter: float = np.nan,
    tr: float = 2.0,
    units: str = "sec",
    level: int = 6,
    tail: bytes = b"",
) -> Path:
    """``raw`` at ``path``: .nii, .nii.gz, or .img(.gz) with its header beside it."""
    names = path.name.split(".")
    pair = "img" in names
    order = ">" if raw.dtype.byteorder == ">" else "<"
    header = nib.Nifti1Header(endianness=order)
    header.set_data_shape(raw.shape)
    header.set_data_dtype(raw.dtype)
    header.set_zooms((2.0, 2.0, 2.5, tr)[: raw.ndim] + (1.0,) * (raw.ndim - 4))
    header.set_xyzt_units("mm", units)
    header.set_sform(AFFINE, 1)
    header["scl_slope"], header["scl_inter"] = slope, inter
    header["magic"], header["vox_offset"] = (b"ni1", 0) if pair else (b"n+1", 352)
    head, body = header.binaryblock, raw.tobytes(order="F") + tail
    if pair:
        put(path.with_name(path.name.replace(".img", ".hdr")), head, level)
        put(path, body, level)
    else:
        put(path, head + b"\0" * (352 - len(head)) + body, level)
    return path


def put(path: Path, data: bytes, level: int = 6) -> None:
    """``data`` at ``path``, gzipped if its name says so."""
    path.write_bytes(gzip.compress(data, level, mtime=0) if path.suffix == ".gz" else data)


def unscaled(path: Path) -> np.ndarray:
    """(x, y, z, t) as stored, read by nibabel."""
    values = np.asarray(nib.load(path).dataobj.get_unscaled())
    return values if values.ndim > 3 else values[..., None]
