"""What pages show of runs, and what their actions do. Runs are real; a page is what a browser gets."""

from __future__ import annotations

import asyncio
import re
from html import unescape
from typing import Any

import pytest

from openagents_worker.dashboard import (
    approvals_page,
    fleet_page,
    overview,
    run_page,
    runs_page,
    sessions_page,
    shown_text,
    timeline,
)
from openagents_worker.models import RunRecord, RunState
from openagents_worker.store import checkpoints
from openagents_worker.store.fleet import WorkerCard
from tests.dashboard.reading import ASKS, CHARGE, FAILS, LOOK, USES, asking, ids_of, words_of
from tests.dashboard.server import Server, serving
from tests.support.runner import agent, calls, process, scripted
from tests.support.script_calls import call

# --- the list of runs --------------------------------------------------------------------------------------


async def test_the_tab_is_in_flowers_navigation(server: Server) -> None:
    """Also on the pages of Flower itself."""
    for path in ("/runs", "/workers", "/tasks", "/broker"):
        assert '<a class="nav-link' in (page := await server.text(path))
        assert 'href="/runs"' in page, path


FILTERED = {
    "": ["first", "second", "third"],
    "state=failed": ["second"],
    "state=completed": ["first"],
    "agent=fails": ["second"],
    "session=s1": ["first"],
    "tenant=acme": ["third"],
    "label=team%3Dnorth": ["first", "third"],
    "label=team%3Dnorth&tenant=acme": ["third"],
    "code=llm.*": ["second"],
    "id=ir": ["first", "third"],
    "id=ir&label=team%3Dnorth&state=queued": ["third"],
    "agent=nobody": [],
}


async def test_runs_are_filtered(server: Server, redis_url: str) -> None:
    async with process(redis_url, agent(), FAILS) as worker:
        for run_id, session, fields in (
            ("first", "s1", {"agent_id": "a", "labels": {"team": "north"}}),
            ("second", "s2", {"agent_id": "fails"}),
            ("third", "s3", {"agent_id": "a", "labels": {"team": "north"}, "tenant": "acme"}),
        ):
            request = {"run_id": run_id, "session_id": session, "input_text": "hi", **fields}
            await server.app.client.submit(request)
        await worker.execute("first")
        await worker.execute("second")

        pages = {query: await server.text(f"/runs?{query}") for query in FILTERED}

    assert {query: sorted(ids_of(page)) for query, page in pages.items()} == FILTERED
    assert "No run matches." in pages["agent=nobody"]


async def test_a_full_id_opens_its_run(server: Server, redis_url: str) -> None:
    async with process(redis_url) as worker:
        await worker.submit("a/b?c")

    answer = await server.get("/runs?id=a/b?c")

    assert (answer.status_code, answer.headers["Location"]) == (302, "/run/a%2Fb%3Fc")
    assert "a/b?c" in await server.text("/run/a%2Fb%3Fc")


async def test_a_list_is_read_in_pages(
    server: Server, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first page is kept current: others would move under the eyes of the reader."""
    monkeypatch.setattr(runs_page, "ROWS", 2)
    async with process(redis_url) as worker:
        for number in range(3):
            await worker.submit(f"r{number}", session_id=f"s{number}")

    first = await server.text("/runs?agent=a")
    older = unescape(re.search(r'href="([^"]+)">Older runs', first)[1])  # type: ignore[index]
    second = await server.text(older)

    assert (len(ids_of(first)), len(ids_of(second))) == (2, 1)
    assert sorted(ids_of(first + second)) == ["r0", "r1", "r2"]
    assert 'data-live="3000"' in first
    assert "data-live" not in second
    assert "agent=a" in older


async def test_the_page_behind_the_last_one_says_that_it_is_empty(
    server: Server, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as fit on a page do not mean that there are more. It is not the page of a beginner."""
    for module in (runs_page, sessions_page, approvals_page):
        monkeypatch.setattr(module, "ROWS", 1)
    async with process(redis_url, ASKS) as worker:
        await asking(worker)
        for path, says in (
            ("/runs", "There are no older runs."),
            ("/sessions", "There are no older sessions."),
            ("/approvals", "No older call waits for an approval."),
        ):
            older = re.search(r'href="([^"]+)">Older', await server.text(path))
            assert older is not None, path
            assert says in await server.text(unescape(older[1]))
        assert "No call that waits for an approval matches." in await server.text("/approvals?agent=b")


WRONG_FILTERS = {
    "state=done": "the states are",
    "label=north": "write name=value",
    "cursor=x": "is not a valid cursor",
    f"code={'x' * 250}": "the glob in code has 250 characters",
    f"agent={'x' * 700}": "at most 600 are allowed",
}


async def test_a_wrong_filter_is_explained(server: Server) -> None:
    for query, says in WRONG_FILTERS.items():
        answer = await server.get(f"/runs?{query}")
        assert answer.status_code == 422, query
        assert says in unescape(answer.text)


# --- a run -------------------------------------------------------------------------------------------------


async def test_a_failed_run_says_why_first(server: Server, redis_url: str) -> None:
    async with process(redis_url, FAILS) as worker:
        await worker.run(agent_id="fails", input_text="Which model?")

    page = words_of(await server.text("/run/r1"))

    assert "Failed in model scripted: llm.response no such model" in page
    assert page.index("llm.response") < page.index("Timeline")
    assert "Which model?" in page
    assert "Resume from the last checkpoint" in page


async def test_a_run_with_large_steps_shows_the_last_ones(
    server: Server, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is made again several times a second, so it does not read a hundred megabytes."""
    monkeypatch.setattr(checkpoints, "NEWEST_BYTES", 1)
    monkeypatch.setattr(checkpoints, "WINDOW", 1)
    async with process(redis_url, USES) as worker:
        await worker.run(agent_id="uses", input_text="Who is it?")
        steps = (await worker.record()).steps

    page = words_of(await server.text("/run/r1"))

    conversation = page[page.index("Conversation") : page.index("Events")]
    assert f"{steps - 1} older steps are not shown." in conversation
    assert "It is ann." in conversation
    assert "calls look" not in conversation


async def test_the_last_steps_of_a_run_are_those_with_the_highest_numbers(redis_url: str) -> None:
    """Whatever the size of a window."""
    async with process(redis_url, USES) as worker:
        await worker.run(agent_id="uses")
        record = await worker.record()
        for newest in range(1, record.steps + 2):
            found = await worker.store.execute(
                checkpoints.newest_checkpoints(worker.store.keys, record, newest)
            )
            first = max(0, record.steps - newest)
            assert [each.position for each in found] == list(range(first, record.steps))


async def test_a_run_shows_its_steps_and_its_conversation(server: Server, redis_url: str) -> None:
    async with process(redis_url, USES) as worker:
        await worker.run(agent_id="uses", input_text="Who is it?")

    page = await server.text("/run/r1")

    words = words_of(page)
    for expected in (
        "attempt Attempt 1 completed",
        "tool look",
        "model scripted",
        "tokens",
        "Waits in the queue",
    ):
        assert expected in words
    conversation = words[words.index("Conversation") : words.index("Events")]
    order = ["Who is it?", "calls look", '"who": "ann"', '"seen": "ann"', "It is ann."]
    places = [conversation.index(text) for text in order]
    assert places == sorted(places)
    assert "run.completed" in words
    bars = [
        (float(x), float(width))
        for x, width in re.findall(r'oa-fill" x="([\d.]+)" y="0" width="([\d.]+)"', page)
    ]
    assert bars
    assert all(x >= 0 and x + width <= 100.01 for x, width in bars)


async def test_a_parked_run_says_what_it_waits_for(server: Server, redis_url: str) -> None:
    async with process(redis_url, ASKS) as worker:
        await asking(worker)

    page = words_of(await server.text("/run/r1"))

    assert "Why it does not work now: waits for approval charge" in page
    assert '{ "who": "ann" } Approve Edit' in page


async def test_a_page_of_a_long_run_is_bounded(
    server: Server, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows the end of the run, and says that the beginning is missing."""
    monkeypatch.setattr(run_page, "MAX_EVENTS", 20)
    monkeypatch.setattr(run_page, "MAX_STEPS", 2)
    monkeypatch.setattr(run_page, "SHOWN_EVENTS", 5)
    monkeypatch.setattr(timeline, "MAX_ROWS", 3)
    many = agent(
        "many",
        llm=scripted(*[calls(("look", {"who": str(n)})) for n in range(5)], {"text": "end"}),
        tools=[LOOK],
    )
    async with process(redis_url, many) as worker:
        await worker.run(agent_id="many")
        steps = (await worker.record()).steps

    page = await server.text("/run/r1")

    assert f"{steps - 2} older steps are not shown" in page
    assert "and what was before the last 20 events" in page
    assert page.count('<li class="oa-row') == 3
    assert page.count("<li><span>") == 5


async def test_a_long_text_is_cut(server: Server, redis_url: str) -> None:
    async with process(redis_url) as worker:
        await worker.run(input_text="x" * 50_000)

    page = await server.text("/run/r1")

    assert "46,000 more characters are not shown" in page
    assert len(page) < 60_000


async def test_the_events_of_a_run_come_live(server: Server, redis_url: str) -> None:
    """After those that the page shows, and until the end."""
    async with process(redis_url, USES) as worker:
        await worker.submit(agent_id="uses")
        page = await server.text("/run/r1")
        url = unescape(re.search(r'data-url="([^"]+)"', page)[1])  # type: ignore[index]
        executing = asyncio.create_task(worker.execute())
        async with server.browser.stream("GET", url) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            names = [line[7:] async for line in answer.aiter_lines() if line.startswith("event: ")]
        await executing

    assert names[-1] == "end"
    assert {"run.attempt_started", "tool.succeeded", "run.completed"} <= set(names)
    assert "run.queued" not in names, "the page shows it already"
    assert 'data-over="yes"' in await server.text("/run/r1")


# --- the other pages ---------------------------------------------------------------------------------------


async def test_the_inbox_lists_what_waits(server: Server, redis_url: str) -> None:
    async with process(redis_url, ASKS) as worker:
        assert "No call waits for an approval." in await server.text("/approvals")
        await asking(worker)

    page = words_of(await server.text("/approvals"))

    assert "Run r1 of agent asks asked" in page
    assert "charge waits for approval" in page
    assert "charge waits for approval" not in words_of(await server.text("/approvals?agent=other"))


async def test_a_run_with_many_calls_hides_no_other_run_in_the_inbox(
    server: Server, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first calls of each run are shown, and how many are left out there and on the page of the run."""
    monkeypatch.setattr(approvals_page, "CALLS", 1)
    monkeypatch.setattr(run_page, "MAX_APPROVALS", 2)
    many = calls(*[("charge", {"who": f"customer {number}"}) for number in range(3)])
    asks = agent("asks", llm=scripted(many, {"text": "charged"}), tools=[{**CHARGE, "approval": "always"}])
    async with process(redis_url, asks) as worker:
        for run_id in ("r1", "r2"):
            await worker.submit(run_id, session_id=run_id, agent_id="asks")
            await worker.execute(run_id)
        assert len(await server.app.client.approvals()) == 6

        inbox, page = words_of(await server.text("/approvals")), words_of(await server.text("/run/r1"))

    assert inbox.count("charge waits for approval") == 2
    assert "Run r1 of agent" in inbox
    assert "Run r2 of agent" in inbox
    assert inbox.count("2 more calls of this run wait for approval.") == 2
    assert page.count("charge waits for approval") == 2
    assert "1 more call of this run waits for approval, and is shown when these are decided." in page


async def test_a_session_shows_who_works_who_waits_and_what_was_said(server: Server, redis_url: str) -> None:
    async with process(redis_url) as worker:
        await worker.run(input_text="Hi there")
        await worker.submit("r2")
        await worker.submit("r3")

    page = words_of(await server.text("/session/s1"))
    rows = words_of(await server.text("/sessions"))

    assert "Works now r2 Waiting runs 1 Transcript 2 messages Memory in Redis" in page
    assert page.index("Hi there") < page.rindex("hello")
    assert "Queue r3" in page
    assert re.search(r"s1 \ds ago r2 1 2 0", rows)
    assert (await server.get("/sessions?id=a b")).headers["Location"] == "/session/a%20b"


async def test_the_workers_page_shows_leases_queues_and_problems(server: Server, redis_url: str) -> None:
    empty = words_of(await server.text("/fleet"))
    assert "no worker serves queue agents: no worker is alive; start one" in empty
    async with process(redis_url) as worker:
        await worker.submit()
        page = words_of(await server.text("/fleet"))
        assert worker.lease.incarnation in page
        assert "agents 1" in page


async def test_pages_say_of_a_queued_run_that_no_worker_serves_its_queue(
    server: Server, redis_url: str
) -> None:
    """No worker has announced the queue: the overview finds it by its run."""
    async with process(redis_url) as worker:
        await worker.submit()
        request = {"agent_id": "a", "session_id": "s2", "run_id": "r2", "input_text": "hi"}
        await server.app.client.submit(request, queue="typo")
        overview, runs, session = [
            words_of(await server.text(path)) for path in ("/overview", "/runs", "/session/s2")
        ]

    assert "1 run waits: no worker serves queue typo: 1 worker is alive" in overview
    assert overview.count("no worker serves queue") == 1
    assert "2 runs in queues" in overview
    assert runs.count("no worker serves queue") == 1
    assert "no worker serves queue typo" in session


async def test_the_workers_page_says_that_all_workers_are_full(server: Server, redis_url: str) -> None:
    """A run waits, and the only worker of its queue executes as many as it can."""
    client, worker = server.app.client, "w1@box:a1b2c3"
    card = WorkerCard("box", 17, ("agents",), {"a": "h"}, 1, "9.9").to_json()
    await client.store.run(call("register", incarnation=worker, info=card))
    await client.store.run(call("renew", incarnation=worker))
    for number in (1, 2):
        ids = {"agent_id": "a", "session_id": f"s{number}", "run_id": f"r{number}"}
        await client.submit({**ids, "input_text": "hi"})
    await client.store.run(call("claim", run_id="r1", incarnation=worker))

    page = words_of(await server.text("/fleet"))

    assert "the one worker of queue agents is full: 1 active run" in page
    await client.store.run(call("retire", incarnation=worker))


async def test_the_overview_counts_the_newest_runs(server: Server, redis_url: str) -> None:
    assert "There are no runs yet." in await server.text("/overview")
    async with process(redis_url, agent(), FAILS, ASKS) as worker:
        await worker.run("r0", session_id="s0")
        await worker.run("r2", session_id="s2", agent_id="fails")
        await asking(worker)

    page = words_of(await server.text("/overview"))

    assert "1 run waits for approval" in page
    assert "All 3 runs" in page
    assert "failed 1" in page
    assert "llm.response 1" in page
    ended = page[page.index("Ended runs over time: throughput") :]
    assert re.search(
        r"A column is \d[^;]*; the highest has \d runs?\. (completed 1 failed 1|failed 1 completed 1)", ended
    )


def test_ended_runs_are_counted_when_they_ended() -> None:
    """In columns of the same length, by how they ended. A run that works is in none of them."""

    def run(state: RunState, created_ms: int, ended_ms: int | None) -> RunRecord:
        ids = {"run_id": "r", "agent_id": "a", "session_id": "s", "queue": "q"}
        return RunRecord(**ids, state=state, created_ms=created_ms, ended_ms=ended_ms)

    runs = [
        run(RunState.COMPLETED, 0, 2_399),
        run(RunState.FAILED, 0, 2_350),
        run(RunState.CANCELLED, 100, 150),
        run(RunState.RUNNING, 200, None),
    ]

    plot = overview.ended_plot(runs, 2_400)

    counts = {at: column.count for at, column in enumerate(plot.columns) if column.count}
    assert (counts, plot.highest, plot.step_ms) == ({1: 1, 23: 2}, 2, 100)
    assert plot.columns[23].parts == (("good", 50.0, 50.0), ("bad", 0.0, 50.0))
    assert overview.ended_plot([], 2_400).columns == ()


async def test_a_page_without_redis_says_so(redis_url: str) -> None:
    async with serving("redis://127.0.0.1:1/0") as server:
        answer = await server.get("/runs")

    assert answer.status_code == 503
    assert "redis.unreachable" in answer.text


async def test_a_page_that_redis_does_not_permit_says_what_is_missing(server: Server, redis_url: str) -> None:
    """The rights of the user in the settings, with the command, and the role that has them."""
    redis = server.app.client.store.redis
    await redis.acl_setuser(
        "poor", enabled=True, nopass=True, keys=["*"], channels=["*"], categories=["+@all"]
    )
    try:
        await redis.execute_command("ACL", "SETUSER", "poor", "-zrevrangebyscore")
        async with serving(redis_url.replace("//", "//poor:x@")) as limited:
            answer = await limited.get("/runs")
    finally:
        await redis.acl_deluser("poor")

    assert answer.status_code == 500
    assert "redis.no_permission" in answer.text
    assert "the rights of the role operator" in words_of(answer.text)


async def test_pages_work_below_a_prefix(redis_url: str) -> None:
    async with serving(redis_url, url_prefix="tools/flower") as server, process(redis_url) as worker:
        await worker.run()
        page = await server.text("/tools/flower/run/r1")
        links = re.findall(r'(?:href|action)="(/[^"]*)"', page)
        answer = await server.post("/tools/flower/run/r1/resume")

    own = [link for link in links if re.search("run|session|overview|openagents", link)]
    assert own
    assert [link for link in own if not link.startswith("/tools/flower/")] == []
    assert answer.status_code == 409


def test_bounds_of_pages_are_small() -> None:
    """A page is a few hundred kilobytes at most, whatever a run contains."""
    largest = (timeline.MAX_ROWS * 2 * timeline.VALUE_CHARS) + run_page.MAX_STEPS * 2 * shown_text.MAX_CHARS
    assert largest < 2_000_000
    assert approvals_page.ROWS * approvals_page.CALLS * 2 * shown_text.MAX_CHARS < 2_000_000
    assert fleet_page.WORKERS <= 100


MANY = 3_000
QUERIES = (
    "",
    "state=failed",
    "state=cancelled",
    "agent=a",
    "agent=a&label=team%3Dnorth",
    "code=llm.*",
    "code=tool.*",
    "id=copy",
)
NO_ROWS = ("state=cancelled", "code=tool.*")


async def test_a_page_of_a_long_list_needs_few_commands(server: Server, redis_url: str) -> None:
    """At most 60, however rare the runs are that match: states and error codes are read by a script."""
    async with process(redis_url, agent(), FAILS) as worker:
        await worker.run("done")
        await worker.run("bad", session_id="s2", agent_id="fails")
        redis, keys = worker.store.redis, worker.store.keys
        await _copy_runs(redis, keys, MANY)
        counts = {}
        for query in QUERIES:
            before = await _commands(redis)
            page = await server.text(f"/runs?{query}")
            counts[query] = await _commands(redis) - before
            assert len(ids_of(page)) == (0 if query in NO_ROWS else runs_page.ROWS), query
        await redis.flushall()  # copies have no time to live

    assert {query: count for query, count in counts.items() if count > 60} == {}


async def _copy_runs(redis: Any, keys: Any, count: int) -> None:
    """Copies of the runs `done` and `bad`; every third has failed."""
    done, bad = await redis.hgetall(keys("run", "done")), await redis.hgetall(keys("run", "bad"))
    pipeline = redis.pipeline(transaction=False)
    for number in range(count):
        run_id = f"copy-{number:05d}"
        record = bad if number % 3 == 0 else done
        of_copy = {"agent": "a", "created": 0, "lists": '["label=team=north"]'}
        pipeline.hset(keys("run", run_id), mapping=record | of_copy)
        for index in ("all", "agent=a", "label=team=north"):
            pipeline.zadd(keys("index", index), {run_id: number})
        if number % 200 == 199:  # a larger one would keep the event loop busy
            await pipeline.execute()


async def _commands(redis: Any) -> int:
    """The commands that clients have sent. HGET is sent by the script only."""
    stats = await redis.info("commandstats")
    return sum(each["calls"] for name, each in stats.items() if name not in ("cmdstat_hget", "cmdstat_info"))


LONG_ID = "agent-<b>" + "x" * 200


async def test_an_agent_with_a_long_id_leads_to_its_runs(server: Server, redis_url: str) -> None:
    """The overview shows the beginning of the id; the link has all of it."""
    async with process(redis_url, agent(LONG_ID)) as worker:
        await worker.run(agent_id=LONG_ID)
        overview_page = await server.text("/overview")
        link = unescape(re.search(r'href="(/runs\?agent=[^"]+)"', overview_page)[1])  # type: ignore[index]

        assert ids_of(await server.text(link)) == ["r1"]
        for page in (overview_page, await server.text("/run/r1"), await server.text("/runs")):
            assert "<b>x" not in page
            assert LONG_ID not in words_of(page)


async def test_lists_that_are_cut_say_so(
    server: Server, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "AGENTS", 1)
    monkeypatch.setattr(fleet_page, "WORKERS", 1)
    client = server.app.client
    for number in range(3):
        ids = {"agent_id": f"a{number}", "session_id": f"s{number}", "run_id": f"r{number}"}
        await client.submit({**ids, "input_text": "hi"})
        card = WorkerCard("box", 17, (f"q{number}",), {}, 1, "9.9").to_json()
        await client.store.run(call("register", incarnation=f"w{number}", info=card))
    await client.store.redis.zadd(client.store.keys("limits"), {"one": 1, "two": 2})

    agents, fleet = words_of(await server.text("/overview")), words_of(await server.text("/fleet"))

    assert "2 more agents with fewer runs are not shown." in agents
    for said in ("2 more workers are", "3 more queues are", "1 more limit is"):
        assert f"{said} not shown." in fleet
    await client.store.redis.flushall()
