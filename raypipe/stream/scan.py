"""Every image of a folder looked at once: can it be read, and what does it hold.

Training on the fly must know both before its first step: an image that cannot be read is in no
split (as its row in a store would be invalid), and a resumed run must find the same images. What was
found is kept beside the run; a file of the same name, size and time is not read a second time.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from raypipe.backbone.preprocess import Preprocess
from raypipe.errors import BadImage, InputError, MissingInput
from raypipe.progress import Progress
from raypipe.read import Undecodable, first_size
from raypipe.stream.decoding import MOST_THREADS
from raypipe.stream.pixels import PixelSource, decode


class Seen(NamedTuple):
    """One file as it was read; ``reason`` says why it cannot be used, "" when it can."""

    size_bytes: int
    mtime_ns: int
    digest: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """The images of ``folder`` in row order; image_hw : pixels of the first that can be read."""

    folder: Path
    names: tuple[str, ...]
    seen: tuple[Seen, ...]
    image_hw: tuple[int, int]

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(N,) which can be read."""
        return np.array([not one.reason for one in self.seen], bool)

    @property
    def fingerprint(self) -> str:
        """xxh3_128 of names, contents and which of them can be used; neither place nor time."""
        digest = xxhash.xxh3_128()
        for name, one in zip(self.names, self.seen, strict=True):
            digest.update(f"{name}\0{one.digest}\0{bool(one.reason)}\n".encode())
        return digest.hexdigest()

    def source(
        self, preprocess: Preprocess, readers: int | None = None, fingerprint: str | None = None
    ) -> PixelSource:
        """The rows that these images are; ``fingerprint``: of them with what is made of them."""
        return PixelSource(
            folder=self.folder,
            names=self.names,
            digests=b"".join(bytes.fromhex(one.digest) for one in self.seen),
            preprocess=preprocess,
            image_hw=self.image_hw,
            readers=readers,
            fingerprint=fingerprint or self.fingerprint,
        )

    def dumps(self) -> bytes:
        """As a Parquet file, for `read_seen`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = dict(zip(Seen._fields, zip(*self.seen, strict=True), strict=True))
        table = pa.table({"name": self.names, **{k: list(v) for k, v in columns.items()}})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue()


def scan(
    paths: Sequence[Path],
    preprocess: Preprocess,
    *,
    threads: int | None = None,
    known: Mapping[str, Seen] | None = None,
    fail: bool = False,
) -> Scan:
    """Look at ``paths``, images of one folder in row order.

    ``known``: what an earlier scan saw, by name (`read_seen`). ``fail``: raise BadImage for the
    first image that cannot be used, instead of noting it. Raises BadImage when none can be read,
    and as `raypipe.stream.pixels.decode`.
    """
    known, hw = known or {}, _first_size(paths)
    scratch = (*preprocess.host_size(*hw), 3)

    def look(path: Path) -> Seen:
        state = _state(path)
        before = known.get(path.name)
        if before is not None and before[:2] == state and not (fail and before.reason):
            return before
        found = decode(path, preprocess, hw, np.empty(scratch, np.uint8))
        reason = found.reason if isinstance(found, Undecodable) else ""
        if reason and fail:
            raise BadImage(f"{path}: {reason}; mend or remove it, or --on-bad-image mark")
        return Seen(*state, found.digest, reason)

    seen: list[Seen] = []
    pool = ThreadPoolExecutor(threads or MOST_THREADS, thread_name_prefix="raypipe-scan")
    try:
        with Progress("scan", len(paths), "images") as progress:
            todo = iter(paths)
            while batch := list(islice(todo, 512)):
                seen += pool.map(look, batch)
                progress.update(len(batch))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return Scan(paths[0].parent, tuple(path.name for path in paths), tuple(seen), hw)


def read_seen(path: Path) -> dict[str, Seen]:
    """What `Scan.dumps` wrote to ``path``, by name; nothing where there is no such file, or another:
    the images are then read again.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path).to_pydict()
        columns = [table[name] for name in ("name", *Seen._fields)]
    except (OSError, KeyError, pa.ArrowInvalid):
        return {}
    return {name: Seen(*rest) for name, *rest in zip(*columns, strict=True)}


def _state(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(
            f"{path} cannot be opened ({error.strerror}); mend or remove the file"
        ) from error
    return stat.st_size, stat.st_mtime_ns


def _first_size(paths: Sequence[Path]) -> tuple[int, int]:
    if not paths:
        raise MissingInput("no images to look at; give a folder that holds some")
    return first_size(paths)
