"""A row of the planner's table that could not be measured: said there, and no end of a plain fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_helpers import ToyModel, ToyTask, config, run

from raypipe.train.planner import predict

CPU = torch.device("cpu")


class Fp32Only(ToyModel):
    """As a model with a kernel of its own that has no bf16."""

    error: type[RuntimeError] = RuntimeError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        if y.dtype != torch.float32:
            raise self.error("CUBLAS_STATUS_EXECUTION_FAILED: no kernel for BFloat16\nsecond line")
        return y


@dataclass(frozen=True)
class Fp32Task(ToyTask):
    def build_model(self) -> nn.Module:
        return Fp32Only(self.dropout)


@pytest.fixture
def fp32_only(toy: ToyTask) -> Fp32Task:
    return Fp32Task(toy.data)


def test_a_set_that_nobody_asked_for_may_fail(fp32_only: Fp32Task, tmp_path: Path) -> None:
    said: list[str] = []
    result = run(fp32_only, config(predict_memory=True), tmp_path / "run", say=said.append)
    assert result.epochs == 3
    rows = [line for line in said[0].splitlines() if "AMP bf16" in line]
    assert len(rows) == 2
    assert all("not measured, RuntimeError: CUBLAS_STATUS_EXEC" in line for line in rows)
    assert any(line.split()[0] == "fp32" and line.endswith("<-") for line in said[0].splitlines())


def test_the_set_that_was_asked_for_may_not(fp32_only: Fp32Task) -> None:
    with pytest.raises(RuntimeError, match="no kernel for BFloat16"):
        predict(fp32_only, config(amp="bf16"), CPU)


def test_fit_gpu_chooses_among_those_that_were_measured(fp32_only: Fp32Task) -> None:
    plan = predict(fp32_only, config(), CPU)
    needs = {p.techniques.name: plan.peak_bytes(p, 8) for p in plan.predictions if p.footprint}
    assert set(needs) == {"fp32", "checkpointing"}
    assert plan.choose(max(needs.values())).cfg.amp == "off"


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: out of memory",
        "NCCL error in: NCCLUtils.hpp:268, unhandled cuda error\nLast error:\nCuda failure 'out of memory'",
        "ncclUnhandledCudaError: Call to CUDA function failed.\nCuda failure 2 'out of memory'",
    ],
)
def test_a_library_without_memory_is_a_device_without_memory(
    toy: ToyTask, tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The micro batch is halved and computed again, as after torch's own error."""
    real: Any = ToyTask.loss

    def loss(self: ToyTask, model: nn.Module, batch: Any) -> Tensor:
        if len(batch["row"]) > 4:
            raise RuntimeError(words)
        found: Tensor = real(self, model, batch)
        return found

    monkeypatch.setattr(ToyTask, "loss", loss)
    said: list[str] = []
    assert run(toy, config(), tmp_path / "run", say=said.append).epochs == 3
    assert sum("at most 4 rows from here on" in text for text in said) == 1
    found = predict(toy, config(), CPU)  # of 2 and 3 rows
    assert all(p.footprint or p.why_not.startswith("as ") for p in found.predictions)


def test_another_error_is_none_of_memory(
    toy: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(self: ToyTask, model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(ToyTask, "loss", loss)
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        run(toy, config(), tmp_path / "run")
