"""`/liveness` asks the workers whether they answer; `/version` shows our version beside vLLM's; `/health` is vLLM's.

`watch_engines` asks the same question every few seconds, for the metrics.
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
    await state.critics.workers.describe(timeout=state.settings.rpc_timeout)
    return {"status": "alive"}


@router.get("/version")
async def show_version() -> dict[str, str]:
    """vLLM's version as `version`, where vLLM itself shows it, and ours as `qsharp_serve`."""
    return {"version": vllm.__version__, "qsharp_serve": version("qsharp-serve")}


async def watch_engines(workers: Workers, timeout: float) -> None:
    """Updates the metrics of each engine forever; an engine that takes longer than `timeout` seconds counts as down."""
    while True:
        for engine, critics in enumerate(await workers.describe_each(timeout)):
            metrics.observe_engine(engine, critics)
        await asyncio.sleep(PULSE_SECONDS)


def attach(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
