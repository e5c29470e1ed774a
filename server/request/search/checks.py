"""What cannot be combined with a search, and why."""

from vllm.sampling_params import SamplingParams

from qsharp_core.errors import GuidanceError
from server.request.search.fields import NAME, ParticleSearch, Search

# With particles: what changes the law of tokens after guidance, or depends on which tokens are a request's own.
NEUTRAL = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
}
SPELLED = {"top_k": -1}  # means the same as the neutral value
ABSENT = ("structured_outputs", "bad_words", "repetition_detection", "trace_decode_token_ids")
REPORTS = ("logprobs", "prompt_logprobs", "logprob_token_ids")
WHY = {
    **dict.fromkeys(("top_p", "top_k", "min_p"), "what they draw has to be the guided policy itself"),
    "structured_outputs": "a grammar (of response_format or tools, too) would begin anew in each round",
    **dict.fromkeys(REPORTS, 'they are of one engine request; guidance.detail: "tokens" has each token\'s'),
}


def check(search: Search, params: SamplingParams) -> None:
    """Refuses what the search cannot be combined with.

    Args:
        search: what is asked for.
        params: the request's.

    Raises:
        GuidanceError: names the field.
    """
    if search.samples is None:
        return
    if search.samples < params.n:
        raise GuidanceError(
            f"{NAME}.n must be at least n, the choices that are returned of them: {params.n}; got {search.samples}",
            f"{NAME}.n",
        )
    if params.temperature == 0 and search.samples > 1:
        raise GuidanceError(
            f"temperature must be above 0 with {NAME}.n = {search.samples}: at 0 all samples are the same",
            "temperature",
        )
    if not isinstance(search, ParticleSearch):
        return
    for name, neutral in NEUTRAL.items():
        if getattr(params, name) not in (neutral, SPELLED.get(name)):
            raise _refused(name, f"send {name}: {neutral:g}")
    for name in ABSENT:
        if getattr(params, name, None):
            raise _refused(name, "leave it out")
    for name in REPORTS:
        if getattr(params, name, None) is not None:
            raise _refused(name, "leave it out")


def _refused(name: str, instead: str) -> GuidanceError:
    why = WHY.get(name, "they go on in rounds, and it would begin anew in each")
    return GuidanceError(f"{name} cannot be combined with particles: {why}; {instead}", name)
