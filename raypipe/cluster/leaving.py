"""A driver that leaves Ray Train takes it along: its controller, and with it the workers, wherever they wait.

Ray Train's controller is an actor of its own. A driver that is interrupted and goes on with its session
would leave it waiting for a place or for memory, and then training, for nobody. It runs on the driver's
node, so a file in the run folder tells it at once: one that waits for a place hears no calls. The file
bears the name of one call's workers (`TrainSetup.name`): an order outlives its driver's patience, and
the next training in that folder must neither heed nor withdraw it.

Only the controller knows when workers that trained begin anew: it says so (`raypipe.train.stop`) before it
waits for their place, so that a Ctrl-C then is not taken for one while they train. It imports no torch.
"""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raypipe.train.stop import note_training, unless_stopping

LOOK_S = 0.2
LOOKS = (
    5  # for places that are being asked for: a second, which a busy machine may take to note one
)


def leave(run_dir: Path, name: str) -> None:
    """Ask the controller of the training ``name`` in ``run_dir`` to end."""
    _order(run_dir, name).touch()


def has_left(run_dir: Path, name: str) -> None:
    """It need not be asked any more."""
    _order(run_dir, name).unlink(missing_ok=True)


def ask_for_no_nodes(run_id: str) -> None:
    """For a training whose controller was killed: an autoscaler would be asked for its workers' nodes for
    up to 3 minutes more. Ray logs it where that cannot be taken back.
    """
    TrainAutoscalingCoordinatorClient(f"train-{run_id}").cancel_resource_request()


def _order(run_dir: Path, name: str) -> Path:
    return run_dir / f".leave-{name}"


class LeavesWithDriver(ControllerCallback):
    """Ends the controller that it is given to when its driver asks by `leave`."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._run_dir, self._file = run_dir, _order(run_dir, name)

    def after_controller_start(self, train_run_context: object) -> None:
        """Called in the controller."""
        me = ray.get_runtime_context().current_actor
        threading.Thread(target=self._look, args=(me,), daemon=True).start()

    def on_controller_start_worker_group(self, **_: object) -> dict[str, str] | None:
        """Called before each group's place is asked for: none is, once it has to end or to stop.

        Raises Interrupted, which Ray Train takes for the end.
        """
        while self._asked():
            time.sleep(LOOK_S)
        note_training(self._run_dir, False)
        # Asked to stop while they trained still, and nobody has finished that step.
        unless_stopping(self._run_dir)
        return None

    def _look(self, me: Any) -> None:
        while not self._asked():
            time.sleep(LOOK_S)
        try:
            # One that was asked for a moment ago has no object until Ray has noted it; no other follows.
            for _ in range(LOOKS):
                time.sleep(LOOK_S)
                _give_places_back()
        finally:
            ray.kill(me)

    def _asked(self) -> bool:
        try:
            return self._file.exists()
        except OSError:  # a network disk that is away for a moment: the next look tells
            return False


def _give_places_back() -> None:
    """Ray keeps a dead actor's places, taken or asked for, until the whole job ends; and nothing names
    those of a controller that waits: all that this process has made are its own.
    """
    for group in [one for one in gc.get_objects() if type(one) is PlacementGroup]:
        remove_placement_group(group)
