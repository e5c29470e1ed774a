"""The guided policy against the definitions over the whole vocabulary, in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsharp_core import policy
from qsharp_core.returns import Bernoulli, Categorical, ReturnDistribution
from qsharp_core.wire.guidance import Tail
from tests.support import oracle

TAILS = {"floor": Tail.FLOOR, "keep": Tail.KEEP, "drop": Tail.DROP}
ROWS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "temperature": st.sampled_from([0.0, 0.003, 0.3, 0.7, 1.0, 1.7]),
        "eta": st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 30.0, 1e6]),
        "candidates": st.integers(1, 24),
        "min_prob": st.sampled_from([0.0, 0.0, 0.01, 0.05, 0.9]),
        "tail": st.sampled_from(["floor", "keep", "drop"]),
        "masked": st.integers(0, 22),
        "r_min": st.sampled_from([0.0, -2.0]),
    }
)
V = 24


def column(rows: list[dict[str, Any]], name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([row[name] for row in rows], dtype=dtype)


def temperatures(rows: list[dict[str, Any]]) -> Tensor:
    return policy.effective_temperature(column(rows, "temperature"))


def build(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Logits `[R, V]` float32 and tilts of every token, relative to r_max = 1, float64."""
    logits, tilts = [], []
    for row in rows:
        generator = torch.Generator().manual_seed(row["seed"])
        line = torch.randn(V, generator=generator) * 3
        line[torch.randperm(V, generator=generator)[: row["masked"]]] = float("-inf")
        logits.append(line)
        best = torch.rand(V, generator=generator, dtype=torch.float64).clamp(0.01)
        tilts.append(torch.logaddexp(best.log(), torch.log1p(-best) - 1 / row["eta"]))
    return torch.stack(logits), torch.stack(tilts)


def run(rows: list[dict[str, Any]], logits: Tensor, tilts: Tensor) -> tuple[policy.Candidates, policy.GuidedStep]:
    counts = [row["candidates"] for row in rows]
    least = policy.least_log_ref(counts, [row["min_prob"] for row in rows], max(counts))
    candidates = policy.select_candidates(logits, temperatures(rows), least)
    step = policy.guide(
        candidates,
        tilts.gather(1, candidates.ids_RK),
        column(rows, "eta"),
        torch.tensor([row["tail"] == "keep" for row in rows]),
        torch.tensor(
            [policy.tail_tilt(TAILS[row["tail"]], row["eta"], (row["r_min"], 1.0)) for row in rows], dtype=torch.float64
        ),
        torch.ones(len(rows), dtype=torch.float64),
    )
    return candidates, step


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=5))
def test_batch_agrees_with_the_definition(rows: list[dict[str, Any]]) -> None:
    logits, tilts = build(rows)
    candidates, step = run(rows, logits, tilts)
    guided = policy.guide_logits_(logits.clone(), temperatures(rows), candidates, step)
    for r, row in enumerate(rows):
        eta = row["eta"]
        log_ref, log_pi, kl, value, ambiguous = oracle.guided_policy(
            logits[r].double(),
            row["temperature"],
            lambda ids, _, r=r, eta=eta: tilts[r, ids] + 1 / eta,
            row["r_min"],
            eta,
            row["candidates"],
            row["min_prob"],
            row["tail"],
        )
        if ambiguous:
            continue
        mass = torch.exp(log_pi)
        got = (guided[r].double() / (row["temperature"] or 1.0)).softmax(-1)
        torch.testing.assert_close(got, mass, atol=2e-5, rtol=0)
        assert (guided[r][logits[r] == float("-inf")] == float("-inf")).all()
        # Rounding of the tail's mass, 1e-7, is multiplied by tilts of up to 1/eta where nothing else has weight.
        assert step.kl_R[r].item() == pytest.approx(kl, abs=2e-4, rel=2e-4)
        if value is None:
            assert math.isnan(step.value_R[r].item())
        elif eta <= 30:
            assert step.value_R[r].item() == pytest.approx(value, abs=1e-4 * max(1, eta), rel=1e-5)
        for token in (int(log_ref.argmax()), int(log_pi.argmax()), int(log_ref.argsort()[V // 2])):
            if log_pi[token] > -200 or log_pi[token] == float("-inf"):
                rows_of = torch.full((len(rows),), token)
                ref_got, pi_got = policy.token_logprobs(candidates, step, rows_of)
                assert ref_got[r].item() == pytest.approx(log_ref[token].item(), abs=1e-5)
                assert pi_got[r].item() == pytest.approx(log_pi[token].item(), abs=1e-4, rel=1e-4)


def one(**changes: Any) -> dict[str, Any]:
    row = {"seed": 3, "temperature": 1.0, "eta": 0.1, "candidates": 8, "min_prob": 0.0, "tail": "floor"}
    return row | {"masked": 0, "r_min": 0.0} | changes


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 4), vocab=st.integers(1, 40 * policy.CHUNK), most=st.integers(1, 20), masked=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_largest_are_those_of_topk(rows: int, vocab: int, most: int, masked: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, vocab, generator=generator)
    values[torch.rand(rows, vocab, generator=generator) < masked] = float("-inf")
    top, ids = policy.largest(values, most)
    torch.testing.assert_close(top, values.topk(min(most, vocab)).values)
    torch.testing.assert_close(values.gather(1, ids), top)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_no_temperature_is_one() -> None:
    rows = [one(temperature=1.0), one(temperature=0.0)]
    logits, _ = build(rows)
    least = policy.least_log_ref([5, 5], [0.0, 0.0], 5)
    plain = policy.select_candidates(logits, None, least)
    told = policy.select_candidates(logits, temperatures(rows), least)
    assert all(torch.equal(getattr(plain, name), getattr(told, name)) for name in vars(plain))


def test_kl_is_zero_and_policy_unchanged_when_one_candidate_is_left() -> None:
    for row in (one(candidates=1), one(min_prob=0.999), one(masked=V - 1)):
        logits, tilts = build([row])
        candidates, step = run([row], logits, tilts)
        assert not candidates.mask_RK.any()
        assert step.kl_R.item() == 0
        assert math.isnan(step.value_R.item())
        torch.testing.assert_close(
            policy.guide_logits_(logits.clone(), torch.ones(1, dtype=torch.float64), candidates, step), logits
        )


def test_keep_leaves_the_mass_of_the_tail() -> None:
    row = one(tail="keep", candidates=5)
    logits, tilts = build([row])
    candidates, step = run([row], logits, tilts)
    pi = (
        policy.guide_logits_(logits.clone(), torch.ones(1, dtype=torch.float64), candidates, step)[0]
        .double()
        .softmax(-1)
    )
    ref = logits[0].double().softmax(-1)
    top = candidates.ids_RK[0, :5]
    assert pi[top].sum().item() == pytest.approx(ref[top].sum().item(), abs=1e-6)
    assert not torch.allclose(pi, ref, atol=1e-3)


def test_large_eta_is_the_reference_and_small_eta_the_surest_success() -> None:
    logits, tilts = build([one(eta=1e6, candidates=V)])
    _, step = run([one(eta=1e6, candidates=V)], logits, tilts)
    assert step.kl_R.item() == pytest.approx(0, abs=1e-9)

    # eta -> 0: pi ∝ ref · P(z = 1), the posterior given success
    row = one(eta=1e-6, candidates=V)
    logits, tilts = build([row])
    candidates, step = run([row], logits, tilts)
    pi = (
        policy.guide_logits_(logits.clone(), torch.ones(1, dtype=torch.float64), candidates, step)[0]
        .double()
        .softmax(-1)
    )
    posterior = (logits[0].double().log_softmax(-1) + tilts[0]).softmax(-1)
    torch.testing.assert_close(pi, posterior, atol=1e-6, rtol=0)


def test_temperature_scales_the_tilt_so_that_the_tempered_reference_is_tilted() -> None:
    row = one(temperature=0.5, candidates=V)
    logits, tilts = build([row])
    candidates, step = run([row], logits, tilts)
    got = (
        policy.guide_logits_(logits.clone(), torch.tensor([0.5], dtype=torch.float64), candidates, step)[0].double()
        / 0.5
    ).softmax(-1)
    wanted = ((logits[0].double() / 0.5).log_softmax(-1) + tilts[0]).softmax(-1)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical((-1.0, 0.0, 0.5), (-2.0, 1.0))])
def test_each_row_tilts_by_its_method(distribution: ReturnDistribution) -> None:
    """Controlled Decoding tilts by `E[z] / eta`, Q-sharp by `ln E[exp(z / eta)]`; both less `r_max / eta`."""
    outputs = torch.randn(3, 5, distribution.n_out, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    atoms = torch.tensor(distribution.atoms if isinstance(distribution, Categorical) else (0.0, 1.0))
    logits = outputs if isinstance(distribution, Categorical) else torch.cat([torch.zeros_like(outputs), outputs], -1)
    masses, etas = logits.softmax(-1), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)[:, None]
    shift = distribution.reward_range[1] / etas
    qsharp = (masses * (atoms / etas[..., None]).exp()).sum(-1).log() - shift
    cd = (masses * atoms).sum(-1) / etas - shift
    torch.testing.assert_close(policy.relative_tilts(distribution, outputs, etas[:, 0]), qsharp)
    mixed = policy.relative_tilts(distribution, outputs, etas[:, 0], torch.tensor([True, False, True]))
    torch.testing.assert_close(mixed, torch.stack([cd[0], qsharp[1], cd[2]]))
