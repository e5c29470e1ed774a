"""Searches over HTTP: what each kind returns, that its numbers are exact, what is refused, what is left behind."""

import asyncio
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.search_frontier.sampling import Asked, Found, pool, sample, way_of
from server.request.search.ranking import ranked
from tests.conftest import Server
from tests.e2e.test_exact import TOLERANCE, check, metric, prompt_ids, send
from tests.e2e.test_http import extra
from trainer.rewards.base import Case
from trainer.rewards.verifiers import Judge, TaskRef, Weighted
from trainer.rollouts.client import ServerClient
from trainer.rollouts.collection import seed_of
from trainer.rollouts.parameters import SamplingParameters
from trainer.tasks.base import Problem, Task

PROMPT = list(range(20, 40))
REJECT = {"every": 4, "keep": 0.5}
BEST = {"kind": "best_of", "n": 6}
PARTICLES = {"kind": "particles", "n": 6, "every": 5, "resample_below": 0.9}
STOP = {"kind": "stop", "below": 0.3}


def asked(search: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    """A request whose every number can be compared."""
    guidance = {"critic": "plain", "detail": "tokens", "search": search, **fields.pop("guidance", {})}
    return {
        "model": "tiny", "prompt": PROMPT, "max_tokens": 16, "eta": 0.2, "n": 1, "temperature": 1.0, "seed": 5,
        "ignore_eos": True, "return_token_ids": True, "guidance": guidance, **fields,
    }  # fmt: skip


def complete(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def estimate(got: dict[str, Any]) -> float | None:
    """What the critic expects after the last token, from what is reported of tokens."""
    last = next((token for token in reversed(got["tokens"]) if token["value"] is not None), None)
    return None if last is None else last["value"] + got["eta"] * (last["logprob"] - last["ref_logprob"])


# -- exactness


@pytest.mark.parametrize("stream", [False, True])
def test_every_number_of_every_choice(server: Server, stream: bool) -> None:
    """All kinds, both heads, native critics, budgets and tails, all at once."""
    rng = random.Random(31 + stream)
    bodies = []
    for critic in server.critics:
        for search in (
            BEST, {**BEST, "reject": REJECT}, {**BEST, "by": "weighted", "vote": "text"}, PARTICLES,
            {**PARTICLES, "by": "value"}, {"kind": "stop", "below": rng.uniform(-0.5, 0.9)},
        ):  # fmt: skip
            guidance: dict[str, Any] = {"critic": critic, "tail": rng.choice(["floor", "keep"])}
            if rng.random() < 0.5:
                guidance["candidates"], guidance["min_prob"] = rng.choice([2, 8, 64]), rng.choice([0, 0.01, 0.1])
            for budget in ("kl_total", "kl_token"):
                if rng.random() < 0.3:
                    guidance[budget] = rng.choice([0.03, 0.3, 2.0])
            bodies.append(
                asked(
                    search,
                    guidance=guidance,
                    prompt=prompt_ids(rng, 40),
                    max_tokens=rng.randrange(3, 24),
                    n=rng.choice([1, 2, 3]),
                    temperature=rng.choice([0.7, 1.0, 1.3]),
                    eta=rng.choice([0.05, 0.3, 2.0]),
                    seed=rng.randrange(2**31),
                    ignore_eos=rng.random() < 0.7,
                    stream=stream,
                )
            )

    async def main() -> list[list[dict[str, Any]]]:
        gate = asyncio.Semaphore(8)
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
            return await asyncio.gather(*(send(http, gate, body) for body in bodies))

    compared = 0
    for body, choices in zip(bodies, asyncio.run(main()), strict=True):
        search = body["guidance"]["search"]
        assert len(choices) == body["n"]
        for got in choices:
            compared += check(server, body, got)
            report = got["search"]
            assert report["kind"] == search["kind"]
            assert report["n"] == search.get("n", 1)
            assert got["tokens_total"] <= report["tokens_spent"] <= report["n"] * (body["max_tokens"] + 3)
            assert report["estimate"] == (
                None if (wanted := estimate(got)) is None else pytest.approx(wanted, abs=1e-9)
            )
            assert search["kind"] == "particles" or report["log_estimate"] is None
            assert search["kind"] != "particles" or got["value"] is None or report["log_estimate"] is not None
            assert (report["sample"] is None) == (search["kind"] == "particles")
    print(f"{compared} tokens compared")
    assert compared > 500


@pytest.mark.v2
def test_every_number_on_the_v2_runner(server_v2: Server) -> None:
    bodies = [
        asked(search, prompt=prompt_ids(random.Random(i), 20), max_tokens=6, guidance={"critic": critic}, n=2)
        for i, (search, critic) in enumerate(
            [
                ({**PARTICLES, "n": 3, "every": 2}, "fast"),
                ({**BEST, "n": 3, "reject": {"every": 2, "keep": 0.5}}, "plain"),
            ]
        )
    ]
    for body in bodies:
        body |= {"stream": False}

    async def main() -> list[list[dict[str, Any]]]:
        async with httpx.AsyncClient(base_url=server_v2.url, timeout=300) as http:
            return await asyncio.gather(*(send(http, asyncio.Semaphore(1), body) for body in bodies))

    for body, choices in zip(bodies, asyncio.run(main()), strict=True):
        assert sum(check(server_v2, body, got) for got in choices) > 4


# -- the best of several


@pytest.mark.parametrize("by", ["value", "majority", "weighted"])
def test_the_best_are_those_of_the_samples_that_a_plain_request_has(http: httpx.Client, by: Any) -> None:
    plain = complete(http, asked(None, n=6))
    estimates = [estimate(choice["guidance"]) for choice in plain]
    order = ranked(by, [choice["text"] for choice in plain], estimates, vote="number")
    found = complete(http, asked({**BEST, "by": by}, n=3))
    assert [choice["index"] for choice in found] == [0, 1, 2]
    assert [choice["guidance"]["search"]["sample"] for choice in found] == order[:3]
    for choice in found:
        same = plain[choice["guidance"]["search"]["sample"]]
        assert choice["token_ids"] == same["token_ids"]
        assert (choice["text"], choice["finish_reason"]) == (same["text"], same["finish_reason"])
        assert choice["guidance"]["search"]["tokens_spent"] == 6 * 16
        assert choice["guidance"]["kl"] == pytest.approx(same["guidance"]["kl"], abs=TOLERANCE)


def test_rejection_spends_less_and_keeps_those_that_lead(http: httpx.Client) -> None:
    body = asked({**BEST, "n": 16, "reject": {"every": 8, "keep": 0.25}}, max_tokens=80)
    before = metric_of(http, "qsharp_search_rejections_total")
    (found,) = complete(http, body)
    report = found["guidance"]["search"]
    assert report["rejected"] == 15
    # 16 samples of more than 8 tokens, as far as the first are ahead of the last, and one whole; 1,280 without.
    assert 15 * 9 + 80 <= report["tokens_spent"] <= 700
    assert len(found["token_ids"]) == 80
    assert metric_of(http, "qsharp_search_rejections_total") - before == 15
    (again,) = complete(http, body)
    assert again["token_ids"] == found["token_ids"]  # whoever was faster


# -- particles


def test_particles_of_one_seed_are_the_same_and_of_others_differ(http: httpx.Client) -> None:
    first, again = (complete(http, asked(PARTICLES, n=4)) for _ in range(2))
    assert [choice["token_ids"] for choice in first] == [choice["token_ids"] for choice in again]
    other = complete(http, asked(PARTICLES, n=4, seed=6))
    assert [choice["token_ids"] for choice in first] != [choice["token_ids"] for choice in other]


def test_a_single_particle_is_a_sample_in_rounds(http: httpx.Client) -> None:
    (found,) = complete(http, asked({"kind": "particles", "n": 1, "every": 3}, max_tokens=11))
    report = found["guidance"]["search"]
    assert (report["tokens_spent"], report["resamplings"]) == (11, 0)
    got = found["guidance"]
    assert [token["token_id"] for token in got["tokens"]] == found["token_ids"]
    tokens, eta = got["tokens"], got["eta"]
    known = [i for i, token in enumerate(tokens) if token["value"] is not None]
    ratio = sum(token["logprob"] - token["ref_logprob"] for token in tokens[: known[-1]])
    assert report["log_estimate"] == pytest.approx(tokens[known[-1]]["value"] / eta - ratio, abs=1e-9)


def test_resampled_particles_share_their_beginnings(http: httpx.Client) -> None:
    before = metric_of(http, "qsharp_search_resamplings_total")
    found = complete(http, asked({**PARTICLES, "n": 16, "resample_below": 1.0}, n=16, eta=0.05, max_tokens=20))
    resamplings = found[0]["guidance"]["search"]["resamplings"]
    assert resamplings >= 2
    assert metric_of(http, "qsharp_search_resamplings_total") - before == resamplings
    paths = [tuple(choice["token_ids"]) for choice in found]
    assert len({path[:5] for path in paths}) < len(set(paths))


@pytest.mark.parametrize("every", [1, 2, 16])
def test_stop_strings_end_particles_wherever_rounds_part_them(http: httpx.Client, every: int) -> None:
    search = {"kind": "particles", "n": 1, "every": every}
    (whole,) = complete(http, asked(search, max_tokens=12))
    at = next(i for i in range(3, 11) if whole["text"][:i].find(whole["text"][i : i + 2]) < 0)
    stop = whole["text"][at : at + 2]
    end = whole["text"].index(stop)
    (found,) = complete(http, asked(search, max_tokens=12, stop=[stop]))
    assert found["text"] == whole["text"][:end]
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", stop)
    assert found["token_ids"] == whole["token_ids"][: len(found["token_ids"])]
    (kept,) = complete(http, asked(search, max_tokens=12, stop=[stop], include_stop_str_in_output=True))
    assert kept["text"] == whole["text"][: end + 2]


def test_particles_end_by_tokens(http: httpx.Client) -> None:
    search = {"kind": "particles", "n": 1, "every": 4}
    (whole,) = complete(http, asked(search, max_tokens=12))
    token = whole["token_ids"][6]
    (found,) = complete(http, asked(search, max_tokens=12, stop_token_ids=[token]))
    end = whole["token_ids"].index(token) + 1
    assert found["token_ids"] == whole["token_ids"][:end]
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", token)


# -- stopping


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_ends_where_its_value_falls(http: httpx.Client, stream: bool) -> None:
    plain = complete(http, asked(None, n=3, max_tokens=24, eta=0.5))
    values = [[token["value"] for token in choice["guidance"]["tokens"]] for choice in plain]
    known = sorted(value for of_choice in values for value in of_choice[4:] if value is not None)
    below = known[len(known) // 8] + 1e-4  # some choices fall below it, at some token
    body = asked({"kind": "stop", "below": below}, n=3, max_tokens=24, eta=0.5, stream=stream)
    found = streamed(http, body) if stream else complete(http, body)
    stopped = 0
    for choice, same, of_choice in zip(found, plain, values, strict=True):
        fallen = next((i for i, value in enumerate(of_choice) if value is not None and value < below), None)
        length = 24 if fallen is None else fallen + 1
        stopped += fallen is not None
        assert choice["token_ids"] == same["token_ids"][:length]
        assert choice["text"] == same["text"][: len(choice["text"])]
        assert choice["guidance"]["tokens_total"] == length == len(choice["guidance"]["tokens"])
        reasons = ("length", None) if fallen is None else ("stop", "value")
        assert (choice["finish_reason"], choice["stop_reason"]) == reasons
        assert choice["guidance"]["search"]["tokens_spent"] >= length
        if fallen is not None:
            assert choice["guidance"]["tokens"][-1]["value"] < below
    assert stopped >= 1


def streamed(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a stream, put together."""
    found: dict[int, dict[str, Any]] = {}
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        assert stream.status_code == 200
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                for piece in json.loads(line.removeprefix("data: "))["choices"]:
                    whole = found.setdefault(piece["index"], {"text": "", "token_ids": []})
                    whole["text"] += piece["text"]
                    whole["token_ids"] += piece["token_ids"] or []
                    whole |= {k: piece[k] for k in ("finish_reason", "stop_reason", "guidance") if k in piece}
    return [found[i] for i in range(body["n"])]


def test_logprobs_end_with_the_choice(http: httpx.Client) -> None:
    body = asked({"kind": "stop", "below": 10.0}, logprobs=1)
    for choice in (*complete(http, body), *complete(http, asked({"kind": "stop", "below": -10.0}, logprobs=1))):
        assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"]) == choice["guidance"]["tokens_total"]


# -- clients


@pytest.mark.parametrize(
    "search", [BEST, {**BEST, "reject": REJECT}, PARTICLES, STOP], ids=["best_of", "reject", "particles", "stop"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client(client: openai.OpenAI, search: dict[str, Any], stream: bool) -> None:
    body: dict[str, Any] = {"eta": 0.2, "guidance": {"search": search}, "ignore_eos": True}
    n = 2
    if not stream:
        made = client.completions.create(model="tiny", prompt="What is 1 + 2?", max_tokens=8, n=n, extra_body=body)
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=8, n=n, extra_body=body
        )
        for choices in (made.choices, chat.choices):
            assert [choice.index for choice in choices] == [0, 1]
            for choice in choices:
                assert extra(choice)["search"]["kind"] == search["kind"]
        assert made.usage is not None
        assert made.usage.completion_tokens == sum(extra(choice)["tokens_total"] for choice in made.choices)
        return
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=8, n=n, stream=True, extra_body=body
        )
    )
    last = {c.choices[0].index: extra(c.choices[0]) for c in chunks if c.choices and c.choices[0].finish_reason}
    assert last.keys() == {0, 1}
    assert all(got["search"]["kind"] == search["kind"] for got in last.values())
    if search["kind"] != "stop":
        assert all(got["tokens_total"] == 8 for got in last.values())


def test_several_prompts_are_searched_apart(http: httpx.Client) -> None:
    for search in (BEST, PARTICLES):
        found = complete(http, asked(search, prompt=[PROMPT, PROMPT[:7]], n=2, guidance={"min_prob": 0}))
        assert [choice["index"] for choice in found] == [0, 1, 2, 3]
        values = [choice["guidance"]["value"] for choice in found]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
        assert abs(values[0] - values[2]) > 1e-3


def test_another_route_searches_too(http: httpx.Client) -> None:
    body = {"model": "tiny", "input": "Hi", "max_output_tokens": 6, "eta": 0.2, "guidance": {"search": BEST}}
    answer = http.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["guidance"]["search"]["n"] == 6
    refused = http.post("/v1/responses", json={**body, "guidance": {"search": {**BEST, "n": 17}}})
    assert refused.json()["error"]["param"] == "guidance.search.n"


# -- the benchmark of searches


def test_the_benchmark_samples_what_it_says(http: httpx.Client, url: str, tmp_path: Path) -> None:
    """Its pools are in the order they were drawn; a search returns one of them, at the cost of all; it goes on."""
    problems = [Problem(id=str(i), prompt=[*PROMPT, 20 + i]) for i in range(3)]
    task = Task(name="even", problems=lambda split: problems, splits=("all",))

    def even(case: Case) -> float:
        return len(case.completion) % 2

    ways = [pool("pool", 0.2, 4), way_of("best_of:n=4", 0.2, "text"), way_of("particles:n=2,every=4", 0.2, "text")]

    async def run() -> tuple[Asked, Found]:
        async with Judge([Weighted.of(even)]) as judge, ServerClient(url) as client:
            asked = Asked(
                task=TaskRef(task, "even"), problems=problems, sampling=SamplingParameters(max_tokens=9), model="tiny",
                critic="plain@1", repeats=2, pools=2, rows=4, seed=0,
            )  # fmt: skip
            return asked, await sample(client, judge, asked, ways, tmp_path / "samples.jsonl")

    asked, found = asyncio.run(run())
    body = {
        "model": "tiny", "prompt": problems[1].prompt, "n": 4, "eta": 0.2, **asked.sampling.fields(),
        "seed": seed_of(asked.key(ways[0], problems[1], 1)),
        "guidance": {"critic": "plain@1", "candidates": 10, "min_prob": 0},
    }  # fmt: skip
    plain = complete(http, body)
    assert [one.text for one in found["pool"]["1"][1]] == [choice["text"] for choice in plain]
    assert [one.tokens for one in found["pool"]["1"][1]] == [choice["guidance"]["tokens_total"] for choice in plain]
    assert all(one.reward == len(one.text) % 2 for some in found["pool"].values() for group in some for one in group)
    for way in ways[1:]:
        assert all(
            len(group) == 1 and group[0].tokens >= way.size for some in found[way.name].values() for group in some
        )
    spent = (tmp_path / "samples.jsonl").read_bytes()
    assert asyncio.run(run())[1] == found
    assert (tmp_path / "samples.jsonl").read_bytes() == spent


# -- what is refused


@pytest.mark.parametrize(
    ("search", "fields", "param", "says"),
    [
        ({**BEST, "n": 17}, {}, "guidance.search.n", "a whole number from 1 to 16; got 17"),
        ({**PARTICLES, "n": 10**12}, {}, "guidance.search.n", "a whole number from 1 to 16"),
        ({**BEST, "n": 0}, {}, "guidance.search.n", "a whole number from 1 to 16; got 0"),
        ({"kind": "tree"}, {}, "guidance.search.kind", "one of stop, best_of, particles"),
        (BEST, {"n": 7}, "guidance.search.n", "at least n, the choices that are returned of them: 7; got 6"),
        (BEST, {"eta": None}, "eta", "send eta"),
        (BEST, {"temperature": 0}, "temperature", "all samples are the same"),
        (PARTICLES, {"top_p": 0.9}, "top_p", "send top_p: 1"),
        (PARTICLES, {"top_k": 3}, "top_k", "send top_k: 0"),
        (PARTICLES, {"min_p": 0.3}, "min_p", "send min_p: 0"),
        (PARTICLES, {"presence_penalty": 0.5}, "presence_penalty", "cannot be combined"),
        (PARTICLES, {"min_tokens": 2}, "min_tokens", "send min_tokens: 0"),
        (PARTICLES, {"bad_words": ["x"]}, "bad_words", "leave it out"),
        (PARTICLES, {"structured_outputs": {"regex": "a"}}, "structured_outputs", "begin anew"),
        (PARTICLES, {"response_format": {"type": "json_object"}}, "structured_outputs", "response_format"),
        (BEST, {"use_beam_search": True, "n": 2}, "use_beam_search", "cannot be combined"),
        (BEST, {"seed": 2**63 - 3}, "seed", "at most"),
    ],
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_a_wrong_search_is_400_and_names_the_field(
    http: httpx.Client, route: str, search: dict[str, Any], fields: dict[str, Any], param: str, says: str
) -> None:
    text = {"prompt": "x"} if route == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    body = {"model": "tiny", "max_tokens": 4, "eta": 0.2, "guidance": {"search": search}, **text, **fields}
    for stream in (False, True):
        answer = http.post(route, json={**body, "stream": stream and not fields.get("use_beam_search")})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param, error
        assert says in error["message"]


@pytest.mark.parametrize("field", [{"logprobs": 1}, {"prompt_logprobs": 1}])
def test_particles_have_no_log_probabilities_of_one_request(http: httpx.Client, field: dict[str, Any]) -> None:
    answer = http.post("/v1/completions", json=asked(PARTICLES, **field))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(field))
    assert complete(http, asked(BEST, **field))  # of samples there are


# -- what is stored, counted and left behind


def rollout(http: httpx.Client, choice: dict[str, Any]) -> dict[str, Any]:
    answer = http.get(f"/v1/rollouts/{choice['rollout_id']}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("search", [BEST, PARTICLES, {"kind": "stop", "below": 10.0}], ids=lambda s: s["kind"])
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_that_was_searched_labels_the_reference(
    http: httpx.Client, search: dict[str, Any], stream: bool
) -> None:
    body = asked(search, n=2, store=True, seed=40)
    if stream:
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
        pieces = [choice for line in lines for choice in json.loads(line.removeprefix("data: "))["choices"]]
        choices = [piece for piece in pieces if piece["finish_reason"] is not None]
    else:
        choices = complete(http, body)
    assert len(choices) == 2
    for choice in choices:
        kept = rollout(http, choice)
        assert kept["first_valid_position"] is None
        report = choice["guidance"]["search"]
        assert kept["guidance"]["search"].items() >= search.items()
        assert kept["completion_token_ids"] == [token["token_id"] for token in choice["guidance"]["tokens"]]
        assert kept["finish_reason"] == choice["finish_reason"]
        seed = {"best_of": report["sample"], "stop": choice["index"], "particles": None}[search["kind"]]
        assert kept["sampling"]["seed"] == (None if seed is None else 40 + seed)
        assert (kept["kl"], kept["value"]) == (choice["guidance"]["kl"], choice["guidance"]["value"])
        if not stream:
            assert kept["completion_text"] == choice["text"]


def test_a_roll_out_from_what_was_searched_labels_its_own_tail(http: httpx.Client) -> None:
    """Whatever chose its beginning, the rest is the reference's."""
    (choice,) = complete(http, asked(PARTICLES, store=True))
    metadata = {"qsharp_parent": choice["rollout_id"], "qsharp_cut": "6"}
    body = {"model": "tiny", "prompt": PROMPT + choice["token_ids"][:6], "max_tokens": 5, "store": True}
    (tail,) = complete(http, {**body, "metadata": metadata, "ignore_eos": True})
    assert rollout(http, tail)["first_valid_position"] == 5


def test_a_searched_value_is_no_prediction_to_calibrate_by(http: httpx.Client) -> None:
    before = metric_of(http, "qsharp_value_calibration_ratio_count")
    counted = []
    for search in (None, BEST, PARTICLES):
        (choice,) = complete(http, asked(search, store=True))
        http.post(f"/v1/rollouts/{choice['rollout_id']}/reward", json={"reward": 1.0}).raise_for_status()
        counted.append(metric_of(http, "qsharp_value_calibration_ratio_count") - before)
    assert counted == [1, 1, 1]


def metric_of(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics", follow_redirects=True).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def test_tokens_are_counted_by_kind(http: httpx.Client) -> None:
    name = "qsharp_search_tokens_total"
    for search in (BEST, PARTICLES, {"kind": "stop", "below": -10.0}):
        series = f'{name}{{kind="{search["kind"]}"}}'
        before = [metric_line(http, series), metric_of(http, name), metric_of(http, "qsharp_completions_total")]
        found = complete(http, asked(search, n=2))
        reports = [choice["guidance"]["search"]["tokens_spent"] for choice in found]
        spent = sum(reports) if search["kind"] == "stop" else reports[0]
        assert metric_line(http, series) - before[0] == spent
        assert metric_of(http, name) - before[1] == spent
        assert metric_of(http, "qsharp_completions_total") - before[2] == 2


def metric_line(http: httpx.Client, series: str) -> float:
    lines = http.get("/metrics", follow_redirects=True).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{series} "))


@pytest.mark.parametrize("stream", [False, True])
def test_searches_that_nobody_waits_for_leave_nothing_behind(server: Server, stream: bool) -> None:
    searches = [
        BEST,
        {**BEST, "reject": REJECT},
        {**PARTICLES, "every": 40},
        PARTICLES,
        {"kind": "stop", "below": -9.0},
    ]

    async def abandoned(search: dict[str, Any]) -> None:
        body = asked(search, max_tokens=450, n=2, stream=stream)
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.post("/v1/completions", json=body), 1.0)

    async def main() -> None:
        await asyncio.gather(*map(abandoned, searches))

    asyncio.run(main())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        listed = httpx.get(f"{server.url}/v1/critics").json()["data"]
        held = [entry["id"] for entry in listed if entry["users"] or entry["in_flight"] or entry["kv_blocks_used"]]
        running = metric(server, "vllm:num_requests_running") + metric(server, "vllm:num_requests_waiting")
        if not held and running == 0:
            break
        time.sleep(0.2)
    else:
        pytest.fail(f"still held: {held}, {running} requests")
    with httpx.Client(base_url=server.url, timeout=60) as http:
        (found,) = complete(http, asked(BEST))
    assert math.isfinite(found["guidance"]["kl"])
