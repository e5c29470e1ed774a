"""The folder of a critic on disk: read, checked and written. It may come from anybody: nothing of it is trusted.

    critic.json          what the critic is (`CriticCard`)
    backbone/            a Hugging Face AutoModel: config.json, model.safetensors
    head.safetensors     `weight`, `bias`, and `hidden.weight`, `hidden.bias` where the card has an `mlp`

If the card says `"borrow": ["input_embeddings"]`, the backbone's token embeddings are not stored. They are read from
the folder of the reference, which must be the one that the critic was made for.

If the card says `"backbone": "reference"`, there is no `backbone/`: the critic is native, a head on the reference's own
hidden states, and `native_checkpoint` reads and writes it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qsharp_core.critic import backbone, files
from qsharp_core.critic.folder import BACKBONE, CARD, DEFAULT_MAX_BYTES, HEAD, TOKENIZER, TOKENIZER_CONFIG
from qsharp_core.critic.model import Critic, Head, HeadShape
from qsharp_core.critic.randomness import PrivateRandomness
from qsharp_core.critic.reference import ReferenceIdentity, weight_files
from qsharp_core.critic.tensors import Tensors, check_finite, check_shapes, mapped
from qsharp_core.disk import whole_folder
from qsharp_core.errors import CriticError
from qsharp_core.returns import Bernoulli, Categorical, ReturnDistribution
from qsharp_core.wire.critics import CriticName
from qsharp_core.wire.guidance import ETA_RANGE

MOST_CARD = 2**20
MOST_TOKENIZER = 64 * 2**20
MOST_ATOMS = 4096
MOST_WIDTH = 2**20
MOST_REWARD = 1e30  # its tilt at the smallest eta is a number in float32

Reward = Annotated[float, Field(strict=True, ge=-MOST_REWARD, le=MOST_REWARD, allow_inf_nan=False)]


class BernoulliCard(BaseModel):
    """A Bernoulli distribution on a card: `{"kind": "bernoulli"}`."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["bernoulli"]


class CategoricalCard(BaseModel):
    """A categorical distribution on a card: `{"kind": "categorical", "atoms": [ascending rewards]}`."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["categorical"]
    atoms: list[Reward] = Field(min_length=2, max_length=MOST_ATOMS)


class MLPCard(BaseModel):
    """The hidden layer of a head, on a card: `{"width": 512}`."""

    model_config = ConfigDict(extra="forbid")
    width: int = Field(strict=True, gt=0, le=MOST_WIDTH)
    activation: Literal["gelu"] = "gelu"


class CriticCard(BaseModel):
    """The content of `critic.json`. Other fields than these are kept as they are: metrics, parent version, notes.

    Attributes:
        format: version of the format.
        name, version: together the key of the critic, `name@version`.
        head: whether outputs are read at each token's own position (V) or at the one before (Q).
        distribution: what the head's outputs mean.
        reward_range: least and greatest reward that there can be.
        backbone: `"reference"` for a native critic, which reads the reference's hidden states; None for a separate
            critic, which has a backbone of its own.
        hidden: which hidden state a native critic reads: `"last"`, which the reference's language-model head reads.
        made_for: the reference that a native critic was made for.
        mlp: the hidden layer of the head.
        borrow: weights that are read from the reference's folder.
        tokenizer_fingerprint: `fingerprint` of the tokenizer that the critic was made with.
        recommended_eta: a value of `eta` that suits the critic.
    """

    model_config = ConfigDict(extra="allow")
    format: Literal[1] = 1
    name: CriticName
    version: CriticName
    head: Literal["V", "Q"]
    distribution: Annotated[BernoulliCard | CategoricalCard, Field(discriminator="kind")]
    reward_range: tuple[Reward, Reward] = (0.0, 1.0)
    backbone: Literal["reference"] | None = None
    hidden: Literal["last"] | None = None
    made_for: ReferenceIdentity | None = None
    mlp: MLPCard | None = None
    borrow: list[Literal["input_embeddings"]] = []
    tokenizer_fingerprint: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    recommended_eta: float | None = Field(
        default=None, strict=True, ge=ETA_RANGE[0], le=ETA_RANGE[1], allow_inf_nan=False
    )

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
        """The key of this version, `name@version`."""
        return f"{self.name}@{self.version}"

    def returns(self) -> ReturnDistribution:
        """The return distribution that the head's outputs parametrise."""
        if isinstance(self.distribution, BernoulliCard):
            return Bernoulli()
        return Categorical(tuple(self.distribution.atoms), self.reward_range)


@dataclass(frozen=True)
class CriticFiles:
    """A critic's folder as it was read: checked file by file, and nothing built from it yet.

    Attributes:
        folder: for messages.
        card: `critic.json`.
        head: the tensors of `head.safetensors`, mapped.
        backbone: the backbone's files; None for a native critic.
    """

    folder: Path
    card: CriticCard
    head: Tensors
    backbone: backbone.BackboneFiles | None


def read_card(folder: Path) -> CriticCard:
    """Reads and checks the `critic.json` of a folder.

    Raises:
        CriticError: the file is missing, is no JSON, or has a wrong field; the message names it.
    """
    path = folder / CARD
    files.check_link(path, folder)
    content = files.read_bytes(path, MOST_CARD)
    files.parse_object(content, path)
    try:
        return CriticCard.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise CriticError(f"{path}: {field}: {first['msg']}") from error


def read(folder: Path, dtype: torch.dtype = torch.float32, max_bytes: int = DEFAULT_MAX_BYTES) -> CriticFiles:
    """Reads and checks the files of a critic of either kind. It takes no memory of their size, and may wait for a disk.

    Args:
        folder: see the module's docstring.
        dtype: that the weights will have.
        max_bytes: that all files may have together.

    Raises:
        CriticError: a file cannot be used; the message says which and why.
    """
    card = read_card(folder)
    files.check_folder(folder, max_bytes)
    head = mapped(folder / HEAD)
    if card.backbone == "reference":  # computed in float32, whatever the dtype of what it is computed from
        check_finite(head, torch.float32, folder / HEAD, may_be_minus_infinity="log_ref.least")
        return CriticFiles(folder, card, head, None)
    check_finite(head, dtype, folder / HEAD)
    return CriticFiles(folder, card, head, backbone.read(folder / BACKBONE, dtype))


def load(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    reference: Path | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> tuple[CriticCard, Critic]:
    """Reads a separate critic from its folder. Does not touch the process's random state.

    Args:
        folder: see the module's docstring.
        dtype: dtype of the weights in memory, whatever it is on disk.
        device: where the weights go.
        reference: folder of the reference model, for critics that borrow from it.
        max_bytes: that the critic's files may have together.

    Returns:
        The card, and the critic in evaluation mode.

    Raises:
        CriticError: a file cannot be used; the message says which and why.
    """
    read_files = read(folder, dtype, max_bytes)
    return read_files.card, build(read_files, dtype=dtype, device=device, reference=reference)


def build(
    read_files: CriticFiles,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    reference: Path | None = None,
) -> Critic:
    """Builds a separate critic from its files. One call at a time: transformers changes global state.

    Args:
        read_files: of the critic.
        dtype: that the files were read for.
        device: where the weights go.
        reference: folder of the reference model, for critics that borrow from it.

    Returns:
        The critic, in evaluation mode.

    Raises:
        CriticError: the files do not fit together; the message says which and why.
    """
    folder, card, returns = read_files.folder, read_files.card, read_files.card.returns()
    if read_files.backbone is None:
        raise CriticError(f"{folder} has no backbone of its own: it is a head on its reference's hidden states")
    borrows = "input_embeddings" in card.borrow
    if borrows and reference is None:
        raise CriticError(f"{folder} borrows the reference's embeddings: the reference's folder is needed")
    with PrivateRandomness():  # weights that the folder lacks are initialised at random
        decoder: Any = backbone.build(read_files.backbone, dtype, borrows)
    embeddings = decoder.get_input_embeddings()
    if borrows and reference is not None:
        _borrow(embeddings, input_embeddings(reference), folder)
    shape = HeadShape(
        kind=card.head,
        hidden=decoder.config.get_text_config().hidden_size,
        n_out=returns.n_out,
        vocab=embeddings.weight.shape[0],
        mlp=card.mlp.width if card.mlp else None,
    )
    with torch.device("meta"):
        head = Head(shape)
    load_head(head, read_files.head, folder)
    critic = Critic(decoder, head, returns).to(device=device, dtype=dtype).eval()
    return critic.requires_grad_(False)


def save(folder: Path, card: CriticCard, critic: Critic) -> None:
    """Writes a separate critic's folder. It is there as a whole or not at all.

    Weights are stored in the dtype they have.

    Raises:
        FileExistsError: the folder exists; versions are never overwritten.
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
    """Writes `critic.json` and `head.safetensors`, which both kinds of critics have."""
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, folder / HEAD)
    (folder / CARD).write_text(card.model_dump_json(indent=2, exclude_none=True) + "\n")


def check_vocabulary(card: CriticCard, folder: Path, critic: Critic, reference_tokenizer: Any | None) -> None:
    """Checks that each token id means the same token to the critic and to the reference.

    The reference's vocabulary is compared with that of the tokenizer in the critic's `backbone/`, or else with the
    card's fingerprint. Of a critic that has neither, only the size of the vocabulary is checked.

    Args:
        card, critic: the critic as it was loaded.
        folder: where it was loaded from.
        reference_tokenizer: of transformers; None where the reference is served without one, and nothing is checked.

    Raises:
        CriticError: the vocabularies differ; the message has the first difference.
    """
    if reference_tokenizer is None:
        return
    reference_tokens = _vocabulary(reference_tokenizer)
    if critic.vocab < len(reference_tokens):
        raise CriticError(
            f"{card.key} embeds {critic.vocab} token ids and the reference's vocabulary has {len(reference_tokens)}"
        )
    if (folder / BACKBONE / TOKENIZER_CONFIG).exists():
        tokens = _stored_vocabulary(folder / BACKBONE / TOKENIZER)
        for index in sorted(tokens.keys() | reference_tokens.keys()):
            if tokens.get(index) != reference_tokens.get(index):
                raise CriticError(
                    f"{card.key} was made for another vocabulary: token {index} is {tokens.get(index)!r} there "
                    f"and {reference_tokens.get(index)!r} in the reference"
                )
    elif card.tokenizer_fingerprint not in (None, fingerprint(reference_tokenizer)):
        raise CriticError(f"{card.key} was made for another vocabulary: its tokenizer fingerprint differs")


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's table of ids and tokens, for `CriticCard.tokenizer_fingerprint`."""
    table = json.dumps(sorted(_vocabulary(tokenizer).items()), ensure_ascii=True)
    return hashlib.sha256(table.encode()).hexdigest()


def input_embeddings(model_folder: Path) -> Tensor:
    """The token embeddings `[V, D]` in a Hugging Face model's folder, read without the rest of the model.

    Raises:
        CriticError: the folder has none under a known name.
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


def load_head(head: nn.Module, stored: Tensors, folder: Path) -> None:
    """Gives a head its parameters and buffers, copied from those that are stored, in float32.

    Args:
        head: on the `meta` device.
        stored: the tensors of `head.safetensors`.
        folder: of the critic, for messages.

    Raises:
        CriticError: other tensors are stored than the head has.
    """
    check_shapes({name: value.shape for name, value in head.state_dict().items()}, stored, folder / HEAD)
    copies = {name: value.to(torch.float32, copy=True) for name, value in stored.items()}
    head.load_state_dict(copies, assign=True)


def _vocabulary(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _stored_vocabulary(path: Path) -> dict[int, str]:
    """The vocabulary of a tokenizer's file. Transformers' tokenizers are not asked: they read what the file names."""
    from tokenizers import Tokenizer

    content = files.read_bytes(path, MOST_TOKENIZER)
    try:
        return _vocabulary(Tokenizer.from_str(content.decode()))
    except Exception as error:  # it raises no narrower class
        raise CriticError(f"{path} is no tokenizer: {str(error)[:500]}") from error
