"""What the training loop is given: the encoder, its rows, the loss and the validation sums.

Everything is decided on the driver; a worker only maps the files named here. The pickle holds paths
(absolute: Ray's workers live elsewhere), row numbers or what they follow from, and ROI masks: about
2 MB for a real subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raypipe.encoding.config import ModelConfig
from raypipe.encoding.frozen import FrozenBackbone, tokens_of
from raypipe.encoding.model import build_encoder
from raypipe.encoding.readout import HEMIS, Readout
from raypipe.encoding.shapes import TokenShape
from raypipe.encoding.split import Rows
from raypipe.memory.guard import current, relieve
from raypipe.report.metrics import pearson_from_sums
from raypipe.stream import ArraySource, Gatherer
from raypipe.stream.reading import OpenRows, Source

Batch = Mapping[str, Tensor]

# Images behind the channel statistics: 128 x 961 tokens fix a mean to a thousandth of its spread.
_STATISTICS_ROWS = 128
STATISTICS_BATCH = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenStatistics:
    """Mean and standard deviation of each channel, (dim,) float32."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodingTask:
    """``raypipe.train.Task`` for brain encoding.

    features : "tokens" -> (N, n_tokens, dim), or "pixels" -> (N, height, width, 3) for ``backbone``;
    responses : "lh", "rh" -> (N, V); rows are shared by all three.
    """

    features: Mapping[str, Source]
    responses: Mapping[str, ArraySource]
    shape: TokenShape
    encoder: ModelConfig
    readout: Readout
    train_rows: Rows
    val_rows: Rows
    statistics: TokenStatistics | None = None
    backbone: FrozenBackbone | None = None

    def build_model(self) -> nn.Module:
        """A new encoder on the CPU, from torch's global generator."""
        model = build_encoder(self.encoder, self.shape, self.readout)
        if self.statistics is not None:
            mean, std = (torch.from_numpy(v) for v in (self.statistics.mean, self.statistics.std))
            model.scaler.set(mean, std)  # type: ignore[union-attr, operator]
        return model

    def sources(self) -> dict[str, Source]:
        """What a batch is gathered from."""
        return {**self.features, **self.responses}

    def frozen_tensors(self, device: torch.device) -> Sequence[Tensor]:
        """What lies on ``device`` beside the model: the backbone's weights."""
        return [] if self.backbone is None else self.backbone.held(device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """(b,): mean squared error over the vertices of lh, plus that of rh."""
        return squared_error(model(tokens_of(batch, self.backbone)), batch)

    def val_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over the rows: n, loss, and per hemisphere what Pearson's r needs, (V,) each."""
        predicted = model(tokens_of(batch, self.backbone))
        error = squared_error(predicted, batch).double()
        sums = {"n": torch.full_like(error, 1).sum(), "loss": error.sum()}
        for hemi in HEMIS:
            x, y = predicted[hemi].double(), batch[hemi].double()
            terms = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
            sums |= {f"{hemi}_{name}": term.sum(0) for name, term in terms.items()}
        return sums

    def val_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """val_loss, and Pearson's r averaged over vertices: val_r, val_r_lh, val_r_rh."""
        n = float(sums["n"])
        r = {
            hemi: pearson_from_sums(
                {"n": n} | {k: sums[f"{hemi}_{k}"].numpy() for k in ("x", "y", "xx", "yy", "xy")}
            )
            for hemi in HEMIS
        }
        every = np.concatenate([r[hemi] for hemi in HEMIS])
        means = {"val_r": every, "val_r_lh": r["lh"], "val_r_rh": r["rh"]}
        return {"val_loss": float(sums["loss"]) / n} | {k: _mean(v) for k, v in means.items()}

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The cross-attention blocks; the linear encoder has none."""
        blocks = getattr(model, "blocks", ())
        return list(blocks)


def squared_error(predicted: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """(b,) float32: mean over the vertices of each hemisphere, the two added."""
    parts = [(predicted[h].float() - batch[h].float()).square().mean(1) for h in HEMIS]
    return parts[0] + parts[1]


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of the defined values; NaN without one."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if defined.size else float("nan")


def token_statistics(
    features: Mapping[str, Source],
    shape: TokenShape,
    rows: Rows,
    *,
    cls: bool = False,
    backbone: FrozenBackbone | None = None,
    device: str = "cpu",
    open_rows: OpenRows | None = None,
) -> TokenStatistics:
    """Channel statistics of the patch tokens (``cls``: of the first token) of training rows.

    Over at most 128 of ``rows``, evenly spaced; read a few at a time, whatever the dtype. Pixels go
    through ``backbone`` on ``device``. ``open_rows``: see `Gatherer`. Raises as that, and
    MemoryBudgetExceeded when the process's guard does.
    """
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _STATISTICS_ROWS)).astype(int)]
    pieces = [chosen[i : i + STATISTICS_BATCH] for i in range(0, len(chosen), STATISTICS_BATCH)]
    n, total, squares = 0, torch.zeros(shape.dim).double(), torch.zeros(shape.dim).double()
    with Gatherer(features, STATISTICS_BATCH, device, open_rows=open_rows) as gatherer:
        for batch in gatherer.batches(pieces):
            tokens = tokens_of(batch, backbone).cpu()
            part = tokens[:, :1] if cls else tokens[:, shape.prefix :]
            flat = part.flatten(0, 1).double()
            n += len(flat)
            total += flat.sum(0)
            squares += flat.square().sum(0)
            if current().pressure():
                relieve()
    mean = total / n
    variance = (squares / n - mean.square()).clamp(min=0)
    return TokenStatistics(mean=mean.float().numpy(), std=variance.sqrt().float().numpy())
