"""The page of a run on a GPU: pure functions from the result to Markdown."""

from typing import Any

from benchmarks.guidance import tables
from benchmarks.guidance.pairs import OWN_TOKENS, PROMPT_TOKENS


def page(result: dict[str, Any], made: str) -> str:
    """Markdown; `made` says by what command, when and on what machine."""
    tokens = result["settings"]["tokens"]["large"]
    return f"""# What guidance costs on a GPU

{made}

The pair, `large`: models of the shapes of Llama 3.1 8B (the reference) and Llama 3.2 1B (the critic, with a V and with
a Q head), all in bfloat16 and in random weights: how long a step takes does not depend on them.{_native(result)} All
critics are loaded in one engine, which runs as vLLM does by default: compiled, with CUDA graphs, scheduling ahead of
the device.

A wave is that many requests at once, each of {tokens} tokens, after prompts of {PROMPT_TOKENS} tokens that are cached:
what is timed is decoding. {PROMPT_TOKENS - OWN_TOKENS} of these tokens are the same in all prompts; *apart*: none are.
`eta` 0.2, no `min_prob`, temperature 1: the critic is asked for all candidates at every step.

## Guided and not

*Efficiency* = (time of the unguided wave + time of the critic's bare forward passes over the same rows and lengths) ÷
time of the guided wave. The bare passes are transformers' own with its `sdpa` attention, captured as a CUDA graph, so
that no launch is counted, without making or growing a cache. They are not compiled, and attend to a dense cache under
a mask, which is slow with many rows: so it exceeds 1. {_stricter(result)}

{tables.guided(result)}

## Requests without `eta`

Lost = 1 − plain vLLM's time ÷ ours, per round: negative is in our favour, and for none of it do we know a cause.

{tables.without_eta(result)}

{_captured(result)}"""


def _native(result: dict[str, Any]) -> str:
    """A sentence, where it was measured."""
    if not any(case["head"] == "native" for case in result["throughput"]):
        return ""
    return " `native` is a head of width 1,024 on the reference's own hidden states, without a second model."


def _stricter(result: dict[str, Any]) -> str:
    return "The last table has the stricter figure." if result.get("captured") else ""


def _captured(result: dict[str, Any]) -> str:
    """A section, where it was measured."""
    if not result.get("captured"):
        return ""
    length, steps = result["captured"][0]["length"], len(result["captured"][0]["seconds"])
    return f"""## The critic's step

One captured step of the critic alone, by the device's clock, with and without compiling what is captured; every row has
{length} tokens behind it; {steps} steps each. The last column is the efficiency above with our own compiled step in
place of transformers' bare pass: what is missing to 1 is selecting, tilting, reporting and the host's bookkeeping.
Ratios in this table are of medians.

{tables.captured(result)}
"""
