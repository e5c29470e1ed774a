"""How many samples may be on their way at once; what is too many is refused at once, as a whole.

Without a limit every request is taken in, and under overload all of them wait until their clients have given up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm import envs

from server.errors import OverloadedError

RETRY_SECONDS = 1
PER_SEQUENCE = 4  # samples that are running or wait, for each that the engine can run at once


class Slots:
    """Counts samples from their admission to the end of their response.

    Args:
        limit: most samples that are on their way.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    @contextmanager
    def take(self, samples: int) -> Iterator[None]:
        """Admits the samples of a request together. One that asks for more than there are may run alone.

        Raises:
            OverloadedError: there is no room for all of them now.
        """
        if self.taken and self.taken + samples > self.limit:
            raise OverloadedError(
                f"the server has {self.taken} samples on their way and takes {self.limit}: this request of {samples} "
                "has to wait for its turn",
                RETRY_SECONDS,
            )
        self.taken += samples
        try:
            yield
        finally:
            self.taken -= samples


def samples_of(request: Any) -> int:
    """How many samples a request for completions asks for: its prompts times `n`, or times what it searches among."""
    prompt: Any = getattr(request, "prompt", None)
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    guidance = request.guidance
    return prompts * max(choices(request.n), (guidance and guidance.samples) or 1)


def choices(n: Any) -> int:
    """How many choices a request's `n` asks for. What vLLM refuses runs no sample, and must not be told to wait."""
    return n if isinstance(n, int) and 1 <= n <= envs.VLLM_MAX_N_SEQUENCES else 1
