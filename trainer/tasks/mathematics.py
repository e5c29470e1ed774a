"""Mathematical answers compared by `math_verify`.

It evaluates what a model wrote, so it may take forever or all memory: verifiers that use it run in processes that can
be killed (`trainer.rewards.pool`).
"""

import logging
import re

from math_verify import parse, verify

from qsharp_core.answers import CURRENCIES, ascii_digits, last_boxed

_CURRENCY = re.compile(rf"\\\$|[{CURRENCIES}]|(?<!\$)\$(?=-?[\d.,]+(?:[^$\d]*$|\s))")
_THOUSANDS = re.compile(r"(?<=\d)\\[,;:! ](?=\d{3}(?!\d))")  # apart by a space
_MIXED = re.compile(r"(?<![\d.])(\d+)\s+(\d+)/(\d+)(?!\d)")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?!\w)")
_DELIMITED = ("$", "\\[", "\\(", "\\boxed")

# It warns that its own time-outs are off. They need signals; the pool kills the process instead.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def equal(answer: str, completion: str) -> float | None:
    r"""1 if the completion's mathematical answer equals the reference answer, else 0.

    The completion's answer is what its last `\boxed{…}` holds; the library would read boxes near each other as a set.

    Returns:
        None if the reference answer is no mathematics.
    """
    # Bare LaTeX is not looked for: without a delimiter only plain numbers are found.
    answer = _plain(answer)
    delimited = answer if any(mark in answer for mark in _DELIMITED) else f"\\boxed{{{answer}}}"
    gold = parse(delimited, parsing_timeout=0)
    if not gold:
        return None
    boxed = last_boxed(completion)
    parsed = parse(_plain(completion) if boxed is None else f"\\boxed{{{_plain(boxed)}}}", parsing_timeout=0)
    return float(bool(parsed) and verify(gold, parsed, timeout_seconds=0))


def _plain(text: str) -> str:
    """The text without what the library does not read: other scripts' digits, currencies, mixed numbers and `1e3`."""
    text = _THOUSANDS.sub("", _CURRENCY.sub("", ascii_digits(text)))
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
