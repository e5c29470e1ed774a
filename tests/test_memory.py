"""A worker on CPUs keeps the memory it frees."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from qsharp_core.vllm_plugin.memory import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
def step():
    buffers = [torch.ones(3_000_000) for _ in range(4)]
    return sum(len(buffer) for buffer in buffers)
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone")
def test_temporaries_are_not_taken_from_the_kernel_again() -> None:
    faults = {
        way: int(subprocess.run([sys.executable, "-c", STEPS, way], capture_output=True, text=True, check=True).stdout)
        for way in ("keep", "as it is")
    }
    assert faults["keep"] < 1000, faults
    assert faults["keep"] < faults["as it is"] / 10, faults
