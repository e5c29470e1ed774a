"""Rollouts and their rewards."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """From an empty database."""
    serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "rollouts",
        sa.Column("seq", serial, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("choice", sa.Integer, nullable=False),
        sa.Column("route", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("temperature", sa.Double, nullable=False),
        sa.Column("top_p", sa.Double, nullable=False),
        sa.Column("top_k", sa.Integer, nullable=False),
        sa.Column("min_p", sa.Double, nullable=False),
        sa.Column("seed", sa.BigInteger),
        sa.Column("eta", sa.Double),
        sa.Column("method", sa.Text),
        sa.Column("critic", sa.Text),
        sa.Column("first_valid_position", sa.Integer),
        sa.Column("parent_id", sa.Text),
        sa.Column("cut", sa.Integer),
        sa.Column("kl", sa.Double, nullable=False),
        sa.Column("value", sa.Double),
        sa.Column("finish_reason", sa.Text),
        sa.Column("reward", sa.Double),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("guidance", sa.JSON),
        sa.Column("sampling_other", sa.JSON, nullable=False),
        sa.Column("prompt_token_ids", sa.LargeBinary, nullable=False),
        sa.Column("completion_token_ids", sa.LargeBinary, nullable=False),
        sa.Column("prompt_text", sa.Text),
        sa.Column("completion_text", sa.Text, nullable=False),
        sa.Column("messages", sa.JSON),
        sa.Column("response", sa.JSON),
        sa.PrimaryKeyConstraint("seq", name="pk_rollouts"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_rollouts_id", "rollouts", ["id"], unique=True)
    op.create_index("ix_rollouts_request_id", "rollouts", ["request_id"])
    op.create_table(
        "rewards",
        sa.Column("seq", serial, autoincrement=True, nullable=False),
        sa.Column("rollout_id", sa.Text, nullable=False),
        sa.Column("reward", sa.Double, nullable=False),
        sa.Column("source", sa.Text),
        sa.Column("created", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_rewards"),
        sa.ForeignKeyConstraint(["rollout_id"], ["rollouts.id"], name="fk_rewards_rollout_id", ondelete="CASCADE"),
    )
    op.create_index("ix_rewards_rollout_id", "rewards", ["rollout_id"])
