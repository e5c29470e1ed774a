"""What the metrics say of rewards and of critics that come and go."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, Counter
from prometheus_client.metrics import MetricWrapperBase

from qsharp_core.vllm_plugin.telemetry import AuditResult, StepFacts
from server import metrics
from server.store.rewards import Prediction, RewardResult
from tests.server.test_schema import described


def value(metric: str, /, **labels: str) -> float:
    return REGISTRY.get_sample_value(metric, labels) or 0.0


@pytest.fixture(autouse=True)
def _nothing_loaded() -> Iterator[None]:
    yield
    metrics.show_critics((), gone=(), active=())


def test_the_outcome_of_a_guided_rollout_is_its_reward_less_what_the_kl_cost() -> None:
    rewards = {name: f"qsharp_rollout_reward_{name}" for name in ("sum", "count")}
    before = {
        "rewards": value("qsharp_rollout_rewards_total"),
        "guided": value(rewards["sum"], guided="true"),
        "unguided": value(rewards["count"], guided="false"),
    }
    prediction = Prediction("a@1", "qsharp", eta=0.5, value=0.5, kl=1.2)
    results = [
        RewardResult("one", 2.0, True, prediction),
        RewardResult("two", -1.0, True, prediction._replace(value=7.0)),  # beyond the range: the last tenth
        RewardResult("same again", 2.0, False, prediction),
        RewardResult("gone critic", 2.0, True, prediction._replace(critic="b@1")),
        RewardResult("another method", 2.0, True, prediction._replace(method="cd")),
        RewardResult("within a budget", 2.0, True, prediction._replace(guidance={"kl_total": 9.0})),
        RewardResult("the best of several", 2.0, True, prediction._replace(guidance={"search": {"kind": "best_of"}})),
        RewardResult("unguided", 1.0, True),
    ]
    metrics.observe_rewards(results, {"a@1": (-2.0, 3.0)}.get)
    assert value("qsharp_rollout_rewards_total") - before["rewards"] == 7
    assert value(rewards["sum"], guided="true") - before["guided"] == 2.0 - 1.0 + 2.0 + 2.0 + 2.0 + 2.0
    assert value(rewards["count"], guided="false") - before["unguided"] == 1
    # The value 0.5 is half of the way from -2 to 3; the outcome 2 - 0.5 * 1.2 = 1.4 is 0.68 of it.
    assert value("qsharp_value_calibration_ratio_sum", value="0.55") == pytest.approx(0.68)
    assert value("qsharp_value_calibration_ratio_sum", value="0.95") == pytest.approx((-1.6 + 2) / 5)
    of_version = [value(f"qsharp_critic_rollout_reward_{part}", name="a", version="1") for part in ("sum", "count")]
    assert of_version == [2.0 - 1.0 + 2.0 + 2.0 + 2.0, 5]  # whatever its value was, and only while it is loaded
    assert sum(value("qsharp_value_calibration_ratio_count", value=f"{i / 10 + 0.05:.2f}") for i in range(10)) == 2


def test_an_activation_is_marked_once_and_ends_with_the_next() -> None:
    name = "qsharp_critic_activated_timestamp_seconds"
    metrics.show_critics(["c@1"], gone=(), active=["c@1"])
    first = value(name, name="c", version="1")
    assert first == pytest.approx(time.time(), abs=5)
    metrics.show_critics(["c@1", "c@2"], gone=(), active=["c@1"])
    assert value(name, name="c", version="1") == first
    metrics.show_critics(["c@1", "c@2"], gone=(), active=["c@2"])
    assert value(name, name="c", version="2") >= first
    assert REGISTRY.get_sample_value(name, {"name": "c", "version": "1"}) is None


def test_versions_are_told_apart_while_they_are_loaded() -> None:
    metrics.show_critics(["v@1", "v@2"], gone=(), active=["v@1"])
    for critic, kls, first in (("v@1", (0.1, 0.2), 0.5), ("v@2", (0.3,), None), ("v@1", (), 0.7)):
        metrics.observe_choice(guided=True, finish_reason="stop", token_kls=kls, value=first, critic=critic)
    names = ("qsharp_critic_completion_kl_nats", "qsharp_critic_completion_value")
    shown = {v: [[value(f"{n}_{p}", name="v", version=v) for p in ("sum", "count")] for n in names] for v in "12"}
    assert shown == {"1": [[pytest.approx(0.3), 2], [1.2, 2]], "2": [[0.3, 1], [0.0, 0]]}
    metrics.show_critics(["v@1"], gone=["v@2"], active=["v@1"])
    assert REGISTRY.get_sample_value("qsharp_critic_rollout_reward_count", {"name": "v", "version": "2"}) is None
    assert REGISTRY.get_sample_value("qsharp_critic_rollout_reward_count", {"name": "v", "version": "1"}) == 0


def test_engines_do_not_overwrite_each_others_cache() -> None:
    for engine, used in [(0, 5), (1, 7)]:
        facts = StepFacts(critic_seconds=0.1, scored_candidates=3, blocks_used={"c@1": used}, engine=engine)
        metrics.observe_step(facts)
    metrics.show_critics(["c@1"], gone=(), active=())
    name = "qsharp_critic_kv_blocks_used"
    assert [value(name, name="c", version="1", engine=engine) for engine in "01"] == [5, 7]
    cached = described("c", "1")
    metrics.observe_engine(1, [cached])
    metrics.observe_engine(1, [cached.model_copy(update={"name": "native", "kv_blocks": None, "kv_blocks_used": None})])
    assert REGISTRY.get_sample_value(name, {"name": "native", "version": "1", "engine": "1"}) is None
    metrics.observe_engine(0, None)
    assert [value(name, name="c", version="1", engine=engine) for engine in "01"] == [5, 0]
    assert [value("qsharp_engine_up", engine=engine) for engine in "01"] == [0, 1]
    metrics.show_critics((), gone=["c@1"], active=())
    assert [REGISTRY.get_sample_value(name, {"name": "c", "version": "1", "engine": e}) for e in "01"] == [None, None]


def test_audits_are_counted() -> None:
    names = ["qsharp_audited_rows_total", "qsharp_audit_failures_total", "qsharp_audit_error_sum"]
    before = [value(name) for name in names]
    metrics.observe_step(StepFacts(audits=[AuditResult("c@1", 2e-6, False), AuditResult("c@1", 0.5, True)]))
    assert [value(name) - b for name, b in zip(names, before, strict=True)] == pytest.approx([2, 1, 0.500002])


def test_a_critics_residuals_are_there_from_its_load_to_its_end() -> None:
    """From 0: a series that begins with its first residuals hides them from `increase()`."""
    sums = {part: f"qsharp_bellman_residual_{part}" for part in ("sum", "count")}
    metrics.show_critics(["c@1", "c@2"], gone=(), active=["c@1"])
    assert REGISTRY.get_sample_value(sums["count"], {"name": "c", "version": "2"}) == 0
    metrics.observe_choice(guided=True, finish_reason="stop", critic="c@2", residuals=[0.25, -0.5])
    metrics.observe_choice(guided=True, finish_reason="stop", critic="c@2")  # never asked twice in a row
    metrics.observe_choice(guided=False, finish_reason="stop")
    assert [value(sums[part], name="c", version="2") for part in ("sum", "count")] == [0.75, 2]
    assert value(sums["count"], name="c", version="1") == 0
    metrics.show_critics(["c@1"], gone=["c@2"], active=["c@1"])
    assert REGISTRY.get_sample_value(sums["count"], {"name": "c", "version": "2"}) is None
    assert REGISTRY.get_sample_value(sums["count"], {"name": "c", "version": "1"}) == 0
    metrics.show_critics((), gone=["c@1"], active=())


def test_the_reference_lists_every_metric() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
    listed = set(re.findall(r"^\| `(qsharp_\w+)` \| (?:counter|gauge|histogram|summary)", page, re.MULTILINE))
    kinds = {metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)}
    names = {metric._name + ("_total" if isinstance(metric, Counter) else "") for metric in kinds}
    assert listed == names
