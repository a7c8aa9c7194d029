"""What each GPU holds: torch's own count where torch uses it, the driver's (NVML) beside it.

Silent without a driver: a machine with no GPU gives an empty tuple and not a word. Never starts
CUDA, which would cost a process some hundred MiB for being asked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """One device. allocated, reserved, peak: this process's tensors, 0 before it uses CUDA.

    used, total : the whole device's, all processes together
    """

    index: int
    name: str
    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    used_bytes: int
    total_bytes: int


def gpu_memory() -> tuple[GpuMemory, ...]:
    """The devices this process can see, by torch's index once it uses CUDA."""
    cuda = initialised_cuda()
    if cuda is not None:
        return tuple(_of_torch(cuda, index) for index in range(cuda.device_count()))
    nvml = _nvml()
    if nvml is None:
        return ()
    return tuple(_of_driver(nvml, i, handle) for i, handle in enumerate(_visible(nvml)))


def initialised_cuda() -> Any | None:
    """``torch.cuda`` where this process uses it already, else None.

    torch may be half imported by another thread, hence the care.
    """
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    begun = getattr(cuda, "is_initialized", None)
    return cuda if begun is not None and begun() else None


def _of_torch(cuda: Any, index: int) -> GpuMemory:
    properties = cuda.get_device_properties(index)
    reserved = cuda.memory_reserved(index)
    used, total = _by_uuid(properties) or (reserved, int(properties.total_memory))
    return GpuMemory(
        index=index,
        name=properties.name,
        allocated_bytes=cuda.memory_allocated(index),
        reserved_bytes=reserved,
        peak_allocated_bytes=cuda.max_memory_allocated(index),
        used_bytes=used,
        total_bytes=total,
    )


def _by_uuid(properties: Any) -> tuple[int, int] | None:
    """(used, total) as NVML says; None without it.

    NVML may count devices in another order, so the uuid decides. cudaMemGetInfo would know too, and
    make a context of some hundred MiB on every device it is asked about.
    """
    nvml, uuid = _nvml(), getattr(properties, "uuid", None)
    if nvml is None or uuid is None:
        return None
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except nvml.NVMLError:
        return None  # a slice of a device (MIG) has a uuid of another kind
    return int(memory.used), int(memory.total)


def _of_driver(nvml: Any, index: int, handle: Any) -> GpuMemory:
    memory, name = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlDeviceGetName(handle)
    text = name.decode() if isinstance(name, bytes) else name
    return GpuMemory(
        index=index,
        name=text,
        allocated_bytes=0,
        reserved_bytes=0,
        peak_allocated_bytes=0,
        used_bytes=int(memory.used),
        total_bytes=int(memory.total),
    )


def _visible(nvml: Any) -> Iterator[Any]:
    """Handles of CUDA_VISIBLE_DEVICES, in its order; like CUDA it ends at the first unknown one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        yield from (nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount()))
        return
    for name in filter(None, (part.strip() for part in chosen.split(","))):
        try:
            if name.isdigit():
                yield nvml.nvmlDeviceGetHandleByIndex(int(name))
            else:
                yield nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError:
            return


@cache
def _nvml() -> Any | None:
    """pynvml with a driver behind it, or None."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
