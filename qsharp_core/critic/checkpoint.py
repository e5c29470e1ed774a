"""A critic's folder on disk: read, checked and written. Nothing is unpickled.

    critic.json          what it is (`CriticCard`)
    backbone/            a Hugging Face AutoModel: config.json, model.safetensors
    head.safetensors     `weight`, `bias`, and `hidden.weight`, `hidden.bias` where the card has an `mlp`

`"borrow": ["input_embeddings"]` in the card means that the backbone's token embeddings are not stored: they are the
reference's, read from its folder. It must then be the reference the critic was made for.

`"backbone": "reference"` in the card means that there is no `backbone/` at all: the critic is a head on the
reference's own hidden states (`native_checkpoint`).
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qsharp_core.critic.model import Critic, Head, HeadShape
from qsharp_core.critic.randomness import PrivateRandomness
from qsharp_core.critic.reference import Reference, weight_files
from qsharp_core.disk import whole_folder
from qsharp_core.errors import CriticError
from qsharp_core.returns import Bernoulli, Categorical, ReturnDistribution

CARD, HEAD, BACKBONE = "critic.json", "head.safetensors", "backbone"


class BernoulliCard(BaseModel):
    """`{"kind": "bernoulli"}`."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["bernoulli"]


class CategoricalCard(BaseModel):
    """`{"kind": "categorical", "atoms": [ascending rewards]}`."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["categorical"]
    atoms: list[float] = Field(min_length=2)


class MLPCard(BaseModel):
    """A hidden layer in the head."""

    model_config = ConfigDict(extra="forbid")
    width: int = Field(gt=0)
    activation: Literal["gelu"] = "gelu"


class CriticCard(BaseModel):
    """`critic.json`. Fields it does not name are kept as they are: metrics, parent version, notes.

    Attributes:
        backbone: `"reference"` where the critic reads the reference's hidden states; else it has a backbone of its own.
        hidden: which hidden state such a critic reads: `"last"`, which the reference's language-model head reads.
        made_for: the reference of such a critic.
    """

    model_config = ConfigDict(extra="allow")
    format: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    version: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    head: Literal["V", "Q"]
    distribution: Annotated[BernoulliCard | CategoricalCard, Field(discriminator="kind")]
    reward_range: tuple[float, float] = (0.0, 1.0)
    backbone: Literal["reference"] | None = None
    hidden: Literal["last"] | None = None
    made_for: Reference | None = None
    mlp: MLPCard | None = None
    borrow: list[Literal["input_embeddings"]] = []
    tokenizer_fingerprint: str | None = None
    recommended_eta: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.reward_range
        if not low < high:
            raise ValueError(f"reward_range must ascend, got [{low}, {high}]")
        if isinstance(self.distribution, BernoulliCard):
            if self.reward_range != (0.0, 1.0):
                raise ValueError("a Bernoulli critic's reward_range is [0, 1]")
        else:
            atoms = self.distribution.atoms
            if atoms != sorted(set(atoms)):
                raise ValueError("atoms must ascend")
            if atoms[0] < low or atoms[-1] > high:
                raise ValueError(f"atoms must lie within reward_range [{low}, {high}]")
        if self.backbone == "reference":
            if self.head != "Q" or self.mlp is None or self.made_for is None or self.hidden is None or self.borrow:
                raise ValueError(
                    'a critic on the reference\'s hidden states has "head": "Q", "hidden": "last", "mlp", "made_for", '
                    'and no "borrow"'
                )
        elif self.hidden is not None or self.made_for is not None:
            raise ValueError('"hidden" and "made_for" belong to critics with "backbone": "reference"')
        return self

    @property
    def key(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    def returns(self) -> ReturnDistribution:
        """The return distribution that the head's outputs parametrise."""
        if isinstance(self.distribution, BernoulliCard):
            return Bernoulli()
        return Categorical(tuple(self.distribution.atoms), self.reward_range)


def read_card(folder: Path) -> CriticCard:
    """`critic.json` of a folder, checked.

    Raises:
        CriticError: missing, not JSON, or with a wrong field; the message names it.
    """
    path = folder / CARD
    try:
        return CriticCard.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CriticError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise CriticError(f"{path}: {field}: {first['msg']}") from error


def load(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    reference: Path | None = None,
) -> tuple[CriticCard, Critic]:
    """A critic from its folder, in evaluation mode. Leaves the process's random state as it was.

    Args:
        folder: see the module's docstring.
        dtype: of the weights in memory, whatever they are on disk.
        device: where they go.
        reference: the reference model's folder, for critics that borrow from it.

    Raises:
        CriticError: with the file and the reason.
    """
    from transformers import AutoModel  # heavy: only those who load a critic pay for it

    card = read_card(folder)
    if card.backbone == "reference":
        raise CriticError(f"{folder} has no backbone of its own: it is a head on its reference's hidden states")
    returns = card.returns()
    backbone_folder = folder / BACKBONE
    if not (backbone_folder / "config.json").is_file():
        raise CriticError(f"{backbone_folder / 'config.json'} is missing")
    try:
        with PrivateRandomness():  # what a folder does not hold is initialised, before it is borrowed or missed
            backbone, report = AutoModel.from_pretrained(
                backbone_folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise CriticError(f"{backbone_folder} is no Hugging Face model: {error}") from error
    missing = set(report["missing_keys"])
    embeddings = backbone.get_input_embeddings()
    if "input_embeddings" in card.borrow:
        borrowed = {name for name, p in backbone.named_parameters() if p is embeddings.weight}
        missing -= borrowed
        if reference is None:
            raise CriticError(f"{folder} borrows the reference's embeddings: the reference's folder is needed")
        _borrow(embeddings, input_embeddings(reference), folder)
    if missing:
        raise CriticError(f"{backbone_folder}: weights are missing: {', '.join(sorted(missing)[:5])}")

    shape = HeadShape(
        kind=card.head,
        hidden=backbone.config.get_text_config().hidden_size,
        n_out=returns.n_out,
        vocab=embeddings.weight.shape[0],
        mlp=card.mlp.width if card.mlp else None,
    )
    with PrivateRandomness():
        head = Head(shape)
    load_head(head, folder / HEAD)
    critic = Critic(backbone, head, returns).to(device=device, dtype=dtype).eval()
    return card, critic.requires_grad_(False)


def save(folder: Path, card: CriticCard, critic: Critic) -> None:
    """Writes a critic's folder so that it is there whole or not at all.

    Weights are stored in the dtype they have. A folder of the same name must not exist.

    Raises:
        FileExistsError: versions are never overwritten.
    """
    weights = {k: v.contiguous() for k, v in critic.backbone.state_dict().items()}
    if "input_embeddings" in card.borrow:
        embedding = critic.backbone.get_input_embeddings().weight
        weights = {k: v for k, v in weights.items() if v.data_ptr() != embedding.data_ptr()}
    with whole_folder(folder) as temporary:
        (temporary / BACKBONE).mkdir()
        critic.backbone.config.save_pretrained(temporary / BACKBONE)
        save_file(weights, temporary / BACKBONE / "model.safetensors", metadata={"format": "pt"})
        write_card_and_head(temporary, card, critic.head)


def write_card_and_head(folder: Path, card: CriticCard, head: nn.Module) -> None:
    """`critic.json` and `head.safetensors`, which every kind of critic has."""
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, folder / HEAD)
    (folder / CARD).write_text(card.model_dump_json(indent=2, exclude_none=True) + "\n")


def check_vocabulary(card: CriticCard, folder: Path, critic: Critic, reference_tokenizer: Any | None) -> None:
    """The critic's token ids must mean what the reference's mean, token by token.

    Compared with the tokenizer in the critic's `backbone/`, or with the card's fingerprint; a critic that carries
    neither is held to the vocabulary's size.

    Raises:
        CriticError: with the first difference.
    """
    if reference_tokenizer is None:
        return
    theirs = _vocabulary(reference_tokenizer)
    if critic.vocab < len(theirs):
        raise CriticError(
            f"{card.key} embeds {critic.vocab} token ids and the reference's vocabulary has {len(theirs)}"
        )
    if (folder / BACKBONE / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        ours = _vocabulary(AutoTokenizer.from_pretrained(folder / BACKBONE, local_files_only=True))
        for index in sorted(ours.keys() | theirs.keys()):
            if ours.get(index) != theirs.get(index):
                raise CriticError(
                    f"{card.key} was made for another vocabulary: token {index} is {ours.get(index)!r} there "
                    f"and {theirs.get(index)!r} in the reference"
                )
    elif card.tokenizer_fingerprint not in (None, fingerprint(reference_tokenizer)):
        raise CriticError(f"{card.key} was made for another vocabulary: its tokenizer fingerprint differs")


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's `id -> token` table, for `CriticCard.tokenizer_fingerprint`."""
    table = json.dumps(sorted(_vocabulary(tokenizer).items()), ensure_ascii=True)
    return hashlib.sha256(table.encode()).hexdigest()


def input_embeddings(model_folder: Path) -> Tensor:
    """The token embeddings `[V, D]` of a Hugging Face model's folder, without loading the rest.

    Raises:
        CriticError: there are none to be found.
    """
    names = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
    for path in weight_files(model_folder):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name.endswith(names):
                    return tensors.get_tensor(name)
    raise CriticError(f"no token embeddings in the safetensors of {model_folder}")


def _borrow(embeddings: nn.Embedding, weight: Tensor, folder: Path) -> None:
    if embeddings.weight.shape != weight.shape:
        raise CriticError(
            f"{folder} borrows embeddings of shape {list(embeddings.weight.shape)}, "
            f"the reference's are {list(weight.shape)}"
        )
    with torch.no_grad():
        embeddings.weight.copy_(weight)


def load_head(head: nn.Module, path: Path) -> None:
    """Fills a head from its file.

    Raises:
        CriticError: the file cannot be read, or holds other tensors.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CriticError(f"{path} cannot be read: {error}") from error
    wanted = {name: list(p.shape) for name, p in head.state_dict().items()}
    found = {name: list(p.shape) for name, p in stored.items()}
    if wanted != found:
        raise CriticError(f"{path}: wanted {wanted}, found {found}")
    head.load_state_dict(stored)


def _vocabulary(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}
