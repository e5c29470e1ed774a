"""`qsharp.export`: stored rollouts as one Parquet file."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from trainer.rollouts.address import default_key, default_url
from trainer.rollouts.errors import RequestError
from trainer.rollouts.export import export as download
from trainer.rollouts.retrying import Patience, Tell
from trainer.trust import Trust

SUFFIX = ".parquet"


def export(
    out: str | Path,
    *,
    metadata: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    critic: str | None = None,
    guided: bool | str | None = None,
    has_reward: bool | str | None = None,
    model: str | None = None,
    owner: Iterable[str] = (),
    rewards_by: Iterable[str] = (),
    url: str | None = None,
    api_key: str | None = None,
    patience: float | None = None,
    tell: Tell = print,
) -> int:
    """Writes a Parquet file, which `train`, `datasets` and pandas read: whole or not at all.

    Args:
        out: the file.
        metadata, critic, guided, has_reward, model: which rollouts; None is all.
        owner: of these holders of keys alone.
        rewards_by: rewards of others do not count.
        url, api_key: of the server; None are `QSHARP_URL` and `QSHARP_API_KEY`.
        patience: seconds that the export is tried for.
        tell: is told that the server cannot be reached.

    Returns:
        The number of rollouts.

    Raises:
        RequestError: above all, that no rollout is stored that these filters leave.
    """
    path = Path(out)
    if path.suffix != SUFFIX:
        raise RequestError(
            f"an export is a Parquet file, whatever its name says: {path.with_suffix(SUFFIX)}, not {path}"
        )
    query = {f"metadata.{key}": value for key, value in dict(metadata).items()}
    for name, value in (("critic", critic), ("guided", guided), ("has_reward", has_reward), ("model", model)):
        if value is not None:
            query[name] = str(value).lower() if isinstance(value, bool) else str(value)
    trust = Trust(tuple(owner), tuple(rewards_by))
    return download(
        url or default_url(),
        path,
        query | trust.rollouts | trust.rewards,
        key=api_key or default_key(),
        patience=Patience(patience, tell),
        least=1,
    )
