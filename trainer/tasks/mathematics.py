"""Mathematical answers compared by `math_verify`.

It evaluates what a model wrote, so it may take forever or all memory: verifiers that use it run in processes that can
be killed (`trainer.rewards.pool`).
"""

import logging

from math_verify import parse, verify

_DELIMITED = ("$", "\\[", "\\(", "\\boxed")

# It warns that its own time-outs are off. They need signals; the pool kills the process instead.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def equal(answer: str, completion: str) -> float | None:
    """1 if the completion's mathematical answer equals the reference answer, else 0.

    Returns:
        None if the reference answer is no mathematics.
    """
    # Bare LaTeX is not looked for: without a delimiter only plain numbers are found.
    delimited = answer if any(mark in answer for mark in _DELIMITED) else f"\\boxed{{{answer}}}"
    gold = parse(delimited, parsing_timeout=0)
    if not gold:
        return None
    parsed = parse(completion, parsing_timeout=0)
    return float(bool(parsed) and verify(gold, parsed, timeout_seconds=0))
