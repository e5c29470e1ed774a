"""Sums of three one-digit numbers, as lm-evaluation-harness wants a data set."""

from typing import Any

from datasets import Dataset


def made(**_: Any) -> dict[str, Dataset]:
    """The split `test`: questions, answers, and four numbers to choose from, the first of which is right."""
    numbers = [(a, (a * 7 + 3) % 10, (a * 3 + 1) % 10) for a in range(10)]
    rows = [{"question": f"{a} + {b} + {c}", "answer": str(a + b + c)} for a, b, c in numbers]
    return {"test": Dataset.from_list([row | {"choices": _choices(int(row["answer"]))} for row in rows])}


def _choices(right: int) -> list[str]:
    return [str(right + offset) for offset in (0, 1, -1, 10)]
