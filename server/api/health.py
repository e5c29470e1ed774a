"""`/liveness` asks the worker itself; `/version` tells ours beside vLLM's. `/health` stays vLLM's.

What `/liveness` asks when somebody wants to know, `watch_engines` asks all the time, for the metrics.
"""

import asyncio
from importlib.metadata import version

import vllm
from fastapi import APIRouter, FastAPI, Request

from server import metrics
from server.critics.workers import Workers
from server.state import state_of

PULSE_SECONDS = 10.0  # between two questions; Prometheus seldom scrapes more often

router = APIRouter()


@router.get("/liveness")
async def liveness(request: Request) -> dict[str, str]:
    """200 if the engine's worker answers within the time-out, else 503."""
    state = state_of(request)
    await state.workers.describe(timeout=state.settings.rpc_timeout)
    return {"status": "alive"}


@router.get("/version")
async def show_version() -> dict[str, str]:
    """vLLM's version under `version`, as in vLLM, and ours."""
    return {"version": vllm.__version__, "qsharp_serve": version("qsharp-serve")}


async def watch_engines(workers: Workers, timeout: float) -> None:
    """Keeps the metrics of engines true, for ever; `timeout` is what a worker may take to answer."""
    while True:
        for engine, critics in enumerate(await workers.answering(timeout)):
            metrics.observe_engine(engine, critics)
        await asyncio.sleep(PULSE_SECONDS)


def attach(app: FastAPI) -> None:
    """Adds the routes."""
    app.include_router(router)
