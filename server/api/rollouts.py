"""`/v1/rollouts`: lists, counts, shows and deletes stored rollouts, and exports and imports them as Parquet."""

import asyncio
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from qsharp_core.critic.folder import CARD
from qsharp_core.errors import StoreError
from qsharp_core.rollouts import foreign, parquet
from qsharp_core.rollouts.records import Rollout
from server import metrics
from server.access.principal import principal_of
from server.api.bodies import Json, documented
from server.api.queries import DeleteQuery, FilterQuery, PageQuery, parse
from server.api.rewards import PATH, no_rollout
from server.api.uploads import receive
from server.critics.catalog import CriticCatalog
from server.errors import NotFoundError
from server.state import state_of
from server.store.filters import Filters
from server.store.rollouts import RolloutStore


class ImportResult(BaseModel):
    """The answer of `POST /v1/rollouts/import`: how many rollouts were new, and how many were stored already."""

    object: Literal["rollouts.import"] = "rollouts.import"
    imported: int
    skipped: int


class DeleteResult(BaseModel):
    """The answer of `DELETE /v1/rollouts`.

    Attributes:
        deleted: how many rollouts.
        until: when the last of them was made, in seconds since the epoch; None if there was none. To go on, send it as
            `created_after`.
        has_more: whether there may be further ones.
    """

    object: Literal["rollouts.deleted"] = "rollouts.deleted"
    deleted: int
    until: float | None
    has_more: bool


router = APIRouter(prefix=PATH)


@router.get("")
async def list_rollouts(request: Request) -> Response:
    """Lists rollouts in the order in which they were stored.

    The query's filters are `critic`, `guided`, `has_reward`, `has_valid_position`, `model`, `owner`, `rewarded_by`,
    `reward_source`, `created_after`, `created_before`, `rewarded_after`, `trained` and `metadata.KEY`; `after`, `limit`
    and `order` choose the page.
    """
    store, query = state_of(request).store, parse(request, PageQuery)
    filters = await _filters(request, query)
    return await asyncio.to_thread(_page, store, query, filters, principal_of(request).sees)


@router.get("/count")
async def count(request: Request) -> Json:
    """How many rollouts the query's filters leave.

    `last_reward` is the place of the last reward before that: with it as `rewarded_after` a later count has only what
    got its first reward since. It is null for those who do not see all rollouts.
    """
    store, owner = state_of(request).store, principal_of(request).sees
    filters = await _filters(request, parse(request, FilterQuery))
    last = None if owner is not None else await asyncio.to_thread(store.last_reward)
    number = await asyncio.to_thread(store.count, filters, owner=owner)
    return {"object": "rollouts.count", "count": number, "last_reward": last}


@router.delete("")
async def delete_rollouts(request: Request) -> DeleteResult:
    """Deletes the oldest `limit` rollouts that were made before `created_before` and that the query's filters leave.

    The admin alone may do this (`server.access.routes`). What may have trained a version that is loaded, or that the
    store's servers are to have, is kept, unless `even_trained` is true.
    """
    store, query = state_of(request).store, parse(request, DeleteQuery)
    filters = await _filters(request, query)
    result = await store.prune(filters, query.limit, owner=principal_of(request).sees)
    return DeleteResult(deleted=result.deleted, until=result.until, has_more=result.more)


@router.get("/export")
async def export(request: Request) -> StreamingResponse:
    """Sends a Parquet file of all rollouts that match the query's filters."""
    store = state_of(request).store
    filters = await _filters(request, parse(request, FilterQuery))
    batches = store.batches(filters, parquet.BATCH, owner=principal_of(request).sees)
    return StreamingResponse(
        parquet.write(batches),  # plain iterators are run in threads
        media_type=parquet.MEDIA_TYPE,
        headers={"Content-Disposition": 'attachment; filename="rollouts.parquet"'},
    )


@router.post(
    "/import",
    openapi_extra=documented({"type": "string", "format": "binary"}, parquet.MEDIA_TYPE),
)
async def import_rollouts(request: Request) -> ImportResult:
    """Stores the rollouts of a Parquet file, the request's body; one whose id is stored already stays as it is.

    The admin alone may do this (`server.access.routes`). The whole file is checked before anything is stored. Rollouts
    for which it names no owner belong to the importer.
    """
    store, owner = state_of(request).store, principal_of(request).name
    with tempfile.TemporaryDirectory(prefix="qsharp-") as folder:
        given, checked = Path(folder) / "given.parquet", Path(folder) / "checked.parquet"
        await receive(request, given, state_of(request).settings.max_import_mib)
        total = await foreign.take(given, checked, owner)
        imported = skipped = 0
        batches = parquet.read(checked, most=parquet.MOST_BYTES)
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            try:
                result = await store.import_all(batch)
            except StoreError as error:
                raise _interrupted(imported, skipped, total) from error
            imported += result.imported
            skipped += result.skipped
            metrics.ROLLOUTS_STORED.inc(result.imported)
    return ImportResult(imported=imported, skipped=skipped)


@router.get("/{rollout_id}")
async def show_rollout(rollout_id: str, request: Request) -> Response:
    """Shows one rollout, with the history of its rewards."""
    store = state_of(request).store
    rollout = await asyncio.to_thread(store.get, rollout_id, owner=principal_of(request).sees)
    if rollout is None:
        raise NotFoundError(no_rollout(rollout_id))
    return _json(as_json(rollout))


def as_json(rollout: Rollout) -> Json:
    """A rollout as JSON's data, as these routes show it."""
    fields = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
    del fields["response"]  # `/v1/chat/completions/{id}` shows it
    fields["sampling"] = {name: getattr(rollout.sampling, name) for name in rollout.sampling.__dataclass_fields__}
    fields["rewards"] = [asdict(reward) for reward in rollout.rewards]
    return {"object": "rollout", **fields}


def attach(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)


async def _filters(request: Request, query: FilterQuery) -> Filters:
    """The query's filters, told of the critics that this server has: those that it was started with may be unknown to
    the store."""
    return await asyncio.to_thread(lambda: query.filters(_last_made(state_of(request).critics.catalog)))


def _last_made(catalog: CriticCatalog) -> float:
    """When the last of these critics was made, in seconds since the epoch; now, where that cannot be told."""
    try:
        return max((os.stat(Path(info.status.path) / CARD).st_mtime for info in catalog.critics.values()), default=0.0)
    except OSError:
        return time.time()


def _page(store: RolloutStore, query: PageQuery, filters: Filters, owner: str | None) -> Response:
    page = store.page(filters, query.after, query.limit, query.order, owner=owner)
    return _json(
        {
            "object": "list",
            "data": [as_json(rollout) for rollout in page.data],
            "first_id": page.data[0].id if page.data else None,
            "last_id": page.data[-1].id if page.data else None,
            "has_more": page.more,
        }
    )


def _json(body: Json) -> Response:
    # FastAPI's encoder would look at every token id in Python, and in the event loop.
    return Response(msgspec.json.encode(body), media_type="application/json")


def _interrupted(imported: int, skipped: int, total: int) -> StoreError:
    return StoreError(
        f"the rollout store failed after {imported + skipped} of the file's {total} rollouts: {imported} were written "
        f"and {skipped} were there before. Send the file again: what is stored is skipped"
    )
