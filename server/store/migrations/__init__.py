"""Alembic's migrations of the store, which the program runs when it opens one."""
