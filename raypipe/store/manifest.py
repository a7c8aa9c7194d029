"""The manifest: a shard's description in JSON, and its state (writing, sealed, discarded).

Written by `run`, always whole (`durable.write_atomic`); read by everyone. Its text is the place
where a person looks first, so it says what things are, not only what they weigh.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from raypipe.errors import FingerprintMismatch, StoreCorrupt
from raypipe.store.checksum import ALGORITHM
from raypipe.store.commits import Commits
from raypipe.store.durable import write_atomic
from raypipe.store.layout import FILE_DTYPES, CellGrid, array_bytes
from raypipe.store.schema import FORMAT, FORMAT_VERSION, ShardSpec, differences, fingerprint_of

WRITING, SEALED, DISCARDED = "writing", "sealed", "discarded"

_ESSENCE = ("shape", "dtype", "grid", "data_offset", "names_digest", "identity")
_BASE = {*_ESSENCE, "file", "bytes", "fingerprint", "token_layout", "provenance", "created"}
_KEYS = {
    WRITING: _BASE,
    DISCARDED: _BASE,
    SEALED: _BASE | {"checksums", "narrowing", "halved", "invalid_rows", "index", "sealed"},
}


@dataclass(frozen=True)
class Manifest:
    """The parsed manifest of one shard; ``fields`` is the JSON as it stands."""

    path: Path
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """The manifest at ``path``, None when there is none; StoreCorrupt when not readable."""
        try:
            fields = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreCorrupt(f"{path} is not JSON ({error}); extract with --overwrite") from None
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise StoreCorrupt(f"{path} is no manifest of a {FORMAT}; move it out of the way")
        if fields.get("version") != FORMAT_VERSION:
            raise StoreCorrupt(
                f"{path} has format version {fields.get('version')}, this raypipe reads "
                f"{FORMAT_VERSION}; use the raypipe that wrote it, or extract again"
            )
        manifest = cls(path, fields)
        manifest._check_essence()
        return manifest

    def _check_essence(self) -> None:
        absent = _KEYS[self.state] - self.fields.keys() if self.state in _KEYS else {"state"}
        if absent:
            raise StoreCorrupt(f"{self.path} lacks {', '.join(sorted(absent))}; extract again")
        if fingerprint_of(self.essence) != self.fingerprint:
            raise StoreCorrupt(
                f"{self.path} was changed by hand: its fingerprint is not that of its contents; "
                "put the original back, or extract with --overwrite"
            )

    @property
    def state(self) -> str:
        """``writing``, ``sealed`` or ``discarded``."""
        return str(self.fields.get("state"))

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides the bytes."""
        return str(self.fields["fingerprint"])

    @property
    def essence(self) -> dict[str, Any]:
        """What the fingerprint is taken over, as `ShardSpec.essence`."""
        return {"format_version": self.fields["version"]} | {k: self.fields[k] for k in _ESSENCE}

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape)."""
        return tuple(self.fields["shape"])

    @property
    def dtype(self) -> str:
        """Logical dtype: float32, float16 or bfloat16."""
        return str(self.fields["dtype"])

    @property
    def cells(self) -> CellGrid:
        """The grid of cells."""
        return CellGrid(
            rows=self.shape[0],
            grid=self.fields["grid"],
            row_bytes=array_bytes(FILE_DTYPES[self.dtype], self.shape[1:]),
            data_offset=self.fields["data_offset"],
        )

    @property
    def checksums(self) -> list[int]:
        """xxh3_64 of each cell of a sealed shard."""
        return [int(value, 16) for value in self.fields["checksums"]["values"]]

    def check_same(self, spec: ShardSpec) -> None:
        """Raise FingerprintMismatch, naming what differs, unless ``spec`` made this shard."""
        if self.fingerprint == spec.fingerprint:
            return
        found = list(differences(self.essence, spec.essence))
        named = {"grid": "grid (--batch-size)"}
        said = "; ".join(
            f"{named.get(key, key)} is {_brief(old)}, asked {_brief(new)}"
            for key, old, new in found
        )
        raise FingerprintMismatch(
            f"{spec.path} was made with another configuration: {said}; choose another output "
            "folder, or --overwrite to replace it"
        )

    def with_state(self, state: str) -> Manifest:
        """The same in another state."""
        return Manifest(self.path, {**self.fields, "state": state})

    def write(self) -> None:
        """Put it on the disk, whole and durably."""
        text = json.dumps(self.fields, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(self.path, text.encode() + b"\n")


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def writing_manifest(spec: ShardSpec, *, run_id: str, epoch: int, created: str) -> Manifest:
    """The manifest of a shard that is being written."""
    fields = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "state": WRITING,
        "file": spec.path.name,
        "shape": list(spec.shape),
        "dtype": spec.dtype,
        "dtype_in_file": FILE_DTYPES[spec.dtype].str,
        "bytes": spec.nbytes,
        "grid": spec.grid,
        "fingerprint": spec.fingerprint,
        "data_offset": len(spec.header),
        "names_digest": spec.essence["names_digest"],
        "identity": spec.identity,
        "token_layout": spec.token_layout,
        "provenance": spec.provenance,
        "run_id": run_id,
        "epoch": epoch,
        "created": created,
    }
    return Manifest(spec.paths.manifest, fields)


def sealed_fields(commits: Commits, dtype: str, header: bytes) -> dict[str, Any]:
    """What is known about the contents once all cells are committed."""
    worst = commits.worst_error()
    narrowing = {
        "from": "float32",
        "to": dtype,
        "max_relative_error": worst.relative,
        "max_relative_error_normal_range": worst.relative_normal,
        "max_absolute_error": worst.absolute,
    }
    return {
        "checksums": {
            "algorithm": ALGORITHM,
            "header": xxhash.xxh3_64_hexdigest(header),
            "rows": commits.grid.grid,
            "values": [f"{int(value):016x}" for value in commits.checksum],
        },
        "narrowing": None if dtype == "float32" else narrowing,
        "halved": commits.halved(),
    }
