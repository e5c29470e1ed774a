"""Prometheus metrics of the API process, which vLLM's `/metrics` shows beside its own.

Counters of tokens and completions are exact: they are written once a choice is complete, never from single steps.
"""

from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram

from qsharp_core.vllm_plugin.telemetry import StepReport

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
    "Time the critics took in one decoding step of the whole batch",
    buckets=(5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
GUIDED_TOKENS = Counter("qsharp_guided_tokens", "Tokens of completed choices whose step was guided")
SCORED_CANDIDATES = Counter("qsharp_scored_candidates", "Candidate tokens scored by critics")
COMPLETIONS = Counter("qsharp_completions", "Completed choices", ["guided", "finish_reason"])
KV_BLOCKS = Gauge(
    "qsharp_critic_kv_blocks_used",
    "Blocks of a critic's key-value cache in use",
    ["name", "version"],
    multiprocess_mode="mostrecent",
)
CRITIC_INFO = Gauge(
    "qsharp_critic_info", "1 for every loaded critic", ["name", "version"], multiprocess_mode="mostrecent"
)
ROLLOUTS_STORED = Counter("qsharp_rollouts_stored", "Choices stored as rollouts, and committed")
ROLLOUT_REWARDS = Counter("qsharp_rollout_rewards", "Rewards given to rollouts that they did not have yet")
ROLLOUT_WRITE = Histogram(
    "qsharp_rollout_write_seconds",
    "Time a response waited for its rollouts to be committed",
    buckets=(1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
FAILURES = Counter("qsharp_critic_failures", "Choices that failed because their critic did", ["reason"])


def observe_step(report: StepReport) -> None:
    """A step's cost."""
    if report.scored_candidates:
        CRITIC_STEP.observe(report.critic_seconds)
        SCORED_CANDIDATES.inc(report.scored_candidates)
    for key, used in report.blocks_used.items():
        KV_BLOCKS.labels(*key.split("@", 1)).set(used)


def observe_choice(*, guided: bool, finish_reason: str, token_kls: Iterable[float] = ()) -> None:
    """A completed choice; `token_kls` of its guided tokens."""
    COMPLETIONS.labels(str(guided).lower(), finish_reason).inc()
    if guided:
        total = 0.0
        for kl in token_kls:
            TOKEN_KL.observe(kl)
            GUIDED_TOKENS.inc()
            total += kl
        COMPLETION_KL.observe(total)


def show_critics(keys: Iterable[str], gone: Iterable[str]) -> None:
    """Which critics are loaded now, and which no longer are."""
    for key in keys:
        CRITIC_INFO.labels(*key.split("@", 1)).set(1)
    for key in gone:
        CRITIC_INFO.remove(*key.split("@", 1))
        KV_BLOCKS.remove(*key.split("@", 1))
