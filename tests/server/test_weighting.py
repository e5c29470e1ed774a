"""The page's `weighting.js`, run in Chromium, against `qsharp_core.policy` and `qsharp_core.budget` in float64."""

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from playwright.sync_api import Page

from qsharp_core import budget, policy
from qsharp_core.policy import Candidates
from qsharp_core.returns import Bernoulli, Categorical, ReturnDistribution
from qsharp_core.wire.guidance import METHODS, TAILS, Tail
from server.api.playground import FOLDER
from tests.support.browser import chromium

ETAS = (1e-6, 0.003, 0.05, 0.1, 0.7, 4.0, 300.0, 1e6)
SCRIPT = """async ([source, cases]) => {
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    const { guide, tokenLogprob } = await import(url);
    return cases.map(({ candidates, distribution, settings, budget, token, refLogprob }) => {
        const { kl, value, strength, ...guided } = guide(candidates, distribution, settings, budget ?? Infinity);
        return { kl, value, strength, logprob: tokenLogprob(guided, candidates, token, refLogprob) };
    });
}"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium() as browser:
        made = browser.new_page()
        made.goto("about:blank")
        yield made


def a_distribution(rng: random.Random) -> tuple[ReturnDistribution, dict[str, Any]]:
    if rng.random() < 0.5:
        return Bernoulli(), {"kind": "bernoulli", "atoms": [0, 1], "reward_range": [0, 1]}
    atoms = sorted(rng.sample(range(-20, 30), rng.randrange(2, 7)))
    span = (atoms[0] / 10 - rng.choice([0, 1]), atoms[-1] / 10 + rng.choice([0, 2]))
    scaled = [atom / 10 for atom in atoms]
    told = {"kind": "categorical", "atoms": scaled, "reward_range": list(span)}
    return Categorical(tuple(scaled), span), told


def a_case(rng: random.Random) -> tuple[dict[str, Any], dict[str, float]]:
    """What the page is given, and what the engine makes of the same."""
    distribution, told = a_distribution(rng)
    vocabulary, count = 40, rng.randrange(2, 20)
    spread = rng.choice([0.5, 3.0, 12.0])
    logits_RV = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(rng.randrange(2**31))) * spread
    chosen = policy.select_candidates(logits_RV, None, policy.least_log_ref([count], [0.0], count))
    outputs = torch.randn(1, count, distribution.n_out, dtype=torch.float64) * rng.choice([1.0, 6.0, 40.0])
    eta, method, tail = rng.choice(ETAS), rng.choice(METHODS), rng.choice(TAILS)
    eta_R = torch.tensor([eta], dtype=torch.float64)
    tilt_RK = policy.relative_tilts(distribution, outputs, eta_R, torch.tensor([method == "cd"]))
    of_tail = torch.tensor([policy.tail_tilt(Tail(tail), eta, distribution.reward_range)], dtype=torch.float64)
    best = torch.tensor([distribution.reward_range[1]], dtype=torch.float64)
    step = policy.guide(chosen, tilt_RK, eta_R, torch.tensor([tail == "keep"]), of_tail, best)
    nats = rng.choice([None, 1e-6, 0.02, 0.5])
    strength = 1.0
    if nats is not None:
        step, strength_R = budget.clip(chosen, step, torch.tensor([nats], dtype=torch.float64))
        strength = strength_R.item()
    token = rng.choice([int(chosen.ids_RK[0, rng.randrange(count)]), rng.randrange(vocabulary)])
    log_ref, log_pi = policy.token_logprobs(chosen, step, torch.tensor([token]))
    case = {
        "candidates": reported(chosen, outputs),
        "distribution": told,
        "settings": {"eta": eta, "method": method, "tail": tail},
        "budget": nats,
        "token": token,
        "refLogprob": log_ref.item(),
    }
    wanted = {"kl": step.kl_R.item(), "value": step.value_R.item(), "logprob": log_pi.item(), "strength": strength}
    return case, wanted


def reported(chosen: Candidates, outputs_RKN: torch.Tensor) -> dict[str, Any]:
    return {
        "token_ids": chosen.ids_RK[0].tolist(),
        "ref_logprobs": chosen.log_ref_RK[0].tolist(),
        "outputs": outputs_RKN[0].tolist(),
    }


def test_the_page_computes_what_the_engine_does(page: Page) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    cases = [a_case(rng) for _ in range(2000)]
    got = page.evaluate(SCRIPT, [(FOLDER / "weighting.js").read_text(), [case for case, _ in cases]])
    clipped = 0
    for (case, wanted), numbers in zip(cases, got, strict=True):
        # At eta 1e6 the value is a million times a logarithm, of which the last digit is 1e-16. A strength is rounded
        # to 1e-9 of itself, in one case up and in the other down where they meet. Tilts are as large as 1 / eta, and
        # what is left of them has their last digits.
        eta = case["settings"]["eta"]
        rounded = (1e-9 if wanted["strength"] == 1 else 1e-7) + 1e-14 / eta
        near = {"value": 1e-9 * max(1.0, eta), "strength": 2e-9, "kl": rounded, "logprob": rounded}
        for name, number in wanted.items():
            if math.isinf(number):
                assert numbers[name] == number, (case, name)
            else:
                assert numbers[name] == pytest.approx(number, abs=near[name], rel=1e-9), (case, name)
        clipped += wanted["strength"] < 1
    assert 100 < clipped < 1500
