"""Processes that end with the one that started them, so that a kill leaves no training behind.

    python -m trainer.training.lifeline PARENT PROGRAM [ARGUMENTS]

becomes that program, which then ends when the process PARENT does. Linux only: elsewhere nothing happens.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with(parent: int | None) -> None:
    """Has SIGTERM end this process when the one that started it ends, by SIGKILL even.

    Args:
        parent: its id; None: whichever it is.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent is not None and os.getppid() != parent:
        sys.exit("training: the process that started this has ended")


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background has it ignored, and whatever is started there
    os.execv(sys.argv[2], sys.argv[2:])  # what is asked of the kernel above holds beyond this
