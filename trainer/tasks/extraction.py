"""Facts out of a passage, as JSON: 1 if the whole answer is JSON of the schema with the passage's four facts, else 0.

    {"name": "Lucia Novak", "age": 34, "job": "baker", "city": "Oslo"}

The passages are this project's own. Some have a second city or a second person in them. No name of a person is in both
splits. Solved passages stand before the question, as turns of a chat.
"""

import json
import random
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any

from jsonschema import Draft202012Validator

from trainer.tasks.base import Problem, SamplingDefaults, Task
from trainer.tasks.splits import SPLITS, drawn

FIRST_NAMES = (
    "Maria", "Thomas", "Sarah", "Peter", "Anna", "David", "Lucy", "Omar", "Hannah", "Daniel", "Emma", "Paul", "Julia",
    "Martin", "Nina", "Simon", "Clara", "Victor", "Laura", "Oscar", "Helen", "George", "Alice", "Robert",
)  # fmt: skip
LAST_NAMES = (
    "Lopez", "Novak", "Berg", "Silva", "Rossi", "Brown", "Fischer", "Moore", "Tanaka", "Clark", "Weber", "Hill",
    "Adams", "King", "Costa", "Young", "Wright", "Meyer", "Green", "Stone", "Baker", "Cook", "Wood", "Hall",
)  # fmt: skip
JOBS = (
    "nurse", "teacher", "pilot", "carpenter", "gardener", "lawyer", "painter", "farmer", "plumber", "dentist",
    "singer", "journalist",
)  # fmt: skip
CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Lisbon", "Oslo", "Cairo", "Boston", "Chicago",
)  # fmt: skip
PASSAGES = (
    "{name} is {age} years old, lives in {city} and works as a {job}.",
    "At {age}, {name} is a {job} in {city}.",
    "In {city} there is a {job} of {age} years whose name is {name}.",
    "{name} grew up in {elsewhere}, but lives in {city} today. Now {age}, {name} works as a {job}.",
    "{name}, a {job} in {city}, is {age} years old. A friend, {friend}, lives in {elsewhere}.",
)
AGES = range(19, 79)
QUESTION = "Write the name, age, job and city as JSON. {passage}"
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "job": {"type": "string"},
        "city": {"type": "string"},
    },
    "required": ["name", "age", "job", "city"],
    "additionalProperties": False,
}
_VALIDATOR = Draft202012Validator(SCHEMA)


@dataclass(frozen=True)
class Facts:
    """What a passage says."""

    name: str
    age: int
    job: str
    city: str

    def as_json(self) -> str:
        """The answer that is asked for."""
        return json.dumps(asdict(self))


EXAMPLES = (
    ("At 47, Ellen Carter is a tailor in Athens.", Facts("Ellen Carter", 47, "tailor", "Athens")),
    (
        "Jack Miller, a waiter in Prague, is 23 years old. A friend, Leo, lives in Lima.",
        Facts("Jack Miller", 23, "waiter", "Prague"),
    ),
)
"""Solved passages; none of their facts is in a problem."""


def extracted(text: str) -> dict[str, Any] | None:
    """The facts that a completion gives; None if it is not JSON of the schema from its first to its last character."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    # To JSON Schema 34.0 is an integer, too.
    return value if _VALIDATOR.is_valid(value) and isinstance(value["age"], int) else None


def reward(facts: Facts, text: str) -> float:
    """1 if a completion gives the facts, else 0."""
    return float(extracted(text) == asdict(facts))


def vote(text: str) -> str | None:
    """The facts that a completion gives, in one spelling; None if it gives none."""
    value = extracted(text)
    return None if value is None else json.dumps(value, sort_keys=True)


@cache
def _drawn() -> dict[str, list[str]]:
    return drawn([f"{first} {last}" for first, last in product(FIRST_NAMES, LAST_NAMES)], "extraction")


def _problem(name: str) -> Problem:
    dice = random.Random(f"extraction/{name}")
    city, elsewhere = dice.sample(CITIES, 2)
    facts = Facts(name, dice.choice(AGES), dice.choice(JOBS), city)
    friend = dice.choice([first for first in FIRST_NAMES if first not in name])
    passage = dice.choice(PASSAGES).format(**asdict(facts), elsewhere=elsewhere, friend=friend)
    shown = [
        {"role": role, "content": content}
        for passage, facts in EXAMPLES
        for role, content in (("user", QUESTION.format(passage=passage)), ("assistant", facts.as_json()))
    ]
    return Problem(
        id=name,
        messages=[*shown, {"role": "user", "content": QUESTION.format(passage=passage)}],
        answer=facts.as_json(),
        data=asdict(facts),
    )


def _reward(problem: Problem, text: str) -> float:
    return reward(Facts(**problem.data), text)


TASK = Task(
    name="extraction",
    problems=lambda split: [_problem(name) for name in _drawn()[split]],
    splits=SPLITS,
    sampling=SamplingDefaults(max_tokens=56, stop=("\n",)),
    reward=_reward,
    vote=vote,
)
