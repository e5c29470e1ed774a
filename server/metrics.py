"""Prometheus metrics of the API process, which vLLM's `/metrics` shows beside its own.

Tokens and completions are counted when a choice is complete, and never from single steps, so their counts are exact.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, Histogram, Summary

from qsharp_core.vllm_plugin.telemetry import StepFacts
from qsharp_core.wire.critics import CriticStatus
from qsharp_core.wire.search import KINDS, SearchKind
from server.store.rewards import RewardResult

logger = logging.getLogger("vllm.qsharp")

TOKEN_KL = Histogram(
    "qsharp_token_kl_nats",
    "KL(pi || ref) of a guided token, over the whole vocabulary",
    buckets=(1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
COMPLETION_KL = Histogram(
    "qsharp_completion_kl_nats",
    "KL of a guided completion: the sum over its tokens",
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
CRITIC_STEP = Histogram(
    "qsharp_critic_step_seconds",
    "Time one decoding step of the whole batch waited for the critics",
    buckets=(5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
REFUSED = Counter("qsharp_requests_refused", "Requests that were refused before a route saw them", ["reason"])
GUIDED_TOKENS = Counter("qsharp_guided_tokens", "Tokens of completed choices whose step was guided")
SCORED_CANDIDATES = Counter("qsharp_scored_candidates", "Candidate tokens scored by critics")
STEPS_CLIPPED = Counter("qsharp_steps_clipped", "Tokens of completed choices at which a KL budget held guidance back")
BUDGET_SPENT = Histogram(
    "qsharp_kl_budget_spent_ratio",
    "Share of guidance.kl_total that a completed choice has spent",
    buckets=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0],
)
COMPLETIONS = Counter("qsharp_completions", "Completed choices", ["guided", "finish_reason"])
SEARCH_TOKENS = Counter("qsharp_search_tokens", "Tokens of all samples of completed searches", ["kind"])
SEARCH_RESAMPLINGS = Counter(
    "qsharp_search_resamplings", "Times that the particles of completed searches were resampled"
)
SEARCH_REJECTIONS = Counter("qsharp_search_rejections", "Samples of completed searches that were ended on the way")
for _kind in KINDS:
    SEARCH_TOKENS.labels(_kind)
KV_BLOCKS = Gauge(
    "qsharp_critic_kv_blocks_used",
    "Blocks of a critic's key-value cache in use, in each engine",
    ["name", "version", "engine"],
    multiprocess_mode="mostrecent",
)
PREFIX_TOKENS = Counter("qsharp_critic_prefix_tokens", "Tokens of histories that were new to a critic's cache")
PREFIX_HITS = Counter(
    "qsharp_critic_prefix_hit_tokens",
    "Tokens of new histories whose keys and values were cached already",
)
SPLITS = Counter(
    "qsharp_critic_split_passes", "Passes that critics ran because a step's rows did not fit their memory together"
)
AUDITED = Counter("qsharp_audited_rows", "Guided rows that were scored again without the critic's cache")
AUDIT_ERROR = Histogram(
    "qsharp_audit_error",
    "Largest difference of an audited row's scores from the plain pass, relative to their size",
    # The tolerances are 1e-3 in float32 and 0.1 in 16 bits.
    buckets=(1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
)
AUDIT_FAILURES = Counter("qsharp_audit_failures", "Audited rows whose scores were wrong, past the tolerance")
CRITIC_INFO = Gauge(
    "qsharp_critic_info", "1 for every loaded critic", ["name", "version"], multiprocess_mode="mostrecent"
)
VERSION_KL = Summary("qsharp_critic_completion_kl_nats", "KL of completions that a version guided", ["name", "version"])
VERSION_VALUE = Summary(
    "qsharp_critic_completion_value",
    "Value that a version gave completions before their first guided token, in units of reward",
    ["name", "version"],
)
VERSION_REWARD = Summary(
    "qsharp_critic_rollout_reward", "Rewards given to rollouts that a version guided", ["name", "version"]
)
OF_VERSIONS = (VERSION_KL, VERSION_VALUE, VERSION_REWARD)
CRITIC_PROBLEMS = Gauge(
    "qsharp_critic_problems",
    "Versions that the store wants all its servers to have, and that this one cannot load or activate",
    multiprocess_mode="mostrecent",
)
CRITIC_ACTIVATED = Gauge(
    "qsharp_critic_activated_timestamp_seconds",
    "When a version became the one that its name means; only of versions that are",
    ["name", "version"],
)
COMPLETION_VALUE = Summary(
    "qsharp_completion_value",
    "Value V of guided completions, at the first step at which their critic was asked, in reward",
)
BELLMAN_RESIDUAL = Summary(
    "qsharp_bellman_residual",
    "How far a critic disagrees with what it said one token earlier, |V(x') - V(x) - eta ln(pi/ref)|, in reward",
    ["name", "version"],
)
ENGINE_UP = Gauge("qsharp_engine_up", "1 if the engine's worker answered when it was last asked, 0 if not", ["engine"])
ROLLOUTS_STORED = Counter("qsharp_rollouts_stored", "Choices stored as rollouts, and committed")
ROLLOUT_REWARDS = Counter("qsharp_rollout_rewards", "Rewards given to rollouts that they did not have yet")
ROLLOUT_REWARD = Summary(
    "qsharp_rollout_reward",
    "New rewards of rollouts, by whether a critic guided them throughout",
    ["guided"],
)
CALIBRATION = Summary(
    "qsharp_value_calibration_ratio",
    "Reward less eta times KL, whose mean is the value if the critic is right, of guided rollouts by the value where "
    "their critic was first asked; both as a share of the reward's range, the value as the middle of a tenth",
    ["value"],
)
ROLLOUT_WRITE = Histogram(
    "qsharp_rollout_write_seconds",
    "Time a response waited for its rollouts to be committed",
    buckets=(1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
ROLLOUT_FAILURES = Counter("qsharp_rollout_failures", "Responses whose rollouts could not be stored")
ROLLOUTS_UNREADABLE = Counter(
    "qsharp_rollouts_unreadable", "Stored rollouts that were left out of an answer because they cannot be read"
)
ROLLOUT_LAG = Gauge("qsharp_rollout_lag_seconds", "How long the oldest write to the rollout store has waited; 0: none")
FAILURES = Counter("qsharp_critic_failures", "Choices that failed because their critic did", ["reason"])
for _reason in (
    "exception",
    "not_finite",
    "placeholder_token",
    "prompt_embeds",
    "telemetry_timeout",
    "too_long",
    "unknown_critic",
):
    FAILURES.labels(_reason)  # a counter that appears with its first failure hides that failure from increase()


@contextmanager
def after_the_fact() -> Iterator[None]:
    """For what is counted of something that is done already: an error is logged, and does not say that it failed."""
    try:
        yield
    except Exception:
        logger.exception("something that was done could not be counted")


def observe_step(report: StepFacts) -> None:
    """Counts what a step cost, and the audits that were reported with it."""
    if report.scored_candidates:
        CRITIC_STEP.observe(report.critic_seconds)
        SCORED_CANDIDATES.inc(report.scored_candidates)
    for key, used in report.blocks_used.items():
        KV_BLOCKS.labels(*key.split("@", 1), report.engine).set(used)
    PREFIX_TOKENS.inc(report.prefix_tokens)
    PREFIX_HITS.inc(report.prefix_hits)
    SPLITS.inc(report.splits)
    for audit in report.audits:
        AUDITED.inc()
        AUDIT_ERROR.observe(audit.error)
        AUDIT_FAILURES.inc(audit.failed)


def observe_engine(engine: int, critics: Iterable[CriticStatus] | None) -> None:
    """Shows whether an engine answers, and how much of its critics' caches is in use.

    Steps report blocks in use only while requests hold them. That the blocks were given back shows here.

    Args:
        engine: its data-parallel rank.
        critics: its loaded versions; None if it did not answer.
    """
    ENGINE_UP.labels(engine).set(critics is not None)
    for critic in critics or ():
        if critic.kv_blocks_used is not None:
            KV_BLOCKS.labels(critic.name, critic.version, engine).set(critic.kv_blocks_used)


def observe_choice(
    *,
    guided: bool,
    finish_reason: str,
    token_kls: Iterable[float] = (),
    value: float | None = None,
    residuals: Iterable[float] = (),
    critic: str | None = None,
    clipped: int = 0,
    budget: float | None = None,
) -> None:
    """Counts a completed choice.

    Args:
        guided: whether a critic guided it.
        finish_reason: why it ended.
        token_kls: KL of each of its guided tokens, in nats.
        value: `V` at the first step at which the critic was asked, in units of reward; None if it never was.
        residuals: the critic's Bellman residuals over the choice (`qsharp_core.residual`), in units of reward.
        critic: `name@version` of its critic.
        clipped: number of tokens at which its budget held guidance back.
        budget: nats that all its tokens might spend; None if that was not limited.
    """
    COMPLETIONS.labels(str(guided).lower(), finish_reason).inc()
    if guided:
        total = 0.0
        for kl in token_kls:
            TOKEN_KL.observe(kl)
            GUIDED_TOKENS.inc()
            total += kl
        COMPLETION_KL.observe(total)
        STEPS_CLIPPED.inc(clipped)
        if budget is not None:
            BUDGET_SPENT.observe(total / budget)
        if value is not None:
            COMPLETION_VALUE.observe(value)
        if critic is not None:
            version = critic.split("@", 1)
            VERSION_KL.labels(*version).observe(total)
            if value is not None:
                VERSION_VALUE.labels(*version).observe(value)
            of_critic = BELLMAN_RESIDUAL.labels(*version)
            for residual in residuals:
                of_critic.observe(abs(residual))


def observe_search(kind: SearchKind, tokens: int, rejected: int = 0, resamplings: int = 0) -> None:
    """Counts a completed search, whose choices count as choices besides.

    Args:
        kind: of the search.
        tokens: of all its samples.
        rejected: samples that were ended on the way.
        resamplings: how often its particles were resampled.
    """
    SEARCH_TOKENS.labels(kind).inc(tokens)
    SEARCH_REJECTIONS.inc(rejected)
    SEARCH_RESAMPLINGS.inc(resamplings)


def observe_rewards(results: Iterable[RewardResult], range_of: Callable[[str], Sequence[float] | None]) -> None:
    """Counts rewards that the store has taken; one that changed nothing does not count.

    Args:
        results: what the store made of the rewards.
        range_of: gives the least and the greatest reward that a critic knows, by its `name@version`; None where it is
            no longer loaded.
    """
    for result in results:
        if not result.changed:
            continue
        ROLLOUT_REWARDS.inc()
        prediction = result.prediction
        ROLLOUT_REWARD.labels(str(prediction is not None).lower()).observe(result.reward)
        if prediction is None or (reward_range := range_of(prediction.critic)) is None:
            continue
        VERSION_REWARD.labels(*prediction.critic.split("@", 1)).observe(result.reward)
        if prediction.binds:
            assert prediction.value is not None
            low, high = reward_range
            # V = max over policies of E[reward] - eta KL, and the guided policy is where the maximum is.
            outcome = result.reward - prediction.eta * prediction.kl
            share, earned = ((number - low) / (high - low) for number in (prediction.value, outcome))
            if math.isfinite(share) and math.isfinite(earned):  # imported rollouts once had any numbers
                tenth = min(max(int(10 * share), 0), 9)
                CALIBRATION.labels(f"{tenth / 10 + 0.05:.2f}").observe(earned)


def show_critics(keys: Iterable[str], gone: Iterable[str], active: Iterable[str]) -> None:
    """Shows which critics are loaded and which versions are active; all are `name@version`.

    Args:
        keys: loaded now.
        gone: loaded before and no longer.
        active: the versions that their bare names mean.
    """
    for key in keys:
        CRITIC_INFO.labels(*key.split("@", 1)).set(1)
        for metric in (BELLMAN_RESIDUAL, *OF_VERSIONS):
            metric.labels(*key.split("@", 1))  # begins at 0: increase() leaves out what a series begins with
    for key in gone:
        name, version = key.split("@", 1)
        CRITIC_INFO.remove(name, version)
        for metric in (BELLMAN_RESIDUAL, *OF_VERSIONS):
            metric.remove(name, version)
        KV_BLOCKS.remove_by_labels({"name": name, "version": version})
    _show_active(set(active))


_active: set[str] = set()


def _show_active(active: set[str]) -> None:
    for key in active - _active:
        CRITIC_ACTIVATED.labels(*key.split("@", 1)).set(time.time())
    for key in _active - active:
        CRITIC_ACTIVATED.remove(*key.split("@", 1))
    _active.clear()
    _active.update(active)
