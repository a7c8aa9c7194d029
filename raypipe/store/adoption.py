"""Adopting a plain ``.npy`` as a sealed store: manifest and index beside it, its bytes untouched.

`plan_adoption` says whether and as what (it reads the header only), `adopt` reads the data once and
seals. The manifest's rename is the last step that counts: after a crash before it there is no
store, and the same command begins again. The fingerprint of an adopted store covers its contents,
since no configuration is known that would decide them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from raypipe.errors import ConfigError, MissingInput, StoreCorrupt, StoreError
from raypipe.store.checksum import ALGORITHM
from raypipe.store.discard import tidy
from raypipe.store.durable import move, remove
from raypipe.store.index import stream_index
from raypipe.store.layout import FILE_DTYPES, CellGrid, NpyHeader, ShardPaths, array_bytes
from raypipe.store.lock import Owner, take_lock, utc_now
from raypipe.store.manifest import SEALED, Manifest
from raypipe.store.names import RowNames
from raypipe.store.scan import reason_of, scan_cells
from raypipe.store.schema import FORMAT, FORMAT_VERSION, fingerprint_of
from raypipe.store.space import explain_os_errors, require_space

_CELL_BYTES = 1 << 20
_MOST_CELLS = 1 << 16  # a checksum is 20 bytes of JSON: the manifest stays below 2 MB


@dataclass(frozen=True, kw_only=True)
class Adoption:
    """What a file would be adopted as. dtype: logical. need_bytes: of the files beside it."""

    paths: ShardPaths
    dtype: str
    shape: tuple[int, ...]
    cells: CellGrid
    names: RowNames
    need_bytes: int


def plan_adoption(path: Path, *, names: Path | None = None, bfloat16: bool = False) -> Adoption:
    """Look at the header of ``path`` and at what lies beside it; nothing is written.

    bfloat16: its uint16 are the bits of bfloat16. Raises MissingInput, StoreError (there is a
    store, Fortran order, objects), ConfigError (dtype, shape, names), StoreCorrupt (no .npy, cut).
    """
    paths = ShardPaths.of(path)
    _check_unclaimed(paths)
    dtype, shape, offset = _read_header(path, bfloat16)
    row_bytes = array_bytes(FILE_DTYPES[dtype], shape[1:])
    cells = CellGrid(
        rows=shape[0], grid=_grid(shape[0], row_bytes), row_bytes=row_bytes, data_offset=offset
    )
    size_bytes = path.stat().st_size
    if size_bytes != cells.file_bytes:
        raise StoreCorrupt(
            f"{path} has {size_bytes} bytes, its header says {cells.file_bytes}; it was cut short "
            "or written on: save it again"
        )
    row_names = RowNames(shape[0], names)
    need = 65536 + row_names.check() + 48 * shape[0] + 24 * len(cells)
    return Adoption(
        paths=paths, dtype=dtype, shape=shape, cells=cells, names=row_names, need_bytes=need
    )


def adopt(
    plan: Adoption,
    *,
    threads: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Path:
    """Checksum the file and seal it; ``progress`` is told of rows read.

    Raises StoreLocked, StoreError (a store came there meanwhile, the file changed while it was
    read, the folder cannot be written), NoSpace.
    """
    paths = plan.paths
    require_space({paths.manifest: plan.need_bytes})
    with explain_os_errors(paths.folder, plan.need_bytes):
        lock = take_lock(paths)
        try:
            _check_unclaimed_now(paths)
            try:
                Owner.me("adopt", 0).write(paths.owner)
                _seal(plan, threads, dict(provenance or {}), progress)
            finally:
                tidy(paths)
        finally:
            lock.close()
    return paths.final


def _check_unclaimed(paths: ShardPaths) -> None:
    if paths.manifest.exists():
        raise StoreError(
            f"{paths.final} is a store already, {paths.manifest.name} is beside it; see raypipe "
            "store info"
        )
    for path in (paths.partial, paths.journal):
        if path.exists():
            raise StoreError(
                f"{path} is left from the writing of a store; move it away before {paths.final.name} "
                "is adopted"
            )


def _check_unclaimed_now(paths: ShardPaths) -> None:
    """Under the lock, which is given back as it was found: what is there is another run's."""
    try:
        _check_unclaimed(paths)
    except StoreError:
        remove([paths.lock])
        raise


def _read_header(path: Path, bfloat16: bool) -> tuple[str, tuple[int, ...], int]:
    """(logical dtype, shape, data offset)."""
    try:
        with path.open("rb") as file:
            header = NpyHeader.read(file, str(path))
    except FileNotFoundError:
        raise MissingInput(f"{path} is not there; name a .npy file") from None
    stored = header.dtype.str
    if header.dtype.hasobject:
        raise StoreError(f"{path} holds Python objects; save numbers in it")
    if stored.startswith(">"):
        raise StoreError(f"{path} is big-endian ({stored}); save it again as little-endian")
    if not header.shape or min(header.shape) < 1:
        raise ConfigError(f"{path} has shape {header.shape}; a store has a row and no empty axis")
    if header.fortran:
        raise StoreError(f"{path} is in Fortran order; save it again in C order")
    known = {dtype.str: name for name, dtype in FILE_DTYPES.items() if name != "bfloat16"}
    if stored not in known:
        raise ConfigError(f"{path} holds {header.dtype}; a store holds {', '.join(FILE_DTYPES)}")
    if bfloat16 and known[stored] != "uint16":
        raise ConfigError(f"{path} holds {known[stored]}; only uint16 can be the bits of bfloat16")
    return "bfloat16" if bfloat16 else known[stored], header.shape, header.data_offset


def _grid(rows: int, row_bytes: int) -> int:
    """Rows a checksum: about 1 MiB, more when that were very many. Of the shape alone, so that
    copies of a file have one fingerprint.
    """
    return min(rows, max(_CELL_BYTES // row_bytes, -(-rows // _MOST_CELLS), 1))


def _seal(
    plan: Adoption,
    threads: int | None,
    provenance: dict[str, Any],
    progress: Callable[[int], None],
) -> None:
    paths = plan.paths
    header, checksums, reasons = _scan(plan, threads, progress)
    names_digest, index_hash = _write_index(paths, plan.names, reasons)
    contents = hashlib.sha256("".join(checksums).encode()).hexdigest()
    essence = {
        "shape": list(plan.shape),
        "dtype": plan.dtype,
        "grid": plan.cells.grid,
        "data_offset": plan.cells.data_offset,
        "names_digest": names_digest,
        "identity": {"source": "adopted", "contents_sha256": contents},
    }
    fields = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "state": SEALED,
        "file": paths.final.name,
        **essence,
        "dtype_in_file": FILE_DTYPES[plan.dtype].str,
        "bytes": plan.cells.file_bytes,
        "fingerprint": fingerprint_of({"format_version": FORMAT_VERSION} | essence),
        "token_layout": {},
        "provenance": provenance,
        "run_id": "adopt",
        "epoch": 0,
        "created": utc_now(),
        "sealed": utc_now(),
        "preallocation": None,
        "index": {"file": paths.index.name, "xxh3_128": index_hash},
        "invalid_rows": len(reasons),
        "checksums": {
            "algorithm": ALGORITHM,
            "header": header,
            "rows": plan.cells.grid,
            "values": checksums,
        },
        "narrowing": None,
        "halved": [],
    }
    Manifest(paths.manifest, fields).write()


def _scan(
    plan: Adoption, threads: int | None, progress: Callable[[int], None]
) -> tuple[str, list[str], dict[int, str]]:
    """(header's checksum, cells' checksums, row -> reason) of a file that nobody wrote meanwhile."""
    path = plan.paths.final
    reasons: dict[int, str] = {}
    checksums: list[str] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        before = os.fstat(fd)
        for found in scan_cells(fd, plan.cells, plan.dtype, threads):
            checksums.append(f"{found.checksum:016x}")
            reasons |= {row: reason_of(*counts) for row, counts in found.bad.items()}
            lo, hi = plan.cells.range(found.cell)
            progress(hi - lo)
        header = xxhash.xxh3_64_hexdigest(os.pread(fd, plan.cells.data_offset, 0))
        after = path.stat()
        if _identity(before) != _identity(after):
            raise StoreError(f"{path} was written while it was read; adopt it once that is over")
    finally:
        os.close(fd)
    return header, checksums, reasons


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _write_index(paths: ShardPaths, names: RowNames, reasons: dict[int, str]) -> tuple[str, str]:
    """(digest of the names, xxh3_128 of the index file)."""
    temporary = paths.index.with_name(f".{paths.index.name}.tmp")  # `tidy` knows the name
    digest = stream_index(temporary, names, reasons)
    fd = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(fd)
        found = _hash_file(fd)
    finally:
        os.close(fd)
    # Left by a crash of this very command, or somebody's own: the same rows give the same bytes.
    if paths.index.exists():
        with paths.index.open("rb") as there:
            if _hash_file(there.fileno()) != found:
                remove([temporary])
                raise StoreError(
                    f"{paths.index} is there without a manifest and names other rows; move it away"
                )
    move(temporary, paths.index)
    return digest, found


def _hash_file(fd: int) -> str:
    hasher, offset = xxhash.xxh3_128(), 0
    while data := os.pread(fd, 1 << 20, offset):
        hasher.update(data)
        offset += len(data)
    return hasher.hexdigest()
