"""`qsharp critics`: what `/v1/critics` offers, from the command line."""

import argparse
import os
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from qsharp_core.errors import QSharpError

DEFAULT_URL = "http://localhost:8000"
# A critic's weights are read while the caller waits.
LOAD_TIMEOUT = 600.0


class ServerError(QSharpError):
    """The server refused, or cannot be reached."""


class CriticsClient:
    """A running server's critics.

    Args:
        url: of the server, without `/v1`.
        key: what is sent as bearer token: the admin key for all that changes something.
    """

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=LOAD_TIMEOUT)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON.

        Raises:
            ServerError: with the server's message.
        """
        try:
            response = self._http.request(method, f"/v1/critics{path}", json=body)
        except httpx.HTTPError as error:
            raise ServerError(f"{self._http.base_url} cannot be reached: {error}") from error
        if response.is_error:
            raise ServerError(_message_of(response))
        answer: dict[str, Any] = response.json()
        return answer


def main(argv: list[str]) -> None:
    """Runs one command.

    Raises:
        ServerError
    """
    args = _parser().parse_args(argv)
    client = CriticsClient(args.url, args.admin_key)
    console = Console()
    match args.command:
        case "load":
            path = str(Path(args.path).absolute()) if Path(args.path).exists() else args.path
            body = {"path": path, "name": args.name, "activate": args.activate}
            _say(console, "loaded", client.call("POST", "", body))
        case "activate":
            _say(console, "activated", client.call("POST", f"/{args.name}/activate", {"version": args.version}))
        case "rollback":
            _say(console, "activated", client.call("POST", f"/{args.name}/rollback"))
        case "unload":
            answer = client.call("DELETE", f"/{args.name}/{args.version}")
            when = ", as soon as its requests have ended" if answer["loaded"] else ""
            console.print(f"unloaded [bold]{answer['id']}[/bold]{when}")
        case "score":
            body = {"prompt": args.prompt, "completion": args.completion}
            for entry in client.call("POST", f"/{args.name}/score", body)["data"]:
                console.print(" ".join(f"{value:.4f}" for value in entry["values"]), soft_wrap=True)
        case _:
            console.print(_table(client.call("GET", "")["data"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qsharp critics", description="The critics of a running server.")
    parser.add_argument("--url", default=DEFAULT_URL, help="of the server (default: %(default)s)")
    parser.add_argument(
        "--admin-key",
        default=os.environ.get("QSHARP_ADMIN_KEY"),
        help="needed to load, activate and unload (default: QSHARP_ADMIN_KEY)",
    )
    commands = parser.add_subparsers(dest="command", metavar="list|load|activate|rollback|unload|score")
    commands.add_parser("list", help="show what is loaded (the default)")
    load = commands.add_parser("load", help="load a critic's folder")
    load.add_argument("path", help="on the server's machine")
    load.add_argument("--name", help="call it so, whatever its card says")
    load.add_argument("--activate", action="store_true", help="make it the version that its name means")
    for name, text in (("activate", "make a version the one that its name means"), ("unload", "free a version")):
        command = commands.add_parser(name, help=text)
        command.add_argument("name")
        command.add_argument("version")
    commands.add_parser("rollback", help="activate the version active before").add_argument("name")
    score = commands.add_parser("score", help="expected reward after each token of a completion")
    score.add_argument("name")
    score.add_argument("prompt")
    score.add_argument("completion")
    return parser


def _say(console: Console, what: str, info: dict[str, Any]) -> None:
    console.print(f"{what} [bold]{info['id']}[/bold] ({'active' if info['active'] else 'not active'})")


def _table(critics: list[dict[str, Any]]) -> Table:
    table = Table("critic", "version", "state", "users", "cache blocks", "longest", "path")
    for info in critics:
        state = "leaving" if info["leaving"] else "active" if info["active"] else ""
        table.add_row(
            info["name"] + (" (default)" if info["default"] else ""),
            info["version"],
            state,
            str(info["users"]),
            "none" if info["kv_blocks"] is None else f"{info['kv_blocks_used']} / {info['kv_blocks']}",
            str(info["max_length"]),
            info["path"],
        )
    return table


def _message_of(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        message = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return f"{response.status_code}: {message}"
