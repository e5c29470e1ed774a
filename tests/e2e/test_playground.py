"""The page /playground in a real Chromium, on the real server."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import httpx
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Error, Locator, Page, Request, Route, expect
from vllm.entrypoints.launchers.app import build_app

from server import launch
from server.api.playground import FOLDER
from server.commands import serve
from tests.conftest import Server
from tests.support.browser import chromium

ETAS = (0.02, 0.1, 0.5, 2.0, 10.0)
METHODS, TAILS = ("qsharp", "cd"), ("floor", "keep", "drop")
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a server's page; at its end no page may have failed, or asked for anything of another server."""
    pages, problems = list[Page](), list[str]()

    def note_error(error: Error) -> None:
        problems.append(str(error))

    def note_refusal(said: ConsoleMessage) -> None:
        if "Content Security Policy" in said.text:
            problems.append(said.text)

    def note_request(sent: Request, url: str) -> None:
        if not sent.url.startswith(url):
            problems.append(sent.url)

    def opened(url: str, *, path: str = "/", **how: Any) -> Page:
        page = browser.new_context(viewport={"width": 1300, "height": 1000}, **how).new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", note_error)
        page.on("console", note_refusal)
        page.on("request", lambda sent: note_request(sent, url))
        page.goto(f"{url}{path}")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.context.close()
    assert problems == []


@pytest.fixture
def page(server: Server, open_page: Open) -> Page:
    """The page of the session's server, which has found its model and its critics."""
    made = open_page(server.url)
    expect(made.get_by_role("button", name="Send")).to_be_enabled()
    return made


def fill(page: Page, **fields: Any) -> None:
    """Fills in the request; names as the API has them."""
    for details in page.locator("aside details:not([open]) summary").all():
        details.click()
    for name, value in fields.items():
        control = page.locator(f'aside [name="{name}"], aside [name="guidance.{name}"]')
        if name == "critic" or name in ("method", "tail"):
            control.select_option(value)
        elif name == "plain":
            page.get_by_label("The model by itself beside it").set_checked(value)
        else:
            control.last.fill(str(value))  # of eta's two controls the number


def send(page: Page, button: Locator | None = None) -> list[dict[str, Any]]:
    """Sends the request, or presses another button, and waits for the answers; returns what the server was asked."""
    asked: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.method == "POST":
            asked.append(json.loads(request.post_data or "null"))

    page.on("request", note)
    (button or page.get_by_role("button", name="Send")).click()
    finished(page)
    page.remove_listener("request", note)
    return asked


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_enabled(timeout=60_000)
    expect(page.locator("#shown-0")).to_be_visible()


def ask(server: Server, **body: Any) -> dict[str, Any]:
    """The first choice of a request to the server."""
    sent = {"model": "tiny", "temperature": 1.0, **body}
    answer = httpx.post(f"{server.url}/v1/completions", json=sent, timeout=60)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def shown(page: Page, region: str) -> list[float]:
    """The exact numbers behind those that a part of the page shows, in order."""
    figures = page.locator(f"{region} data.figure").all()
    return [float(figure.get_attribute("value") or "nan") for figure in figures]


def test_the_root_leads_to_the_page_and_its_answers_stream(page: Page, server: Server) -> None:
    assert page.url == f"{server.url}/playground/"
    fill(page, prompt="Hello there", max_tokens=120, n=1, seed=5, temperature=1, candidates=5, min_prob=0)
    page.evaluate("""() => {
        window.lengths = new Set();
        const look = () => lengths.add(document.querySelector(".pane p.text")?.textContent.length ?? 0);
        new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true });
    }""")
    bodies = send(page)
    assert page.evaluate("lengths.size") > 5  # the text grew
    assert {body["eta"] for body in bodies} == {0.1, 1e6}
    body = {**next(body for body in bodies if body["eta"] == 0.1), "stream": False}
    tokens = ask(server, **body)["guidance"]["tokens"]
    options = page.locator("#shown-0").locator("..").get_by_role("option")
    wanted = [token["text"].replace("\n", "↵\n") or "·" for token in tokens]
    assert options.all_text_contents() == wanted
    assert shown(page, "section[aria-labelledby=shown-title]")[0] == pytest.approx(
        sum(t["kl"] for t in tokens), abs=1e-6
    )


def test_sliders_show_what_the_server_computes(page: Page, server: Server) -> None:
    """What the page re-weighs is what the server would have said, to 1e-6, for every eta, method and tail."""
    fill(page, prompt="To be, or", max_tokens=1, n=1, plain=False, critic="wide@1", candidates=8, min_prob=0)
    for _ in range(3):  # the critic and vLLM keep what they computed: once it is kept, all is computed alike
        (asked,) = send(page)
    body = {**asked, "stream": False}
    compared = 0
    for eta, method, tail in product(ETAS, METHODS, TAILS):
        panel = page.locator("section[aria-labelledby=what-if-title]")
        panel.get_by_label("eta as a number").fill(str(eta))
        panel.get_by_label("Method").select_option(method)
        panel.get_by_label("All other tokens").select_option(tail)
        choice = ask(server, **{**body, "eta": eta, "guidance": {**body["guidance"], "method": method, "tail": tail}})
        (token,) = choice["guidance"]["tokens"]
        kl, value, *bars = shown(page, "section[aria-label='Candidates of the chosen token']")
        assert kl == pytest.approx(token["kl"], abs=1e-6)
        assert value == pytest.approx(token["value"], abs=1e-6)
        ids = token["candidates"]["token_ids"]
        if token["token_id"] in ids:  # the server says it of what it drew
            place = ids.index(token["token_id"])
            wanted = [token["ref_logprob"], token["logprob"]]
            assert bars[2 * place : 2 * place + 2] == pytest.approx([2.718281828459045**x for x in wanted], abs=1e-6)
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("critic", ["plain", "fast", "both", "native", "uneven"])
def test_whole_answers_weigh_as_the_server_has_weighed_them(page: Page, server: Server, critic: str) -> None:
    for i, (method, tail) in enumerate(product(METHODS, TAILS)):
        options = {"critic": critic, "method": method, "tail": tail, "detail": "candidates", "candidates": 6}
        budget = {"kl_total": 0.5, "kl_token": 0.2} if i % 2 else {}
        settings = {"eta": ETAS[i % len(ETAS)], "method": method, "tail": tail}
        guidance = ask(
            server, prompt="Once", max_tokens=20, seed=i, eta=settings["eta"], guidance={**options, **budget}
        )["guidance"]
        steps = page.evaluate(
            """async ([guidance, settings]) => {
                const { reweigh } = await import("/playground/weighting.js");
                const steps = reweigh(guidance.tokens, guidance.distribution, settings, guidance.kl_budget);
                return steps.map(({ kl, value, logprob, strength }) => ({ kl, value, logprob, strength }));
            }""",
            [guidance, settings],
        )
        for step, token in zip(steps, guidance["tokens"], strict=True):
            for name, number in step.items():
                assert number == (None if token[name] is None else pytest.approx(token[name], abs=1e-6)), (name, token)


def test_a_branch_goes_on_from_a_candidate(page: Page, server: Server) -> None:
    fill(page, prompt="A story", max_tokens=12, n=2, plain=False, critic="fast@1", candidates=6, min_prob=0, seed=3)
    (request,) = send(page)
    page.locator("#shown-4").click()
    texts = page.locator("#shown-0").locator("..").get_by_role("option").all_text_contents()
    panel = page.locator("section[aria-label='Candidates of the chosen token']")
    row = panel.locator("tbody tr:not(.drawn):not(.tail)").first
    forced = row.locator("code").inner_text()
    (branch,) = send(page, row.get_by_role("button"))
    now = page.locator("#shown-0").locator("..").get_by_role("option").all_text_contents()
    assert now[:4] == texts[:4]
    assert page.locator("#shown-4.forced").count() == 1
    assert branch["max_tokens"] == request["max_tokens"] - 5
    assert len(now) <= 12
    tree = page.get_by_role("region", name="Answers and branches")
    expect(tree.get_by_text(re.compile(r"Token 5 is"))).to_contain_text(forced)
    # Its prompt is that of the request, the four tokens that stayed, and the one that was chosen.
    assert len(branch["prompt"]) - 5 == len(tokens_of(server, request["prompt"]))
    # Another answer is put beside it, and taken away again.
    tree.get_by_role("button", name="Beside").last.click()
    expect(page.locator("#beside-0")).to_be_visible()
    tree.get_by_role("button", name="Beside").last.click()
    expect(page.locator("#beside-0")).to_have_count(0)


def tokens_of(server: Server, prompt: str) -> list[int]:
    answer = httpx.post(f"{server.url}/tokenize", json={"model": "tiny", "prompt": prompt})
    tokens: list[int] = answer.json()["tokens"]
    return tokens


def test_a_chat_message_is_answered(page: Page) -> None:
    fill(page, prompt="Hi", max_tokens=6, n=1, critic="fast@1", candidates=4, min_prob=0)
    page.get_by_role("radio", name="Chat message").check()
    asked = send(page)
    assert [one["messages"] for one in asked] == [[{"role": "user", "content": "Hi"}]] * 2
    (branch,) = send(page, page.locator("td button").first)[:1]
    assert "messages" not in branch  # it goes on from the chat's own tokens
    assert len(branch["prompt"]) > 3


def test_tokens_of_the_tail_are_shown_as_such(page: Page) -> None:
    fill(
        page,
        prompt="Hm",
        max_tokens=40,
        n=1,
        plain=False,
        critic="fast@1",
        eta=10,
        candidates=2,
        min_prob=0,
        tail="keep",
        seed=1,
    )
    send(page)
    panel = page.locator("section[aria-label='Candidates of the chosen token']")
    for i in range(40):
        page.locator(f"#shown-{i}").click()
        if panel.get_by_text("came from the tail").count():
            break
    else:
        pytest.fail("no token of forty came from the tail")
    assert panel.locator("tr.drawn").count() == 0


def test_the_curve_has_a_point_for_every_eta(page: Page) -> None:
    fill(page, prompt="Hm", max_tokens=6, critic="fast@1", candidates=4, min_prob=0)
    page.get_by_label("Answers for each eta").fill("4")
    page.get_by_role("button", name="Draw the curve").click()
    table = page.get_by_role("region", name="The curve's numbers")
    expect(table.locator("tbody tr")).to_have_count(6, timeout=60_000)
    assert page.get_by_role("img", name=re.compile("not guided: .*eta 0.03: ")).count() == 1
    first, *_, last = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
    assert first[1].startswith("0")
    assert float(last[1].split()[0]) > 0.05


# -- what goes wrong is said in a sentence


def test_a_field_that_the_server_refuses_is_named_and_marked(page: Page) -> None:
    fill(page, candidates=100)
    page.get_by_role("button", name="Send").click()
    said = page.get_by_role("alert").first
    expect(said).to_contain_text(
        "The server cannot do this request. It says: guidance.candidates must be a whole number from"
    )
    expect(page.locator('[name="guidance.candidates"]')).to_have_attribute("aria-invalid", "true")


def test_a_server_that_is_gone(page: Page) -> None:
    page.context.set_offline(True)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert").first).to_have_text("The server does not answer. Is it still running?")
    page.context.set_offline(False)
    fill(page, prompt="Hm", max_tokens=3)
    send(page)
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """The app of a server with keys, gate and all; there is no engine behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_PLUGINS", raising=False)
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        launch.allow_plugin()
        args = serve.parse(["model", "--api-key", "user", "--playground"])
        app = build_app(args, ("generate",), None)
        running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=running.run)
        thread.start()
        while not running.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
        running.should_exit = True
        thread.join()


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(guarded: str, open_page: Open) -> None:
    page = open_page(guarded)
    said = page.get_by_role("alert").first
    expect(said).to_contain_text("The server wants a key: enter one under “Key”.")
    key = page.get_by_label("Key", exact=True)
    expect(key).to_have_attribute("aria-invalid", "true")
    key.fill("wrong")
    page.get_by_role("button", name="Use").click()
    expect(said).to_contain_text("this key is not known")
    with page.expect_request("**/v1/models") as asked:
        key.fill("user")
        key.press("Enter")
    assert asked.value.headers["authorization"] == "Bearer user"
    expect(key).to_have_attribute("aria-invalid", "false")  # it has passed the gate, behind which there is nothing
    assert page.evaluate("JSON.stringify([Object.keys(localStorage), document.cookie])") == '[[],""]'
    other = page.context.new_page()
    other.goto(guarded)
    assert other.evaluate("sessionStorage.length") == 0


# -- for everybody


def reach(page: Page, wanted: str) -> None:
    """Presses Tab until the focus is on what this selects."""
    for _ in range(120):
        page.keyboard.press("Tab")
        if page.evaluate("wanted => document.activeElement.matches(wanted)", wanted):
            return
    pytest.fail(f"the keyboard does not reach {wanted}")


def test_it_can_be_used_by_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the answers"
    reach(page, "textarea")
    page.keyboard.press("Control+A")
    page.keyboard.type("Hm")
    reach(page, '[name="max_tokens"]')
    page.keyboard.type("8")
    page.keyboard.press("Control+Enter")
    finished(page)
    reach(page, "#what-if-eta")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_text("Sampled with eta 0.10; shown as")).to_be_visible()
    reach(page, "[role=listbox]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator('#shown-2[aria-selected="true"]')).to_be_visible()
    expect(page.get_by_role("heading", name=re.compile("^Token 3:"))).to_be_visible()
    page.keyboard.press("Home")
    expect(page.get_by_role("heading", name=re.compile("^Token 1:"))).to_be_visible()
    reach(page, "td button")
    page.keyboard.press("Enter")
    expect(page.get_by_text(re.compile("Token 1 is"))).to_be_visible()
    finished(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 400])
def test_axe_finds_nothing(server: Server, open_page: Open, scheme: str, width: int) -> None:
    page = open_page(server.url, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    violations = Axe().run(page).response["violations"]
    fill(page, prompt="Hm", max_tokens=30, eta=0.02, n=2, candidates=8, min_prob=0)
    send(page)
    for colour in ("Value", "KL"):
        page.get_by_label(colour, exact=True).check()
        violations += Axe().run(page).response["violations"]
    assert json.dumps([(one["id"], [node["html"] for node in one["nodes"]]) for one in violations]) == "[]"
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing hangs over the edge


# -- quick


def test_a_long_answer_is_drawn_and_moved_at_once(page: Page, server: Server) -> None:
    """benchmarks/playground.py measures it; here the machine is busy, and a limit is missed by far or not at all."""
    fill(page, prompt="Hm", max_tokens=480, n=1, plain=False, critic="fast@1", candidates=20, min_prob=0)

    def to_the_end(route: Route) -> None:
        route.continue_(post_data=json.dumps({**json.loads(route.request.post_data or ""), "ignore_eos": True}))

    page.route("**/v1/completions", to_the_end)
    send(page)
    assert page.locator("#shown-479").count() == 1
    frames = page.evaluate(MOVED)
    assert sorted(frames)[len(frames) // 2] < 200, frames
    response = ask(server, prompt="Hm", max_tokens=480, ignore_eos=True, eta=0.1, guidance={
        "critic": "fast", "detail": "candidates", "candidates": 20, "min_prob": 0,
    })  # fmt: skip
    files = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    assert files + len(json.dumps(response)) < 1_000_000


MOVED = """async () => {
    const slider = document.querySelector("#what-if-eta");
    const set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set;
    const frame = () => new Promise((done) => requestAnimationFrame(done));
    const times = [await frame()];
    for (let i = 0; i < 40; i++) {
        set.call(slider, String(-2 + i * 0.07));
        slider.dispatchEvent(new Event("input", { bubbles: true }));
        times.push(await frame());
    }
    return times.slice(1).map((time, i) => time - times[i]);
}"""
