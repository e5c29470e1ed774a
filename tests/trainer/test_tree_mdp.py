"""The paper's Figure 4, from logged rollouts to `Q*`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qsharp_core.critic import checkpoint
from qsharp_core.critic.fetching import local_folder
from qsharp_core.critic.model import HeadKind
from qsharp_core.returns import tilt
from tests.support import trainer_data as world
from trainer.experiments.tree_mdp.model import reward_of, token_ids, write_model
from trainer.tasks import tree_mdp
from trainer.tasks.tree_mdp import FIGURE_4, Node
from trainer.training.outputs import Outputs
from trainer.training.settings import TrainSettings
from trainer.training.train import train

IDS = token_ids(FIGURE_4)
ETAS = (0.15, 0.3, 5.0)
"""A reward never seen at a node keeps a probability of some 1e-5 there, which `exp(1 / eta)` multiplies: 22,026 at
`eta = 0.1`. Far smaller `eta` would ask how sure one can be that it cannot happen, which no data of this size tells."""
ROLLOUTS = 1500


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)  # a learning rate that is this large for the test's sake fails from some beginnings
    return write_model(tmp_path_factory.mktemp("tree"))


def paths(node: Node = FIGURE_4, before: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """Each node's tokens, root included."""
    here = (*before, node.name)
    found = {node.name: [IDS[n] for n in here]}
    for child in node.children:
        found |= paths(child, here)
    return found


def test_the_model_has_the_law_of_the_tree(model: Path) -> None:
    assert AutoTokenizer.from_pretrained(model)("root right win").input_ids == [IDS["root"], IDS["right"], IDS["win"]]
    language_model = AutoModelForCausalLM.from_pretrained(model)
    for node in FIGURE_4.nodes():
        with torch.inference_mode():
            law = language_model(torch.tensor([paths()[node.name]])).logits[0, -1].softmax(-1)
        expected = torch.zeros(len(IDS))
        for child in node.children:
            expected[IDS[child.name]] = child.chance
        if not node.children:
            expected[IDS[tree_mdp.END]] = 1.0
        torch.testing.assert_close(law, expected, atol=1e-6, rtol=1e-5)


def test_what_is_optimal() -> None:
    nodes = {n.name: n for n in FIGURE_4.nodes()}
    for eta in ETAS:
        expected = eta * np.log(0.05 * np.exp(1 / eta) + 0.95)
        assert nodes["right"].optimal_q(eta) == pytest.approx(expected)
        assert nodes["left"].optimal_q(eta) == pytest.approx(0.1)
        root = eta * np.log(0.5 * np.exp(0.1 / eta) + 0.5 * np.exp(expected / eta))
        assert FIGURE_4.optimal_q(eta) == pytest.approx(root)
    assert [nodes["left"].mean(), nodes["right"].mean()] == pytest.approx([0.1, 0.05])
    assert reward_of(FIGURE_4, [IDS["right"], IDS["win"], IDS["<end>"]]) == 1.0
    assert reward_of(FIGURE_4, [IDS["right"]]) is None


def test_guidance_in_closed_form() -> None:
    """Against a sum over the tree's three paths."""
    for eta in (0.1, 0.3, 5.0):
        q = {n.name: n.optimal_q(eta) for n in FIGURE_4.nodes()}
        weights = {"sure": 0.5 * np.exp(0.1 / eta), "win": 0.025 * np.exp(1 / eta), "lose": 0.475}
        rewards, total = {"sure": 0.1, "win": 1.0, "lose": 0.0}, sum(weights.values())
        law = {name: weight / total for name, weight in weights.items()}  # ref(path) exp(r / eta) / Z
        ref = {"sure": 0.5, "win": 0.025, "lose": 0.475}
        found = tree_mdp.guided(FIGURE_4, eta, "qsharp")
        assert found.value == pytest.approx(sum(law[name] * rewards[name] for name in law))
        assert found.kl == pytest.approx(sum(law[name] * np.log(law[name] / ref[name]) for name in law))
        assert found.value - eta * found.kl == pytest.approx(q["root"])  # what Q-sharp maximises
        assert tree_mdp.guided(FIGURE_4, eta, "cd").value - eta * tree_mdp.guided(FIGURE_4, eta, "cd").kl <= q["root"]
    assert tree_mdp.guided(FIGURE_4, 0.005, "cd").value == pytest.approx(0.1, abs=1e-3)
    assert tree_mdp.guided(FIGURE_4, float("inf"), "cd") == tree_mdp.Guided(FIGURE_4.mean(), 0.0)


@pytest.mark.parametrize("head", ["V", "Q"])
def test_a_trained_critic_gives_q_star_at_every_node(model: Path, tmp_path: Path, head: HeadKind) -> None:
    dice = np.random.default_rng(0)
    rows = []
    for i in range(ROLLOUTS):
        node, completion = FIGURE_4, []
        while node.children:
            node = node.children[dice.choice(len(node.children), p=[c.chance for c in node.children])]
            completion.append(IDS[node.name])
        completion.append(IDS[tree_mdp.END])
        rows.append(world.row(f"r{i}", [IDS["root"]], completion, reward_of(FIGURE_4, completion)))
    settings = TrainSettings(
        base=str(model), head=head, atoms=(0.0, 0.1, 1.0), held_out=0.0, epochs=120, learning_rate=0.03,
        batch_tokens=100_000, weight_decay=0.0, clip=10.0,
    )  # fmt: skip
    file = world.write(tmp_path / "data.parquet", rows)
    folder = train([file], settings, Outputs(out=tmp_path / "out", run=tmp_path / "run"))
    _, critic = checkpoint.load(local_folder(folder))

    wins = [r["reward"] for r in rows if r["completion_token_ids"][0] == IDS["right"]]
    rate = float(np.mean([z == 1.0 for z in wins]))
    error = (0.05 * 0.95 / len(wins)) ** 0.5
    assert abs(rate - 0.05) < 4 * error
    q: dict[tuple[str, float], float] = {}
    for eta in ETAS:
        for node in list(FIGURE_4.nodes())[1:]:
            with torch.inference_mode():
                outputs = critic(torch.tensor([paths()[node.name]]))[0, -1]
            q[node.name, eta] = eta * tilt(critic.distribution, outputs, eta).item()
            # dQ*/dp at p = 0.05 times four standard errors of p, and what is left of the optimisation.
            slope = eta * (np.exp(1 / eta) - 1) / (0.05 * np.exp(1 / eta) + 0.95) if node.name == "right" else 0.0
            assert abs(q[node.name, eta] - node.optimal_q(eta)) < 4 * error * slope + 0.02, (node.name, eta)
    means = {
        name: critic.distribution.mean(critic(torch.tensor([paths()[name]]))[0, -1]).item()
        for name in ("left", "right")
    }
    assert means["left"] > means["right"]  # Controlled Decoding turns left
    assert q["right", 0.15] > q["left", 0.15]  # the optimal policy right, where the reward matters
    assert q["right", 5.0] < q["left", 5.0]  # and left, where it hardly does
