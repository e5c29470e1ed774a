"""Threads on the core that vLLM leaves over, beside the reference (CPUs).

vLLM binds the threads of a CPU worker to cores of their own, and leaves at least one core to its scheduler and to the
front end, which are almost idle while the reference's forward pass runs.
"""

import os
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch

from qsharp_core.critic.model import Critic

# A critic with a Q head gains by running beside the reference if its backbone has at least so many weights, embeddings
# left out. Python runs one thread at a time, so a pass that is mostly Python delays the reference's. The number lies
# between the two critics that were measured (docs/decisions.md).
LEAST_WEIGHTS = 4_000_000


def critic_executor(vllm_config: Any) -> Executor | None:
    """A thread that runs critics on the cores left over.

    None where no core is left over, and where this worker has several threads: torch has one number of threads for a
    whole process, so that a pass on the other core would take as many.
    """
    cores = _left_over(vllm_config)
    return ThreadPoolExecutor(1, "critic", initializer=os.sched_setaffinity, initargs=(0, cores)) if cores else None


def audit_executor(vllm_config: Any, device: torch.device) -> Executor:
    """A thread of the lowest priority for audits, on the cores left over where there are some."""
    cores = _left_over(vllm_config) if device.type == "cpu" else set()
    return ThreadPoolExecutor(1, "audit", initializer=_give_way, initargs=(cores,))


def gains_beside(critic: Critic) -> bool:
    """Whether a critic gains by running beside the reference.

    With a V head prompts gain. With a Q head steps gain, too, but only where the backbone is large.
    """
    return critic.head.shape.kind == "V" or critic.backbone.num_parameters(exclude_embeddings=True) >= LEAST_WEIGHTS


def _give_way(cores: set[int]) -> None:
    if sys.platform == "linux":  # elsewhere this would set the priority of the whole process
        os.setpriority(os.PRIO_PROCESS, 0, 19)
    if cores:
        os.sched_setaffinity(0, cores)


def _left_over(vllm_config: Any) -> set[int]:
    """The cores that vLLM gives to no worker; none where that cannot be told or used."""
    if sys.platform != "linux":
        return set()  # elsewhere threads cannot be bound
    parallel = vllm_config.parallel_config
    workers = parallel.tensor_parallel_size * parallel.data_parallel_size
    if workers > 1 or torch.get_num_threads() > 1:
        return set()  # with several workers, the cores of the others would count as left over
    # Every worker on CPUs is a child of the scheduler, which is not bound.
    return os.sched_getaffinity(os.getppid()) - os.sched_getaffinity(0)
