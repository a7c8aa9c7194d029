"""Pictures on a disk, and pictures of none, for the tests of what is read and how it is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from raypipe.segment.pictures import Picture


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(pixels).save(path)
    else:
        tifffile.imwrite(path, pixels, photometric="minisblack")


def image(dtype: Any = np.uint16, shape: tuple[int, ...] = (20, 30)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def save_ome_set(folder: Path, own: dict[str, np.ndarray]) -> None:
    """OME-TIFF files, each with its own planes (n, h, w), which all name the whole set."""
    planes = [(name, at) for name, pixels in own.items() for at in range(len(pixels))]
    where = "".join(
        f'<TiffData FirstT="{t}" IFD="{at}" PlaneCount="1"><UUID FileName="{name}">urn:uuid:'
        f"{list(own).index(name)}bc0e5c2-7d30-4c58-9a1c-000000000000</UUID></TiffData>"
        for t, (name, at) in enumerate(planes)
    )
    for number, (name, pixels) in enumerate(own.items()):
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas'
            f'/OME/2016-06" UUID="urn:uuid:{number}bc0e5c2-7d30-4c58-9a1c-000000000000">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" SizeX="30" SizeY="20" SizeZ="1" SizeC="1" '
            f'SizeT="{len(planes)}" DimensionOrder="XYCZT" Type="uint16">{where}</Pixels></Image></OME>'
        )
        with tifffile.TiffWriter(folder / name) as tif:
            for at, page in enumerate(pixels):
                tif.write(
                    page, contiguous=False, metadata=None, description=None if at else xml
                )  # fmt: skip


def pages(sources: int, each: int) -> list[Picture]:
    return [
        Picture(image=Path(f"/d/{s}.tif"), mask=Path(f"/d/{s}_mask.tif"), frame=page, rows=(0, 8),
                cols=(0, 8), split="", channels=1)
        for s in range(sources) for page in range(each)
    ]  # fmt: skip
