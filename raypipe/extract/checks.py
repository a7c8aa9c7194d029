"""What can be refused before a model is loaded: locked stores, full disks, changed images.

Each check here is made again, for good, by the store when it is opened; here it costs no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raypipe.errors import FingerprintMismatch, MissingInput, StoreError, StoreLocked
from raypipe.extract.plan import Group
from raypipe.read import Undecodable, try_read_image
from raypipe.store import FeatureStore, describe


def check_unfinished(path: Path, device: str, *, overwrite: bool) -> None:
    """Raises StoreLocked when a living run writes ``path``, FingerprintMismatch when it was begun
    on another kind of device: one file would then hold two arithmetics.
    """
    try:
        facts = describe(path)
    except (MissingInput, StoreError):
        return  # new, or damaged: opening it will say
    owner = facts.get("owner")
    if facts["state"] == "sealed":
        return
    if owner and owner["alive"]:
        raise StoreLocked(
            f"{path} is being written by pid {owner['pid']} on {owner['host']} since "
            f"{owner['started']} ({owner['command']}); wait for it, or use another "
            "--output-dir"
        )
    begun = facts["provenance"].get("device_type")
    if begun and begun != device and not overwrite:
        raise FingerprintMismatch(
            f"{path} was begun on {begun}, this run computes on {device}: rows would differ in "
            f"their last bits; give --device {begun} to go on, or another --output-dir"
        )


def changed_images(path: Path, group: Group) -> list[str]:
    """Names whose files are not what the sealed store at ``path`` was made from.

    Sizes are compared for all; of rows that could not be read, the digest too, so that a mended
    image is seen.
    """
    table = FeatureStore.open(path).index
    rows = zip(
        group.paths,
        table["size_bytes"].to_pylist(),
        table["valid"].to_pylist(),
        table["digest"].to_pylist(),
        strict=True,
    )
    return [image.name for image, *recorded in rows if _changed(image, *recorded)]


def _changed(image: Path, size_bytes: int, valid: bool, digest: str) -> bool:
    try:
        if image.stat().st_size != size_bytes:
            return True
    except OSError:
        return True
    if valid:
        return False
    now = try_read_image(image)
    return not isinstance(now, Undecodable) or now.digest != digest


def changed_error(path: Path, changed: Sequence[str]) -> StoreError:
    """What to raise for ``changed_images``."""
    return StoreError(
        f"{path} was made from other files: {len(changed)} image(s) changed since, first "
        f"{changed[0]}; give --overwrite to extract it again, or another --output-dir"
    )


def bad_rows(path: Path) -> list[tuple[str, str]]:
    """(image, reason) of the invalid rows of a sealed store."""
    store = FeatureStore.open(path)
    if store.valid.all():
        return []
    table = store.index
    return [
        (name, reason)
        for name, valid, reason in zip(
            store.names, table["valid"].to_pylist(), table["reason"].to_pylist(), strict=True
        )
        if not valid
    ]
