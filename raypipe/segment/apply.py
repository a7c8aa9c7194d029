"""A fitted network on one picture: logits, and the objects in them.

A picture of few pixels is computed whole, a larger one by ``raypipe.tile``, whose tiles equal it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from raypipe.errors import MemoryBudgetExceeded
from raypipe.segment.instances import InstanceConfig, Labels, components, instances_of
from raypipe.segment.labels import Target
from raypipe.segment.metrics import predict_labels
from raypipe.segment.saved import SavedModel
from raypipe.tile import Field, TileConfig, process_large_image
from raypipe.tile.grid import reflected, round_up
from raypipe.tile.plan import field_of
from raypipe.tile.precision import exact_float32

# A U-Net of width 64 holds about 1.5 kB a pixel on the way: 1.5 GiB here.
MOST_WHOLE_PIXELS = 1 << 20
TILE = 768


def field_for(
    module: nn.Module, saved: SavedModel, shapes: Iterable[tuple[int, int]]
) -> Field | None:
    """How far ``module`` looks, for `logits_of` pictures of ``shapes`` (h, w); None when none needs tiles.

    Measured where its weights lie, some 50 passes: once for all pictures. Raises InputError for a
    network that cannot be tiled exactly.
    """
    if all(h * w <= MOST_WHOLE_PIXELS for h, w in shapes):
        return None
    return _measured(module, saved)


def _measured(module: nn.Module, saved: SavedModel) -> Field:
    with within_memory():
        return field_of(module, saved.spec.in_channels, 2, TileConfig(chunk_size=TILE))


def logits_of(
    module: nn.Module, saved: SavedModel, image: np.ndarray, field: Field | None = None
) -> Tensor:
    """(1, outputs, h, w) float32 on the CPU of ``image`` (channels, h, w) of any number type.

    Right and bottom are mirrored up to the sides that the network takes. Above `MOST_WHOLE_PIXELS` the
    same numbers come tile by tile, by ``field``, which else is measured here (see `field_for`).
    """
    h, w = image.shape[1:]
    device = next(module.parameters()).device
    if h * w > MOST_WHOLE_PIXELS:
        field = field or _measured(module, saved)
        found = process_large_image(
            image,
            module,
            TILE,
            axes="CYX",
            dims=2,
            prepare=saved.prepare,
            device=device.type,
            halo=field.halo,
            align=field.align,
        )
        return torch.from_numpy(np.asarray(found)).reshape(1, -1, h, w)
    x = torch.from_numpy(saved.prepare(image))[None]
    # TF32 off, as in tiles and in predict.
    with torch.inference_mode(), exact_float32(device), within_memory():
        return module(padded(x, saved.multiple).to(device)).float().cpu()[..., :h, :w]


@contextmanager
def within_memory() -> Iterator[None]:
    """Raises MemoryBudgetExceeded where the device runs out of memory inside."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryBudgetExceeded(
            f"the device ran out of memory on a picture ({error}); give --device cpu, or a device with"
            " more free memory"
        ) from error


def padded(x: Tensor, multiple: int) -> Tensor:
    """(..., h, w) mirrored at right and bottom to multiples of ``multiple``."""
    # As tiles are, so that a small picture too gets the same numbers either way.
    rows, cols = (
        torch.from_numpy(reflected(slice(0, round_up(n, multiple)), n)).to(x.device)
        for n in x.shape[-2:]
    )
    return x[..., rows, :][..., cols]


def found_objects(
    logits: Tensor, target: Target, threshold: float, config: InstanceConfig
) -> Labels | None:
    """(h, w) numbered objects of one picture's logits (1, outputs, h, w); None for classes.

    Of a boundary model: its interiors, each grown over the boundary pixels nearest to it.
    """
    if target == "classes":
        return None
    labels = predict_labels(logits, threshold)[0].numpy()
    inside = instances_of(labels == 1, config)
    return inside if target == "foreground" else grown(inside, labels > 0)


def grown(objects: Labels, foreground: np.ndarray) -> Labels:
    """``objects`` with every foreground pixel of the nearest of them; where there are none, as it is."""
    if not objects.any():
        return objects
    _, nearest = ndimage.distance_transform_edt(objects == 0, return_indices=True)
    return np.asarray(np.where(foreground, objects[tuple(nearest)], 0), np.int32)


def true_objects(mask: np.ndarray, ignore: int | None) -> Labels:
    """(h, w) int32: the mask's own numbers; a mask that says only object or not is cut into its
    connected pixels.
    """
    objects = np.where(mask == ignore, 0, mask) if ignore is not None else mask
    numbers = np.unique(objects)
    if (numbers > 0).sum() == 1:
        return components(objects > 0, InstanceConfig())
    return np.asarray(np.searchsorted(numbers[numbers > 0], objects, side="left") + 1, np.int32) * (
        objects > 0
    )
