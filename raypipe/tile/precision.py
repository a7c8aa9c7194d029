"""float32 as float32: TF32 off for a while on CUDA, and every setting put back as it was.

TF32 keeps 10 bits of a factor, by which a tile would differ from the whole image. torch (2.9 and later)
keeps a setting an operation, which follows the backend's, which follows `torch.backends`' own; the older
``allow_tf32`` cannot be read where it disagrees with them, so it is left alone here: a model that reads
it while it runs (as ``cudnn.flags`` does) is told so by torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Inside, CUDA multiplies float32 as float32; nothing is touched for another ``device``."""
    with ExitStack() as settings:
        if device.type == "cuda":
            backends: Any = torch.backends  # its stubs lack most of them
            cuda = backends.cudnn  # whose fp32_precision is all of CUDA's
            follows = _follows(cuda, backends)
            settings.enter_context(_ieee(cuda, "none" if follows else cuda.fp32_precision))
            for operation in (cuda.conv, cuda.rnn, backends.cuda.matmul):
                # One that follows does so already. Nor could it be put back: in torch 2.15 the first
                # state of conv, TF32 unless the backend says else, has no value of its own.
                if not _follows(operation, cuda):
                    settings.enter_context(_ieee(operation, operation.fp32_precision))
        yield


@contextmanager
def _ieee(place: Any, before: str) -> Iterator[None]:
    place.fp32_precision = "ieee"
    try:
        yield
    finally:
        place.fp32_precision = before


def _follows(place: Any, parent: Any) -> bool:
    """Whether ``place`` has no setting of its own, seen by setting ``parent``, whose own is put back."""
    seen = set()
    with _ieee(parent, parent.fp32_precision):
        for value in ("ieee", "tf32"):
            parent.fp32_precision = value
            seen.add(place.fp32_precision)
    return len(seen) > 1
