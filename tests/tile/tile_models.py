"""Small models of the kinds that are tiled, and of those that cannot be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from raypipe.segment.unet import UNet as FittedUNet
from raypipe.segment.unet import UNetConfig


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model in eval mode whose batch norms have statistics of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
                nn.init.normal_(part.running_mean, std=0.1)
                nn.init.uniform_(part.running_var, 0.5, 2.0)
    return model.eval()


def twice(conv: type, norm: type, c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(
        conv(c_in, c_out, 3, padding=1, bias=False), norm(c_out), nn.ReLU(inplace=True),
        conv(c_out, c_out, 3, padding=1, bias=False), norm(c_out), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """Double convolutions, batch norm, max-pooling, skips; ``levels`` of them."""

    def __init__(self, levels=3, width=4, up="transposed", c_in=1, classes=1, dims=2) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        transposed = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
        self.pool = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims](2)
        widths = [width * 2**k for k in range(levels)]
        self.down = nn.ModuleList(
            twice(conv, norm, a, b) for a, b in zip([c_in, *widths], widths, strict=False)
        )
        self.ups, self.merge = nn.ModuleList(), nn.ModuleList()
        smooth = {2: "bilinear", 3: "trilinear"}[dims]
        for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.ups.append(
                transposed(a, b, 2, stride=2)
                if up == "transposed"
                else nn.Sequential(
                    nn.Upsample(scale_factor=2, mode=smooth, align_corners=up == "corners"),
                    conv(a, b, 1),
                )
            )
            self.merge.append(twice(conv, norm, 2 * b, b))
        self.head = conv(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for k, down in enumerate(self.down):
            x = down(self.pool(x) if k else x)
            skips.append(x)
        for up, merge, skip in zip(self.ups, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)


def fitted(**options: object) -> nn.Module:
    """The network that ``segment fit`` makes; it refuses sides that its depth does not halve."""
    return FittedUNet(UNetConfig(**options))


class Strided(nn.Module):
    """Strided down by ``stride``, nearest up, a kernel of even size on the way."""

    def __init__(self, stride: int = 3) -> None:
        super().__init__()
        self.stride = stride
        self.a = nn.Conv2d(1, 4, 5, padding=2)
        self.b = nn.Conv2d(4, 4, stride, stride=stride)
        self.c = nn.Conv2d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.b(functional.relu(self.a(x))))
        x = self.c(functional.pad(x, (1, 0, 1, 0)))
        return functional.interpolate(x, scale_factor=float(self.stride), mode="nearest")


def dilated() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=4, dilation=4), nn.BatchNorm2d(4), nn.LeakyReLU(),
        nn.Conv2d(4, 1, (1, 5), padding=(0, 18), dilation=9),
    )  # fmt: skip


class Hidden(nn.Module):
    """Any size, and a stride of 4 wholly below a longer convolution and dead for most inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Conv2d(1, 1, 17, padding=8)
        self.coarse = nn.Conv2d(1, 1, 4, stride=4)
        nn.init.constant_(self.coarse.bias, -1e3)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        coarse = functional.relu(self.coarse(functional.pad(x, (0, -w % 4, 0, -h % 4))))
        up = functional.interpolate(coarse, scale_factor=4.0, mode="nearest")
        return self.long(x) + up[..., :h, :w]


class There(nn.Module):
    """Looks 5 pixels to one side and comes back: a border is felt farther than any pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(1, 1, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(self.one(x)[..., 5:], (0, 5))
        return self.two(functional.pad(x, (5, 0))[..., :-5])


class Normed(nn.Module):
    """A convolution before and after ``norm``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), norm
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).mT
        return (tokens + self.mix(tokens, tokens, tokens)[0]).mT.reshape(n, c, h, w)


class Gated(nn.Module):
    """Squeeze and excitation: a global mean."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(self.pool(x)))


class Where(nn.Module):
    """Swallows NaN on one of two ways: the longer."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) + self.long(torch.where(x > 0, x, 0.1 * x))


class Positions(nn.Module):
    """Adds where a pixel lies."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[-1], dtype=x.dtype)
