"""The native head: what is served equals what is trained; its folder; which reference it belongs to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qsharp_core.critic import checkpoint, native_checkpoint
from qsharp_core.critic.checkpoint import CriticCard
from qsharp_core.critic.folder import CARD, HEAD
from qsharp_core.critic.native import NativeHead, NativeShape
from qsharp_core.critic.reference import identify
from qsharp_core.critic.scoring.native import NativeScorer
from qsharp_core.errors import CriticError
from qsharp_core.returns import Bernoulli
from tests.support import models

SHAPE = NativeShape(hidden=24, embed=16, width=32, n_out=3)
VOCAB = 9000  # more than is tabled at once


@pytest.fixture
def head() -> NativeHead:
    torch.manual_seed(0)
    made = NativeHead(SHAPE)
    with torch.no_grad():
        for name, value in made.state_dict().items():
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith(".scale") else torch.randn_like(value))
        made.log_ref.least.fill_(-4.0)  # type: ignore[operator]
    return made.eval()


def formula(head: NativeHead, hidden: torch.Tensor, embedding: torch.Tensor, log_ref: torch.Tensor) -> torch.Tensor:
    """The module docstring's, in float64."""
    t = {name: value.double() for name, value in head.state_dict().items()}
    log_ref = log_ref.double().clamp(min=t["log_ref.least"].item())
    first = t["bias"] + log_ref.sub(t["log_ref.mean"]).div(t["log_ref.scale"])[..., None] * t["log_ref.weight"][:, 0]
    first = first + (hidden.double() - t["hidden.mean"]) / t["hidden.scale"] @ t["hidden.weight"].T
    first = first + (embedding.double() - t["token.mean"]) / t["token.scale"] @ t["token.weight"].T
    return F.gelu(first) @ t["out.weight"].T + t["out.bias"]


def test_the_head_is_its_formula(head: NativeHead) -> None:
    hidden, embedding, log_ref = torch.randn(7, 24) * 3 + 1, torch.randn(7, 16), -torch.rand(7) * 8
    expected = formula(head, hidden, embedding, log_ref)
    torch.testing.assert_close(head(hidden, embedding, log_ref).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_the_served_critic_gives_what_the_head_gives(head: NativeHead, dtype: torch.dtype, close: float) -> None:
    embeddings = torch.randn(VOCAB, 16).to(dtype)
    critic = NativeScorer(head, Bernoulli(), embeddings, dtype)
    assert (critic.vocab, critic.table_bytes) == (VOCAB, VOCAB * 32 * dtype.itemsize)
    hidden, ids = (torch.randn(5, 24) * 3 + 1).to(dtype), torch.randint(VOCAB, (5, 11))
    ids[0, 0] = VOCAB - 1
    log_ref = -torch.rand(5, 11, dtype=torch.float64) * 8
    log_ref[1, 1] = float("-inf")
    expected = formula(head, hidden[:, None], embeddings[ids], log_ref)
    outputs = critic.score(hidden, ids, log_ref)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs.double(), expected, atol=close, rtol=1e-5)


def test_a_large_mean_costs_no_precision(head: NativeHead) -> None:
    """Some components of hidden states are large and hardly vary."""
    with torch.no_grad():
        head.hidden.mean[3], head.hidden.scale[3] = 200.0, 0.5
    hidden = (torch.randn(64, 24) + head.hidden.mean).to(torch.bfloat16)
    ids, log_ref = torch.randint(50, (64, 4)), -torch.rand(64, 4).double()
    embeddings = torch.randn(50, 16)
    outputs = NativeScorer(head, Bernoulli(), embeddings).score(hidden, ids, log_ref)
    expected = formula(head, hidden[:, None], embeddings[ids], log_ref)
    torch.testing.assert_close(outputs.double(), expected, atol=1e-3, rtol=1e-4)


def test_dropout_is_for_training_alone(head: NativeHead) -> None:
    dropping = NativeHead(SHAPE, input_dropout=0.5, dropout=0.5)
    dropping.load_state_dict(head.state_dict())
    given = torch.randn(7, 24), torch.randn(7, 16), -torch.rand(7)
    assert not torch.equal(dropping(*given), dropping(*given))
    assert torch.equal(dropping.eval()(*given), head(*given))


def test_an_untrained_head_does_not_steer() -> None:
    untrained = NativeHead(SHAPE)
    assert not untrained(torch.randn(4, 24), torch.randn(4, 16), -torch.rand(4)).any()


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return models.write_reference(tmp_path / "reference")


@pytest.fixture
def folder(reference: Path, tmp_path: Path) -> Path:
    return models.write_native_critic(tmp_path / "critic", reference)


def edit(folder: Path, **changes: object) -> None:
    path = folder / CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_saved_is_loaded_again(reference: Path, folder: Path, tmp_path: Path) -> None:
    card, head = native_checkpoint.load_head(folder, reference)
    native_checkpoint.save(tmp_path / "again", card, head)
    card_again, again = native_checkpoint.load_head(tmp_path / "again", reference)
    assert card_again == card
    for (name, ours), (_, theirs) in zip(head.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    assert load_file(tmp_path / "again" / HEAD).keys() == load_file(folder / HEAD).keys()
    with pytest.raises(FileExistsError):
        native_checkpoint.save(tmp_path / "again", card, head)


def test_the_served_critic_reads_the_references_embeddings(reference: Path, folder: Path) -> None:
    state = torch.get_rng_state()
    card, critic = native_checkpoint.load(folder, reference, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert (card.key, critic.vocab, critic.distribution) == ("native@1", models.VOCAB, Bernoulli())
    model = AutoModelForCausalLM.from_pretrained(reference)
    hidden, ids, log_ref = torch.randn(2, 64), torch.randint(models.VOCAB, (2, 5)), -torch.rand(2, 5).double()
    _, head = native_checkpoint.load_head(folder, reference)
    expected = formula(head, hidden[:, None], model.get_input_embeddings().weight[ids].detach(), log_ref)
    torch.testing.assert_close(critic.score(hidden, ids, log_ref).double(), expected, atol=1e-4, rtol=1e-5)


def test_another_reference_is_refused(folder: Path, tmp_path: Path) -> None:
    other = models.write_reference(tmp_path / "other", seed=5)
    with pytest.raises(CriticError, match=r"native@1 was made for another reference: for llama, 2 layers of 64"):
        native_checkpoint.load(folder, other)


def test_a_copy_in_bfloat16_in_several_files_is_the_same_reference(reference: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "copy", max_shard_size="40KB")
    assert len([*(tmp_path / "copy").glob("*.safetensors")]) > 1
    assert identify(tmp_path / "copy") == identify(reference)


def test_every_weight_counts(reference: Path) -> None:
    before = identify(reference)
    path = reference / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        if name == "lm_head.weight":
            continue
        changed = {k: v.clone() for k, v in weights.items()}
        changed[name].flatten()[0] += 1
        save_file(changed, path, metadata={"format": "pt"})
        assert identify(reference) != before, name


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"head": "V"}, "hidden states"),
        ({"hidden": "middle"}, "hidden"),
        ({"hidden": None}, "hidden"),
        ({"mlp": None}, "mlp"),
        ({"mlp": {"width": 9}}, "head.safetensors"),
        ({"made_for": None}, "made_for"),
        ({"borrow": ["input_embeddings"]}, "borrow"),
        ({"backbone": None}, "belong"),
        ({"backbone": "other"}, "backbone"),
    ],
)
def test_a_wrong_card_is_refused_by_field(
    reference: Path, folder: Path, changes: dict[str, Any], complaint: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(CriticError, match=complaint):
        native_checkpoint.load(folder, reference)


def test_wrong_tensors_are_named(reference: Path, folder: Path) -> None:
    weights = load_file(folder / HEAD)
    for name, value in (("hidden.scale", 0.0), ("out.bias", float("nan"))):
        save_file(weights | {name: torch.full_like(weights[name], value)}, folder / HEAD)
        with pytest.raises(CriticError, match=name):
            native_checkpoint.load(folder, reference)


def test_each_kind_is_told_from_the_other(reference: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CriticError, match="no backbone of its own"):
        checkpoint.load(folder, reference=reference)
    separate = models.write_critic(tmp_path / "separate")
    with pytest.raises(CriticError, match="a backbone of its own"):
        native_checkpoint.load(separate, reference)
    assert isinstance(checkpoint.read_card(folder), CriticCard)
