"""Clients of the session's server, and a server beside it, for tests of what the session's is not started with."""

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.conftest import Server, flags
from trainer.serving import serve

DEFAULT_ETA = 0.05


@pytest.fixture
def url(server: Server) -> str:
    """Of the server that `http` and `client` ask; a module may have another."""
    return server.url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as made:
        yield made


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def other(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that guides by default, with all of vLLM's routes and a store. It may lose its critics."""
    folder = tmp_path_factory.mktemp("other")
    critics = {name: server.critics[name] for name in ("fast", "native")}
    arguments = flags(server.reference, critics, rows=8, blocks=160)
    # With room: its tests send many requests, and none is about memory.
    more = [
        "--default-eta", str(DEFAULT_ETA), "--enable-scale-out", "--rollouts", f"sqlite:///{folder / 'rollouts.db'}",
        "--max-num-batched-tokens", "512", "--additional-config", '{"qsharp": {"beside": true}}',
    ]  # fmt: skip
    with serve([*arguments, *more], folder / "log") as url:
        yield url
