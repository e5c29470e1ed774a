"""`qsharp.evaluate`: accuracy against KL, over `eta` and methods, through a running server."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from qsharp_core.answers import VOTES, Vote
from qsharp_core.wire.guidance import METHODS
from trainer.api.calling import run
from trainer.api.reward import Verifiers, judge_of
from trainer.evaluation.evaluate import PLOT
from trainer.evaluation.evaluate import evaluate as sample_and_report
from trainer.evaluation.plot import plot
from trainer.evaluation.report import EvaluationReport
from trainer.evaluation.searches import search_of
from trainer.evaluation.settings import EvaluateError, Evaluation, every_setting
from trainer.rewards.verifiers import MEMORY_GIB, OWN, TIMEOUT, TaskRef
from trainer.rollouts.address import default_key, default_url
from trainer.rollouts.client import ServerClient
from trainer.rollouts.parameters import sampling_of
from trainer.rollouts.retrying import Tell
from trainer.tasks import registry
from trainer.tasks.sources import Source, task_from

Number = TypeVar("Number", float, float | None)


def evaluate(
    prompts: Source,
    *,
    out: str | Path,
    task: str | None = None,
    samples: int = 1,
    eta: float | Sequence[float] | None = None,
    method: str | Sequence[str] | None = None,
    kl_total: float | Sequence[float | None] | None = None,
    kl_token: float | Sequence[float | None] | None = None,
    search: str | Sequence[str | None] | None = None,
    verifier: Verifiers | None = None,
    split: str = "held_out",
    limit: int | None = None,
    model: str | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_tokens: int | None = None,
    stop: Sequence[str] | None = None,
    seed: int = 0,
    critic: str | None = None,
    candidates: int | None = None,
    min_prob: float | None = None,
    tail: str | None = None,
    vote: str | None = None,
    scores: bool = True,
    workers: int = 2,
    timeout: float = TIMEOUT,
    verifier_memory: float = MEMORY_GIB,
    url: str | None = None,
    api_key: str | None = None,
    concurrency: int = 16,
    patience: float | None = None,
    tell: Tell = print,
) -> EvaluationReport:
    """Measures the model itself, and its guidance by a critic. The same call goes on where one was stopped.

    Writes `report.json`, `report.png` and `samples.jsonl`.

    Args:
        prompts: see `collect`.
        out: folder for the report.
        task: the name or `module:object` that other processes find a task by, if `prompts` is a task.
        samples: of each problem, under each setting.
        eta: one or several; None is the critic's own.
        method: `qsharp` (None), `cd`, or both.
        kl_total, kl_token: budgets of nats for a completion and for each token, one or several; None is without.
        search: one or several, as `best_of:n=8`; None is without. Each sample is then found by a search of its own.
        verifier: see `reward`; None is the task's own reward.
        split: of the prompts.
        limit: only the first so many problems.
        model: None is the one that is served.
        temperature, top_p, top_k, max_tokens, stop, seed: of the sampling; None is the task's.
        critic: `name` or `name@version`; None is the server's first.
        candidates, min_prob, tail: of the guidance.
        vote: what completions vote for in majorities: a name or `module:function`; None is the task's.
        scores: whether the critic scores each completion, for best-of-k and weighted majorities.
        workers, timeout, verifier_memory: see `reward`.
        url, api_key: of the server; None are `QSHARP_URL` and `QSHARP_API_KEY`.
        concurrency: requests at once.
        patience: seconds that a request is tried for.
        tell: is told the first failure, and that the server cannot be reached.

    Raises:
        EvaluateError, RequestError, TaskError, VerifierError, JournalError
    """
    found_task, spec = task_from(prompts)
    ref = TaskRef(found_task, spec or task)
    judge = judge_of(verifier or OWN, workers, timeout, verifier_memory, tell)
    wanted = _several(eta)
    searches = [search] if isinstance(search, str) else list(search or ())
    try:
        for one in filter(None, searches):
            search_of(one)
    except ValueError as error:
        raise EvaluateError(str(error)) from error
    methods = [method] if isinstance(method, str) else list(method or METHODS[:1])
    options = {"candidates": candidates, "min_prob": min_prob, "tail": tail}

    async def work() -> EvaluationReport:
        client = ServerClient(
            url or default_url(),
            key=api_key or default_key(),
            connections=concurrency,
            patience=patience,
            tell=tell,
        )
        async with judge, client:
            found = await client.critic(critic)
            if wanted and found is None:
                raise EvaluateError("--eta needs a critic, and the server has none")
            own = found["card"].get("recommended_eta") if found else None
            etas = wanted or ([own] if own else [])
            evaluation = Evaluation(
                split=split,
                model=model or await client.model(),
                samples=samples,
                sampling=sampling_of(ref.task.sampling, temperature, top_p, top_k, max_tokens, stop),
                settings=every_setting(methods, etas, _several(kl_total), _several(kl_token), searches),
                critic=found["id"] if found else None,
                guidance=tuple((name, value) for name, value in options.items() if value is not None),
                scored=scores,
                vote=vote,
                limit=limit,
                seed=seed,
            )
            ballot = None if vote is None else _vote(vote)
            evaluated = await sample_and_report(
                client, judge, ref, evaluation, Path(out), vote=ballot, concurrency=concurrency
            )
            return evaluated.report

    report = run(work())
    plot(Path(out) / PLOT, report)
    return report


def _several(numbers: float | Sequence[Number] | None) -> list[Number | float]:
    return [numbers] if isinstance(numbers, int | float) else list(numbers or ())


def _vote(name: str) -> Vote:
    vote: Vote = VOTES.get(name) or registry.find(name, {}, "qsharp.votes", "vote")
    return vote
