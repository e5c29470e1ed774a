"""The flags of `qsharp train`, and the settings they make."""

import argparse
import textwrap
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qsharp_core.critic.checkpoint import read_card
from trainer.training.settings import HEAD_ALONE, TrainingError, TrainSettings

HEADS_DEFAULTS = textwrap.fill(
    "Defaults with --backbone reference: "
    + ", ".join(
        f"--{'lr' if name == 'learning_rate' else name.replace('_', '-')} {value}" for name, value in HEAD_ALONE.items()
    )
)


def critic_name(args: argparse.Namespace) -> str:
    """`--name`, else that of the critic to continue."""
    if args.name is None and args.continue_from is not None:
        return read_card(args.continue_from).name
    return str(args.name or "critic")


def settings_of(args: argparse.Namespace) -> TrainSettings:
    """The settings that flags make.

    Raises:
        TrainingError: they contradict each other, or one is out of range.
    """
    if args.distribution == "categorical" and args.atoms is None:
        raise TrainingError("--distribution categorical needs --atoms")
    if args.distribution == "bernoulli" and args.atoms is not None:
        raise TrainingError("--atoms is for --distribution categorical")
    given = {k: v for k, v in vars(args).items() if k in TrainSettings.model_fields and v is not None}
    if args.continue_from is not None:
        own = ("backbone", "layers", "head", "atoms", "reward_range", "mlp", "borrow_embeddings", "tokenizer")
        fixed = [field for field in own if given.get(field)]
        if fixed or args.distribution:
            name = (fixed or ["distribution"])[0].replace("_", "-")
            raise TrainingError(f"--{name} is the continued critic's own: leave it out, or start from --base")
        if read_card(args.continue_from).backbone == "reference":
            given["backbone"] = "reference"
    elif given.get("atoms") and "reward_range" not in given:
        given["reward_range"] = (min(given["atoms"]), max(given["atoms"]))
    try:
        return TrainSettings.model_validate(given | {"name": critic_name(args)})
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
        raise TrainingError(flag + first["msg"].removeprefix("Value error, ")) from error


def parser(description: str | None) -> argparse.ArgumentParser:
    """All flags; those of settings have the settings' names and defaults."""
    fields = TrainSettings.model_fields
    made = argparse.ArgumentParser(
        prog="qsharp train", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def number(group: Any, flag: str, kind: type, text: str, field: str | None = None) -> None:
        field = field or flag[2:].replace("-", "_")
        default = fields[field].default
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, dest=field, type=kind, help=text + shown)

    io = made.add_argument_group("data and results")
    io.add_argument("--data", type=Path, nargs="+", required=True, help="Parquet files of rollouts, or folders of them")
    io.add_argument("--out", type=Path, required=True, help="versions are written as OUT/NAME/VERSION")
    io.add_argument("--name", help="of the critic (default: that of --continue, else critic)")
    io.add_argument("--run", type=Path, help="folder of checkpoints and metrics (default: OUT/.runs/NAME)")
    io.add_argument("--resume", action="store_true", help="go on with a killed run; starts one if there is none")
    io.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS", help="(default: %(default)s)")
    io.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write metrics for TensorBoard too")
    io.add_argument("--recommended-eta", type=float, help="written into the card")
    io.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help="of the stored weights")
    io.add_argument("--parent", type=Path, help="critic to compare with (default: --continue's, else the last version)")

    io.add_argument("--features", type=Path, metavar="FOLDER", help="the reference's, kept (default: OUT/.features)")
    io.add_argument("--features-gb", type=float, default=20.0, help="most that it may hold (default: %(default)s)")

    critic = made.add_argument_group("critic")
    critic.add_argument(
        "--backbone",
        choices=("own", "reference"),
        help="reference: no backbone but a head on the hidden states of --base, the reference (default: own)",
    )
    critic.add_argument("--base", help="decoder to start from: a folder or a hub id; with --continue: to borrow from")
    critic.add_argument("--continue", dest="continue_from", type=Path, metavar="CRITIC", help="go on from this version")
    number(critic, "--layers", int, "keep the base's first N layers")
    critic.add_argument("--head", choices=("V", "Q"), help="(default: V)")
    critic.add_argument("--distribution", choices=("bernoulli", "categorical"), help="(default: bernoulli)")
    critic.add_argument("--atoms", type=float, nargs="+", help="rewards that a categorical critic knows, ascending")
    critic.add_argument("--reward-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="(default: the atoms')")
    number(critic, "--mlp", int, "a hidden layer of this width in the head")
    critic.add_argument("--borrow-embeddings", action="store_true", help="keep and do not store the base's embeddings")

    critic.add_argument("--tokenizer", help="whose token ids the rollouts have (default: the base's)")

    chosen = made.add_argument_group("which rollouts")
    number(chosen, "--held-out", float, "fraction of the prompts that only measure")
    chosen.add_argument("--group-by", metavar="KEY", help="split by this entry of the metadata, not by the prompt")
    chosen.add_argument(
        "--drop-uniform-prompts", action="store_true", help="without prompts that always earned the same"
    )
    chosen.add_argument("--mixed-policies", action="store_true", help="accept rollouts of different sampling policies")

    optimisation = made.add_argument_group("optimisation", HEADS_DEFAULTS)
    number(optimisation, "--epochs", int, "passes over the rollouts")
    number(optimisation, "--steps", int, "with --backbone reference, instead of epochs")
    number(optimisation, "--lr", float, "greatest learning rate", "learning_rate")
    number(optimisation, "--batch-tokens", int, "tokens of a step, over all processes")
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
    return made
