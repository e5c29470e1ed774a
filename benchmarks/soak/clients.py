"""Clients that send requests of all kinds, and check each answer."""

import asyncio
import json
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.guidance.pairs import Pair
from benchmarks.soak.ledger import REQUEST, Ledger

GIVEN_UP = 0.33  # share of requests whose client goes away
STORED = 0.5
REWARDED = 0.5  # of the stored


@dataclass
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)

    def judge(self, good: bool, what: str) -> None:
        """Notes what is wrong, unless it is good."""
        if not good:
            self.wrong.append(what)


@dataclass
class Choice:
    """One choice, as it came: in one piece or in chunks."""

    tokens: list[int] = field(default_factory=list)
    guidance: dict[str, Any] | None = None
    rollout: str | None = None

    def add(self, piece: dict[str, Any]) -> None:
        """Takes a piece of it."""
        self.tokens += piece.get("token_ids") or []
        self.guidance = piece.get("guidance", self.guidance)
        self.rollout = piece.get("rollout_id", self.rollout)


@dataclass(frozen=True)
class Critics:
    """The critics that requests name.

    Attributes:
        names: to ask for.
        keys: `name@version`, to ask for exactly; they stay loaded.
        allowed: which keys a name may stand for.
    """

    names: list[str]
    keys: list[str]
    allowed: dict[str, set[str]]


@dataclass
class Client:
    """One client of many, which sends one request after another.

    Attributes:
        http: of the server.
        dice: its own.
        prefixes: beginnings that many prompts share.
    """

    http: httpx.AsyncClient
    dice: random.Random
    pair: Pair
    prefixes: list[list[int]]
    critics: Critics
    tally: Tally

    async def work(self, until: float) -> None:
        """Sends requests until that time of the monotonic clock; a third of them is given up at some moment."""
        while time.monotonic() < until:
            await self._one()

    async def _one(self) -> None:
        tally, asked = self.tally, self._request()
        patience = self.dice.expovariate(1.0) if self.dice.random() < GIVEN_UP else None
        try:
            async with asyncio.timeout(patience):
                choices = await (self._stream if asked["stream"] else self._whole)(asked)
        except TimeoutError:
            tally.counts["given up"] += 1
            if asked["store"]:
                tally.ledger.given_up.add(asked["metadata"][REQUEST])
        except (httpx.HTTPError, AssertionError) as error:
            tally.counts["failed"] += 1
            tally.judge(False, f"{type(error).__name__}: {error}")
            await asyncio.sleep(1)
        else:
            tally.counts["completed"] += 1
            tally.judge(sorted(choices) == list(range(asked["n"])), f"choices {sorted(choices)} of n={asked['n']}")
            for choice in choices.values():
                check(asked, choice, self.critics, tally)
            if asked["store"] and self.dice.random() < REWARDED:
                await self._reward([choice.rollout for choice in choices.values() if choice.rollout is not None])

    def _request(self) -> dict[str, Any]:
        """A request of any kind."""
        dice = self.dice
        kind = dice.choice(("short", "long", "shared", "shared"))
        own = {"short": (1, 20), "long": (300, 700), "shared": (1, 40)}[kind]
        prompt = (dice.choice(self.prefixes) if kind == "shared" else []) + ids(dice, self.pair, dice.randint(*own))
        asked: dict[str, Any] = {
            "model": "model", "prompt": prompt, "max_tokens": dice.randint(1, 120), "n": dice.choice((1, 1, 1, 2, 4)),
            "temperature": dice.choice((0.0, 0.7, 1.0)), "ignore_eos": dice.random() < 0.8, "return_token_ids": True,
            "stream": dice.random() < 0.6, "store": dice.random() < STORED,
        }  # fmt: skip
        if asked["store"]:
            asked["metadata"] = {REQUEST: uuid.UUID(int=dice.getrandbits(128)).hex}
        if asked["temperature"] == 0.0:
            asked["n"] = 1  # greedy samples are all one
        if dice.random() < 0.7:
            asked["eta"] = dice.choice((0.02, 0.1, 0.3, 1.0, 100.0))
            asked["guidance"] = {
                "critic": dice.choice((*self.critics.names, *self.critics.keys)),
                "candidates": dice.choice((1, 2, 4, 8, 20, 64)), "min_prob": dice.choice((0.0, 0.0, 0.001, 0.1)),
                "tail": dice.choice(("floor", "keep", "drop")), "method": dice.choice(("qsharp", "qsharp", "cd")),
                "detail": dice.choice(("summary", "tokens")),
            }  # fmt: skip
            if dice.random() < 0.3:
                asked["guidance"]["kl_total"] = dice.choice((0.001, 0.1, 2.0))
        return asked

    async def _whole(self, asked: dict[str, Any]) -> dict[int, Choice]:
        answer = await self.http.post("/v1/completions", json=asked)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text[:300]}"
        made = answer.json()
        choices: dict[int, Choice] = {}
        for piece in made["choices"]:
            choices.setdefault(piece["index"], Choice()).add(piece)
        assert made["usage"]["completion_tokens"] == sum(len(c.tokens) for c in choices.values()), made["usage"]
        return choices

    async def _stream(self, asked: dict[str, Any]) -> dict[int, Choice]:
        choices: dict[int, Choice] = {}
        async with self.http.stream("POST", "/v1/completions", json=asked) as events:
            assert events.status_code == 200, f"{events.status_code}: {(await events.aread())[:300]!r}"
            async for line in events.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, line[:300]
                    for piece in chunk["choices"]:
                        choices.setdefault(piece["index"], Choice()).add(piece)
        return choices

    async def _reward(self, rollouts: list[str]) -> None:
        rewards = {name: self.dice.choice((0.0, 0.5, 1.0)) for name in rollouts}
        items = [{"id": name, "reward": reward, "source": "soak"} for name, reward in rewards.items()]
        answer = await self.http.post("/v1/rollouts/rewards", json={"items": items})
        self.tally.judge(answer.status_code == 200, f"rewards: {answer.status_code} {answer.text[:300]}")
        self.tally.counts["rewards"] += len(items)
        self.tally.ledger.rewarded.update(rewards)


def ids(dice: random.Random, pair: Pair, length: int) -> list[int]:
    """Random token ids."""
    return [dice.randrange(3, pair.vocabulary) for _ in range(length)]


def check(asked: dict[str, Any], choice: Choice, critics: Critics, tally: Tally) -> None:
    """A completed choice accounts for each of its tokens, and tells where it is stored."""
    tally.counts["choices"] += 1
    tally.counts["tokens"] += len(choice.tokens)
    tally.judge((choice.rollout is not None) == asked["store"], f"store {asked['store']}, rollout {choice.rollout}")
    if choice.rollout is not None:
        tally.ledger.note(choice.rollout, choice.tokens)
        tally.counts["stored"] += 1
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
    if settings is None:
        tally.judge(guided == 0, f"guided unasked {where}")
        return
    _check_guidance(settings, got, choice, critics, lambda good, what: tally.judge(good, f"{what} {where}"))


def _check_guidance(
    settings: dict[str, Any],
    got: dict[str, Any],
    choice: Choice,
    critics: Critics,
    judge: Callable[[bool, str], None],
) -> None:
    total, guided, name = got["tokens_total"], got["tokens_guided"], settings["critic"]
    if settings["candidates"] == 1:
        judge(guided == 0, "guided with one candidate")
    elif settings["min_prob"] == 0.0:
        judge(guided == total, "not guided throughout")
    else:
        judge(guided <= total, "tokens_guided")
    judge(got["kl"] <= settings.get("kl_total", math.inf) * (1 + 1e-12), "over budget")
    judge(got["critic"] in critics.allowed.get(name, {name}), "critic")
    if settings["detail"] == "tokens":
        entries = got["tokens"]
        judge([entry["token_id"] for entry in entries] == choice.tokens, "entries")
        valued = sum(entry["value"] is not None for entry in entries)
        judge(valued == guided, f"{valued} values")
