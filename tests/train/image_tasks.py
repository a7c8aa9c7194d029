"""Images small enough to train on in milliseconds, and three models whose memory has a shape of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from raypipe.stream import ArraySource

N, SIDE, WIDTH = 64, 12, 24


class Mlp(nn.Module):
    """6 -> 512 -> 1: small weights, wide activations."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 512), nn.ReLU(), nn.Linear(512, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ConvBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    """Three blocks and a linear head, on images (b, 4, 12, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, WIDTH, 1)
        self.blocks = nn.ModuleList(ConvBlock(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Two transformer layers over 36 tokens of 16 channels, on (b, 4, 12, 12)."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.TransformerEncoderLayer(16, 2, 64, 0.1, batch_first=True) for _ in range(2))
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(16, 300)  # a gradient that is larger than a few rows' activations

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).unflatten(1, (36, 16))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1)).mean(1, keepdim=True)


MODELS = {"mlp": Mlp, "conv": ConvNet, "attention": Attention}


@dataclass(frozen=True)
class ImageTask:
    """y (1,) float32 from x float32, by one of MODELS."""

    data: Path
    model: str

    @property
    def train_rows(self) -> np.ndarray:
        return np.arange(N - 4)

    @property
    def val_rows(self) -> np.ndarray:
        return np.arange(N - 4, N)

    def build_model(self) -> nn.Module:
        return MODELS[self.model]()

    def sources(self) -> Mapping[str, ArraySource]:
        x = "flat" if self.model == "mlp" else "images"
        return {k: ArraySource.npy(self.data / f"{n}.npy") for k, n in (("x", x), ("y", "y"))}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"]).float() - batch["y"]).square().mean(1)

    def val_sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"loss": self.loss(model, batch).sum()}

    def val_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"val_loss": float(sums["loss"])}

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(getattr(model, "blocks", ()))


def write_images(folder: Path) -> Path:
    """Every file that an `ImageTask` reads."""
    rng = np.random.default_rng(1)
    np.save(folder / "images.npy", rng.standard_normal((N, 4, SIDE, SIDE)).astype(np.float32))
    np.save(folder / "flat.npy", rng.standard_normal((N, 6)).astype(np.float32))
    np.save(folder / "y.npy", rng.standard_normal((N, 1)).astype(np.float32))
    return folder
