"""What the buttons of the pages do to runs, and what a wrong form is answered."""

from __future__ import annotations

import asyncio
import re
from html import unescape

from openagents_worker.models import RunState
from openagents_worker.models.budget import EXTENDABLE
from tests.dashboard.reading import ASKS, USES, asking, words_of
from tests.dashboard.server import Server, serving
from tests.runtime import plugins
from tests.support.runner import agent, calls, crash, process, scripted


async def test_a_call_is_approved_with_other_arguments(server: Server, redis_url: str) -> None:
    async with process(redis_url, ASKS) as worker:
        call = await asking(worker)

        answer = await server.post("/run/r1/approve", call=call, arguments='{"who": "bob"}', note="not ann")
        await worker.execute()

        assert (answer.status_code, answer.headers["Location"]) == (303, "/run/r1")
        assert plugins.executed("charge") == ["bob"]
        approved = next(event for event in await worker.events() if event["name"] == "tool.approved")
        assert (approved["payload"]["by"], approved["payload"]["note"]) == ("flower", "not ann")


async def test_a_decision_names_the_user(redis_url: str) -> None:
    """Basic authentication has the name."""
    async with serving(redis_url, basic_auth=["ann:secret"]) as server, process(redis_url, ASKS) as worker:
        call = await asking(worker)
        server.browser.auth = ("ann", "secret")

        answer = await server.post("/run/r1/deny", call=call, **{"from": "approvals"})

        assert answer.headers["Location"] == "/approvals"
        denied = next(event for event in await worker.events() if event["name"] == "tool.denied")
        assert denied["payload"]["by"] == "ann"


async def test_a_second_decision_is_told_the_first(server: Server, redis_url: str) -> None:
    async with process(redis_url, ASKS) as worker:
        call = await asking(worker)
        await server.post("/run/r1/deny", call=call)

        answer = await server.post("/run/r1/approve", call=call)

    assert answer.status_code == 409
    assert "flower has already decided: deny" in words_of(answer.text)
    assert 'href="/run/r1">Back' in answer.text


async def test_a_run_is_cancelled_and_resumed(server: Server, redis_url: str) -> None:
    async with process(redis_url) as worker:
        await worker.submit()
        await server.post("/run/r1/cancel", reason="a mistake")
        assert (await worker.record()).state is RunState.CANCELLED
        assert "a mistake" in await server.text("/run/r1")

        await server.post("/run/r1/resume")

        assert (await worker.record()).state is RunState.QUEUED
        assert (await worker.record()).life == 2


async def test_a_run_is_forked_from_a_step(server: Server, redis_url: str) -> None:
    async with process(redis_url, USES) as worker:
        await worker.run(agent_id="uses")
        page = await server.text("/run/r1")
        checkpoint = re.findall(r'name="checkpoint" value="([^"]+)"', page)[0]

        answer = await server.post("/run/r1/fork", checkpoint=checkpoint)

        path = answer.headers["Location"]
        assert path != "/run/r1"
        assert f'fork of <a href="/run/r1">{checkpoint}' in await server.text(path)


async def test_a_run_gets_messages_values_and_a_larger_budget(server: Server, redis_url: str) -> None:
    async with process(redis_url) as worker:
        await worker.submit()

        for action, form in (
            ("steer", {"text": "be short"}),
            ("send", {"name": "paid", "value": '{"cents": 5}'}),
            (
                "extend",
                {"max_steps": "7", "max_cost_usd": "0.5", "max_tool_calls": "", "max_duration_ms": "9000"},
            ),
        ):
            answer = await server.post(f"/run/r1/{action}", **form)
            assert answer.status_code == 303, answer.text

        facts = await worker.store.redis.hgetall(worker.store.keys("facts", "r1"))
    stored = " ".join(facts.values())
    assert "be short" in stored
    assert '"cents":5' in stored
    assert '"max_steps":7' in stored
    assert '"max_cost_usd":0.5' in stored
    assert '"max_duration_ms":9000' in stored


async def test_every_limit_that_can_be_extended_has_a_field(server: Server, redis_url: str) -> None:
    """The same limits as in `extend` of the client and of the command line."""
    async with process(redis_url) as worker:
        await worker.submit()
        page = await server.text("/run/r1")

    form = page[page.index('action="/run/r1/extend"') :].partition("</form>")[0]
    assert tuple(re.findall(r'<input name="(\w+)"', form)) == EXTENDABLE


async def test_an_unknown_outcome_is_resolved(server: Server, redis_url: str) -> None:
    """The page asks to look at the other system first, and takes the result of the call."""
    once = agent(
        "once",
        llm=scripted(calls(("charge", {"who": "ann", "gate": "never"})), {"text": "charged"}),
        tools=[{"id": "charge", "impl": "tests.runtime.plugins.OnceOnly"}],
    )
    async with process(redis_url, once, name="w1") as first, process(redis_url, once, name="w2") as second:
        await first.submit(agent_id="once")
        executing = asyncio.create_task(first.execute())
        while not plugins.LOG:
            await asyncio.sleep(0)
        await crash(first, "r1", executing)
        await second.execute()
        page = await server.text("/run/r1")
        call = unescape(re.search(r'name="call" value="([^"]+)"', page)[1])  # type: ignore[index]

        await server.post("/run/r1/resolve", call=call, action="skip", result='{"charged": "ann"}')
        await second.execute()

        record = await second.record()
    assert "its outcome is unknown" in page
    assert record.state is RunState.COMPLETED


WRONG_FORMS: list[tuple[str, dict[str, str], int, str]] = [
    ("approve", {}, 422, "call is empty"),
    ("approve", {"call": "x", "arguments": "[1]"}, 422, "arguments must be a JSON object"),
    ("approve", {"call": "x", "arguments": "{"}, 422, "arguments is not valid JSON"),
    ("approve", {"call": "x"}, 409, "does not wait for a decision"),
    ("send", {"name": "paid", "value": "yes"}, 422, "a text needs quotes"),
    ("steer", {"text": " "}, 422, "text is empty"),
    ("steer", {"text": "x" * 100_001}, 422, "at most 100,000 are allowed"),
    ("extend", {}, 422, "the budget has no limit"),
    ("extend", {"max_steps": "-1"}, 422, "max_steps"),
    ("resolve", {"call": "x", "action": "guess"}, 422, "not an action"),
    ("fork", {"checkpoint": "other:step:1"}, 422, "not one of the run"),
    ("explode", {}, 404, "there is no action 'explode'"),
]


async def test_a_wrong_form_is_explained(server: Server, redis_url: str) -> None:
    """Nothing is done, and the page says what would be right."""
    async with process(redis_url) as worker:
        await worker.submit()
        for action, form, status, says in WRONG_FORMS:
            answer = await server.post(f"/run/r1/{action}", **form)
            assert answer.status_code == status, (action, form)
            assert says in words_of(answer.text)

        assert (await worker.record()).state is RunState.QUEUED


async def test_a_run_that_does_not_exist_has_no_page(server: Server) -> None:
    for path in ("/run/nobody", "/run/nobody/events"):
        answer = await server.get(path)
        assert answer.status_code == 404
        assert "run.not_found" in answer.text
    assert (await server.post("/run/nobody/cancel")).status_code == 404
    assert (await server.get("/session/nobody")).status_code == 404
