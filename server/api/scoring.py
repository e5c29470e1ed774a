"""What `POST /v1/critics/{name}/score` takes, made into token ids.

Text is tokenised as a whole, prompt and completion together, because a tokenizer may join characters across their
boundary and then pieces tokenised apart are other tokens than the model saw. The tokenizer's offsets then tell the two
apart: a token belongs to the completion if it ends beyond the prompt's last character. So one that spans the boundary
counts as the completion's.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict

from qsharp_core.errors import GuidanceError

MAX_SEQUENCES = 1024
Text = Annotated[str, Strict()]
TokenId = Annotated[int, Strict(), Field(ge=0)]
Sequences = Text | list[TokenId] | list[Text] | list[list[TokenId]]


class ScoreRequest(BaseModel):
    """Body of the request: text or token ids, both the same; one, or a batch. One prompt may have many completions."""

    model_config = ConfigDict(extra="forbid")
    prompt: Sequences
    completion: Sequences


def sequences(body: ScoreRequest, tokenizer: Any, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) in token ids.

    Raises:
        GuidanceError: names the field.
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
    pairs = [_tokens(p, c, tokenizer) for p, c in zip(prompts, completions, strict=True)]
    for prompt, completion in pairs:
        for name, ids in (("prompt", prompt), ("completion", completion)):
            if ids and max(ids) >= vocabulary:
                raise GuidanceError(f"{name} must have token ids below {vocabulary}; got {max(ids)}", name)
    return pairs


def _batch(given: Any) -> list[Any]:
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    return [given] if single or not given else given


def _tokens(prompt: str | list[int], completion: str | list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt, completion
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise GuidanceError("prompt and completion must both be text, or both token ids", "completion")
    if not getattr(tokenizer, "is_fast", False):
        raise GuidanceError("prompt and completion must be token ids: this model's tokenizer has no offsets", "prompt")
    encoded = tokenizer(prompt + completion, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    while offsets and offsets[-1][1] <= offsets[-1][0]:  # an end token that the tokenizer has added
        ids, offsets = ids[:-1], offsets[:-1]
    start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
    return ids[:start], ids[start:]
