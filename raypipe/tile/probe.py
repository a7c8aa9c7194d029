"""Running a model on small images to see what reaches what: the measuring hand of ``field``.

Images are ``base`` pixels on every axis but the one that is measured, which keeps even a wide U-Net
affordable. Operations that do not hand NaN on (``where``, ``nan_to_num``, comparisons, ``argmax``) are
watched for: once one of them has met a NaN, what NaN shows is not the whole truth, and the probe fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raypipe.errors import InputError

# Sizes across: most models take one of these; multiples of 14 and 16 are ViT patches.
_BASES = {2: (32, 64, 96, 112, 120, 144, 160, 168), 3: (16, 32, 48, 64)}
_TOLERANCE = 1e-9  # of the largest value, in float64: rounding of sums in other orders is 1e-15
# InputError: raypipe's own networks say so that a size does not fit.
_REFUSALS = (InputError, RuntimeError, ValueError, AssertionError, IndexError, TypeError)
_MAGNITUDES = (-30.0, -1.0, 1.0, 30.0)
_SWALLOW = frozenset(
    {
        "where",
        "nan_to_num",
        "nan_to_num_",
        "masked_fill",
        "masked_fill_",
        "isnan",
        "isfinite",
        "isinf",
    }
    | {"gt", "lt", "ge", "le", "eq", "ne", "argmax", "argmin", "fmax", "fmin", "bucketize"}
    | {"nansum", "nanmean", "nanmedian", "searchsorted"}
)


class Probe:
    """A model, and the small images it is shown. Use ``of``."""

    def __init__(self, model: nn.Module, in_channels: int, dims: int, base: int) -> None:
        self.model, self.in_channels, self.dims, self.base = model, in_channels, dims, base
        self.refusal = ""
        self._held = ExitStack()
        self._untouched: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def of(cls, model: nn.Module, in_channels: int, dims: int) -> Probe:
        """With the smallest size across that the model takes. Raises InputError."""
        refusal = ""
        for base in _BASES[dims]:
            probe = cls(model, in_channels, dims, base)
            image = probe.image(0, 2 * base)
            with probe:
                out = probe.whole(0, image, 0, 2 * base)
                if out is None:
                    refusal = refusal or probe.refusal
                    continue
                again = probe.whole(0, image, 0, 2 * base)
            if again is None or not torch.equal(out, again):
                raise InputError(
                    "the model gives other values for the same image each time (dropout, or noise of "
                    "its own); call model.eval() or take that out"
                )
            return probe
        raise InputError(
            f"the model does not map (n, {in_channels}, {', '.join('s' * dims)}) to the same size for "
            f"any of {_BASES[dims]} pixels: {refusal}; check in_channels and dims, or resize in the model"
        )

    def on(self, model: nn.Module) -> Probe:
        """The same for ``model``, a copy in another precision."""
        return Probe(model, self.in_channels, self.dims, self.base)

    def __enter__(self) -> Probe:
        self._held.enter_context(torch.inference_mode())
        # cuDNN's FFT and Winograd algorithms would spread a NaN over their whole tile.
        self._held.enter_context(_without_cudnn())
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def image(self, axis: int, length: int) -> Tensor:
        """A random image (1, channels, *space), ``length`` along ``axis``; always the same one."""
        shape = [self.base] * self.dims
        shape[axis] = length
        values = np.random.default_rng(length).standard_normal((1, self.in_channels, *shape))
        first = next(self.model.parameters(), torch.empty(0))
        return torch.from_numpy(values).to(first.device, dtype_of(self.model))

    def whole(self, axis: int, image: Tensor, lo: int, length: int) -> Tensor | None:
        """Result (channels and others, length) of ``length`` pixels of ``image`` from ``lo`` on; None
        when the model refuses that size, or gives another; ``refusal`` says why.
        """
        part = image.narrow(2 + axis, lo, length)
        try:
            out = self.model(part)
        except torch.OutOfMemoryError:
            raise  # of the device, not of the size
        except _REFUSALS as error:
            self.refusal = " ".join(str(error).split())[:200]
            return None
        if not isinstance(out, Tensor) or out.shape[2:] != part.shape[2:] or out.shape[0] != 1:
            shown = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            self.refusal = f"it gave {shown} for {tuple(part.shape)}"
            return None
        return out[0].movedim(1 + axis, -1).reshape(-1, length)

    def support(self, axis: int, length: int, at: int) -> np.ndarray:
        """(length,) bool: outputs that a NaN at pixels ``at`` of ``axis`` turns NaN. InputError when
        something on the way swallows NaN.
        """
        image = self.image(axis, length)
        image.narrow(2 + axis, at, 1).fill_(torch.nan)
        with _Swallowing() as swallowing:
            out = self._given(axis, image, length)
        if swallowing.found:
            raise InputError(
                f"{swallowing.found} in the model does not hand NaN on, so how far it looks cannot be "
                "measured; state halo and align"
            )
        if not out.is_floating_point():
            raise InputError(
                f"the model gives {out.dtype}, which shows no NaN, so how far it looks cannot be "
                "measured; give its logits, or state halo and align"
            )
        return torch.isnan(out).any(0).cpu().numpy()

    def check_seen(
        self,
        axis: int,
        length: int,
        at: int,
        support: np.ndarray,
        magnitudes: Sequence[float] = _MAGNITUDES,
    ) -> None:
        """Raises InputError when other numbers at ``at`` change an output outside ``support``."""
        image = self.image(axis, length)
        if (axis, length) not in self._untouched:
            self._untouched[axis, length] = self._given(axis, image, length)
        before = self._untouched[axis, length]
        if not before.isfinite().all():
            raise InputError(
                "the model gives NaN or infinity for standard normal input, so it cannot be measured; "
                "check its weights, or state halo and align"
            )
        for magnitude in magnitudes:
            image.narrow(2 + axis, at, 1).fill_(magnitude)
            # Not differing(): sizes are the same, so what is not reached is the same bit by bit.
            changed = (self._given(axis, image, length) != before).any(0).cpu().numpy()
            if (changed & ~support).any():
                raise InputError(
                    f"pixel {at} changes outputs that a NaN there does not reach: something in the "
                    "model swallows NaN; state halo and align"
                )

    def _given(self, axis: int, image: Tensor, length: int) -> Tensor:
        out = self.whole(axis, image, 0, length)
        if out is None:
            raise InputError(
                f"the model does not take {tuple(image.shape)}: {self.refusal}; state halo and align"
            )
        return out

    def differing(self, one: Tensor, other: Tensor) -> np.ndarray:
        """(length,) bool: where two float64 results (channels, length) are not the same."""
        scale = float(one.abs().max()) or 1.0
        return ((one - other).abs() > _TOLERANCE * scale).any(0).cpu().numpy()

    def equal(self, one: Tensor, other: Tensor) -> bool:
        """Whether they are the same everywhere."""
        return not self.differing(one, other).any()


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Not ``cudnn.flags``: that reads allow_tf32, which raises where the caller used fp32_precision."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the images that it takes: that of its first floating parameter, else float32."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floating, torch.float32)


class _Swallowing(TorchDispatchMode):
    """Watches for an operation that meets a NaN and does not hand it on; found : its name."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch loads its compiler, 1.5 s and more, at the first operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _SWALLOW and not self.found:
            tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
            if any(bool(torch.isnan(t).any()) for t in tensors):
                self.found = f"torch.{name}"
        return func(*args, **(kwargs or {}))


def culprit(model: nn.Module, probe: Probe, axis: int, length: int) -> str:
    """The first module that spreads one pixel over everything and is of a kind that always does; "" when
    there is none: a large kernel does so too, on a small image.
    """
    image = probe.image(axis, length)
    image.narrow(2 + axis, length // 2, 1).fill_(torch.nan)
    with _spreaders(model) as found:
        probe.whole(axis, image, 0, length)
    return next((_words(name, module) for name, module in found if _is_global(module)), "")


def _is_global(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.training or module.running_mean is None
    return isinstance(module, _GLOBAL)


_GLOBAL = (
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.MultiheadAttention,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


def _words(name: str, module: nn.Module) -> str:
    mode = " in train mode" if isinstance(module, nn.modules.batchnorm._BatchNorm) else ""
    return f"{name or 'the model'} ({type(module).__name__}{mode})"


@contextmanager
def _spreaders(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """(name, module) of those whose input is partly NaN and whose output wholly, in the order they end in:
    the part comes before the whole.
    """
    found: list[tuple[str, nn.Module]] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: Any, out: Any) -> None:
            given = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
            partly = any(not torch.isnan(a).all() for a in given)
            out = out[0] if isinstance(out, tuple) else out
            if partly and isinstance(out, Tensor) and bool(torch.isnan(out).all()):
                found.append((name, module))

        return look

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(hook(name)).remove)
        yield found
