"""`/liveness` asks the worker itself; `/version` tells ours beside vLLM's. `/health` stays vLLM's."""

from importlib.metadata import version

import vllm
from fastapi import APIRouter, FastAPI, Request

from server.state import state_of

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


def attach(app: FastAPI) -> None:
    """Adds the routes."""
    app.include_router(router)
