"""Takes in a body that is a file: its size has a limit of its own, and it goes to the disk as it comes."""

import asyncio
from pathlib import Path

from fastapi import Request

from server.access.gate import IDLE_SECONDS, MIB
from server.errors import SlowRequestError, TooLargeError


async def receive(request: Request, path: Path, most_mib: float) -> None:
    """Writes the request's body to a file.

    Raises:
        TooLargeError: it has more than `most_mib` MiB.
        SlowRequestError: it pauses for too long.
    """
    most, size = int(most_mib * MIB), 0
    if int(request.headers.get("content-length", 0)) > most:
        raise _too_large(most_mib)
    stream = request.stream()
    with path.open("wb") as file:
        while True:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    chunk = await anext(stream, None)
            except TimeoutError as error:
                raise SlowRequestError("the file did not arrive in time") from error
            if chunk is None:
                return
            size += len(chunk)
            if size > most:
                raise _too_large(most_mib)
            await asyncio.to_thread(file.write, chunk)


def _too_large(most_mib: float) -> TooLargeError:
    return TooLargeError(f"the file must have at most {most_mib:g} MiB; the server's --max-import-mib sets that")
