"""What a user may have meant by a name that there is not."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean 'name'?` for the known name that is like the given one; nothing if none is."""
    found = get_close_matches(given, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
