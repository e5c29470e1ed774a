"""Writes docs/benchmarks.md and its figure, or docs/benchmarks-gpu.md, from a result; measures nothing.

python -m benchmarks.guidance.render benchmarks/results/guidance.json
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.guidance import render_gpu, tables
from benchmarks.guidance.pairs import OWN_TOKENS, PROMPT_TOKENS
from qsharp_core.wire.guidance import DEFAULT_CANDIDATES, DEFAULT_MIN_PROB

DOCS = Path("docs")
FIGURE = Path("images/critic-growth.png")
PANELS = (("length", "prefix, tokens"), ("rows", "rows"), ("candidates", "candidates of a row"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write into")
    given = parser.parse_args()
    write(json.loads(given.result.read_text()), given.docs)


def write(result: dict[str, Any], docs: Path = DOCS) -> None:
    """The page, and the figure where growth was measured."""
    (docs / FIGURE.parent).mkdir(parents=True, exist_ok=True)
    if "large" in result["settings"]["pairs"]:
        (docs / "benchmarks-gpu.md").write_text(render_gpu.page(result, made(result)))
        return
    (docs / "benchmarks.md").write_text(page(result))
    if "growth" in result:
        draw(result["growth"]["points"], docs / FIGURE)


def made(result: dict[str, Any]) -> str:
    """By what, when and on what, and what the numbers are."""
    m, s = result["machine"], result["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items())
    note = f"{s['note']}\n" if s.get("note") else ""
    gpu = f"{m['gpu']}, " if m.get("gpu") else ""
    return f"""Made by `{result["command"]}`
on {m["date"]}, in {result["minutes"]:.0f} minutes, and written by
`python -m benchmarks.guidance.render`; `make bench` makes it anew on your machine. Numbers are medians
(least to greatest) of {s["rounds"]} rounds of this one run, in each of which every side took its turn; so
are ratios, which are made within a round.
{note}
Machine: {m["cpu"]}, {m["cores"]} cores, {gpu}{m["memory_gib"]:.0f} GiB, {m["platform"]}.
Python {m["python"]}, {versions}."""


def page(result: dict[str, Any]) -> str:
    """Markdown."""
    s = result["settings"]
    dtypes = " ".join(f"All sides run `{pair}` in {dtype}." for pair, dtype in s["dtypes"].items())
    waves = " or ".join(f"{s['tokens'][pair]} tokens ({pair})" for pair in s["pairs"])
    return f"""# What guidance costs

{made(result)}

Pairs: `default` is the embedded SmolLM2-135M-Instruct with its critic (3 layers; with a Q head: the same layers under
random heads), `tiny` is random models of two layers, 128 and 64 wide, where bookkeeping dominates.
{dtypes}
Threads: vLLM binds its worker, and a logits processor in it, to one core of two. On the other one, while the reference
runs, critics run new prompts, and `default`'s Q head its forward pass; otherwise the two take turns. The critic's bare
passes have one thread; peer (a) has one or two, whichever is faster.

A wave is a number of requests at once, each of {waves}. Their prompts have
{PROMPT_TOKENS} tokens, which every side has cached, so that decoding alone is timed. {PROMPT_TOKENS - OWN_TOKENS} of
these tokens are the same in all prompts, as in few-shot prompts. In rows marked *apart* none are the same. Rows marked
*task* have held-out sums with their eight solved examples. `eta` is 0.2, the temperature 1, and there is no `min_prob`
unless a row says so.

## Guided and not

*Efficiency* = (time of the unguided wave + time of the critic's bare forward passes over the same rows and lengths) ÷
time of the guided wave: 1 is guidance that costs its critic's arithmetic and nothing more. The bare passes are
transformers' own, timed without making, growing or copying a cache.

{tables.guided(result)}

{_as_served(result)}## Other ways to guide

All sides have the same models, prompts, `eta` and candidates, and on the task the same `min_prob`, {DEFAULT_MIN_PROB}.

(a) Hugging Face `generate` with a logits processor that runs a cached critic twice a step: the last token, then all
candidates over an expanded cache; at its best batch size. (b) A vLLM logits processor with a dense cache per slot and
two passes a step. `tests/benchmarks/test_peers.py` holds both to the same guided policy as ours.

{tables.peers(result)}

## Requests without `eta`

The comparison is with vLLM without our package: with the offline `LLM`, and with an HTTP server that is idle while
ours is asked, and the other way round. Lost = 1 − plain vLLM's time ÷ ours, in each round; a negative number is noise
in our favour. Over HTTP there are more processes than two cores can run at once. A block of the tiny pair may then take
half as long again as the next one, on either side, so its line says little.

{tables.without_eta(result)}

## Latency

Requests of {s["latency_tokens"]} tokens arrive over HTTP by a Poisson process and are streamed. The rate is
{s["load"]:.0%} of the unguided capacity, guided (V head, 8 candidates) and not. A gap is the time between two tokens of
a stream; its quantiles are over all gaps of all streams.

{tables.latency(result)}

## How the critic's step grows

This is `PagedScorer.score` alone, on one thread. Where one quantity grows, the others stay at 256 tokens of prefix, 8
rows and 8 candidates. *Ragged* means that rows ask for different numbers of candidates, evenly spread from 1 up.

![time of a step over prefix, rows and candidates]({FIGURE})

Its cache, V head:

{tables.pool(result)}

What training costs beside other trainers is measured by `python -m benchmarks.trainer_speed`
([training](training.md#how-fast-it-trains)).
"""


def _as_served(result: dict[str, Any]) -> str:
    """A section, where the task was measured."""
    cases = tables.Cases(result)
    if not cases.of(prompts="task"):
        return ""
    random = "\nThe Q head is random: what it guides to are no sums any more, and the reference is less sure of them."
    return f"""## As requests are by default

Sums (*task*), at most {DEFAULT_CANDIDATES} candidates, none less likely than {DEFAULT_MIN_PROB}: the critic is asked
where the reference is unsure.{random if cases.of(head="Q", prompts="task") else ""}

{tables.as_served(result)}

"""


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Three panels: time of a step over prefix length, rows and candidates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(PANELS), sharey=True)
    series = dict.fromkeys((p["pair"], p["head"], p["ragged"]) for p in points)
    colours = {key: f"C{i}" for i, key in enumerate(dict.fromkeys((pair, head) for pair, head, _ in series))}
    for axis, (by, label) in zip(axes, PANELS, strict=True):
        for pair, head, ragged in series:
            line = [p for p in points if (p["by"], p["pair"], p["head"], p["ragged"]) == (by, pair, head, ragged)]
            if not line:
                continue
            axis.plot(
                [p[by] for p in line], [1e3 * statistics.median(p["seconds"]) for p in line], marker="o", markersize=3,
                color=colours[pair, head], linestyle="--" if ragged else "-",
                label=f"{pair}, {head} head" + (", ragged" if ragged else ""),
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            scale.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("a step, ms")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
