"""Stored rollouts as one Parquet file, which `datasets`, pandas and `qsharp train` read."""

import os
from collections.abc import Mapping
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from tenacity import Retrying
from tqdm import tqdm

from qsharp_core.disk import whole_file
from trainer.rollouts.errors import RequestError, TransientError, check, describe
from trainer.rollouts.retrying import Patience


def export(
    url: str,
    out: Path,
    query: Mapping[str, str],
    *,
    key: str | None = None,
    patience: Patience | float | None = None,
    least: int = 0,
) -> int:
    """Writes the file whole or not at all; an older one of that name stays until then.

    Args:
        url: the server's base URL, with or without `/v1`.
        out: the file.
        query: filters of `GET /v1/rollouts`.
        key: sent as the bearer token.
        patience: how long an export is tried that keeps failing; a number is seconds, None the default.
        least: rollouts that there must be; with fewer nothing is written.

    Returns:
        How many rollouts the file holds.

    Raises:
        RequestError
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as part:
        patience = patience if isinstance(patience, Patience) else Patience(patience)
        rows: int = Retrying(**patience.policy())(_download, url, part, query, key, patience)
        if rows < least:
            raise RequestError(f"no stored rollout matches: {out} was not written")
    return rows


def _download(url: str, part: Path, query: Mapping[str, str], key: str | None, patience: Patience) -> int:
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with (
            httpx.stream("GET", f"{base}/v1/rollouts/export", params=query, headers=headers, timeout=300) as response,
            part.open("wb") as file,
            tqdm(unit="B", unit_scale=True, desc="export") as bar,
        ):
            patience.reached = True
            if response.is_error:
                response.read()
            check(base, response)
            for piece in response.iter_bytes():
                file.write(piece)
                bar.update(len(piece))
            file.flush()
            os.fsync(file.fileno())
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise patience.unreachable(base, error) from error
    except httpx.TransportError as error:
        raise TransientError(f"{base} did not send the file: {describe(error)}") from error
    try:
        return pq.read_metadata(part).num_rows
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{base} did not send a whole Parquet file: {error}") from error
