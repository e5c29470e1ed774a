"""A closed-loop load: so many requests, some of them at once."""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import httpx


async def send(
    http: httpx.AsyncClient, bodies: Iterable[dict[str, Any]], clients: int, route: str = "/v1/completions"
) -> tuple[float, list[httpx.Response]]:
    """Posts the requests, `clients` of them at once: the wall time in seconds, and the answers as they came.

    Raises:
        httpx.HTTPStatusError: one was refused.
    """
    left, answers = iter(bodies), []

    async def client() -> None:
        for body in left:
            answer = await http.post(route, json=body)
            answer.raise_for_status()
            answers.append(answer)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started, answers
