"""Indexes for stores of millions of rollouts. To build them on ten million takes minutes (docs/operations.md)."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

TRAINABLE = (
    "reward IS NOT NULL AND first_valid_position IS NOT NULL "
    "AND 4 * first_valid_position < length(completion_token_ids)"
)


def upgrade() -> None:
    """From revision 0003."""
    _partial("critic_seq", ["critic", "seq"], "critic IS NOT NULL", {"critic": "text_pattern_ops"})
    _partial("unrewarded", ["seq"], "reward IS NULL")
    _partial("trainable", ["created"], TRAINABLE)
    _partial("untrainable", ["created", "seq"], f"NOT ({TRAINABLE})")
    op.create_index("ix_rollouts_created_seq", "rollouts", ["created", "seq"])
    op.create_index("ix_rollouts_model", "rollouts", ["model"])
    op.create_index("ix_rewards_given_by", "rewards", ["given_by"])
    op.create_index("ix_rewards_source", "rewards", ["source"])
    if op.get_bind().dialect.name == "postgresql":
        entries = sa.text("CAST(metadata AS JSONB) jsonb_path_ops")
        op.create_index("ix_rollouts_metadata", "rollouts", [entries], postgresql_using="gin")


def _partial(name: str, columns: list[str], condition: str, ops: dict[str, str] | None = None) -> None:
    where = sa.text(condition)
    op.create_index(
        f"ix_rollouts_{name}",
        "rollouts",
        columns,
        postgresql_where=where,
        sqlite_where=where,
        postgresql_ops=ops or {},
    )
