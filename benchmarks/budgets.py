"""No answer spends more than its budget: many short ones of all kinds, on a server that preempts them.

    python -m benchmarks.budgets [--completions 100000] [--pair tiny|default]

Guided by V, Q and native critics, by both methods, with each tail, several samples of a prompt, with budgets from 0.001
to 10 nats for the answer, for each token, or both. The key-value cache is far too small for all of them. Exit status 0
if no answer's KL divergence exceeds its `kl_total` and, in those that list their tokens, no token's its `kl_token`.
"""

import argparse
import asyncio
import math
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.guidance.growth import token_bytes
from benchmarks.guidance.pairs import PAIRS, Pair
from benchmarks.guidance.serving import server
from benchmarks.scrape import read_metrics
from benchmarks.soak.clients import ids

AT_ONCE = 8  # requests
LONGEST = 1024  # tokens of a request, as the server is started
SAMPLES = (1, 4, 16, 32)
MOST_TOKENS = 24
BUDGETS = (1e-3, 10.0)
ROUNDING = 1e-12  # of a sum of float64 numbers, relative


@dataclass
class Spent:
    """What answers have spent.

    Attributes:
        counts: answers, and their tokens.
        shares: the share of `kl_total` that each answer spent that has one.
        over: what exceeded a budget.
    """

    counts: Counter[str] = field(default_factory=Counter)
    shares: list[float] = field(default_factory=list)
    over: list[str] = field(default_factory=list)

    def take(self, options: dict[str, Any], got: dict[str, Any]) -> None:
        """Looks at the `guidance` of one choice."""
        total, token = options.get("kl_total", math.inf), options.get("kl_token", math.inf)
        self.counts["completions"] += 1
        self.counts["tokens"] += got["tokens_total"]
        self.counts["tokens held back"] += got["steps_clipped"]
        self.counts["completions held back"] += got["steps_clipped"] > 0
        most = max((entry["kl"] for entry in got.get("tokens") or ()), default=0.0)
        if got["kl"] > total * (1 + ROUNDING) or most > token * (1 + ROUNDING):
            self.over.append(f"kl {got['kl']!r}, most of a token {most!r}, asked {options}")
        if total < math.inf:
            self.shares.append(got["kl"] / total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=100_000)
    parser.add_argument("--pair", choices=list(PAIRS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qsharp-") as temporary:
        folder = Path(temporary)
        pair = PAIRS[given.pair](folder / given.pair)
        flags = (
            "--critic", str(pair.critics["Q"]), "--critic", str(pair.native), "--max-queued", "1000",
            "--num-gpu-blocks-override", "72", "--max-num-batched-tokens", "512",
            "--critic-cache-gib", f"{4 * LONGEST * token_bytes(pair.critic('V')) / 2**30:.6f}",
        )  # fmt: skip
        with server(pair, folder, "ours", flags=flags) as url:
            spent, preempted = asyncio.run(measure(given, pair, url))
    report(spent, preempted)
    sys.exit(1 if spent.over else 0)


async def measure(given: argparse.Namespace, pair: Pair, url: str) -> tuple[Spent, int]:
    """What answers spend, and how often one of them was preempted."""
    spent, dice = Spent(), random.Random(given.seed)
    with tqdm(total=given.completions, unit="completion", desc="budgets") as bar:
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:
            critics = [one["name"] for one in (await http.get("/v1/critics")).json()["data"]]

            async def client() -> None:
                while spent.counts["completions"] < given.completions:
                    asked = request(dice, pair, critics)
                    answer = await http.post("/v1/completions", json=asked)
                    assert answer.status_code == 200, answer.text
                    for choice in answer.json()["choices"]:
                        spent.take(asked["guidance"], choice["guidance"])
                    bar.update(asked["n"])

            await asyncio.gather(*(client() for _ in range(AT_ONCE)))
            return spent, round((await read_metrics(http))["vllm:num_preemptions"])


def request(dice: random.Random, pair: Pair, critics: list[str]) -> dict[str, Any]:
    """A request within a budget."""
    named = dice.choice((("kl_total",), ("kl_total",), ("kl_token",), ("kl_total", "kl_token")))
    low, high = map(math.log, BUDGETS)
    return {
        "model": "model", "prompt": ids(dice, pair, dice.randint(1, 60)), "n": dice.choice(SAMPLES),
        "max_tokens": dice.randint(1, MOST_TOKENS), "temperature": dice.choice((0.7, 1.0)),
        "ignore_eos": dice.random() < 0.8, "seed": dice.randrange(2**31), "eta": dice.choice((0.02, 0.1, 0.3, 1.0)),
        "guidance": {
            "critic": dice.choice(critics), "candidates": dice.choice((2, 4, 8, 20, 64)),
            "min_prob": dice.choice((0.0, 0.0, 0.01)), "tail": dice.choice(("floor", "keep", "drop")),
            "method": dice.choice(("qsharp", "cd")), "detail": dice.choice(("summary", "summary", "tokens")),
            **{name: math.exp(dice.uniform(low, high)) for name in named},
        },
    }  # fmt: skip


def report(spent: Spent, preempted: int) -> None:
    """Prints what was seen."""
    table = Table("what", "how much")
    table.columns[1].justify = "right"
    for name, count in spent.counts.items():
        table.add_row(name, f"{count:,}")
    full = sum(share > 0.99 for share in spent.shares) / max(len(spent.shares), 1)
    table.add_row("preemptions", f"{preempted:,}")
    table.add_row("spent 99 % of kl_total and more", f"{full:.0%} of {len(spent.shares):,}")
    table.add_row("greatest share of kl_total", f"{max(spent.shares, default=0.0):.12f}")
    table.add_row("over budget", str(len(spent.over)))
    console = Console()
    console.print(table)
    for line in spent.over[:10]:
        console.print(line, style="red")


if __name__ == "__main__":
    main()
