"""What an extraction is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from raypipe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
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
    backbone: str = "dinov2_q"
    """dinov2_q, dinov2_k, dinov2_v, dinov2, clip, resnet18, resnet50, timm:NAME or open_clip:NAME."""
    enc_layer: int = -1
    """Transformer block to take, counted from 0; negative counts from the end."""
    layer: tuple[str, ...] = ()
    """Module paths for timm: and open_clip: models; several share one forward pass, a store each."""
    weights: str = "pretrained"
    """pretrained (from the hub), random:SEED, or a local .safetensors, .pth or .pt file."""
    preprocess: Literal["default", "imagenet", "clip"] = "default"
    """Mean and std: the backbone's own, or another convention."""
    image_size: int | None = None
    """Resize and centre-crop to this square first; by default what the backbone declares."""
    batch_size: int = 16
    """Images a forward pass. Rows are computed on this fixed grid, so a store keeps to its size."""
    store_dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """Type on disk. float16 halves the store; the largest relative error it made is reported."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass (autocast for bf16 and fp16)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    workers: int | None = None
    """Actors: by default one a GPU on CUDA, and one that uses all cores on a CPU."""
    decode_threads: int | None = None
    """Threads a worker reads images ahead with: by default 2 on a CPU, 8 beside a GPU."""
    on_bad_image: Literal["mark", "fail"] = "mark"
    """An image that cannot be read keeps its row, marked invalid; fail stops the run instead."""
    overwrite: bool = False
    """Replace stores made with another configuration or from other images, instead of refusing."""
    dry_run: bool = False
    """Print rows, shapes and disk, rehearse on a few images for memory and time, and stop."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "decode_threads", "workers", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} is below 1; give 1 or more")
