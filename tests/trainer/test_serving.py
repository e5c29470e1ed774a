"""Starting a server from a coroutine: one that is cancelled meanwhile leaves nothing behind."""

import asyncio
import functools
import os
import time
from pathlib import Path

import pytest

from trainer import serving
from trainer.serving import ServingError

SILENT = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_cancelled_while_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "serve", functools.partial(serving.serve, command=("python", "-c", SILENT)))
    note = tmp_path / "pid"

    async def entered() -> None:
        async with serving.serving([str(note)], tmp_path / "log"):
            raise AssertionError("it never answers")

    async def cancelled() -> None:
        task = asyncio.create_task(entered())
        while not note.exists() or not note.read_text():
            await asyncio.sleep(0.05)
        assert alive(int(note.read_text()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    began = time.monotonic()
    asyncio.run(cancelled())
    assert not alive(int(note.read_text()))
    assert time.monotonic() - began < 120  # of the 300 s that it would be waited for


def test_one_that_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = ("python", "-c", "import sys; print('no such model'); sys.exit(3)")
    monkeypatch.setattr(serving, "serve", functools.partial(serving.serve, command=dying))

    async def entered() -> None:
        async with serving.serving([], tmp_path / "log"):
            raise AssertionError("it never answers")

    with pytest.raises(ServingError, match=r"(?s)exit status 3.*no such model"):
        asyncio.run(entered())
