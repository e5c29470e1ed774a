"""Accuracy on a task's problems over a list of `eta` and methods, sampled through a running server.

Every problem is sampled under every setting, the reference among them, so gains are paired by problem. Settings take
turns, so that they see the same machine. What is sampled is kept in `samples.jsonl` of the output's folder, and the
same evaluation goes on from there; more problems or settings may be added.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qsharp_core.errors import QSharpError
from trainer.client import ServerClient, each
from trainer.collect import Sampling, digest, seed_of
from trainer.evaluate_statistics import Sample, summary
from trainer.journal import Journal
from trainer.rewards.base import Case
from trainer.rewards.verifiers import Judge, TaskRef
from trainer.tasks.base import Problem, Task, Vote

REFERENCE = "reference"
SAMPLES, REPORT, PLOT = "samples.jsonl", "report.json", "report.png"


class EvaluateError(QSharpError):
    """The evaluation cannot go on, or has nothing to report."""


@dataclass(frozen=True)
class Setting:
    """How completions are guided; the reference has no `eta`. `samples` overrides the evaluation's."""

    method: str = REFERENCE
    eta: float | None = None
    samples: int | None = None

    @property
    def label(self) -> str:
        """For people."""
        return self.method if self.eta is None else f"{self.method}, eta {self.eta:g}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is to be measured.

    Attributes:
        settings: beside the reference.
        samples: of each problem under each setting.
        critic: exact version; None where nothing is guided or scored.
        guidance: the other options of the requests.
        scored: whether the critic scores each completion, for best-of-k and weighted majorities.
        vote: name of what completions vote for, where it is not the task's own.
        limit: only the first so many problems.
    """

    split: str
    model: str
    samples: int
    sampling: Sampling
    settings: tuple[Setting, ...] = ()
    critic: str | None = None
    guidance: tuple[tuple[str, Any], ...] = ()
    scored: bool = True
    vote: str | None = None
    limit: int | None = None
    seed: int = 0

    def identity(self, task: Task, judge: Judge) -> dict[str, Any]:
        """What makes it this evaluation; it may be given more settings and problems later."""
        fields = asdict(self)
        del fields["settings"], fields["limit"]
        fields["guidance"] = dict(self.guidance)
        verifiers = {verifier.name: verifier.weight for verifier in judge.verifiers}
        return {"format": 1, "command": "evaluate", "task": task.name, "verifiers": verifiers, **fields}


async def evaluate(
    client: ServerClient,
    judge: Judge,
    task: TaskRef,
    evaluation: Evaluation,
    out: Path,
    *,
    vote: Vote | None = None,
    concurrency: int = 16,
) -> dict[str, Any]:
    """Samples what is missing and writes `report.json`.

    Args:
        vote: what completions vote for; None is the task's own.

    Returns:
        The report.

    Raises:
        EvaluateError: nothing could be judged.
        ServerError, JournalError, TaskError
    """
    problems = task.task.of_split(evaluation.split)[: evaluation.limit]
    identity = evaluation.identity(task.task, judge)
    settings = (Setting(), *evaluation.settings)
    critic = None if evaluation.critic is None else await client.critic(evaluation.critic)
    started = time.monotonic()
    with Journal(out / SAMPLES, identity) as journal:
        run = _Run(client, judge, task, evaluation, critic, vote or task.task.vote, digest(identity))
        done: dict[str, list[Sample]] = {
            entry["item"]: [_sample(fields) for fields in entry["samples"]] for entry in journal.entries
        }
        todo = [(p, s, key) for p in problems for s in settings if (key := run.key(p, s)) not in done]
        total = len(problems) * len(settings)
        with tqdm(total=total, initial=total - len(todo), unit="problem", desc="evaluate", smoothing=0.05) as bar:

            async def one(item: tuple[Problem, Setting, str]) -> None:
                problem, setting, key = item
                found = await run.sample(problem, setting, key)
                journal.add({"item": key, "problem": problem.id, "setting": setting.label, "samples": found})
                done[key] = [_sample(fields) for fields in found]
                bar.update()

            await each(todo, one, concurrency)
    by_setting = {s: {p.id: done[run.key(p, s)] for p in problems} for s in settings}
    least = float(critic["card"]["reward_range"][0]) if critic else 0.0
    results = [
        {**asdict(s), **summary(by_setting[s], by_setting[Setting()], s.samples or evaluation.samples, least)}
        for s in settings
    ]
    if not results[0]["n"]:
        raise EvaluateError("no completion could be judged: name a verifier that applies to this task (--verifier)")
    report = {**identity, "seconds": time.monotonic() - started, "failures": run.failures, "results": results}
    write_json(out / REPORT, report)
    return report


def write_json(path: Path, value: Any) -> None:
    """Whole, or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


class _Run:
    def __init__(
        self,
        client: ServerClient,
        judge: Judge,
        task: TaskRef,
        evaluation: Evaluation,
        critic: dict[str, Any] | None,
        vote: Vote,
        identity: str,
    ) -> None:
        self._client = client
        self._judge = judge
        self._task = task
        self._evaluation = evaluation
        self._critic = critic
        self._vote = vote
        self._identity = identity
        self.failures: list[str] = []

    def key(self, problem: Problem, setting: Setting) -> str:
        """Of the samples of a problem under a setting; their seed derives from it."""
        return digest([self._identity, asdict(setting), problem.id, problem.request()])[:32]

    async def sample(self, problem: Problem, setting: Setting, key: str) -> list[dict[str, Any]]:
        """Samples, judges and scores; as JSON's data."""
        evaluation = self._evaluation
        route, asking = problem.request()
        body = {
            **asking,
            **evaluation.sampling.fields(),
            "model": evaluation.model,
            "n": setting.samples or evaluation.samples,
            "seed": seed_of(key),
            "eta": setting.eta,
            "return_token_ids": True,
        }
        if setting.eta is not None:
            body["guidance"] = {"critic": evaluation.critic, "method": setting.method, **dict(evaluation.guidance)}
        answer = await self._client.post(route, body)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        prompt = answer.get("prompt_token_ids") or choices[0].get("prompt_token_ids")
        scores = await self._scores(prompt, [choice["token_ids"] for choice in choices])
        return [await self._entry(problem, choice, score) for choice, score in zip(choices, scores, strict=True)]

    async def _entry(self, problem: Problem, choice: dict[str, Any], score: float | None) -> dict[str, Any]:
        text = choice["text"] if "text" in choice else choice["message"].get("content") or ""
        prompt = problem.prompt if isinstance(problem.prompt, str) else None
        case = Case(completion=text, problem=problem, prompt=prompt, messages=problem.messages)
        verdict = await self._judge.judge(case, self._task)
        self.failures += [f"problem {problem.id}: {name} {why}" for name, why in verdict.failures.items()]
        return {
            "text": text,
            "reward": verdict.reward,
            "kl": (choice.get("guidance") or {}).get("kl", 0.0),
            "tokens": len(choice["token_ids"]),
            "vote": self._vote(text),
            "score": score,
        }

    async def _scores(self, prompt: list[int], completions: Sequence[list[int]]) -> list[float | None]:
        """The reward that the critic expects after each completion; None for those that it cannot read."""
        scores: list[float | None] = [None] * len(completions)
        if self._critic is None or not self._evaluation.scored:
            return scores
        if self._critic["card"].get("backbone") == "reference":  # it reads no texts, only what the reference decodes
            return scores
        longest = self._critic["max_length"] - len(prompt)
        readable = [i for i, completion in enumerate(completions) if 0 < len(completion) <= longest]
        if readable:
            body = {"prompt": prompt, "completion": [completions[i] for i in readable]}
            answer = await self._client.post(f"/v1/critics/{self._critic['id']}/score", body)
            for i, entry in zip(readable, answer["data"], strict=True):
                scores[i] = entry["values"][-1]
        return scores


def _sample(fields: dict[str, Any]) -> Sample:
    return Sample(**{name: fields[name] for name in ("reward", "kl", "tokens", "vote", "score")})
