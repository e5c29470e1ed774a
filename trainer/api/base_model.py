"""The model that a critic starts from, as `--base` names it: a folder, a hub id, or the name of a served model."""

from pathlib import Path

from trainer.api.calling import run
from trainer.rollouts.client import ServerClient
from trainer.rollouts.errors import RequestError
from trainer.training.settings import TrainingError


async def resolved_base(server: ServerClient, named: str | None) -> str:
    """The folder or hub id of a base.

    Args:
        server: knows where the models are that it serves.
        named: what `--base` says; None is the first model that is served.

    Raises:
        TrainingError: the served model's folder is not on this machine.
        RequestError: the server has to be asked, and does not answer.
    """
    if named is not None and Path(named).is_dir():
        return named
    served = (await server.get("/v1/models"))["data"]
    model = next((one for one in served if named in (None, one["id"])), None)
    if model is None:
        assert named is not None
        return named  # of the hub, then
    root = model.get("root")
    if root is None or (Path(root).is_absolute() and not Path(root).is_dir()):
        raise TrainingError(f"the served model ({root}) is not here: say where critics start, --base MODEL")
    return str(root)


def base_of(named: str | None, url: str, key: str | None) -> str:
    """`resolved_base` for a command that needs a server for nothing else: where none runs, the name is taken as it is.

    Raises:
        TrainingError: none is named, and no server can be asked which model it serves.
    """

    async def asked() -> str:
        async with ServerClient(url, key=key, patience=0) as server:
            return await resolved_base(server, named)

    if named is not None and Path(named).is_dir():
        return named
    try:
        return run(asked())
    except RequestError as error:
        if named is not None:
            return named
        raise TrainingError(
            f"say which model the rollouts are of: --base, a folder, a hub id or a served model's name ({error})"
        ) from error
