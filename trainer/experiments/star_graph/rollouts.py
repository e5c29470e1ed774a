"""The reference's rollouts on fresh graphs: a server samples and logs them, and they are judged here.

A request has many prompts, and their rewards go back in one request, because with such a small model HTTP would
otherwise take most of the time. Rollouts are trained on at once; the server's store keeps all of them.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from qsharp_core.wire.metadata import SPLIT, TASK
from trainer.experiments.star_graph.critic import GraphRollouts
from trainer.rewards.base import Case
from trainer.rewards.builtin import star_graph as verify
from trainer.rollouts.client import JSONObject, ServerClient
from trainer.rollouts.parameters import SamplingParameters
from trainer.tasks.star_graph import Graph, Shape, draw

VERIFIER = "star_graph"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How rollouts are asked for.

    Attributes:
        model: the name that the server serves the reference under.
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


async def sample(client: ServerClient, asking: Asking, graphs: Sequence[Graph], max_tokens: int) -> list[GraphRollouts]:
    """Samples rollouts of some graphs, which the server logs, judges them and gives them their rewards.

    Raises:
        RequestError
    """
    body = {
        "model": asking.model,
        "prompt": [graph.prompt for graph in graphs],
        "n": asking.samples,
        **SamplingParameters(max_tokens=max_tokens).fields(),
        "eta": None,
        "store": True,
        "return_token_ids": True,
        "metadata": {TASK: VERIFIER, SPLIT: "rollouts"},
    }
    answer = await client.post("/v1/completions", body)
    choices: list[JSONObject] = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert len(choices) == len(graphs) * asking.samples
    results, items = [], []
    for i, graph in enumerate(graphs):
        group = choices[i * asking.samples : (i + 1) * asking.samples]
        rewards = [_reward(graph, choice["text"]) for choice in group]
        items += [
            {"id": choice["rollout_id"], "reward": reward, "source": VERIFIER}
            for choice, reward in zip(group, rewards, strict=True)
        ]
        results.append(GraphRollouts(group[0]["prompt_token_ids"], [choice["token_ids"] for choice in group], rewards))
    await client.post("/v1/rollouts/rewards", {"items": items})
    return results


@asynccontextmanager
async def fresh(
    client: ServerClient, asking: Asking, shape: Shape, max_tokens: int, seeds: str
) -> AsyncGenerator[AsyncGenerator[GraphRollouts]]:
    """A stream of the rollouts of one new graph after another, sampled while those before are trained on.

    Args:
        client: of the server.
        asking: how rollouts are asked for.
        shape: of the graphs.
        max_tokens: of a completion.
        seeds: what the graphs' seeds begin with.

    Raises:
        RequestError: while it is iterated.
    """
    queue: asyncio.Queue[GraphRollouts | BaseException] = asyncio.Queue(asking.ahead)
    following = iter(range(10**12))

    async def ask() -> None:
        try:
            while True:
                graphs = [draw(shape, f"{seeds}-{next(following)}") for _ in range(asking.per_request)]
                for rollouts in await sample(client, asking, graphs, max_tokens):
                    await queue.put(rollouts)
        except Exception as error:  # the one who waits for rollouts must learn of it
            await queue.put(error)

    async def received() -> AsyncGenerator[GraphRollouts]:
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
