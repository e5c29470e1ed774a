"""The requests: every held-out sum, a few answers each, guided by each of the critics and reported token by token."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.rollouts.client import ServerClient
from trainer.rollouts.collection import digest, seed_of
from trainer.rollouts.concurrency import each
from trainer.rollouts.parameters import SamplingParameters
from trainer.tasks.base import Problem
from trainer.tasks.sums import TASK

CLIENTS = 8


def sample(url: str, out: Path, settings: Sequence[dict[str, Any]], samples: int) -> None:
    """Writes `out`, a line per answer: `{critic, eta, problem, reward, kl, tokens}`.

    Args:
        settings: `{"critic": …, "eta": …}`; each asks the same, with the same seeds.
        samples: answers to each problem.
    """
    part = out.with_name(f".{out.name}.part")
    with part.open("w") as file:
        for answers in asyncio.run(_sample(url, settings, samples)):
            file.writelines(json.dumps(answer) + "\n" for answer in answers)
    part.replace(out)


async def _sample(url: str, settings: Sequence[dict[str, Any]], samples: int) -> list[list[dict[str, Any]]]:
    defaults = TASK.sampling
    sampling = SamplingParameters(max_tokens=defaults.max_tokens, stop=defaults.stop)
    made: dict[tuple[int, str], list[dict[str, Any]]] = {}
    problems = TASK.of_split("held_out")
    async with ServerClient(url, connections=CLIENTS) as server:
        model = await server.model()
        todo = [(i, problem) for problem in problems for i in range(len(settings))]
        with tqdm(total=len(todo), desc="answers", unit="request") as bar:

            async def one(item: tuple[int, Problem]) -> None:
                i, problem = item
                route, asking = problem.request()
                body = {
                    **asking, **sampling.fields(), "model": model, "n": samples, "seed": seed_of(digest(problem.id)),
                    "eta": settings[i]["eta"], "guidance": {"critic": settings[i]["critic"], "detail": "tokens"},
                }  # fmt: skip
                answer = await server.post(route, body)
                made[i, problem.id] = [_kept(problem, settings[i], choice) for choice in answer["choices"]]
                bar.update()

            await each(todo, one, CLIENTS)
    return [made[i, problem.id] for i in range(len(settings)) for problem in problems]


def _kept(problem: Problem, setting: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    assert TASK.reward is not None
    return {
        **setting,
        "problem": problem.id,
        "reward": TASK.reward(problem, choice["text"]),
        "kl": choice["guidance"]["kl"],
        "tokens": [[t["value"], t["ref_logprob"], t["logprob"]] for t in choice["guidance"]["tokens"]],
    }
