"""By which errors Ray says that an actor is not there: it died, or it never came to its node.

An actor that is bound to one node ends in ActorUnschedulableError when the node is lost before it was
placed, or placed again, and in RuntimeEnvSetupError when its packages cannot be had there: neither is
a RayActorError. Nor is OutOfMemoryError, with which one ends that Ray's own monitor killed. What an
actor's own code raised is RayTaskError.
"""

from __future__ import annotations

from ray.exceptions import (
    ActorUnschedulableError,
    OutOfMemoryError,
    RayActorError,
    RuntimeEnvSetupError,
)

ACTOR_LOST = (RayActorError, ActorUnschedulableError, RuntimeEnvSetupError, OutOfMemoryError)
