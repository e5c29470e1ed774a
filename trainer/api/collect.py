"""`qsharp.collect`: problems sampled through a server, which stores the rollouts."""

from collections.abc import Sequence
from pathlib import Path

from trainer.api.calling import run
from trainer.rollouts.address import default_key, default_url
from trainer.rollouts.client import ServerClient
from trainer.rollouts.collect import Collected, CollectError, checked
from trainer.rollouts.collect import collect as collect_missing
from trainer.rollouts.collection import Collection
from trainer.rollouts.parameters import GuidanceParameters, sampling_of
from trainer.rollouts.retrying import Tell
from trainer.tasks.sources import Source, task_from


def collect(
    prompts: Source,
    *,
    state: str | Path,
    n: int = 1,
    branch: int = 0,
    round: int = 0,
    split: str = "train",
    limit: int | None = None,
    model: str | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_tokens: int | None = None,
    stop: Sequence[str] | None = None,
    seed: int = 0,
    eta: float | None = None,
    roll_in: bool = False,
    method: str = "qsharp",
    critic: str | None = None,
    candidates: int | None = None,
    min_prob: float | None = None,
    tail: str | None = None,
    url: str | None = None,
    api_key: str | None = None,
    concurrency: int = 16,
    patience: float | None = None,
    tell: Tell = print,
) -> Collected:
    """Samples what is missing, and waits until all of it is stored. The same call goes on where one was stopped.

    Args:
        prompts: a task or its name, a file of JSON lines, the name of a data set, a `datasets.Dataset`, or a list of
            prompts or rows.
        state: a file; what was done is kept in it.
        n: rollouts of each problem.
        branch: then so many more of each problem, which leave these where the model is unsure.
        round: a label kept with every rollout.
        split: of the prompts.
        limit: only the first so many problems.
        model: None is the one that is served.
        temperature, top_p, top_k, max_tokens, stop, seed: of the sampling; None is the task's.
        eta: how strongly rollouts are guided; None leaves them unguided.
        roll_in: cut each guided completion, and have the model go on from there.
        method, critic, candidates, min_prob, tail: of the guidance.
        url, api_key: of the server; None are `QSHARP_URL` and `QSHARP_API_KEY`.
        concurrency: requests at once.
        patience: seconds that a request is tried for.
        tell: is told that the server cannot be reached.

    Raises:
        CollectError: some rollouts could not be made.
        RequestError, TaskError, JournalError
    """
    if roll_in and eta is None:
        raise CollectError("--roll-in needs --eta: what is rolled in is guided")
    if branch and eta is not None:
        raise CollectError("--branch leaves rollouts of the model itself: leave out --eta")
    task, _ = task_from(prompts)

    async def work() -> Collected:
        async with ServerClient(
            url or default_url(),
            key=api_key or default_key(),
            connections=concurrency,
            patience=patience,
            tell=tell,
        ) as server:
            guidance = None
            if eta is not None:
                found = await server.critic(critic)
                if found is None:
                    raise CollectError("--eta needs a critic, and the server has none")
                guidance = GuidanceParameters(
                    eta=eta, critic=found["id"], method=method, candidates=candidates, min_prob=min_prob, tail=tail
                )
            collection = Collection(
                task=task.name,
                split=split,
                model=model or await server.model(),
                samples=n,
                branches=branch,
                sampling=sampling_of(task.sampling, temperature, top_p, top_k, max_tokens, stop),
                guidance=guidance,
                roll_in=roll_in,
                round=round,
                limit=limit,
                seed=seed,
            )
            return await collect_missing(server, task, collection, Path(state), concurrency)

    return checked(run(work()))
