"""`qsharp train`: a new version of a critic from rollouts in Parquet files.

    qsharp train --data round-0.parquet --out critics --name sums
    qsharp train --data round-0.parquet --base REFERENCE --weigh nodes --out critics --name sums
    qsharp train --data round-0.parquet --base MODEL --layers 3 --mlp 512 --out critics --name sums
    qsharp train --data round-0.parquet round-1.parquet --continue critics/sums/1 --out critics

Unless flags ask for a decoder (--backbone own, --layers, --head V, …), the critic is a native one: a head on the hidden
states of the reference, --base, which is run once over what is new in the rollouts; what it said is kept in
OUT/.features. Without --base the reference is the model that the server at --url serves.

Steps and learning rate follow from the amount of data, and training ends when held-out rollouts gain nothing more. A
critic that is no better there than a constant is not published, unless --publish-anyway is given.

Several devices: `--launcher "accelerate launch --num_processes 4"`, which is the same as `accelerate launch … -m
trainer.training …` with the other arguments. A killed run goes on with `--resume` and ends with the weights of an
unbroken one. A head alone is trained in a minute or so, and begins again there; what the reference said so far is kept.
"""

import argparse
import asyncio

from trainer.api.base_model import base_of
from trainer.commands import options
from trainer.commands.interruption import until_told
from trainer.commands.training_options import add_arguments, outputs_of, settings_of
from trainer.training.launcher import Launcher, launch, launcher_of
from trainer.training.train import train


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        TrainingError, CriticError
        KeyboardInterrupt: Ctrl-C; with how to go on.
    """
    parser = options.parser("train", __doc__)
    add_arguments(parser)
    options.add_server_arguments(parser, concurrency=None, patience=False)
    options.add_launcher_argument(parser)
    args = parser.parse_args(argv)
    if args.launcher is not None:
        _launched(launcher_of(args.launcher), argv)
        return
    if args.base is not None or args.continue_from is None:
        args.base = base_of(args.base, args.url, args.api_key)
    train(args.data, settings_of(args), outputs_of(args))


def _launched(launcher: Launcher, argv: list[str]) -> None:
    """Runs this command in the processes that a launcher starts."""
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_launcher_argument(only)
    _, rest = only.parse_known_args(argv)
    if not asyncio.run(until_told(launch(launcher, "-m", "trainer.training", *rest))):
        raise KeyboardInterrupt("stopped; the same command with --resume goes on from the last checkpoint")
