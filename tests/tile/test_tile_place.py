"""Where the model lies: the caller's is never moved, and other processes get one they can unpickle."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import raypipe
from raypipe.tile import worker
from raypipe.tile.engine import _on, _same


class There(nn.Module):
    """Says that it lies on ``device``, which this machine need not have."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.at = device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        weight = type("Weight", (), {"device": torch.device(self.at)})()
        yield weight  # type: ignore[misc]

    def to(self, device: str) -> There:  # type: ignore[override]
        self.at = device
        return self


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("cpu", "cpu", True),
        ("cpu", "cuda", False),
        ("cuda:1", "cuda:0", False),
        ("cuda:1", "cuda", True),
        ("cuda:0", "cuda", False),
        ("cuda", "cuda:1", True),
    ],
)
def test_devices_are_compared_with_their_numbers(
    monkeypatch: pytest.MonkeyPatch, one: str, other: str, same: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _same(torch.device(one), torch.device(other)) == same


def test_a_model_on_another_gpu_is_copied_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    there = There("cuda:1")
    assert _on(there, "cuda", here=True) is not there
    assert _on(there, "cuda:1", here=True) is there
    mixed = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, device="meta"))
    assert _on(mixed, "cpu", here=True) is not mixed, "its second part would be moved in place"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_processes_get_a_model_on_the_cpu(device: str) -> None:
    there = There("cuda:0")
    sent = _on(there, device, here=False)
    assert sent.at == "cpu" and there.at == "cuda:0"
    model = nn.Conv2d(1, 1, 1)
    assert _on(model, device, here=False) is model, "pickling copies it"


def test_memory_is_freed_after_what_filled_it_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error holds the frames of the failed forward, and these their tensors."""
    held: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            middle = x + 1
            if len(x) > 1:
                held.append(weakref.ref(middle))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return middle

    monkeypatch.setattr(worker, "relieve", lambda: alive.extend(ref() is not None for ref in held))
    image = np.zeros((64, 64), np.float32)
    got = raypipe.process_large_image(image, Large(), 32, dims=2, halo=0, align=1, batch=2)
    assert alive and not any(alive)
    np.testing.assert_array_equal(got, image + 1)


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


@pytest.mark.gpu
@NO_CUDA
def test_a_callers_model_stays_where_it_is() -> None:
    image = np.random.default_rng(0).standard_normal((70, 70)).astype(np.float32)
    model = nn.Conv2d(1, 1, 3, padding=1).eval()
    on_gpu = copy.deepcopy(model).to("cuda")
    one = raypipe.process_large_image(image, on_gpu, 32, device="cpu")
    other = raypipe.process_large_image(image, model, 32, device="cuda")
    assert on_gpu.weight.is_cuda and not model.weight.is_cuda
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
