"""What torch and the driver say of GPUs: pinned memory, devices by either, a device that is real."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from raypipe.memory import gpu
from raypipe.memory.config import GIB
from raypipe.memory.probe import (
    charge,
    charge_bytes,
    gpu_memory,
    pinned_bytes,
)

MIB = 1024**2


class FakeCuda:
    """torch.cuda with two devices, as far as the probe asks."""

    def is_initialized(self) -> bool:
        return True

    def host_memory_stats_as_nested_dict(self) -> dict[str, Any]:
        return {"allocated_bytes": {"current": 5 * MIB, "peak": 9 * MIB}}

    def device_count(self) -> int:
        return 2

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(name=f"card {index}", total_memory=10 * GIB, uuid=f"uuid-{index}")

    def memory_allocated(self, index: int) -> int:
        return index + 1

    def memory_reserved(self, index: int) -> int:
        return 10 * (index + 1)

    def max_memory_allocated(self, index: int) -> int:
        return 100 * (index + 1)


class FakeNvml:
    """A driver whose order is not torch's."""

    NVMLError = RuntimeError

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if not uuid.startswith("GPU-"):
            raise RuntimeError
        return uuid

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        if index >= 2:
            raise RuntimeError
        return f"GPU-uuid-{1 - index}"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetName(self, handle: str) -> bytes:  # noqa: N802
        return f"card {handle[-1]}".encode()

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=(int(handle[-1]) + 1) * GIB, total=10 * GIB)


def test_pinned_memory_is_charged_once_torch_uses_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=FakeCuda()))
    assert pinned_bytes() == 5 * MIB
    now = charge()
    assert now.total_bytes == now.anon_bytes + 5 * MIB + now.shm_bytes


@pytest.mark.parametrize(
    "torch", [SimpleNamespace(), SimpleNamespace(cuda=SimpleNamespace()),
              SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False))],
)  # fmt: skip
def test_a_torch_that_is_half_imported_or_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, torch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(gpu, "_nvml", lambda: None)
    assert pinned_bytes() == 0 and gpu_memory() == ()


def test_devices_by_torch_with_the_drivers_figures_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=FakeCuda()))
    monkeypatch.setattr(gpu, "_nvml", FakeNvml)
    first, second = gpu_memory()
    assert (first.index, first.name, first.allocated_bytes, first.reserved_bytes) == (
        0,
        "card 0",
        1,
        10,
    )
    assert (first.peak_allocated_bytes, first.used_bytes, first.total_bytes) == (100, GIB, 10 * GIB)
    assert (second.index, second.used_bytes, second.peak_allocated_bytes) == (1, 2 * GIB, 200)
    monkeypatch.setattr(gpu, "_nvml", lambda: None)
    assert [found.used_bytes for found in gpu_memory()] == [10, 20]


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["card 1", "card 0"]),
        ("1", ["card 0"]),
        ("GPU-uuid-1,0", ["card 1", "card 1"]),
        ("0,7,1", ["card 1"]),
        ("", []),
    ],
)
def test_devices_by_the_driver_alone(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    monkeypatch.setattr(gpu, "_nvml", FakeNvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = gpu_memory()
    assert [device.name for device in found] == names
    assert all(device.allocated_bytes == 0 and device.used_bytes for device in found)


@pytest.mark.gpu
def test_on_a_real_device() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    held = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    device = gpu_memory()[torch.cuda.current_device()]
    assert device.allocated_bytes >= held.numel() and device.peak_allocated_bytes >= held.numel()
    assert device.reserved_bytes <= device.used_bytes <= device.total_bytes
    before = charge_bytes()
    pinned = torch.empty(64 * MIB, dtype=torch.uint8).pin_memory()
    assert pinned_bytes() >= pinned.numel()
    assert charge_bytes() - before >= pinned.numel()
