"""Verifiers: what they say, how they are combined, and what becomes of those that hang, crash or take all memory."""

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

import pytest

from trainer.rewards.base import Case, VerifierError
from trainer.rewards.builtin import exact, numeric
from trainer.rewards.verifiers import Judge, Tally, Verdict, Weighted, combined
from trainer.tasks.base import Problem

HERE = "tests.trainer.test_rewards"


def long(case: Case) -> float:
    return float(len(case.completion) > 3)


async def patient(case: Case) -> float:
    await asyncio.sleep(0.01)
    return 0.25


def misbehave(case: Case) -> Any:
    """Does what the completion says."""
    if case.completion == "hang":
        time.sleep(60)
    if case.completion == "crash":
        os._exit(3)
    if case.completion == "raise":
        raise RuntimeError("broken")
    if case.completion == "memory":
        return float(len(bytearray(6 * 2**30)))
    return {"text": "one", "nan": float("nan"), "none": None, "true": True}.get(case.completion, 1.0)


def case_of(completion: str, answer: Any = None) -> Case:
    return Case(completion=completion, problem=Problem(id="p", prompt="?", answer=answer))


def judged(verifiers: Sequence[str], completions: Sequence[str], **limits: Any) -> list[Verdict]:
    async def main() -> list[Verdict]:
        async with Judge([Weighted.parse(name) for name in verifiers], **limits) as judge:
            return list(await asyncio.gather(*(judge.judge(case_of(text, "4")) for text in completions)))

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("completion", "answer", "wanted"),
    [
        ("4", "4", 1.0), (" 4\n", "4", 1.0), ("5", "4", 0.0), ("4.0", "4", 0.0), ("b", ["a", "b"], 1.0),
        ("x", None, None),
    ],
)  # fmt: skip
def test_exact(completion: str, answer: Any, wanted: float | None) -> None:
    assert exact(case_of(completion, answer)) == wanted


@pytest.mark.parametrize(
    ("completion", "answer", "wanted"),
    [
        ("it is 4", "4", 1.0), ("4 or 5", "4", 0.0), ("3.50", "7/2", 1.0), ("1,200", "1200", 1.0), ("-3", "3", 0.0),
        ("\\boxed{4} of 9", "4", 1.0), ("none", "4", 0.0), ("4", "nothing", None), ("1e400000", "4", 0.0),
        ("9" * 500, "4", 0.0), ("1/0", "4", 0.0),
    ],
)  # fmt: skip
def test_numeric(completion: str, answer: Any, wanted: float | None) -> None:
    assert numeric(case_of(completion, answer)) == wanted


def test_rewards_are_weighted_means_of_what_applies() -> None:
    first, second = judged([f"{HERE}:long=3", f"{HERE}:patient", "numeric"], ["long", "4"])
    assert first.rewards == {f"{HERE}:long": 1.0, f"{HERE}:patient": 0.25, "numeric": 0.0}
    assert first.reward == pytest.approx((3 * 1 + 0.25 + 0) / 5)
    assert second.reward == pytest.approx((0 + 0.25 + 1) / 5)
    verifiers = [Weighted("a", 3.0), Weighted("b")]
    assert combined(verifiers, {"b": 0.5}, {}).reward == 0.5
    assert combined(verifiers, {}, {}).reward is None
    assert combined(verifiers, {"b": 0.5}, {"a": "hung"}).reward is None


def test_verifiers_that_misbehave_cost_one_completion() -> None:
    texts = ["good", "hang", "crash", "raise", "memory", "text", "nan", "none", "true", "good"]
    verdicts = dict(enumerate(judged([f"{HERE}:misbehave"], texts, timeout=1.0, memory=4 * 2**30)))
    assert [verdicts[i].reward for i in range(10)] == [1.0, *[None] * 7, 1.0, 1.0]
    failures = {text: next(iter(verdicts[i].failures.values()), None) for i, text in enumerate(texts)}
    for text, words in {
        "hang": "longer than 1 s", "crash": "", "raise": "broken", "memory": "Memory", "text": "number",
        "nan": "finite",
    }.items():  # fmt: skip
        assert words in (failures[text] or "no failure"), text
    assert failures["none"] is None
    tally = Tally()
    for verdict in verdicts.values():
        tally.add(verdict, [Weighted(f"{HERE}:misbehave")])
    assert (tally.judged, tally.failed, tally.not_applicable, tally.mean) == (3, 6, 1, 1.0)


@pytest.mark.parametrize("text", ["", "=1", "a=0", "a=-1", "a=nan", "a=x"])
def test_wrong_names_and_weights(text: str) -> None:
    with pytest.raises(VerifierError):
        Weighted.parse(text)


@pytest.mark.parametrize("names", [[], ["exact", "exact"], ["no_such"], [f"{HERE}:HERE"]])
def test_verifiers_that_cannot_be_used(names: list[str]) -> None:
    with pytest.raises(Exception, match=r"verifier|no_such"):
        Judge([Weighted(name) for name in names])
