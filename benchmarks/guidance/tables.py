"""Ratios and tables of a result: pure functions from the JSON to Markdown.

Sides, heads and so on are the fields of `throughput.Case`. Ratios are made in each round, whose waves see the same
machine, and then have a median and a spread.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Result = dict[str, Any]


def spread(values: Sequence[float], unit: float = 1.0, digits: int = 2) -> str:
    """Median, least and greatest."""
    median, low, high = (f"{unit * v:,.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def bold(cell: str) -> str:
    """Its median, which is what is quoted."""
    median, _, rest = cell.partition(" ")
    return f"**{median}** {rest}"


def speed(case: dict[str, Any]) -> list[float]:
    """Tokens per second, of all rows together, per round."""
    return [case["rows"] * case["tokens"] / seconds for seconds in case["seconds"]]


def ratios(over: Iterable[float], under: Iterable[float]) -> list[float]:
    """Of each round."""
    return [a / b for a, b in zip(over, under, strict=True)]


class Cases:
    """The waves of a result, by what they are."""

    def __init__(self, result: Result) -> None:
        self.all: list[dict[str, Any]] = result["throughput"]

    def of(self, **wanted: Any) -> list[dict[str, Any]]:
        """Those with these fields."""
        return [case for case in self.all if all(case[name] == value for name, value in wanted.items())]


def guided(result: Result) -> str:
    """Guided and unguided throughput, and efficiency."""
    cases = Cases(result)
    rows = []
    asked = [c for c in cases.of(side="ours") if c["head"] is not None and c["prompts"] != "task"]
    for case in sorted(asked, key=lambda c: (c["pair"], *_place(c["head"]), c["rows"], c["prompts"], c["candidates"])):
        at = {"pair": case["pair"], "rows": case["rows"]}
        plain = cases.of(side="ours", head=None, prompts=case["prompts"], **at)
        bare = cases.of(side="bare", head=case["head"], candidates=case["candidates"], **at)
        if not (plain and (bare or case["head"] == "native")):
            continue
        plain_s, guided_s = plain[0]["seconds"], case["seconds"]
        # A critic on the reference's hidden states has no passes of its own.
        bare_s = bare[0]["seconds"] if bare else [0.0] * len(plain_s)
        least_s = [u + b for u, b in zip(plain_s, bare_s, strict=True)]
        rows.append(
            (
                case["pair"], case["head"], f"{case['rows']}{_kind(case)}", case["candidates"],
                spread(speed(plain[0]), digits=1), spread(speed(case), digits=1),
                spread(bare_s, 1e3 / case["tokens"]) if bare else "–",
                spread(ratios(plain_s, guided_s)), bold(spread(ratios(least_s, guided_s))),
            )
        )  # fmt: skip
    return table(
        ("pair", "head", "requests", "candidates", "unguided, tok/s", "guided, tok/s", "critic alone, ms a step",
         "guided ÷ unguided", "efficiency"),
        rows,
    )  # fmt: skip


def peers(result: Result) -> str:
    """Guided throughput against peers'."""
    cases = Cases(result)
    rows = []
    for side, how in (("generate", _generate_settings), ("dense", lambda _: "V1 logits processor")):
        for case in cases.of(side=side):
            ours = cases.of(side="ours", **{name: case[name] for name in SAME})
            if not ours:
                continue
            ratio = spread(ratios(speed(ours[0]), speed(case)), digits=1)
            cells = (spread(speed(c), digits=1) for c in (case, ours[0]))
            named = (PEERS[side], how(case), case["pair"], f"{case['rows']}{_kind(case)}", case["candidates"])
            rows.append((*named, *cells, bold(ratio)))
    return table(
        ("peer", "its settings", "pair", "requests", "candidates", "peer, tok/s", "ours, tok/s", "ours ÷ peer"), rows
    )


def as_served(result: Result) -> str:
    """Problems of the task, guided by the defaults of requests, and not."""
    cases = Cases(result)
    rows = []
    for case in [c for c in cases.of(side="ours", prompts="task") if c["head"] is not None]:
        plain = cases.of(side="ours", head=None, prompts="task", pair=case["pair"], rows=case["rows"])
        for unguided in plain:
            cells = (spread(speed(c), digits=1) for c in (unguided, case))
            ratio = spread(ratios(unguided["seconds"], case["seconds"]))
            rows.append((case["pair"], case["head"], case["rows"], *cells, ratio))
    return table(("pair", "head", "requests", "unguided, tok/s", "guided, tok/s", "guided ÷ unguided"), rows)


SAME = ("pair", "rows", "head", "candidates", "min_prob", "prompts")
PEERS = {"generate": "(a) `generate`, two passes", "dense": "(b) vLLM, dense cache, two passes"}


def _place(head: str) -> tuple[int, str]:
    """V, Q, then what has no backbone."""
    return {"V": 0, "Q": 1}.get(head, 2), head


def _kind(case: dict[str, Any]) -> str:
    return "" if case["prompts"] == "alike" else f", {case['prompts']}"


def _generate_settings(case: dict[str, Any]) -> str:
    return f"batches of {case['batch']}, {case['threads']} thread{'s' * (case['threads'] > 1)}"


def losses(plain: Sequence[float], ours: Sequence[float]) -> list[float]:
    """`1 - plain time / our time` of each round, percent."""
    return [100 * (1 - p / o) for p, o in zip(plain, ours, strict=True)]


def without_eta(result: Result) -> str:
    """What requests without `eta` lose against plain vLLM."""
    cases = Cases(result)
    rows = []
    for case in cases.of(side="vllm"):
        ours = cases.of(side="ours", head=None, prompts="alike", pair=case["pair"], rows=case["rows"])
        if ours:
            speeds = (spread(speed(c), digits=1) for c in (case, ours[0]))
            lost = losses(case["seconds"], ours[0]["seconds"])
            rows.append(("offline `LLM`", case["pair"], case["rows"], *speeds, spread(lost, digits=1)))
    for http in result.get("http", []):
        plain, with_us = (http["seconds"][kind] for kind in ("vllm", "ours"))
        speeds = (
            spread([http["requests"] * http["tokens"] / s for s in seconds], digits=1) for seconds in (plain, with_us)
        )
        rows.append(("HTTP", http["pair"], http["clients"], *speeds, spread(losses(plain, with_us), digits=1)))
    head = ("through", "pair", "requests", "plain vLLM, tok/s", "ours without `eta`, tok/s", "lost, percent")
    return table(head, rows)


def latency(result: Result) -> str:
    """Time to first token and between tokens."""
    rows = []
    for of_pair in result.get("latency", []):
        rate = of_pair["rate_per_s"]
        for kind, capacity in (("unguided", "capacity_per_s"), ("guided", "guided_capacity_per_s")):
            r = of_pair[kind]
            cells = [f"{1e3 * r[f'{name}_p{q}_s']:,.1f}" for name in ("first", "gap") for q in (50, 99)]
            rows.append((of_pair["pair"], kind, f"{rate:.2f}", f"{rate / of_pair[capacity]:.0%}", r["streams"], *cells))
    head = (
        "pair",
        "",
        "arrivals per s",
        "of its capacity",
        "streams",
        "first token p50, ms",
        "p99",
        "gap p50, ms",
        "p99",
    )
    return table(head, rows)


def captured(result: Result) -> str:
    """The critic's captured step, compiled and not, and what of a guided step it and the reference's explain."""
    cases = Cases(result)
    ways: dict[tuple[Any, ...], dict[bool, list[float]]] = {}
    for found in result.get("captured", []):
        shape = tuple(found[name] for name in ("pair", "head", "rows", "candidates"))
        ways.setdefault(shape, {})[found["compiled"]] = found["seconds"]
    rows = []
    for shape, of in ways.items():
        pair, head, many, candidates = shape
        at = {"side": "ours", "pair": pair, "rows": many, "prompts": "alike"}
        compiled, plain = (statistics.median(of[way]) for way in (True, False))
        explained = "–"
        steps = [
            statistics.median(case["seconds"]) / case["tokens"]
            for case in (*cases.of(head=None, **at), *cases.of(head=head, candidates=candidates, **at))
        ]
        if len(steps) == 2:  # the waves were measured, too
            explained = f"{(steps[0] + compiled) / steps[1]:.2f}"
        rows.append((*shape, spread(of[True], 1e3), spread(of[False], 1e3), f"{plain / compiled:.2f}", explained))
    return table(
        ("pair", "head", "requests", "candidates", "compiled, ms", "not compiled, ms", "not compiled ÷ compiled",
         "(unguided step + compiled) ÷ guided step"),
        rows,
    )  # fmt: skip


def pool(result: Result) -> str:
    """Memory of the critic's pool."""
    rows = [
        (p["pair"], f"{p['bytes_per_token']:,}", f"{p['tokens_per_gib']:,}")
        for p in result.get("growth", {}).get("pool", [])
    ]
    return table(("pair", "bytes per token", "tokens per GiB"), rows)
