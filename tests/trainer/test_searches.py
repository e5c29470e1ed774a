"""Searches and budgets as settings of an evaluation: how they are spelled, asked for and told apart."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from qsharp_core.answers import whole_text
from qsharp_core.errors import QSharpError
from qsharp_core.wire.reports import ChoiceGuidance, DetailedToken, SearchReport, StepCandidates, TokenGuidance
from trainer.evaluation.evaluate import _Run
from trainer.evaluation.searches import search_of
from trainer.evaluation.settings import EvaluateError, Evaluation, Setting, every_setting
from trainer.experiments.fields import EvaluationFields
from trainer.rewards.verifiers import Verdict
from trainer.rollouts.parameters import SamplingParameters
from trainer.tasks.base import Problem


@pytest.mark.parametrize(
    ("text", "search"),
    [
        ("best_of:n=8", {"kind": "best_of", "n": 8}),
        ("particles:n=8,every=4,resample_below=0.5", {"kind": "particles", "n": 8, "every": 4, "resample_below": 0.5}),
        (
            "best_of:n=8,by=majority,reject.every=16,reject.keep=0.5",
            {"kind": "best_of", "n": 8, "by": "majority", "reject": {"every": 16, "keep": 0.5}},
        ),
        ("stop:below=-0.25", {"kind": "stop", "below": -0.25}),
        ("stop", {"kind": "stop"}),
    ],
)
def test_how_a_search_is_spelled(text: str, search: dict[str, Any]) -> None:
    assert search_of(text) == search


@pytest.mark.parametrize("text", ["", "beam:n=3", "n=3", "best_of:n", "best_of:=3", "best_of:n=3,n.x=4"])
def test_what_is_no_search(text: str) -> None:
    with pytest.raises(ValueError, match=r"search|fields"):
        search_of(text)
    with pytest.raises(ValueError, match="searches"):
        EvaluationFields(searches=(text,))


def test_settings_of_an_evaluation() -> None:
    made = every_setting(["qsharp"], [0.1, 0.3, 0.1], [1.0], searches=[None, "best_of:n=4", "best_of:n=4"])
    assert [setting.label for setting in made] == [
        f"qsharp, eta {eta}, ≤ 1 nats{search}" for eta in (0.1, 0.3) for search in ("", ", best_of:n=4")
    ]
    assert [setting.guidance() for setting in made[:2]] == [
        {"kl_total": 1.0}, {"kl_total": 1.0, "search": {"kind": "best_of", "n": 4}},
    ]  # fmt: skip
    assert len({json.dumps(setting.identity()) for setting in made}) == 4


def test_settings_of_before_are_what_they_were() -> None:
    """Their samples are found by this, and their seeds derive from it."""
    assert Setting("qsharp", 0.1).identity() == {"method": "qsharp", "eta": 0.1, "samples": None}


class Searching:
    """A client that answers as a server that searches."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        searched = {"search": {"tokens_spent": 60}} if "search" in body.get("guidance", {}) else {}
        choices = [
            {"index": i, "text": f"{body['seed']}", "token_ids": [1, 2], "guidance": {"kl": 0.5, **searched}}
            for i in range(body["n"])
        ]
        return {"choices": choices, "prompt_token_ids": [1]}


def test_every_sample_is_found_by_a_search_of_its_own() -> None:
    class Judge:
        async def judge(self, case: Any, task: Any) -> Verdict:
            return Verdict(1.0)

    client: Any = Searching()
    judge: Any = Judge()
    task: Any = SimpleNamespace()
    evaluation = Evaluation(split="x", model="m", samples=3, sampling=SamplingParameters(), critic="a@1", scored=False)
    run = _Run(client, judge, task, evaluation, None, whole_text, "")
    problem = Problem(id="a", prompt="3 + 4 =")
    for setting, tokens, requests in (
        (Setting("qsharp", 0.1, search="best_of:n=8"), 60, 3),
        (Setting("qsharp", 0.1, kl_total=2.0), 2, 1),
    ):
        client.bodies.clear()
        key = run.key(problem, setting)
        samples = asyncio.run(run.sample(problem, setting, key, 0))
        assert [sample.tokens for sample in samples] == [tokens] * 3
        assert len(client.bodies) == requests
        assert len({body["seed"] for body in client.bodies}) == requests
        assert sum(body["n"] for body in client.bodies) == 3
        assert client.bodies[0]["guidance"] == {"critic": "a@1", "method": "qsharp", **setting.guidance()}
        asked = {body["seed"] for body in client.bodies}
        client.bodies.clear()
        assert len(asyncio.run(run.sample(problem, setting, key, 2))) == sum(body["n"] for body in client.bodies) == 1
        assert (client.bodies[0]["seed"] in asked) == (setting.search is not None)  # the third search, or new samples


def test_a_wrong_search_is_told_before_anything_is_asked() -> None:
    from trainer.api.evaluate import evaluate

    with pytest.raises(EvaluateError, match="one of the kinds stop, best_of, particles") as raised:
        evaluate("sums", out="/nowhere", search="tree:n=3")
    assert isinstance(raised.value, QSharpError)


def test_what_the_server_reports_can_be_read_back() -> None:
    report = SearchReport(kind="particles", n=8, sample=None, estimate=0.5, tokens_spent=90, log_estimate=-1.0)
    plain = TokenGuidance(token_id=1, kl=0.0, ref_logprob=-1.0, logprob=-1.0, value=None)
    candidates = StepCandidates(token_ids=[1], texts=["a"], ref_logprobs=[-1.0], outputs=[[0.5]], tail_mass=0.6)
    detailed = DetailedToken(**plain.model_dump(), text="a", candidates=candidates)
    kinds: list[DetailedToken | TokenGuidance] = [plain, detailed]
    for token in kinds:
        written = ChoiceGuidance(tokens_total=3, search=report, tokens=[token]).dump()
        read = ChoiceGuidance.model_validate(json.loads(json.dumps(written)))
        assert read.dump() == written
        assert [type(one) for one in read.tokens or ()] == [type(token)]
    newer = {"tokens_total": 3, "search": {**report.model_dump(), "kind": "of a later version", "more": 1}, "new": [2]}
    assert ChoiceGuidance.model_validate(newer).dump().items() >= newer.items()
