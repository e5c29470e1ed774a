"""`qsharp.reward`: stored rollouts judged, and given their rewards."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trainer.api.calling import run
from trainer.rewards.base import Verifier
from trainer.rewards.problems import Problems
from trainer.rewards.run import Rewarded
from trainer.rewards.run import reward as reward_stored
from trainer.rewards.verifiers import GIB, MEMORY_GIB, TIMEOUT, Judge, TaskRef, Weighted
from trainer.rollouts.address import default_key, default_url
from trainer.rollouts.client import ServerClient
from trainer.rollouts.errors import RequestError
from trainer.rollouts.retrying import Tell
from trainer.tasks.sources import Source, task_from

Verifiers = str | Verifier | Sequence[str | Verifier]
"""Names, `NAME=WEIGHT` or `module:function`; or functions, which run in this process."""


def judge_of(
    verifier: Verifiers,
    workers: int = 2,
    timeout: float = TIMEOUT,
    verifier_memory: float = MEMORY_GIB,
    tell: Tell = print,
) -> Judge:
    """The judge that verifiers make together, to be used as an async context manager.

    Raises:
        VerifierError, TaskError: one of them cannot be loaded.
    """
    several = [verifier] if isinstance(verifier, str) or callable(verifier) else verifier
    weighted = [Weighted.parse(one) if isinstance(one, str) else Weighted.of(one) for one in several]
    return Judge(weighted, workers=workers, timeout=timeout, memory=int(verifier_memory * GIB) or None, tell=tell)


def reward(
    verifier: Verifiers,
    *,
    prompts: Source | None = None,
    tasks: Iterable[TaskRef] = (),
    source: str | None = None,
    metadata: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    critic: str | None = None,
    guided: bool | str | None = None,
    again: bool = False,
    failures: Path | None = None,
    batch: int = 200,
    workers: int = 2,
    timeout: float = TIMEOUT,
    verifier_memory: float = MEMORY_GIB,
    url: str | None = None,
    api_key: str | None = None,
    concurrency: int = 16,
    patience: float | None = None,
    tell: Tell = print,
) -> Rewarded:
    """Judges stored rollouts that have no reward yet, and gives them one.

    Args:
        verifier: who judges: a name, `NAME=WEIGHT`, `module:function`, a function, or several of them.
        prompts: where the problems are that the rollouts answer; registered tasks need not be given.
        tasks: more of them.
        source: kept with every reward; None is the verifiers' names.
        metadata, critic, guided: which rollouts.
        again: also those that have a reward.
        failures: a file that failures are appended to, as JSON lines.
        batch: rollouts at a time.
        workers: processes that named verifiers run in.
        timeout: seconds for a completion.
        verifier_memory: GiB that such a process may have; 0 is no limit.
        url, api_key: of the server; None are `QSHARP_URL` and `QSHARP_API_KEY`.
        concurrency: completions judged at once.
        patience: seconds that a request is tried for.
        tell: is told the first failure, and that the server cannot be reached.

    Raises:
        VerifierError: a verifier cannot be used, or always fails.
        RequestError: above all, that no rollout is stored that these filters leave.
        TaskError
    """
    known = [*tasks, *([TaskRef(*task_from(prompts))] if prompts is not None else [])]
    filters = {f"metadata.{key}": value for key, value in dict(metadata).items()}
    filters |= {} if critic is None else {"critic": critic}
    filters |= {} if guided is None else {"guided": str(guided).lower()}
    judge = judge_of(verifier, workers, timeout, verifier_memory, tell)

    async def work() -> Rewarded:
        client = ServerClient(
            url or default_url(), key=api_key or default_key(), connections=4, patience=patience, tell=tell
        )
        async with judge, client:
            result = await reward_stored(
                client,
                judge,
                Problems(known),
                source=source or judge.source,
                filters=filters,
                again=again,
                batch=batch,
                concurrency=concurrency,
                failures=failures,
            )
            if not result.seen and not await client.count(filters):
                raise RequestError("no stored rollout matches: collect some, or change --metadata, --critic, --guided")
            return result

    return run(work())
