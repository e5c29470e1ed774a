"""The paper's Figure 4 behind the real server: rollouts that it logged, a critic from them, guidance by that critic."""

import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from benchmarks.serving import serve
from qsharp_core import cli
from tests.conftest import ADMIN_KEY
from trainer import tree_mdp
from trainer.training.command import Outputs, train
from trainer.training.settings import TrainSettings
from trainer.tree_mdp import FIGURE_4

ETAS = (0.15, 0.3, 5.0)
ROLLOUTS = 1500
SAMPLES = 100
IDS = tree_mdp.token_ids(FIGURE_4)
NODES = {node.name: node for node in FIGURE_4.nodes()}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the tree; its critic was trained from rollouts that it stored, by the commands that users type."""
    root = tmp_path_factory.mktemp("figure-4")
    model = tree_mdp.write_model(root / "model")
    flags = [
        str(model), "--served-model-name", "tree", "--dtype", "float32", "--enforce-eager", "--max-model-len", "32",
        "--max-num-seqs", "32", "--kv-cache-memory-bytes", "50000000", "--admin-key", ADMIN_KEY,
        "--rollouts", str(root / "rollouts.db"),
    ]  # fmt: skip
    with serve(flags, root / "log") as made:
        to = ["--url", made]
        state, data = root / "collected", root / "rollouts.parquet"
        assert cli.main(["collect", "--task", "tree_mdp", "--n", str(ROLLOUTS), "--state", str(state), *to]) == 0
        assert cli.main(["reward", "--verifier", "task", *to]) == 0
        assert cli.main(["export", "--out", str(data), *to]) == 0
        settings = TrainSettings(
            base=str(model), name="tree", atoms=(0.0, 0.1, 1.0), held_out=0.0, epochs=120, learning_rate=0.03,
            batch_tokens=100_000, weight_decay=0.0, clip=10.0,
        )  # fmt: skip
        critic = train([data], settings, Outputs(out=root / "critics", run=root / "run"))
        answer = httpx.post(
            f"{made}/v1/critics", json={"path": str(critic)}, headers={"Authorization": f"Bearer {ADMIN_KEY}"}
        )
        assert answer.status_code == 200, answer.text
        yield made


def sampled(url: str, eta: float, method: str) -> list[list[dict[str, Any]]]:
    """The tokens of completions, each with what guidance reports of it."""
    body = {
        "model": "tree", "prompt": "root", "n": SAMPLES, "max_tokens": 4, "eta": eta, "seed": 0,
        "guidance": {"method": method, "detail": "tokens"},
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return [choice["guidance"]["tokens"] for choice in answer.json()["choices"]]


def turned_right(completions: list[list[dict[str, Any]]]) -> float:
    """The part of completions that took the right branch."""
    return sum(tokens[0]["token_id"] == IDS["right"] for tokens in completions) / len(completions)


def estimated_q(tokens: list[dict[str, Any]], eta: float) -> float:
    """`Q` of the first token, from `pi = ref · exp((Q - V) / eta)`."""
    first = tokens[0]
    return float(first["value"] + eta * (first["logprob"] - first["ref_logprob"]))


@pytest.mark.parametrize("eta", ETAS)
def test_guidance_has_q_star_at_every_node(url: str, eta: float) -> None:
    completions = sampled(url, eta, "qsharp")
    # Four standard errors of the win's chance among the rollouts that went right, in Q*'s units; and some for the fit.
    win = 4 * math.sqrt(0.05 * 0.95 / (ROLLOUTS / 2))
    slope = eta * math.expm1(1 / eta) / (0.05 * math.exp(1 / eta) + 0.95)
    error = {"root": win * slope + 0.02, "right": win * slope + 0.02}
    seen = set()
    for tokens in completions:
        names = ["root", *(name for token in tokens for name, i in IDS.items() if i == token["token_id"])]
        for name, token in zip(names, tokens, strict=False):  # the value at a node is what its next token's entry has
            if NODES[name].children and token["value"] is not None:
                assert token["value"] == pytest.approx(NODES[name].optimal_q(eta), abs=error.get(name, 0.02)), name
                seen.add(name)
        branch = names[1]
        assert estimated_q(tokens, eta) == pytest.approx(NODES[branch].optimal_q(eta), abs=error.get(branch, 0.02))
        seen.add(branch)
    assert seen >= {"root", "right"} if eta < 1 else seen >= {"root", "left", "right"}


def test_where_the_methods_turn(url: str) -> None:
    ratio = math.exp((NODES["right"].optimal_q(0.15) - NODES["left"].optimal_q(0.15)) / 0.15)
    assert ratio / (1 + ratio) > 0.94
    assert turned_right(sampled(url, 0.15, "qsharp")) > 0.85
    assert turned_right(sampled(url, 0.005, "cd")) < 0.05
