"""Where a critic runs while the reference does."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from qsharp_core.vllm_plugin import cores

TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="wants two cores")
# A worker as vLLM starts it: bound to cores of its own, its parent not.
WORKER = """
import os, sys
from types import SimpleNamespace
import torch
from qsharp_core.vllm_plugin import cores

torch.set_num_threads(1)
os.sched_setaffinity(0, {int(sys.argv[1])})
config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1))
with cores.critic_executor(config) as thread:
    print(*sorted(thread.submit(os.sched_getaffinity, 0).result()))
    # A pass with a parallel region in it must not move the thread: OpenMP binds threads, too.
    thread.submit(lambda: torch.randn(512, 512) @ torch.randn(512, 512)).result()
    print(*sorted(thread.submit(os.sched_getaffinity, 0).result()))
"""


def config() -> SimpleNamespace:
    return SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1))


@TWO_CORES
def test_the_critics_thread_has_the_cores_that_the_worker_has_not() -> None:
    own, *left = sorted(os.sched_getaffinity(0))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "true", "OMP_PLACES": f"{{{own}}}"}
    ran = subprocess.run(
        [sys.executable, "-c", WORKER, str(own)], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == [" ".join(map(str, left))] * 2


def test_there_is_none_where_no_core_is_left() -> None:
    assert torch.get_num_threads() == 1  # see conftest
    assert cores.critic_executor(config()) is None  # this process is bound as its parent is
    for field in ("tensor_parallel_size", "data_parallel_size"):
        several = config()
        setattr(several.parallel_config, field, 2)
        assert cores.critic_executor(several) is None
