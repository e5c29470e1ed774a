"""A core for critics, beside the reference's.

vLLM binds a CPU worker's threads to cores of their own and leaves at least one to its scheduler and to the front end,
which have next to nothing to do while the reference's forward pass runs.
"""

import os
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch

from qsharp_core.critic.model import Critic

# Weights that a token is multiplied by, from which on a Q head's critic gains. Python runs one thread at a time: a pass
# that is Python for the most part holds up the reference's. Between the two that were measured (docs/decisions.md).
LEAST_WEIGHTS = 4_000_000


def beside(vllm_config: Any) -> Executor | None:
    """A thread that runs on the cores left over; None where there are none.

    Nor is there one where this worker has several threads: torch has one number of threads for a whole process, and
    what runs beside would take as many.
    """
    left = _left_over(vllm_config)
    return ThreadPoolExecutor(1, "critic", initializer=os.sched_setaffinity, initargs=(0, left)) if left else None


def spare(vllm_config: Any, device: torch.device) -> Executor:
    """A thread for what can wait: on the cores left over where there are some, and after all that runs on its cores."""
    left = _left_over(vllm_config) if device.type == "cpu" else set()
    return ThreadPoolExecutor(1, "audit", initializer=_give_way, initargs=(left,))


def _give_way(left: set[int]) -> None:
    if sys.platform == "linux":  # elsewhere this would be said of the whole process
        os.setpriority(os.PRIO_PROCESS, 0, 19)
    if left:
        os.sched_setaffinity(0, left)


def _left_over(vllm_config: Any) -> set[int]:
    """Cores that neither this worker nor another one has."""
    if sys.platform != "linux":
        return set()  # elsewhere threads cannot be bound
    parallel = vllm_config.parallel_config
    workers = parallel.tensor_parallel_size * parallel.data_parallel_size
    if workers > 1 or torch.get_num_threads() > 1:
        return set()  # of several workers, the others' cores would count as left over
    # The scheduler, whose child every worker on CPUs is, is not bound.
    return os.sched_getaffinity(os.getppid()) - os.sched_getaffinity(0)


def gains(critic: Critic) -> bool:
    """Whether a critic gains by running beside the reference: prompts do, and a Q head's steps where it is large."""
    return critic.head.shape.kind == "V" or critic.backbone.num_parameters(exclude_embeddings=True) >= LEAST_WEIGHTS
