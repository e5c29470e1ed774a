"""Trainings that take turns in one process and one thread, a step each.

Each runs in a coroutine of its own (`greenlet`), which stops in the middle of the training's loop after every step.
In threads of their own, PyTorch would start a pool of workers for each.
"""

import time
from collections.abc import Callable, Mapping

import torch
from greenlet import greenlet

Pause = Callable[[float], None]
"""To be called after every step, with its loss."""
Training = Callable[[Pause], None]


class Turn:
    """A training that makes a step when it is its turn.

    Args:
        training: the whole training.
        deterministic: whether PyTorch is to use deterministic algorithms, as `qsharp train` has it on CPUs.

    Attributes:
        losses: of the steps that were made.
    """

    def __init__(self, training: Training, deterministic: bool = False) -> None:
        self.losses: list[float] = []
        self._deterministic = deterministic
        self._loop = greenlet(lambda: training(self._pause))
        self._turns = self._loop.parent

    def step(self) -> float:
        """Goes on until the next step is made; returns the seconds that it took."""
        torch.use_deterministic_algorithms(self._deterministic)
        began = time.perf_counter()
        self._loop.switch()
        seconds = time.perf_counter() - began
        torch.use_deterministic_algorithms(False)
        return seconds

    def end(self) -> None:
        """Goes on to the training's end; no step may be left to make."""
        self.step()
        assert self._loop.dead, "there were more steps"

    def _pause(self, loss: float) -> None:
        self.losses.append(loss)
        self._turns.switch()


def by_turns(turns: Mapping[str, Turn], steps: int) -> dict[str, list[float]]:
    """The seconds of each step of each training. Every other time they come in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for step in range(steps):
        for name in [*turns] if step % 2 else [*turns][::-1]:
            seconds[name].append(turns[name].step())
    for turn in turns.values():
        turn.end()
    return seconds
