"""Time to first token and between tokens, guided and not, through HTTP streaming under an open-loop load.

Requests arrive by a Poisson process whose rate is a share of what the server completes unguided, the same rate for both
kinds, in blocks by turns: a slow server does not make its clients wait with their next request. Prompts share a prefix
and end each in its own way, so a request prefills a little.
"""

import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tqdm import tqdm

from benchmarks.guidance.pairs import Pair, prompts
from benchmarks.guidance.serving import ROWS, block, body, server

QUANTILES = (50, 99)


@dataclass
class Streams:
    """What clients saw, seconds."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Quantiles over all streams and all gaps, and their numbers."""
        quantiles = {
            f"{name}_p{q}_s": float(np.percentile(values, q))
            for name, values in (("first", self.first), ("gap", self.gaps))
            for q in QUANTILES
        }
        return {**quantiles, "streams": len(self.first), "gaps": len(self.gaps)}


def measure(pair: Pair, folder: Path, streams: int, tokens: int, rounds: int, load: float) -> dict[str, Any]:
    """Latency of `streams` requests of each kind, `tokens` tokens each.

    Args:
        load: arrival rate, as a share of the unguided capacity measured just before.
    """
    with server(pair, folder, "ours") as url:
        return asyncio.run(_measure(pair, url, streams, tokens, rounds, load))


async def _measure(pair: Pair, url: str, streams: int, tokens: int, rounds: int, load: float) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        capacity = {}
        for guided in (False, True):
            for seed, waves in ((1, 1), (2, 2)):  # the first block warms up
                given = prompts(pair, waves * ROWS, seed + 10 * guided)
                bodies = [body(ids, tokens, guided=guided) for ids in given]
                capacity[guided] = len(bodies) / await block(http, bodies)
        rate = load * capacity[False]
        found = {False: Streams(), True: Streams()}
        with tqdm(total=2 * streams, desc=f"{pair.name}: streams", unit="stream") as bar:
            for turn in range(rounds):
                share = streams * (turn + 1) // rounds - streams * turn // rounds
                for guided in (False, True) if turn % 2 else (True, False):
                    given = prompts(pair, share, seed=100 + 2 * turn + guided)
                    bodies = [body(ids, tokens, guided=guided) | {"stream": True} for ids in given]
                    await _arrivals(http, bodies, rate, random.Random(turn), found[guided], bar)
    return {
        "pair": pair.name, "tokens": tokens, "load": load, "rate_per_s": rate,
        "capacity_per_s": capacity[False], "guided_capacity_per_s": capacity[True],
        "unguided": found[False].record(), "guided": found[True].record(),
    }  # fmt: skip


async def _arrivals(
    http: httpx.AsyncClient, bodies: list[dict[str, Any]], rate: float, dice: random.Random, found: Streams, bar: Any
) -> None:
    """Sends the requests at Poisson arrivals, `rate` a second, and waits for the last stream's end."""
    async with asyncio.TaskGroup() as tasks:
        due = time.perf_counter()
        for asked in bodies:
            due += dice.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.create_task(_stream(http, asked, found, bar))


async def _stream(http: httpx.AsyncClient, asked: dict[str, Any], found: Streams, bar: Any) -> None:
    started = last = time.perf_counter()
    chunks = 0
    async with http.stream("POST", "/v1/completions", json=asked) as stream:
        stream.raise_for_status()
        async for line in stream.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            (found.gaps if chunks else found.first).append(now - (last if chunks else started))
            last = now
            chunks += 1
    assert chunks > 1, chunks
    bar.update()
