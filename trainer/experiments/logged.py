"""Rollouts of the reference that a server logs: what recipes without rounds learn from."""

from pathlib import Path

from trainer.loop import stages
from trainer.loop.settings import LoopSettings
from trainer.rewards.verifiers import Judge
from trainer.rollouts.client import ServerClient


async def logged(client: ServerClient, judge: Judge, settings: LoopSettings, folder: Path) -> Path:
    """The Parquet file of the rollouts of a loop's first round, with rewards. If it is there, nothing is sampled.

    Raises:
        CollectError, LoopError, RequestError, JournalError, TaskError
    """
    path = folder / stages.ROLLOUTS
    if not path.is_file():  # written whole or not at all
        folder.mkdir(parents=True, exist_ok=True)
        collection = stages.collection_of(settings, 0, None)
        await stages.collect_all(client, settings, collection, folder)
        await stages.reward_all(client, judge, settings, collection)
        await stages.export_all(client, judge, collection, folder)
    return path
