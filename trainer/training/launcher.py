"""Training in the processes that a launcher of choice starts: `accelerate launch …`, `torchrun …`, `srun python`.

    LAUNCHER -m trainer.training.job FILE

What the processes write is shown as it comes, and the end of it is kept to be said in an error.
"""

import asyncio
import os
import shlex
import shutil
import signal
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from trainer.training.settings import TrainingError

REASONS = ("training: ", "qsharp train: ")
"""How a line begins that says why a training failed; launchers write much after it."""
LAST_LINES = 5
LINES_KEPT = 200
STEPS = ((signal.SIGINT, 60.0), (signal.SIGTERM, 15.0))
"""What ends a launcher, and the seconds that it gets for it: a step, a checkpoint."""
AFTER_THE_END = 5.0
"""Seconds that what was written is waited for: a process that was left behind may hold the pipe."""

Launcher = tuple[str, ...]
"""A program, by its path, and its arguments."""


def launcher_of(text: str) -> Launcher:
    """The launcher that a text names, as a shell reads it.

    Raises:
        TrainingError: the text cannot be read, or there is no such program.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise TrainingError(f"--launcher {text!r} cannot be read as a shell would: {error}") from error
    if not words:
        raise TrainingError("--launcher names no program")
    # Beside this Python, too: a virtual environment need not be on the path.
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    program = shutil.which(words[0], path=places)
    if program is None:
        raise TrainingError(f"--launcher {text!r}: there is no program {words[0]!r} here")
    return (program, *words[1:])


async def launch(launcher: Launcher, *arguments: str) -> None:
    """Runs `LAUNCHER ARGUMENTS` to its end. If this is cancelled, it is interrupted as by Ctrl-C, and waited for.

    Raises:
        TrainingError: its exit status is not 0; with why, or the last lines that were written.
    """
    # A process group of its own: Ctrl-C reaches it through this process alone, once. And no input: such a group that
    # reads the terminal is stopped.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "trainer.training.lifeline", str(os.getpid()), *launcher, *arguments,
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, process_group=0,
    )  # fmt: skip
    assert process.stderr is not None
    lines = deque[str](maxlen=LINES_KEPT)
    showing = asyncio.create_task(_show(process.stderr, lines))
    try:
        status = await process.wait()
    finally:
        await _end(process)
        with suppress(TimeoutError):
            await asyncio.wait_for(showing, AFTER_THE_END)
    if status:
        raise TrainingError(f"{shlex.join(launcher)} ended with status {status}: {_reason(lines)}")


async def _show(stream: asyncio.StreamReader, lines: deque[str]) -> None:
    """Passes on what is written as it comes, progress bars too, and keeps the last lines."""
    begun = b""
    while piece := await stream.read(65536):
        sys.stderr.buffer.write(piece)
        sys.stderr.buffer.flush()
        *whole, begun = (begun + piece).replace(b"\r", b"\n").split(b"\n")
        lines.extend(line.decode(errors="replace").strip() for line in whole)
    lines.append(begun.decode(errors="replace").strip())


def _reason(lines: Sequence[str]) -> str:
    """Why a training failed: what its processes say of it, each once, or else the last lines."""
    said = [line.removeprefix(mark) for line in lines for mark in REASONS if line.startswith(mark)]
    last = [line for line in lines if line][-LAST_LINES:]
    return "; ".join(dict.fromkeys(said)) or "\n".join(last) or "it wrote nothing"


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends a launcher that runs, and what is left of its process group in any case."""
    try:
        for number, patience in STEPS:
            if process.returncode is not None:
                return
            _signal(process, number)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience)
    finally:
        _signal(process, signal.SIGKILL)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
