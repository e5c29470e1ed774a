"""Accuracy on a task's problems over a list of `eta` and methods, sampled through a running server.

Every problem is sampled under every setting, the reference among them, so gains are paired by problem. Settings take
turns, so that all of them see the same state of the machine. Samples are kept in `samples.jsonl` of the output folder,
and the same evaluation goes on from there; problems, settings and samples may be added to it.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter
from tqdm import tqdm

from qsharp_core.answers import Vote
from trainer.evaluation.report import EvaluationReport, SettingReport
from trainer.evaluation.settings import EvaluateError, Evaluation, Setting
from trainer.evaluation.statistics import JudgedSample, summary
from trainer.rewards.base import Case
from trainer.rewards.verifiers import Judge, TaskRef
from trainer.rollouts.client import JSONObject, ServerClient
from trainer.rollouts.collection import digest, seed_of
from trainer.rollouts.concurrency import each
from trainer.rollouts.journal import Journal
from trainer.tasks.base import Problem, no_vote

SAMPLES, REPORT, PLOT = "samples.jsonl", "report.json", "report.png"


class SampleEntry(BaseModel):
    """A judged completion as the journal keeps it; see `statistics.JudgedSample`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str
    reward: float | None
    kl: float
    tokens: int
    vote: str | None
    score: float | None

    def judged(self) -> JudgedSample:
        """The completion without its text."""
        return JudgedSample(**self.model_dump(exclude={"text"}))


_SAMPLES = TypeAdapter(list[SampleEntry])


@dataclass(frozen=True)
class Evaluated:
    """The report, and the samples that it is of, by setting and problem."""

    report: EvaluationReport
    samples: Mapping[Setting, Mapping[str, Sequence[JudgedSample]]]


async def evaluate(
    client: ServerClient,
    judge: Judge,
    task: TaskRef,
    evaluation: Evaluation,
    out: Path,
    *,
    vote: Vote | None = None,
    concurrency: int = 16,
) -> Evaluated:
    """Samples what is missing and writes `report.json`.

    Args:
        client: of the server; it has the key that the critic's scores need.
        judge: who judges completions.
        task: the task whose problems are sampled.
        evaluation: what is measured.
        out: folder of samples and report.
        vote: what completions vote for; None is the task's own.
        concurrency: requests at once.

    Raises:
        EvaluateError: nothing could be judged.
        VerifierError: nothing but failures of verifiers; see `Judge.judge`.
        RequestError, JournalError, TaskError
    """
    problems = task.task.of_split(evaluation.split)[: evaluation.limit]
    identity = evaluation.identity(task.task, judge)
    settings = (Setting(), *evaluation.settings)
    critic = None if evaluation.critic is None else await client.critic(evaluation.critic)
    ballot = vote or task.task.vote
    started = time.monotonic()
    with Journal(out / SAMPLES, identity) as journal:
        run = _Run(client, judge, task, evaluation, critic, ballot, digest(identity))
        done: dict[str, list[SampleEntry]] = defaultdict(list)
        for entry in journal.entries:
            done[entry["item"]] += _SAMPLES.validate_python(entry["samples"])
        items = [(p, s, run.key(p, s)) for p in problems for s in settings]
        todo = [item for item in items if len(done[item[2]]) < evaluation.count(item[1])]
        total = len(problems) * len(settings)
        with tqdm(total=total, initial=total - len(todo), unit="problem", desc="evaluate", smoothing=0.05) as bar:

            async def one(item: tuple[Problem, Setting, str]) -> None:
                problem, setting, key = item
                new = await run.sample(problem, setting, key, len(done[key]))
                done[key] += new
                samples = _SAMPLES.dump_python(new, mode="json")
                journal.add({"item": key, "problem": problem.id, "setting": setting.label, "samples": samples})
                bar.update()

            await each(todo, one, concurrency)
    by_setting = {
        s: {p.id: [one.judged() for one in done[run.key(p, s)][: evaluation.count(s)]] for p in problems}
        for s in settings
    }
    least = float(critic["card"]["reward_range"][0]) if critic else 0.0
    results = []
    for setting, samples in by_setting.items():
        figures = summary(samples, by_setting[Setting()], evaluation.count(setting), least, ballot is not no_vote)
        results.append(SettingReport(**asdict(setting), **figures.model_dump()))
    if not results[0].n:
        raise EvaluateError("no completion could be judged: name a verifier that applies to this task (--verifier)")
    seconds = time.monotonic() - started
    rewards = {one.reward for samples in by_setting.values() for found in samples.values() for one in found}
    graded = not rewards <= {0.0, 1.0, None}
    report = EvaluationReport(
        **identity,
        samples=evaluation.samples,
        seconds=seconds,
        failures=run.failures,
        graded=graded,
        results=results,
    )
    report.write(out / REPORT)
    return Evaluated(report, by_setting)


class _Run:
    def __init__(
        self,
        client: ServerClient,
        judge: Judge,
        task: TaskRef,
        evaluation: Evaluation,
        critic: JSONObject | None,
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
        """Names the samples of a problem under a setting; their seed derives from it."""
        what = [setting.identity(), problem.id, problem.request(), problem.answer, problem.data]
        return digest([self._identity, *what])[:32]

    async def sample(self, problem: Problem, setting: Setting, key: str, have: int) -> list[SampleEntry]:
        """Samples a problem under a setting, judges the completions and has the critic score them.

        Args:
            key: names these samples.
            have: so many there are already.
        """
        evaluation = self._evaluation
        route, question = problem.request()
        count = evaluation.count(setting) - have
        body = {
            **question,
            **evaluation.sampling.fields(),
            "model": evaluation.model,
            "n": count,
            "seed": seed_of(f"{key}/{have}" if have else key),
            "eta": setting.eta,
            "return_token_ids": True,
        }
        if setting.eta is not None:
            options = {"method": setting.method, **dict(evaluation.guidance), **setting.guidance()}
            body["guidance"] = {"critic": evaluation.critic, **options}
        # The choices of one search are its best ones, and no samples of what it returns.
        apart = setting.search is not None
        bodies = [{**body, "n": 1, "seed": seed_of(f"{key}/{have + i}")} for i in range(count)] if apart else [body]
        choices: list[JSONObject] = []
        for one in bodies:
            answer = await self._client.post(route, one)
            found = sorted(answer["choices"], key=lambda choice: choice["index"])
            prompt = answer.get("prompt_token_ids") or found[0].get("prompt_token_ids")
            choices += found
        scores = await self._scores(prompt, [choice["token_ids"] for choice in choices])
        return [await self._entry(problem, choice, score) for choice, score in zip(choices, scores, strict=True)]

    async def _entry(self, problem: Problem, choice: JSONObject, score: float | None) -> SampleEntry:
        case = Case.of_choice(problem, choice)
        verdict = await self._judge.judge(case, self._task)
        self.failures += [f"problem {problem.id}: {name} {why}" for name, why in verdict.failures.items()]
        guidance = choice.get("guidance") or {}
        search = guidance.get("search") or {"tokens_spent": len(choice["token_ids"])}
        return SampleEntry(
            text=case.completion,
            reward=verdict.reward,
            kl=guidance.get("kl", 0.0),
            tokens=search["tokens_spent"],
            vote=self._vote(case.completion),
            score=score,
        )

    async def _scores(self, prompt: list[int], completions: Sequence[list[int]]) -> list[float | None]:
        """The reward that the critic expects after each completion; None for a completion that it cannot read."""
        scores: list[float | None] = [None] * len(completions)
        if self._critic is None or not self._evaluation.scored:
            return scores
        if self._critic["card"].get("backbone") == "reference":  # a native critic cannot score a text
            return scores
        longest = self._critic["max_length"] - len(prompt)
        readable = [i for i, completion in enumerate(completions) if 0 < len(completion) <= longest]
        if readable:
            body = {"prompt": prompt, "completion": [completions[i] for i in readable]}
            answer = await self._client.post(f"/v1/critics/{self._critic['id']}/score", body)
            for i, entry in zip(readable, answer["data"], strict=True):
                scores[i] = entry["values"][-1]
        return scores
