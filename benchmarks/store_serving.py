"""What `store: true` costs a server: tokens per second with and without, in turns, on one server.

    python -m benchmarks.store_serving [MODEL] [--rounds 5] [--json FILE]

MODEL is a folder; default: the embedded model. A round is a block of requests without and one with `store`, in changing
order; the cost is the median over rounds of the difference between the two, in percent.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks.load import send
from trainer.serving import serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model's folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="of a block")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--url", help="a running server instead, with a store")
    parser.add_argument("--json", type=Path, help="also write the result there")
    given = parser.parse_args()
    if given.url:
        report(given, asyncio.run(measure(given, given.url)))
        return
    if given.model is None:
        from server.presets.smollm2 import ensure_smollm2

        given.model = str(ensure_smollm2())
    with tempfile.TemporaryDirectory(prefix="qsharp-") as folder:
        flags = [given.model, "--rollouts", f"sqlite:///{folder}/rollouts.db", "--max-model-len", "1024"]
        flags += ["--max-num-seqs", "32", "--dtype", "float32", "--enforce-eager"]
        with serve(flags, Path(folder) / "log", {"VLLM_CPU_KVCACHE_SPACE": "1"}) as url:
            report(given, asyncio.run(measure(given, url)))


async def measure(given: argparse.Namespace, url: str) -> list[dict[str, float]]:
    """Tokens per second of each round, and the cost in percent."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        body = {
            "model": model, "prompt": "Once upon a time, " * 10, "max_tokens": given.tokens, "ignore_eos": True,
            "stream": given.stream, "eta": None, "metadata": {"task": "benchmark"},
        }  # fmt: skip
        await speed_of(http, given, {**body, "store": True})  # warm
        rounds = []
        for i in tqdm(range(given.rounds), disable=None):
            speed: dict[bool, float] = {}
            for store in (False, True) if i % 2 else (True, False):
                speed[store] = await speed_of(http, given, {**body, "store": store})
            rounds.append(
                {
                    "tokens per second": speed[False],
                    "tokens per second, stored": speed[True],
                    "cost, percent": 100 * (1 - speed[True] / speed[False]),
                }
            )
        return rounds


async def speed_of(http: httpx.AsyncClient, given: argparse.Namespace, body: dict[str, Any]) -> float:
    """Tokens per second over a block of requests."""
    seconds, answers = await send(http, [body] * given.requests, given.clients)
    assert all(("rollout_id" in answer.text) == body["store"] for answer in answers)
    return float(given.requests * given.tokens / seconds)


def report(given: argparse.Namespace, rounds: list[dict[str, float]]) -> None:
    settings = {name: getattr(given, name) for name in ("rounds", "requests", "clients", "tokens", "stream")}
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    if given.json:
        given.json.write_text(json.dumps({"settings": settings, "median": median, "rounds": rounds}, indent=2) + "\n")
    for name, value in median.items():
        low, high = min(r[name] for r in rounds), max(r[name] for r in rounds)
        print(f"{name:28} {value:10,.4g}   ({low:,.4g} to {high:,.4g}; median of {len(rounds)})")


if __name__ == "__main__":
    main()
