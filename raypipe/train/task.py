"""What the loop asks of a task: a model, its data, a loss per row, and sums for validation.

A room (`raypipe.encoding`, ...) implements it as a frozen, picklable dataclass that holds paths and
options only; it is opened in every worker. Batches come from `raypipe.stream.Gatherer`: tensors
(b, *row_shape) in the store's own dtype, on the worker's device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from raypipe.errors import ConfigError
from raypipe.stream.reading import Source
from raypipe.stream.rows import ComputedRows

Batch = Mapping[str, Tensor]


class Task(Protocol):
    """One thing to train. Everything here is called in the worker, under the loop's seed."""

    @property
    def train_rows(self) -> np.ndarray | range | ComputedRows:
        """(n,) int64, distinct: the rows to train on; a range, or computed rows, take no memory."""
        ...

    @property
    def val_rows(self) -> np.ndarray | ComputedRows:
        """(m,) int64, m >= 1: the rows that choose the best epoch; none of ``train_rows``."""
        ...

    def build_model(self) -> nn.Module:
        """A new model on the CPU, weights drawn from torch's global generator."""
        ...

    def sources(self) -> Mapping[str, Source]:
        """The rows of a batch, by the names that ``loss`` uses; all share their row numbers."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """(b,): each row's own loss. ``model`` may be wrapped in DDP: call it, read no attributes.

        Row-wise on purpose: the loop divides by the step's true number of rows over all workers, so
        that a remainder batch, accumulation and more workers change nothing.
        """
        ...

    def val_sums(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over the batch's rows, in float64; the same keys and shapes for every batch.

        The loop adds them over batches and workers. ``model`` is the bare module, in eval mode.
        """
        ...

    def val_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The metrics of the whole validation set from its sums (CPU); holds ``val_loss``."""
        ...

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Modules whose activations may be recomputed instead of kept; may be empty."""
        ...


def frozen_tensors(task: Task, device: torch.device) -> list[Tensor]:
    """What ``task`` keeps on ``device`` beside its model, trained by nobody: the weights of a frozen
    backbone, where its ``frozen_tensors(device)`` names any. Loads them.
    """
    named = getattr(task, "frozen_tensors", None)
    return list(named(device)) if named is not None else []


def epoch_stride(task: Task) -> int:
    """What is added to a row's number for each epoch, so that a source can make the row anew: 0, or
    the task's ``epoch_stride``, which is then above the number of all of its rows.

    Row ``epoch * stride + row`` is the same sample under other augmentation. Validation rows stay.
    """
    return int(getattr(task, "epoch_stride", 0))


def epoch_cost(task: Task, metrics: Mapping[str, float]) -> float:
    """What the best epoch has least of: ``val_loss``, or what the task's ``epoch_cost(metrics)`` is."""
    named = getattr(task, "epoch_cost", None)
    return float(named(metrics) if named is not None else metrics["val_loss"])


def check_per_row(loss: Tensor, rows: int) -> Tensor:
    """``loss`` as it is; raises ConfigError when it is not (rows,) and floating."""
    if loss.shape != torch.Size((rows,)) or not loss.is_floating_point():
        raise ConfigError(
            f"the task's loss is {loss.dtype} {tuple(loss.shape)} for {rows} rows; "
            "a task gives one loss a row"
        )
    return loss
