"""The answer in a completion's text: what verifiers compare and majorities count."""

import re

from trainer.tasks.base import Vote, whole_text

_BOXED = re.compile(r"\\boxed\s*\{")
# Thousands' commas, decimals, fractions, exponents; "-" only where it is a sign, not a dash or a minus between two.
NUMBER = re.compile(r"(?:(?<![\w)])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?|\.\d+")


def last_number(text: str) -> str | None:
    """The last number in a text, without its thousands' commas; None if there is none."""
    numbers = [match.group() for match in NUMBER.finditer(text)]
    return numbers[-1].replace(",", "").replace("−", "-") if numbers else None


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{…}` of a text holds; None if there is none, or it is not closed."""
    starts = [match.end() for match in _BOXED.finditer(text)]
    if not starts:
        return None
    depth = 1
    for at in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[starts[-1] : at].strip() or None
    return None


VOTES: dict[str, Vote] = {"text": whole_text, "number": last_number, "boxed": last_boxed}
"""What a completion votes for, by the name on the command line."""
