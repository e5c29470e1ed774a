"""The answer in a completion's text: what verifiers compare and majorities count.

Numbers are read exactly, as fractions, in the ways in which models and data sets write them: thousands' commas, signs,
currencies, percent, fractions, mixed numbers, powers of ten, LaTeX's spellings of these, and the digits of all scripts.
What is no number is the library's matter (`trainer.tasks.mathematics`).
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, get_args

Vote = Callable[[str], str | None]  # the answer that a completion's text votes for; None if it votes for none
VoteName = Literal["text", "number", "boxed"]

_BOXED = re.compile(r"\\f?box(?:ed)?\s*\{")
_LONGEST = 400  # characters: an exponent or a fraction beyond it is no answer, but would cost memory
_LARGEST_POWER = 999
CURRENCIES = "€£¥₹₩₽¢"

_SIGNS = str.maketrans({"−": "-", "﹣": "-", "－": "-", "＋": "+", "．": ".", "，": ",", "／": "/", "％": "%", "＄": "$", "٫": ".", "٬": ","})  # fmt: skip  # noqa: E501
# LaTeX's spellings, in the order in which they are made plain.
_SPELLINGS = [
    (re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;: ]"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(rf"\\[$%]|[$%°{CURRENCIES}]|\^\s*\{{?\s*\\circ\s*\}}?"), ""),
    (re.compile(r"\\[dtc]?frac\s*\{\s*([-+]?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}"), r" \1/\2 "),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r" \1/\2 "),
    (re.compile(r"\s*(?:\\times|\\cdot|×|·)\s*10\s*\^"), "*10^"),
    (re.compile(r"\^\s*\{\s*([-+]?\d+)\s*\}"), r"^\1"),
    (re.compile(r"(?<=[-+])\s+(?=\d+/\d)"), ""),  # of "-\frac12", whose fraction has got a space before it
]
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# "-" only where it is a sign, not a dash or a minus between two.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])-)?(?:"
    rf"(?P<whole>\d+)\s+(?P<above>\d+)/(?P<below>\d+)"
    rf"|(?P<base>{_PLAIN})(?:[eE](?P<exponent>[-+]?\d+)(?!\w)|\*10\^(?P<ten>[-+]?\d+)|\^(?P<power>[-+]?\d+))?"
    rf"(?:/(?P<divisor>{_PLAIN}))?)"
)


def ascii_digits(text: str) -> str:
    """The text with the digits, signs and simple fractions of all scripts as ASCII has them; superscripts stay."""
    if text.isascii():
        return text
    made = []
    for character in text.translate(_SIGNS):
        if character.isascii():
            made.append(character)
        elif character.isdecimal():
            made.append(str(unicodedata.decimal(character)))
        elif "⁄" in (fraction := unicodedata.normalize("NFKC", character)):
            made.append(" " + fraction.replace("⁄", "/"))
        else:
            made.append(character)
    return "".join(made)


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{…}` of a text holds; None if there is none, or it is not closed."""
    starts = [match.end() for match in _BOXED.finditer(text)]
    if not starts:
        return None
    depth = 1
    for at in range(starts[-1], len(text)):
        if text[at] in "{}" and text[at - 1] != "\\":
            depth += 1 if text[at] == "{" else -1
        if depth == 0:
            return text[starts[-1] : at].strip() or None
    return None


def last_number(text: str) -> Fraction | None:
    """The last number in a text; None if there is none, or it is too long to be an answer."""
    text = ascii_digits(text)
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text)
    matches = list(_NUMBER.finditer(text))
    return _value(matches[-1]) if matches and len(matches[-1].group()) <= _LONGEST else None


def number_of(text: str) -> Fraction | None:
    r"""The last number in a completion's last `\boxed{…}`; if there is no box, its last number."""
    return last_number(last_boxed(text) or text)


def whole_text(text: str) -> str | None:
    """A completion's vote for its whole text; None if the text is empty."""
    return text.strip() or None


def vote_number(text: str) -> str | None:
    """A completion's vote for a number: equal numbers are one vote, however they are written."""
    number = number_of(text)
    return None if number is None else str(number)


def _value(match: re.Match[str]) -> Fraction | None:
    parts = {name: text.replace(",", "") for name, text in match.groupdict().items() if text is not None}
    if any(abs(int(parts.get(name, 0))) > _LARGEST_POWER for name in ("exponent", "ten", "power")):
        return None
    try:
        if "whole" in parts:
            value = int(parts["whole"]) + Fraction(int(parts["above"]), int(parts["below"]))
        else:
            value = Fraction(parts["base"]) ** int(parts.get("power", 1))
            value *= Fraction(10) ** int(parts.get("exponent", parts.get("ten", 0)))
            value /= Fraction(parts.get("divisor", 1))
    except ZeroDivisionError:
        return None
    return -value if "sign" in parts else value


VOTES: dict[str, Vote] = {"text": whole_text, "number": vote_number, "boxed": last_boxed}
"""What a completion votes for, by its name in requests and on the command line."""
assert tuple(VOTES) == get_args(VoteName)
