"""What an extraction is asked to do; which features of an image is ``backbone.options``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from raypipe.backbone.options import FeatureOptions


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(FeatureOptions):
    """Extract image features into memory-mapped stores that resume after any crash."""

    rehearses: ClassVar[bool] = True  # a dry run computes a little, and so needs a runner

    data_dir: Path
    """Folder that holds subj01, subj02, … (Algonauts layout), one subject's own folder, or plain images."""
    output_dir: Path
    """Root of the stores: OUTPUT_DIR/FEATURE/SUBJECT/{train,synt}.npy."""
    subj: tuple[str, ...] = ()
    """Subjects, e.g. 01 02; all that are there when left out. For plain images: the store's name."""
    split: tuple[Literal["train", "test"], ...] = ()
    """Splits, all that are there when left out; test is stored as synt.npy, as in users' layout."""
    layout: Literal["auto", "algonauts", "folder"] = "auto"
    """How data-dir is laid out; auto takes a folder with images directly in it as plain images."""
    batch_size: int = 16
    """Images a forward pass. Rows are computed on this fixed grid, so a store keeps to its size."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    workers: int | None = None
    """Actors: by default one a GPU on CUDA, and one that uses all cores on a CPU."""
    overwrite: bool = False
    """Replace stores made with another configuration or from other images, instead of refusing."""
    dry_run: bool = False
    """Print rows, shapes and disk, rehearse on a few images for memory and time, and stop."""

    def __post_init__(self) -> None:
        self._check_counts("batch_size", "decode_threads", "workers", "image_size")
