"""A server without a model, for tests of what stands in front of servers: it samples a token when it is told to.

    uvicorn tests.support.small_server:app

Its health routes answer as a server's do that is ready, that ends (503 from `/health`) or that hangs (`/liveness`).
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

app = FastAPI()
PATH = "/v1/completions"
statuses = {"/health": 200, "/liveness": 200, PATH: 200}
counts: Counter[str] = Counter()
tokens = asyncio.Semaphore(0)


@app.get("/health")
@app.get("/liveness")
def health(request: Request) -> Response:
    return Response(status_code=statuses[request.url.path])


@app.put("/control/statuses")
def set_statuses(wanted: dict[str, int]) -> None:
    statuses.update(wanted)


@app.post("/control/tokens")
def release(number: int) -> None:
    """So many more tokens are sampled, whosever they are."""
    for _ in range(number):
        tokens.release()


@app.get("/control/counts")
def count() -> Counter[str]:
    """Requests that were `taken`, that are `running`, and whose clients were `left`."""
    return counts


@app.post(PATH)
async def complete(request: Request) -> Response:
    """Samples `max_tokens`; with `die` the process does, before it answers."""
    body: dict[str, Any] = await request.json()
    if statuses[PATH] != 200:
        counts["refused"] += 1
        return JSONResponse({"error": {"message": "full"}}, statuses[PATH])
    counts["taken"] += 1
    if body.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if body.get("stream"):
        return StreamingResponse(events(body["max_tokens"]), media_type="text/event-stream")
    counts["running"] += 1
    sampling = asyncio.ensure_future(sample(body["max_tokens"]))
    leaving = asyncio.ensure_future(left(request))
    await asyncio.wait({sampling, leaving}, return_when=asyncio.FIRST_COMPLETED)
    sampling.cancel()
    leaving.cancel()
    counts["running"] -= 1
    return JSONResponse({"usage": {"completion_tokens": body["max_tokens"]}})


async def events(number: int) -> AsyncIterator[bytes]:
    counts["running"] += 1
    try:
        for index in range(number):
            await tokens.acquire()
            yield b"data: %d\n\n" % index
    finally:
        counts["running"] -= 1


async def sample(number: int) -> None:
    for _ in range(number):
        await tokens.acquire()


async def left(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.02)
    counts["left"] += 1
