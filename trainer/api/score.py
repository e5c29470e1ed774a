"""`qsharp.score`: what a critic expects of texts."""

from collections.abc import Sequence

from trainer.api.client import Client


def score(
    prompt: str,
    completions: str | Sequence[str],
    *,
    critic: str | None = None,
    url: str | None = None,
    api_key: str | None = None,
) -> list[list[float]]:
    """The reward that a critic expects after each token of completions, `Client.score` without a client.

    Raises:
        RequestError
    """
    return Client(url, api_key).score(prompt, completions, critic)
