"""Loaded critics: what a worker tells the API process of them, and what the API process tells clients."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, Strict, TypeAdapter, ValidationError

MOST_CHARACTERS = 64  # of a name
MOST_REASON = 1000  # characters of why somebody decided something
CriticName = Annotated[str, Field(max_length=MOST_CHARACTERS, pattern=r"^[A-Za-z0-9](\.?[A-Za-z0-9_-])*\.?$")]
"""The name of a critic, or of a version. It stands in paths, URLs, `name@version` and labels of metrics, so it has no
`/`, no `@`, no blank and no two dots in a row."""
_NAME = TypeAdapter(CriticName)


def critic_name(text: str) -> str:
    """The text, if it can be the name of a critic or of a version; also as a type of argparse.

    Raises:
        ValueError: says what a name is.
    """
    try:
        return _NAME.validate_python(text)
    except ValidationError as error:
        raise ValueError(
            f"must be 1 to {MOST_CHARACTERS} letters, digits, '.', '_' and '-', begin with a letter or digit and have "
            f"no two dots in a row; got {text!r:.80}"
        ) from error


class CriticStatus(BaseModel):
    """One loaded version, in a worker's answer to `qsharp_describe`.

    Attributes:
        path: the critic's folder.
        active: whether the bare name means this version.
        leaving: whether it is unloaded as soon as no request uses it.
        users: requests in the running batch that it guides.
        max_length: the longest history, in tokens, that it can score.
        native: whether it is a head on the reference's hidden states and has no backbone of its own.
        reward_range: the least and the greatest reward that it knows.
        kv_blocks, kv_blocks_used: size of its key-value cache; None for a critic that has none.
        card: its `critic.json`, without what is null.
    """

    name: str
    version: str
    path: str
    active: bool
    leaving: bool
    users: int
    max_length: int
    native: bool
    reward_range: tuple[float, float]
    kv_blocks: int | None
    kv_blocks_used: int | None
    card: dict[str, JsonValue]

    @property
    def key(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


class WorkerError(BaseModel):
    """A `QSharpError` in a worker's answer: vLLM passes exceptions of workers on as text alone.

    Attributes:
        type: name of the class in `qsharp_core.errors`.
        param: the request's field that is wrong, of those errors that name one.
    """

    type: str
    message: str
    param: str | None = None


class WorkerAnswer(BaseModel):
    """The answer of one worker to one call: a value, or an error."""

    ok: Any = None
    error: WorkerError | None = None


class LoadRequest(BaseModel):
    """Body of `POST /v1/critics`."""

    model_config = ConfigDict(extra="forbid")
    path: str = Field(
        min_length=1, max_length=4096, description="the critic's folder, on the server's machine, or its URL"
    )
    name: CriticName | None = Field(default=None, description="to be called so, whatever its card says")
    activate: Annotated[bool, Strict()] = Field(default=False, description="also make it the version its name means")


class ActivateRequest(BaseModel):
    """Body of `POST /v1/critics/{name}/activate`."""

    model_config = ConfigDict(extra="forbid")
    version: CriticName
    default: Annotated[bool, Strict()] = Field(
        default=False, description="also make the name the one that requests get which name no critic"
    )
    share: Annotated[float, Strict(), Field(ge=0, le=1)] = Field(
        default=1,
        description="of the requests that name no version: 1 for all, less for a trial beside the version that is "
        "active, 0 for the trial's end; less than 1 needs a rollout store",
    )
    why: Annotated[str, Field(max_length=MOST_REASON)] | None = Field(default=None, description="is kept with it")


Text = Annotated[str, Strict()]
TokenId = Annotated[int, Strict(), Field(ge=0)]
Sequences = Text | list[TokenId] | list[Text] | list[list[TokenId]]


class ScoreRequest(BaseModel):
    """Body of `POST /v1/critics/{name}/score`: a prompt and completion or a batch, both as text or both as token ids.

    A single prompt is used for all completions.
    """

    model_config = ConfigDict(extra="forbid")
    prompt: Sequences
    completion: Sequences


class CriticVersion(BaseModel):
    """One version, as `/v1/critics` shows it.

    Attributes:
        id: `name@version`.
        active: whether the bare name means this version.
        default: whether requests that name no critic get it.
        share: of the requests that name its name and no version, from 0 to 1.
        leaving: whether new requests are refused; it is freed when its last request ends.
        loaded: whether the workers still have it.
        users: requests in the running batch that it guides.
        in_flight: requests that were admitted with it and have not ended.
        max_length: the longest history, in tokens, that it can score.
        kv_blocks, kv_blocks_used: size of its key-value cache; None for a critic that has none.
        metrics: what the card says of its quality.
        card: its `critic.json`, without what is null.
    """

    object: Literal["critic.version"] = "critic.version"
    id: str
    name: str
    version: str
    active: bool
    default: bool
    share: float
    leaving: bool
    loaded: bool
    users: int
    in_flight: int
    path: str
    max_length: int
    kv_blocks: int | None
    kv_blocks_used: int | None
    metrics: JsonValue
    card: dict[str, JsonValue]


class CriticTrial(BaseModel):
    """A version that stands beside the active one, for a share of the requests that name no version."""

    version: str
    share: float


class WantedCritics(BaseModel):
    """What the store says that all its servers are to have.

    Attributes:
        versions: to be loaded, as `name@version`.
        active: for each name the version that it means.
        trials: for some names another version, and its share of the requests.
        problems: by `name@version`, why the server that answers has not what is wanted.
    """

    versions: list[str]
    active: dict[str, str]
    trials: dict[str, CriticTrial]
    problems: dict[str, str]


class CriticDecision(BaseModel):
    """What a name was said to mean, once.

    Attributes:
        share: of the requests that name no version: 1 for all, less for a trial, and 0 for a trial's end.
        default: whether the name became the one of requests that name no critic.
        rolled_back: whether it returned to a version that was active earlier.
        created: when, in seconds since the epoch.
        given_by: holder of the admin's key.
        why: None where nobody said.
    """

    version: str
    share: float
    default: bool
    rolled_back: bool
    created: float
    given_by: str
    why: str | None


class CriticList(BaseModel):
    """All loaded versions: `GET /v1/critics`; `wanted` is None where the server decides alone."""

    object: Literal["list"] = "list"
    data: list[CriticVersion]
    wanted: WantedCritics | None = None


class CriticVersions(BaseModel):
    """All versions of one name: `GET /v1/critics/{name}`.

    Attributes:
        active: the version that the bare name means; None while none is.
        default: whether requests that name no critic get this one.
        decisions: which version it was said to mean, oldest first; of servers that share a store.
    """

    object: Literal["critic"] = "critic"
    name: str
    active: str | None
    default: bool
    versions: list[CriticVersion]
    decisions: list[CriticDecision] = []


class CompletionScore(BaseModel):
    """Expected rewards of one completion: `values[t]` is `E[Z]` after its first `t + 1` tokens, in units of reward."""

    index: int
    token_ids: list[int]
    values: list[float]


class CriticScores(BaseModel):
    """The answer of `POST /v1/critics/{name}/score`; `critic` is the exact `name@version`."""

    object: Literal["list"] = "list"
    critic: str
    data: list[CompletionScore]
