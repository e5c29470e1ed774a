"""`qsharp export`: stored rollouts as one Parquet file, which `datasets`, pandas and `qsharp train` read.

qsharp export --out round-0.parquet --metadata qsharp_round=0 --has-reward true
"""

from pathlib import Path

from rich.console import Console

from trainer.api.calling import by_flags
from trainer.api.export import export
from trainer.commands import options


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        RequestError
    """
    parser = options.parser("export", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.parquet")
    options.add_filter_arguments(parser)
    parser.add_argument("--has-reward", choices=["true", "false"])
    parser.add_argument("--model", help="sampled from this one")
    options.add_trust_arguments(parser.add_argument_group("trust"))
    options.add_server_arguments(parser, concurrency=None)
    args = parser.parse_args(argv)
    rows = by_flags(export, args=args, tell=options.say)
    Console().print(f"{rows} rollouts in {args.out}", highlight=False)
