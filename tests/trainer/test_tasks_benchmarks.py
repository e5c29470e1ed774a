"""GSM8K and MATH: local files, answers, rewards; the data themselves where they lie beside the repository."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.support import benchmark_data
from trainer.rewards.base import Case
from trainer.rewards.verifiers import OWN, Judge, TaskRef, Weighted
from trainer.tasks import benchmarks, competition_math, gsm8k
from trainer.tasks.base import TaskError
from trainer.tasks.registry import find_task


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Path:
    return benchmark_data.found("gsm8k_test.jsonl", monkeypatch)


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("name", "split", "count"), [("gsm8k", "train", 7473), ("gsm8k", "test", 1319), ("math", "test", 500)]
)
def test_the_benchmarks(name: str, split: str, count: int) -> None:
    problems = find_task(name).of_split(split)
    assert len(problems) == count
    route, body = problems[0].request()
    assert route == "/v1/chat/completions"
    assert body["messages"][0]["content"].endswith("final answer in \\boxed{}.")
    assert all(problem.answer.startswith("\\boxed{") and len(problem.answer) > 8 for problem in problems)


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_the_right_answer_earns_1_and_another_problems_0(name: str) -> None:
    problems = find_task(name).of_split("test")[:40]
    rewards = []
    for problem, other in zip(problems, [*problems[1:], problems[0]], strict=True):
        assert benchmarks.correct(problem, f"Some words, 7 of them. The answer is {problem.answer}.") == 1.0
        rewards.append(benchmarks.correct(problem, f"The answer is {other.answer}."))
    assert sum(reward == 0.0 for reward in rewards) >= 38  # two neighbours may have the same answer


def test_rewards_in_the_verifiers_processes() -> None:
    problem = benchmarks.asked(0, "What is half of 3?", "\\frac{3}{2}")

    async def judged(text: str) -> float | None:
        async with Judge([Weighted(OWN)], workers=1) as judge:
            verdict = await judge.judge(Case(completion=text, problem=problem), TaskRef(find_task("math"), "math"))
        assert not verdict.failures
        return verdict.reward

    assert asyncio.run(judged("It is $\\boxed{1.5}$.")) == 1.0
    assert asyncio.run(judged("It is \\boxed{2}.")) == 0.0


def test_final_answers_and_votes() -> None:
    assert gsm8k.final("2 * 35,000 = 70,000\n#### 70,000") == "70000"
    assert gsm8k.TASK.vote("first 3, then \\boxed{\\$1,200}") == gsm8k.TASK.vote("so it is 1200.") == "1200"
    assert competition_math.final("so $\\boxed{\\frac{1}{2}}$. The answer is 1/2") == "\\frac{1}{2}"
    assert competition_math.final("so $\\boxed 7$.") == "7"
    assert competition_math.vote("\\boxed{ (1, 2) }") == "(1,2)"
    assert competition_math.vote("it is 3") is None
    for final in (gsm8k.final, competition_math.final):
        with pytest.raises(TaskError, match="got 'nothing'"):
            final("nothing")


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSHARP_DATA", str(tmp_path))
    with pytest.raises(TaskError, match=r"gsm8k_test.jsonl cannot be read.*unset QSHARP_DATA"):
        find_task("gsm8k").of_split("test")
    (tmp_path / "math500.jsonl").write_text(json.dumps({"question": "?"}) + "\n")
    with pytest.raises(TaskError, match=r"math500\.jsonl, line 1"):
        find_task("math").of_split("test")
    monkeypatch.delenv("QSHARP_DATA")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(TaskError, match=r"pip install datasets; or set QSHARP_DATA .* gsm8k_test.jsonl"):
        find_task("gsm8k").of_split("test")
