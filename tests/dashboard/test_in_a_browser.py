"""The pages in a real browser, with real runs of a real worker: what a person sees, and does by keyboard.

`DASHBOARD_PICTURES=docs/dashboard make test-ui ARGS=tests/dashboard` also writes the pictures of the docs.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from dataclasses import dataclass

import pytest

from openagents_worker.local.child_process import ChildProcess, free_port
from openagents_worker.models import RunState
from openagents_worker.producer.handle import RunHandle
from tests.dashboard.browsing import Browser, browsing
from tests.dashboard.world import AGENTS, HOSTILE, IMPORTS
from tests.deployment.flower import Flower
from tests.support.deployment import Installation, installed
from tests.support.waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.ui

SIZES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@dataclass(frozen=True)
class Site:
    """A deployment with Flower, a browser, and a run of each kind, by its agent."""

    shop: Installation
    browser: Browser
    runs: dict[str, RunHandle]  # type: ignore[type-arg]  # of any output

    def parked(self, agent_id: str, text: str = "Go.") -> RunHandle:  # type: ignore[type-arg]  # as above
        """A new run that waits."""
        handle = self.shop.submit(agent_id, text)
        wait_for(lambda: handle.record().waiting, f"the run of {agent_id} is parked")
        return handle


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Generator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with installed(folder, *AGENTS, OPENAGENTS_IMPORTS=IMPORTS) as shop:
        port = free_port()
        command = [sys.executable, "-m", "celery", "-A", "tasks", "flower", f"--port={port}"]
        env = {**shop.stack._env, "OPENAGENTS_REDIS_URL": shop.stack.redis_url}
        flower = ChildProcess("flower", command, env, lambda name, line: None)
        try:
            flower.wait_until(lambda: _hears_workers(Flower(port)), "hears the worker", PATIENCE_S)
            runs = _one_of_each(shop)
            with browsing(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile")) as browser:
                yield Site(shop, browser, runs)
        finally:
            flower.stop(10)


def _hears_workers(flower: Flower) -> bool:
    """Whether Flower gets the events of a worker. It does not know of tasks before that."""
    answer = flower.json("/workers?json=1")
    return bool(answer and answer["data"])


def _one_of_each(shop: Installation) -> dict[str, RunHandle]:  # type: ignore[type-arg]  # as above
    """The run of `cards` kills the first worker; another one takes over the rest."""
    runs = {
        agent_id: shop.submit(agent_id, text, labels={"team": "north"}, tenant="acme")
        for agent_id, text in (
            ("orders", "Where is order A17?"),
            ("parcels", "Send the parcel of A17."),
            ("broken", "Which model answers?"),
            ("pricing", "B99"),
            ("refunds", "Please pay order A17 back."),
            ("payments", "Wait for the payment of A17."),
            ("thrifty", "Find order A17 cheaply."),
        )
    }
    for agent_id in ("orders", "parcels", "broken", "pricing"):
        runs[agent_id].wait(PATIENCE_S)
    runs["cards"] = shop.submit("cards", "Charge the card for A17.")
    wait_for(lambda: shop.worker.exit_code is not None, "the tool has killed its worker")
    shop.stack.start_worker("second")
    for agent_id in ("refunds", "payments", "thrifty", "cards"):
        wait_for(lambda agent_id=agent_id: runs[agent_id].record().waiting, f"{agent_id} waits")  # type: ignore[misc]
    return runs


def pages_of(site: Site) -> dict[str, str]:
    """Paths by the names of their pictures."""
    return {
        "runs": "/runs",
        "failed-run": f"/run/{site.runs['pricing'].id}",
        "completed-run": f"/run/{site.runs['orders'].id}",
        "parked-run": f"/run/{site.runs['cards'].id}",
        "approvals": "/approvals",
        "overview": "/overview",
        "session": f"/session/{site.runs['orders'].record().session_id}",
        "workers": "/fleet",
    }


@pytest.mark.parametrize(("width", "theme"), SIZES)
def test_every_page_fits_and_can_be_read_by_everybody(site: Site, width: int, theme: str) -> None:
    """No scrolling to the side, no serious finding of axe-core, nothing from elsewhere, no refused script."""
    browser = site.browser
    browser.requested_urls()
    for name, path in pages_of(site).items():
        browser.open(path, width=width, theme=theme)
        assert browser.parts_outside() == [], name
        browser.picture(f"{name}-{width}-{theme}")
        assert browser.errors() == [], name
        assert browser.accessibility_problems() == [], name
    foreign = [url for url in browser.requested_urls() if not url.startswith(f"{browser.url}/")]
    assert foreign == []


def test_flowers_list_of_tasks_leads_to_the_runs(site: Site) -> None:
    """The list shows ten tasks at a time, so this test stands before those that make more runs."""
    run_id = site.runs["orders"].id
    site.browser.open("/tasks")
    site.browser.wait_for_text(f"run={run_id}")

    site.browser.enter(f"run={run_id}", "a")

    site.browser.wait_for_text("Timeline")
    assert site.browser.driver.current_url.endswith(f"/run/{run_id}")


def test_a_stranger_sees_why_a_run_failed(site: Site) -> None:
    """Without scrolling: the code, the message and the line of code."""
    site.browser.open(f"/run/{site.runs['pricing'].id}")

    script = """return [...document.querySelectorAll('.oa-banner *')]
        .filter(each => each.getBoundingClientRect().bottom < 600).map(each => each.innerText).join(' ')"""
    seen = site.browser.driver.execute_script(script)

    assert "pattern.error" in seen
    assert "KeyError: 'B99'" in seen
    assert "in price_text" in seen


def test_html_of_a_tool_is_never_executed(site: Site) -> None:
    site.browser.open(f"/run/{site.runs['parcels'].id}")

    assert "hacked" not in site.browser.driver.title
    assert HOSTILE in site.browser.text()


def test_a_call_is_approved_by_keyboard(site: Site) -> None:
    handle = site.parked("refunds")
    site.browser.open(f"/run/{handle.id}")

    site.browser.enter("Approve", "button")

    assert handle.wait(PATIENCE_S).ok
    site.browser.wait_for_text("completed")


def test_the_arguments_of_a_call_are_edited_by_keyboard(site: Site) -> None:
    handle = site.parked("refunds")
    site.browser.open(f"/run/{handle.id}")

    site.browser.enter("Edit", "summary")
    site.browser.fill("Arguments (JSON)", '{"number": "A17", "cents": 60}')
    site.browser.enter("Approve with these arguments")

    assert handle.wait(PATIENCE_S).ok
    site.browser.open(f"/run/{handle.id}")
    assert "paid 60 cents back" in site.browser.text()


def test_a_call_is_denied_in_the_inbox_by_keyboard(site: Site) -> None:
    """The page of a run and the inbox have the same form; the inbox shows the next one afterwards."""
    handle = site.parked("refunds")
    site.browser.open("/approvals")

    site.browser.enter("Deny", "summary")
    site.browser.fill("Note for the model", "too expensive")
    site.browser.enter("Deny", "button")

    assert handle.wait(PATIENCE_S).ok
    names = [event.name for event in handle.events()]
    assert "tool.denied" in names
    assert site.browser.driver.current_url.endswith("/approvals")


def test_a_run_is_steered_sent_to_and_cancelled_by_keyboard(site: Site) -> None:
    handle = site.parked("payments")
    path = f"/run/{handle.id}"

    site.browser.open(path)
    site.browser.enter("Steer", "summary")
    site.browser.fill("Message to the model", "be polite")
    site.browser.enter("Steer", "button")
    site.browser.enter("Send", "summary")
    site.browser.fill("Name of the signal", "other")
    site.browser.fill("Value (JSON)", "[1, 2]")
    site.browser.enter("Send", "button")
    site.browser.enter("Cancel", "summary")
    site.browser.fill("Reason", "nobody pays")
    site.browser.enter("Cancel the run")

    result = handle.wait(PATIENCE_S)
    assert result.stop_reason == "cancelled"
    site.browser.wait_for_text("nobody pays")


def test_a_value_wakes_a_run_and_the_page_follows_without_a_reload(site: Site) -> None:
    """The events of the run arrive while the page is open."""
    handle = site.parked("payments")
    site.browser.open(f"/run/{handle.id}")
    site.browser.wait_for_text("waits for signal paid")

    site.shop.client.send(handle.id, "paid", "12 EUR")

    site.browser.wait_for_text("paid: 12 EUR")
    site.browser.wait_for_text("completed")


def test_a_budget_is_extended_by_keyboard(site: Site) -> None:
    handle = site.parked("thrifty")
    site.browser.open(f"/run/{handle.id}")

    site.browser.enter("Extend", "summary")
    site.browser.fill("Tool calls", "9")
    site.browser.enter("Extend the budget")

    assert handle.wait(PATIENCE_S).ok


def test_an_unknown_outcome_is_resolved_by_keyboard(site: Site) -> None:
    handle = site.runs["cards"]
    site.browser.open(f"/run/{handle.id}")

    site.browser.enter("It had: skip the call", "summary")
    site.browser.fill("Result of the call (JSON)", '"charged"')
    site.browser.enter("Skip with this result")

    assert handle.wait(PATIENCE_S).ok


def test_a_run_is_resumed_and_forked_by_keyboard(site: Site) -> None:
    failed = site.runs["broken"]
    site.browser.open(f"/run/{failed.id}")
    site.browser.enter("Resume from the last checkpoint")
    wait_for(lambda: failed.record().life == 2 and failed.record().state is RunState.FAILED, "failed again")

    site.browser.open(f"/run/{site.runs['orders'].id}")
    site.browser.enter("Reply", "summary")
    site.browser.enter("Fork from here")
    site.browser.wait_for_text("fork of")


def test_a_reply_is_streamed_onto_the_page(site: Site) -> None:
    """The text grows while the model writes; the rest comes when it may go on."""
    shown: list[int] = []
    site.shop.model.will_say({"text": " ".join(f"word{number}" for number in range(40))})
    site.shop.model.may_go_on = lambda piece: piece < 5 or shown
    handle = site.shop.submit("streams", "Tell me a story.")
    try:
        wait_for(lambda: handle.record().state is RunState.RUNNING, "the run works")
        site.browser.open(f"/run/{handle.id}")
        site.browser.wait_for_text("word1")
        assert "The model is replying" in site.browser.text()
        shown.append(1)
        site.browser.wait_for_text("word39")
        assert handle.wait(PATIENCE_S).ok
    finally:
        site.shop.model.may_go_on = lambda piece: True


def test_a_page_that_cannot_be_refreshed_says_so(site: Site) -> None:
    """It would look as if all were well, however long ago that was."""
    client = site.shop.client
    handle = site.shop.submit("orders", "Where is order A17?", session_id="forgotten")
    assert handle.wait(PATIENCE_S).ok
    site.browser.open("/session/forgotten")
    site.browser.wait_for_text("Where is order A17?")
    assert "cannot be refreshed" not in site.browser.text()

    client.delete_session("forgotten")

    site.browser.wait_for_text("It cannot be refreshed: the server answered 404.")
    assert "Where is order A17?" in site.browser.text()


FIRST_IS_REFUSED = """
    const Real = EventSource;
    let isFirst = true;
    window.EventSource = class extends Real {
        constructor(url) {
            super(isFirst ? url.replace("/events", "/nothing") : url);
            isFirst = false;
        }
    };
"""


def test_a_page_follows_its_run_again_after_the_server_has_refused(site: Site) -> None:
    """A browser does not connect again by itself after a refusal, such as that while Redis is away."""
    driver = site.browser.driver
    handle = site.parked("payments")
    script = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": FIRST_IS_REFUSED})
    site.browser.requested_urls()
    try:
        site.browser.open(f"/run/{handle.id}")
        wait_for(
            lambda: "/events?" in " ".join(site.browser.requested_urls()), "it asks again for the events"
        )
        site.shop.client.send(handle.id, "paid", "7 EUR")
        site.browser.wait_for_text("paid: 7 EUR")
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
