"""Verdicts on answers as public data sets and models write them: `numeric`, `math_verify`, and votes."""

from fractions import Fraction
from pathlib import Path

import pytest

from qsharp_core.answers import VOTES, last_boxed, number_of
from trainer.rewards.base import Case
from trainer.rewards.builtin import numeric
from trainer.tasks import competition_math, gsm8k
from trainer.tasks.base import Problem, TaskError
from trainer.tasks.mathematics import equal

# The reference answer, a completion, and whether it is right: for both verifiers.
NUMBERS = [
    ("5", "The answer is 5.", 1), ("5", "5", 1), ("5", "#### 5", 1), ("5", "it is 6", 0), ("5", "", 0),
    ("5", "\\boxed{5}", 1), ("5", "$\\boxed{5}$", 1), ("5", "\\boxed{ 5 }", 1), ("5", "\\boxed{5}.", 1),
    ("5", "Step 1: \\boxed{2}\nStep 2: \\boxed{5}", 1), ("2", "Step 1: \\boxed{2}\nStep 2: \\boxed{5}", 0),
    ("5", "\\boxed{6} or \\boxed{5}", 1), ("5", "\\boxed{5} and then \\boxed{6}", 0), ("5", "\\boxed{5} of 9 boys", 1),
    ("5", "\\fbox{5}", 1), ("5", "\\boxed {5}", 1), ("5", "\\boxed{\\text{5}}", 1), ("5", "**5**", 1),
    # thousands
    ("1200", "1,200", 1), ("1,200", "1200", 1), ("1200", "\\boxed{1{,}200}", 1), ("12{,}000", "\\boxed{12000}", 1),
    ("12000", "\\boxed{12\\,000}", 1), ("1000000", "1,000,000", 1), ("70000", "#### 70,000", 1),
    ("70,000", "2 * 35,000 = 70,000 in all", 1), ("12000", "\\boxed{12}", 0), ("1234567", "\\boxed{1,234,567}", 1),
    # decimals
    ("0.5", ".5", 1), ("29", "29.00", 1), ("29.00", "\\boxed{29}", 1), ("18.9", "18.90", 1), ("3.14", "3.15", 0),
    ("3.50", "\\boxed{3.5}", 1), ("0.10", "\\boxed{.1}", 1), ("100.5", "\\boxed{100.50}", 1),
    # currencies
    ("18.90", "$18.90", 1), ("$18.90", "\\boxed{18.90}", 1), ("\\$18.90", "\\boxed{18.9}", 1), ("18.9", "\\$18.90", 1),
    ("18", "\\boxed{\\$18}", 1), ("1000", "£1,000", 1), ("€5", "\\boxed{5}", 1), ("5", "\\boxed{5€}", 1),
    ("1200", "so \\boxed{\\$1,200}", 1), ("10", "\\boxed{\\$10.00}", 1), ("\\$10", "He pays $10.", 1),
    ("10\\text{ dollars}", "\\boxed{10}", 1), ("10", "\\boxed{10 \\text{ dollars}}", 1),
    # units and percent
    ("50", "\\boxed{50\\%}", 1), ("50\\%", "\\boxed{50}", 1), ("50", "It is 50%.", 1), ("90^\\circ", "\\boxed{90}", 1),
    ("90", "\\boxed{90^\\circ}", 1), ("90", "\\boxed{90^{\\circ}}", 1), ("5\\text{ cm}", "\\boxed{5}", 1),
    ("5", "\\boxed{5\\text{ cm}}", 1), ("5", "\\boxed{5\\,\\text{cm}}", 1), ("12", "\\boxed{12 \\text{ apples}}", 1),
    ("12", "\\boxed{12\\mbox{ inches}}", 1), ("45", "There are 45 minutes.", 1),
    # fractions and mixed numbers
    ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}", 1), ("\\frac{1}{2}", "\\boxed{0.5}", 1), ("0.5", "\\boxed{\\frac12}", 1),
    ("1/2", "\\boxed{\\dfrac{1}{2}}", 1), ("\\tfrac12", "\\boxed{1/2}", 1), ("\\frac{1}{2}", "\\boxed{2}", 0),
    ("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}", 1), ("\\frac{7}{3}", "\\boxed{7/3}", 1), ("7/3", "\\boxed{2.33}", 0),
    ("1\\frac{1}{2}", "\\boxed{1.5}", 1), ("1.5", "\\boxed{1\\frac{1}{2}}", 1), ("1 1/2", "\\boxed{3/2}", 1),
    ("3/2", "\\boxed{1 1/2}", 1), ("1½", "\\boxed{1.5}", 1), ("½", "\\boxed{0.5}", 1),
    ("2\\frac{3}{4}", "\\boxed{\\frac{11}{4}}", 1),
    ("\\frac{1}{3}", "\\boxed{0.333}", 0), ("\\frac{10}{4}", "\\boxed{2.5}", 1),
    # signs
    ("-5", "\\boxed{-5}", 1), ("-5", "\\boxed{−5}", 1), ("5", "\\boxed{-5}", 0), ("-5", "\\boxed{5}", 0),
    ("-.5", "\\boxed{-0.5}", 1), ("-0.5", "\\boxed{-.5}", 1), ("-\\frac{3}{4}", "\\boxed{-0.75}", 1),
    ("-0.75", "\\boxed{-\\frac{3}{4}}", 1), ("-3", "x = -3", 1), ("3", "5-2 = 3", 1), ("-7", "\\boxed{(-7)}", 1),
    ("5", "\\boxed{+5}", 1),
    # powers
    ("1000000", "\\boxed{10^6}", 1), ("10^{6}", "\\boxed{1000000}", 1), ("1000000", "\\boxed{10^{6}}", 1),
    ("3 \\times 10^{8}", "\\boxed{300000000}", 1), ("300000000", "\\boxed{3\\times10^8}", 1),
    ("1000", "\\boxed{1e3}", 1),
    ("1e3", "\\boxed{1000}", 1), ("1024", "\\boxed{2^{10}}", 1), ("0.001", "\\boxed{10^{-3}}", 1),
    ("2^{10}", "\\boxed{1024}", 1),
    ("1000000", "\\boxed{10^5}", 0),
    # other scripts and full width
    ("12", "１２", 1), ("12", "\\boxed{１２}", 1), ("3", "\\boxed{٣}", 1), ("12", "\\boxed{१२}", 1),
    ("3.5", "\\boxed{３．５}", 1),
    ("3.5", "\\boxed{٣٫٥}", 1), ("-5", "\\boxed{－５}", 1), ("1200", "\\boxed{１，２００}", 1),
    # with a name
    ("3", "\\boxed{x=3}", 1), ("3", "\\boxed{x = 3}", 1), ("x=3", "\\boxed{3}", 1), ("1.50", "\\boxed{\\$1.50}", 1),
]  # fmt: skip
# The library takes no number that touches a word of a script without spaces.
WRONG_IN_THE_LIBRARY = [("7", "答案是７。"), ("12", "共12个。")]
# What is no single number: for the library.
MATHEMATICS = [
    ("(1,2)", "\\boxed{(1, 2)}", 1), ("(1,2)", "\\boxed{(2,1)}", 0), ("[1,2)", "\\boxed{[1,2)}", 1),
    ("[1,2)", "\\boxed{(1,2)}", 0), ("(-\\infty,3]", "\\boxed{(-\\infty, 3]}", 1), ("\\infty", "\\boxed{\\infty}", 1),
    ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", 1), ("1,2", "\\boxed{2, 1}", 1), ("\\{1,2\\}", "\\boxed{\\{1,3\\}}", 0),
    ("\\sqrt{8}", "\\boxed{2\\sqrt{2}}", 1), ("\\sqrt{8}", "\\boxed{2.83}", 0),
    ("\\pi/2", "\\boxed{\\frac{\\pi}{2}}", 1),
    ("\\pi", "\\boxed{3.14}", 0), ("x^2+2x+1", "\\boxed{(x+1)^2}", 1), ("x^2+1", "\\boxed{(x+1)^2}", 0),
    ("\\text{A}", "\\boxed{A}", 1), ("A", "\\boxed{\\text{(A)}}", 1), ("\\text{A}", "\\boxed{B}", 0),
    ("\\text{Monday}", "\\boxed{Monday}", 1), ("2:3", "\\boxed{2:3}", 1), ("11:30", "\\boxed{11:30}", 1),
    ("3+4i", "\\boxed{4i+3}", 1), ("3+4i", "\\boxed{3-4i}", 0), ("e^2", "\\boxed{e^{2}}", 1),
    ("\\ln 2", "\\boxed{\\ln(2)}", 1),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", 1),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}2\\\\1\\end{pmatrix}}", 0),
    ("y=2x+1", "\\boxed{y = 2x + 1}", 1), ("y=2x+1", "\\boxed{y=1+2x}", 1), ("x \\le 3", "\\boxed{x \\leq 3}", 1),
    ("x<3", "\\boxed{x>3}", 0), ("\\frac{\\sqrt{3}}{2}", "\\boxed{\\dfrac{\\sqrt3}{2}}", 1), ("5!", "\\boxed{120}", 1),
    ("\\binom{5}{2}", "\\boxed{10}", 1), ("(2,3),(4,5)", "\\boxed{(4,5),(2,3)}", 1),
    ("\\frac{x}{2}", "\\boxed{0.5x}", 1),
    ("1", "Step 1: \\boxed{\\pi}\nStep 2: \\boxed{1}", 1), ("6-5i", "\\boxed{6 - 5i}", 1), ("0.5", "\\boxed{50\\%}", 1),
    ("-\\frac{1}{2}", "\\boxed{\\frac{-1}{2}}", 1), ("\\emptyset", "\\boxed{\\emptyset}", 1),
]  # fmt: skip


def judged(answer: str, completion: str) -> float | None:
    return numeric(Case(completion=completion, problem=Problem(id="p", prompt="?", answer=answer)))


def test_the_tables_are_of_a_size_that_says_something() -> None:
    assert len({(a, c) for a, c, _ in [*NUMBERS, *MATHEMATICS]}) >= 150


@pytest.mark.parametrize(("answer", "completion", "right"), NUMBERS)
def test_numbers(answer: str, completion: str, right: int) -> None:
    assert judged(answer, completion) == right
    assert equal(answer, completion) == right


@pytest.mark.parametrize(("answer", "completion"), WRONG_IN_THE_LIBRARY)
def test_what_the_library_gets_wrong(answer: str, completion: str) -> None:
    assert judged(answer, completion) == 1
    assert equal(answer, completion) == 0


@pytest.mark.parametrize(("answer", "completion", "right"), MATHEMATICS)
def test_mathematics(answer: str, completion: str, right: int) -> None:
    assert equal(answer, completion) == right


@pytest.mark.parametrize(
    "same",
    [
        ["29", "29.00", "\\boxed{29}", "It is 29.", "\\boxed{\\$29}", "２９", "58/2", "\\boxed{2.9\\times10^1}"],
        ["0.5", ".5", "1/2", "\\boxed{\\frac{1}{2}}", "½", "-(-0.5) = 0.5"],
        ["-3", "\\boxed{-3.0}", "−3"],
    ],
)
def test_equal_numbers_are_one_vote(same: list[str]) -> None:
    assert len({VOTES["number"](text) for text in same}) == 1
    assert gsm8k.TASK.vote("it is 1,200.") == gsm8k.TASK.vote("\\boxed{1200.00}") == "1200"
    assert VOTES["number"]("nothing") is None


@pytest.mark.parametrize("text", ["", "none", "1/0", "10^{5000}", "1e999999", "9" * 401, "x^" * 1000])
def test_what_is_no_number_costs_nothing(text: str) -> None:
    assert number_of(text) is None or text.startswith("x")


def test_boxes() -> None:
    assert last_boxed("\\boxed{\\{1,2\\}}") == "\\{1,2\\}"
    assert last_boxed("\\boxed{\\frac{1}{2}") is None
    assert last_boxed("\\boxed{}") is None
    assert number_of("\\boxed{-.5}") == Fraction(-1, 2)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("so $\\boxed{\\frac{1}{2}}$. The answer is 1/2", "\\frac{1}{2}"),
        ("so $\\boxed 7$.", "7"),
        ("so $\\boxed 12$.", "12"),
        ("so $\\boxed7$.", "7"),
        ("so $\\boxed \\frac12$.", "\\frac12"),
        ("so $\\boxed{\\text{(A)}}$", "\\text{(A)}"),
    ],
)
def test_final_answers_of_worked_solutions(solution: str, answer: str) -> None:
    assert competition_math.final(solution) == answer


@pytest.mark.parametrize(
    "solution", ["nothing", "so $\\boxed{\\frac{1}{2}$", "\\boxed{", "\\boxed{}", "\\boxed answer is 7"]
)
def test_solutions_without_a_final_answer(solution: str) -> None:
    with pytest.raises(TaskError, match="boxed"):
        competition_math.final(solution)


BESIDE = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not BESIDE.is_dir(), reason="the data sets do not lie beside the repository")
@pytest.mark.parametrize(
    "form", ["{}", "The answer is {}.", "\\boxed{{{}}}", "First \\boxed{{0}}. Then \\boxed{{{}}}."]
)
def test_every_answer_of_gsm8k_in_every_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSHARP_DATA", str(BESIDE))
    answers = [last_boxed(str(problem.answer)) or "" for problem in gsm8k.problems("test")]
    assert len(answers) == 1319
    wrong = [answer for answer in answers if judged(answer, form.format(answer)) != 1]
    assert wrong == []
    whole = [answer for answer in answers if answer.isdigit()]
    assert [answer for answer in whole if judged(answer, form.format(f"{int(answer):,}")) != 1] == []
    assert [answer for answer in whole if judged(answer, form.format(int(answer) + 1)) != 0] == []
