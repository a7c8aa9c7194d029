"""Keeps Ray Data a few blocks ahead of who reads them, and its scheduler asleep meanwhile.

Ray Data 2.60 makes blocks until its part of the object store is full. For descriptors, which are small,
that took all cores for as long as they came, a process for each of a hundred tasks. And then, with
nothing under way and nothing to begin, its scheduling loop ran without a pause, 0.9 of a core of the
process that trains.
"""

from __future__ import annotations

import time

from ray.data import Dataset
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.interfaces import PhysicalOperator

# Blocks that are made or wait to be read; one carries hundreds of steps and more.
BLOCKS = 3
# A block that is taken is replaced so late; a block lasts for seconds.
PAUSE_S = 0.05


class FewAhead(BackpressurePolicy):
    """No operator begins a block while `BLOCKS` of its own are on their way to the reader."""

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """Called in Ray Data's scheduling loop, in a thread of its own, once a round."""
        if not op.input_dependencies:
            return True
        waiting = self._topology[op].total_enqueued_output_blocks()
        under_way = op.num_active_tasks()
        if waiting + under_way < BLOCKS:
            return True
        if not under_way:  # else the loop waits for them by itself
            time.sleep(PAUSE_S)
        return False


def stay_few_ahead(dataset: Dataset) -> None:
    """Let ``dataset`` be made by this rule, beside Ray Data's own."""
    policies = [FewAhead, *ENABLED_BACKPRESSURE_POLICIES]
    dataset.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
    # Ray Data ends an execution in which nothing moved for half an hour. Here nothing moves while the
    # reader works through a block, or validates: that may take longer, and is no fault.
    dataset.context.execution_no_progress_timeout_s = -1
