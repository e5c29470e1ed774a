"""Value-guided decoding (Q♯) for notebooks and scripts: `import qsharp`.

    client = qsharp.Client()                                  # of the server at QSHARP_URL, or on this machine
    client.complete("What is 3 + 9 + 1?", eta=0.1, n=4).texts

    qsharp.collect("prompts.jsonl", n=16, state="runs/collect.jsonl")
    qsharp.reward("my_task:verifier", prompts="prompts.jsonl")
    qsharp.export("rollouts.parquet", has_reward=True)
    version = qsharp.train("rollouts.parquet", name="mine")
    client.load_critic(version.folder)
    report = qsharp.evaluate("prompts.jsonl", eta=[0.1, 0.3], out="runs/evaluation", verifier="my_task:verifier")

Each function has the names and defaults of the flags of the command of its name (docs/your-own-task.md).
"""

from typing import TYPE_CHECKING, Any

from qsharp_core.errors import QSharpError

if TYPE_CHECKING:
    from trainer.api.client import Client, Completions
    from trainer.api.collect import collect
    from trainer.api.evaluate import evaluate
    from trainer.api.export import export
    from trainer.api.reward import reward
    from trainer.api.score import score
    from trainer.api.train import TrainedVersion, train
    from trainer.rewards.base import Case
    from trainer.tasks.base import Problem, Task

__all__ = [
    "Case", "Client", "Completions", "Problem", "QSharpError", "Task", "TrainedVersion", "collect", "evaluate",
    "export", "reward", "score", "train",
]  # fmt: skip

# Imported when they are asked for: training loads PyTorch, and a client needs none of it.
_HOMES = {
    "Case": "trainer.rewards.base",
    "Client": "trainer.api.client",
    "Completions": "trainer.api.client",
    "Problem": "trainer.tasks.base",
    "Task": "trainer.tasks.base",
    "TrainedVersion": "trainer.api.train",
    "collect": "trainer.api.collect",
    "evaluate": "trainer.api.evaluate",
    "export": "trainer.api.export",
    "reward": "trainer.api.reward",
    "score": "trainer.api.score",
    "train": "trainer.api.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
