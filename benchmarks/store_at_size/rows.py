"""Made rollouts by the million, like those of a service that was used for a hundred days.

Texts and token ids come from a few hundred templates; what the store looks for differs from rollout to rollout: ids,
owner, time, model, critic, reward and metadata. Half are live traffic, guided throughout by the version of their day.
The others are the reference's own and can be trained on. Seven of ten have a reward, most of the judge's.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qsharp_core.rollouts.records import Rollout, Sampling
from server.store.tables import Parameters, to_row

DAYS = 100
DAY = 86400.0
OWNERS = [f"app-{i}" for i in range(20)]
TASKS = ["sums", "gsm8k", "math", "chat"]
RUNS = 200  # of `qsharp collect`, one after the other
VERSIONS = 50  # of the critic, one after the other
MODEL, RARE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct", "other-model"
JUDGE, OTHER = "judge", "somebody"
VARYING = ("seq", "id", "owner", "request_id", "created", "model", "critic", "reward", "metadata")
"""Columns in which rollouts of one template differ."""
_WORDS = [f"{a}{b}" for a in ("ka", "tion", "er", "s", "un", "ing") for b in ("lo", "mi", "ter", "a", "nd", "re", "st")]


@dataclass(frozen=True)
class Made:
    """A rollout: the number of its template, and its own values of `VARYING`.

    Attributes:
        rewarded: parameters of its entry in `rewards`; None if it has none.
    """

    template: int
    own: Parameters
    rewarded: Mapping[str, Any] | None


def templates(rng: random.Random, count: int) -> list[Parameters]:
    """Rows of rollouts that differ in everything but `VARYING`; every second one is guided."""
    return [to_row(template(rng, guided=i % 2 == 1)) for i in range(count)]


def template(rng: random.Random, *, guided: bool) -> Rollout:
    """A rollout of some 48 tokens of prompt and 72 of completion, a third of them chats."""
    read, written = (max(8, int(rng.lognormvariate(0, 0.5) * middle)) for middle in (48, 72))
    prompt, completion = text(rng, read), text(rng, written)
    chat = rng.random() < 1 / 3
    how: dict[str, Any] = {"eta": 0.1, "method": "qsharp", "critic": "c@1", "value": 0.5, "kl": 2.5} if guided else {}
    return Rollout(
        id="",
        request_id="",
        choice=0,
        route="chat" if chat else "completion",
        created=0.0,
        model="",
        prompt_token_ids=[rng.randrange(49152) for _ in range(read)],
        completion_token_ids=[rng.randrange(49152) for _ in range(written)],
        prompt_text=prompt,
        completion_text=completion,
        messages=[{"role": "user", "content": prompt}] if chat else None,
        response={"choice": {"message": {"role": "assistant", "content": completion}}} if chat else None,
        sampling=Sampling(temperature=0.7, top_p=0.95, seed=rng.getrandbits(40), other={"max_tokens": 512}),
        guidance={"candidates": 20, "tail": "floor"} if guided else None,
        first_valid_position=None if guided else 0,
        finish_reason="stop",
        **how,
    )


def text(rng: random.Random, tokens: int) -> str:
    return " ".join(rng.choices(_WORDS, k=tokens))


def made(rng: random.Random, count: int, kinds: int, now: float) -> Iterator[Made]:
    """Rollouts in the order in which they were stored, the last one now.

    Args:
        rng: makes them.
        count: how many.
        kinds: the number of templates; odd ones are guided.
        now: in seconds since the epoch.
    """
    start, each = now - DAYS * DAY, DAYS * DAY / count
    for i in range(count):
        number = rng.randrange(kinds)
        share = i / count
        rewarded = rng.random() < 0.7
        # Commits are not quite in the order of the times at which requests began.
        created = start + (i + 1) * each - rng.random() * min(each * 20, 30.0)
        own: Parameters = {
            "seq": i + 1,
            "id": f"rol_{rng.getrandbits(128):032x}",
            "owner": OWNERS[int(len(OWNERS) * rng.random() ** 2)],
            "request_id": f"cmpl-{rng.getrandbits(128):032x}",
            "created": created,
            "model": RARE_MODEL if rng.random() < 0.001 else MODEL,
            "critic": f"sums@{1 + int(VERSIONS * share)}" if number % 2 else None,
            "reward": float(rng.random() < 0.5) if rewarded else None,
            "metadata": {
                "task": rng.choice(TASKS), "qsharp_run": f"run-{int(RUNS * share)}", "qsharp_item": f"item-{i}",
            },
        }  # fmt: skip
        entry = None
        if rewarded:
            by = OTHER if rng.random() < 0.1 else JUDGE
            entry = {"rollout_id": own["id"], "reward": own["reward"], "source": "exact", "created": created + 60.0}
            entry["given_by"] = by
        yield Made(number, own, entry)
