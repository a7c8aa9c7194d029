"""By what a file is known to have changed: its size, its time of change, and a sample of its bytes, which
notices changed content behind an unchanged size and time.

The first and the last block are always in it. The last one of a ``.nii.gz`` holds the CRC-32 of
all its content, so there every change is noticed; in a plain ``.nii`` above 1 MiB a change that
lies wholly between the blocks is not.
"""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

BLOCKS = 16
BLOCK_BYTES = 64 << 10


def sample_offsets(size_bytes: int) -> list[tuple[int, int]]:
    """(offset, length) of the blocks: spread evenly, first and last byte included; or the whole."""
    if size_bytes <= BLOCKS * BLOCK_BYTES:
        return [(0, size_bytes)]
    last = size_bytes - BLOCK_BYTES
    return [(last * k // (BLOCKS - 1), BLOCK_BYTES) for k in range(BLOCKS)]


def file_state(path: Path) -> tuple[int, int]:
    """(bytes, nanoseconds of its last change)."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def content_sample(path: Path, size_bytes: int) -> str:
    """xxh3_128 of the sampled bytes of ``path``, as it lies on the disk; 32 hex digits."""
    hasher = xxhash.xxh3_128()
    fd = os.open(path, os.O_RDONLY)
    try:
        for offset, length in sample_offsets(size_bytes):
            hasher.update(os.pread(fd, length, offset))
    finally:
        os.close(fd)
    return str(hasher.hexdigest())
