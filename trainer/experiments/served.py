"""The server that a recipe samples through: one that it starts, or one that runs already."""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from trainer.experiments.fields import ServerFields
from trainer.rollouts.client import ServerClient
from trainer.rollouts.errors import RequestError
from trainer.serving import serving


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        client: has the admin key.
        model: the name that the model is served under.
        root: the model's folder or hub id.
    """

    client: ServerClient
    model: str
    root: str


@asynccontextmanager
async def opened(
    model: str | None, fields: ServerFields, folder: Path, console: Console, critic: Sequence[str] = ("--no-critic",)
) -> AsyncIterator[Served]:
    """A server with a rollout store in `folder`, or the one that runs at `fields.url`.

    Args:
        model: a folder or a hub id; None is the default model.
        fields: the recipe's.
        folder: the recipe's.
        console: is told that the server starts.
        critic: flags of `qsharp serve` that say which critics it starts with.

    Raises:
        ServingError: the server does not start.
        RequestError
    """
    if fields.url is not None:
        async with _client(fields.url, fields.admin_key, fields) as served:
            yield served
        return
    key = secrets.token_hex(16)
    flags = [
        *([model] if model else []), *(critic if model is None or "--no-critic" not in critic else []),
        "--admin-key", key, "--rollouts", f"sqlite:///{(folder / 'rollouts.db').absolute()}",
        "--critic-root", str(folder), "--max-num-seqs", str(fields.concurrency), *fields.flags,
    ]  # fmt: skip
    console.print(f"starting the server of {model or 'the default model'}: {folder / 'server.log'}", highlight=False)
    async with serving(flags, folder / "server.log", fields.patience) as url, _client(url, key, fields) as served:
        yield served


@asynccontextmanager
async def _client(url: str, key: str | None, fields: ServerFields) -> AsyncIterator[Served]:
    async with ServerClient(url, key=key, connections=fields.concurrency) as client:
        model = (await client.get("/v1/models"))["data"][0]
        if model.get("root") is None:
            raise RequestError(f"{url} does not tell where its model is: it must be a qsharp server of this version")
        yield Served(client, model["id"], model["root"])
