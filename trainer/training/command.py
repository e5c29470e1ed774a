"""`qsharp train`: a new version of a critic from rollouts in Parquet files.

    qsharp train --data round-0.parquet --base MODEL --layers 3 --mlp 512 --out critics --name sums
    qsharp train --data round-0.parquet round-1.parquet --continue critics/sums/1 --out critics

Several devices: `accelerate launch -m trainer.training …` with the same arguments. A killed run goes on with
`--resume` and ends with the weights of an unbroken one.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from rich.console import Console
from rich.table import Table

from qsharp_core.critic.checkpoint import CriticCard, MLPCard, load
from qsharp_core.critic.model import Critic
from qsharp_core.returns import ReturnDistribution
from trainer.training import data as rollout_data
from trainer.training.arguments import critic_name, parser, settings_of
from trainer.training.batching import plan_epoch
from trainer.training.data import DataSet, Rollout, SamplingPolicy
from trainer.training.fit import Fit, fit
from trainer.training.heldout import Predictions, compare, predict, report
from trainer.training.model import Start, local_folder, start
from trainer.training.passes import Passes, saving
from trainer.training.plots import calibration
from trainer.training.publish import latest, publish
from trainer.training.run import Run
from trainer.training.scorer import Scorer, understands_trees
from trainer.training.settings import TrainingError, TrainSettings, distribution_card
from trainer.training.siblings import weighed

# A tree's attention is dense over its nodes; it has to save at least this part of the tokens to pay.
WORTHWHILE = 0.8


@dataclass(frozen=True)
class Outputs:
    """Where results go, and what does not change them.

    Attributes:
        out: versions are `out/<name>/<version>`.
        run: the run's folder.
        parent: critic to compare with; None for the one that is continued, else the name's last version.
        dtype: of the published weights.
    """

    out: Path
    run: Path
    resume: bool = False
    checkpoint_every: int = 200
    tensorboard: Path | None = None
    parent: Path | None = None
    recommended_eta: float | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Prepared:
    """Data that passed all checks, split."""

    everything: DataSet
    train: list[Rollout]
    held_out: list[Rollout]
    policies: list[SamplingPolicy]
    counts: dict[str, int]


@dataclass(frozen=True)
class Parent:
    """What a new version is compared with, and its predictions; None if it cannot read these rollouts."""

    key: str
    returns: ReturnDistribution
    predictions: Predictions | None


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        TrainingError, CriticError
    """
    args = parser(__doc__).parse_args(argv)
    outputs = Outputs(
        out=args.out,
        run=args.run or args.out / ".runs" / critic_name(args),
        resume=args.resume,
        checkpoint_every=args.checkpoint_every,
        tensorboard=args.tensorboard,
        parent=args.parent,
        recommended_eta=args.recommended_eta,
        dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32,
    )
    train(args.data, settings_of(args), outputs)


def train(paths: list[Path], settings: TrainSettings, outputs: Outputs) -> Path:
    """Reads, trains, measures and publishes.

    Returns:
        The new version's folder; that of the finished run, if it is resumed.
    """
    # Precision is this program's own setting; and a decoder's buffers are constants.
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    with _deterministic(accelerator.device):
        return _train(paths, settings, outputs, accelerator)


def _train(paths: list[Path], settings: TrainSettings, outputs: Outputs, accelerator: Accelerator) -> Path:
    console = Console(quiet=not accelerator.is_main_process)
    began = start(settings)
    prepared = _prepare(paths, settings, began)
    _print_counts(console, prepared)
    digest = prepared.everything.digest
    if accelerator.is_main_process:
        compared = outputs.parent or settings.continue_from or latest(outputs.out, settings.name)
        Run.prepare(outputs.run, settings, digest, compared, outputs.resume)
    accelerator.wait_for_everyone()
    run = Run(outputs.run)
    if run.card.published is not None:
        console.print(f"this run is finished: it published [bold]{run.card.published}[/bold]")
        return _published(outputs, run)

    critic = began.critic.to(accelerator.device)
    passes = _passes(settings, accelerator, critic, prepared.train)
    console.print("prefixes that rollouts share are run once" if passes.trees else "each rollout is run in full")
    # Before the training: a parent that cannot be read should not cost a run.
    parent = _predict_parent(run.card.parent, settings, critic, prepared, accelerator)
    watch, close = _watcher(outputs.tensorboard if accelerator.is_main_process else None)

    def evaluate(step: int, epoch: int) -> float | None:
        if not prepared.held_out:
            return None
        measured = report(
            predict(critic, prepared.held_out, passes, accelerator), prepared.held_out, critic.distribution
        )
        line = {"step": step, "epoch": epoch, "held_out": measured["overall"]}
        if accelerator.is_main_process:
            run.log(line)
            watch(line)
        loss: float = measured["overall"]["log_loss"]
        return loss

    job = Fit(
        scorer=Scorer(critic),
        returns=critic.distribution,
        rollouts=prepared.train,
        settings=settings,
        passes=passes,
        accelerator=accelerator,
        autocast=_autocast(settings, accelerator),
        evaluate=evaluate,
        watch=watch,
        checkpoint_every=outputs.checkpoint_every,
    )
    progress = fit(job, run)
    close()

    result: dict[str, Any] = {
        "data": prepared.counts,
        "steps": progress.step,
        "best_epoch": progress.best_epoch if settings.select == "best" else None,
        "held_out": None,
        "parent": None,
    }
    # Of what is published: with its weights as they are after rounding, computed in float32.
    critic.requires_grad_(False).to(outputs.dtype)
    found = predict(critic.float(), prepared.held_out, passes, accelerator) if prepared.held_out else None
    if found is not None:
        result["held_out"] = report(found, prepared.held_out, critic.distribution)
    if parent is not None:
        result["parent"] = _compare(parent, found, critic, prepared)
    if accelerator.is_main_process:
        fields = _card(settings, outputs, began, prepared, result, critic)
        folder = publish(outputs.out, fields, critic.cpu().to(outputs.dtype), run.card.id)
        key = f"{folder.parent.name}@{folder.name}"
        run.write_report({"critic": key} | result)
        if found is not None:
            plot = run.folder / "calibration.png"
            calibration(plot, found, result["held_out"], f"{key} on held-out prompts", critic.distribution.reward_range)
        run.finish(key)
        _print_report(console, result, folder, run.folder)
    accelerator.wait_for_everyone()
    return _published(outputs, Run(outputs.run))


def _published(outputs: Outputs, run: Run) -> Path:
    assert run.card.published is not None
    return outputs.out / Path(*run.card.published.rsplit("@", 1))


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a CPU a resumed run is bit for bit the unbroken one; on GPUs that would cost speed to save roundings."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or device.type == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _prepare(paths: list[Path], settings: TrainSettings, began: Start) -> Prepared:
    critic = began.critic
    everything = rollout_data.refuse_longer(rollout_data.read(paths, settings.group_by), critic.max_length)
    policies = rollout_data.check(everything, critic.distribution, critic.vocab, settings.mixed_policies)
    known = getattr(began.parent, "sampling_policy", None)
    if known and not settings.mixed_policies and SamplingPolicy.of(known) != policies[0]:
        raise TrainingError(
            f"the critic to continue is about {SamplingPolicy.of(known)}, these rollouts are of {policies[0]}: "
            "--mixed-policies trains on them all the same"
        )
    train_on, held_out = rollout_data.split(everything.rollouts, settings.held_out)
    counts = Counter(everything.counts)
    if settings.drop_uniform_prompts:
        kept = rollout_data.without_uniform_prompts(train_on)
        counts["uniform_prompts"] = len(train_on) - len(kept)
        train_on = kept
        if not train_on:
            raise TrainingError("every prompt's rollouts all earned the same: nothing is left to train on")
    if settings.weigh == "nodes":
        train_on = weighed(train_on)
    reasons = ("read", "duplicates", "unrewarded", "no_valid_position", "too_long", "uniform_prompts")
    return Prepared(
        everything,
        train_on,
        held_out,
        policies,
        {reason: counts[reason] for reason in reasons}
        | {
            "train_rollouts": len(train_on),
            "train_prompts": len({r.group for r in train_on}),
            "held_out_rollouts": len(held_out),
            "held_out_prompts": len({r.group for r in held_out}),
            "train_positions": sum(r.valid for r in train_on),
        },
    )


def _passes(settings: TrainSettings, accelerator: Accelerator, critic: Critic, rollouts: list[Rollout]) -> Passes:
    """Trees where the backbone obeys their mask and they save enough."""
    max_tokens = max(settings.batch_tokens // settings.grad_accumulation, 1)
    trees = settings.share_prefixes
    if trees:
        plan = plan_epoch(rollouts, settings.batch_tokens, True, settings.seed, 0)
        trees = saving(plan, rollouts, max_tokens) <= WORTHWHILE
    trees = trees and understands_trees(critic, rollouts, accelerator.device)
    return Passes(trees, max_tokens, accelerator.process_index, accelerator.num_processes)


def _autocast(settings: TrainSettings, accelerator: Accelerator) -> torch.dtype | None:
    if settings.precision == "auto":
        able = accelerator.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if able else None
    return torch.bfloat16 if settings.precision == "bf16" else None


def _predict_parent(
    folder: Path | None, settings: TrainSettings, critic: Critic, prepared: Prepared, accelerator: Accelerator
) -> Parent | None:
    if folder is None:
        return None
    base = local_folder(settings.base) if settings.base else None
    card, parent = load(folder, device=accelerator.device, reference=base)
    longest = max((r.length for r in prepared.held_out), default=0)
    able = prepared.held_out and (parent.max_length or longest) >= longest and parent.vocab >= critic.vocab
    if not able:
        return Parent(card.key, parent.distribution, None)
    passes = _passes(settings, accelerator, parent, prepared.held_out)
    return Parent(card.key, parent.distribution, predict(parent, prepared.held_out, passes, accelerator))


def _compare(parent: Parent, found: Predictions | None, critic: Critic, prepared: Prepared) -> dict[str, Any]:
    if found is None or parent.predictions is None:
        return {"critic": parent.key, "held_out": None, "comparison": None}
    same = parent.returns == critic.distribution
    return {
        "critic": parent.key,
        "held_out": report(parent.predictions, prepared.held_out, parent.returns)["overall"],
        "comparison": compare(found, parent.predictions, prepared.held_out, same),
    }


def _card(
    settings: TrainSettings,
    outputs: Outputs,
    began: Start,
    prepared: Prepared,
    result: dict[str, Any],
    critic: Critic,
) -> dict[str, Any]:
    """`critic.json` but for the version: nothing of this machine in it."""
    shape = critic.head.shape
    # Of the architecture that is stored: the base's configuration names its language model.
    critic.backbone.config.architectures = [type(critic.backbone).__name__]
    critic.backbone.config.dtype = outputs.dtype
    policies = [asdict(p) for p in prepared.policies]
    elsewhere = {
        "base", "continue_from", "name", "head", "atoms", "reward_range", "mlp", "borrow_embeddings", "tokenizer"
    }  # fmt: skip
    return {
        "name": settings.name,
        "head": shape.kind,
        "distribution": distribution_card(critic.distribution).model_dump(),
        "reward_range": critic.distribution.reward_range,
        "mlp": MLPCard(width=shape.mlp).model_dump() if shape.mlp else None,
        "borrow": ["input_embeddings"] if began.borrows else [],
        "tokenizer_fingerprint": began.tokenizer_fingerprint,
        "recommended_eta": outputs.recommended_eta,
        "base": _base_name(settings, began.parent),
        "parent": began.parent.key if began.parent else None,
        "sampling_policy": policies[0] if len(policies) == 1 else None,
        **({"sampling_policies": policies} if len(policies) > 1 else {}),
        "metrics": result["held_out"],
        "compared_with": result["parent"],
        "data": prepared.counts,
        "training": settings.model_dump(mode="json", exclude=elsewhere),
    }


def _base_name(settings: TrainSettings, parent: CriticCard | None) -> str | None:
    if settings.base is None:
        return getattr(parent, "base", None)
    return Path(settings.base).name if Path(settings.base).is_dir() else settings.base


def _watcher(folder: Path | None) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    """What sees every line of metrics: TensorBoard, or nobody."""
    if folder is None:
        return lambda line: None, lambda: None
    try:
        from torch.utils.tensorboard import SummaryWriter  # optional
    except ImportError as error:
        raise TrainingError("--tensorboard needs the package tensorboard") from error
    writer = SummaryWriter(str(folder))

    def watch(line: dict[str, Any]) -> None:
        part = "held_out" if "held_out" in line else "train"
        for name, value in line.get("held_out", line).items():
            if name not in ("step", "n") and value is not None:
                writer.add_scalar(f"{part}/{name}", value, line["step"])

    return watch, writer.close


def _print_counts(console: Console, prepared: Prepared) -> None:
    c = prepared.counts
    refused = {k: c[k] for k in ("unrewarded", "no_valid_position", "too_long", "uniform_prompts") if c[k]}
    left_out = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in refused.items()) or "none"
    console.print(
        f"rollouts: {c['read']} read, {c['duplicates']} duplicates; left out: {left_out}\n"
        f"training on {c['train_rollouts']} of {c['train_prompts']} prompts, "
        f"measuring on {c['held_out_rollouts']} of {c['held_out_prompts']} other prompts"
    )


def _print_report(console: Console, result: dict[str, Any], folder: Path, run: Path) -> None:
    if result["held_out"]:
        table = Table(title="held-out prompts", title_justify="left")
        for column in ("position", "log-loss", "Brier", "AUC", "ECE", "n"):
            table.add_column(column, justify="left" if column == "position" else "right")
        held_out = result["held_out"]
        entries = [("all", held_out["overall"]), *((e["part"], e) for e in held_out["by_position"])]
        for part, e in [*entries, ("last token", held_out["last_token"])]:
            auc = "–" if e["auc"] is None else f"{e['auc']:.4f}"
            table.add_row(part, f"{e['log_loss']:.4f}", f"{e['brier']:.4f}", auc, f"{e['ece']:.4f}", f"{e['n']:,}")
        console.print(table)
    comparison = (result["parent"] or {}).get("comparison")
    if comparison:
        error = comparison["standard_error"]
        console.print(
            f"against {result['parent']['critic']}: {comparison['by'].replace('_', ' ')} better by "
            f"{comparison['improvement']:+.5f}" + (f" ± {error:.5f}" if error is not None else "")
        )
    console.print(f"published [bold]{folder}[/bold]; report and plot in {run}", soft_wrap=True)
