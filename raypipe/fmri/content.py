"""What a file is known by in keys and records: a hash of its content, neither its name nor its time."""

from __future__ import annotations

import functools
from pathlib import Path

import xxhash

from raypipe.read.nifti import Scan
from raypipe.read.sample import content_sample, file_state

_CHUNK_BYTES = 8 << 20


def content_of(scan: Scan) -> str:
    """32 hex digits, of all content of ``scan``: a packed one's sample holds its checksum."""
    if scan.compressed:
        return content_sample(scan.path, scan.size_bytes)
    return _whole(scan.path, scan.size_bytes, scan.mtime_ns)


@functools.lru_cache(maxsize=4096)
def _whole(path: Path, size_bytes: int, mtime_ns: int) -> str:
    """Of a plain .nii: a sample would miss a volume that was mended."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(_CHUNK_BYTES):
            hasher.update(part)
    return str(hasher.hexdigest())


def digest(path: Path) -> str:
    """xxh3_128 of all bytes of a small file."""
    return _digest(path, *file_state(path))


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, size_bytes: int, mtime_ns: int) -> str:
    """size_bytes, mtime_ns : so that a file which changes under a long-lived process is read again."""
    return str(xxhash.xxh3_128_hexdigest(path.read_bytes()))
