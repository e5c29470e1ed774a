"""`math_verify` as a verifier. It evaluates what a model wrote, so it may take forever or all memory: see `pool`."""

import logging

from math_verify import parse, verify

from trainer.rewards.base import Case

_DELIMITED = ("$", "\\[", "\\(", "\\boxed")

# It warns that its own time-outs are off. They are: they need signals, and the pool's kill does not.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def math_verify(case: Case) -> float | None:
    """1 if the completion's mathematical answer equals the reference; None if the reference is no mathematics."""
    if case.answer is None:
        return None
    text = str(case.answer)
    # Bare LaTeX is not looked for: without a delimiter only plain numbers are found.
    gold = parse(text if any(mark in text for mark in _DELIMITED) else f"\\boxed{{{text}}}", parsing_timeout=0)
    if not gold:
        return None
    given = parse(case.completion, parsing_timeout=0)
    return float(bool(given) and verify(gold, given, timeout_seconds=0))
