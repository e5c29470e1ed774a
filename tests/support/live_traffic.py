"""Users of the tests' tiny model, who say of every answer whether it was what they wanted."""

import asyncio
import random
from itertools import count
from typing import Any

import httpx

from tests.conftest import ADMIN_KEY
from tests.support.models import VOCAB

TOKENS = 2
CHOICES = 4
USERS = 8  # at a time
PROMPTS = [[random.Random(number).randrange(3, VOCAB) for _ in range(6)] for number in range(40)]


def reward(tokens: list[int]) -> float:
    """What these users want: an answer that begins in the first half of the vocabulary."""
    return float(tokens[0] < VOCAB // 2)


async def ask(client: httpx.AsyncClient, dice: random.Random, **fields: Any) -> list[float]:
    """One request, which is stored with its rewards; returns them."""
    body = {
        "model": "tiny", "prompt": dice.choice(PROMPTS), "max_tokens": TOKENS, "n": CHOICES,
        "ignore_eos": True, "store": True, "return_token_ids": True, "user": f"user {dice.randrange(10**6)}", **fields,
    }  # fmt: skip
    answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
    items = [{"id": one["rollout_id"], "reward": reward(one["token_ids"])} for one in answer["choices"]]
    (await client.post("/v1/rollouts/rewards", json={"items": items})).raise_for_status()
    return [item["reward"] for item in items]


async def traffic(url: str, requests: int | None, seed: int, **fields: Any) -> list[float]:
    """The rewards of so many requests; None: they come until this is cancelled."""
    dice, numbers = random.Random(seed), iter(count() if requests is None else range(requests))
    rewards: list[float] = []

    async def user() -> None:
        for _ in numbers:
            rewards.extend(await ask(client, dice, **fields))

    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300) as client:
        await asyncio.gather(*(user() for _ in range(USERS)))
    return rewards
