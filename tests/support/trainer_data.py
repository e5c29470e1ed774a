"""Rollouts of a world whose critic is known: written as the server's export, by hand.

A completion is `LENGTH` letters, a or b, even odds each. It earns 1 if it has more a's than b's. So the reward-to-go
after some letters is a binomial tail, and a prompt's letter tells nothing.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

A, B, END = 68, 69, 1  # in the vocabulary of `tests.support.models`
LENGTH = 5


def row(key: str, prompt: list[int], completion: list[int], reward: float | None, **fields: Any) -> dict[str, Any]:
    """An unguided rollout, as the store exports it; `fields` override."""
    return {
        "id": key,
        "prompt_token_ids": prompt,
        "completion_token_ids": completion,
        "prompt_text": None,
        "completion_text": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "eta": None,
        "critic": None,
        "first_valid_position": 0,
        "parent_id": None,
        "cut": None,
        "finish_reason": "stop",
        "metadata": None,
        "reward": reward,
        "created": 0.0,
    } | fields


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a Parquet file of the export's types."""
    tokens = pa.list_(pa.int32())
    table = pa.table(
        {
            name: pa.array(
                [r[name] for r in rows],
                {
                    "prompt_token_ids": tokens,
                    "completion_token_ids": tokens,
                    "first_valid_position": pa.int32(),
                    "reward": pa.float64(),
                }.get(name),
            )
            for name in rows[0]
        }
    )
    pq.write_table(table, path)
    return path


def earns(letters: list[int]) -> float:
    return float(letters.count(A) > letters.count(B))


def prompt_of(n: int) -> list[int]:
    """Prompts of one to three tokens, all different."""
    return [70 + n % 50, *([80 + n // 50] if n >= 50 else []), 75]


def rollouts(prompts: int, each: int, seed: int = 0, **fields: Any) -> list[dict[str, Any]]:
    """Reference rollouts of the world."""
    dice = np.random.default_rng(seed)
    made = []
    for p in range(prompts):
        for k in range(each):
            letters = dice.choice([A, B], LENGTH).tolist()
            made.append(row(f"r{seed}-{p}-{k}", prompt_of(p), letters, earns(letters), **fields))
    return made


def chance(letters: list[int], p: float = 0.5) -> float:
    """P(reward = 1) after these letters, where each later one is an a with probability `p`."""
    left = LENGTH - len(letters)
    return sum(
        math.comb(left, k) * p**k * (1 - p) ** (left - k)
        for k in range(left + 1)
        if 2 * (letters.count(A) + k) > LENGTH
    )
