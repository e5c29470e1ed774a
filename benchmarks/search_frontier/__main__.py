"""Search against plain samples at as many generated tokens, through HTTP.

    python -m benchmarks.search_frontier                          the default model's sums, with the shipped critic
    python -m benchmarks.search_frontier -- --critic FOLDER       with another one
    python -m benchmarks.search_frontier --task star_graph --limit 1000 --repeats 1 -- star-graph

Of each problem there are pools of samples of the reference and of the guided policy, of which one answer is chosen as
`best_of` does, and searches: particles, and `best_of` that rejects. What follows `--` is for `qsharp serve`. Writes
`report.json` and `report.png`; the same command goes on where it was stopped, and takes further searches and repeats.
"""

import argparse
import asyncio
from pathlib import Path

from rich.console import Console

from benchmarks.search_frontier import report
from benchmarks.search_frontier.choosing import Point, Rule, gain, plain, searched
from benchmarks.search_frontier.sampling import GUIDED, REFERENCE, REFERENCE_ETA, Asked, pool, sample, way_of
from qsharp_core.answers import VoteName
from qsharp_core.wire.search import BEST
from trainer.reports import write_json
from trainer.rewards.verifiers import OWN, Judge, TaskRef, Weighted
from trainer.rollouts.client import ServerClient
from trainer.rollouts.parameters import sampling_of
from trainer.serving import serve
from trainer.tasks.registry import find_task

VOTES: dict[str, VoteName] = {"sums": "number", "star_graph": "text"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(VOTES), default="sums")
    parser.add_argument("--limit", type=int, help="only the first so many held-out problems")
    parser.add_argument("--repeats", type=int, default=4, help="answers to each problem (default: %(default)s)")
    parser.add_argument("--pools", type=int, help="pools of plain samples of each problem (default: --repeats)")
    parser.add_argument("--eta", type=float, default=0.1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16], help="samples of an answer")
    parser.add_argument("--every", type=int, default=16, help="tokens of a round (default: %(default)s)")
    parser.add_argument("--by", choices=BEST, default="weighted", help="how searches choose (default: %(default)s)")
    parser.add_argument("--search", action="append", default=[], help="another one, as `qsharp evaluate` takes it")
    parser.add_argument("--no-searches", action="store_true", help="none but those of --search")
    parser.add_argument("--rows", type=int, default=64, help="samples at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/search-frontier"))
    parser.add_argument("serve", nargs="*", help="for `qsharp serve`, after --")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with serve(given.serve, given.out / "server.log", patience=900) as url:
        points, baselines = asyncio.run(measure(given, url))
    rows = [(point, gain(point, baselines[point.rule])) for point in points]
    Console(width=110).print(report.table(rows))
    report.plot(given.out / "report.png", points)
    write_json(given.out / "report.json", report.data(rows))
    print(given.out / "report.json")


async def measure(given: argparse.Namespace, url: str) -> tuple[list[Point], dict[str, list[Point]]]:
    """Samples what is missing.

    Returns:
        The points of all ways; and, by the rule that chooses, those of any number of the guided policy's plain samples.
    """
    task = TaskRef(find_task(given.task), given.task)
    vote, largest = VOTES[given.task], max(given.sizes)
    rejecting = f"reject.every={given.every},reject.keep=0.5"
    usual = [
        f"{kind}:n={size},by={given.by},{fields}"
        for kind, fields in (("particles", f"every={given.every}"), ("best_of", rejecting))
        for size in given.sizes
    ]
    searches = [way_of(text, given.eta, vote) for text in ([] if given.no_searches else usual) + given.search]
    pools = [pool(REFERENCE, REFERENCE_ETA, largest), pool(GUIDED, given.eta, largest)]
    async with Judge([Weighted(OWN)]) as judge, ServerClient(url, connections=given.rows) as client:
        critic = await client.critic(None)
        assert critic is not None
        asked = Asked(
            task=task,
            problems=task.task.of_split("held_out")[: given.limit],
            sampling=sampling_of(task.task.sampling),
            model=await client.model(),
            critic=critic["id"],
            repeats=given.repeats,
            pools=given.pools or given.repeats,
            rows=given.rows,
            seed=given.seed,
        )
        found = await sample(client, judge, asked, [*pools, *searches], given.out / "samples.jsonl")
    low, high = critic["card"]["reward_range"]
    rules = [Rule(by=by, vote=vote, reward_range=(low, high)) for by in BEST]
    points = [
        plain(way.name, found[way.name], size, rule) for way in pools for rule in rules for size in [1, *given.sizes]
    ]
    for way in searches:
        assert way.search is not None
        answers = {problem: [one for (one,) in some] for problem, some in found[way.name].items()}
        kind = f"{way.search['kind']}, {_fields(way.search)}"
        points.append(searched(kind, str(way.search.get("by", "value")), way.size, answers))
    guided = found[GUIDED]
    baselines: dict[str, list[Point]] = {
        rule.by: [plain(GUIDED, guided, size, rule) for size in range(1, largest + 1)] for rule in rules
    }
    return points, {**baselines, "sample": baselines["value"]}  # particles that are drawn are compared with the best


def _fields(asked: object) -> str:
    assert isinstance(asked, dict)
    flat = {name: value for name, value in asked.items() if name not in ("kind", "n", "by", "vote")}
    parts = [_fields(value) if isinstance(value, dict) else f"{name} {value}" for name, value in flat.items()]
    return ", ".join(parts)


if __name__ == "__main__":
    main()
