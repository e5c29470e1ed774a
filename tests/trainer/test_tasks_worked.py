"""SVAMP and GSM8K's short problems: splits by stories, solved examples, and the number that is the answer."""

import json
import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import benchmark_data
from trainer.tasks import benchmarks, gsm8k, svamp
from trainer.tasks.base import Problem, TaskError
from trainer.tasks.registry import find_task
from trainer.tasks.worked import Worked, asked_after, examples, right

THINGS = ("apples", "books", "coins", "dolls", "eggs", "forks", "games", "hats", "jars", "kites")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_data.found("svamp_test.jsonl", monkeypatch)


def questions(problem: Problem) -> list[str]:
    """All questions that a problem shows; the last one is its own."""
    assert problem.messages is not None
    assert [turn["role"] for turn in problem.messages[:3]] == ["user", "assistant", "user"]
    return [turn["content"] for turn in problem.messages if turn["role"] == "user"]


@pytest.mark.usefixtures("data")
def test_svamp() -> None:
    task = find_task("svamp")
    train, held_out = task.of_split("train"), task.of_split("held_out")
    assert (len(train), len(held_out)) == (700 - svamp.EXAMPLES, 300)
    shown = questions(train[0])[:-1]
    assert len(shown) == svamp.EXAMPLES
    own = [questions(problem)[-1] for problem in (*train, *held_out)]
    assert not {*shown} & {*own}
    assert all(questions(problem)[:-1] == shown for problem in (*train, *held_out))
    assert train[0].messages is not None
    solutions = [turn["content"] for turn in train[0].messages if turn["role"] == "assistant"]
    assert sorted(said.split()[1] for said in solutions) == sorted("++--**//")
    assert all(set(solution) <= {*"0123456789+-*/=,. ", *"The answer is"} for solution in solutions)
    assert all(right(problem, f"So it is {problem.answer}.0") == 1.0 for problem in (*train, *held_out))
    with pytest.raises(TaskError, match="train, held_out"):
        task.of_split("test")


@pytest.mark.usefixtures("data")
def test_no_story_of_svamp_is_in_both_splits() -> None:
    """Every pair of problems across the splits shares less than half of its words; the solved ones' are among these."""
    texts = {row[0]: svamp.Text(row[1], row[2]) for row in svamp.SOURCE.rows()}
    parts = svamp.parted(texts)
    assert sorted(parts["train"] + parts["held_out"]) == sorted(texts)
    assert len(set(svamp.stories(list(texts.values())))) == 87

    def said(text: str) -> set[str]:
        return {*"".join(c if c in LETTERS else " " for c in text.lower()).split()}

    # A split at random would not do: almost every body has a near one in the other part.
    drawn = random.Random(0).sample(sorted(texts), len(texts))
    bodies = [said(texts[name].body) for name in drawn]
    copies = [any(2 * len(one & other) >= len(one | other) for other in bodies[300:]) for one in bodies[:300]]
    assert sum(copies) / 300 == pytest.approx(0.98, abs=0.015)

    for part in ({name: said(text.body) for name, text in texts.items()},
                 {name: said(" ".join(text)) for name, text in texts.items()}):  # fmt: skip
        pairs = product(parts["train"], parts["held_out"])
        nearest = max(len(part[one] & part[other]) / len(part[one] | part[other]) for one, other in pairs)
        assert 0.3 < nearest < 0.5


@given(st.integers(0, 2**32))
def test_variations_stay_together_in_any_order(seed: int) -> None:
    dice = random.Random(seed)
    texts = {
        f"{thing}-{number}": svamp.Text(
            f"{dice.choice(['Ann', 'Bob'])} has {dice.randint(2, 99)} {thing}, {thing}box, {thing}top.", "How many?"
        )
        for thing in dice.sample(THINGS, dice.randint(2, len(THINGS)))
        for number in range(dice.randint(1, 9))
    }
    parts = svamp.parted(texts)
    names = list(texts)
    dice.shuffle(names)
    assert svamp.parted({name: texts[name] for name in names}) == parts
    told = [{name.split("-")[0] for name in part} for part in parts.values()]
    assert not told[0] & told[1]
    assert len(parts["held_out"]) <= round(svamp.HELD_OUT * len(texts))
    assert len(parts["train"]) + len(parts["held_out"]) == len(texts)


def test_stories_are_joined_by_what_lies_between() -> None:
    def stories(*bodies: str) -> list[int]:
        return svamp.stories([svamp.Text(body, "") for body in bodies])

    assert stories("a b c d", "a b x y", "b x y z", "7 a 8 b c d", "q", "") == [0, 1, 1, 0, 4, 5]
    assert stories("a b c d", "q", "a b c y", "b c y z") == [0, 1, 0, 0]
    # Bodies that differ, with questions that make them one story; and the other way round.
    assert svamp.stories([svamp.Text("a b x", "p q r"), svamp.Text("a b y z", "r q p")]) == [0, 0]
    assert svamp.stories([svamp.Text("a b", "p q r s"), svamp.Text("b a", "t u v w")]) == [0, 0]


def test_a_row_becomes_a_question_and_an_equation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"ID": f"chal-{i}", "Body": f"A {thing}, {thing}box, {thing}bag or {thing}top cost {i}", "Question": " Two? ",
         "Equation": f"( {i}.0 * 2.0 )", "Answer": 2.0 * i}
        for i, thing in enumerate(THINGS, 1)
    ]  # fmt: skip
    (tmp_path / "svamp_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("QSHARP_DATA", str(tmp_path))
    train, held_out = (find_task("svamp").of_split(split) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (5, 3)  # two of the ten are shown
    for problem in (*train, *held_out):
        i = int(problem.id.removeprefix("chal-"))
        assert questions(problem)[-1] == "A {0}, {0}box, {0}bag or {0}top cost {1}, Two?".format(THINGS[i - 1], i)
        assert problem.answer == str(2 * i)
        assert problem.messages is not None
        assert problem.messages[1]["content"].endswith(f". The answer is {problem.messages[1]['content'].split()[4]}")
    (tmp_path / "svamp_none.jsonl").write_text(json.dumps(rows[0] | {"Answer": "many"}) + "\n")
    monkeypatch.setattr(svamp, "SOURCE", replace(svamp.SOURCE, file="svamp_none.jsonl"))
    with pytest.raises(TaskError, match="SVAMP's chal-1 must be a number; got 'many'"):
        find_task("svamp").of_split("train")
    (tmp_path / "svamp_half.jsonl").write_text(json.dumps({"ID": 1}) + "\n")
    monkeypatch.setattr(svamp, "SOURCE", replace(svamp.SOURCE, file="svamp_half.jsonl"))
    with pytest.raises(TaskError, match=r'svamp_half\.jsonl, line 1: must be {"ID": …, "Body": …, .*"Answer": …}'):
        find_task("svamp").of_split("train")


def test_a_data_set_of_two_splits_gives_the_problems_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the package `datasets`, from a folder in place of the hub; the order of rows does not matter."""
    import datasets

    rows = [
        {"ID": f"chal-{i}", "Body": f"A {thing}, {thing}box, {thing}bag or {thing}top cost {i}", "Question": "Two?",
         "Equation": f"( {i}.0 * 2.0 )", "Answer": f"{2 * i}.0", "question_concat": "?"}
        for i, thing in enumerate(THINGS, 1)
    ]  # fmt: skip
    (tmp_path / "svamp_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("QSHARP_DATA", str(tmp_path))
    of_file = [find_task("svamp").of_split(split) for split in ("train", "held_out")]
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, some in (("train", rows[3:]), ("test", rows[:3])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    monkeypatch.delenv("QSHARP_DATA")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(svamp, "SOURCE", replace(svamp.SOURCE, repository=str(folder)))
    assert [find_task("svamp").of_split(split) for split in ("train", "held_out")] == of_file


@pytest.mark.usefixtures("data")
def test_short_problems_of_gsm8k() -> None:
    task = find_task("gsm8k-short")
    train, test = task.of_split("train"), task.of_split("test")
    assert (len(train), len(test)) == (2579 - gsm8k.EXAMPLES, 422)
    assert len({problem.id for problem in (*train, *test)}) == len(train) + len(test)
    shown = questions(train[0])[:-1]
    assert len(shown) == gsm8k.EXAMPLES
    assert all(questions(problem)[:-1] == shown for problem in (*train, *test))
    assert not {*shown} & {questions(problem)[-1] for problem in (*train, *test)}
    # Whole problems of the benchmark, asked in other words.
    whole = {problem.messages[0]["content"] for problem in find_task("gsm8k").of_split("test") if problem.messages}
    assert {f"{questions(problem)[-1]}\n\n{benchmarks.INSTRUCTION}" for problem in test} < whole
    assert all(right(problem, f"So it is {problem.answer}.0") == 1.0 for problem in (*train, *test))


def test_a_worked_solution_is_shown_by_its_calculations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "train": [
            ("Two days?", "It is 7*2 = <<7*2=14>>14.\n#### 14"),
            ("How much?", "It is <<9-4= 5>>5, and <<2*5=10>>10 in all.\n#### 10"),
            ("Many?", "<<1+1=2>> <<2+1=3>> <<3+1=4>>\n#### 4"),
            ("None?", "It is 4.\n#### 4"),
            ("Once more?", "It is <<8*2=16>>16.\n#### 1,016"),
        ],
        "test": [("Here?", "<<.5*2=1.0>>\n#### 1"), ("There?", "<<1+1=2>> <<2+1=3>> <<3+1=4>>\n#### 4")],
    }
    for split, lines in rows.items():
        text = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in lines)
        (tmp_path / f"gsm8k_{split}.jsonl").write_text(text)
    monkeypatch.setenv("QSHARP_DATA", str(tmp_path))
    train, test = (find_task("gsm8k-short").of_split(split) for split in ("train", "test"))
    assert [(problem.id, problem.answer) for problem in (*train, *test)] == [("train-4", "1016"), ("test-0", "1")]
    assert [turn["content"] for turn in test[0].messages or ()] == [
        "Two days?", "7 * 2 = 14. The answer is 14.", "How much?", "9 - 4 = 5, 2 * 5 = 10. The answer is 10.", "Here?",
    ]  # fmt: skip
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps({"question": "?", "answer": "<<1=1>>\n#### one"}) + "\n")
    benchmarks._of_file.cache_clear()
    with pytest.raises(TaskError, match="GSM8K's test-0 must be a number; got 'one'"):
        find_task("gsm8k-short").of_split("test")


@pytest.mark.parametrize(
    ("calculations", "answer", "operations"),
    [
        (("7 - 3 = 4",), "4", "-"), (("7 - 3 = 4", "4 / 2 = 2"), "2", "-/"), ((), "4", None),
        (("7 - 3 = 4",), "5", None), (("7 - 3 = 4", "4 / 2 = 2"), "4", None), (("7.5 - 3 = 4.5",), "4.5", None),
        (("( 7 - 3 ) - 1 = 3",), "3", None), (("3 = 3",), "3", None), (("1 + 2 + 3 = 6",), "6", None),
        (("-7 + 9 = 2",), "2", None), (("2 = 2", "1 + 1 = 2"), "2", None), (("86 * 2 = 172",), "172", "*"),
        (("86 * 2 = 172", "86 + 172 = 258"), "258", "*+"), (("86 + 172 = 258",), "258", None),
    ],
)  # fmt: skip
def test_what_can_be_shown(calculations: tuple[str, ...], answer: str, operations: str | None) -> None:
    worked = Worked("0", "He sold 86, and twice as many. How many?", calculations, answer)
    assert worked.operations() == operations
    assert replace(worked, question="How many? " * 20).operations() is None


@given(st.integers(0, 2**32))
def test_examples_are_the_first_of_different_operations(seed: int) -> None:
    dice = random.Random(seed)
    every = [
        Worked(str(i), f"{i}?", tuple(f"8 {dice.choice('+-*/')} 2 = 4" for _ in range(dice.randint(1, 2))), "4")
        for i in range(dice.randint(1, 30))
    ]
    number, alike = dice.randint(1, 9), dice.randint(1, 3)
    shown = examples(every, number, alike)
    kinds = [worked.operations() for worked in shown]
    assert all(kinds.count(kind) <= alike for kind in kinds)
    assert shown == [worked for worked in every if worked in shown]
    left = [worked for worked in every if worked not in shown and int(worked.id) < int(shown[-1].id)]
    assert all(kinds.count(worked.operations()) == alike for worked in left)
    assert len(shown) == number or all(
        kinds.count(worked.operations()) == alike for worked in every if worked not in shown
    )
    problem = asked_after(shown, every[-1])
    assert questions(problem) == [*(worked.question for worked in shown), every[-1].question]


@pytest.mark.parametrize("text", ["4", " 8 - 4 = 4. The answer is 4.", "The answer is 4.00", "It is $4", "04"])
def test_the_right_number(text: str) -> None:
    problem = Problem(id="0", prompt="?", answer="4")
    assert right(problem, text) == 1.0
    assert right(problem, text.replace("4", "5")) == right(problem, f"{text} So 3.") == 0.0


@pytest.mark.parametrize("text", ["", "The answer is four.", "9" * 5000, "\ud800", "1/0", "4 or 1/0"])
def test_odd_texts_earn_nothing(text: str) -> None:
    assert right(Problem(id="0", prompt="?", answer="4"), text) == 0.0
    find_task("svamp").vote(text)
