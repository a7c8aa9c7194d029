"""How much memory a worker of a plan takes at its peak, from shapes alone: no pixel is computed.

The model is run on tensors without values (torch's "meta" device) while the bytes that live at once are
counted; windows and results follow from the grid; what the process holds anyway is read off this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.policy import Limits
from raypipe.memory.probe import charge_bytes
from raypipe.runner import LocalRunner, Prospect, Runner
from raypipe.tile.engine import BLOCK
from raypipe.tile.plan import TilePlan
from raypipe.tile.probe import dtype_of
from raypipe.tile.worker import After
from raypipe.units import format_bytes

_REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes of one worker that computes ``batch`` windows at once.

    base : a process with the libraries and the weights; windows : read, read ahead and prepared;
    network : at work, None where the model does not run without values (why_not); results : being
    written, and blended; on_gpu : network, weights and one batch lie there
    """

    batch: int
    base: int
    weights: int
    windows: int
    network: int | None
    results: int
    on_gpu: bool
    why_not: str = ""

    @property
    def host_bytes(self) -> int | None:
        """The peak that is held against the worker's budget; None when it is not known."""
        if self.network is None:
            return None
        return self.base + self.windows + self.results + (0 if self.on_gpu else self.network)

    def words(self, budget_bytes: int) -> str:
        """In one line."""
        if self.host_bytes is None or self.network is None:
            return f"not predicted: the model does not run by shapes alone ({self.why_not})"
        share = self.host_bytes / budget_bytes
        text = (
            f"predicted peak {format_bytes(self.host_bytes)} a worker process, {share:.0%} of its budget of "
            f"{format_bytes(budget_bytes)}: {format_bytes(self.base)} libraries and weights, "
            f"{format_bytes(self.windows + self.results)} windows and results"
        )
        if not self.on_gpu:
            return f"{text}, {format_bytes(self.network)} the network at work"
        gpu = format_bytes(self.weights + self.windows // 2 + self.network)
        return f"{text}; {gpu} on the GPU, without CUDA's own"


def forecast(plan: TilePlan, device: str, batch: int | None = None) -> Forecast:
    """Of a worker like this process, on ``device``; batch : windows at once, as ``plan`` says."""
    batch = batch or plan.cfg.batch
    model, dtype, on_gpu = plan.model, dtype_of(plan.model), not device.startswith("cpu")
    network, channels, why_not = None, plan.spec.channels, ""
    try:
        after = plan.after if plan.cfg.blend is None else None
        network, channels = live_bytes(
            model, (batch, *plan.window_shape), dtype, after, on_gpu=on_gpu
        )
    except _REFUSALS as error:
        why_not = " ".join(str(error).split())[:200]
    return Forecast(
        batch=batch,
        base=charge_bytes(),
        weights=sum(value.nbytes for _, value in _state(model)),
        windows=_window_bytes(plan, batch),
        network=network,
        results=_result_bytes(plan, batch, channels),
        on_gpu=on_gpu,
        why_not=why_not,
    )


def live_bytes(
    model: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    after: After | None = None,
    *,
    on_gpu: bool = False,
) -> tuple[int, int]:
    """(most bytes of tensors that live at once, channels of the result) while ``model`` maps a batch of
    ``shape``, without the batch and the weights. Raises what the model raises without values.
    """
    from raypipe.train.footprint import LiveBytes

    meta = {name: value.to("meta") for name, value in _state(model)}
    image = torch.empty(shape, dtype=dtype, device="meta")
    mode = LiveBytes(torch.device("meta"), [image, *meta.values()])
    with torch.inference_mode(), mode:
        out = functional_call(model, meta, (image,))
        channels = int(out.shape[1])
        if after is not None:
            out = after(out)
    return max(mode.timeline, default=0), channels


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _window_bytes(plan: TilePlan, batch: int) -> int:
    """The batch at work, the one that is read ahead, and one window while it is prepared."""
    wide = 8 if dtype_of(plan.model) == torch.float64 else 4
    one = math.prod(plan.window_shape) * wide
    raw = plan.source.channels * math.prod(plan.grid.window) * plan.source.dtype.itemsize
    return 2 * batch * one + 2 * (one + raw)


def _result_bytes(plan: TilePlan, batch: int, channels: int) -> int:
    """Two batches' results and a tile of them; when blending, an item's block and what becomes of it."""
    itemsize = np.dtype(plan.spec.dtype).itemsize
    tile = math.prod(min(axis.tile, axis.size) for axis in plan.grid.axes)
    tile *= plan.spec.channels * itemsize
    window = math.prod(plan.grid.window)
    if plan.cfg.blend is None:
        return 2 * batch * window * plan.spec.channels * itemsize + tile
    block = math.prod(min(BLOCK * axis.tile, axis.size) for axis in plan.grid.axes)
    # float32 sums, the block before that is being written, and one window weighed.
    return block * (4 * channels + 2 * plan.spec.channels * itemsize) + 3 * window * channels * 4


def budget_of(runner: Runner | Prospect, workers: int) -> int:
    """Bytes that each of ``workers`` may hold; those that meet on one machine share its memory."""
    config = runner.memory.config
    if isinstance(runner, LocalRunner):
        return config.budget_bytes
    cores = runner.machines.cores_for(workers)
    share = config.capacity_bytes(runner.memory.limits) // runner.machines.together(workers, cores)
    return min(config.budget_bytes, share)


def require_memory(plan: TilePlan, device: str, budget_bytes: int) -> None:
    """Raises MemoryBudgetExceeded when one window alone outgrows a worker, naming tiles that fit."""
    limit = Limits.of(budget_bytes).hard_bytes
    need = forecast(plan, device, batch=1).host_bytes
    if need is None or need <= limit:
        return
    fits = _that_fits(plan, device, limit)
    step = f"take --chunk-size {fits}, or" if fits else "it takes"
    raise MemoryBudgetExceeded(
        f"chunk_size {plan.cfg.chunk_size}: one window of {'x'.join(map(str, plan.grid.window))} pixels "
        f"needs {format_bytes(need)} in a worker, which is stopped at {format_bytes(limit)} of its budget "
        f"of {format_bytes(budget_bytes)}; {step} a larger --max-memory-per-process"
    )


def _that_fits(plan: TilePlan, device: str, limit: int) -> int | None:
    """The largest half, quarter, ... of the longest tile that fits; None when none does."""
    chunk = min(plan.cfg.chunk_size, max(plan.grid.shape))
    while (chunk := chunk // 2) >= max(plan.field.align):
        need = forecast(plan.resized(chunk), device, batch=1).host_bytes
        if need is not None and need <= limit:
            return chunk
    return None
