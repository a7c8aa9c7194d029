"""Which images become which rows of which stores, and how the rows are cut into work items.

Pure but for reading folder listings and one image header.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raypipe.backbone.spec import safe_name
from raypipe.errors import ConfigError, InputError, MemoryBudgetExceeded, MissingInput
from raypipe.extract.config import ExtractConfig
from raypipe.read import (
    AlgonautsSubject,
    ImageFolder,
    available_subjects,
    first_size,
    list_images,
    normalise_subject,
)

# A work item is about this many bytes of rows: large enough that its fdatasync is hidden behind
# the next item's forward pass, small enough that little is lost with a killed worker.
ITEM_BYTES = 32 * 1024**2
# Also at the end of a run the workers should run dry together.
MIN_ITEMS_PER_WORKER = 4
LESS_MEMORY = "take a smaller --image-size or backbone, fewer --workers, or a larger machine"


@dataclass(frozen=True)
class Group:
    """The images of one subject and split, in row order.

    subject : folder below the feature's, "01"; shard : file name without suffix, "train".
    """

    subject: str
    shard: str
    paths: tuple[Path, ...]

    @property
    def key(self) -> str:
        return f"{self.subject}/{self.shard}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(path.name for path in self.paths)


@dataclass(frozen=True)
class RangeItem:
    """Rows [lo, hi) of one group, whole cells of the batch grid; carries its own image paths."""

    group: str
    lo: int
    hi: int
    grid: int
    paths: tuple[Path, ...]
    attempt: int = 1
    batch_limit: int | None = None

    @property
    def key(self) -> tuple[str, int]:
        return (self.group, self.lo)

    def again(self) -> RangeItem:
        """The same rows, handed out once more; sealing then checks them against the disk."""
        return replace(self, attempt=self.attempt + 1)

    def with_less_memory(self) -> RangeItem:
        """As ``again`` with half the batch; raises MemoryBudgetExceeded at one image a batch."""
        batch = min(self.batch_limit or self.grid, self.hi - self.lo)
        if batch == 1:
            raise MemoryBudgetExceeded(
                f"a worker ran out of memory with one image a batch (rows {self.lo} to {self.hi} of "
                f"{self.group}); {LESS_MEMORY}"
            )
        return replace(self.again(), batch_limit=batch // 2)

    def at_most(self, other: RangeItem) -> RangeItem:
        """The same rows, with no larger a batch than ``other`` is limited to."""
        limits = [item.batch_limit for item in (self, other) if item.batch_limit is not None]
        return replace(self, batch_limit=min(limits)) if limits else self

    def cells(self) -> Iterator[tuple[int, tuple[Path, ...]]]:
        """(first row, its images) for each cell of the grid."""
        for lo in range(self.lo, self.hi, self.grid):
            hi = min(lo + self.grid, self.hi)
            yield lo, self.paths[lo - self.lo : hi - self.lo]


def find_groups(cfg: ExtractConfig) -> tuple[Group, ...]:
    """The groups that ``cfg`` names. Raises MissingInput, UnknownName, ConfigError."""
    if cfg.layout == "folder" or (cfg.layout == "auto" and _holds_images(cfg.data_dir)):
        return (_folder_group(cfg),)
    subjects = cfg.subj or available_subjects(cfg.data_dir)
    if not subjects:
        raise MissingInput(
            f"--data-dir {cfg.data_dir} holds neither subjNN folders nor images; give the folder "
            "that holds subj01, subj02, …, one subject's own folder, or a folder of images"
        )
    groups = []
    for name in dict.fromkeys(normalise_subject(subj) for subj in subjects):
        subject = AlgonautsSubject.open(cfg.data_dir, name)
        for split in dict.fromkeys(cfg.split or subject.splits):
            shard, paths = subject.shard_name(split), subject.image_paths(split)
            groups.append(Group(subject.subj, shard, paths))
    return tuple(groups)


def _folder_group(cfg: ExtractConfig) -> Group:
    """A plain folder is one subject, named as the folder or by ``--subj``, with one split."""
    if len(cfg.subj) > 1 or "test" in cfg.split:
        raise ConfigError(
            f"--data-dir {cfg.data_dir} holds plain images: one --subj (a name for the store) at "
            "most, and no test split; extract a second folder by a second command"
        )
    name = cfg.subj[0] if cfg.subj else cfg.data_dir.resolve().name
    if name != safe_name(name):
        raise ConfigError(f"{name!r} cannot name a folder of the store; give --subj, e.g. 01")
    return Group(name, "train", ImageFolder.open(cfg.data_dir).image_paths("train"))


def image_hw(groups: Sequence[Group]) -> tuple[int, int]:
    """Height and width in pixels of the first image that can be read; others must equal it,
    unless the backbone resizes. Raises BadImage when none can be read.
    """
    return first_size(path for group in groups for path in group.paths)


def cut_items(
    group: Group,
    missing: Sequence[tuple[int, int]],
    *,
    grid: int,
    row_bytes: int,
    workers: int,
) -> list[RangeItem]:
    """Cut the missing ranges (aligned to ``grid``) into items of whole grid cells."""
    rows_missing = sum(hi - lo for lo, hi in missing)
    by_bytes = ITEM_BYTES // max(row_bytes * grid, 1)
    by_share = rows_missing // (grid * workers * MIN_ITEMS_PER_WORKER)
    step = grid * max(1, min(by_bytes, by_share))
    items = []
    for first, last in missing:
        if first % grid:
            raise InputError(f"missing range starts at row {first}, not on the grid of {grid}")
        for lo in range(first, last, step):
            hi = min(lo + step, last)
            items.append(RangeItem(group.key, lo, hi, grid, group.paths[lo:hi]))
    return items


def union(parts: Sequence[Sequence[tuple[int, int]]]) -> list[tuple[int, int]]:
    """The union of several lists of ranges, sorted and merged."""
    merged: list[tuple[int, int]] = []
    for lo, hi in sorted(span for part in parts for span in part):
        if merged and lo <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
        else:
            merged.append((lo, hi))
    return merged


def _holds_images(folder: Path) -> bool:
    """True for a folder with images directly in it and no subject below."""
    if not folder.is_dir() or (folder / "training_split").is_dir():
        return False
    if any(folder.glob("subj*/")):
        return False
    try:
        list_images(folder)
    except InputError:
        return False
    return True
