"""The plans that a database makes for what the store asks of it, and which of them read a whole table."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, event

EXPLAIN = {"sqlite": "EXPLAIN QUERY PLAN", "postgresql": "EXPLAIN (FORMAT JSON)"}


@dataclass
class Statements:
    """The statements that were sent while `listening`, with their parameters."""

    sent: list[tuple[str, Any]] = field(default_factory=list)

    @contextmanager
    def listening(self, engine: Engine) -> Iterator[None]:
        """Notes what reads or deletes rollouts and rewards."""

        def note(_: object, __: object, statement: str, parameters: Any, *rest: object) -> None:
            if statement.startswith(("SELECT", "DELETE")):
                self.sent.append((statement, parameters))

        event.listen(engine, "before_cursor_execute", note)
        try:
            yield
        finally:
            event.remove(engine, "before_cursor_execute", note)


@dataclass(frozen=True)
class WholeRead:
    """A plan that reads all of a table; `what` is in the database's words."""

    what: str
    statement: str


def whole_reads(engine: Engine, statements: Statements, tables: Sequence[str] = ("rollouts",)) -> list[WholeRead]:
    """The plans that read all rows of a table, though few are wanted.

    Not among them are walks in the order of commits that end when a page is full.

    Args:
        engine: of the database, which plans by what it knows now.
        statements: what it was sent.
        tables: that it shall not read whole.
    """
    found: list[WholeRead] = []
    with engine.connect() as connection:
        for statement, parameters in statements.sent:
            plan = connection.exec_driver_sql(f"{EXPLAIN[engine.dialect.name]} {statement}", parameters).all()
            if engine.dialect.name == "sqlite":
                whole = _whole_in_sqlite([row.detail for row in plan], statement, tables)
            else:
                whole = _whole_in_postgresql(plan[0][0][0]["Plan"], tables)
            found += [WholeRead(what, statement) for what in whole]
    return found


def _whole_in_sqlite(steps: Sequence[str], statement: str, tables: Sequence[str]) -> list[str]:
    ends = "ORDER BY rollouts.seq" in statement and "LIMIT" in statement
    return [step for step in steps if step in {f"SCAN {table}" for table in tables} and not ends]


def _whole_in_postgresql(node: Mapping[str, Any], tables: Sequence[str], limited: bool = False) -> list[str]:
    limited = limited or node["Node Type"] == "Limit"
    kind, index = node["Node Type"], node.get("Index Name", "")
    whole = kind.endswith("Seq Scan") or (index.startswith("pk_") and "Index Cond" not in node and not limited)
    found = [f"{kind} {index} on {node['Relation Name']}"] if whole and node.get("Relation Name") in tables else []
    for below in node.get("Plans", ()):
        found += _whole_in_postgresql(below, tables, limited)
    return found
