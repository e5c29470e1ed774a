"""The store's tables, and the conversion of records to rows and back.

Small columns stand before large ones, so that a scan with a filter reads little of the rows that it passes over. Token
ids are stored as little-endian int32. A test holds these tables and `migrations/` to be the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    Table,
    Text,
    cast,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import JSON

from qsharp_core.rollouts.records import UNNAMED, Reward, Rollout, Sampling
from qsharp_core.rollouts.text import clean
from qsharp_core.wire.columns import SAMPLING

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(column_0_label)s",
    }
)
# SQLite increments only INTEGER columns by itself; there they hold 64 bits.
Serial = BigInteger().with_variant(Integer, "sqlite")

# Conditions of partial indexes, in the words of `filters`, by which databases know that they hold.
GUIDED = "critic IS NOT NULL"
UNREWARDED = "reward IS NULL"
TRAINABLE = (
    "reward IS NOT NULL AND first_valid_position IS NOT NULL "
    "AND 4 * first_valid_position < length(completion_token_ids)"
)


def _partial(name: str, columns: Sequence[str], condition: str, ops: Mapping[str, str] | None = None) -> Index:
    """An index of the rows for which a condition holds; `ops` are PostgreSQL's classes of operators, by column."""
    where = text(condition)
    return Index(name, *columns, postgresql_where=where, sqlite_where=where, postgresql_ops=ops or {})


rollouts = Table(
    "rollouts",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),  # in the order of commits: the cursor of lists
    Column("id", Text, nullable=False),
    Column("owner", Text, nullable=False, server_default=UNNAMED),
    Column("request_id", Text, nullable=False),
    Column("choice", Integer, nullable=False),
    Column("route", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("model", Text, nullable=False),
    Column("temperature", Double, nullable=False),
    Column("top_p", Double, nullable=False),
    Column("top_k", Integer, nullable=False),
    Column("min_p", Double, nullable=False),
    Column("seed", BigInteger),
    Column("eta", Double),
    Column("method", Text),
    Column("critic", Text),
    Column("first_valid_position", Integer),
    Column("parent_id", Text),
    Column("cut", Integer),
    Column("kl", Double, nullable=False),
    Column("value", Double),
    Column("finish_reason", Text),
    Column("reward", Double),
    Column("metadata", JSON, nullable=False),
    Column("guidance", JSON(none_as_null=True)),
    Column("sampling_other", JSON, nullable=False),
    Column("prompt_token_ids", LargeBinary, nullable=False),
    Column("completion_token_ids", LargeBinary, nullable=False),
    Column("prompt_text", Text),
    Column("completion_text", Text, nullable=False),
    Column("messages", JSON(none_as_null=True)),
    Column("response", JSON(none_as_null=True)),
    Index("ix_rollouts_id", "id", unique=True),
    Index("ix_rollouts_request_id", "request_id"),
    Index("ix_rollouts_owner_seq", "owner", "seq"),
    # These operators find the versions of a name, too, whatever the database's collation.
    _partial("ix_rollouts_critic_seq", ["critic", "seq"], GUIDED, {"critic": "text_pattern_ops"}),
    Index("ix_rollouts_model", "model"),
    _partial("ix_rollouts_unrewarded", ["seq"], UNREWARDED),
    Index("ix_rollouts_created_seq", "created", "seq"),
    _partial("ix_rollouts_trainable", ["created"], TRAINABLE),
    _partial("ix_rollouts_untrainable", ["created", "seq"], f"NOT ({TRAINABLE})"),
    sqlite_autoincrement=True,  # a cursor must not come again after the last row was deleted
)

# SQLite has no index for this.
Index(
    "ix_rollouts_metadata",
    cast(rollouts.c.metadata, JSONB).label("entries"),
    postgresql_using="gin",
    postgresql_ops={"entries": "jsonb_path_ops"},
).ddl_if(dialect="postgresql")

rewards = Table(
    "rewards",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column(
        "rollout_id", Text, ForeignKey("rollouts.id", ondelete="CASCADE", name="fk_rewards_rollout_id"), nullable=False
    ),
    Column("reward", Double, nullable=False),
    Column("source", Text),
    Column("created", Double, nullable=False),
    Column("given_by", Text),
    Index("ix_rewards_rollout_id", "rollout_id"),
    Index("ix_rewards_given_by", "given_by"),
    Index("ix_rewards_source", "source"),
)

critic_versions = Table(
    "critic_versions",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("location", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("parent", Text),
    Column("published", Double, nullable=False),
    Column("published_by", Text, nullable=False),
    Column("wanted", Boolean, nullable=False),  # whether servers are to have it loaded
)

critic_activations = Table(
    "critic_activations",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("share", Double, nullable=False),  # of the requests that name no version; 1: all, 0: none any more
    Column("is_default", Boolean, nullable=False),
    Column("rolled_back", Boolean, nullable=False),
    Column("created", Double, nullable=False),
    Column("given_by", Text, nullable=False),
    Column("why", Text),
    ForeignKeyConstraint(["name", "version"], ["critic_versions.name", "critic_versions.version"]),
    Index("ix_critic_activations_name_seq", "name", "seq"),
    sqlite_autoincrement=True,
)

_SAME = (
    "id", "owner", "request_id", "choice", "route", "created", "model", "eta", "method", "critic",
    "first_valid_position", "parent_id", "cut", "kl", "value", "finish_reason", "reward", "prompt_text",
    "completion_text", "messages", "response", "guidance",
)  # fmt: skip
Parameters = dict[str, Any]  # of an insert, by the name of the column
_TEXTS = (
    "request_id", "model", "prompt_text", "completion_text", "finish_reason", "method", "critic", "parent_id", "owner",
)  # fmt: skip


def to_row(rollout: Rollout) -> Parameters:
    """The parameters of an insert of this rollout into `rollouts`, without its rewards' history."""
    row: Parameters = {name: getattr(rollout, name) for name in _SAME}
    for name in _TEXTS:
        if row[name] is not None:
            row[name] = clean(row[name])
    row |= {name: getattr(rollout.sampling, name) for name in SAMPLING}
    row["sampling_other"] = rollout.sampling.other
    row["metadata"] = rollout.metadata
    row["prompt_token_ids"] = pack(rollout.prompt_token_ids)
    row["completion_token_ids"] = pack(rollout.completion_token_ids)
    return row


def from_row(row: Row[Any], history: Iterable[Reward] = ()) -> Rollout:
    """The rollout of a whole row of `rollouts`; `history` is the rewards that it was given.

    Raises:
        ValueError: the row has something that no rollout has.
    """
    fields: Parameters = dict(row._mapping)
    rollout = Rollout(
        **{name: fields[name] for name in _SAME},
        sampling=Sampling(**{name: fields[name] for name in SAMPLING}, other=fields["sampling_other"]),
        metadata=fields["metadata"],
        prompt_token_ids=unpack(fields["prompt_token_ids"]),
        completion_token_ids=unpack(fields["completion_token_ids"]),
        rewards=tuple(history),
    )
    rollout.check_forms()
    return rollout


def pack(token_ids: Sequence[int]) -> bytes:
    """Token ids as bytes, four for each."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def unpack(data: bytes) -> list[int]:
    """Token ids from the bytes that `pack` made."""
    ids: list[int] = np.frombuffer(data, dtype="<i4").tolist()
    return ids
