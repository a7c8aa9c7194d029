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


class Parts(nn.Module):
    """Parameters, one of them twice and one frozen, buffers, and one part that is on the CPU already."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3, device=device)
        self.two = nn.Linear(3, 3, device=device)
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(3, device=device)
        self.norm.weight.requires_grad_(False)
        self.register_buffer("shift", torch.ones(3, device=device), persistent=False)
        self.here = nn.Linear(2, 2)


def test_a_model_is_copied_to_the_cpu_without_a_second_one_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ "meta" stands for a GPU: nothing may be allocated on it."""
    deepcopy = {kind: kind.__deepcopy__ for kind in (Tensor, nn.Parameter)}

    def guarded(self: Tensor, memo: dict[int, object]) -> Tensor:
        assert self.device.type == "cpu", "copied where it is"
        return deepcopy[type(self)](self, memo)

    def cpu(self: Tensor) -> Tensor:
        return torch.full_like(self, 7, device="cpu") if self.is_meta else self

    for kind in deepcopy:
        monkeypatch.setattr(kind, "__deepcopy__", guarded)
    monkeypatch.setattr(Tensor, "cpu", cpu)
    model = Parts("meta").eval()
    sent = _on(model, "cuda", here=False)
    assert isinstance(sent, Parts) and sent is not model and not sent.training
    assert sent.two.weight is sent.one.weight
    assert sent.state_dict().keys() == model.state_dict().keys(), "shift is not saved"
    both = [dict((*m.named_parameters(), *m.named_buffers())) for m in (model, sent)]
    assert both[0].keys() == both[1].keys()
    for name, tensor in both[0].items():
        ours = both[1][name]
        assert type(ours) is type(tensor) and ours is not tensor
        assert ours.requires_grad == tensor.requires_grad and ours.device.type == "cpu"
        assert tensor.is_meta == (not name.startswith("here.")), "the caller's stays"
        assert not tensor.is_meta or bool((ours == 7).all())
    assert sent.here.weight.data_ptr() != model.here.weight.data_ptr()
    assert torch.equal(sent.here.weight, model.here.weight)


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


@pytest.mark.gpu
@NO_CUDA
def test_a_model_goes_to_other_processes_without_a_second_one_on_the_gpu() -> None:
    model = nn.Linear(2048, 2048, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sent = _on(model, "cuda", here=False)
    assert torch.cuda.max_memory_allocated() == before
    assert torch.equal(sent.weight, model.weight.cpu()) and model.weight.is_cuda
