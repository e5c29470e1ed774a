"""Time of waves of requests: guided, not guided, the critic's bare passes, and peers, all by turns.

A wave is `rows` requests at once, each decoding `tokens` tokens after a prompt that has been seen before. Every round
runs each case once, with prompts of its own, so that all cases see the same machine.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from tqdm import tqdm

from benchmarks.guidance import bare, ours, peer_dense
from benchmarks.guidance.ours import Ask
from benchmarks.guidance.pairs import Pair, Prompts
from benchmarks.guidance.peer_generate import GeneratePeer, Way
from qsharp_core.vllm_plugin import processors
from qsharp_core.wire.guidance import DEFAULT_CANDIDATES, DEFAULT_MIN_PROB

Side = Literal["ours", "bare", "vllm", "dense", "generate"]
APART = 8  # candidates of the waves of which the prompts have nothing in common
PEERS: tuple[Side, ...] = ("dense", "generate")
Runner = Callable[["Case", int], float]  # case, seed -> seconds


@dataclass(frozen=True)
class Case:
    """One line of the result: who does what.

    Attributes:
        side: `ours` (guided where there is a head), `bare` (the critic's forward passes alone), `vllm` (without our
            package), or a peer.
        head: of the critic, `native` for one on the reference's hidden states; None is not guided.
        prompts: see `pairs.prompts`.
    """

    side: Side
    rows: int
    tokens: int
    head: Literal["V", "Q", "native"] | None = None
    candidates: int = 0
    min_prob: float = 0.0
    prompts: Prompts = "alike"


@dataclass
class Measured:
    """A case's times, and what the side had to choose."""

    case: Case
    seconds: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def record(self, pair: str) -> dict[str, Any]:
        """As JSON takes it."""
        return {"pair": pair, **asdict(self.case), **self.settings, "seconds": self.seconds}


def cases(
    rows: Sequence[int],
    heads: Sequence[Any],
    candidates: Sequence[int],
    peer_rows: Sequence[int],
    tokens: int,
    *,
    task: bool = False,
) -> list[Case]:
    """All that one pair is measured at; peers with a V head and 8 candidates.

    Args:
        task: also as a server's requests are by default, on problems of the default model's task.
    """
    made = []
    for count in sorted({*rows, *peer_rows}):
        guided = [(head, most) for head in heads for most in candidates] if count in rows else []
        peers: list[tuple[Any, int]] = [("V", 8)] if count in peer_rows else []
        # Side by side, so that engines change seldom; what is compared most closely stands next to each other.
        made += [Case("ours", count, tokens, head, most) for head, most in dict.fromkeys([*guided, *peers])]
        if count == max(rows) and ("V", APART) in guided:
            made += [
                Case("ours", count, tokens, "V", APART, prompts="apart"),
                Case("ours", count, tokens, prompts="apart"),
            ]
        made += [Case("ours", count, tokens), Case("vllm", count, tokens)]
        # A native critic has no forward pass of its own.
        made += [Case("bare", count, tokens, head, most) for head, most in guided if head != "native"]
        made += [Case(side, count, tokens, head, most) for side in PEERS for head, most in peers]
        if task and count in peer_rows:
            as_served = [
                Case("ours", count, tokens, head, DEFAULT_CANDIDATES, DEFAULT_MIN_PROB, "task") for head in heads
            ]
            made += [replace(case, side="generate") for case in as_served if case.head == "V"]
            made += [*as_served, Case("ours", count, tokens, prompts="task")]
    return made


def measure(pair: Pair, wanted: list[Case], rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Every case `rounds` times, after a short round that warms up; what there is after each round."""
    found = [Measured(case) for case in wanted]
    with (
        sides(pair, found) as runners,
        tqdm(total=(rounds + 1) * len(found), desc=f"{pair.name}: waves", unit="wave") as bar,
    ):
        last = None
        for seed in range(rounds + 1):
            # Every other round backwards: who runs after whom must not matter.
            for measured in found if seed % 2 else reversed(found):
                case = measured.case
                if case.side != last:
                    time.sleep(ours.SETTLE_SECONDS)
                last = case.side
                bar.set_postfix_str(f"{case.side} {case.head or 'unguided'} rows={case.rows} k={case.candidates}")
                if seed:
                    measured.seconds.append(runners[case.side](case, seed))
                else:
                    runners[case.side](replace(case, tokens=2), seed)
                bar.update()
            if seed:
                yield [measured.record(pair.name) for measured in found]


@contextmanager
def sides(pair: Pair, found: list[Measured]) -> Iterator[dict[str, Runner]]:
    """Starts whatever the cases need; engines that are not asked are idle."""
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        asked = [measured.case for measured in found]
        wanted = {case.side for case in asked}

        def engine(side: Side, processor: str | None) -> Any:
            rows = max(case.rows for case in asked if case.side == side)
            return stack.enter_context(ours.engine(pair, rows, processor))

        if "ours" in wanted:
            with_us = engine("ours", processors.settled())
            runners["ours"] = lambda case, seed: ours.seconds(with_us, pair, _ask(pair, case), seed)
        if "vllm" in wanted:
            plain = engine("vllm", None)
            runners["vllm"] = lambda case, seed: ours.seconds(plain, pair, _ask(pair, case), seed)
        if "dense" in wanted:
            dense = engine("dense", peer_dense.PROCESSOR)
            runners["dense"] = lambda case, seed: peer_dense.seconds(dense, pair, _ask(pair, case), seed)
        if "bare" in wanted:
            critics = {str(case.head): pair.critic(case.head) for case in asked if case.side == "bare" and case.head}
            runners["bare"] = lambda case, _: bare.seconds(
                critics[_head(case)], case.rows, case.tokens, case.candidates
            )
        if "generate" in wanted:
            runners["generate"] = _generate(pair, found)
        yield runners


def _generate(pair: Pair, found: list[Measured]) -> Runner:
    """The peer at its best batch size and threads, which are tried out first."""
    peer = GeneratePeer(pair)
    ways: dict[Case, Way] = {}  # by cases of no tokens: a warm-up's has fewer
    asked = [measured for measured in found if measured.case.side == "generate"]
    for measured in tqdm(asked, desc=f"{pair.name}: best batch size of generate"):
        way = ways[replace(measured.case, tokens=0)] = peer.best(_ask(pair, measured.case))
        measured.settings = asdict(way)
    return lambda case, seed: peer.seconds(_ask(pair, case), seed, ways[replace(case, tokens=0)])


def _head(case: Case) -> str:
    assert case.head is not None, case
    return case.head


def _ask(pair: Pair, case: Case) -> Ask:
    critic = None if case.head is None else pair.names[case.head]
    return Ask(case.rows, case.tokens, critic, case.candidates, case.min_prob, case.prompts)
