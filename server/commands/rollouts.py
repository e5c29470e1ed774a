"""`qsharp rollouts`: deletes old rollouts of a running server's store, with their rewards.

    qsharp rollouts prune --older-than 30d --dry-run
    qsharp rollouts prune --older-than 30d --owner app --metadata task=sums

What may have trained a version of a critic that is loaded is kept: rollouts with a reward and a position that may be
trained on, from before that version was published. With --even-trained it goes, too.
"""

import argparse
import re
import sys
import time
from collections.abc import Mapping
from datetime import datetime

from pydantic import BaseModel
from rich.console import Console
from tqdm import tqdm

from server.commands.admin import AdminClient, add_server_arguments

PATH = "/v1/rollouts"
SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class _Count(BaseModel):
    count: int


class _Deleted(BaseModel):
    deleted: int
    until: float | None
    has_more: bool


def main(argv: list[str]) -> None:
    """Runs one of the sub-commands.

    Raises:
        AdminError
    """
    args = _parser().parse_args(argv)
    with AdminClient(args.url, args.admin_key) as client:
        _prune(args, client, Console())


def _prune(args: argparse.Namespace, client: AdminClient, console: Console) -> None:
    before = time.time() - args.older_than
    query = {"created_before": repr(before), **_filters(args)}
    old = _count(client, query)
    going = old if args.even_trained else _count(client, query | {"trained": "false"})
    when = datetime.fromtimestamp(before).astimezone().isoformat(" ", "minutes")
    kept = f"; {old - going} older ones are kept: a loaded critic may have been trained on them" if old > going else ""
    if args.dry_run:
        console.print(f"{going} rollouts from before {when} would be deleted{kept}", highlight=False, soft_wrap=True)
        return
    deleted = _delete(client, query | {"even_trained": str(args.even_trained).lower()}, going)
    console.print(f"{deleted} rollouts from before {when} are deleted{kept}", highlight=False, soft_wrap=True)


def _delete(client: AdminClient, query: Mapping[str, str], total: int) -> int:
    """Deletes batch after batch, each from where the one before it ended; returns how many."""
    deleted = 0
    with tqdm(total=total, unit="rollout", desc="deleted", disable=None, file=sys.stderr) as bar:
        while True:
            batch = client.call(_Deleted, "DELETE", PATH, query)
            deleted += batch.deleted
            bar.update(batch.deleted)
            if not batch.has_more:
                return deleted
            query = {**query, "created_after": repr(batch.until)}


def _count(client: AdminClient, query: Mapping[str, str]) -> int:
    return client.call(_Count, "GET", f"{PATH}/count", query).count


def _filters(args: argparse.Namespace) -> dict[str, str]:
    given = {"owner": args.owner, "model": args.model, "critic": args.critic, "has_reward": args.has_reward}
    entries = {f"metadata.{key}": value for key, value in args.metadata}
    return {name: value for name, value in given.items() if value is not None} | entries


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsharp rollouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_arguments(parser)
    commands = parser.add_subparsers(dest="command", metavar="prune", required=True)
    prune = commands.add_parser("prune", help="delete old rollouts, with their rewards")
    prune.add_argument(
        "--older-than", type=duration, required=True, metavar="TIME", help="as 30d: minutes (m), hours, days or weeks"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say how many would go")
    prune.add_argument("--even-trained", action="store_true", help="also what a loaded critic may have been trained on")
    group = prune.add_argument_group("rollouts")
    group.add_argument("--owner", metavar="NAME,…", help="of these holders of keys alone")
    group.add_argument("--metadata", action="append", type=entry, default=[], metavar="KEY=VALUE", help="they have")
    group.add_argument("--model", help="sampled from this one")
    group.add_argument("--critic", help="guided by this one: NAME or NAME@VERSION")
    group.add_argument("--has-reward", choices=["true", "false"])
    add_server_arguments(prune, again=True)
    return parser


def duration(text: str) -> float:
    """Parses a time such as `30d`, in seconds; a type of argparse."""
    match = re.fullmatch(r"([0-9]{1,6})([mhdw])", text, re.ASCII)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 1 with m, h, d or w for minutes, hours, days or weeks, as 30d; got {text!r}"
        )
    return float(int(match[1]) * SECONDS[match[2]])


def entry(text: str) -> tuple[str, str]:
    """Parses `KEY=VALUE`; a type of argparse."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE; got {text!r}")
    return key, value
