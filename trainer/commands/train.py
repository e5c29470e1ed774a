"""`qsharp train`: a new version of a critic from rollouts in Parquet files.

    qsharp train --data round-0.parquet --base MODEL --layers 3 --mlp 512 --out critics --name sums
    qsharp train --data round-0.parquet --backbone reference --base REFERENCE --weigh nodes --out critics --name sums
    qsharp train --data round-0.parquet round-1.parquet --continue critics/sums/1 --out critics

With --backbone reference the critic is a head on the hidden states of the reference, which is run once over what is
new in the rollouts; what it said is kept in OUT/.features.

Several devices: `accelerate launch -m trainer.training …` with the same arguments. A killed run goes on with
`--resume` and ends with the weights of an unbroken one. A head alone is trained in a minute or so, and begins again
there; what the reference said so far is kept.
"""

from trainer.commands import options
from trainer.commands.training_options import add_arguments, outputs_of, settings_of
from trainer.training.train import train


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        TrainingError, CriticError
    """
    parser = options.parser("train", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    train(args.data, settings_of(args), outputs_of(args))
