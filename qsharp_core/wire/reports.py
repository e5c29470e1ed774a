"""What a response reports of its choices' guidance, `guidance` of each: the server writes it, and clients read it."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A part of a response. What this version does not know is kept beside the fields: servers may be newer."""

    model_config = ConfigDict(extra="allow", frozen=True)


class TokenGuidance(Part):
    """One sampled token.

    Attributes:
        kl: KL divergence of its step's guided distribution from the reference's, in nats.
        ref_logprob, logprob: the token's log-probability under the reference and under the guided policy.
        value: `V` of the prefix before the token, in units of reward; None where the critic was not asked.
        strength: the share of the tilt that was within the budget, from 0 to 1; 1 where nothing was clipped.
    """

    token_id: int
    kl: float
    ref_logprob: float
    logprob: float
    value: float | None
    strength: float = 1.0


class StepCandidates(Part):
    """The candidates of a step, the likeliest first.

    Attributes:
        texts: what each would add to the text.
        ref_logprobs: their log-probabilities under the reference.
        outputs: what the critic said of each, as `DistributionInfo` explains. It does not depend on `eta`.
        tail_mass: the reference's probability of all other tokens.
    """

    token_ids: list[int]
    texts: list[str]
    ref_logprobs: list[float]
    outputs: list[list[float]]
    tail_mass: float


class DetailedToken(TokenGuidance):
    """One sampled token, where the request asks for candidates.

    Attributes:
        text: what it adds to the text; special tokens have their name.
        candidates: of its step; None where the critic was not asked.
    """

    text: str
    candidates: StepCandidates | None


class DistributionInfo(Part):
    """What a critic's outputs mean.

    Attributes:
        kind: `bernoulli`: one output, the score `s`, with `P(z = 1) = sigmoid(s)`; `categorical`: a logit for each
            atom.
        atoms: the rewards that there are, ascending.
        reward_range: least and greatest reward; it may be wider than the atoms.
    """

    kind: str
    atoms: list[float]
    reward_range: tuple[float, float]


class KLBudget(Part):
    """What limited the KL divergence of a choice, in nats; None where there is no such limit."""

    total: float | None
    token: float | None


class SearchReport(Part):
    """What was done to find a choice. The choices of one search differ in `sample`, `estimate` and nothing else.

    Attributes:
        kind: of the search.
        n: samples of the prompt.
        sample: which of them the choice is, from 0; None for particles, whose beginnings are shared.
        estimate: the reward that the critic expects of the choice after its last token; None if it was never asked.
        tokens_spent: tokens of all samples, those that were thrown away among them.
        rejected: samples that were ended because they fell behind.
        resamplings: how often the particles were resampled.
        log_estimate: an estimate of `ln E_ref[exp(reward / eta)]`; None unless there are particles.
    """

    kind: str
    n: int
    sample: int | None
    estimate: float | None
    tokens_spent: int
    rejected: int = 0
    resamplings: int = 0
    log_estimate: float | None = None


class ChoiceGuidance(Part):
    """A choice's `guidance` in the response.

    Attributes:
        eta, critic: strength and `name@version` of its guidance; None if it was not guided.
        kl: KL divergence from the reference in nats, summed over its tokens.
        value: `V` at the first step at which the critic was asked, in units of reward; None if it never was. The critic
            is asked at a step where at least two tokens are as likely as `min_prob`.
        tokens_guided, tokens_total: how many of its tokens were sampled under guidance, and how many there are.
        kl_budget: what limited `kl`; None if nothing did.
        steps_clipped: at how many tokens the budget held the guidance back.
        search: what was done to find the choice; None if it is a sample of its own.
        tokens: an entry for each token; None unless the request asked for them.
        distribution: what the critic's outputs mean; None unless the request asked for candidates and was guided.
    """

    eta: float | None = None
    critic: str | None = None
    kl: float = 0.0
    value: float | None = None
    tokens_guided: int = 0
    tokens_total: int
    kl_budget: KLBudget | None = None
    steps_clipped: int = 0
    search: SearchReport | None = None
    tokens: list[DetailedToken | TokenGuidance] | None = None
    distribution: DistributionInfo | None = None

    def dump(self) -> Mapping[str, Any]:
        """This as JSON's data, without what the request did not ask for."""
        asked = ("kl_budget", "search", "tokens", "distribution")
        unasked = {name for name in asked if getattr(self, name) is None}
        if self.kl_budget is None:
            unasked.add("steps_clipped")
        return self.model_dump(exclude=unasked)
