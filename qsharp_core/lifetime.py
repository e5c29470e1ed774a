"""Processes that end with the one that started them."""

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent ends, however that ends; for children of `multiprocessing`.

    vLLM calls this in each of its processes, as a plugin. Its engine and workers otherwise notice only after a while
    that the API process was killed, and hold their memory until then. In a process that nobody started, and on other
    systems than Linux, it does nothing.
    """
    parent = multiprocessing.parent_process()
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it ended before we asked
        os._exit(1)
