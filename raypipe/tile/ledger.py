"""Which tiles of a result are on the disk: the store's lock, fence and journal, a record a tile.

Beside ``out.tif`` lie, while it is written, ``out.tif.partial`` (the data), ``out.tif.journal/`` (records
and the fence), ``out.tif.lock`` and ``out.tif.owner.json``; and for good ``out.tif.tiles.json``, which
says what it was made of. A tile counts once its data is synced and its record after that; a later run
checks each record against the bytes. The result gets its name when all tiles are there; one that it
overwrites is there until then.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from raypipe.errors import Fenced, FingerprintMismatch, StoreError
from raypipe.store.durable import fsync_dir, move, pwrite_all, remove, write_atomic
from raypipe.store.fence import Fence
from raypipe.store.hold import Hold
from raypipe.store.journal import JournalCount, header_line, read_journal, seal_line
from raypipe.store.layout import ShardPaths
from raypipe.store.space import explain_os_errors, require_space
from raypipe.tile.output import OutputSpec, create, open_output

WRITING, DONE = "writing", "done"


def paths_of(out: Path) -> ShardPaths:
    """The names beside a result."""

    def beside(suffix: str) -> Path:
        return out.with_name(out.name + suffix)

    return ShardPaths(
        final=out,
        partial=beside(".partial"),
        manifest=beside(".tiles.json"),
        index=beside(".index"),
        journal=beside(".journal"),
        lock=beside(".lock"),
        owner=beside(".owner.json"),
        places=beside(".places.json"),
    )


@dataclass(frozen=True, kw_only=True)
class TileTarget:
    """What a worker needs to write tiles; small and picklable."""

    spec: OutputSpec
    data: Path
    journal: Path
    fence: Path
    fingerprint: str
    epoch: int
    token: str


class TileRun:
    """One run's hold on a result. A context manager, which lets go; `open` first.

    done : (frames * tiles,) bool; kept : how many an earlier run left. about : facts for people, which
    decide nothing.
    """

    def __init__(
        self,
        spec: OutputSpec,
        identity: Mapping[str, Any],
        run_id: str,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec, self.paths, self.identity = spec, paths_of(spec.path), dict(identity)
        self._about = dict(about or {})
        self.fingerprint = xxhash.xxh3_128_hexdigest(
            json.dumps(self.identity, sort_keys=True).encode()
        )
        self.done = np.zeros(spec.frames * len(spec.grid), bool)
        self.kept, self.found = 0, False
        self._hold = Hold(self.paths, run_id)

    def open(self, *, overwrite: bool = False) -> None:
        """Take the result over: new, resumed, or ``found`` finished (never to ``overwrite`` it).
        Raises StoreLocked, FingerprintMismatch, StoreError, NoSpace.
        """
        if self.is_finished(overwrite=overwrite):
            self.found, self.done[:], self.kept = True, True, len(self.done)
            return
        require_space({self.paths.folder: self.missing_bytes()})
        try:
            self._hold.lock()
            with explain_os_errors(self.paths.folder, self.spec.nbytes):
                self._begin(overwrite)
        except BaseException:
            self._hold.back_out()
            raise

    def missing_bytes(self) -> int:
        """What must still be free on the disk: for the result, less what an earlier run took, and for a
        record of some 100 bytes a tile.
        """
        held = _held_bytes(self.paths.final if self._was_named() else self.paths.partial)
        return max(0, self.spec.nbytes - held) + 100 * len(self.done)

    def _was_named(self) -> bool:
        """Whether an earlier run of this very result ended after the last rename, before it said so."""
        fields = read_manifest(self.paths.manifest) or {}
        begun = fields.get("fingerprint") == self.fingerprint and fields.get("state") == WRITING
        return begun and self.paths.final.exists() and not self.paths.partial.exists()

    def is_finished(self, *, overwrite: bool = False) -> bool:
        """Whether nothing is left to do. Raises StoreError, FingerprintMismatch where `open` would."""
        fields = read_manifest(self.paths.manifest)
        if fields is None:
            if self.spec.path.exists() and not overwrite:
                raise StoreError(
                    f"{self.spec.path} is there and was not written by this; move it away, or "
                    "overwrite it"
                )
            return False
        if fields.get("fingerprint") != self.fingerprint and not overwrite:
            other = fields.get("identity", {})
            differs = sorted(k for k in self.identity if self.identity[k] != other.get(k))
            raise FingerprintMismatch(
                f"{self.spec.path} was begun with other {', '.join(differs) or 'options'}; choose "
                "another output, or overwrite it"
            )
        same = fields.get("fingerprint") == self.fingerprint
        return not overwrite and same and fields.get("state") == DONE and self.spec.path.exists()

    def _begin(self, overwrite: bool) -> None:
        self._hold.take_over(None)
        fields = read_manifest(self.paths.manifest)
        if (
            fields is None
            or fields.get("fingerprint") != self.fingerprint
            or fields.get("state") == DONE
        ):
            remove(self.paths.journals())
            _discard(self.paths.partial)
        elif self.paths.partial.exists() and self.paths.final.exists() and not overwrite:
            raise StoreError(
                f"{self.paths.final} is an older result, or was put there while this one was not "
                "finished; move it away, or overwrite it"
            )
        elif self._was_named():
            move(self.paths.final, self.paths.partial)
        # What is overwritten keeps its name until `finish`. The data comes before the manifest: after
        # a crash between them a WRITING result without a partial file is this run's own, never the old.
        create(self.spec, self.paths.partial)
        self._write_manifest(WRITING)
        self._recover()

    def _recover(self) -> None:
        """Believe the records whose bytes are on the disk."""
        claims = claims_in(self.paths.journals(), self.fingerprint, len(self.done))
        if not claims:
            return
        output = open_output(self.spec, self.paths.partial)
        try:
            for number, checksums in claims.items():
                frame, tile = divmod(number, len(self.spec.grid))
                data = output.read(frame, self.spec.grid.tile(tile).keep)
                self.done[number] = checksum(data) in checksums
        finally:
            output.close()
        self.kept = int(self.done.sum())

    def _write_manifest(self, state: str) -> None:
        fields: dict[str, Any] = {
            "state": state,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
        }
        fields |= {"shape": self.spec.shape, "dtype": self.spec.dtype, **self._about}
        write_atomic(self.paths.manifest, json.dumps(fields, indent=1).encode() + b"\n")

    @property
    def target(self) -> TileTarget:
        """For the workers."""
        return TileTarget(
            spec=self.spec,
            data=self.paths.partial.absolute(),
            journal=self.paths.journal.absolute(),
            fence=self.paths.fence.absolute(),
            fingerprint=self.fingerprint,
            epoch=self._hold.epoch,
            token=self._hold.token,
        )

    def missing(self) -> np.ndarray:
        """Numbers (frame * tiles + tile) that are not done, in order."""
        return np.flatnonzero(~self.done)

    def accept(self, numbers: Iterable[int]) -> None:
        """Tiles that a worker committed."""
        self.done[list(numbers)] = True

    def shut_out(self, writer_id: str) -> None:
        """A worker that was given up writes no more."""
        self._hold.shut_out(writer_id)

    def finish(self) -> Path:
        """All tiles are there: give the result its name. Raises StoreError when some are missing."""
        if self.found:
            return self.spec.path
        if len(self.missing()):
            raise StoreError(
                f"{self.spec.path} lacks {len(self.missing())} of {len(self.done)} tiles; run the same "
                "command again"
            )
        self._hold.raise_fence(closed=True)
        _sync_path(self.paths.partial)
        _discard(self.paths.final)
        move(self.paths.partial, self.paths.final)
        self._write_manifest(DONE)
        remove([*self.paths.journals(), self.paths.fence])
        self.paths.journal.rmdir()
        remove([self.paths.owner, self.paths.lock])
        self._hold.disown()
        self._hold.release()
        return self.spec.path

    def __enter__(self) -> TileRun:
        return self

    def __exit__(self, *error: object) -> None:
        self._hold.release()


def checksum(data: np.ndarray) -> str:
    """xxh3_64 of the values of a tile, (channels, *space) in C order."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(data).data)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What ``out.tif.tiles.json`` says; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else None
    return None


def claims_in(journals: Iterable[Path], fingerprint: str, n_tiles: int) -> dict[int, set[str]]:
    """Tile -> checksums of it that whole records of this fingerprint say were committed."""
    claims: dict[int, set[str]] = {}
    for path in journals:
        for line in read_journal(path, fingerprint, JournalCount()):
            number, value = line.fields.get("tile"), line.fields.get("xxh3")
            if isinstance(number, int) and 0 <= number < n_tiles:
                claims.setdefault(number, set()).add(str(value))
    return claims


def _held_bytes(partial: Path) -> int:
    """What an unfinished result takes on the disk; of a .zarr all its files."""
    files = partial.rglob("*") if partial.is_dir() else [partial]
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class TileWriter:
    """A worker's hand: `write` tiles, then `commit` them. ``writer_id`` is of one worker's life."""

    def __init__(self, target: TileTarget, writer_id: str) -> None:
        self._target, self._id = target, writer_id
        self._lines: list[bytes] = []
        self._journal = -1
        try:
            self._fence = Fence(target.fence)
            self._output = open_output(target.spec, target.data)
        except FileNotFoundError as error:
            raise Fenced(f"writer {writer_id}: {error.filename} is gone; its run is over") from None

    @contextlib.contextmanager
    def _allowed(self, need_bytes: int) -> Iterator[None]:
        target = self._target
        with (
            self._fence.passing(target.epoch, target.token, self._id),
            explain_os_errors(target.data, need_bytes),
        ):
            yield

    def write(self, number: int, data: np.ndarray) -> None:
        """Tile ``number`` (frame * tiles + tile), not yet durable. Raises Fenced, NoSpace."""
        grid = self._target.spec.grid
        frame, tile = divmod(number, len(grid))
        data = np.ascontiguousarray(data, self._target.spec.dtype)
        with self._allowed(data.nbytes):
            self._output.write(frame, grid.tile(tile).keep, data)
        record = {"tile": number, "xxh3": checksum(data), "writer": self._id}
        self._lines.append(seal_line({**record, "epoch": self._target.epoch}))

    def commit(self) -> None:
        """Sync the data, then record it. Raises Fenced, NoSpace, OSError; what was written then does
        not count.
        """
        if not self._lines:
            return
        lines, self._lines = (
            b"".join(self._lines),
            [],
        )  # first: what failed once is not recorded later
        with self._allowed(len(lines)):
            self._output.sync()
            if self._journal < 0:
                lines = header_line(self._target.fingerprint, self._target.epoch, self._id) + lines
                self._open_journal()
            pwrite_all(self._journal, lines, os.fstat(self._journal).st_size)
            os.fdatasync(self._journal)

    def _open_journal(self) -> None:
        name = f"{self._target.epoch:08d}-{self._id}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._journal = os.open(self._target.journal / name, flags, 0o666)
        fsync_dir(self._target.journal)

    def close(self) -> None:
        """Without a commit."""
        self._fence.close()
        self._output.close()
        if self._journal >= 0:
            os.close(self._journal)
        self._journal = -1
