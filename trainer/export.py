"""`qsharp export`: stored rollouts as one Parquet file, which `datasets`, pandas and `qsharp train` read.

qsharp export --out round-0.parquet --metadata qsharp_round=0 --has-reward true
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential
from tqdm import tqdm

from trainer import client
from trainer.client import PassingError, ServerError, check


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        ServerError
    """
    args = _parser().parse_args(argv)
    query = client.filters_of(args)
    if args.has_reward is not None:
        query["has_reward"] = args.has_reward
    if args.model is not None:
        query["model"] = args.model
    rows = export(args.url, args.out, query, key=args.api_key, patience=args.patience)
    Console().print(f"{rows} rollouts in {args.out}", highlight=False)


def export(url: str, out: Path, query: Mapping[str, str], *, key: str | None = None, patience: float = 600.0) -> int:
    """Writes the file whole or not at all; an older one of that name stays until then.

    Args:
        query: filters of `GET /v1/rollouts`.

    Returns:
        How many rollouts it holds.

    Raises:
        ServerError
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    trying = Retrying(
        retry=retry_if_exception_type(PassingError), wait=wait_random_exponential(0.5, client.LONGEST_WAIT),
        stop=stop_after_delay(patience), reraise=True,
    )  # fmt: skip
    try:
        rows: int = trying(_download, url, part, query, key)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return rows


def _download(url: str, part: Path, query: Mapping[str, str], key: str | None) -> int:
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with (
            httpx.stream("GET", f"{base}/v1/rollouts/export", params=query, headers=headers, timeout=300) as response,
            part.open("wb") as file,
            tqdm(unit="B", unit_scale=True, desc="export") as bar,
        ):
            if response.is_error:
                response.read()
            check(base, response)
            for piece in response.iter_bytes():
                file.write(piece)
                bar.update(len(piece))
            file.flush()
            os.fsync(file.fileno())
    except httpx.TransportError as error:
        raise PassingError(f"{base} did not send the file: {type(error).__name__} {error}") from error
    try:
        return pq.read_metadata(part).num_rows
    except (pa.ArrowException, OSError) as error:
        raise ServerError(f"{base} did not send a whole Parquet file: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsharp export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.parquet")
    client.add_filter_arguments(parser)
    parser.add_argument("--has-reward", choices=["true", "false"])
    parser.add_argument("--model", help="sampled from this one")
    client.add_arguments(parser, concurrency=None)
    return parser
