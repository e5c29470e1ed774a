"""Rollouts of the reference, logged by the server: what kinds without rounds learn from."""

from pathlib import Path

from trainer.client import ServerClient
from trainer.loop import stages
from trainer.loop.settings import LoopSettings
from trainer.rewards.verifiers import Judge


async def logged(client: ServerClient, judge: Judge, settings: LoopSettings, folder: Path) -> Path:
    """The Parquet file of a first round's rollouts, with their rewards; what is there is not sampled again.

    Raises:
        CollectError, LoopError, ServerError, JournalError, TaskError
    """
    path = folder / stages.ROLLOUTS
    if not path.is_file():  # written whole or not at all
        folder.mkdir(parents=True, exist_ok=True)
        collection = stages.collection_of(settings, 0, None)
        await stages.collect_all(client, settings, collection, folder)
        await stages.reward_all(client, judge, settings, collection)
        await stages.export_all(client, collection, folder)
    return path
