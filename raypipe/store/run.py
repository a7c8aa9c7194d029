"""The driver's side of writing a shard: own it, recover it, hand out what is missing, seal it.

``open_for_writing`` is the way in; workers write through `writer.ShardWriter`, as far as the run's
`hold.Hold` admits them. Every step below leaves a state from which the same call goes on. On the
disk, in this order:

1. run lock, owner record, epoch raised, fence past every earlier writer
2. manifest "writing"; the data file with its header, preallocated; committed cells recovered
3. (workers write and commit)
4. seal: fence closed, all cells committed, data synced, index, data renamed to its final name,
   manifest "sealed", then journals, owner and lock removed
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from raypipe.errors import FingerprintMismatch, NoSpace, StoreCorrupt, StoreError
from raypipe.store.commits import Commits, RowTable
from raypipe.store.discard import remove_contents, tidy
from raypipe.store.durable import fsync_dir, move, pwrite_all, remove, write_atomic
from raypipe.store.hold import Hold
from raypipe.store.index import index_bytes
from raypipe.store.journal import CommitRecord
from raypipe.store.layout import ShardPaths
from raypipe.store.lock import utc_now
from raypipe.store.manifest import (
    DISCARDED,
    SEALED,
    Manifest,
    sealed_fields,
    writing_manifest,
)
from raypipe.store.recover import (
    Action,
    Found,
    Recovery,
    check_cells,
    decide,
    recover,
    space_needed,
)
from raypipe.store.schema import ShardSpec
from raypipe.store.space import explain_os_errors, preallocate, require_space
from raypipe.store.writer import WriterTarget


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a shard is; ``rows_kept`` of the done rows come from earlier runs."""

    rows: int
    rows_done: int
    rows_kept: int


def open_for_writing(
    spec: ShardSpec, *, run_id: str, overwrite: bool = False, threads: int | None = None
) -> ShardRun:
    """Take the shard for this run: new, resumed, or found sealed (then there is nothing to do).

    overwrite: replace what is there when it is of another configuration, foreign or damaged; a
    store that fits is resumed all the same. threads: for checking committed data.

    Raises StoreLocked, FingerprintMismatch, StoreCorrupt, StoreError, NoSpace; what was there is
    then as it was, but for a store that ``overwrite`` gave up.
    """
    run = ShardRun(spec, run_id, threads)
    if run._find_sealed(overwrite=overwrite):
        return run
    need = space_needed(spec)
    require_space({spec.path: need})
    try:
        with explain_os_errors(spec.paths.folder, need):
            run._open(overwrite=overwrite)
    except BaseException:
        run._close_data()
        run._hold.back_out()
        raise
    return run


class ShardRun:
    """One run's hold on a shard; a context manager, which lets go without sealing.

    ``recovery`` says what was taken over from earlier runs.
    """

    def __init__(self, spec: ShardSpec, run_id: str, threads: int | None = None) -> None:
        """Not called directly: `open_for_writing` makes one and opens it."""
        self.spec = spec
        self.run_id = run_id
        self.paths = spec.paths
        self.sealed = False
        self.recovery = Recovery()
        self._threads = threads
        self._hold = Hold(spec.paths, run_id)
        self._commits = Commits(spec.cells)
        self._data = -1
        self._manifest: Manifest | None = None
        self._preallocation = ""

    # What the driver asks.

    @property
    def epoch(self) -> int:
        """Of this run's writers; 0 when the shard was found sealed."""
        return self._hold.epoch

    @property
    def target(self) -> WriterTarget:
        """What the workers need to write; StoreError when there is nothing left to write."""
        if not self._hold.admits_writers:
            raise StoreError(f"{self.spec.path} is sealed or closed; there is nothing to write")
        return WriterTarget(
            data=self.paths.partial.absolute(),
            journal=self.paths.journal.absolute(),
            fence=self.paths.fence.absolute(),
            fingerprint=self.spec.fingerprint,
            epoch=self.epoch,
            token=self._hold.token,
            rows=self.spec.rows,
            row_shape=self.spec.row_shape,
            dtype=self.spec.dtype,
            grid=self.spec.grid,
            data_offset=len(self.spec.header),
        )

    def missing(self) -> list[tuple[int, int]]:
        """[lo, hi) of each grid cell not known to be committed, in row order: the work items."""
        return [] if self.sealed else self._commits.missing()

    @property
    def progress(self) -> Progress:
        """Rows done, as far as `accept` was told."""
        done = self.spec.rows if self.sealed else self._commits.rows_done
        return Progress(rows=self.spec.rows, rows_done=done, rows_kept=self.recovery.rows_kept)

    def accept(self, records: Iterable[CommitRecord]) -> None:
        """Take note of what a writer's commit returned, for `missing` and `progress`.

        The journals decide when sealing; a record that never got here is found there.
        """
        for record in records:
            self._commits.add(record)

    def fence_writer(self, writer_id: str) -> None:
        """Shut out one writer of this run for good: call it before a worker that is given up (dead
        as far as one can tell) has its rows handed to another. Waits for its write in flight.
        """
        if not self._hold.admits_writers:
            raise StoreError(f"{self.spec.path} is sealed or closed; no writer is left")
        self._hold.shut_out(writer_id)

    def refresh(self) -> None:
        """Read the journals of this run again, for commits that nobody reported."""
        if not self.sealed:
            journals = self.paths.journals()
            self._commits = Commits.read(self.spec.cells, journals, self.spec.fingerprint)

    # Opening.

    def _find_sealed(self, *, overwrite: bool) -> bool:
        """Whether the shard is finished and nothing of its writing is left; needs no lock.

        Raises FingerprintMismatch at once: that is so whoever holds the lock.
        """
        paths = self.paths
        leftovers = paths.journal.exists() or paths.lock.exists() or paths.owner.exists()
        try:
            found = Found.at(paths)
            if decide(found, self.spec, overwrite=False) == "sealed" and not leftovers:
                self._set_sealed(found.manifest)
        except FingerprintMismatch:
            if not overwrite:
                raise
        except StoreError:
            pass  # looked at again under the lock: a run that seals just now looks odd from outside
        return self.sealed

    def _set_sealed(self, manifest: Manifest | None) -> None:
        self._manifest, self.sealed = manifest, True
        self.recovery = Recovery(rows_kept=self.spec.rows)

    def _open(self, *, overwrite: bool) -> None:
        self._hold.lock()
        found, corrupt = _look(self.paths, overwrite)
        action = "replace" if corrupt else decide(found, self.spec, overwrite=overwrite)
        if action == "unseal" and not self._is_ours():
            action = self._refuse_final(overwrite)
        if action == "sealed":
            self._set_sealed(found.manifest)
            self._finish()
            return
        self._hold.take_over(found.manifest)
        if action in ("new", "replace"):
            self._start_afresh(found.manifest)
        elif action == "unseal":
            move(self.paths.final, self.paths.partial)
        self._begin(found.manifest if action in ("resume", "unseal") else None)

    def _start_afresh(self, manifest: Manifest | None) -> None:
        """Remove what is there. Said first in the manifest: a crash half-way is then no riddle."""
        if manifest is not None:
            manifest.with_state(DISCARDED).write()
        remove_contents(self.paths)

    def _is_ours(self) -> bool:
        """Whether the file at the final name can be our data: named, then crashed before sealed."""
        journals = self.paths.journals()
        return bool(Commits.read(self.spec.cells, journals, self.spec.fingerprint).done.all())

    def _refuse_final(self, overwrite: bool) -> Action:
        if overwrite:
            return "replace"
        raise StoreError(
            f"{self.spec.path} was put there while its store was not finished; move it away, or "
            "--overwrite to replace it"
        )

    def _begin(self, manifest: Manifest | None) -> None:
        """Manifest, data file, committed cells."""
        created = manifest.fields["created"] if manifest else utc_now()
        self._manifest = writing_manifest(
            self.spec, run_id=self.run_id, epoch=self.epoch, created=created
        )
        try:
            self._manifest.write()
            self._open_data()
        except (NoSpace, OSError):
            if manifest is None:  # new, and it does not fit: as if never begun
                remove([self.paths.partial, self.paths.manifest])
                self._hold.disown()
                tidy(self.paths)
            raise
        self._commits, self.recovery = recover(
            self.spec, self._data, epoch=self.epoch, threads=self._threads
        )

    def _open_data(self) -> None:
        # Kept open to the end: an error of the kernel's own write-back is then reported to our
        # fdatasync when sealing, whoever wrote the page.
        self._data = os.open(self.paths.partial, os.O_RDWR | os.O_CREAT, 0o666)
        if os.fstat(self._data).st_size > self.spec.nbytes:
            raise StoreCorrupt(
                f"{self.paths.partial} is larger than the {self.spec.nbytes} bytes of its store; "
                "--overwrite to extract it again"
            )
        self._preallocation = preallocate(self._data, self.paths.partial, self.spec.nbytes)
        header = self.spec.header
        if os.pread(self._data, len(header), 0) != header:
            pwrite_all(self._data, header, 0)
        os.fsync(self._data)
        fsync_dir(self.paths.folder)

    # Sealing.

    def seal(self, *, verify: bool = False) -> Path:
        """Finish the shard; its final path. verify: read all data back first, not only the cells
        that more than one worker may have written.

        Raises StoreError when rows are missing: `missing` then names them, and writing can go on.
        """
        if self.sealed:
            return self.paths.final
        if not self._hold.admits_writers:
            raise StoreError(f"{self.spec.path} is closed; open it for writing again")
        with explain_os_errors(self.paths.folder, 400 * self.spec.rows):
            self._hold.raise_fence(closed=True)
            self._check_complete(verify)
            os.fsync(self._data)
            self._write_sealed()
            self.sealed = True
            self._finish()
        return self.paths.final

    def _check_complete(self, verify: bool) -> None:
        self.refresh()
        cells = np.arange(len(self.spec.cells)) if verify else np.array(self._commits.disputed, int)
        rejected = check_cells(self._commits, self._data, cells, self._threads)
        rows_missing = self.spec.rows - self._commits.rows_done
        if rows_missing:
            self._hold.raise_fence()
            lo, hi = self._commits.missing()[0]
            raise StoreError(
                f"{self.spec.path} cannot be sealed: {rows_missing} of {self.spec.rows} rows are "
                f"not committed, first [{lo}, {hi}), {len(rejected)} ranges have other bytes than "
                "committed; write what missing() gives"
            )

    def _write_sealed(self) -> None:
        assert self._manifest is not None
        table = RowTable.of(self.spec.rows, self._commits.lines())
        index = index_bytes(self.spec.names, table)
        fields = {
            **self._manifest.fields,
            "state": SEALED,
            "sealed": utc_now(),
            "preallocation": self._preallocation,
            "index": {"file": self.paths.index.name, "xxh3_128": xxhash.xxh3_128_hexdigest(index)},
            "invalid_rows": len(table.reasons),
            **sealed_fields(self._commits, self.spec.dtype, self.spec.header),
        }
        write_atomic(self.paths.index, index)
        if self.paths.partial.exists():  # not when an earlier try got this far
            move(self.paths.partial, self.paths.final)
        self._manifest = Manifest(self.paths.manifest, fields)
        self._manifest.write()

    # Letting go.

    def _finish(self) -> None:
        """Remove what only writing needs; a crash in here leaves a sealed store with leftovers."""
        tidy(self.paths)
        self._hold.disown()
        self.close()

    def close(self) -> None:
        """Let the shard go, sealed or not; what is committed stays for the next run."""
        self._close_data()
        self._hold.release()

    def _close_data(self) -> None:
        if self._data >= 0:
            os.close(self._data)
            self._data = -1

    def __enter__(self) -> ShardRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _look(paths: ShardPaths, overwrite: bool) -> tuple[Found, bool]:
    """What is there, and whether its manifest is past reading (an error unless ``overwrite``)."""
    try:
        return Found.at(paths), False
    except StoreCorrupt:
        if not overwrite:
            raise
    return Found(manifest=None, partial_bytes=None, final_bytes=None), True
