"""Why the database failed, in words for clients: a driver's own may hold SQL, addresses and paths."""

import sqlite3

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

LOCKED = "another program holds a lock on its database"
FULL = "its disk is full"
READ_ONLY = "its database is read-only"
AWAY = "its database cannot be reached"
DISK = "its disk cannot be read or written"
BUSY = "too many read from it at once"
UNKNOWN = "the server's log says why"

_SQLITE = {
    sqlite3.SQLITE_BUSY: LOCKED, sqlite3.SQLITE_LOCKED: LOCKED, sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_READONLY: READ_ONLY, sqlite3.SQLITE_CANTOPEN: AWAY, sqlite3.SQLITE_IOERR: DISK,
}  # fmt: skip
# PostgreSQL's codes, or the two characters of their class.
_POSTGRESQL = {
    "08": AWAY, "53100": FULL, "53300": BUSY, "57P": AWAY, "25006": READ_ONLY, "55P03": LOCKED, "40": LOCKED,
    "58": DISK,
}  # fmt: skip


def reason(error: Exception) -> str:
    """Why a read or a write failed, as a clause.

    Args:
        error: what SQLAlchemy raised.
    """
    if isinstance(error, PoolTimeoutError):
        return BUSY
    cause = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(cause, sqlite3.Error):
        # The low byte of an extended code is the code itself.
        return _SQLITE.get(getattr(cause, "sqlite_errorcode", 0) & 0xFF, UNKNOWN)
    code = getattr(cause, "sqlstate", None)
    if code is not None:
        return next((why for prefix, why in _POSTGRESQL.items() if code.startswith(prefix)), UNKNOWN)
    # psycopg has no code where the connection itself was lost or never made.
    return AWAY if isinstance(error, OperationalError) else UNKNOWN
