"""What an evaluation asks of a critic besides guidance."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.evaluation.evaluate import _Run
from trainer.evaluation.settings import Setting, every_setting
from trainer.tasks.base import Problem


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


@pytest.mark.parametrize("change", [{"answer": "8"}, {"data": {"schema": {"type": "object"}}}, {"prompt": "3 + 5 ="}])
def test_what_was_judged_by_another_answer_is_judged_again(change: dict[str, Any]) -> None:
    unused: Any = None
    run = _Run(unused, unused, unused, unused, None, unused, "")
    problem = Problem(id="a", prompt="3 + 4 =", answer="7")
    setting = Setting("reference")
    assert run.key(problem, setting) == run.key(replace(problem), setting)
    assert run.key(problem, setting) != run.key(replace(problem, **change), setting)


def test_settings_are_every_combination_once() -> None:
    made = every_setting(["qsharp", "qsharp"], [0.1, 0.3], [None, 2.0], [0.05])
    assert [(s.eta, s.kl_total, s.kl_token) for s in made] == [
        (0.1, None, 0.05), (0.1, 2.0, 0.05), (0.3, None, 0.05), (0.3, 2.0, 0.05)
    ]  # fmt: skip
    assert made[1].label == "qsharp, eta 0.1, ≤ 2 nats and ≤ 0.05 a token"
    assert made[1].guidance() == {"kl_total": 2.0, "kl_token": 0.05}
    assert made[0].identity() == {"method": "qsharp", "eta": 0.1, "samples": None, "kl_token": 0.05}
    assert every_setting(["cd"], [1.0]) == (Setting("cd", 1.0),)
