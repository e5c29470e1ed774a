"""What an evaluation asks of a critic besides guidance."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.evaluation.evaluate import _Run


class Scores:
    """A client that counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(path)
        return {"data": [{"values": [0.1, 0.25]} for _ in body["completion"]]}


@pytest.mark.parametrize(
    ("card", "scored", "wanted"),
    [
        ({}, True, [0.25, None]),
        ({}, False, [None, None]),
        ({"backbone": "reference"}, True, [None, None]),  # the server would answer 400
    ],
)
def test_completions_are_scored_where_the_critic_reads_texts(
    card: dict[str, Any], scored: bool, wanted: list[float | None]
) -> None:
    client: Any = Scores()
    evaluation: Any = SimpleNamespace(scored=scored)
    unused: Any = None
    critic = {"id": "a@1", "max_length": 5, "card": card}
    run = _Run(client, unused, unused, evaluation, critic, unused, "")
    assert asyncio.run(run._scores([1, 2], [[3, 4], [5, 6, 7, 8]])) == wanted  # the second is too long
    assert len(client.asked) == (wanted[0] is not None)
