import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsharp_core.critic import checkpoint
from qsharp_core.critic.checkpoint import CriticCard
from qsharp_core.critic.folder import BACKBONE, CARD, HEAD
from qsharp_core.errors import CriticError
from qsharp_core.returns import Categorical
from tests.support import models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return models.write_critic(tmp_path / "critic", mlp=8)


def edit(folder: Path, **changes: object) -> None:
    path = folder / CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_saved_is_loaded_again(folder: Path, tmp_path: Path) -> None:
    card, critic = checkpoint.load(folder)
    checkpoint.save(tmp_path / "again", card, critic)
    card_again, again = checkpoint.load(tmp_path / "again")
    assert card_again == card
    for (name, ours), (_, theirs) in zip(critic.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(FileExistsError):
        checkpoint.save(tmp_path / "again", card, critic)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "critic"]


def test_unknown_fields_of_the_card_are_kept(folder: Path, tmp_path: Path) -> None:
    edit(folder, metrics={"auc": 0.9}, parent="critic@0")
    card, critic = checkpoint.load(folder)
    checkpoint.save(tmp_path / "again", card, critic)
    assert json.loads((tmp_path / "again" / CARD).read_text())["metrics"] == {"auc": 0.9}


def test_categorical_cards_give_their_distribution(folder: Path) -> None:
    edit(folder, distribution={"kind": "categorical", "atoms": [0, 1, 3]}, reward_range=[-1, 3])
    returns = checkpoint.read_card(folder).returns()
    assert isinstance(returns, Categorical)
    assert (returns.atoms, returns.reward_range) == ((0, 1, 3), (-1, 3))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": 2}, "format"),
        ({"head": "W"}, "head"),
        ({"name": "a/b"}, "name"),
        ({"distribution": {"kind": "categorical", "atoms": [1, 0]}, "reward_range": [0, 1]}, "ascend"),
        ({"distribution": {"kind": "categorical", "atoms": [0, 2]}, "reward_range": [0, 1]}, "within"),
        ({"reward_range": [1, 0]}, "ascend"),
        ({"reward_range": [0, 2]}, "Bernoulli"),
        ({"mlp": {"width": 9}}, "head.safetensors"),
        ({"recommended_eta": 0}, "recommended_eta"),
    ],
)
def test_a_wrong_card_is_refused_by_field(folder: Path, changes: dict[str, object], complaint: str) -> None:
    edit(folder, **changes)
    with pytest.raises(CriticError, match=complaint):
        checkpoint.load(folder)


@pytest.mark.parametrize("missing", [CARD, HEAD, f"{BACKBONE}/config.json", f"{BACKBONE}/model.safetensors"])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(CriticError, match=Path(missing).name.split(".")[0]):
        checkpoint.load(folder)


def test_a_missing_weight_is_named(folder: Path) -> None:
    path = folder / BACKBONE / "model.safetensors"
    weights = load_file(path)
    del weights["layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CriticError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        checkpoint.load(folder)


def test_embeddings_are_borrowed_from_the_reference(folder: Path, tmp_path: Path) -> None:
    reference = models.write_reference(tmp_path / "reference")
    card, critic = checkpoint.load(folder)
    with torch.no_grad():
        critic.backbone.get_input_embeddings().weight.copy_(checkpoint.input_embeddings(reference))
    lender = CriticCard.model_validate(card.model_dump() | {"borrow": ["input_embeddings"]})
    checkpoint.save(tmp_path / "borrows", lender, critic)
    stored = load_file(tmp_path / "borrows" / BACKBONE / "model.safetensors")
    assert not any("embed_tokens" in name for name in stored)
    _, again = checkpoint.load(tmp_path / "borrows", reference=reference)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again(ids), critic(ids))
    with pytest.raises(CriticError, match="reference"):
        checkpoint.load(tmp_path / "borrows")
    wider = models.write_reference(tmp_path / "wider", kind="qwen2")
    with pytest.raises(CriticError, match="shape"):
        checkpoint.load(tmp_path / "borrows", reference=wider)


def test_the_vocabulary_is_compared_token_by_token(folder: Path) -> None:
    tokenizer = models.tokenizer()
    card, critic = checkpoint.load(folder)
    checkpoint.check_vocabulary(card, folder, critic, tokenizer)  # carries none: sizes agree

    tokenizer.save_pretrained(folder / BACKBONE)
    checkpoint.check_vocabulary(card, folder, critic, tokenizer)
    path = folder / BACKBONE / "tokenizer.json"
    path.write_text(path.read_text().replace('"<130>"', '"other"'))
    with pytest.raises(CriticError, match="token 130"):
        checkpoint.check_vocabulary(card, folder, critic, tokenizer)

    (folder / BACKBONE / "tokenizer_config.json").unlink()
    good = card.model_copy(update={"tokenizer_fingerprint": checkpoint.fingerprint(tokenizer)})
    checkpoint.check_vocabulary(good, folder, critic, tokenizer)
    with pytest.raises(CriticError, match="fingerprint"):
        checkpoint.check_vocabulary(
            card.model_copy(update={"tokenizer_fingerprint": "0" * 64}), folder, critic, tokenizer
        )
