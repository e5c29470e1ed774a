"""The reference's rollouts on fresh graphs: sampled and logged by a server, judged here, rewards posted to it.

Requests carry many prompts and the rewards of an answer go back in one request, so that serving such a small model is
not mostly HTTP. What comes back is trained on at once; the server's store keeps all of it.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from qsharp_core.wire.metadata import SPLIT, TASK
from trainer.client import ServerClient
from trainer.collect import Sampling
from trainer.rewards.base import Case
from trainer.rewards.builtin import star_graph as verify
from trainer.star_graph.critic import Rollouts
from trainer.star_graph.graphs import Graph, Shape, draw

VERIFIER = "star_graph"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How rollouts are asked for.

    Attributes:
        model: as the server calls it.
        samples: rollouts of each graph.
        per_request: graphs of a request.
        at_once: requests on their way.
        ahead: graphs that may wait to be trained on.
    """

    model: str
    samples: int = 4
    per_request: int = 64
    at_once: int = 3
    ahead: int = 256


async def sample(client: ServerClient, asking: Asking, graphs: Sequence[Graph], max_tokens: int) -> list[Rollouts]:
    """Logged and judged rollouts of some graphs.

    Raises:
        ServerError
    """
    body = {
        "model": asking.model,
        "prompt": [graph.prompt for graph in graphs],
        "n": asking.samples,
        **Sampling(max_tokens=max_tokens).fields(),
        "eta": None,
        "store": True,
        "return_token_ids": True,
        "metadata": {TASK: VERIFIER, SPLIT: "rollouts"},
    }
    answer = await client.post("/v1/completions", body)
    choices: list[dict[str, Any]] = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert len(choices) == len(graphs) * asking.samples
    made, items = [], []
    for i, graph in enumerate(graphs):
        own = choices[i * asking.samples : (i + 1) * asking.samples]
        rewards = [_reward(graph, choice["text"]) for choice in own]
        items += [
            {"id": choice["rollout_id"], "reward": reward, "source": VERIFIER}
            for choice, reward in zip(own, rewards, strict=True)
        ]
        made.append(Rollouts(own[0]["prompt_token_ids"], [choice["token_ids"] for choice in own], rewards))
    await client.post("/v1/rollouts/rewards", {"items": items})
    return made


@asynccontextmanager
async def fresh(
    client: ServerClient, asking: Asking, shape: Shape, max_tokens: int, seeds: str
) -> AsyncGenerator[AsyncGenerator[Rollouts]]:
    """Rollouts of graph after graph, each drawn once, sampled while those before are trained on.

    Args:
        seeds: what the graphs' seeds begin with.

    Raises:
        ServerError: while it is iterated.
    """
    queue: asyncio.Queue[Rollouts | BaseException] = asyncio.Queue(asking.ahead)
    following = iter(range(10**12))

    async def ask() -> None:
        try:
            while True:
                graphs = [draw(shape, f"{seeds}-{next(following)}") for _ in range(asking.per_request)]
                for rollouts in await sample(client, asking, graphs, max_tokens):
                    await queue.put(rollouts)
        except Exception as error:  # the one who waits for rollouts must learn of it
            await queue.put(error)

    async def received() -> AsyncGenerator[Rollouts]:
        while True:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    tasks = [asyncio.create_task(ask()) for _ in range(asking.at_once)]
    try:
        async with aclosing(received()) as stream:
            yield stream
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reward(graph: Graph, text: str) -> float:
    reward = verify(Case(completion=text, prompt=graph.prompt))
    assert reward is not None, graph.prompt
    return reward
