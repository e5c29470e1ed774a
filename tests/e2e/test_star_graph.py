"""Star-Graph behind the real server: a recipe from nothing to its report, at tiny sizes."""

import asyncio
import json
from pathlib import Path

from rich.console import Console

from qsharp_core.critic.checkpoint import read_card
from qsharp_core.rollouts import parquet
from server.store.filters import Filters
from server.store.rollouts import RolloutStore
from trainer.experiments.star_graph.recipe import run
from trainer.experiments.star_graph.settings import StarGraphRecipe
from trainer.rewards.base import Case
from trainer.rewards.builtin import star_graph as verify


def recipe(**changes: object) -> StarGraphRecipe:
    stages = [{"degree": 1, "length": 3, "steps": 2}, {"degree": 2, "length": 3, "steps": 4}]
    return StarGraphRecipe.model_validate(
        {
            "labels": 6,
            "reference": {"model": {"kind": "small", "layers": 1, "mlp": 32}, "curriculum": stages, "batch": 4},
            "critic": {"curriculum": stages, "batch": 4, "fresh": 3, "per_request": 2, "log_every": 2},
            "evaluation": {"problems": 10, "etas": [1.0, 0.1], "methods": ["qsharp", "cd"]},
            **changes,
        }
    )


def test_a_recipe_from_nothing(tmp_path: Path) -> None:
    console = Console(quiet=True)
    found = asyncio.run(run(recipe(), tmp_path, console))
    assert found.model_dump(mode="json") == json.loads((tmp_path / "report.json").read_text())
    assert [(r.method, r.eta) for r in found.results] == [
        ("reference", None), ("qsharp", 1.0), ("qsharp", 0.1), ("cd", 1.0), ("cd", 0.1)
    ]  # fmt: skip
    assert all(r.n == 10 for r in found.results)
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert read_card(tmp_path / "critics" / "star-graph" / "1").recommended_eta == 0.1
    # What it learned from was logged by the server, with rewards, all positions valid.
    trained = json.loads((tmp_path / "critic.json").read_text())
    assert trained["rollouts"] == 6 * 3 * 8
    assert [entry["step"] for entry in trained["log"]] == [2, 4, 6]
    # Again: nothing is done, no server is started.
    (tmp_path / "server.log").unlink()
    assert asyncio.run(run(recipe(), tmp_path, console)) == found
    assert not (tmp_path / "server.log").exists()
    _check_store(tmp_path, trained["rollouts"])


def _check_store(folder: Path, least: int) -> None:
    store = RolloutStore(f"sqlite:///{folder / 'rollouts.db'}")
    stored = [rollout for batch in store.batches(Filters(), parquet.BATCH, owner=None) for rollout in batch]
    store.close()
    rewarded = [rollout for rollout in stored if rollout.reward is not None]
    assert len(rewarded) >= least
    for rollout in rewarded:
        assert rollout.first_valid_position == 0
        assert rollout.reward == verify(Case(completion=rollout.completion_text, prompt=rollout.prompt_text))
