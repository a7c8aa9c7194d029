"""What happens to pixels before a backbone sees them, in two halves.

``host`` works on one uint8 picture in a reading thread: resize and crop, as PIL does it.
``device`` works on a uint8 batch where the model is: scale, normalise, pad. So uint8 crosses to the
GPU, a quarter of float32's bytes. Which numbers a model wants is declared in ``registry``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from raypipe.errors import BadImage, ConfigError

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MAX_SIDE = 16_384

RGB = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """One model's preprocessing.

    resize : pixels of the shorter side after resizing, None to keep the picture's own size
    crop : pixels of the centre square that is kept, None to keep all; at most ``resize``
    squash : resize both sides to ``resize`` instead, changing the aspect ratio
    mean, std : of the three channels, for pixels in 0..1
    pad_multiple : zero-pad right and bottom to a multiple of this many pixels, after normalising
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    squash: bool = False
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    pad_multiple: int | None = None

    def __post_init__(self) -> None:
        for name in ("resize", "crop", "pad_multiple"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MAX_SIDE:
                raise ConfigError(
                    f"preprocessing {name} {value} is not in 1..{_MAX_SIDE} pixels; choose one"
                )
        if self.crop is not None and (self.resize is None or self.crop > self.resize):
            raise ConfigError(
                f"crop {self.crop} is larger than resize {self.resize}; resize to at least the crop"
            )
        if self.interpolation not in _RESAMPLING:
            raise ConfigError(
                f"interpolation {self.interpolation!r} is not one of {', '.join(_RESAMPLING)}; "
                "choose one"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(
                f"mean {self.mean} and std {self.std} must be three numbers each, std above 0; "
                "give one for each of red, green, blue"
            )

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing; the longer side is rounded down, as torchvision does."""
        if self.resize is None:
            return height, width
        if self.squash:
            return self.resize, self.resize
        short, long = min(height, width), max(height, width)
        scaled = int(self.resize * long / short)
        return (self.resize, scaled) if height <= width else (scaled, self.resize)

    def host_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what ``host`` gives for a picture of that size."""
        return (self.crop, self.crop) if self.crop else self.resized_size(height, width)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that the model sees, padding included."""
        height, width = self.host_size(height, width)
        return height + self._padding(height), width + self._padding(width)

    def host(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 resized and cropped to (H', W', 3) uint8; nothing to do, nothing copied.

        Raises BadImage for a picture so narrow that its resized longer side is beyond 16384 pixels.
        """
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise TypeError(
                f"pixels are {pixels.shape} {pixels.dtype}, not (height, width, 3) uint8"
            )
        height, width = self.resized_size(*pixels.shape[:2])
        if max(height, width) > _MAX_SIDE:
            raise BadImage(
                f"{pixels.shape[1]}x{pixels.shape[0]} pixels resize to {width}x{height}: too narrow"
            )
        if (height, width) != pixels.shape[:2]:
            resampling = _RESAMPLING[self.interpolation]
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), resampling))
        if self.crop:
            # round() halves to even, and so does torchvision's CenterCrop
            top, left = round((height - self.crop) / 2), round((width - self.crop) / 2)
            pixels = pixels[top : top + self.crop, left : left + self.crop]
        return np.ascontiguousarray(pixels)

    def device(self, batch: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H", W") float32 on the batch's device, any memory format.

        Scaled and normalised in the order of torchvision's ToTensor and Normalize, so the numbers
        are theirs to the bit; the padding is zero after normalising, that is, the mean colour.
        """
        import torch

        if batch.ndim != 4 or batch.shape[3] != 3 or batch.dtype != torch.uint8:
            raise TypeError(f"batch is {tuple(batch.shape)} {batch.dtype}, not (B, H, W, 3) uint8")
        mean, std = _constants(self.mean, self.std, batch.device)
        pixels = batch.to(torch.float32).div_(255.0).sub_(mean).div_(std).permute(0, 3, 1, 2)
        down, right = self._padding(pixels.shape[2]), self._padding(pixels.shape[3])
        return torch.nn.functional.pad(pixels, (0, right, 0, down)) if down or right else pixels

    def describe(self) -> dict[str, Any]:
        """As plain JSON values, for manifests and fingerprints."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def _padding(self, side: int) -> int:
        return -side % self.pad_multiple if self.pad_multiple else 0


@lru_cache(maxsize=32)
def _constants(mean: RGB, std: RGB, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std as (3,) float32 on ``device``, made once: no copy to a GPU every batch."""
    import torch

    with torch.inference_mode(False):  # else they could not be used outside of inference mode later
        return torch.tensor(mean, device=device), torch.tensor(std, device=device)
