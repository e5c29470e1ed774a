"""`qsharp keys`: names who may use a server. The server of `qsharp serve --keys FILE` sees a change within seconds.

qsharp keys add alice              # prints a new key, which nobody can read again
qsharp keys add trainer --admin    # one that may change critics and import rollouts, too
qsharp keys list
qsharp keys revoke alice
"""

import argparse
import datetime
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from server.access import keys

DEFAULT_FILE = "keys.json"


def main(argv: list[str]) -> None:
    """Runs `qsharp keys`.

    Raises:
        ConfigError: the file cannot be read, or the name is taken, unknown or none.
    """
    args = _parser().parse_args(argv)
    if args.action == "add":
        print(keys.add(args.file, args.name, args.admin))
    elif args.action == "revoke":
        keys.revoke(args.file, args.name)
    else:
        table = Table("name", "may", "since")
        for entry in keys.read(args.file).keys:
            since = datetime.datetime.fromtimestamp(entry.created, datetime.UTC)
            table.add_row(entry.name, "everything" if entry.admin else "use", f"{since:%Y-%m-%d %H:%M} UTC")
        Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsharp keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--file",
        type=Path,
        default=Path(os.environ.get("QSHARP_KEYS") or DEFAULT_FILE),
        help="where they are, hashed (QSHARP_KEYS, or %(default)s)",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="make a key, and print it")
    add.add_argument("name", help="of its holder; owns what is stored with it")
    add.add_argument("--admin", action="store_true", help="may change critics, import, and see what others own")
    revoke = actions.add_parser("revoke", help="take a key back")
    revoke.add_argument("name")
    actions.add_parser("list", help="who has a key")
    return parser
