"""A worker on CPUs keeps the memory it frees."""

import platform
import subprocess
import sys

import pytest

FREED = """
import resource, sys
from pathlib import Path
from qsharp_core.vllm_plugin.memory import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

if "keep" in sys.argv:
    assert keep_freed_memory()
before = resident()
for _ in range(2):
    buffers = [bytearray(b"x" * 2**20) for _ in range(100)]
    del buffers
print((resident() - before) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone")
def test_a_hundred_freed_mebibytes_stay_with_the_process() -> None:
    stayed = {
        way: int(subprocess.run([sys.executable, "-c", FREED, way], capture_output=True, text=True, check=True).stdout)
        for way in ("keep", "as it is")
    }
    assert stayed["keep"] > 90, stayed
    assert stayed["as it is"] < 50, stayed
