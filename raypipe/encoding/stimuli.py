"""Stimuli for the planted dataset, and the visual quantities that planted vertices respond to.

Images are crops of scikit-learn's two sample photographs, scaled, mirrored and recoloured, so the
demo needs no network. ``quantity_maps`` is the known part of a planted response: plain arithmetic
on pixels, nothing learned. Which vertex takes what is in ``planted``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 425  # pixels; the size of the Algonauts 2023 images
_BLOCK = 5  # pixels averaged per map cell: 425 -> 85 cells a side

QUANTITIES = (
    "luminance",
    "red-green",
    "blue-yellow",
    "vertical-edges",
    "horizontal-edges",
    "contrast",
)

Floats = NDArray[np.float64]


def photographs() -> list[Image.Image]:
    """scikit-learn's sample photographs, each 427 pixels high and 640 wide."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def stimuli(n_images: int, rng: np.random.Generator) -> Iterator[Image.Image]:
    """Yield ``n_images`` random views of the photographs, 425x425 RGB each."""
    sources = photographs()
    for _ in range(n_images):
        source = sources[rng.integers(len(sources))]
        yield _recolour(_crop(source, rng), rng)


def _crop(source: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = int(rng.integers(110, 320))
    left = int(rng.integers(0, source.width - side + 1))
    top = int(rng.integers(0, source.height - side + 1))
    view = source.resize(
        (SIDE, SIDE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.3:  # turn edges too, or vertical and horizontal energy go together
        view = view.transpose(Image.Transpose.ROTATE_90)
    return view


def _recolour(view: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change contrast, brightness and the gain of each channel, by one lookup table a channel."""
    contrast, brightness = rng.uniform(0.4, 1.3), rng.uniform(-46, 46)
    gains = rng.uniform(0.75, 1.25, size=3)
    mean = float(np.asarray(view.resize((17, 17), Image.Resampling.BOX)).mean())
    levels = (np.arange(256) - mean) * contrast + mean + brightness
    table = np.clip(np.outer(gains, levels) + 0.5, 0, 255).astype(np.uint8)
    return view.point(table.ravel().tolist())


def quantity_maps(image: Image.Image) -> Floats:
    """The visual quantities at every place; a 425x425 RGB image -> (6, 85, 85) float64.

    Colour in opponent axes; edges and contrast as energy of the gradient, averaged later as
    magnitudes, which grow linearly with contrast as responses of early visual cortex roughly do.
    """
    cells = np.asarray(image.reduce(_BLOCK), np.float64) / 255
    red, green, blue = cells[..., 0], cells[..., 1], cells[..., 2]
    luminance = (red + green + blue) / 3
    across, down = np.gradient(luminance, axis=1), np.gradient(luminance, axis=0)
    contrast = np.hypot(across, down)
    return np.stack(
        [luminance, red - green, blue - (red + green) / 2, np.abs(across), np.abs(down), contrast]
    )


def receptive_field(x: float, y: float, sigma: float) -> Floats:
    """Gaussian weights over the map, (85, 85) summing to 1; x, y, sigma as parts of the side."""
    at = (np.arange(SIDE // _BLOCK) + 0.5) / (SIDE // _BLOCK)
    weights = np.exp(-((at[None, :] - x) ** 2 + (at[:, None] - y) ** 2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum())
