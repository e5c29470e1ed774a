"""The flags of `qsharp train`, which `qsharp loop` takes, too, and the settings that they make."""

import argparse
import textwrap
from pathlib import Path

import torch

from qsharp_core.critic.checkpoint import read_card
from trainer.commands import options
from trainer.training.outputs import Outputs
from trainer.training.publish import working_folder
from trainer.training.settings import HEAD_ALONE, TrainingError, TrainSettings, settings_from

HEADS_DEFAULTS = textwrap.fill(
    "Defaults of a native critic: "
    + ", ".join(
        f"--{'lr' if name == 'learning_rate' else name.replace('_', '-')} {value}" for name, value in HEAD_ALONE.items()
    )
)


def critic_name(args: argparse.Namespace) -> str:
    """The critic's name: that of `--name`, else that of the critic to continue."""
    if args.name is None and args.continue_from is not None:
        return read_card(args.continue_from).name
    return str(args.name or "critic")


def settings_of(args: argparse.Namespace) -> TrainSettings:
    """The settings that the flags make.

    Raises:
        TrainingError: flags contradict each other, or one is out of range.
    """
    if args.distribution == "categorical" and args.atoms is None:
        raise TrainingError(
            "--distribution categorical needs --atoms, the rewards that there can be, ascending: --atoms 0 0.5 1"
        )
    if args.distribution == "bernoulli" and args.atoms is not None:
        raise TrainingError("--atoms is for --distribution categorical")
    fields = {k: v for k, v in vars(args).items() if k in TrainSettings.model_fields and v is not None}
    if args.continue_from is not None:
        architecture = ("backbone", "layers", "head", "atoms", "reward_range", "mlp", "borrow_embeddings", "tokenizer")
        fixed = [field for field in architecture if fields.get(field)]
        if fixed or args.distribution:
            name = (fixed or ["distribution"])[0].replace("_", "-")
            raise TrainingError(f"--{name} is the continued critic's own: leave it out, or start from --base")
    return settings_from(fields | {"name": critic_name(args)})


def outputs_of(args: argparse.Namespace) -> Outputs:
    """Where results go, by the flags of `add_arguments`."""
    return Outputs(
        out=args.out,
        run=args.run or working_folder(args.out) / ".runs" / critic_name(args),
        resume=args.resume,
        publish_anyway=args.publish_anyway,
        checkpoint_every=args.checkpoint_every,
        tensorboard=args.tensorboard,
        log_with=tuple(args.log_with or ()),
        parent=args.parent,
        recommended_eta=args.recommended_eta,
        dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32,
        features=args.features,
        features_bytes=int(args.features_gb * 1e9),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all flags of `qsharp train`."""
    group = parser.add_argument_group("data and results")
    group.add_argument(
        "--data", type=Path, nargs="+", required=True, help="Parquet files of rollouts, or folders of them"
    )
    group.add_argument(
        "--out",
        type=options.location,
        required=True,
        help="versions are written as OUT/NAME/VERSION; a folder, or a URL as s3://BUCKET/FOLDER",
    )
    group.add_argument("--name", help="of the critic (default: that of --continue, else critic)")
    group.add_argument(
        "--run",
        type=Path,
        help="folder of checkpoints and metrics (default: OUT/.runs/NAME; critics/.runs/NAME where OUT is a URL)",
    )
    group.add_argument("--resume", action="store_true", help="go on with a killed run; starts one if there is none")
    group.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="metrics for TensorBoard, by version")
    group.add_argument(
        "--log-with",
        action="append",
        metavar="TRACKER",
        help="wandb, mlflow or another of Accelerate's; may be repeated",
    )
    group.add_argument("--recommended-eta", type=float, help="written into the card")
    group.add_argument("--publish-anyway", action="store_true", help="a critic that is no better than a constant, too")
    group.add_argument(
        "--parent", type=options.critic, help="critic to compare with (default: --continue's, else the last version)"
    )
    options.add_trust_arguments(group)
    add_storage_arguments(group)
    add_settings_arguments(parser)


def add_storage_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds flags that say how results are stored, and change nothing else."""
    group.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS", help="(default: %(default)s)")
    group.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help="of the stored weights")
    group.add_argument(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="the reference's, kept (default: OUT/.features; critics/.features where OUT is a URL)",
    )
    group.add_argument("--features-gb", type=float, default=20.0, help="most that it may hold (default: %(default)s)")


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that decide what is learned: they have the names and defaults of `TrainSettings`."""
    fields = TrainSettings.model_fields

    def number(group: argparse._ArgumentGroup, flag: str, kind: type, text: str, field: str | None = None) -> None:
        field = field or flag[2:].replace("-", "_")
        default = fields[field].default
        group.add_argument(
            flag, dest=field, type=kind, help=text + ("" if default is None else f" (default: {default})")
        )

    critic = parser.add_argument_group("critic")
    critic.add_argument(
        "--backbone",
        choices=("own", "reference"),
        help="reference: a head on the hidden states of --base, the reference; own: a decoder of its own, from --base "
        "(default: reference, unless other flags are a decoder's)",
    )
    critic.add_argument(
        "--base",
        help="a folder, a hub id or a served model's name: the reference, or the decoder to start from; with "
        "--continue: to borrow from (default: the served model)",
    )
    critic.add_argument(
        "--continue", dest="continue_from", type=options.critic, metavar="CRITIC", help="go on from this version"
    )
    number(critic, "--layers", int, "keep the base's first N layers")
    critic.add_argument("--head", choices=("V", "Q"), help="(default: V)")
    critic.add_argument("--distribution", choices=("bernoulli", "categorical"), help="(default: bernoulli)")
    critic.add_argument(
        "--atoms", type=float, nargs="+", help="rewards that a categorical critic knows, ascending, as 0 0.5 1"
    )
    critic.add_argument("--reward-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="(default: the atoms')")
    number(critic, "--mlp", int, "a hidden layer of this width in the head")
    critic.add_argument("--borrow-embeddings", action="store_true", help="keep and do not store the base's embeddings")

    critic.add_argument("--tokenizer", help="whose token ids the rollouts have (default: the base's)")

    chosen = parser.add_argument_group("which rollouts")
    number(chosen, "--held-out", float, "fraction of the prompts that only measure")
    chosen.add_argument("--group-by", metavar="KEY", help="split by this entry of the metadata, not by the prompt")
    chosen.add_argument(
        "--drop-uniform-prompts", action="store_true", help="without prompts that always earned the same"
    )
    chosen.add_argument("--mixed-policies", action="store_true", help="accept rollouts of different sampling policies")

    optimisation = parser.add_argument_group("optimisation", HEADS_DEFAULTS)
    number(
        optimisation,
        "--epochs",
        int,
        "passes over the rollouts, or of a native critic over their distinct prefixes (default: as long as held-out "
        "rollouts gain by it)",
    )
    number(optimisation, "--steps", int, "of a native critic, instead of epochs")
    number(optimisation, "--max-seconds", float, "end after so many, with the rate fallen to 0 (default: no limit)")
    number(optimisation, "--lr", float, "greatest learning rate (default: by kind)", "learning_rate")
    number(optimisation, "--batch-tokens", int, "tokens of a step, over all processes (default: by the data)")
    number(optimisation, "--input-dropout", float, "with --backbone reference: of hidden states and embeddings")
    number(optimisation, "--dropout", float, "with --backbone reference: after the head's hidden layer")
    number(optimisation, "--grad-accumulation", int, "run a step in so many passes: saves memory, changes nothing")
    number(optimisation, "--clip", float, "greatest norm of the gradient")
    number(optimisation, "--warmup", float, "fraction of the steps")
    number(optimisation, "--weight-decay", float, "of matrices")
    number(optimisation, "--seed", int, "of the head and the order")
    optimisation.add_argument("--precision", choices=("auto", "float32", "bf16"), help="(default: auto)")
    optimisation.add_argument(
        "--weigh",
        choices=("rollouts", "nodes"),
        help="what counts alike in the loss: rollouts, or the prefixes that they share (default: rollouts)",
    )
    optimisation.add_argument(
        "--loss", choices=("likelihood", "squared"), help="squared: of the expected reward (default: likelihood)"
    )
    optimisation.add_argument("--select", choices=("best", "last"), help="which epoch's weights (default: best)")
    optimisation.add_argument(
        "--no-share-prefixes", dest="share_prefixes", action="store_false", help="run each rollout in full"
    )
