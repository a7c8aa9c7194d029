"""One scan: what its header says, as a handle that is cheap to pickle and opens no file.

Values are ``raw * slope + inter``, raw as stored: an int16 scan with a slope stays int16 here.
Voxels are named by their flat index in C order, as ``np.flatnonzero(mask)`` gives them; on the disk
x runs fastest, which `file_positions` translates. Reading the volumes is `slabs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from gzip import BadGzipFile
from pathlib import Path
from typing import Any, Literal
from zlib import error as ZlibError

import nibabel as nib
import numpy as np
import xxhash
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from raypipe.errors import InputError, MissingInput
from raypipe.read.nifti import slabs as streaming

Kind = Literal["nii", "nii.gz", "pair"]

_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "unknown": 1.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """A 3-D or 4-D NIfTI file; a 3-D one has one volume.

    path        : of the data, absolute (of a pair, the ``.img``)
    shape       : (x, y, z, t)
    dtype       : as stored, byte order included
    affine      : (4, 4) float64, voxel -> mm
    zooms_mm    : (x, y, z)
    tr_s        : None when the header gives none; an unnamed unit is taken for seconds
    data_offset : bytes before the first value (of the decompressed stream)
    header_hash : of the header's bytes
    """

    path: Path
    kind: Kind
    compressed: bool
    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    slope: float
    inter: float
    affine: np.ndarray
    zooms_mm: tuple[float, float, float]
    tr_s: float | None
    data_offset: int
    size_bytes: int
    mtime_ns: int
    header_hash: str

    @property
    def n_volumes(self) -> int:
        """Volumes in time."""
        return self.shape[3]

    @property
    def volume_voxels(self) -> int:
        """Voxels of one volume."""
        return math.prod(self.shape[:3])

    @property
    def data_bytes(self) -> int:
        """Bytes of all values, decompressed."""
        return self.volume_voxels * self.n_volumes * int(self.dtype.itemsize)

    @property
    def native(self) -> np.dtype[Any]:
        """The stored dtype in this machine's byte order."""
        return self.dtype.newbyteorder("=")

    @property
    def scaled(self) -> bool:
        """Whether values differ from the raw ones."""
        return (self.slope, self.inter) != (1.0, 0.0)

    def volumes(self, block_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """(t0, raw (n, z*y*x) in stored dtype and file order), n volumes of about ``block_bytes``.

        At least one whole volume each. An array is good until the next one is asked for.
        """
        one = self.volume_voxels * self.dtype.itemsize
        for slab in streaming.slabs(self, max(block_bytes, one)):
            yield slab.t0, slab.values

    def check_unchanged(self) -> None:
        """Raise InputError when the file is not the one whose header was read."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise MissingInput(f"scan {self.path} cannot be read ({error.strerror})") from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size_bytes, self.mtime_ns):
            raise InputError(
                f"scan {self.path} was changed while in use ({self.size_bytes} bytes then, "
                f"{stat.st_size} now); wait until it is written, then run again"
            )

    def describe(self) -> str:
        """``bold.nii.gz 91x109x91x320 int16 * 0.037 + 812``."""
        scaling = f" * {self.slope:g} + {self.inter:g}" if self.scaled else ""
        shape = "x".join(map(str, self.shape))
        return f"{self.path.name} {shape} {self.dtype.name}{scaling}"


def open_scan(path: Path | str) -> Scan:
    """The scan at ``path``: ``.nii``, ``.nii.gz``, or either file of a pair (also gzipped).

    Raises MissingInput for an absent file and InputError for one that is no NIfTI scan of real
    numbers. Only the header is read.
    """
    path = Path(path)
    try:
        image = nib.load(path)
        return _scan_of(image, path)
    except FileNotFoundError as error:
        raise MissingInput(f"scan {path} is not there ({error.filename or error})") from error
    except (ImageFileError, HeaderDataError, EOFError, BadGzipFile, ZlibError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"scan {path} has no readable NIfTI header ({why}); copy or convert it again"
        ) from error


def file_positions(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Where voxels of C-order index ``flat`` (n,) int64 lie in a volume on the disk, x fastest."""
    x, y, z = shape[:3]
    i, rest = np.divmod(np.asarray(flat, dtype=np.int64), y * z)
    j, k = np.divmod(rest, z)
    return i + x * (j + y * k)


def _scan_of(image: Any, path: Path) -> Scan:
    if not isinstance(image, nib.Nifti1Pair):  # Nifti1Image and both of NIfTI-2 derive from it
        raise InputError(f"scan {path} is {type(image).__name__}, not NIfTI; convert it to .nii.gz")
    data = Path(image.file_map["image"].filename).absolute()
    if data.suffix not in (".nii", ".img", ".gz"):
        raise InputError(f"scan {path} is compressed as {data.suffix}; convert it to .nii.gz")
    compressed = data.suffix == ".gz"
    pair = "header" in image.file_map and image.file_map["header"].filename is not None
    pair = pair and Path(image.file_map["header"].filename).absolute() != data
    proxy, header = image.dataobj, image.header
    stat = data.stat()
    return Scan(
        path=data,
        kind="pair" if pair else "nii.gz" if compressed else "nii",
        compressed=compressed,
        shape=_four(image.shape, path),
        dtype=_real(proxy.dtype, path),
        slope=float(proxy.slope),
        inter=float(proxy.inter),
        affine=np.asarray(image.affine, dtype=np.float64),
        zooms_mm=_three(header.get_zooms()),
        tr_s=_tr_s(header),
        data_offset=int(proxy.offset),
        size_bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        header_hash=_header_hash(image),
    )


def _four(shape: tuple[int, ...], path: Path) -> tuple[int, int, int, int]:
    sizes = [int(size) for size in shape]
    while len(sizes) > 4 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) == 3:
        sizes.append(1)
    if len(sizes) != 4 or min(sizes) < 1:
        raise InputError(
            f"scan {path} has shape {tuple(shape)}; give one of (x, y, z) or (x, y, z, t)"
        )
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _three(zooms: tuple[Any, ...]) -> tuple[float, float, float]:
    return float(zooms[0]), float(zooms[1]), float(zooms[2])


def _real(dtype: np.dtype[Any], path: Path) -> np.dtype[Any]:
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(f"scan {path} holds {dtype} values; a time series is of real numbers")
    return dtype


def _tr_s(header: Any) -> float | None:
    zooms = header.get_zooms()
    scale = _SECONDS.get(header.get_xyzt_units()[1])
    if len(zooms) < 4 or scale is None or not (math.isfinite(zooms[3]) and zooms[3] > 0):
        return None
    return float(zooms[3]) * scale


def _header_hash(image: Any) -> str:
    # The bytes on the disk: nibabel's own header object has lost slope and intercept by now.
    holder = image.file_map.get("header") or image.file_map["image"]
    length = len(image.header.binaryblock)
    with holder.get_prepare_fileobj("rb") as file:
        return str(xxhash.xxh3_128_hexdigest(file.read(length)))
