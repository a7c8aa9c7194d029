"""A plain folder of images as a data source, and what every image source answers.

The Algonauts layout, with responses and ROIs, is next door in ``algonauts.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raypipe.errors import UnknownName
from raypipe.read.images import list_images


class ImageSource(Protocol):
    """What an extraction asks of a data set; ``key`` names its folder in a feature store."""

    @property
    def key(self) -> str: ...

    @property
    def splits(self) -> tuple[str, ...]: ...

    def image_paths(self, split: str = "train") -> tuple[Path, ...]: ...

    def shard_name(self, split: str = "train") -> str: ...


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images: one subject with one split, "train"."""

    root: Path

    @classmethod
    def open(cls, folder: Path) -> ImageFolder:
        """The folder as a source; raises MissingInput when it is absent or holds no image."""
        source = cls(Path(folder))
        source.image_paths()
        return source

    @property
    def key(self) -> str:
        """The folder's own name, with characters that are safe in a path."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.root.resolve().name).strip(".-") or "images"

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train",)

    def image_paths(self, split: str = "train") -> tuple[Path, ...]:
        """The images in row order: sorted by file name."""
        self.shard_name(split)
        return list_images(self.root)

    def shard_name(self, split: str = "train") -> str:
        """The split's file in a store, without suffix."""
        if split != "train":
            raise UnknownName.of("split", split, ("train",), "an image folder has one split")
        return "train"
