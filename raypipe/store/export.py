"""A sealed store in another format: space asked for first, checked while read, renamed when whole.

Streamed in the memory of a few blocks. A crash leaves the temporary name only (``.OUT.raypipe-partial``),
which the same command removes and begins again; what was at OUT stays until the new one is whole.
How a format lies on the disk is `formats`' business.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from raypipe.errors import ConfigError, StoreError
from raypipe.store.blocks import IndexCursor, checked_blocks
from raypipe.store.durable import fsync_dir, make_dirs
from raypipe.store.flocks import held
from raypipe.store.formats import FORMATS, Block, Contents, Format, FormatOptions
from raypipe.store.layout import ShardPaths
from raypipe.store.manifest import Manifest
from raypipe.store.narrow import from_bfloat16
from raypipe.store.reader import FeatureStore
from raypipe.store.space import explain_os_errors, require_space


@dataclass(frozen=True, kw_only=True)
class Export:
    """A planned export; need_bytes: at most so much is written to the disk of ``out``."""

    store: Path
    manifest: Manifest
    format: Format
    out: Path
    overwrite: bool
    widen: bool

    @property
    def need_bytes(self) -> int:
        """Bytes that the disk must have."""
        return self.format.need_bytes()


def plan_export(
    store: Path,
    to: str,
    out: Path,
    *,
    float32: bool = False,
    options: FormatOptions | None = None,
    overwrite: bool = False,
) -> Export:
    """Open ``store`` and say what will be written; nothing is.

    float32: float16 and bfloat16 are widened, exactly. Raises MissingInput, StoreNotSealed,
    StoreCorrupt, ConfigError (options, a missing package), StoreError (something is at ``out``).
    """
    opened = FeatureStore.open(store)
    paths = ShardPaths.of(store)
    dtype = opened.logical_dtype
    if float32 and dtype not in ("float32", "float16", "bfloat16"):
        raise ConfigError(
            f"{store} holds {dtype}, which float32 does not hold exactly; leave it out"
        )
    manifest = Manifest.read(paths.manifest)
    assert manifest is not None  # it was opened just now
    cursor = IndexCursor(paths.index)
    cursor.close()
    if cursor.rows != len(opened):
        raise StoreError(
            f"{paths.index} has {cursor.rows} rows, the store {len(opened)}; restore it"
        )
    contents = Contents(
        name=store.stem,
        shape=opened.shape,
        dtype="float32" if float32 else dtype,
        facts=_facts(opened, to, "float32" if float32 else dtype),
        index=paths.index,
        index_bytes=cursor.plain_bytes,
    )
    made = FORMATS[to](contents, options or FormatOptions())
    plan = Export(
        store=store,
        manifest=manifest,
        format=made,
        out=out,
        overwrite=overwrite,
        widen=float32 and dtype != "float32",
    )
    _check_target(plan)
    return plan


def _facts(store: FeatureStore, to: str, dtype: str) -> dict[str, object]:
    return {
        "format": to,
        "dtype": dtype,
        "shape": list(store.shape),
        "fingerprint": store.fingerprint,
        "invalid_rows": store.manifest["invalid_rows"],
        "identity": store.manifest["identity"],
        "token_layout": store.manifest["token_layout"],
    }


def export_store(plan: Export, progress: Callable[[int], None] = lambda rows: None) -> Path:
    """Write it; ``progress`` is told of rows. What is at ``out`` is replaced at the end only.

    Raises NoSpace, StoreCorrupt (damaged rows are not exported), StoreLocked (the same export runs
    already), StoreError.
    """
    out, need = plan.out, plan.need_bytes
    temporary = out.with_name(f".{out.name}.raypipe-partial")
    with explain_os_errors(out, need):
        make_dirs(out.parent)
        lock = out.with_name(f".{out.name}.raypipe-lock")
        with held(lock, f"{out} is being written by another export; wait for it"):
            _remove(temporary)
            _restore(out)
            _check_target(plan)
            require_space({out: need})
            try:
                plan.format.write(temporary, _blocks(plan, progress))
                _put(temporary, out)
            except BaseException:
                with contextlib.suppress(OSError):
                    _remove(temporary)
                raise
    return out


def _blocks(plan: Export, progress: Callable[[int], None]) -> Iterator[Block]:
    cursor = IndexCursor(plan.format.contents.index)
    try:
        for lo, values in checked_blocks(plan.store, plan.manifest, plan.format.block_rows):
            index = cursor.take(len(values))
            if plan.widen:
                bfloat16 = plan.manifest.dtype == "bfloat16"
                values = from_bfloat16(values) if bfloat16 else values.astype("<f4")
            yield Block(lo, values, index)
            progress(len(values))
    finally:
        cursor.close()


def _check_target(plan: Export) -> None:
    """Refuse to replace what was not asked for, or is not an export."""
    out = plan.out
    beside = [out.with_suffix(".manifest.json"), out.with_suffix(".journal")]
    if out.suffix == ".npy" and any(path.exists() for path in beside):
        raise StoreError(f"{out} is a store; choose another --out")
    if out.is_dir() and not any(out.iterdir()) and plan.format.folder:
        return
    if not out.exists() and not out.is_symlink():
        return
    if not plan.overwrite:
        raise StoreError(f"{out} is there already; choose another --out, or --overwrite")
    if out.is_dir() and not (plan.format.folder and plan.format.made(out)):
        raise StoreError(f"{out} is a folder that is no such export; remove it yourself")


def _put(temporary: Path, out: Path) -> None:
    """Give the whole export its name; a folder cannot be replaced in one step."""
    old = _old(out)
    if out.is_dir() and not out.is_symlink():
        out.replace(old)
    elif temporary.is_dir() and (out.exists() or out.is_symlink()):
        out.unlink()
    temporary.replace(out)
    fsync_dir(out.parent)
    _remove(old)


def _restore(out: Path) -> None:
    """A crash between the two renames of `_put` left the earlier export under its other name."""
    old = _old(out)
    if out.exists():
        _remove(old)
    elif old.exists():
        old.replace(out)
        fsync_dir(out.parent)


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.raypipe-old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
