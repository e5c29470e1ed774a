"""Results as Markdown: pure functions of what `measuring.measure` returns."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from benchmarks.guidance import tables
from benchmarks.intervals import interval

Result = dict[str, Any]
NAMES = {"qsharp": "`qsharp train`", "trainer": "Hugging Face `Trainer`", "plain": "plain loop"}
HEAD = ("critic", "rollouts", "side", "speed", "ours ÷ it", "n", "peak memory, MiB", "of that, at its beginning")


def page(report: dict[str, Any]) -> str:
    """A page with the table."""
    machine = report["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return f"""# How fast critics are trained

Made by `{report["command"]}` on {report["date"]}.
{machine["cpu"]}, {machine["cores"]} cores; Python {machine["python"]}, {packages}.

Speeds are medians over turns (least to greatest). *Ours ÷ it* is the median ratio of neighbours (and where 95 % of
bootstrapped medians lie), n of them: steps, or for *reference's pass* and *all* whole turns.

{table(report["results"])}

{"".join(f"- {shape(result)}{chr(10)}" for result in report["results"])}"""


def table(results: Sequence[Result]) -> str:
    """Markdown: rows of each case, a side each."""
    return tables.table(HEAD, chain.from_iterable(_rows(result) for result in results))


def shape(result: Result) -> str:
    """What the rollouts of a case are like."""
    case, turns = result["case"], result["turns"]
    if case["kind"] == "separate":
        tokens = sum(sum(turn["tokens"]) for turn in turns)
        padding = 1 - tokens / sum(sum(turn["padded_tokens"]) for turn in turns)
        way = "run as trees" if all(turn["trees"] for turn in turns) else "not run as trees"
        more = f"; {way}; {padding:.0%} of the others' rows is padding"
    else:
        labels, nodes = (sum(turn[name] for turn in turns) for name in ("labels", "distinct_labels"))
        more = f"; {labels / nodes:.2f} labels for each distinct labelled prefix"
    whole = sum(turn["rollouts"] for turn in turns)
    share = sum(turn["distinct_prefixes"] for turn in turns) / sum(turn["all_tokens"] for turn in turns)
    return (
        f"{case['kind']}, {case['rollouts']}: {whole // len(turns)} rollouts a turn, {share:.0%} of their prefixes are "
        f"distinct{more}"
    )


def ratios(result: Result, side: str, part: str = "steps") -> list[float]:
    """How many times as long as `qsharp train` a side takes, of neighbours.

    Args:
        result: of a case.
        side: another side.
        part: `steps`, or of a native critic `pass` (the reference's) or `all`, by turn.
    """
    if part == "steps":
        return [
            theirs / ours
            for turn in result["turns"]
            for ours, theirs in zip(turn["seconds"]["qsharp"], turn["seconds"][side], strict=True)
        ]
    return [_seconds(turn, side, part) / _seconds(turn, "qsharp", part) for turn in result["turns"]]


def speeds(result: Result, side: str, part: str = "steps") -> list[float]:
    """Tokens, or labelled prefixes, a second, of each turn."""
    if part == "steps" and result["case"]["kind"] == "separate":
        return [sum(turn["tokens"]) / sum(turn["seconds"][side]) for turn in result["turns"]]
    return [_judged(turn, part) / _seconds(turn, side, part) for turn in result["turns"]]


def _rows(result: Result) -> Iterator[Sequence[object]]:
    case = result["case"]
    if case["kind"] == "separate":
        yield from _part(result, "steps", "separate", "tokens/s")
    else:
        yield from _part(result, "pass", "native, reference's pass", "prefixes/s", memory=False)
        yield from _part(result, "steps", "native, head", "prefixes/s", memory=False)
        yield from _part(result, "all", "native, all", "prefixes/s")


def _part(result: Result, part: str, title: str, unit: str, memory: bool = True) -> Iterator[Sequence[object]]:
    for side, name in NAMES.items():
        if part == "pass" and side == "trainer":
            continue
        found = [] if side == "qsharp" else ratios(result, side, part)
        most = result["memory_mib"][side]
        yield (
            title,
            result["case"]["rollouts"],
            "both others" if part == "pass" and side == "plain" else name,
            f"{_spread(speeds(result, side, part))} {unit}",
            _ratio(found),
            len(found) or "",
            f"{most['most']:,.0f}" if memory else "",
            f"{most['before']:,.0f}" if memory else "",
        )


def _ratio(found: list[float]) -> str:
    """The median with its interval; a single ratio has none."""
    return f"**{interval(found)}**" if len(found) > 1 else "".join(f"**{one:.2f}**" for one in found)


def _seconds(turn: dict[str, Any], side: str, part: str) -> float:
    read = turn["pass_seconds"]["qsharp" if side == "qsharp" else "others"]
    head = sum(turn["seconds"][side])
    return float({"pass": read, "steps": head, "all": read + head}[part])


def _judged(turn: dict[str, Any], part: str) -> float:
    """Labelled prefixes that a part judges, as often as they are labelled; `all` judges those of the head's steps."""
    if part == "pass":
        return float(turn["labels"])
    steps = len(turn["seconds"]["qsharp"])
    return float(steps * turn["batch"] * turn["labels"] / turn["distinct_labels"])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
