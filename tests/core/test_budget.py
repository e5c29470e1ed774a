"""A step within its budget against a bisection over the whole vocabulary, in float64; and what paths spend."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsharp_core import budget, policy
from qsharp_core.vllm_plugin.spending import POSITIONS, Spending
from tests.core.test_policy import ROWS, build, run, temperatures
from tests.support import oracle

BUDGETS = st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 0.05, 0.7, 5.0, math.inf])
CPU = torch.device("cpu")


def full(logits: Tensor, candidates: policy.Candidates, step: policy.GuidedStep, t: Tensor) -> Tensor:
    """`ln pi` of the whole vocabulary, as it is sampled."""
    guided = policy.guide_logits_(logits.clone(), t, candidates, step)
    return (guided.double() / t[:, None]).log_softmax(-1)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(st.tuples(ROWS, BUDGETS), min_size=1, max_size=5))
def test_the_strongest_policy_within_the_budget(rows: list[tuple[dict[str, Any], float]]) -> None:
    given_rows, budgets = [row for row, _ in rows], torch.tensor([most for _, most in rows], dtype=torch.float64)
    logits, tilts = build(given_rows)
    candidates, step = run(given_rows, logits, tilts)
    clipped, strength = budget.clip(candidates, step, budgets)
    t = temperatures(given_rows)
    before, after = full(logits, candidates, step, t), full(logits, candidates, clipped, t)
    assert (clipped.kl_R <= budgets.clamp(max=1e300)).all()
    assert torch.equal(clipped.value_R.isnan(), step.value_R.isnan())
    for r in range(len(rows)):
        if step.kl_R[r] <= budgets[r]:
            assert strength[r] == 1
            assert torch.equal(before[r], after[r])
            continue
        if budgets[r] < budget.DUST:
            assert strength[r] == 0
            assert clipped.kl_R[r] == 0
            continue
        log_ref = (logits[r].double() / t[r]).log_softmax(-1)
        # Of `pi` itself the slow definition knows float32 logits; of the step its own numbers.
        want, kl, a = oracle.limited(
            log_ref, exact(candidates, step, log_ref, r), step.kl_R[r].item(), budgets[r].item()
        )
        assert clipped.kl_R[r].item() == pytest.approx(kl, abs=1e-6)
        assert strength[r].item() == pytest.approx(a, abs=1e-6) or abs(clipped.kl_R[r].item() - kl) < 1e-9
        # By probabilities: where KL hardly grows any more, any `a` is as good as another.
        assert torch.allclose(after[r].exp(), want.exp(), atol=1e-3)


def exact(candidates: policy.Candidates, step: policy.GuidedStep, log_ref: Tensor, r: int) -> Tensor:
    """`ln pi` of the step in float64, which float32 logits only have to a millionth."""
    ratio = torch.full_like(log_ref, step.tail_log_ratio_R[r].item())
    ratio[candidates.ids_RK[r]] = step.log_ratio_RK[r]
    return log_ref + ratio


@pytest.mark.parametrize("nats", [1e-3, 5.0, 800.0])
def test_a_candidate_whose_probability_is_below_the_least_float(nats: float) -> None:
    """As with a low temperature: `e^-900` is 0 in float64, and the critic wants that token."""
    log_ref, tilt = torch.tensor([[0.0, -900.0]], dtype=torch.float64), torch.tensor([[0.0, 1e6]], dtype=torch.float64)
    candidates = policy.Candidates(log_ref.float(), torch.tensor([[0, 1]]), log_ref, torch.ones(1, 2, dtype=torch.bool))
    log_ratio = tilt - (log_ref + tilt).logsumexp(-1)
    none = torch.zeros(1, dtype=torch.float64)
    step = policy.GuidedStep(log_ratio, log_ratio[:, 0], torch.tensor([900.0], dtype=torch.float64), none)
    clipped, strength = budget.clip(candidates, step, torch.tensor([nats], dtype=torch.float64))
    log_ref_RC = torch.cat([log_ref, torch.tensor([[-math.inf]], dtype=torch.float64)], 1)
    spent = budget.tilted(log_ref_RC, torch.cat([tilt, none[None]], 1), strength[:, None])[1].item()
    assert spent <= nats * (1 + 1e-9)
    assert spent == pytest.approx(nats, rel=1e-4)
    assert clipped.kl_R.item() == pytest.approx(nats, rel=1e-4)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=4))
def test_kl_grows_with_the_strength(rows: list[dict[str, Any]]) -> None:
    logits, tilts = build(rows)
    candidates, step = run(rows, logits, tilts)
    log_ref = candidates.log_ref_RK.masked_fill(~candidates.mask_RK, -math.inf)
    tail = torch.log1p(-log_ref.logsumexp(-1).exp().clamp(max=1.0))
    log_ref_RC = torch.cat([log_ref, tail[:, None]], dim=1)
    tilt_RC = torch.cat([step.log_ratio_RK.masked_fill(~candidates.mask_RK, 0.0), step.tail_log_ratio_R[:, None]], 1)
    at = torch.linspace(0, 1, 101, dtype=torch.float64).expand(len(rows), -1)
    _, kl = budget.tilted(log_ref_RC, tilt_RC, at)
    guided = candidates.mask_RK.any(-1)
    assert (kl[:, 1:] - kl[:, :-1] >= -1e-9).all()
    assert (kl[:, 0] == 0).all()
    assert torch.allclose(kl[guided, -1], step.kl_R[guided], atol=1e-9)


def test_no_path_spends_more_than_its_budget() -> None:
    """Tokens are drawn from what is left, step after step: the sum holds along every path."""
    dice = random.Random(7)
    rows: list[dict[str, Any]] = [
        {
            "seed": 0, "temperature": 1.0, "eta": dice.choice([1e-3, 0.05, 0.3, 1.0]),
            "candidates": dice.choice([2, 5, 24]), "min_prob": 0.0, "tail": dice.choice(["floor", "keep", "drop"]),
            "masked": 0, "r_min": 0.0,
        }
        for _ in range(64)
    ]  # fmt: skip
    total = torch.tensor([dice.choice([1e-3, 0.1, 1.0, 10.0]) for _ in rows], dtype=torch.float64)
    spending = Spending(len(rows), CPU)
    accounts = torch.tensor([spending.open(i, resumed=False) for i in range(len(rows))])
    for length in range(5, 65):
        for row in rows:
            row["seed"] = dice.randrange(2**31)
        logits, tilts = build(rows)
        candidates, step = run(rows, logits, tilts)
        spent = spending.spent(accounts, [length] * len(rows))
        clipped, _ = budget.clip(candidates, step, (total - spent).clamp(min=0.0))
        spending.note(accounts, [length] * len(rows), spent + clipped.kl_R)
    spent = spending.spent(accounts, [65] * len(rows))
    assert (spent <= total * (1 + 1e-12)).all()
    # And they spend it, but where dropping the tail alone costs more.
    tight = torch.tensor([most < 1 and row["tail"] != "drop" for most, row in zip(total.tolist(), rows, strict=True)])
    assert (spent[tight] > 0.97 * total[tight]).all()


# -- accounts


def one(spending: Spending, account: int, length: int) -> float:
    return spending.spent(torch.tensor([account]), [length]).item()


def pay(spending: Spending, account: int, length: int, nats: float) -> None:
    at = torch.tensor([account])
    spending.note(at, [length], spending.spent(at, [length]) + nats)


@pytest.mark.parametrize("start", [1, POSITIONS - 1, POSITIONS, 37])
def test_an_account_outlives_a_preemption(start: int) -> None:
    spending = Spending(2, CPU)
    account = spending.open(11, resumed=False)
    for length in range(start, start + 20):
        assert one(spending, account, length) == pytest.approx((length - start) * 0.5)
        pay(spending, account, length, 0.5)
    spending.close(11)
    other = spending.open(12, resumed=False)
    assert other != account
    assert one(spending, other, start) == 0
    assert spending.open(11, resumed=True) == account
    assert one(spending, account, start + 20) == 10
    for thrown_away in range(1, 4):  # a step that runs again pays again from where it was
        pay(spending, account, start + 20 - thrown_away, 0.25)
        assert one(spending, account, start + 21 - thrown_away) == pytest.approx(10 - 0.5 * thrown_away + 0.25)


def test_an_account_that_is_gone_has_nothing_left() -> None:
    spending = Spending(1, CPU, kept=2)
    for request_id in range(5):
        pay(spending, spending.open(request_id, resumed=False), 3, 1.0)
        spending.close(request_id)
    assert one(spending, spending.open(4, resumed=True), 4) == 1.0
    assert one(spending, spending.open(0, resumed=True), 4) == math.inf
    assert one(spending, spending.open(9, resumed=False), 4) == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60), st.integers(1, 4), st.integers(0, 5))
def test_open_accounts_are_never_shared(moves: list[tuple[int, bool]], most_open: int, kept: int) -> None:
    spending, open_now = Spending(most_open, CPU, kept=kept), dict[int, int]()
    for request_id, enters in moves:
        if enters and request_id not in open_now and len(open_now) < most_open:
            open_now[request_id] = spending.open(request_id, resumed=False)
        elif not enters and request_id in open_now:
            spending.close(request_id)
            del open_now[request_id]
        assert len(set(open_now.values())) == len(open_now)
        assert 0 not in open_now.values()


def test_steps_within_their_budget_stay_as_they_are() -> None:
    rows = [{**_row(seed), "eta": 1.0} for seed in range(4)]
    logits, tilts = build(rows)
    candidates, step = run(rows, logits, tilts)
    same, strength = budget.clip(candidates, step, torch.full((4,), math.inf, dtype=torch.float64))
    assert same is step
    assert (strength == 1).all()


def _row(seed: int) -> dict[str, Any]:
    return {
        "seed": seed, "temperature": 1.0, "eta": 0.1, "candidates": 5, "min_prob": 0.0, "tail": "floor", "masked": 0,
        "r_min": 0.0,
    }  # fmt: skip
