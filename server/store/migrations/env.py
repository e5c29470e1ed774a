"""Alembic's environment: migrates on the connection, and in the transaction, of `database.migrate`."""

from alembic import context

from server.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
