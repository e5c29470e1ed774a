"""Refuses a request whose own masks leave no token that could be sampled first.

vLLM takes such a request, and samples some token from logits that are all `-inf`. What only shows on the way
(structured outputs, bad words of several tokens) ends the sample there: see `server.request.telemetry`.
"""

from typing import Any

from vllm.sampling_params import SamplingParams

from qsharp_core.errors import GuidanceError
from server import upstream


def check_masks(engine_client: Any, params: SamplingParams) -> None:
    """Checks that `allowed_token_ids` has a token besides those that `bad_words` and `min_tokens` exclude.

    Args:
        engine_client: vLLM's client; its tokenizer and generation config say what these exclude.
        params: the request's sampling parameters, which stay as they are.

    Raises:
        GuidanceError: none is left.
    """
    allowed = set(params.allowed_token_ids or ())
    if not allowed:
        return
    settled = upstream.settled_by_engine(engine_client, params)
    left = allowed - {word[0] for word in settled.bad_words_token_ids or () if len(word) == 1}
    if params.min_tokens > 0:
        left -= settled.all_stop_token_ids
    if not left:
        raise GuidanceError(
            "allowed_token_ids leaves no token to sample: all of them are bad_words, or end the completion before "
            "min_tokens",
            "allowed_token_ids",
        )
