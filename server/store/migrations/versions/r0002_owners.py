"""Owners of rollouts, givers of rewards, and ids of responses that are not repeated.

What was stored before belongs to the holder of keys without a name. Ids of responses were once the clients' own, and so
could be used again. Of the stored chat completions with one id the latest keeps it, and earlier ones get a number.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """From revision 0001."""
    op.add_column("rollouts", sa.Column("owner", sa.Text, nullable=False, server_default="default"))
    op.add_column("rewards", sa.Column("given_by", sa.Text))
    op.create_index("ix_rollouts_owner_seq", "rollouts", ["owner", "seq"])
    _tell_repeated_ids_apart()


def _tell_repeated_ids_apart() -> None:
    connection = op.get_bind()
    table = sa.table("rollouts", sa.column("request_id"), sa.column("route"), sa.column("created"))
    chat = table.c.route == "chat"
    responses = sa.select(table.c.request_id, table.c.created).where(chat).distinct().subquery()
    repeated = sa.select(responses.c.request_id).group_by(responses.c.request_id).having(sa.func.count() > 1)
    for name in connection.scalars(repeated).all():
        query = sa.select(responses.c.created).where(responses.c.request_id == name)
        earlier = connection.scalars(query.order_by(responses.c.created)).all()[:-1]
        for number, created in enumerate(earlier, start=1):
            of_one = (table.c.request_id == name) & chat & (table.c.created == created)
            connection.execute(sa.update(table).where(of_one).values(request_id=f"{name}-{number}"))
