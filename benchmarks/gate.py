"""What the gate in front of the app costs a request, beside an app that does nothing.

    python -m benchmarks.gate

The gate has vLLM's real routes to choose from, keys, a rate and a limit of requests at once. Turns with and without it
follow each other; the median of the differences is printed, with the least and the greatest.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")

from starlette.types import Message, Receive, Scope, Send
from vllm.entrypoints.launchers.app import build_app

from server import launch
from server.commands import serve

FLAGS = ["--api-key", "user", "--admin-key", "boss", "--rate-limit", "1000000/second", "--max-concurrent", "1000"]
BODY = b'{"model": "m", "messages": [{"role": "user", "content": "' + b"a question " * 20 + b'"}], "max_tokens": 32}'


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and answers."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})


def request() -> tuple[Scope, Receive, Send]:
    """A chat request of a user."""
    headers = [
        (b"host", b"localhost:8000"), (b"authorization", b"Bearer user"), (b"content-type", b"application/json"),
        (b"content-length", str(len(BODY)).encode()), (b"user-agent", b"OpenAI/Python 2.0"), (b"accept", b"*/*"),
    ]  # fmt: skip
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
        "query_string": b"", "root_path": "", "headers": headers,
    }  # fmt: skip
    messages: list[Message] = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    return scope, receive, send


async def seconds(app: Callable[[Scope, Receive, Send], Awaitable[None]], count: int) -> float:
    """Seconds of a request, the mean over so many."""
    began = time.perf_counter()
    for _ in range(count):
        await app(*request())
    return (time.perf_counter() - began) / count


async def differences(gate: Any, turns: int, count: int) -> list[float]:
    """Microseconds that the gate adds, in each turn."""
    gate._inner = nothing
    await seconds(gate, count)
    return [1e6 * (await seconds(gate, count) - await seconds(nothing, count)) for _ in range(turns)]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--requests", type=int, default=2000, help="of a turn")
    args = parser.parse_args()
    launch.allow_plugin()
    app = build_app(serve.parse(["model", *FLAGS]), ("generate",), None)
    found = asyncio.run(differences(app.build_middleware_stack(), args.turns, args.requests))
    print(
        f"the gate adds {statistics.median(found):.0f} microseconds to a request "
        f"({min(found):.0f} to {max(found):.0f}, n = {len(found)})"
    )


if __name__ == "__main__":
    main()
