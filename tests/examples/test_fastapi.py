"""The example product on the web, from outside: a server process, a worker process, and HTTP between them."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from openagents_worker.events import RunEvent
from openagents_worker.local.child_process import ChildProcess
from tests.support.deployment import ROOT, Installation, call, installed
from tests.support.waiting import PATIENCE_S, wait_for
from tests.web.reading import Screen

ANSWER = "17 times 23 is 391: ten times 23 is 230, seven times 23 is 161, and together that is 391."
REPLIES = ({"tool_calls": [call("calc", expression="17*23")]}, {"text": ANSWER})


@dataclass(frozen=True)
class Product:
    """The product, seen by a browser."""

    installation: Installation
    url: str

    def ask(self, text: str = "What is 17*23?", **fields: Any) -> str:
        question = {"text": text, "conversation": uuid.uuid4().hex, **fields}
        response = httpx.post(f"{self.url}/runs", json=question, timeout=PATIENCE_S)
        assert response.status_code == 202, response.text
        return str(response.json()["run_id"])

    def is_watched(self, run_id: str) -> bool:
        redis = self.installation.client.store.redis
        return bool(redis.pubsub_channels(f"oa:events:*:{run_id}"))

    def stream(self, run_id: str, last_event_id: str | None = None) -> Iterator[dict[str, str]]:
        """The frames of the run, each by its fields; closing the iterator cuts the line."""
        headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
        url = f"{self.url}/runs/{run_id}/events"
        with httpx.stream("GET", url, headers=headers, timeout=PATIENCE_S) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            frame: dict[str, str] = {}
            for line in response.iter_lines():
                if line:
                    name, _, value = line.partition(": ")
                    frame[name] = value
                elif frame:
                    yield frame
                    frame = {}


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    folder = tmp_path_factory.mktemp("web")
    agents = (ROOT / "examples" / "fastapi" / "agents.json").read_text()
    with installed(folder, *_definitions(agents)) as installation:
        environment = {**os.environ, "OPENAGENTS_REDIS_URL": installation.stack.redis_url}
        command = [
            sys.executable,
            "-m",
            "uvicorn",
            "examples.fastapi.app:app",
            "--port",
            "0",
            "--app-dir",
            str(ROOT),
        ]
        server = ChildProcess("web", command, environment, lambda name, line: None)
        try:
            server.wait_until(lambda: bool(_address(server)), "says where it listens")
            yield Product(installation, _address(server))
        finally:
            server.stop(10)


def _definitions(agents_file: str) -> list[dict[str, Any]]:
    """The example's own agents, on the tests' model."""
    own = json.loads(agents_file)["agents"]
    llm = {"provider": "openai_compatible", "model": "test-model", "api_base": "${MODEL_URL}"}
    return [{**agent, "llm": llm} for agent in own]


def _address(server: ChildProcess) -> str:
    found = re.search(r"running on (http://\S+)", "\n".join(server.lines))
    return found[1] if found else ""


def events(frames: list[dict[str, str]]) -> list[RunEvent]:
    return [RunEvent.from_json(frame["data"]) for frame in frames if frame["event"] != "end"]


def test_a_page_follows_a_run_from_question_to_answer(
    product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tools with what they were asked and said, the answer word by word, and the end."""
    product.installation.model.will_say(*REPLIES)
    # What is live only is seen by who is there.
    monkeypatch.setattr(product.installation.model, "may_answer", product.is_watched)
    screen = Screen()

    frames = list(product.stream(product.ask()))

    seen = events(frames)
    for event in seen:
        screen.show(event)
    named = {event.name: event.payload for event in seen}
    assert named["tool.called"]["params"] == {"expression": "17*23"}
    assert "391" in str(named["tool.succeeded"]["result"])
    assert named["run.completed"]["result"] == ANSWER
    assert ANSWER in screen.texts.values()
    assert frames[-1]["event"] == "end"


@pytest.mark.parametrize("after", [1, 4, 9, 14])
def test_a_browser_that_was_cut_off_goes_on_after_its_last_event(product: Product, after: int) -> None:
    """`Last-Event-ID` is all it needs: no event is missing, none comes twice."""
    product.installation.model.will_say(*REPLIES)
    run_id = product.ask()
    before: list[dict[str, str]] = []
    for frame in product.stream(run_id):
        if "id" in frame:
            before.append(frame)
        if len(before) == after:
            break

    later = list(product.stream(run_id, before[-1]["id"]))

    stored = [frame["id"] for frame in [*before, *later] if "id" in frame]
    assert stored == [str(number) for number in range(1, len(stored) + 1)]
    assert later[-1]["event"] == "end"


def test_a_run_can_be_stopped_from_the_page(product: Product) -> None:
    """While the model thinks; the stream says so, and ends."""
    product.installation.model.will_say({"text": "too late", "latency_ms": 60_000})
    run_id = product.ask()
    names = []
    for frame in product.stream(run_id):
        names.append(frame["event"])
        if frame["event"] == "llm.called":
            assert httpx.post(f"{product.url}/runs/{run_id}/cancel", timeout=PATIENCE_S).status_code == 202

    assert "run.cancelled" in names
    assert names[-1] == "end"


def test_what_was_said_in_a_conversation_is_remembered(product: Product) -> None:
    """The second question of a page is asked in the same session."""
    product.installation.model.will_say({"text": "Hello Ada"})
    first = product.ask("I am Ada", conversation="ada")
    second = product.ask("Who am I?", conversation="ada")
    for run_id in (first, second):
        assert list(product.stream(run_id))[-1]["event"] == "end"

    (asked,) = product.installation.model.asked(second)
    assert [message["content"] for message in asked["messages"][1:]] == ["I am Ada", "Hello Ada", "Who am I?"]


def test_a_question_that_is_sent_twice_is_asked_once(product: Product) -> None:
    """A browser repeats a request whose answer it did not get; with its own `run_id` that is one run."""
    product.installation.model.will_say({"text": "once"})

    again = [product.ask(run_id="asked-twice", conversation="impatient") for _ in range(2)]

    assert again == ["asked-twice"] * 2
    assert list(product.stream("asked-twice"))[-1]["event"] == "end"
    assert len(product.installation.model.asked("asked-twice")) == 1


def test_errors_have_a_status_and_a_code(product: Product) -> None:
    """Before the first byte of a stream is out."""
    unknown = httpx.get(f"{product.url}/runs/nobody/events", timeout=PATIENCE_S)
    product.installation.model.will_say({"text": "hi"})
    url = f"{product.url}/runs/{product.ask()}/events"
    wrong = httpx.get(url, headers={"Last-Event-ID": "last"}, timeout=PATIENCE_S)

    assert (unknown.status_code, unknown.json()["code"]) == (404, "run.not_found")
    assert (wrong.status_code, wrong.json()["code"]) == (422, "request.invalid")


def test_the_page_is_one_file(product: Product) -> None:
    """It asks nobody else for anything."""
    page = httpx.get(product.url, timeout=PATIENCE_S).text

    assert "EventSource" in page
    assert re.findall(r"(?:src|href)=|https?://", page) == []


@pytest.mark.ui
def test_a_person_asks_sees_words_and_tools_and_stops(
    product: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a real browser, as far as the machine has one."""
    driver = shutil.which("chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    if driver is None:
        pytest.skip("needs chromium and its driver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        _use(browser, product)
        monkeypatch.setattr(product.installation.model, "may_answer", product.is_watched)
        _read_a_long_answer(browser, product)
    finally:
        browser.quit()


def _read_a_long_answer(browser: Any, product: Product) -> None:
    """The event of the end has its first 10,000 characters; the page keeps what it has received.

    The arguments of the tool and the reasoning, which arrive in pieces of their own, are not the answer."""
    answer = "word " * 2_500 + "end"
    product.installation.model.will_say({**REPLIES[0], "reasoning": "I count."}, {"text": answer})
    browser.find_element("css selector", "form button").click()

    def shown(id_: str) -> str:
        return str(browser.find_element("id", id_).text)

    wait_for(lambda: shown("state") == "done", "the page shows the end", timeout=PATIENCE_S)
    assert shown("answer") == answer


def _use(browser: Any, product: Product) -> None:
    def text_of(id_: str) -> str:
        return str(browser.find_element("id", id_).text)

    product.installation.model.will_say(*REPLIES)
    browser.get(product.url)
    browser.find_element("id", "text").send_keys("What is 17*23?")
    browser.find_element("css selector", "form button").click()
    wait_for(lambda: text_of("state") == "done", "the page shows the end", timeout=PATIENCE_S)
    assert text_of("answer") == ANSWER
    assert '"17*23"' in text_of("tools")
    assert "391" in text_of("tools")

    product.installation.model.will_say({"text": "too late", "latency_ms": 60_000})
    browser.find_element("css selector", "form button").click()
    wait_for(lambda: text_of("state") == "working", "the page shows that it works", timeout=PATIENCE_S)
    browser.find_element("id", "cancel").click()
    wait_for(lambda: text_of("state") == "stopped", "the page shows that it was stopped", timeout=PATIENCE_S)
