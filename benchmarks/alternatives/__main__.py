"""Guidance against fine-tuning at equal cost, on one machine and through HTTP.

    qsharp run demo
    python -m benchmarks.alternatives --run runs/demo -- --max-model-len 512
    python -m benchmarks.alternatives --rollouts rollouts.parquet         trains a critic first, and takes its time

From the rollouts that a critic was trained on, and in the seconds that its training took, the reference is fine-tuned
by TRL, all of its parameters: RFT imitates its own successful samples (completions alone count), DPO prefers right ones
to wrong ones. Every fine-tuned model, and the reference with and without guidance, answers the task's held-out problems
with one sample and with N. What follows `--` is for `qsharp serve`.

Writes `report.md`, `report.json` and `report.png`; the same command goes on where it was stopped, and takes further
learning rates, seeds, seconds and pools. Other rollouts, another critic or reference need a folder of their own.
"""

import argparse
import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import get_args

import torch
from transformers import AutoConfig

from benchmarks.alternatives import report
from benchmarks.alternatives.examples import Drawn, read_drawn
from benchmarks.alternatives.measuring import Policy, Pools, Wanted, estimated, reported, sampled, together
from benchmarks.alternatives.report import Training, rows_of
from benchmarks.alternatives.tuning import Tuned, Tuning, tune
from benchmarks.critics.common import NATIVE, trained
from benchmarks.search_frontier.sampling import GUIDED, REFERENCE, REFERENCE_ETA, pool, unguided
from qsharp_core.answers import VOTES, VoteName
from qsharp_core.critic.digest import digest as critic_digest
from qsharp_core.critic.digest import file_digest
from qsharp_core.precision import fast_bfloat16
from server.presets.known import DEFAULT, PRESETS
from trainer.commands.options import positive
from trainer.evaluation.statistics import estimate
from trainer.loop.report import LoopReport
from trainer.reports import write_json
from trainer.rollouts.collection import digest
from trainer.rollouts.journal import Journal
from trainer.serving import serve
from trainer.tasks.registry import find_task

LABELS = {"rft": "RFT", "dpo": "DPO"}


@dataclass(frozen=True)
class Guide:
    """A critic, the rollouts that it was trained on, and the seconds that this took."""

    critic: Path
    rollouts: Path
    seconds: float


def main() -> None:
    given = _arguments().parse_args()
    model = PRESETS[given.model].model() if given.model in PRESETS else Path(given.model)
    guide = _guide(given, model)
    rollouts = read_drawn(guide.rollouts, AutoConfig.from_pretrained(model).vocab_size)
    with Journal(given.out / "inputs.jsonl", _inputs(model, guide, rollouts)):
        _compare(given, model, guide, rollouts)


def _inputs(model: Path, guide: Guide, rollouts: Sequence[Drawn]) -> dict[str, str]:
    """Digests of what everything in the folder comes of."""
    return {
        "reference": digest({file.name: file_digest(file) for file in sorted(model.glob("*.safetensors"))}),
        "critic": critic_digest(guide.critic),
        "rollouts": digest([asdict(one) for one in rollouts]),
    }


def _compare(given: argparse.Namespace, model: Path, guide: Guide, rollouts: Sequence[Drawn]) -> None:
    tunings = _tunings(given, guide.seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    models = {tuning: tune(tuning, model, rollouts, given.out / "models") for tuning in tunings}
    torch.set_num_threads(threads)
    wanted = _wanted(given)
    policies = _of_reference(given, wanted, model, guide)
    trainings = [_of_tuned(given, wanted, model, tuning, *models[tuning]) for tuning in tunings]
    groups: dict[str, list[Policy]] = {}
    for one in trainings:
        groups.setdefault(one.policy.name, []).append(one.policy)
    policies += [together(some, name) for name, some in groups.items()]
    rows = rows_of(policies, given.n)
    text = report.markdown(rows, trainings)
    print(text)
    (given.out / "report.md").write_text(text + "\n")
    report.plot(given.out / "report.png", policies, given.n)
    about = {
        "task": given.task, "model": given.model, "rollouts": len(rollouts), "right": sum(r.right for r in rollouts),
        "critic_seconds": guide.seconds, "seed": given.seed, "kl_samples": given.kl_samples,
    }  # fmt: skip
    write_json(given.out / "report.json", {**about, **report.data(rows, trainings)})
    print(given.out / "report.json")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="FOLDER", help="of `qsharp run`: rollouts, critic and its seconds")
    source.add_argument("--rollouts", type=Path, metavar="FILE", help="Parquet, of qsharp export")
    parser.add_argument(
        "--critic", type=Path, metavar="FOLDER", help="with --rollouts: trained on them; needs --seconds"
    )
    parser.add_argument(
        "--seconds", type=float, nargs="+", help="of each fine-tuning (default: what the critic's training took)"
    )
    parser.add_argument("--model", default=DEFAULT, help="a preset or a folder (default: %(default)s)")
    parser.add_argument("--task", default="sums", help="its held-out problems (default: %(default)s)")
    parser.add_argument("--vote", choices=VOTES, help="which part of a text is its answer (default: the task's)")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--n", type=int, default=8, help="samples of which one is chosen (default: %(default)s)")
    parser.add_argument("--pools", type=int, default=1, help="of n samples, for each problem (default: %(default)s)")
    parser.add_argument("--eta", type=float, nargs="+", default=[0.1], help="of Q♯ (default: 0.1)")
    parser.add_argument("--cd-eta", type=float, nargs="*", default=[0.2], help="of Controlled Decoding (default: 0.2)")
    parser.add_argument("--rft-lr", type=float, nargs="*", default=[2e-5], help="learning rates of RFT (default: 2e-5)")
    parser.add_argument("--dpo-lr", type=float, nargs="*", default=[5e-6], help="learning rates of DPO (default: 5e-6)")
    parser.add_argument("--beta", type=float, default=0.1, help="of DPO (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="examples, or pairs, of a step (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of fine-tuning (default: 1, which a critic that is trained here has)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind (default: %(default)s)")
    parser.add_argument(
        "--kl-samples",
        type=positive,
        help="of each problem, by which a fine-tuned model's KL is estimated (default: all)",
    )
    parser.add_argument("--rows", type=int, default=64, help="samples at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/alternatives"), metavar="FOLDER")
    parser.add_argument("serve", nargs="*", help="for `qsharp serve`, after --")
    return parser


def _guide(given: argparse.Namespace, model: Path) -> Guide:
    if given.run is not None:
        loop = LoopReport.read(given.run / "loop" / "report.json")
        if len(loop.rounds) != 1 or loop.critic is None:
            raise SystemExit(f"--run {given.run}: {len(loop.rounds)} rounds; one with a critic is compared")
        critic = given.run / "critics" / loop.critic.replace("@", "/")
        rollouts = given.run / "loop" / "round-0" / "rollouts.parquet"
        return Guide(critic, rollouts, loop.rounds[0].seconds["train"])
    if given.critic is not None:
        if not given.seconds:
            raise SystemExit("--critic: say what its training took (--seconds)")
        return Guide(given.critic, given.rollouts, given.seconds[0])
    critic, _, seconds = trained(given.rollouts, given.out, "critic", [*NATIVE, "--select", "last"], base=model)
    return Guide(critic, given.rollouts, seconds)


def _tunings(given: argparse.Namespace, seconds: float) -> list[Tuning]:
    kinds = [("rft", lr) for lr in given.rft_lr] + [("dpo", lr) for lr in given.dpo_lr]
    return [
        Tuning(method=method, lr=lr, budget=budget, seed=seed, batch=given.batch, beta=given.beta)
        for (method, lr), budget, seed in product(kinds, given.seconds or [seconds], range(given.seeds))
    ]


def _wanted(given: argparse.Namespace) -> Wanted:
    of_task = find_task(given.task).vote
    known: list[VoteName] = [name for name in get_args(VoteName) if VOTES[name] is of_task]
    if given.task == "sums":  # a sum's answer ends with its last number
        known = ["number"]
    if given.vote is None and not known:
        raise SystemExit(f"the task {given.task} votes in a way of its own: say --vote, one of {', '.join(VOTES)}")
    vote = given.vote or known[0]
    return Wanted(
        task=given.task, limit=given.limit, size=given.n, pools=given.pools, vote=vote, rows=given.rows, seed=given.seed
    )


def _of_reference(given: argparse.Namespace, wanted: Wanted, model: Path, guide: Guide) -> list[Policy]:
    """The reference, guided and not: the reference is first, the guided policy second."""
    ways = [
        pool(REFERENCE, REFERENCE_ETA, wanted.size),
        *(pool(_named(GUIDED, given.eta, eta=eta), eta, wanted.size) for eta in given.eta),
        *(pool(_named("CD", given.cd_eta, eta=eta), eta, wanted.size, "cd") for eta in given.cd_eta),
    ]
    half = fast_bfloat16() and (given.model not in PRESETS or PRESETS[given.model].bfloat16)
    with _served(given, model, ["--critic", str(guide.critic)], "bfloat16" if half else "float32", "reference") as url:
        found, rules = asyncio.run(sampled(url, wanted, ways, given.out / "samples" / "reference.jsonl"))
    return [
        Policy(
            name=way.name,
            pools=found[way.name],
            kl=reported(found[way.name]),
            seconds=0.0 if way.name == REFERENCE else guide.seconds,
            rules=rules,
        )
        for way in ways
    ]


def _of_tuned(
    given: argparse.Namespace, wanted: Wanted, reference: Path, tuning: Tuning, model: Path, tuned: Tuned
) -> Training:
    way = unguided(tuning.name, wanted.size)
    with _served(given, model, ["--no-critic"], "float32", tuning.name) as url:
        found, rules = asyncio.run(sampled(url, wanted, [way], given.out / "samples" / f"{tuning.name}.jsonl"))
    pools: Pools = found[way.name]
    read = {problem: [[one for pool in some for one in pool][: given.kl_samples]] for problem, some in pools.items()}
    kl = estimated(model, reference, read, given.out / "kl" / tuning.name)
    ratios = estimate([fmean(one.log_ratio for one in some) for some in kl.values()])
    assert ratios is not None
    lrs = given.rft_lr if tuning.method == "rft" else given.dpo_lr
    name = _named(_named(LABELS[tuning.method], lrs, lr=tuning.lr), given.seconds or [0], s=tuning.budget)
    policy = Policy(
        name=name,
        pools=pools,
        kl={problem: fmean(one.by_step for one in some) for problem, some in kl.items()},
        seconds=tuned.seconds,
        rules=rules,
    )
    return Training(tuning=tuning, tuned=tuned, policy=policy, log_ratio=(ratios.mean, ratios.se))


@contextmanager
def _served(given: argparse.Namespace, model: Path, critic: Sequence[str], dtype: str, name: str) -> Iterator[str]:
    """A server of a folder, but for the dtype as the default model is served.

    The reference has the dtype of the product. Fine-tuned models have that of their weights: to round them can move
    them further than a short training has.
    """
    flags = [str(model), *critic, "--dtype", dtype]
    if not torch.cuda.is_available():
        flags += ["--enforce-eager", "--block-size", "32"]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # else nearly all of the memory
    with serve([*flags, *given.serve], given.out / "logs" / f"{name}.log", patience=900) as url:
        yield url


def _named(name: str, values: Sequence[float], **of: float) -> str:
    """The name, with what tells it from others of that name if there are several."""
    ((what, value),) = of.items()
    return name if len(values) == 1 else f"{name}, {what} {value:g}"


if __name__ == "__main__":
    main()
