"""Verifiers that this project has. They read text and nothing else, and are quick."""

from fractions import Fraction
from itertools import pairwise

from trainer.rewards.base import Case
from trainer.tasks.answers import last_boxed, last_number

_LONGEST_NUMBER = 400  # characters: an exponent or a fraction beyond it is no answer, but would cost memory


def exact(case: Case) -> float | None:
    """1 if the completion is the answer, or one of several, but for white space around it."""
    if case.answer is None:
        return None
    accepted = case.answer if isinstance(case.answer, list) else [case.answer]
    return float(case.completion.strip() in {str(answer).strip() for answer in accepted})


def numeric(case: Case) -> float | None:
    r"""1 if the completion's last number (that in its last `\boxed{…}`, if it has one) equals the answer's last."""
    wanted = None if case.answer is None else _number(str(case.answer))
    if wanted is None:
        return None
    return float(_number(last_boxed(case.completion) or case.completion) == wanted)


def star_graph(case: Case) -> float | None:
    """1 if the completion is a path from start to goal in the graph that ends the prompt, with no node twice.

    The prompt is `a,b|c,d|…/start,goal=`, edges and then the path's ends; the path is the completion's first line.
    """
    graph = _graph(case.question or "")
    if graph is None:
        return None
    edges, start, goal = graph
    path = [node.strip() for node in case.completion.strip().partition("\n")[0].split(",")]
    return float(
        path[0] == start
        and path[-1] == goal
        and len(set(path)) == len(path)
        and all(frozenset(step) in edges for step in pairwise(path))
    )


def _graph(text: str) -> tuple[set[frozenset[str]], str, str] | None:
    """Edges, start and goal of the graph that a text ends with; None if it ends with none."""
    words = text.rstrip().removesuffix("=").split()
    if not words or not text.rstrip().endswith("="):
        return None
    listed, slash, ends = words[-1].rpartition("/")
    edges, between = [edge.split(",") for edge in listed.split("|")], ends.split(",")
    if not slash or len(between) != 2 or any(len(edge) != 2 for edge in edges):
        return None
    return {frozenset(edge) for edge in edges}, between[0], between[1]


def _number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None if there is none."""
    found = last_number(text)
    if found is None or len(found) > _LONGEST_NUMBER:
        return None
    above, _, below = found.partition("/")
    if len(above.lower().partition("e")[2]) > 3:
        return None
    try:
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):
        return None
