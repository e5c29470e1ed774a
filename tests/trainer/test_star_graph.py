"""Star-Graph: graphs, tokenizer, rows that share a prompt, both trainings, the recipes."""

import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers.decoders import DecodeStream
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.support.models import tokenizer as character_tokenizer
from trainer.experiments import files
from trainer.experiments.star_graph import critic as critics
from trainer.experiments.star_graph import model, reference, report, rows
from trainer.experiments.star_graph.optimizer import OptimizerSpec, optimizers
from trainer.experiments.star_graph.settings import StarGraphRecipe
from trainer.rewards.base import Case
from trainer.rewards.verifiers import load
from trainer.tasks.registry import find_task
from trainer.tasks.star_graph import Shape, as_text, draw, star_graph_task

CPU = torch.device("cpu")
RECIPES = [name for name in files.built_in() if name.startswith("star-graph")]
SMALL = model.SmallModel(layers=2, width=64, mlp=64, positions=64)

shapes = st.builds(
    lambda degree, length, more: Shape(degree=degree, length=length, labels=2 + degree * (length - 1) + more),
    st.integers(1, 6), st.integers(2, 8), st.integers(0, 30),
)  # fmt: skip


@given(shapes, st.text(max_size=5))
def test_a_graph_is_a_star(shape: Shape, seed: str) -> None:
    graph = draw(shape, seed)
    assert graph == draw(shape, seed)
    nodes = [node for arm in graph.arms for node in arm[1:]] + [graph.arms[0][0]]
    assert len(nodes) == len(set(nodes)) == shape.nodes
    assert all(0 <= node < shape.labels for node in nodes)
    assert {arm[0] for arm in graph.arms} == {graph.arms[0][0]}
    assert {len(arm) for arm in graph.arms} == {shape.length}
    assert sorted(graph.edges) == sorted(edge for arm in graph.arms for edge in pairwise(arm))
    edges, ends = graph.prompt.removesuffix("=").split("/")
    assert [tuple(map(int, edge.split(","))) for edge in edges.split("|")] == list(graph.edges)
    assert ends == f"{graph.arms[0][0]},{graph.arms[graph.right][-1]}"


def test_what_is_drawn_is_uniform() -> None:
    graphs = [draw(Shape(), str(i)) for i in range(4000)]
    for seen, kinds in (
        (Counter(g.right for g in graphs), 5),
        (Counter(g.arms[0][0] for g in graphs), 25),
        (Counter(g.edges.index((g.arms[0][0], g.arms[0][1])) for g in graphs), 20),
    ):
        assert len(seen) == kinds
        expected = len(graphs) / kinds
        assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in seen.values())


def test_a_shape_needs_labels() -> None:
    with pytest.raises(ValidationError, match=r"labels must be at least 21.*G\(5,5\).*got 20"):
        Shape(degree=5, length=5, labels=20)


def test_the_task_and_its_verifier() -> None:
    task = find_task("star_graph")
    train, held_out = task.of_split("train"), task.of_split("held_out")
    assert len(held_out) >= 1000
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    small = star_graph_task(Shape(degree=2, length=3, labels=6), problems=3)
    assert [p.id for p in small.of_split("held_out")] == ["held_out-0", "held_out-1", "held_out-2"]
    verify = load("star_graph")
    assert task.reward is not None
    for problem, graph in ((p, draw(Shape(), p.id)) for p in held_out[:50]):
        assert problem.answer == graph.path
        for i, arm in enumerate(graph.arms):
            text = as_text(arm)
            assert task.reward(problem, text) == float(i == graph.right)
            assert verify(Case(completion=text, prompt=graph.prompt)) == float(i == graph.right)
        path = graph.arms[graph.right]
        for wrong in (path[1:], path[:-1], path[::-1], (path[0], path[-1]), (*path[:2], path[1], *path[2:])):
            assert task.reward(problem, as_text(wrong)) == 0


def test_a_token_a_node(tmp_path: Path) -> None:
    made = model.node_tokenizer(25)
    made.save_pretrained(tmp_path)
    tokens = AutoTokenizer.from_pretrained(tmp_path)
    for i in range(20):
        graph = draw(Shape(), str(i))
        prompt, path = tokens(graph.prompt)["input_ids"], tokens(graph.path)["input_ids"]
        assert len(prompt) == 3 * len(graph.edges) + 3
        assert tokens.decode(prompt) == graph.prompt
        assert len(path) == 5
        assert tokens.decode(path) == graph.path
        assert tokens.decode([*path, tokens.eos_token_id], skip_special_tokens=True) == graph.path
        # As vLLM does it: token by token, after the end of the prompt.
        stream = DecodeStream(prompt[-4:], skip_special_tokens=True)
        backend = tokens.backend_tokenizer
        pieces = [stream.step(backend, token) or "" for token in [*path, tokens.eos_token_id]]
        assert "".join(pieces) == graph.path
    assert tokens.pad_token_id not in tokens(graph.prompt)["input_ids"]
    assert tokens("25,x/1")["input_ids"][:2] == [tokens.pad_token_id] * 2


@pytest.fixture(scope="module")
def small() -> tuple[Any, PreTrainedTokenizerFast]:
    made, tokens = model.build(SMALL, 12, seed=0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # so that a wrong mask would show
    return made.eval(), tokens


def test_branches_are_as_if_run_alone(small: tuple[Any, PreTrainedTokenizerFast]) -> None:
    made, tokens = small
    rng = random.Random(0)
    ids = lambda low, high: [rng.randrange(2, len(tokens)) for _ in range(rng.randint(low, high))]  # noqa: E731
    prompts = [ids(3, 9) for _ in range(5)]
    branches = [[ids(1, 6) for _ in range(rng.randint(1, 4))] for _ in prompts]
    critic = critics.fresh_critic(made)
    torch.nn.init.normal_(critic.head.weight)
    with torch.no_grad():
        found = rows.rows_of(prompts, branches, CPU)
        outputs = critics.outputs_of(critic, found)
        for b, (prompt, own) in enumerate(zip(prompts, branches, strict=True)):
            for number, branch in enumerate(own, 1):
                alone = critic(torch.tensor([[*prompt, *branch]]))[0, len(prompt) :]
                torch.testing.assert_close(outputs[b][found.branch[b] == number], alone, atol=1e-4, rtol=1e-4)


def test_the_loss_of_tokens_further_on() -> None:
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(4, 7), torch.randn(2, 5, 4)
    judged = torch.tensor([[-100, -100, 3, 1, 0], [-100, 6, 2, -100, -100]])
    for ahead in (1, 2):
        terms = [
            -head(hidden[b, s]).log_softmax(-1)[judged[b, s + ahead]]
            for b in range(2) for s in range(5 - ahead) if judged[b, s + ahead] >= 0
        ]  # fmt: skip
        assert reference.loss_of(head, hidden, judged, ahead).item() == pytest.approx(sum(terms).item() / len(terms))


def test_only_paths_are_judged() -> None:
    tokens = model.node_tokenizer(12)
    shape = Shape(degree=2, length=3, labels=12)
    drawn = list(reference.batches(tokens, [(shape, 3)], 4, seed=0, graphs=6))
    assert len(drawn) == 3
    for _, ids, judged in drawn:
        where = judged != reference.IGNORED
        assert (where.sum(1) == 4).all()
        assert (ids[where] == judged[where]).all()
        assert (ids[:, -1] == tokens.eos_token_id).all()
    assert (drawn[0][1][:2] == drawn[1][1][2:]).all()  # the seventh graph is the first again
    assert not (drawn[0][1][:2] == drawn[1][1][:2]).all()


def test_muon_is_for_the_layers_matrices() -> None:
    made, _ = model.build(SMALL, 12, seed=0)
    adamw, muon = optimizers(made.base_model, [made], OptimizerSpec())
    matrices = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in made.named_parameters() if id(p) in matrices}
    assert names == {name for name, p in made.named_parameters() if ".layers." in name and p.ndim == 2}
    others = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert others | matrices == {id(p) for p in made.parameters()}
    assert not others & matrices
    spec = OptimizerSpec(warmup=0.1, cooldown=0.5)
    assert [round(spec.factor(x), 2) for x in (0.05, 0.1, 0.5, 0.75, 0.999)] == [0.51, 1.0, 1.0, 0.5, 0.0]


def test_a_reference_learns_a_graph_of_one_arm() -> None:
    """Where there is nothing to choose, the path can be told: its loss goes to zero."""
    made, tokens = model.build(SMALL, 6, seed=0)
    log = reference.train(
        made, tokens, [(Shape(degree=1, length=2, labels=6), 300)], batch=32, heads=1, weight=0.5,
        optimizer=OptimizerSpec(learning_rate=1e-2, other_learning_rate=3e-3), device=CPU,
    )  # fmt: skip
    assert [entry.step for entry in log.log] == [100, 200, 300]
    assert log.log[-1].next < 0.05 < log.log[0].next


def test_a_reference_goes_on_where_its_training_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LOGGED", 10)
    monkeypatch.setattr(reference, "KEPT", 0)
    stages = [(Shape(degree=1, length=2, labels=6), 13), (Shape(degree=1, length=3, labels=6), 15)]
    killed_at = random.Random().randint(1, 28)

    def trained(checkpoint: Path | None) -> tuple[Any, list[report.ReferenceEntry]]:
        made, tokens = model.build(SMALL, 6, seed=0)
        log = reference.train(
            made, tokens, stages, batch=2, heads=1, weight=0.5, optimizer=OptimizerSpec(), device=CPU,
            checkpoint=checkpoint,
        )  # fmt: skip
        return made, log.log

    calls = 0

    def killed(shape: Shape, seed: str) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * killed_at:
            raise KeyboardInterrupt
        return draw(shape, seed)

    whole, log = trained(None)
    monkeypatch.setattr(reference, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "reference.pt")
    resumed, again = trained(tmp_path / "reference.pt")
    assert calls - 2 * killed_at == 2 * (28 - (killed_at - 1) // 10 * 10), killed_at
    assert again == log
    assert [entry.step for entry in log] == [10, 20, 28]
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name]), (killed_at, name)


def test_a_critic_learns_what_a_first_node_is_worth() -> None:
    """Rollouts are right if they begin with the prompt's first node: to be told by a look back."""
    made, _ = model.build(SMALL, 12, seed=0)
    rng = random.Random(0)

    def drawn() -> critics.GraphRollouts:
        prompt = rng.sample(range(4, 16), 3)
        first = rng.sample(prompt, 3)
        return critics.GraphRollouts(
            prompt, [[node, 0] for node in first], [float(node == prompt[0]) for node in first]
        )

    critic = critics.fresh_critic(made)
    learner = critics.CriticTrainer(critic, OptimizerSpec(learning_rate=1e-2, other_learning_rate=3e-3), 150, CPU)
    with torch.no_grad():
        first = learner.loss([drawn() for _ in range(64)]).item()
    assert first == pytest.approx(math.log(2))  # a fresh head does not steer
    for _ in range(150):
        learner.step([drawn() for _ in range(32)])
    with torch.no_grad():
        assert learner.loss([drawn() for _ in range(64)]).item() < 0.1
    assert made.base_model is not critic.backbone


def test_the_buffer_forgets_the_oldest() -> None:
    buffer = critics.Buffer(3)
    made = [critics.GraphRollouts([i], [[i]], [1.0]) for i in range(5)]
    buffer.add(made)
    assert len(buffer) == 3
    assert {r.prompt[0] for r in buffer.draw(100)} == {2, 3, 4}


class Numbers(torch.nn.Module):
    """A backbone whose hidden states are the tokens' ids."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=input_ids[..., None].expand(-1, -1, 64).float())


def test_which_arm_scores_highest() -> None:
    """A critic that scores nodes by their number, and graphs whose right arm begins with the greatest, or does not."""
    made, tokens = model.build(SMALL, 12, seed=0)
    critic = critics.fresh_critic(made)
    graphs = [draw(Shape(degree=3, length=3, labels=12), str(i)) for i in range(40)]
    critic.backbone = Numbers()
    torch.nn.init.ones_(critic.head.weight)
    wanted = sum(max(g.arms, key=lambda arm: arm[1]) == g.arms[g.right] for g in graphs) / len(graphs)
    assert 0 < wanted < 1
    assert critics.right_arm(critic, tokens, graphs, CPU) == pytest.approx(wanted)


def test_the_least_kl() -> None:
    assert report.least_kl(0.2, 0.2) == pytest.approx(0)
    assert report.least_kl(1.0, 0.2) == pytest.approx(math.log(5))
    assert report.least_kl(0.6, 0.2) == pytest.approx(0.6 * math.log(3) + 0.4 * math.log(0.5))


def recipe_of(name: str | Path) -> StarGraphRecipe:
    settings = files.load(str(name)).settings
    assert isinstance(settings, StarGraphRecipe)
    return settings


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_read_and_train(name: str, tmp_path: Path) -> None:
    """Each file's own models, curricula and optimizers, cut to a few steps; a pretrained base is a tiny GPT-2 here."""
    recipe = recipe_of(name)
    assert recipe.evaluation.problems >= 1000
    assert len(recipe.evaluation.etas) >= 6
    spec = recipe.reference.model
    if isinstance(spec, model.PretrainedModel):
        assert spec.base.startswith("openai-community/gpt2")
        config = AutoConfig.for_model("gpt2", vocab_size=192, n_embd=32, n_layer=1, n_head=1, n_positions=512)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        character_tokenizer().save_pretrained(tmp_path)
        spec = spec.model_copy(update={"base": str(tmp_path)})
    made, tokens = model.build(spec, recipe.labels, recipe.seed)
    settings = recipe.reference
    stages = [(recipe.shape_of(stage), 2) for stage in settings.curriculum]
    log = reference.train(
        made, tokens, stages, batch=2, heads=settings.heads, weight=settings.weight, optimizer=settings.optimizer,
        device=CPU, graphs=settings.graphs,
    )  # fmt: skip
    assert math.isfinite(log.log[-1].next)
    critic = critics.fresh_critic(made)
    learner = critics.CriticTrainer(critic, recipe.critic.optimizer, 2, CPU)
    graph = draw(recipe.shape, "0")
    own = tokens([as_text(arm) for arm in graph.arms])["input_ids"]
    rollouts = critics.GraphRollouts(
        tokens(graph.prompt)["input_ids"], own, [float(i == graph.right) for i in range(len(own))]
    )
    losses = [learner.step([rollouts]) for _ in range(2)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert math.isfinite(losses[1])
    assert 0 <= critics.right_arm(critic, tokens, [graph], CPU) <= 1


def test_there_are_four_recipes() -> None:
    shapes = {str(recipe_of(name).shape) for name in RECIPES}
    assert len(RECIPES) == 4
    assert shapes == {"G(2,5)", "G(5,5)", "G(3,8)"}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('kind = "star_graph"\nlabel = 3', "label: there is no such field"),
        ('kind = "star_graph"\nlabels = 20', "labels must be at least 21"),
        ('kind = "star_graph"\n[critic]\nbatch = 4\nfresh = 5', "fresh must be at most batch, 4; got 5"),
        ('kind = "star_graph"\n[reference]\ncurriculum = [{degree = 2, length = 5, steps = 1}]', "must end with"),
    ],
)
def test_wrong_recipes_are_refused(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(files.RecipeError, match=match):
        files.load(str(path))
