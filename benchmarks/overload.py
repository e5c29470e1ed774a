"""An open loop of more requests than the server can serve: what it still serves, how soon, and in what memory.

    python -m benchmarks.overload [--minutes 10] [--times 3] [--pair tiny|default]

Guided and unguided requests in equal parts, half of them streams, some with `n` of 4, arrive at random (a Poisson
process), whether earlier ones have been answered or not. First the rate of arrivals is raised until the server's
goodput, the tokens per second of requests that were served whole, does not rise any more; then requests arrive at
`--times` the rate of that peak. Exit status 0 if

- goodput in each of the ten parts of that time is at least 90 % of its peak;
- each request was served whole, or refused whole with a 503 and `Retry-After`;
- the last tenth of admitted requests took, at the 99th percentile, at most half as long again as the first tenth;
- the server's memory grew by at most a fiftieth and 32 MiB.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.guidance.pairs import PAIRS, Pair, prompts
from benchmarks.guidance.serving import server
from benchmarks.soak.footprint import Footprint, Growth

TOKENS = 48  # of each sample
SAMPLES = (1, 1, 1, 4)
LEVEL_SECONDS = 20.0  # for which each rate is held while the peak is looked for
GAIN = 1.05  # of goodput, below which a higher rate is no better
PARTS = 10
LEAST_GOODPUT = 0.9  # of the peak
MOST_SLOWER = 1.5


@dataclass
class Answers:
    """What became of requests.

    Attributes:
        ended: when each one that was served ended, in seconds from the start.
        took: how long each of them took, in seconds.
        tokens: how many tokens each of them has.
        kinds: how many of each kind and status there were.
        rate: requests per second that arrived, which is less than was meant where the client is out of breath.
    """

    ended: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rate: float = 0.0

    def goodput(self, since: float, until: float) -> float:
        """Tokens per second of requests that were served whole and ended in this time."""
        served = sum(n for n, at in zip(self.tokens, self.ended, strict=True) if since <= at < until)
        return served / (until - since)

    def slowest(self, since: float, until: float) -> float:
        """99th percentile of how long requests took that ended in this time."""
        took = [s for s, at in zip(self.took, self.ended, strict=True) if since <= at < until]
        return float(np.quantile(took, 0.99)) if took else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--times", type=float, default=3.0, help="the rate that the server can serve")
    parser.add_argument("--pair", choices=list(PAIRS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qsharp-") as temporary:
        folder = Path(temporary)
        pair = PAIRS[given.pair](folder / given.pair)
        with server(pair, folder, "ours") as url:
            wrong = asyncio.run(overload(given, pair, url))
    sys.exit(1 if wrong else 0)


async def overload(given: argparse.Namespace, pair: Pair, url: str) -> list[str]:
    """Looks for the peak, goes beyond it, and returns what was wrong."""
    dice, given_prompts = random.Random(given.seed), prompts(pair, 32, seed=given.seed)
    # httpx looks through all of its connections for each request, and then hundreds of them do not arrive in time.
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(600)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as http:
        peak, rate = await find_peak(http, dice, given_prompts)
        seconds = 60 * given.minutes
        footprint = Footprint()
        with tqdm(total=round(seconds), unit="s", desc=f"{given.times:g} times {rate:.1f} requests/s") as bar:
            answers = await arrivals(http, dice, given_prompts, given.times * rate, seconds, footprint, bar)
    return report(given, peak, rate, answers, seconds, footprint)


async def find_peak(
    http: aiohttp.ClientSession, dice: random.Random, given_prompts: list[list[int]]
) -> tuple[float, float]:
    """The greatest goodput, in tokens per second, and the rate of requests that were served at it."""
    peak, served, rate = 0.0, 0.0, 1.0
    while True:
        with tqdm(total=round(LEVEL_SECONDS), unit="s", desc=f"{rate:.1f} requests/s", leave=False) as bar:
            answers = await arrivals(http, dice, given_prompts, rate, LEVEL_SECONDS, Footprint(), bar)
        goodput = answers.goodput(LEVEL_SECONDS / 4, LEVEL_SECONDS)
        if goodput > peak:
            served = served_rate(answers, LEVEL_SECONDS / 4, LEVEL_SECONDS)
        if goodput < GAIN * peak and answers.kinds["503"]:
            return max(peak, goodput), served
        peak, rate = max(peak, goodput), 1.5 * rate


def served_rate(answers: Answers, since: float, until: float) -> float:
    """Requests per second that were served whole and ended in this time."""
    return sum(since <= at < until for at in answers.ended) / (until - since)


async def arrivals(
    http: aiohttp.ClientSession,
    dice: random.Random,
    given_prompts: list[list[int]],
    rate: float,
    seconds: float,
    footprint: Footprint,
    bar: Any,
) -> Answers:
    """Lets requests arrive at this rate, per second, and waits for those that are on their way at the end."""
    answers, running, started = Answers(), set(), time.monotonic()
    looked = at = 0.0
    arrived = 0
    while max(at := at + dice.expovariate(rate), now := time.monotonic() - started) < seconds:
        await asyncio.sleep(max(0.0, at - now))
        body = {
            "model": "model", "prompt": dice.choice(given_prompts), "max_tokens": TOKENS, "temperature": 1.0,
            "ignore_eos": True, "n": dice.choice(SAMPLES), "stream": dice.random() < 0.5,
        }  # fmt: skip
        if dice.random() < 0.5:
            body |= {"eta": 0.2, "guidance": {"candidates": 8, "min_prob": 0}}
        arrived += 1
        task = asyncio.create_task(one(http, body, started, answers))
        running.add(task)
        task.add_done_callback(running.discard)
        if at - looked > 2.0:
            looked = at
            await asyncio.to_thread(footprint.look)
            bar.update(round(at) - bar.n)
            bar.set_postfix_str(
                f"served={len(answers.ended)} refused={answers.kinds['503']} wrong={len(answers.wrong)}"
            )
    answers.rate = arrived / (time.monotonic() - started)
    await asyncio.gather(*running)
    return answers


async def one(http: aiohttp.ClientSession, body: dict[str, Any], started: float, answers: Answers) -> None:
    """Sends a request, and notes whether it was served whole or refused whole."""
    began = time.monotonic()
    try:
        async with http.post("/v1/completions", json=body) as got:
            answer = httpx.Response(got.status, headers=dict(got.headers), content=await got.read())
    except (aiohttp.ClientError, TimeoutError) as error:
        answers.wrong.append(f"{type(error).__name__}: {error}")
        return
    ended = time.monotonic()
    kind = "guided" if "eta" in body else "unguided"
    answers.kinds[str(answer.status_code)] += 1
    answers.kinds[f"{kind} {answer.status_code}"] += 1
    if answer.status_code == 503 and int(answer.headers.get("retry-after", 0)) >= 1:
        return
    tokens = tokens_of(answer, body)
    if tokens != body["n"] * TOKENS:
        answers.wrong.append(f"{answer.status_code}, {tokens} tokens: {answer.text[-300:]}")
        return
    answers.ended.append(ended - started)
    answers.took.append(ended - began)
    answers.tokens.append(tokens)


def tokens_of(answer: httpx.Response, body: dict[str, Any]) -> int:
    """How many tokens a response accounts for, by the guidance of its choices; 0 if one is missing."""
    if answer.status_code != 200:
        return 0
    if body["stream"]:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line).get("choices", ())]
    else:
        choices = answer.json()["choices"]
    reports = [choice["guidance"] for choice in choices if choice.get("guidance")]
    if any((report["eta"] is not None) != ("eta" in body) for report in reports):
        return 0
    return sum(report["tokens_total"] for report in reports) if len(reports) == body["n"] else 0


def report(
    given: argparse.Namespace, peak: float, rate: float, answers: Answers, seconds: float, footprint: Footprint
) -> list[str]:
    """Prints the parts of the time one below the other, and returns what is wrong."""
    wrong, length = list(answers.wrong), seconds / PARTS
    title = f"{peak:,.0f} tokens/s at {rate:.1f} requests/s at most; {answers.rate:.1f} requests/s arrived"
    table = Table("minute", "tokens/s", "of the peak", "p99, s", title=title)
    parts = [(i * length, (i + 1) * length) for i in range(PARTS)]
    for part in parts:
        goodput = answers.goodput(*part)
        table.add_row(
            f"{part[1] / 60:.1f}", f"{goodput:,.0f}", f"{goodput / peak:.2f}", f"{answers.slowest(*part):.2f}"
        )
        if goodput < LEAST_GOODPUT * peak:
            wrong.append(f"goodput until minute {part[1] / 60:.1f} is {goodput / peak:.2f} of the peak")
    first, last = answers.slowest(*parts[0]), answers.slowest(*parts[-1])
    if not last <= MOST_SLOWER * first:
        wrong.append(f"p99 rose from {first:.2f} to {last:.2f} s")
    memory: list[Growth] = [growth for growth in footprint.growth() if growth.what.startswith("memory")]
    for growth in memory:
        table.caption = f"{growth.what}: {growth.early:,.0f} in the second fifth, {growth.late:,.0f} in the last"
        if growth.grown:
            wrong.append(f"{growth.what} grew from {growth.early:,.0f} to {growth.late:,.0f}")
    console = Console()
    console.print(table)
    console.print(dict(sorted(answers.kinds.items())))
    for what, count in Counter(wrong).most_common(20):
        console.print(f"[red]WRONG[/red] ({count} times)", what)
    console.print(f"wrong: {len(wrong)}" if wrong else "all as it must be")
    return wrong


if __name__ == "__main__":
    main()
