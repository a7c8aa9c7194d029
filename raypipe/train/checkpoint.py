"""Checkpoints: folders that are whole or were never there, and the search for the newest whole one.

    RUN/last/     model.pt  state.pt  meta.json    all that resuming needs
    RUN/last-1/   the generation before, and so on: ``TrainConfig.keep`` of them
    RUN/best/     model.pt  meta.json              weights of the epoch of lowest val_loss

A folder is written under another name, flushed to disk, then renamed; meta.json holds size and xxh3
of each file, so a torn or bit-rotten one is seen. Both .pt files hold plain tensors and values and
are loaded with ``weights_only=True``. What goes into them is `raypipe.train.engine`'s. torch comes
with the first one that is written or loaded: a process that asks where a run stands waits for none.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from raypipe.errors import MissingInput, NoSpace, StoreCorrupt

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)
_META = "meta.json"
_FORMAT = ("raypipe-checkpoint", 1)
# torch says no more than "write failed": with less than this free, the disk was the reason.
_SLACK = 1 << 20
_GENERATION = re.compile(r"(last|best)(?:-(\d+))?\Z")


@dataclass(frozen=True)
class Found:
    """A checkpoint folder whose files were seen to be whole, and its meta.json."""

    path: Path
    meta: dict[str, Any]

    def load(self, name: str) -> Any:
        """The content of ``NAME.pt``, on the CPU."""
        import torch

        return torch.load(self.path / f"{name}.pt", map_location="cpu", weights_only=True)

    @property
    def epoch(self) -> int | None:
        """Of the weights, from 0: the last one that was validated, or the one after it, where steps of that
        are in them, or all its steps and no validation. None before the first epoch's steps are done.
        """
        progress = self.meta.get("progress", {})
        history, owes = progress.get("history", []), progress.get("owes_validation", False)
        if not history:
            return 0 if owes else None
        return int(history[-1]["epoch"]) + (owes or progress.get("step", 0) > 0)


def save(
    run_dir: Path, name: str, contents: Mapping[str, Any], meta: Mapping[str, Any], keep: int = 1
) -> Path:
    """Write RUN/name from ``contents`` (file stem -> what torch.save takes) and ``meta``.

    Keeps ``keep`` generations. Raises NoSpace when the disk is full; the older generations and the
    present one are then untouched.
    """
    staging = run_dir / f".{name}.writing"
    shutil.rmtree(staging, ignore_errors=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    needed = _tensor_bytes(contents)
    _require_space(run_dir, needed)
    try:
        staging.mkdir()
        files = {f"{stem}.pt": _write(staging / f"{stem}.pt", c) for stem, c in contents.items()}
        record = {"format": _FORMAT[0], "version": _FORMAT[1], "files": files, **meta}
        _write_bytes(staging / _META, json.dumps(record, indent=1).encode())
        _sync_folder(staging)
    except (OSError, RuntimeError) as error:  # torch wraps a failed write in RuntimeError
        explained = _explained(error, run_dir, needed)  # before staging gives its bytes back
        shutil.rmtree(staging, ignore_errors=True)
        raise explained from error
    _rotate(run_dir, name, keep, staging)
    return run_dir / name


def newest(run_dir: Path, name: str = "last") -> Found | None:
    """The newest whole generation of RUN/name; None when there never was one.

    A damaged one is passed over with a logged warning. Raises StoreCorrupt when there are
    generations and none is whole: a run never starts over by itself.
    """
    candidates = _generations(run_dir, name)
    problems: list[str] = []
    for path in candidates:
        meta, problem = _inspect(path)
        if meta is not None:
            if problems or path.name != name:
                _log.warning("resuming from %s: %s", path, "; ".join(problems) or f"no {name}/")
            return Found(path, meta)
        problems.append(problem)
    if candidates:
        raise StoreCorrupt(
            f"{'; '.join(problems)}: no checkpoint in {run_dir} is whole; restore one, or start "
            "over: a new run folder, or --no-resume"
        )
    return None


def load_model_state(path: Path | str) -> dict[str, Tensor]:
    """The model's state_dict, on the CPU, for evaluation.

    ``path``: a run folder (its best epoch) or a checkpoint folder (RUN/best, RUN/last). Raises
    MissingInput when there is none, StoreCorrupt when it is damaged.
    """
    return find_checkpoint(path).load("model")


def find_checkpoint(path: Path | str) -> Found:
    """The one that `load_model_state` reads, with its meta.json (epoch, metrics, ...): checked once, and
    weights and meta of one generation. Raises as `load_model_state`.
    """
    path = Path(path)
    named = _GENERATION.match(path.name)
    found = newest(path.parent, named.group(1)) if named and not named.group(2) else None
    if found is None and (path / _META).exists():
        meta, problem = _inspect(path)
        if meta is None:
            raise StoreCorrupt(f"{problem}; choose another checkpoint, or train again")
        found = Found(path, meta)
    found = found or newest(path, "best")
    if found is None:
        raise MissingInput(f"{path} holds no checkpoint (best/ or last/); train first")
    return found


def discard(run_dir: Path) -> None:
    """Remove all checkpoints of a run that starts over."""
    for name in ("last", "best"):
        for path in _folders(run_dir, name):
            shutil.rmtree(path, ignore_errors=True)


def on_disk_bytes(run_dir: Path) -> int:
    """Bytes of all that `discard` would remove, half-written ones too."""
    found = [f for name in ("last", "best") for f in _folders(run_dir, name)]
    return sum(file.stat().st_size for folder in found for file in folder.glob("*"))


def _folders(run_dir: Path, name: str) -> list[Path]:
    return [*_generations(run_dir, name), run_dir / f".{name}.writing"]


def _generations(run_dir: Path, name: str) -> list[Path]:
    """Existing folders name, name-1, ... newest first."""
    if not run_dir.is_dir():
        return []
    matches = ((_GENERATION.match(path.name), path) for path in run_dir.iterdir())
    found = [(int(m.group(2) or 0), path) for m, path in matches if m and m.group(1) == name]
    return [path for _, path in sorted(found)]


def _rotate(run_dir: Path, name: str, keep: int, staging: Path) -> None:
    """Move each generation one down, the new one in front. A crash leaves whole ones everywhere."""
    generations = _generations(run_dir, name)
    if generations and generations[0].name == name:  # else a crash left the front place empty
        for path in reversed(generations):
            number = int(_generation_number(path)) + 1
            target = run_dir / f"{name}-{number}"
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
    staging.rename(run_dir / name)
    _sync_folder(run_dir)
    for path in _generations(run_dir, name)[keep:]:
        shutil.rmtree(path, ignore_errors=True)


def _generation_number(path: Path) -> int:
    match = _GENERATION.match(path.name)
    return int(match.group(2) or 0) if match else 0


def _inspect(path: Path) -> tuple[dict[str, Any] | None, str]:
    """(meta, "") of a whole checkpoint, or (None, what is wrong with it)."""
    try:
        meta = json.loads((path / _META).read_bytes())
        if (meta["format"], meta["version"]) != _FORMAT:
            return None, f"{path} is of another format than {_FORMAT}"
        for name, expected in meta["files"].items():
            if _digest(path / name) != expected:
                return None, f"{path / name} is not as it was written"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return None, f"{path} is damaged ({type(error).__name__}: {error})"
    return meta, ""


def _write(path: Path, content: Any) -> dict[str, Any]:
    import torch

    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    return _digest(path)


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> dict[str, Any]:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
    return {"size_bytes": path.stat().st_size, "xxh3_128": hasher.hexdigest()}


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_space(run_dir: Path, needed: int) -> None:
    """Raise NoSpace before anything is written that the disk cannot hold."""
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise NoSpace(_full(run_dir, needed, free))


def _explained(error: Exception, run_dir: Path, needed: int) -> Exception:
    """NoSpace for a write that a full disk ended, the error itself for any other."""
    free = shutil.disk_usage(run_dir).free
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, RuntimeError) and free < _SLACK):
        return NoSpace(_full(run_dir, needed, free))
    return error


def _full(run_dir: Path, needed: int, free: int) -> str:
    return (
        f"{run_dir}: the disk is full: a checkpoint needs about {needed} bytes, {free} are free; "
        "free space, then run the same command to resume"
    )


def _tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    from torch import Tensor

    if isinstance(content, Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, Mapping) else content
    return sum(map(_tensor_bytes, parts)) if isinstance(content, Mapping | list | tuple) else 0
