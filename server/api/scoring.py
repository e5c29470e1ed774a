"""Turns the body of `POST /v1/critics/{name}/score` into token ids.

Prompt and completion are tokenised together, because a tokenizer may join characters across their boundary; tokenised
apart they would give other tokens than the model saw. The tokenizer's offsets then separate the two: a token belongs to
the completion if it ends after the prompt's last character, also where it begins before it.
"""

from functools import cache
from typing import Any

from qsharp_core.errors import GuidanceError
from qsharp_core.wire.critics import ScoreRequest

MAX_SEQUENCES = 1024


def sequences(
    body: ScoreRequest, tokenizer: Any, vocabulary: int, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """The pairs (prompt, completion) of the request, as token ids.

    Args:
        tokenizer: the reference's, for text.
        vocabulary: how many token ids there are.
        max_length: the most tokens of a pair. Text that must have more by its length alone is not tokenised.

    Raises:
        GuidanceError: names the field that is wrong.
    """
    prompts, completions = _batch(body.prompt), _batch(body.completion)
    if len(prompts) == 1:
        prompts *= len(completions)
    if len(prompts) != len(completions):
        raise GuidanceError(
            f"completion must have as many entries as prompt, {len(prompts)}; got {len(completions)}", "completion"
        )
    if len(completions) > MAX_SEQUENCES:
        raise GuidanceError(f"completion must have at most {MAX_SEQUENCES} entries", "completion")
    most = max_length * longest_token(tokenizer)
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(prompt, str) and isinstance(completion, str) and len(prompt) + len(completion) > most:
            raise GuidanceError(
                f"completion: {len(prompt) + len(completion)} characters with its prompt are more than {max_length} "
                "tokens",
                "completion",
            )
    pairs = [_tokens(p, c, tokenizer) for p, c in zip(prompts, completions, strict=True)]
    for prompt, completion in pairs:
        for name, ids in (("prompt", prompt), ("completion", completion)):
            if ids and max(ids) >= vocabulary:
                raise GuidanceError(f"{name} must have token ids below {vocabulary}; got {max(ids)}", name)
    return pairs


@cache
def longest_token(tokenizer: Any) -> int:
    """Characters of the longest text that is one token; 0 for a model without a tokenizer."""
    return 0 if tokenizer is None else max(map(len, tokenizer.get_vocab()), default=0)


def _batch(value: Any) -> list[Any]:
    single = isinstance(value, str) or (bool(value) and isinstance(value[0], int))
    return [value] if single or not value else value


def _tokens(prompt: str | list[int], completion: str | list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt, completion
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise GuidanceError("prompt and completion must both be text, or both token ids", "completion")
    for name, text in (("prompt", prompt), ("completion", completion)):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise GuidanceError(f"{name} must be text: it has half of a surrogate pair", name)
    if not getattr(tokenizer, "is_fast", False):
        raise GuidanceError("prompt and completion must be token ids: this model's tokenizer has no offsets", "prompt")
    encoded = tokenizer(prompt + completion, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    while offsets and offsets[-1][1] <= offsets[-1][0]:  # an end token, which the tokenizer has added
        ids, offsets = ids[:-1], offsets[:-1]
    start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
    return ids[:start], ids[start:]
