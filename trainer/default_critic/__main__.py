"""The two commands, `rollouts` and `train`."""

import argparse
import os
from pathlib import Path

import torch

import trainer.default_critic
from trainer.default_critic.sampling import collect
from trainer.default_critic.training import TrainSettings, train


def arguments() -> argparse.ArgumentParser:
    """The parser of both commands."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.default_critic",
        description=trainer.default_critic.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "rollouts": "sample and score the reference's answers; resumes where the file ends",
        "train": "train a critic on the rollouts",
    }
    rollouts, training = (
        commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name, text in helps.items()
    )
    rollouts.add_argument("--samples", type=int, default=16, help="whole rollouts of each problem")
    rollouts.add_argument("--branches", type=int, default=16, help="rollouts of each problem that leave these")
    rollouts.add_argument("--rows", type=int, default=128, help="rollouts sampled at a time")

    training.add_argument("--output", type=Path, required=True, help="critic folder to write")
    training.add_argument("--version", default="1", help="the critic's version")
    training.add_argument("--eta", type=float, default=0.1, help="recommended eta to write into the card")
    training.add_argument("--layers", type=int, default=3, help="layers taken from the reference")
    training.add_argument("--mlp", type=int, default=512, help="hidden units of the head")
    training.add_argument("--learning-rate", type=float, default=6e-4, help="peak of the cosine schedule")
    training.add_argument("--weight-decay", type=float, default=0.1, help="of AdamW")
    training.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    training.add_argument("--problems", type=int, default=4, help="problems in a step")
    training.add_argument("--rollouts-each", type=int, default=12, help="rollouts of each problem in a step")
    training.add_argument("--hide-question", type=float, default=0.7, help="how often a problem's question is hidden")
    training.add_argument("--hide-token", type=float, default=0.05, help="how often a token is hidden from later ones")
    training.add_argument("--seed", type=int, default=0, help="of initialization and order")

    for command in (rollouts, training):
        command.add_argument("--reference", type=Path, required=True, help="the model's folder")
        command.add_argument(
            "--rollouts", type=Path, default=Path("runs/sums/rollouts.jsonl"), help="JSON-lines file of rollouts"
        )
        command.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's threads")
        command.add_argument(
            "--bfloat16",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="matrix products in bfloat16: several times faster where the CPU has instructions for them",
        )
    return parser


def main() -> None:
    """Run the chosen command."""
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "rollouts":
        dtype = torch.bfloat16 if args.bfloat16 else torch.float32
        collect(args.reference, args.rollouts, args.samples, args.branches, args.rows, dtype)
    else:
        settings = TrainSettings(
            layers=args.layers,
            mlp=args.mlp,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            steps=args.steps,
            problems=args.problems,
            rollouts=args.rollouts_each,
            hide_question=args.hide_question,
            hide_token=args.hide_token,
            bfloat16=args.bfloat16,
            seed=args.seed,
        )
        train(args.reference, args.rollouts, args.output, settings, args.version, args.eta)


if __name__ == "__main__":
    main()
