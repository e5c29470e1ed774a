"""How many rollouts per second the store commits: one write each, as a server's responses do, many at once.

    python -m benchmarks.store [--url URL] [--runs 5] [--json FILE]

Each run starts with an empty SQLite database on disk (or the given URL, appended to), stores `--rollouts` rollouts of
`--tokens` tokens from `--clients` clients that each wait for their commit, and then rewards and exports them. The
exported file is taken in like one from elsewhere, and imported into another database.
"""

import argparse
import asyncio
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from qsharp_core.rollouts import foreign, parquet
from qsharp_core.rollouts.records import Rollout, new_id
from server.store.filters import Filters
from server.store.rewards import GivenReward
from server.store.rollouts import RolloutStore

PROMPT_TOKENS = 128
VOCABULARY = 49152


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a database to append to; default: a new SQLite file for each run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where SQLite files go; default: the system's temporary folder")
    parser.add_argument("--json", type=Path, help="also write the result there")
    given = parser.parse_args()
    runs = [measure(given, run) for run in range(given.runs)]
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    result = {
        "settings": {
            "database": "given" if given.url else "sqlite",
            **{name: getattr(given, name) for name in ("rollouts", "tokens", "clients")},
            "prompt_tokens": PROMPT_TOKENS,
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        "median": median,
        "runs": runs,
    }
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in median.items():
        spread = f"{min(run[name] for run in runs):,.4g} to {max(run[name] for run in runs):,.4g}"
        print(f"{name:28} {value:12,.4g}   ({spread}; median of {len(runs)})")


def measure(given: argparse.Namespace, seed: int) -> dict[str, float]:
    """One run: rates per second of wall time, and how long a client waited for a commit, in milliseconds."""
    made = rollouts(random.Random(seed), given.rollouts, given.tokens)
    with tempfile.TemporaryDirectory(prefix="qsharp-", dir=given.folder) as folder:
        store = RolloutStore(given.url or f"sqlite:///{folder}/rollouts.db")
        try:
            return asyncio.run(work(store, made, given.clients, Path(folder)))
        finally:
            store.close()


async def work(store: RolloutStore, made: list[Rollout], clients: int, folder: Path) -> dict[str, float]:
    waits: list[float] = []
    todo = iter(made)

    async def client() -> None:
        for one in todo:
            started = time.perf_counter()
            await store.add([one])
            waits.append(time.perf_counter() - started)

    seconds: dict[str, float] = {}
    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds["stored"] = time.perf_counter() - started
    started = time.perf_counter()
    for i in range(0, len(made), 1000):
        await store.add_rewards(
            [GivenReward(one.id, 1.0, "benchmark") for one in made[i : i + 1000]], owner=None, given_by="me"
        )
    seconds["rewarded"] = time.perf_counter() - started
    started = time.perf_counter()
    count = sum(len(batch) for batch in store.batches(Filters(), parquet.BATCH, owner=None))
    seconds["read"] = (time.perf_counter() - started) * len(made) / count
    started = time.perf_counter()
    exported, taken = folder / "exported.parquet", folder / "taken.parquet"
    with exported.open("wb") as file:
        for piece in parquet.write(store.batches(Filters(), parquet.BATCH, owner=None)):
            file.write(piece)
    size = exported.stat().st_size
    seconds["exported"] = (time.perf_counter() - started) * len(made) / count
    started = time.perf_counter()
    await foreign.take(exported, taken, "default")
    seconds["checked"] = (time.perf_counter() - started) * len(made) / count
    other = RolloutStore(f"sqlite:///{folder}/other.db")
    seconds["imported"], longest = 0.0, 0.0
    for batch in parquet.read(taken, most=parquet.MOST_BYTES):
        started = time.perf_counter()
        await other.import_all(batch)
        longest = max(longest, time.perf_counter() - started)
        seconds["imported"] += (time.perf_counter() - started) * len(made) / count
    other.close()
    waits.sort()
    return {
        **{f"{name} per second": len(made) / value for name, value in seconds.items()},
        "wait for commit, p50 ms": 1e3 * waits[len(waits) // 2],
        "wait for commit, p99 ms": 1e3 * waits[len(waits) * 99 // 100],
        "exported bytes per rollout": size / count,
        "longest batch of an import, ms": 1e3 * longest,
    }


def rollouts(rng: random.Random, count: int, tokens: int) -> list[Rollout]:
    words = [f" word{i}" for i in range(1000)]

    def one() -> Rollout:
        fields: dict[str, Any] = {"request_id": f"cmpl-{new_id()}", "choice": 0, "route": "completion", "model": "m"}
        return Rollout(
            **fields,
            id=new_id(),
            created=time.time(),
            prompt_token_ids=[rng.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)],
            completion_token_ids=[rng.randrange(VOCABULARY) for _ in range(tokens)],
            prompt_text="".join(rng.choices(words, k=PROMPT_TOKENS)),
            completion_text="".join(rng.choices(words, k=tokens)),
            first_valid_position=0,
            finish_reason="stop",
            metadata={"task": "sums", "item": str(rng.randrange(10**6))},
        )

    return [one() for _ in range(count)]


if __name__ == "__main__":
    main()
