"""--fit-gpu's hold on torch's CUDA allocator: by torch's own reading of the device, without a GPU; and
on one, where a run under a budget must stay below it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.cuda._utils import _get_device_index
from train_helpers import ToyTask, config, losses, run

from raypipe.train.planner import CUDA_CONTEXT_BYTES, device_budget

GIB = 1 << 30


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """(index, fraction) of each setting, on devices of 16 GiB held to 0.75 before."""
    set_to: list[tuple[int, float]] = []

    def set_fraction(fraction: float, device: Any = None) -> None:
        set_to.append((_get_device_index(device), fraction))  # as torch reads it: strictly

    def get_fraction(device: Any = None) -> float:
        _get_device_index(device)
        return 0.75

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_fraction)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", get_fraction)
    properties = SimpleNamespace(total_memory=16 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return set_to


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_a_device_with_and_without_a_number_is_held_and_let_go(
    fractions: list[tuple[int, float]], device: str, index: int
) -> None:
    budget = 4 * GIB + CUDA_CONTEXT_BYTES
    with device_budget(torch.device(device), budget):
        assert fractions == [(index, 0.25)]
    assert fractions[1:] == [(index, 0.75)]  # what it was, not all of the device


def test_an_error_lets_go_too(fractions: list[tuple[int, float]]) -> None:
    with pytest.raises(KeyError), device_budget(torch.device("cuda"), 64 * GIB):
        raise KeyError
    assert fractions == [(0, 1.0), (0, 0.75)]


@pytest.mark.parametrize(("device", "budget"), [("cpu", GIB), ("cuda", None)])
def test_nothing_is_held_elsewhere(
    fractions: list[tuple[int, float]], device: str, budget: int | None
) -> None:
    with device_budget(torch.device(device), budget):
        pass
    assert fractions == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_cuda_without_a_number_stays_below_its_budget(
    toy: ToyTask, tmp_path: Path
) -> None:
    run(toy, config(), tmp_path / "cpu")
    torch.cuda.reset_peak_memory_stats()
    run(toy, config(fit_gpu="2GiB"), tmp_path / "cuda", device="cuda")
    assert torch.cuda.max_memory_reserved() <= 2 * GIB - CUDA_CONTEXT_BYTES
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
    assert torch.cuda.get_per_process_memory_fraction(0) == 1.0
