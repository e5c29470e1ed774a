"""Mixed load on a real server, which must end with nothing left behind.

    python -m benchmarks.soak [--minutes 30] [--pair tiny|default] [--clients 32]

Requests of all kinds at once: guided and not, all tails and methods, many samples of a prompt, short, long and shared
prompts, streams whose clients go away at any moment, while two versions of the critic are activated by turns. Both
key-value caches are far too small for all of it, so that requests are preempted and blocks evicted all the time.

Exit status 0 if no request failed, every completed choice accounts for each of its tokens, and at the end no request is
in flight and every block of both caches is free.
"""

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from benchmarks.guidance.growth import token_bytes
from benchmarks.guidance.pairs import PAIRS, Pair
from benchmarks.guidance.serving import server

KEY = "soak"
ADMIN = {"Authorization": f"Bearer {KEY}"}
LONGEST = 1024  # tokens of a request, as the server is started
ACTIVATE_SECONDS = 5.0
PATIENCE = 120.0  # seconds for what is in flight to end


@dataclass
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def judge(self, good: bool, what: str) -> None:
        if not good:
            self.wrong.append(what)


@dataclass
class Choice:
    """One choice, as it came: in one piece or in chunks."""

    tokens: list[int] = field(default_factory=list)
    guidance: dict[str, Any] | None = None

    def add(self, piece: dict[str, Any]) -> None:
        self.tokens += piece.get("token_ids") or []
        self.guidance = piece.get("guidance", self.guidance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--pair", choices=list(PAIRS), default="tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qsharp-") as temporary:
        folder = Path(temporary)
        pair = PAIRS[given.pair](folder / given.pair)
        first, second = versions(pair, folder)
        critic_gib = 4 * LONGEST * token_bytes(pair.critic("V")) / 2**30
        flags = (
            "--admin-key", KEY, "--critic-root", str(folder),
            "--num-gpu-blocks-override", "96", "--critic-cache-gib", f"{critic_gib:.6f}",
            "--max-num-batched-tokens", "512",
        )  # fmt: skip
        with server(pair, folder, "ours", first, flags) as url:
            tally = asyncio.run(soak(given, pair, url, second))
    sys.exit(1 if tally.wrong else 0)


def versions(pair: Pair, folder: Path) -> tuple[Path, Path]:
    """The pair's V critic and another version of it, with other opinions."""
    first, second = pair.critics["V"], folder / "second"
    shutil.copytree(first, second)
    card = json.loads((second / "critic.json").read_text())
    (second / "critic.json").write_text(json.dumps({**card, "version": f"{card['version']}-soak"}))
    head = load_file(second / "head.safetensors")
    save_file({**head, "weight": head["weight"] + 0.1 * torch.randn_like(head["weight"])}, second / "head.safetensors")
    return first, second


async def soak(given: argparse.Namespace, pair: Pair, url: str, second: Path) -> Tally:
    """The load, and what is left when it ends."""
    tally = Tally()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        loaded = await http.post("/v1/critics", json={"path": str(second)}, headers=ADMIN)
        loaded.raise_for_status()
        listed = (await http.get("/v1/critics")).json()["data"]
        name, known = listed[0]["name"], [entry["version"] for entry in listed]
        memory = Memory()
        until = time.monotonic() + 60 * given.minutes
        prefixes = [ids(random.Random(i), pair, 200) for i in range(4)]
        work = [
            client(http, random.Random(given.seed * 1000 + i), pair, prefixes, name, known, until, tally)
            for i in range(given.clients)
        ]
        await asyncio.gather(*work, activate(http, name, known, until, tally), progress(until, tally, memory))
        left = await wait_until_idle(http, name)
    report(tally, left, memory)
    return tally


def ids(dice: random.Random, pair: Pair, length: int) -> list[int]:
    return [dice.randrange(3, pair.vocabulary) for _ in range(length)]


def request(dice: random.Random, pair: Pair, prefixes: list[list[int]], name: str, known: list[str]) -> dict[str, Any]:
    """A request of any kind."""
    kind = dice.choice(("short", "long", "shared", "shared"))
    own = {"short": (1, 20), "long": (300, 700), "shared": (1, 40)}[kind]
    prompt = (dice.choice(prefixes) if kind == "shared" else []) + ids(dice, pair, dice.randint(*own))
    asked: dict[str, Any] = {
        "model": "model", "prompt": prompt, "max_tokens": dice.randint(1, 120), "n": dice.choice((1, 1, 1, 2, 4)),
        "temperature": dice.choice((0.0, 0.7, 1.0)), "ignore_eos": dice.random() < 0.8, "return_token_ids": True,
        "stream": dice.random() < 0.6,
    }  # fmt: skip
    if asked["temperature"] == 0.0:
        asked["n"] = 1  # greedy samples are all one
    if dice.random() < 0.7:
        asked["eta"] = dice.choice((0.02, 0.1, 0.3, 1.0, 100.0))
        asked["guidance"] = {
            "critic": dice.choice((name, *(f"{name}@{version}" for version in known))),
            "candidates": dice.choice((1, 2, 4, 8, 20, 64)), "min_prob": dice.choice((0.0, 0.0, 0.001, 0.1)),
            "tail": dice.choice(("floor", "keep", "drop")), "method": dice.choice(("qsharp", "qsharp", "cd")),
            "detail": dice.choice(("summary", "tokens")),
        }  # fmt: skip
    return asked


async def client(
    http: httpx.AsyncClient, dice: random.Random, pair: Pair, prefixes: list[list[int]], name: str, known: list[str],
    until: float, tally: Tally,
) -> None:  # fmt: skip
    """Requests one after another; a third of them is given up at some moment."""
    while time.monotonic() < until:
        asked = request(dice, pair, prefixes, name, known)
        patience = dice.expovariate(1.0) if dice.random() < 0.33 else None
        try:
            async with asyncio.timeout(patience):
                choices = await (stream if asked["stream"] else whole)(http, asked)
        except TimeoutError:
            tally.counts["given up"] += 1
        except (httpx.HTTPError, AssertionError) as error:
            tally.counts["failed"] += 1
            tally.judge(False, f"{type(error).__name__}: {error}")
            await asyncio.sleep(1)
        else:
            tally.counts["completed"] += 1
            tally.judge(sorted(choices) == list(range(asked["n"])), f"choices {sorted(choices)} of n={asked['n']}")
            for choice in choices.values():
                check(asked, choice, known, tally)


async def whole(http: httpx.AsyncClient, asked: dict[str, Any]) -> dict[int, Choice]:
    answer = await http.post("/v1/completions", json=asked)
    assert answer.status_code == 200, f"{answer.status_code}: {answer.text[:300]}"
    made = answer.json()
    choices = {piece["index"]: Choice(piece["token_ids"], piece.get("guidance")) for piece in made["choices"]}
    assert made["usage"]["completion_tokens"] == sum(len(choice.tokens) for choice in choices.values()), made["usage"]
    return choices


async def stream(http: httpx.AsyncClient, asked: dict[str, Any]) -> dict[int, Choice]:
    choices: dict[int, Choice] = {}
    async with http.stream("POST", "/v1/completions", json=asked) as events:
        assert events.status_code == 200, f"{events.status_code}: {(await events.aread())[:300]!r}"
        async for line in events.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, line[:300]
                for piece in chunk["choices"]:
                    choices.setdefault(piece["index"], Choice()).add(piece)
    return choices


def check(asked: dict[str, Any], choice: Choice, known: list[str], tally: Tally) -> None:
    """A completed choice accounts for each of its tokens."""
    tally.counts["choices"] += 1
    tally.counts["tokens"] += len(choice.tokens)
    got, settings = choice.guidance, asked.get("guidance")
    if got is None:
        tally.judge(False, f"a choice without guidance: {asked}")
        return
    total, guided = got["tokens_total"], got["tokens_guided"]
    tally.counts["guided tokens"] += guided
    where = f"of {len(choice.tokens)} tokens: {got if 'tokens' not in got else (total, guided)}, asked {settings}"
    tally.judge(total == len(choice.tokens), f"tokens_total {where}")
    if asked["ignore_eos"]:
        tally.judge(total == asked["max_tokens"], f"max_tokens {asked['max_tokens']} {where}")
    if settings is None or settings["candidates"] == 1:
        tally.judge(guided == 0, f"guided unasked {where}")
    elif settings["min_prob"] == 0.0:
        tally.judge(guided == total, f"not guided throughout {where}")
    else:
        tally.judge(guided <= total, f"tokens_guided {where}")
    if settings is not None:
        name, _, version = settings["critic"].partition("@")
        good = {f"{name}@{v}" for v in ([version] if version else known)}
        tally.judge(got["critic"] in good, f"critic {where}")
        if settings["detail"] == "tokens":
            entries = got["tokens"]
            tally.judge([entry["token_id"] for entry in entries] == choice.tokens, f"entries {where}")
            valued = sum(entry["value"] is not None for entry in entries)
            tally.judge(valued == guided, f"{valued} values {where}")


async def activate(http: httpx.AsyncClient, name: str, known: list[str], until: float, tally: Tally) -> None:
    """The versions by turns."""
    turn = 0
    while time.monotonic() < until:
        answer = await http.post(f"/v1/critics/{name}/activate", json={"version": known[turn % 2]}, headers=ADMIN)
        tally.judge(answer.status_code == 200, f"activate: {answer.status_code} {answer.text[:300]}")
        turn += 1
        tally.counts["activations"] += 1
        await asyncio.sleep(min(ACTIVATE_SECONDS, max(0.0, until - time.monotonic())))


class Memory:
    """Resident memory of the server's processes, bytes: at first, at half of what was seen, and last."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def look(self) -> int:
        total = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        self.seen.append(total)
        return total


async def progress(until: float, tally: Tally, memory: Memory) -> None:
    started = time.monotonic()
    total = round(until - started)
    with tqdm(total=total, unit="s", desc="soak") as bar:
        while (now := time.monotonic()) < until:
            bar.update(min(total, round(now - started)) - bar.n)
            counts = tally.counts
            bar.set_postfix_str(
                f"completed={counts['completed']} given up={counts['given up']} wrong={len(tally.wrong)} "
                f"rss={memory.look() / 2**20:,.0f} MiB"
            )
            await asyncio.sleep(min(5.0, max(0.1, until - now)))
        bar.update(total - bar.n)


async def wait_until_idle(http: httpx.AsyncClient, name: str) -> dict[str, float]:
    """What is in flight or held, zeros as soon as all of it is; what is left after `PATIENCE` otherwise.

    The critic's blocks and users are asked of the worker: the gauge of /metrics is from the last guided step, at which
    that step's requests still held theirs.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        # vLLM writes its gauges when it decodes: without a step after the last cancellation they would be of before.
        one = {"model": "model", "prompt": [3, 4, 5], "max_tokens": 1, "ignore_eos": True}
        (await http.post("/v1/completions", json=one)).raise_for_status()
        left = {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0, "vllm:kv_cache_usage_perc": 0.0}
        for family in text_string_to_metric_families((await http.get("/metrics")).text):
            if family.name in left:
                left[family.name] = sum(sample.value for sample in family.samples)
        for entry in (await http.get(f"/v1/critics/{name}")).json()["versions"]:
            for what in ("users", "in_flight", "kv_blocks_used"):
                left[f"{what} of {entry['id']}"] = entry[what] or 0  # null: of a critic without a cache
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.5)


def report(tally: Tally, left: dict[str, float], memory: Memory) -> None:
    """Prints what happened and what is left; what is left counts as wrong."""
    for name, value in left.items():
        tally.judge(value == 0, f"{name} is {value:g} at the end")
    table = Table("what", "how many", title="soak")
    for name, count in sorted(tally.counts.items()):
        table.add_row(name, f"{count:,}")
    for name, value in left.items():
        table.add_row(f"at the end: {name}", f"{value:g}")
    first, half, last = (memory.seen[i] / 2**20 for i in (0, len(memory.seen) // 2, -1))
    table.add_row("resident memory, MiB: at first, half way, last", f"{first:,.0f}, {half:,.0f}, {last:,.0f}")
    console = Console()
    console.print(table)
    for wrong, count in Counter(tally.wrong).most_common(20):
        console.print(f"[red]WRONG[/red] ({count} times)", wrong, markup=True)
    console.print("wrong: " + str(len(tally.wrong)) if tally.wrong else "all as it must be")


if __name__ == "__main__":
    main()
