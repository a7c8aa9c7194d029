"""Activation checkpointing: a block's activations are computed again in the backward pass.

A block's forward then runs twice, and what it writes into its buffers must happen once: batch norm's
running statistics above all. So the second run gets copies of the buffers as they were before the
first one, which are thrown away with whatever it wrote: after a step the buffers equal those of a
plain run bit by bit, and a block that reads its buffers computes what it computed the first time.
(Momentum 0 in the second run would not do: 0 x inf is NaN when fp16 overflows.)

Both of torch's variants are served; random generators and autocast are torch's own to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# A module's dict of buffers, and a name in it.
_Place = tuple[dict[str, Tensor | None], str]


def recompute(blocks: Sequence[nn.Module], use_reentrant: bool) -> None:
    """Make each block recompute itself in the backward pass.

    The block keeps its place and its state_dict keys: only its instance's ``forward`` is replaced.
    """
    for block in blocks:
        block.forward = _recomputed(block, use_reentrant)


def _recomputed(block: nn.Module, use_reentrant: bool) -> Callable[..., Any]:
    forward, places = block.forward, _buffer_places(block)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        once = _OnceOnBuffers(forward, places)
        if not use_reentrant:
            return checkpoint(once, *args, use_reentrant=False, **kwargs)
        # The reentrant variant takes no keywords, and gives no gradient at all to a block whose
        # inputs need none (the first one, fed with data): hence the flat call and the ticket.
        names, n = tuple(kwargs), len(args)
        ticket = torch.ones((), requires_grad=True)

        def flat(_ticket: Tensor, *values: Any) -> Any:
            return once(*values[:n], **dict(zip(names, values[n:], strict=True)))

        return checkpoint(flat, ticket, *args, *kwargs.values(), use_reentrant=True)

    return run


class _OnceOnBuffers:
    """One call of a block: its first run is the call itself, any later one a recomputation."""

    def __init__(self, forward: Callable[..., Any], places: Sequence[_Place]) -> None:
        self._forward, self._places = forward, places
        self._before: list[Tensor | None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is None:
            self._before = [_copy(held[name]) for held, name in self._places]
            return self._forward(*args, **kwargs)
        with self._on_copies(self._before):
            return self._forward(*args, **kwargs)

    @contextmanager
    def _on_copies(self, before: Sequence[Tensor | None]) -> Iterator[None]:
        """The block with copies of ``before`` as its buffers; copies anew, as it may run again."""
        now = [held[name] for held, name in self._places]
        for (held, name), buffer in zip(self._places, before, strict=True):
            held[name] = _copy(buffer)
        try:
            yield
        finally:
            for (held, name), buffer in zip(self._places, now, strict=True):
                held[name] = buffer


def _buffer_places(block: nn.Module) -> list[_Place]:
    """Where ``block`` and the modules in it keep their buffers."""
    return [(part._buffers, name) for part in block.modules() for name in part._buffers]


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()
