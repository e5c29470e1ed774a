"""Verifiers by name, run side by side, and the reward that they give together.

The reward of a completion is the weighted mean of the rewards of all verifiers that apply to it. If none applies, or
one fails, the completion has no reward: what nobody judged is not scored 0.
"""

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

from trainer.rewards.base import Case, Verifier, VerifierError
from trainer.rewards.pool import WorkerPool
from trainer.rewards.signatures import as_verifier
from trainer.tasks import registry
from trainer.tasks.base import Task

GROUP = "qsharp.verifiers"
TIMEOUT = 10.0  # seconds that a verifier has for a completion
GIB = 2**30
MEMORY_GIB = 8.0  # that a process of verifiers may have
GIVE_UP = 20  # failures, if nothing could be judged before
OWN = "task"  # the reward of the task that a problem belongs to
TASK_PREFIX = "task="
BUILT_IN = {
    "exact": "trainer.rewards.builtin:exact",
    "numeric": "trainer.rewards.builtin:numeric",
    "star_graph": "trainer.rewards.builtin:star_graph",
    "math_verify": "trainer.rewards.mathematics:math_verify",
}
# Those that are run in this process; all others could hang.
QUICK = {name: BUILT_IN[name] for name in ("exact", "numeric", "star_graph")}


@dataclass(frozen=True)
class Weighted:
    """The name and the weight of a verifier; `function` is what it is if it cannot be found by the name."""

    name: str
    weight: float = 1.0
    function: Verifier | None = None

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Weighted":
        """A function as a verifier, which is called in this process.

        Raises:
            VerifierError: its signature is not a verifier's.
        """
        name = getattr(function, "__name__", type(function).__name__)
        return cls(name, function=as_verifier(function, name))

    @classmethod
    def parse(cls, text: str) -> "Weighted":
        """Parses `NAME` or `NAME=WEIGHT`.

        Raises:
            VerifierError
        """
        name, equals, number = text.partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not (name and math.isfinite(weight) and weight > 0):
            raise VerifierError(f"a verifier is NAME or NAME=WEIGHT, the weight a number above 0; got {text!r}")
        return cls(name, weight)


@dataclass(frozen=True)
class Verdict:
    """What verifiers said of a completion.

    Attributes:
        reward: of the completion; None if it has none.
        rewards: by verifier, of the verifiers that applied.
        failures: by verifier, why it failed.
    """

    reward: float | None
    rewards: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


def combined(verifiers: Sequence[Weighted], rewards: Mapping[str, float], failures: Mapping[str, str]) -> Verdict:
    """The verdict of several verifiers: the weighted mean of their rewards, and no reward if one of them failed."""
    weights = {verifier.name: verifier.weight for verifier in verifiers if verifier.name in rewards}
    if failures or not weights:
        return Verdict(None, rewards, failures)
    total = sum(weight * rewards[name] for name, weight in weights.items())
    return Verdict(total / sum(weights.values()), rewards, failures)


@dataclass
class Tally:
    """What verifiers said of many completions; `total` is the sum of the rewards."""

    judged: int = 0
    not_applicable: int = 0
    failed: int = 0
    total: float = 0.0
    by_verifier: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, verdict: Verdict, verifiers: Sequence[Weighted]) -> None:
        """Counts a verdict."""
        if verdict.reward is not None:
            self.judged += 1
            self.total += verdict.reward
        elif verdict.failures:
            self.failed += 1
        else:
            self.not_applicable += 1
        for verifier in verifiers:
            counts = self.by_verifier.setdefault(verifier.name, Counter())
            judged = verifier.name in verdict.rewards
            counts["judged" if judged else "failed" if verifier.name in verdict.failures else "not_applicable"] += 1

    @property
    def mean(self) -> float | None:
        """The mean reward of the completions that have one; None if none has."""
        return self.total / self.judged if self.judged else None


class Judge:
    """Runs verifiers on completions, to be used as an async context manager.

    Args:
        verifiers: each of another name.
        workers: processes.
        timeout: seconds that a verifier has for a completion.
        memory: bytes that such a process may have; None is no limit.
        tell: is told the first failure.

    Raises:
        VerifierError, TaskError: one of them cannot be loaded.
    """

    def __init__(
        self,
        verifiers: Sequence[Weighted],
        *,
        workers: int = 2,
        timeout: float = TIMEOUT,
        memory: int | None = int(MEMORY_GIB * GIB),
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        names = [verifier.name for verifier in verifiers]
        if not names or len(set(names)) < len(names):
            raise VerifierError("name at least one verifier, and each only once")
        self.verifiers = tuple(verifiers)
        self._timeout = timeout
        self._tell = tell
        self._first_failure: str | None = None
        self._failed = 0
        self._has_judged = False
        self._pool = WorkerPool(load, workers, timeout, memory)
        # Also loaded in this process: wrong names fail at once, and async verifiers run here.
        self._loaded: dict[str, Verifier] = {
            one.name: one.function or load(one.name) for one in verifiers if one.name != OWN
        }
        self._functions = {one.name for one in verifiers if one.function is not None}

    @property
    def source(self) -> str:
        """What is kept with the rewards that the verifiers give together, unless somebody names it otherwise."""
        return ", ".join(verifier.name for verifier in self.verifiers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.__aexit__(kind, error, trace)

    async def judge(self, case: Case, task: "TaskRef | None" = None, note: str = "") -> Verdict:
        """The verdict on one completion.

        Args:
            case: the completion.
            task: the task that its problem belongs to.
            note: what is added to the reason of a failure.

        Raises:
            VerifierError: nothing but failures, `GIVE_UP` of them: they are not the completions' own.
        """
        answers = await asyncio.gather(*(self._one(verifier.name, case, task) for verifier in self.verifiers))
        rewards: dict[str, float] = {}
        failures: dict[str, str] = {}
        for verifier, (reward, failure) in zip(self.verifiers, answers, strict=True):
            if failure is not None:
                failures[verifier.name] = failure + (f" ({note})" if note else "")
            elif reward is not None:
                rewards[verifier.name] = reward
        self._watch(rewards, failures)
        return combined(self.verifiers, rewards, failures)

    def _watch(self, rewards: Mapping[str, float], failures: Mapping[str, str]) -> None:
        self._has_judged |= bool(rewards) and not failures
        if not failures:
            return
        self._failed += 1
        if self._first_failure is None:
            self._first_failure = "; ".join(f"{name}: {why}" for name, why in failures.items())
            self._tell(f"a completion could not be judged ({self._first_failure})")
        if self._failed >= GIVE_UP and not self._has_judged:
            raise VerifierError(
                f"the first {self._failed} completions could all not be judged; the first of them: "
                f"{self._first_failure}"
            )

    async def _one(self, name: str, case: Case, task: "TaskRef | None") -> tuple[float | None, str | None]:
        try:
            return _checked(await self._run(name, case, task)), None
        except VerifierError as error:
            return None, str(error)

    async def _run(self, name: str, case: Case, task: "TaskRef | None") -> Any:
        if name == OWN:
            if task is None or case.problem is None or task.task.reward is None:
                return None
            if task.spec is None or inspect.iscoroutinefunction(task.task.reward):
                return await self._here(own_reward(task.task), case)
            return await self._pool.run(TASK_PREFIX + task.spec, case)
        verifier = self._loaded[name]
        if name in QUICK or is_async(verifier):
            return await self._here(verifier, case)
        if name in self._functions:
            return await self._here(in_thread(verifier), case)
        return await self._pool.run(name, case)

    async def _here(self, verifier: Verifier, case: Case) -> Any:
        try:
            async with asyncio.timeout(self._timeout):
                reward = verifier(case)
                return await reward if inspect.isawaitable(reward) else reward
        except TimeoutError as error:
            raise VerifierError(f"took longer than {self._timeout:g} s") from error
        except Exception as error:  # whatever a verifier raises costs its own completion
            raise VerifierError(f"{type(error).__name__}: {error}"[:500]) from error


@dataclass(frozen=True)
class TaskRef:
    """A task, and the name or `module:object` that another process finds it by; None if there is none."""

    task: Task
    spec: str | None = None


def load(name: str) -> Verifier:
    """The verifier that a name, or `module:function`, means; `task=SPEC` is the reward of a task.

    Raises:
        VerifierError, TaskError
    """
    if name.startswith(TASK_PREFIX):
        return own_reward(registry.find_task(name.removeprefix(TASK_PREFIX)))
    verifier = registry.find(name, BUILT_IN, GROUP, "verifier")
    if not callable(verifier):
        raise VerifierError(f"verifier {name} is a {type(verifier).__name__}, which cannot be called")
    return as_verifier(verifier, name)


def own_reward(task: Task) -> Verifier:
    """The reward of a task as a verifier."""
    reward = task.reward

    def verifier(case: Case) -> Any:
        return None if reward is None or case.problem is None else reward(case.problem, case.completion)

    return verifier


def in_thread(verifier: Verifier) -> Verifier:
    """A verifier of this process that may take its time; one that hangs cannot be ended."""
    plain = cast(Callable[[Case], float | None], verifier)
    return lambda case: asyncio.to_thread(plain, case)


def is_async(verifier: Verifier) -> bool:
    """Whether a call of the verifier must be awaited."""
    return inspect.iscoroutinefunction(verifier) or inspect.iscoroutinefunction(getattr(verifier, "__call__", None))  # noqa: B004


def _checked(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise VerifierError(f"must return a number or None; got {value!r:.100}") from error
    if not math.isfinite(number):
        raise VerifierError(f"must return a finite number or None; got {number}")
    return number
