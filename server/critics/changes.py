"""Changes to the critics of this server: what the admin's routes and the follower of the store both do."""

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from qsharp_core.errors import QSharpError
from server.critics.catalog import CriticInfo
from server.errors import ConflictError
from server.state import QSharpState

logger = logging.getLogger("vllm.qsharp")


async def load(state: QSharpState, folder: Path, name: str | None) -> CriticInfo:
    """Loads a critic beside the running engine."""
    key = await state.workers.load(str(folder), name)
    await state.refresh()
    info = state.catalog.critics.get(key)
    if info is None:
        raise ConflictError(f"{key} was loaded, and has been unloaded since")
    return info


async def activate(state: QSharpState, info: CriticInfo) -> None:
    """Makes a version the one that its name means; `state.changing` is held."""
    previous = state.catalog.active.get(info.name)
    await state.workers.activate(info.key)
    await state.refresh()
    state.catalog.activated(info.name, previous)


async def unload(state: QSharpState, info: CriticInfo) -> None:
    """Frees a version that has left the catalog, when the requests that were admitted with it have ended."""
    await info.idle.wait()  # until then they may reach the worker
    await state.workers.unload(info.key)
    await state.refresh()


_tasks: set[asyncio.Task[None]] = set()


def start(work: Coroutine[Any, Any, None]) -> None:
    """Runs an unloading in the background; what fails is logged."""
    task = asyncio.create_task(work)
    _tasks.add(task)
    task.add_done_callback(_ended)


def _ended(task: "asyncio.Task[None]") -> None:
    _tasks.discard(task)
    if not task.cancelled() and isinstance(error := task.exception(), QSharpError):
        logger.error("unloading a critic failed: %s", error)
