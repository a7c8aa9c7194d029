"""The torch process group of Ray Train's workers, made without torch in the controller.

Ray's own ``TorchConfig`` loads torch wherever it is unpickled, so also in the controller, which
computes nothing and before whose first word nothing else begins: 3 of its 5 s of a core, measured.
Here only the workers load it: they call what Ray's backend has them call, in the same order. Ray is
pinned to 2.60, whose private functions these are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

_log = logging.getLogger(__name__)
# Ray's own: a process waits for the others of its group so long, and for its end no longer.
JOIN_S, LEAVE_S = 1800, 5.0


class GroupBackend(Backend):
    """Makes the group when the workers are up, and ends it before they go."""

    share_cuda_visible_devices = True  # NCCL wants to see its neighbours' GPUs

    def on_start(self, worker_group: Any, backend_config: TorchGroup) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        world = len(worker_group)
        joining = [
            worker_group.execute_single_async(
                rank, _join, address, port, rank, world, backend_config.backend
            )
            for rank in range(world)
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: TorchGroup) -> None:
        try:
            ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=LEAVE_S)
        except GetTimeoutError:
            _log.warning("the process group did not end in %g s", LEAVE_S)


@dataclass
class TorchGroup(BackendConfig):
    """What ``TorchTrainer`` takes for a TorchConfig; it fills ``backend`` in: nccl or gloo."""

    backend: str | None = None

    @property
    def backend_cls(self) -> type[Backend]:
        return GroupBackend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """Goes to the workers with what they run; the controller only passes that on."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager

    @property
    def framework(self) -> TrainingFramework:
        return TrainingFramework.TORCH


def _join(address: str, port: int, rank: int, world: int, backend: str) -> None:
    """In a worker."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(
        backend=backend,
        world_rank=rank,
        world_size=world,
        init_method="env://",
        timeout_s=JOIN_S,
    )


def _leave(destroy: bool) -> None:
    """In a worker."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=destroy)
