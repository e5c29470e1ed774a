"""Sentence, tone, extraction: splits, right answers and near misses, odd texts, what earns nothing, and the judge."""

import asyncio
import json
import random
import sys
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.rewards.base import Case
from trainer.rewards.verifiers import OWN, Judge, TaskRef, Verdict, Weighted
from trainer.tasks import extraction, sentence, splits, tone
from trainer.tasks.base import Problem, TaskError
from trainer.tasks.registry import find_task

TASKS = {name: find_task(name) for name in ("sentence", "tone", "extraction")}
QUARTERS = {0.0, 0.25, 0.5, 0.75, 1.0}
WORDS = ("farmer", "ladder", "market")
GOOD = "The farmer carried a ladder to the market."


def every(name: str) -> list[Problem]:
    return [*TASKS[name].of_split("train"), *TASKS[name].of_split("held_out")]


def earned(problem: Problem, name: str, text: str) -> float:
    reward = TASKS[name].reward
    assert reward is not None
    found = reward(problem, text)
    assert isinstance(found, float)
    return found


def asked(problem: Problem) -> str:
    return json.dumps(problem.request())


@given(st.integers(2, 60), st.data())
def test_what_is_drawn_is_in_one_split(size: int, data: st.DataObject) -> None:
    train, seed = data.draw(st.integers(1, size - 1)), data.draw(st.text(max_size=5))
    held_out = data.draw(st.integers(1, size - train))
    found = splits.drawn(range(size), seed, train, held_out)
    assert found == splits.drawn(range(size), seed, train, held_out)
    assert (len(found["train"]), len(found["held_out"])) == (train, held_out)
    assert len({*found["train"], *found["held_out"]}) == train + held_out


@pytest.mark.parametrize("name", TASKS)
def test_no_prompt_is_in_both_splits(name: str) -> None:
    prompts = [asked(problem) for problem in every(name)]
    assert len(prompts) == splits.TRAIN_PROBLEMS + splits.HELD_OUT_PROBLEMS == len(set(prompts))
    assert prompts == [asked(problem) for problem in every(name)]
    with pytest.raises(TaskError, match="train, held_out"):
        TASKS[name].of_split("test")


def test_the_words_of_a_sentence_are_words_of_their_own() -> None:
    lists = (sentence.PEOPLE, sentence.THINGS, sentence.PLACES)
    words = [word for each in lists for word in each]
    assert len(set(words)) == len(words)
    assert not {*words} & {*sentence.EXAMPLE[0]}
    assert sentence.reward(sentence.EXAMPLE[0], *sentence.EXAMPLE[1:]) == 1.0
    assert {problem.data["most"] for problem in every("sentence")} == {*sentence.MOST}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (GOOD, 4), (f"  {GOOD} ", 4), ("FARMER or not, he took that ladder to market!", 4),
        ("The farmers carried a ladder to the market.", 3),  # another word
        ("The farmer carried a ladder to the supermarket.", 3),
        (GOOD.rstrip("."), 3), (GOOD.lower(), 3), (f"{GOOD} He sold it.", 3), (f"{GOOD}\nHe sold it.", 3),
        ("The farmer has a ladder: market.", 3),  # two of them side by side
        ("Farmer, ladder, market, that is all there is.", 3), ("The farmer: ladder at market.", 3),  # five words
        ("Early on the farmer carried a heavy old ladder to the market square.", 3),  # thirteen words
        ("The farmer went to the river.", 2), ("The sailor carried a rope to the river.", 1),
        ("", 0), (".", 0), ("Words", 0), ("1 2 3 4 5 6.", 0),
    ],
)  # fmt: skip
def test_sentences(text: str, kept: int) -> None:
    assert sentence.reward(WORDS, 12, text) == kept / 4


@given(st.sampled_from(every("sentence")), st.integers(0, 2**32))
def test_a_sentence_that_is_made_to_order_earns_all(problem: Problem, seed: int) -> None:
    """In any order, of any length that is allowed; one word less or more than allowed, and it does not."""
    dice = random.Random(seed)
    words, most = dice.sample(problem.data["words"], 3), problem.data["most"]

    def of(length: int) -> str:
        places = sorted(dice.sample(range(1, length, 2), 3))
        found = ["so"] * length
        for place, word in zip(places, words, strict=True):
            found[place] = word
        return " ".join(["So", *found[1:]]) + dice.choice(".!?")

    assert earned(problem, "sentence", of(dice.randint(sentence.LEAST, most))) == 1.0
    assert earned(problem, "sentence", of(most + 1)) == 0.75
    assert earned(problem, "sentence", of(dice.randint(sentence.LEAST, most)).replace(words[0], "so")) == 0.75


def test_the_same_words_are_more_or_less_praise() -> None:
    said = "a {} place with {} rooms, and the people there were {} to us"
    praised = [
        tone.reward(said.format(*words))
        for words in (("terrible", "dirty", "rude"), ("plain", "small", "fair"), ("wonderful", "lovely", "kind"))
    ]
    assert praised == sorted(praised)
    assert praised[0] == 0.0
    assert praised[-1] == 1.0
    assert tone.reward("a place that is not good, and it was not nice to be there") == 0.0


@pytest.mark.parametrize(
    "text", ["", " ", "great", "great " * 20, "so good and so good and so good and so good and so good", "😀" * 30]
)
def test_short_and_repeated_praise_earns_nothing(text: str) -> None:
    assert tone.reward(text) == 0.0


def test_without_the_package_it_is_said_before_anything_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    tone._analyser.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)  # as if it were not installed
    with pytest.raises(TaskError, match="pip install vaderSentiment"):
        TASKS["tone"].of_split("train")


@given(st.sampled_from(every("extraction")), st.integers(0, 2**32))
def test_facts_that_are_right_and_nearly_so(problem: Problem, seed: int) -> None:
    dice = random.Random(seed)
    facts = extraction.Facts(**problem.data)
    assert problem.answer == facts.as_json()
    pairs = list(asdict(facts).items())
    dice.shuffle(pairs)
    right = dict(pairs)

    def reward(value: object) -> float:
        return earned(problem, "extraction", value if isinstance(value, str) else json.dumps(value))

    assert reward(json.dumps(right, indent=dice.choice([None, 1, 4]))) == reward(f" {json.dumps(right)}\n") == 1.0
    key = dice.choice(list(right))
    assert reward({name: value for name, value in right.items() if name != key}) == 0.0
    assert reward({**right, "note": ""}) == 0.0
    assert reward({**right, "age": str(facts.age)}) == reward({**right, "age": float(facts.age)}) == 0.0
    assert reward({**right, "age": facts.age + dice.choice([-1, 1])}) == 0.0
    assert reward({**right, "city": facts.city + "s"}) == 0.0
    assert reward([right]) == reward(json.dumps(right) + "}") == reward("So: " + json.dumps(right)) == 0.0
    assert reward(json.dumps(right)[: dice.randrange(len(json.dumps(right)))]) == 0.0
    assert extraction.vote(json.dumps(right)) == extraction.vote(problem.answer) != extraction.vote("{}")


def test_passages_say_their_facts_and_solved_ones_have_others() -> None:
    for problem in every("extraction"):
        assert problem.messages is not None
        passage = problem.messages[-1]["content"]
        assert all(str(fact) in passage for fact in problem.data.values())
        assert sum(city in passage for city in extraction.CITIES) in (1, 2)
    for passage, facts in extraction.EXAMPLES:
        assert all(str(fact) in passage for fact in asdict(facts).values())
        assert not {facts.job, facts.city} & {*extraction.JOBS, *extraction.CITIES}
        assert facts.age in extraction.AGES


odd = st.one_of(
    st.text(max_size=200),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "age", "x"]), inner),
        max_leaves=8,
    ).map(json.dumps),
)  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
@given(text=odd)
def test_odd_texts_never_raise(name: str, text: str) -> None:
    assert earned(every(name)[0], name, text) in QUARTERS
    TASKS[name].vote(text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"name":' * 100_000, "9" * 5000, "\ud800", "\x00", '{"age": NaN}'])
@pytest.mark.parametrize("name", TASKS)
def test_very_odd_texts_earn_nothing(name: str, text: str) -> None:
    assert earned(every(name)[0], name, text) == 0.0


def test_the_judge_in_its_processes() -> None:
    texts = {
        "sentence": GOOD,
        "tone": " a wonderful place with lovely rooms, and the people there were kind to us",
        "extraction": None,
    }

    async def judged(name: str, problem: Problem, text: str) -> Verdict:
        async with Judge([Weighted(OWN)], workers=1) as judge:
            return await judge.judge(Case(completion=text, problem=problem), TaskRef(TASKS[name], name))

    for name, text in texts.items():
        problem = every(name)[0]
        if name == "sentence":
            problem = replace(problem, data={"words": list(WORDS), "most": 12})
        verdict = asyncio.run(judged(name, problem, text or problem.answer))
        assert (verdict.reward, dict(verdict.failures)) == (1.0, {}), name
