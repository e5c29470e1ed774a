"""Mixed load on a real server, which must end with nothing left behind.

    python -m benchmarks.soak [--minutes 30] [--pair tiny|default] [--clients 32]

Requests of all kinds at once: guided by V, Q and native critics and not at all, all tails and methods, many samples of
a prompt, short, long and shared prompts, half of them stored and rewarded, streams whose clients go away at any moment,
while versions of a critic are loaded, activated and unloaded by turns. Both key-value caches are far too small for all
of it, so that requests are preempted and blocks evicted all the time, and guided rows are audited.

Exit status 0 if no request failed, every completed choice accounts for each of its tokens, the store has what clients
were told and nothing else, audits found nothing, no memory, thread or descriptor has been added since the second fifth
of the time, and at the end no request is in flight and every block of both caches is free.
"""

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from benchmarks.guidance.growth import token_bytes
from benchmarks.guidance.pairs import PAIRS, Pair
from benchmarks.guidance.serving import server
from benchmarks.scrape import read_metrics
from benchmarks.soak.clients import Client, Critics, Tally, ids
from benchmarks.soak.footprint import Footprint
from benchmarks.soak.ledger import stored

KEY = "soak"
ADMIN = {"Authorization": f"Bearer {KEY}"}
LONGEST = 1024  # tokens of a request, as the server is started
SWAP_SECONDS = 5.0
LOOK_SECONDS = 2.0
PATIENCE = 120.0  # seconds for what is in flight to end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--pair", choices=list(PAIRS), default="tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qsharp-") as temporary:
        folder = Path(temporary)
        pair = PAIRS[given.pair](folder / given.pair)
        first, *others = versions(pair, folder)
        critic_gib = 4 * LONGEST * token_bytes(pair.critic("V")) / 2**30
        flags = (
            "--critic", str(pair.critics["Q"]), "--critic", str(pair.native),
            "--admin-key", KEY, "--critic-root", str(folder), "--rollouts", f"sqlite:///{folder / 'rollouts.db'}",
            "--audit-rate", "0.05", "--max-queued", "1000",
            "--num-gpu-blocks-override", "96", "--critic-cache-gib", f"{critic_gib:.6f}",
            "--max-num-batched-tokens", "512",
        )  # fmt: skip
        with server(pair, folder, "ours", first, flags) as url:
            tally = asyncio.run(soak(given, pair, url, others))
    sys.exit(1 if tally.wrong else 0)


def versions(pair: Pair, folder: Path) -> list[Path]:
    """The pair's V critic and two other versions of it, with other opinions."""
    first = pair.critics["V"]
    found = [first]
    for name in ("second", "third"):
        other = folder / name
        shutil.copytree(first, other)
        card = json.loads((other / "critic.json").read_text())
        (other / "critic.json").write_text(json.dumps({**card, "version": name}))
        head = load_file(other / "head.safetensors")
        save_file(
            {**head, "weight": head["weight"] + 0.1 * torch.randn_like(head["weight"])}, other / "head.safetensors"
        )
        found.append(other)
    return found


async def soak(given: argparse.Namespace, pair: Pair, url: str, others: list[Path]) -> Tally:
    """The load, and what is left when it ends."""
    tally, footprint = Tally(), Footprint()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, headers=ADMIN) as http:
        first = (await http.get("/v1/critics")).json()["data"][0]
        await load(http, others[0], tally)
        critics = await listed(http, first["name"], others[1].name)
        until = time.monotonic() + 60 * given.minutes
        prefixes = [ids(random.Random(i), pair, 200) for i in range(4)]
        clients = [
            Client(http, random.Random(given.seed * 1000 + i), pair, prefixes, critics, tally)
            for i in range(given.clients)
        ]
        swaps = swap(http, first["name"], (first["version"], others[0].name), others[1], until, tally)
        await asyncio.gather(*(client.work(until) for client in clients), swaps, progress(until, tally, footprint))
        left = await wait_until_idle(http, critics)
        metrics = await read_metrics(http)
    for line in await asyncio.to_thread(compare, url, tally):
        tally.judge(False, line)
    tally.judge(metrics["qsharp_audited_rows"] > 0, "no row was audited")
    for name in ("qsharp_audit_failures", "qsharp_critic_failures", "qsharp_rollout_failures"):
        tally.judge(metrics[name] == 0, f"{name} is {metrics[name]:g}")
    tally.counts["audited rows"] = round(metrics["qsharp_audited_rows"])
    tally.counts["preemptions"] = round(metrics["vllm:num_preemptions"])
    report(given, tally, left, footprint)
    return tally


def compare(url: str, tally: Tally) -> list[str]:
    """How the store differs from what clients were told."""
    with httpx.Client(base_url=url, timeout=600, headers=ADMIN) as http:
        return tally.ledger.faults(stored(http))


async def listed(http: httpx.AsyncClient, swapped: str, coming: str) -> Critics:
    """What may be asked for, and what it may stand for: of the one that is swapped, also a version that is to come."""
    data = (await http.get("/v1/critics")).json()["data"]
    names, keys = list(dict.fromkeys(one["name"] for one in data)), [one["id"] for one in data]
    allowed = {name: {key for key in keys if key.startswith(f"{name}@")} for name in names}
    allowed[swapped].add(f"{swapped}@{coming}")
    return Critics(names, keys, allowed)


async def load(http: httpx.AsyncClient, folder: Path, tally: Tally) -> None:
    answer = await http.post("/v1/critics", json={"path": str(folder)})
    tally.judge(answer.status_code == 200, f"load: {answer.status_code} {answer.text[:300]}")


async def swap(
    http: httpx.AsyncClient, name: str, kept: tuple[str, str], third: Path, until: float, tally: Tally
) -> None:
    """Activates the versions by turns; the third one is loaded before and unloaded behind."""
    turn = 0
    while time.monotonic() < until:
        coming = (*kept, third.name)[turn % 3]
        if coming == third.name:
            await load(http, third, tally)
        answer = await http.post(f"/v1/critics/{name}/activate", json={"version": coming})
        tally.judge(answer.status_code == 200, f"activate: {answer.status_code} {answer.text[:300]}")
        if turn % 3 == 0 and turn:
            answer = await http.delete(f"/v1/critics/{name}/{third.name}")
            tally.judge(answer.status_code in (200, 202), f"unload: {answer.status_code} {answer.text[:300]}")
            await gone(http, name, third.name)
        turn += 1
        tally.counts["activations"] += 1
        await asyncio.sleep(min(SWAP_SECONDS, max(0.0, until - time.monotonic())))


async def gone(http: httpx.AsyncClient, name: str, version: str) -> None:
    """Waits until a version is not in use any more."""
    while version in [one["version"] for one in (await http.get(f"/v1/critics/{name}")).json()["versions"]]:
        await asyncio.sleep(0.1)


async def progress(until: float, tally: Tally, footprint: Footprint) -> None:
    started = time.monotonic()
    total = round(until - started)
    with tqdm(total=total, unit="s", desc="soak") as bar:
        while (now := time.monotonic()) < until:
            bar.update(min(total, round(now - started)) - bar.n)
            counts = tally.counts
            bar.set_postfix_str(
                f"completed={counts['completed']} given up={counts['given up']} wrong={len(tally.wrong)} "
                f"rss={footprint.look() / 2**20:,.0f} MiB"
            )
            await asyncio.sleep(min(LOOK_SECONDS, max(0.1, until - now)))
        bar.update(total - bar.n)


async def wait_until_idle(http: httpx.AsyncClient, critics: Critics) -> dict[str, float]:
    """What is in flight or held, zeros as soon as all of it is; what is left after `PATIENCE` otherwise.

    The critic's blocks and users are asked of the worker: the gauge of /metrics is from the last guided step, at which
    that step's requests still held theirs.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        # vLLM writes its gauges when it decodes: without a step after the last cancellation they would be of before.
        one = {"model": "model", "prompt": [3, 4, 5], "max_tokens": 1, "ignore_eos": True}
        (await http.post("/v1/completions", json=one)).raise_for_status()
        metrics = await read_metrics(http)
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        left = {name: float(metrics[name]) for name in gauges}
        for name in critics.names:
            for entry in (await http.get(f"/v1/critics/{name}")).json()["versions"]:
                for what in ("users", "in_flight", "kv_blocks_used"):
                    left[f"{what} of {entry['id']}"] = entry[what] or 0  # null: of a critic without a cache
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.5)


def report(given: argparse.Namespace, tally: Tally, left: dict[str, float], footprint: Footprint) -> None:
    """Prints what happened and what is left; what is left, or has grown, counts as wrong."""
    table = Table("what", "how much", title=f"soak, {given.minutes:g} minutes, seed {given.seed}")
    for name, count in sorted(tally.counts.items()):
        table.add_row(name, f"{count:,}")
    for name, value in left.items():
        tally.judge(value == 0, f"{name} is {value:g} at the end")
        if value:
            table.add_row(f"at the end: {name}", f"{value:g}")
    for growth in footprint.growth():
        tally.judge(not growth.grown, f"{growth.what} grew from {growth.early:,.0f} to {growth.late:,.0f}")
        table.add_row(f"{growth.what}: second and last fifth", f"{growth.early:,.0f}, {growth.late:,.0f}")
    console = Console()
    console.print(table)
    for wrong, count in Counter(tally.wrong).most_common(20):
        console.print(f"[red]WRONG[/red] ({count} times)", wrong, markup=True)
    console.print("wrong: " + str(len(tally.wrong)) if tally.wrong else "all as it must be")


if __name__ == "__main__":
    main()
