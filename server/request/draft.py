"""A choice while it is sampled, and what of it is stored: its whole text and the sampling parameters that shaped it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from qsharp_core.rollouts.records import Sampling

# Fields of `SamplingParams`, beside those with a field of their own in `Sampling`, that change the distribution of
# tokens or end the completion.
OTHER_SAMPLING = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words",
    "structured_outputs", "thinking_token_budget", "watermarking", "trace_decode_token_ids", "min_tokens", "max_tokens",
    "ignore_eos", "stop", "stop_token_ids", "include_stop_str_in_output", "repetition_detection",
)  # fmt: skip
CONTEXT = 16  # tokens before a text that its first characters may depend on


@dataclass(eq=False)
class Draft:
    """A choice while it is sampled.

    Attributes:
        params: vLLM's `SamplingParams` of the engine request.
        seed: the choice's own, which differs from that of `params` where a request has several choices.
        token_ids, text: what was sampled so far.
        finish_reason, stop_reason: vLLM's, of a choice that has ended; `stop_reason` is the stop string or token.
    """

    prompt_token_ids: Sequence[int]
    prompt_text: str | None
    params: Any
    seed: int | None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None


def joined_text(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], cut: int, draft: Draft) -> str:
    """The text of a whole completion whose first `cut` tokens are another rollout's, as if sampled in one request.

    It is decoded from all tokens, because the cut may go through a character and then the two texts do not add up.

    Args:
        tokenizer: the model's; None where there is none, and then the draft's own text is returned.
        prompt: token ids before the completion.
        tokens: token ids of the whole completion.
        cut: how many of them stood before the request.
        draft: what the request sampled.
    """
    if tokenizer is None:
        return draft.text
    params = draft.params
    context = [*prompt[-CONTEXT:]]

    def decoded(part: Sequence[int]) -> str:
        return str(
            tokenizer.decode(
                [*context, *part],
                skip_special_tokens=params.skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    skipped = len(decoded([]).rstrip("\ufffd"))
    stop, include = draft.stop_reason, params.include_stop_str_in_output
    by_token = draft.finish_reason == "stop" and not isinstance(stop, str)
    text = decoded(tokens[:-1] if by_token and not include else tokens)
    if isinstance(stop, str):
        # vLLM looks for the stop string in what the request itself has sampled.
        start = text.find(stop, len(decoded(tokens[:cut]).rstrip("\ufffd")))
        if start >= 0:
            text = text[: start + len(stop) if include else start]
    return text[skipped:]


def sampling_of(draft: Draft) -> Sampling:
    """The sampling parameters of a choice, as they are stored with its rollout."""
    params = draft.params
    default = type(params)()
    other = {}
    for name in OTHER_SAMPLING:
        value = getattr(params, name, None)
        if (value and value != getattr(default, name)) or name == "max_tokens":
            other[name] = _plain(value)
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        seed=draft.seed,
        other=other,
    )


def _plain(value: Any) -> Any:
    plain = msgspec.to_builtins(value, str_keys=True)
    if isinstance(plain, dict):
        plain = {name: inner for name, inner in plain.items() if inner is not None and not name.startswith("_")}
    return plain
