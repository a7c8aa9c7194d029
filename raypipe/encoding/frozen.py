"""The backbone inside a training worker: frozen, loaded where it is first used, never saved.

It is no part of the trained model: it has no gradient, no place in checkpoints, and travels to
workers as a spec. Its tokens are rounded as a store would round them, so that a run on the fly sees
the numbers of one on stored features, but for what another batch shape does to a sum's last bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from raypipe.backbone import BackboneSpec
from raypipe.backbone.model import Backbone, Precision, load
from raypipe.backbone.options import FeatureOptions
from raypipe.errors import InputError, StoreError


@dataclass(frozen=True, kw_only=True)
class FrozenBackbone:
    """One layer of ``spec`` with just these weights, which do not travel with it.

    dtype : of a store, to which tokens are rounded; row_shape : (tokens, dim)
    """

    spec: BackboneSpec
    layer: str
    weights: str
    weights_sha256: str
    n_parameters: int
    precision: Precision
    dtype: str
    row_shape: tuple[int, int]

    def tokens(self, pixels: Tensor) -> Tensor:
        """(b, height, width, 3) uint8 -> (b, tokens, dim) of ``dtype``, where ``pixels`` are.

        Under its own precision, whatever autocast is on: as in extraction. Raises InputError when
        this machine has other weights, StoreError for tokens that ``dtype`` cannot hold.
        """
        out = torch.empty(
            (len(pixels), *self.row_shape), dtype=getattr(torch, self.dtype), device=pixels.device
        )
        backbone = self.load(pixels.device)
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            # Copied: what comes out of inference mode may not be kept for a backward pass.
            out.copy_(backbone(pixels)[self.layer])
            if not bool(torch.isfinite(out).all()):
                raise StoreError(
                    f"a token of {self.spec.name} is not finite, or beyond {self.dtype}'s largest "
                    "number; give --store-dtype bfloat16 or float32"
                )
        return out

    def load(self, device: torch.device) -> Backbone:
        """The running backbone on ``device``. Raises as ``tokens``, and as `backbone.model.load`."""
        if device.type == "cuda" and device.index is None:  # as the pixels on it name it
            device = torch.device("cuda", torch.cuda.current_device())
        found = _loaded(self.spec, self.weights, str(device), self.precision)
        if found.weights_sha256 != self.weights_sha256:
            raise InputError(
                f"weights {self.weights} have sha256 {found.weights_sha256[:12]}… here, "
                f"{self.weights_sha256[:12]}… in this run; give every machine the same --weights FILE"
            )
        return found

    def held(self, device: torch.device) -> list[Tensor]:
        """The weights that lie on ``device`` while this is used: for the memory planner."""
        model = self.load(device).model
        return [*model.parameters(), *model.buffers()]


def frozen(
    spec: BackboneSpec, layer: str, options: FeatureOptions, row_shape: tuple[int, int]
) -> FrozenBackbone:
    """That layer of ``spec`` with the weights that ``options`` name, which are loaded to see which
    they are. Raises as `backbone.model.load`.
    """
    weights = options.absolute_weights()
    found = _loaded(spec, weights, "cpu", options.precision)
    return FrozenBackbone(
        spec=spec,
        layer=layer,
        weights=weights,
        weights_sha256=found.weights_sha256,
        n_parameters=found.n_parameters,
        precision=options.precision,
        dtype=options.store_dtype,
        row_shape=row_shape,
    )


@lru_cache(maxsize=1)  # one a process: subjects of one command share it
def _loaded(spec: BackboneSpec, weights: str, device: str, precision: Precision) -> Backbone:
    return load(spec, weights=weights, device=device, precision=precision)


def release() -> None:
    """Drop this process's backbone; it is loaded again when needed."""
    _loaded.cache_clear()


def tokens_of(batch: Mapping[str, Tensor], backbone: FrozenBackbone | None) -> Tensor:
    """The tokens of a batch: stored ones as they are, or those of its pixels."""
    return batch["tokens"] if backbone is None else backbone.tokens(batch["pixels"])
