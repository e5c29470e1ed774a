"""Versions of critics, and which of them are active: what all servers of one store follow."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """From revision 0002."""
    op.create_table(
        "critic_versions",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("location", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("parent", sa.Text),
        sa.Column("published", sa.Double, nullable=False),
        sa.Column("published_by", sa.Text, nullable=False),
        sa.Column("wanted", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("name", "version", name="pk_critic_versions"),
    )
    serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "critic_activations",
        sa.Column("seq", serial, primary_key=True, autoincrement=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("share", sa.Double, nullable=False),
        sa.Column("is_default", sa.Boolean, nullable=False),
        sa.Column("rolled_back", sa.Boolean, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("given_by", sa.Text, nullable=False),
        sa.Column("why", sa.Text),
        sa.ForeignKeyConstraint(
            ["name", "version"], ["critic_versions.name", "critic_versions.version"], name="fk_critic_activations_name"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_critic_activations_name_seq", "critic_activations", ["name", "seq"])
