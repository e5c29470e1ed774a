"""References of fewer bits, and critics that keep the embeddings they were trained with."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qsharp_core.critic import checkpoint, native_checkpoint
from qsharp_core.errors import CriticError
from tests.support import models
from trainer.experiments.other_reference import made_for_another, with_own_embeddings
from trainer.experiments.quantise import Quantise, rounded, write_quantised


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_reference(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 150)  # the last group of a row has 22 inputs
    found = rounded(weight, bits, group=64)
    for row in range(5):
        for first in (0, 64, 128):
            before, after = weight[row, first : first + 64], found[row, first : first + 64]
            step = before.abs().max() / (2 ** (bits - 1) - 1)
            assert len(after.unique()) <= 2**bits - 1
            assert (after - before).abs().max() <= step / 2 * 1.0001
            levels = after / step
            torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    torch.testing.assert_close(rounded(found, bits, 64), found)  # what is rounded stays


def test_a_quantised_folder_is_a_model(reference: Path, tmp_path: Path) -> None:
    how = Quantise(bits=4, group=32, embeddings=False)
    error = write_quantised(reference, tmp_path / "q", how)
    model, before = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "q", reference))
    assert AutoTokenizer.from_pretrained(tmp_path / "q")("ab").input_ids
    changed = {name for name, p in model.named_parameters() if not p.equal(before.get_parameter(name))}
    assert changed == {
        n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and n != "lm_head.weight"
    }
    with torch.inference_mode():
        differences = sum(float((model.get_parameter(n) - before.get_parameter(n)).square().sum()) for n in changed)
        norms = sum(float(before.get_parameter(n).square().sum()) for n in changed)
    assert error == pytest.approx((differences / norms) ** 0.5)
    assert write_quantised(reference, tmp_path / "q", how) == error  # found, not made again
    assert write_quantised(reference, tmp_path / "all", Quantise()) > 0
    everything = load_file(tmp_path / "all" / "model.safetensors")
    assert not everything["model.embed_tokens.weight"].equal(before.get_input_embeddings().weight)


def test_a_native_critic_is_made_for_another_reference(reference: Path, tmp_path: Path) -> None:
    write_quantised(reference, tmp_path / "q", Quantise(bits=3))
    folder = models.write_native_critic(tmp_path / "critic", reference)
    with pytest.raises(CriticError, match="made for another reference"):
        native_checkpoint.load_head(folder, tmp_path / "q")
    moved = made_for_another(folder, reference, tmp_path / "q", tmp_path / "moved")
    card, head = native_checkpoint.load_head(moved, tmp_path / "q")
    before, same = native_checkpoint.load_head(folder, reference)
    assert card.made_for != before.made_for
    assert card.model_copy(update={"made_for": before.made_for}) == before
    for name, value in same.state_dict().items():
        assert head.state_dict()[name].equal(value), name


def test_a_critic_with_its_own_embeddings_reads_any_reference_alike(reference: Path, tmp_path: Path) -> None:
    write_quantised(reference, tmp_path / "q", Quantise(bits=3))
    folder = models.write_critic(tmp_path / "critic")
    weights = load_file(folder / "backbone" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "embed" not in k}, folder / "backbone" / "model.safetensors")
    card = json.loads((folder / "critic.json").read_text())
    (folder / "critic.json").write_text(json.dumps(card | {"borrow": ["input_embeddings"], "note": "kept"}))
    models.tokenizer().save_pretrained(folder / "backbone")

    own = with_own_embeddings(folder, reference, tmp_path / "own")
    ids = torch.randint(3, 98, (2, 12))
    with torch.inference_mode():
        trained_with, other = (checkpoint.load(folder, reference=r)[1](ids) for r in (reference, tmp_path / "q"))
        card_of_own, loaded = checkpoint.load(own)
        torch.testing.assert_close(loaded(ids), trained_with, atol=0, rtol=0)
    assert (card_of_own.borrow, card_of_own.note) == ([], "kept")  # type: ignore[attr-defined]
    assert (own / "backbone" / "tokenizer_config.json").is_file()
    assert (other - trained_with).abs().max() > 0.05  # what borrowing from another reference would do
