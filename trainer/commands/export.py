"""`qsharp export`: stored rollouts as one Parquet file, which `datasets`, pandas and `qsharp train` read.

qsharp export --out round-0.parquet --metadata qsharp_round=0 --has-reward true
"""

from pathlib import Path

from rich.console import Console

from trainer.commands import options
from trainer.rollouts.export import export


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
    query = options.filters_of(args)
    query |= {name: value for name in ("has_reward", "model") if (value := getattr(args, name)) is not None}
    trust = options.trust_of(args)
    query |= trust.rollouts | trust.rewards
    rows = export(args.url, args.out, query, key=args.api_key, patience=args.patience)
    Console().print(f"{rows} rollouts in {args.out}", highlight=False)
