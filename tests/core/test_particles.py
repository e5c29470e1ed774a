"""The arithmetic of particles: weights, effective shares and systematic draws."""

import itertools
import math
import random
import statistics
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsharp_core.particles import PathWeight, Weights, effective_share, log_mean_exp, systematic

NAN = math.nan
LOGS = st.lists(st.floats(-700, 700), min_size=1, max_size=40)


class Token(NamedTuple):
    value: float
    ref_logprob: float
    logprob: float


@given(LOGS, st.floats(-1e5, 1e5))
def test_log_mean_exp(logs: list[float], shift: float) -> None:
    highest = max(logs)
    direct = highest + math.log(sum(math.exp(log - highest) for log in logs) / len(logs))
    assert log_mean_exp(logs) == pytest.approx(direct, abs=1e-9)
    assert log_mean_exp([log + shift for log in logs]) == pytest.approx(direct + shift, rel=1e-9, abs=1e-6)


@given(LOGS)
def test_the_effective_share_is_of_one_to_all(logs: list[float]) -> None:
    share = effective_share(logs)
    assert 1 / len(logs) - 1e-12 <= share <= 1 + 1e-12
    weights = [math.exp(log - max(logs)) for log in logs]
    assert share == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / len(logs))
    assert effective_share([logs[0]] * len(logs)) == pytest.approx(1)
    assert effective_share([0.0, *[-800.0] * (len(logs) - 1)]) == pytest.approx(1 / len(logs))


@given(LOGS, st.integers(1, 60), st.floats(0, 1, exclude_max=True))
def test_systematic_draws_are_as_many_as_the_weights_say(logs: list[float], draws: int, uniform: float) -> None:
    drawn = systematic(logs, draws, uniform)
    assert len(drawn) == draws
    assert drawn == sorted(drawn)
    weights = [math.exp(log - max(logs)) for log in logs]
    for i, weight in enumerate(weights):
        expected = draws * weight / sum(weights)
        assert math.floor(expected - 1e-6) <= drawn.count(i) <= math.ceil(expected + 1e-6), (i, expected)


def test_systematic_draws_are_fair() -> None:
    """Each index is drawn as often as its weight says, on average over `uniform`."""
    logs, draws, grid = [0.3, -1.0, 0.0, -2.5], 3, 20_000
    total = sum(map(math.exp, logs))
    counts = [0] * len(logs)
    for step in range(grid):
        for index in systematic(logs, draws, (step + 0.5) / grid):
            counts[index] += 1
    for log, found in zip(logs, counts, strict=True):
        assert found / grid == pytest.approx(draws * math.exp(log) / total, abs=1e-3)


def path(rng: random.Random, length: int, eta: float, *, consistent: bool) -> list[Token]:
    """A path at some of whose prefixes the critic is asked; of a critic that agrees with itself, or of any."""
    tokens, value = [], rng.uniform(-1, 1)
    for _ in range(length):
        if rng.random() < 0.4:
            ref = rng.uniform(-5, 0)
            tokens.append(Token(NAN, ref, ref))
            continue
        ref, pi = rng.uniform(-5, 0), rng.uniform(-5, 0)
        tokens.append(Token(value, ref, pi))
        value = value + eta * (pi - ref) if consistent else rng.uniform(-1, 1)
    return tokens


@given(st.integers(0, 2**32), st.integers(0, 30), st.sampled_from([1e-3, 0.1, 3.0]))
def test_a_path_weighs_what_the_ratio_of_target_and_proposal_is(seed: int, length: int, eta: float) -> None:
    tokens = path(random.Random(seed), length, eta, consistent=False)
    weight = PathWeight()
    weight.take(tokens, eta)
    asked = [i for i, token in enumerate(tokens) if not math.isnan(token.value)]
    if not asked:
        assert weight == PathWeight()
        return
    before = tokens[: asked[-1]]
    target = sum(token.ref_logprob for token in before) + tokens[asked[-1]].value / eta
    proposal = sum(token.logprob for token in before)
    assert weight.log_weight == pytest.approx(target - proposal, rel=1e-9, abs=1e-9)
    last = tokens[asked[-1]]
    assert weight.waiting == pytest.approx(last.logprob - last.ref_logprob)


@given(st.integers(0, 2**32), st.integers(1, 30), st.sampled_from([1e-3, 0.1, 3.0]), st.data())
def test_a_critic_that_agrees_with_itself_gives_all_paths_one_weight(
    seed: int, length: int, eta: float, data: st.DataObject
) -> None:
    tokens = path(random.Random(seed), length, eta, consistent=True)
    first = next((token.value for token in tokens if not math.isnan(token.value)), 0.0)
    weight, at = PathWeight(), 0
    while at < len(tokens):  # in rounds of any length
        more = data.draw(st.integers(1, length))
        weight.take(tokens[at : at + more], eta)
        at += more
    assert weight.log_weight == pytest.approx(first / eta, abs=1e-9 * max(1, abs(first / eta)))


def test_resampling_keeps_the_estimate() -> None:
    rng = random.Random(3)
    weights = Weights(8, 0.5)
    for i in range(8):
        weights.take(i, [Token(rng.uniform(-1, 1), 0.0, 0.0)])
    before = weights.log_estimate
    assert before is not None
    assert weights.resample(0.0, 0.5) is None
    assert weights.resamplings == 0
    ancestors = weights.resample(1.1, 0.5)
    assert ancestors is not None
    assert len(ancestors) == 8
    assert weights.resamplings == 1
    assert weights.log_estimate == pytest.approx(before)
    assert weights.logs == [0.0] * 8


@pytest.mark.parametrize("resampled", [False, True])
def test_a_particle_that_was_not_asked_counts_as_the_mean_of_the_others(resampled: bool) -> None:
    weights = Weights(3, 1.0)
    assert weights.log_estimate is None
    assert weights.logs == [0.0, 0.0, 0.0]
    weights.take(0, [Token(1.0, 0.0, 0.0)])
    weights.take(1, [Token(3.0, 0.0, 0.0)])
    weights.take(2, [Token(NAN, -1.0, -1.0)])
    mean = math.log((math.exp(1) + math.exp(3)) / 2)
    assert weights.logs == pytest.approx([1.0, 3.0, mean])
    assert weights.log_estimate == pytest.approx(mean)
    at = 2
    if resampled:
        ancestors = weights.resample(1.1, 0.5)
        assert ancestors is not None
        at = ancestors.index(2)
    before = weights.logs[at]
    weights.take(at, [Token(2.0, 0.0, 0.0)])  # what it stood for gives way to its own value
    assert weights.logs[at] - before == pytest.approx(2.0 - mean)


def test_estimates_are_unbiased_whenever_it_is_resampled() -> None:
    """Two steps of two tokens each under a critic that is wrong: the mean of exp(estimate) is E_ref[exp(R / eta)]."""
    ref = {"a": 0.7, "b": 0.3}
    q = {"a": 0.2, "b": 0.9}  # of the first token, and wrong
    reward = dict(zip(itertools.product("ab", "ab"), [0.0, 1.0, 0.3, 0.1], strict=True))
    eta, rng = 0.4, random.Random(8)

    def drawn(gains: dict[str, float]) -> tuple[str, Token]:
        value = eta * math.log(sum(ref[y] * math.exp(gains[y] / eta) for y in ref))
        pi = {y: ref[y] * math.exp((gains[y] - value) / eta) for y in ref}
        token = rng.choices([*pi], [*pi.values()])[0]
        return token, Token(value, math.log(ref[token]), math.log(pi[token]))

    exact = sum(ref[x] * ref[y] * math.exp(reward[x, y] / eta) for x, y in reward)
    for size, below in ((1, 0.5), (2, 1.1), (5, 0.8)):
        estimates = []
        for _ in range(4000 // size):
            weights, tokens = Weights(size, eta), []
            for i in range(size):
                token, step = drawn(q)
                tokens.append(token)
                weights.take(i, [step])
            tokens = [tokens[i] for i in weights.resample(below, rng.random()) or range(size)]
            for i in range(size):
                _, step = drawn({y: reward[tokens[i], y] for y in ref})
                weights.take(i, [step])
            estimate = weights.log_estimate
            assert estimate is not None
            estimates.append(math.exp(estimate))
        error = statistics.stdev(estimates) / math.sqrt(len(estimates))
        assert statistics.fmean(estimates) == pytest.approx(exact, abs=4 * error), (size, below)
        assert error < 0.05 * exact
