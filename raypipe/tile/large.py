"""``raypipe.process_large_image``: a model on an image of any size, in one call."""

from __future__ import annotations

import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from raypipe.errors import InputError, UnknownName
from raypipe.runner import LocalRunner, Runner
from raypipe.tile.config import TileConfig
from raypipe.tile.engine import infer
from raypipe.tile.source import ArraySource, StackSource, open_source

if TYPE_CHECKING:
    from raypipe.tile.worker import After, Prepare


def process_large_image(
    input: Any,  # the name that callers know
    model: nn.Module,
    chunk_size: int = 512,
    output: str | os.PathLike[str] | None = None,
    *,
    axes: str | None = None,
    dims: int | None = None,
    prepare: Prepare | None = None,
    after: After | None = None,
    runner: Runner | None = None,
    **options: Any,
) -> Any:
    """The result of ``model`` on ``input``, equal to that of the whole image, computed tile by tile.

    input      : a path (TIFF, PNG, .npy, .zarr), an ``ImageSource``, or an array, of which only
                 windows are read
    chunk_size : pixels of a tile; memory depends on it, not on the image
    output     : .npy, .tif, .ome.tif or .zarr, written tile by tile; the same call goes on after a
                 crash. Without it the result is held in memory
    axes       : of an array or TIFF, e.g. "YX", "YXC", "CYX", "FYX" (frames), "ZYX", "FZYX"; without
                 them each page of a TIFF is an image, with dims=3 a plane
    dims       : 2 (planes one by one) or 3; by the model's convolutions when left out
    prepare    : pointwise, on a window (channels, *space); after : pointwise, on the model's output
    options    : of ``TileConfig``: batch, halo, align, blend, overlap, device, workers, overwrite

    Returns an array, (frames, channels, *space) less the axes that there are not: a NumPy array
    without ``output``; of .npy a read-only map; of .zarr the Zarr array; of TIFF ``load_tiff_stack``'s.
    Raises UnknownName for another option, InputError when the model cannot be tiled exactly, unless
    ``blend`` is given.
    """
    known = [each.name for each in fields(TileConfig)]
    for name in options:
        if name not in known:
            raise UnknownName.of("option", name, known)
    cfg = TileConfig(chunk_size=chunk_size, **options)
    source = open_source(input, dims or _dims(model), axes)
    frames = "F" in source.axes if isinstance(source, ArraySource) else _many(source)
    with tempfile.TemporaryDirectory(prefix="raypipe-tiles-") as folder:
        path = Path(folder) / "result.npy" if output is None else Path(output)
        infer(
            source,
            model,
            path.absolute(),
            cfg,
            runner or LocalRunner(),
            keep_frames=frames,
            prepare=prepare,
            after=after,
        )
        return np.load(path) if output is None else _opened(path)


def _many(source: Any) -> bool:
    return not (isinstance(source, StackSource) and source.frames == 1)


def _dims(model: nn.Module) -> int:
    """Raises InputError where the convolutions do not tell."""
    volumes = any(isinstance(part, (nn.Conv3d, nn.ConvTranspose3d)) for part in model.modules())
    planes = any(isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)) for part in model.modules())
    if volumes == planes:
        raise InputError(
            "the model has 2-D and 3-D convolutions, or none: say dims=2 (planes) or dims=3 (volumes)"
        )
    return 3 if volumes else 2


def _opened(path: Path) -> Any:
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    if path.suffix == ".zarr":
        import zarr

        return zarr.open_array(str(path), mode="r")
    from raypipe.read.tiff import load_tiff_stack

    return load_tiff_stack(path)
