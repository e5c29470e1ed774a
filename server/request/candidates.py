"""What `detail: "candidates"` adds to a response: how much of it there may be, and the texts of tokens."""

from collections.abc import Sequence
from math import exp, fsum
from typing import Any

from qsharp_core.errors import GuidanceError
from qsharp_core.vllm_plugin.telemetry import CandidateReport
from qsharp_core.wire.reports import DistributionInfo, StepCandidates
from server.request.call import GuidedCall

MOST_NUMBERS = 1_000_000  # of a response; as JSON some 20 bytes each
CONTEXT = 8  # tokens before one that its text may depend on
HALF = "\ufffd"  # stands for a character that is not complete


def distribution_of(call: GuidedCall) -> DistributionInfo | None:
    """What the outputs of the critic that guides this request mean; None if none does."""
    if call.critic is None:
        return None
    card: Any = call.critic.status.card.get("distribution") or {"kind": "bernoulli"}
    atoms = card.get("atoms", [0.0, 1.0])
    return DistributionInfo(kind=card["kind"], atoms=atoms, reward_range=call.critic.status.reward_range)


def limit_tokens(call: GuidedCall, max_tokens: int) -> int:
    """The most tokens of a choice, so that what is reported of the request's candidates stays within bounds.

    Args:
        call: a request that asks for its candidates.
        max_tokens: what would be its limit otherwise.

    Raises:
        GuidanceError: the request names a limit that is larger, or has no room for one token.
    """
    assert call.params is not None
    distribution = distribution_of(call)
    assert distribution is not None
    outputs = 1 if distribution.kind == "bernoulli" else len(distribution.atoms)
    room = MOST_NUMBERS // (call.samples * call.params.candidates * (2 + outputs))
    if room < 1 or (max_tokens > room and call.limit_given):
        raise GuidanceError(
            f"max_tokens must be at most {room} with guidance.detail candidates, {call.samples} samples of "
            f"{call.params.candidates} candidates and a critic of {outputs} outputs: a response has at most "
            f"{MOST_NUMBERS} numbers about them; got {max_tokens}",
            "max_tokens",
        )
    return min(max_tokens, room)


class TokenTexts:
    """Texts of a model's tokens.

    Args:
        tokenizer: the model's; None where there is none, and then all texts are empty.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}  # no more than the vocabulary

    def pieces(self, context: Sequence[int], token_ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; together they are the text, special tokens included.

        A token that leaves a character incomplete adds nothing, and the one that completes it adds all of it.

        Args:
            context: tokens before the text.
            token_ids: the text's.
        """
        ids = [*context[-CONTEXT:], *token_ids]
        shown = len(ids) - len(token_ids)  # the text of the tokens before is there already
        pieces = []
        for end in range(shown + 1, len(ids) + 1):
            start = max(0, shown - CONTEXT)
            before, after = self._decoded(ids[start:shown]), self._decoded(ids[start:end])
            if after.endswith(HALF) and end < len(ids):
                pieces.append("")
                continue
            pieces.append(after[len(before.rstrip(HALF)) :])  # the context may end within a character
            shown = end
        return pieces

    def singles(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token as it continues another one."""
        return [self._single(token) for token in token_ids]

    def _single(self, token: int) -> str:
        text = self._known.get(token)
        if text is None:
            # Decoders may drop the blank with which a text begins: so each token's is read off behind itself.
            once, twice = self._decoded([token]), self._decoded([token, token])
            text = self._known[token] = twice[len(once) :]
        return text

    def _decoded(self, token_ids: list[int]) -> str:
        if self._tokenizer is None or not token_ids:
            return ""
        decoded = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded)


def step_candidates(report: CandidateReport | None, texts: TokenTexts) -> StepCandidates | None:
    """A step's candidates in the response; None where the critic was not asked."""
    if report is None or not report.token_ids:
        return None
    return StepCandidates(
        token_ids=report.token_ids,
        texts=texts.singles(report.token_ids),
        ref_logprobs=report.ref_logprobs,
        outputs=report.outputs,
        tail_mass=max(0.0, 1.0 - fsum(map(exp, report.ref_logprobs))),
    )
