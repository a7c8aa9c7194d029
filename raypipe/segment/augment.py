"""Augmentation: the same crop for the same (seed, sample, epoch), whoever makes it, wherever.

`draw` decides everything from its key; `window` says which pixels of the region that needs; `apply`
makes the crop of them. Image and mask go through one geometry: flips and quarter turns move pixels
exactly, free rotation, zoom and elastic bending share one map of coordinates (linear for the image,
nearest for the mask). Intensity changes the image alone, in units of its normalised range.

Pixels beyond the region are mirrored in the image and `labels.IGNORE` in the mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from raypipe.errors import ConfigError
from raypipe.segment.labels import IGNORE

Span = tuple[int, int]
# A cubic spline through the nodes goes beyond the largest of them, by less than this in 10,000 draws.
_OVERSHOOT = 1.5


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What training crops go through. Raises ConfigError when a value breaks its rule.

    The sizes are those of common microscopy recipes (nnU-Net, StarDist), no measurement of ours.
    """

    augment: bool = True
    """Augment at all; without it crops are still cut at random places."""
    flip: bool = True
    """Mirror along both axes, each with probability one half."""
    quarter_turns: bool = True
    """Turn by 0, 90, 180 or 270 degrees."""
    warp_probability: float = 0.3
    """Share of the crops that are rotated freely, zoomed and bent: the dear part, on the CPU."""
    rotate_deg: float = 45.0
    """Largest free rotation, to both sides."""
    zoom: float = 0.15
    """Largest change of scale, up or down, as a part of 1."""
    elastic_px: float = 4.0
    """Standard deviation of elastic displacement at its nodes, in pixels; 0 does not bend."""
    elastic_spacing_px: float = 48.0
    """Distance between those nodes, in pixels."""
    gain: float = 0.2
    """Largest change of contrast, as a part of 1."""
    offset: float = 0.1
    """Largest change of brightness, as a part of the normalised range."""
    noise: float = 0.05
    """Largest standard deviation of added Gaussian noise, as a part of the normalised range."""

    def __post_init__(self) -> None:
        for name in ("rotate_deg", "elastic_px", "offset", "noise"):
            self._require(name, getattr(self, name) >= 0, "give 0 or more")
        for name in ("zoom", "gain"):
            self._require(name, 0 <= getattr(self, name) < 1, "give a part of 1, from 0 on")
        self._require("warp_probability", 0 <= self.warp_probability <= 1, "give 0 to 1")
        self._require("rotate_deg", self.rotate_deg <= 180, "give 180 degrees or less")
        self._require("elastic_spacing_px", self.elastic_spacing_px >= 4, "give 4 pixels or more")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not (holds and math.isfinite(getattr(self, name))):
            raise ConfigError(f"augment {name}={getattr(self, name)!r}: {rule}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """All that chance decides for one crop.

    at : its place in the region, as parts of what there is, [0, 1). nodes : (2, n, n) displacement in
    pixels, down and right, at the nodes; None: not bent. noise_key : of the noise's own generator.
    """

    at: tuple[float, float]
    flip: tuple[bool, bool] = (False, False)
    turns: int = 0
    angle_deg: float = 0.0
    scale: float = 1.0
    nodes: np.ndarray | None = None
    gain: float = 1.0
    offset: float = 0.0
    noise: float = 0.0
    noise_key: int = 0

    @property
    def warps(self) -> bool:
        """Whether pixels are interpolated."""
        return self.angle_deg != 0 or self.scale != 1 or self.nodes is not None


def draw(cfg: AugmentConfig, crop: int, seed: int, sample: int, epoch: int) -> Draw:
    """The draw of one crop of ``crop`` pixels a side: a pure function of its arguments."""
    rng = np.random.default_rng([seed, epoch, sample])
    at = float(rng.random()), float(rng.random())
    if not cfg.augment:
        return Draw(at=at)
    # Every number is drawn, used or not: turning one option off leaves the others as they were.
    down, right, warped = rng.random(3)
    turns = int(rng.integers(4))
    angle, log_scale, gain, offset = rng.uniform(-1, 1, 4)
    noise, key = float(rng.random()), int(rng.integers(1 << 62))
    warped = warped < cfg.warp_probability
    n = 2 + math.ceil(crop / cfg.elastic_spacing_px)
    nodes = rng.normal(0, 1, (2, n, n)) * cfg.elastic_px if warped and cfg.elastic_px else None
    return Draw(
        at=at,
        flip=(bool(cfg.flip and down < 0.5), bool(cfg.flip and right < 0.5)),
        turns=turns if cfg.quarter_turns else 0,
        angle_deg=float(angle * cfg.rotate_deg) if warped else 0.0,
        scale=float((1 + cfg.zoom) ** log_scale) if warped else 1.0,
        nodes=nodes,
        gain=float(1 + gain * cfg.gain),
        offset=float(offset * cfg.offset),
        noise=noise * cfg.noise,
        noise_key=key,
    )


def window(d: Draw, region: tuple[Span, Span], crop: int) -> tuple[Span, Span]:
    """The pixels to take, rows and cols, maybe beyond the region: `apply` wants them all.

    Without warping they are the crop; with it, a square around it that holds the turned one.
    """
    rows, cols = (_start(at, span, crop) for at, span in zip(d.at, region, strict=True))
    margin = margin_px(d, crop)
    return (rows - margin, rows + crop + margin), (cols - margin, cols + crop + margin)


def margin_px(d: Draw, crop: int) -> int:
    """Pixels that `window` takes around the crop on each side."""
    if not d.warps:
        return 0
    angle = math.radians(d.angle_deg)
    reach = crop / 2 * (abs(math.cos(angle)) + abs(math.sin(angle))) / d.scale
    bent = 0.0 if d.nodes is None else _OVERSHOOT * float(np.abs(d.nodes).max())
    return max(0, math.ceil(reach + bent - crop / 2)) + 1


def _start(at: float, span: Span, crop: int) -> int:
    """First pixel of the crop: within the span, or around it where it is smaller than the crop."""
    room = span[1] - span[0] - crop
    return span[0] + (int(at * (room + 1)) if room >= 0 else room // 2)


def apply(
    d: Draw, image: np.ndarray, plane: np.ndarray, crop: int
) -> tuple[np.ndarray, np.ndarray]:
    """The crop of `window`'s pixels: image (c, s, s) float32, plane (s, s) ints -> (c, crop, crop) and
    (crop, crop) of their dtypes.
    """
    if d.warps:
        image, plane = _warped(d, image, plane, crop)
    for axis, flip in enumerate(d.flip):
        if flip:
            image, plane = np.flip(image, 1 + axis), np.flip(plane, axis)
    image, plane = np.rot90(image, d.turns, (1, 2)), np.rot90(plane, d.turns)
    return _intensity(d, image), np.ascontiguousarray(plane)


def _warped(
    d: Draw, image: np.ndarray, plane: np.ndarray, crop: int
) -> tuple[np.ndarray, np.ndarray]:
    places = _places(d, crop, plane.shape[0])
    bent = np.stack([ndimage.map_coordinates(c, places, order=1, mode="mirror") for c in image])
    labels = ndimage.map_coordinates(plane, places, order=0, mode="constant", cval=IGNORE)
    return bent, labels


def _places(d: Draw, crop: int, side: int) -> np.ndarray:
    """(2, crop, crop) where each pixel of the crop comes from, in pixels of the window."""
    steps = np.arange(crop, dtype=np.float32) - np.float32((crop - 1) / 2)
    down, right = steps[:, None] / np.float32(d.scale), steps[None, :] / np.float32(d.scale)
    cos, sin = (np.float32(f(math.radians(d.angle_deg))) for f in (math.cos, math.sin))
    places = np.stack([cos * down + sin * right, cos * right - sin * down])
    if d.nodes is not None:
        places += _displacement(d.nodes, crop)
    return places + np.float32((side - 1) / 2)


def _displacement(nodes: np.ndarray, crop: int) -> np.ndarray:
    """(2, crop, crop) float32: the nodes, which span the crop, as a smooth (cubic) field."""
    at = np.linspace(0, nodes.shape[1] - 1, crop, dtype=np.float32)
    grid = np.stack(np.meshgrid(at, at, indexing="ij"))
    field = [
        ndimage.map_coordinates(n.astype(np.float32), grid, order=3, mode="nearest") for n in nodes
    ]
    return np.stack(field)


def _intensity(d: Draw, image: np.ndarray) -> np.ndarray:
    """Contrast about the middle of the range, brightness, noise; a new array."""
    changed = (image - np.float32(0.5)) * np.float32(d.gain) + np.float32(0.5 + d.offset)
    if d.noise:
        rng = np.random.default_rng(d.noise_key)
        changed += np.float32(d.noise) * rng.standard_normal(image.shape, np.float32)
    return np.ascontiguousarray(changed, np.float32)
