"""Approvals: a call that needs one waits for a person, and is executed exactly as it was decided."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from openagents_worker import Approval, ApprovalNotPending, AsyncClient
from openagents_worker.models import RunRecord, RunState, WaitKind
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.store import approvals, scripts
from tests.runtime import plugins
from tests.runtime.waiting import Fickle
from tests.support.runner import Process, agent, calls, process, scripted

ALWAYS = {"approval": "always"}


def refunding(*turns: dict[str, Any], tool: str = "Charge", **options: Any) -> dict[str, Any]:
    """An agent whose model calls the tool `charge`, which needs an approval, and then says done."""
    return agent(
        llm=scripted(*turns, {"text": "done"}),
        tools=[
            {"id": "charge", "impl": f"tests.runtime.plugins.{tool}", **ALWAYS, **options},
            {"id": "look", "impl": "tests.runtime.plugins.Look"},
        ],
    )


def charge(*who: str) -> dict[str, Any]:
    """A turn of the model in which it charges each of these."""
    return calls(*(("charge", {"who": each}) for each in who))


async def pending(p: Process, client: AsyncClient) -> list[Approval]:
    """Execute the run until it waits, and return what it asks."""
    assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
    record = await p.record()
    assert record.state is RunState.AWAITING_APPROVAL
    assert {waiting.kind for waiting in record.waiting} == {WaitKind.APPROVAL}
    return await client.handle("r1").approvals()


async def ended(p: Process) -> RunRecord:
    assert (await p.execute()).kind is AttemptOutcome.FINISHED
    record = await p.record()
    assert not [
        name
        for name in await p.store.redis.hkeys(p.store.keys("facts", "r1"))
        if not name.startswith("tries:")
    ], "no fact is left"
    assert await p.store.redis.zcard(p.store.keys("index", "approvals")) == 0
    return record


async def told_to_model(p: Process) -> Sequence[Any]:
    """The results of tools that the model was told."""
    return [record["outcome"] for record in await p.journal() if record["kind"] == "tool"]


@pytest.mark.defect("A01", "A04")
async def test_a_call_that_is_approved_is_made_as_it_was_asked(redis_url: str) -> None:
    async with process(redis_url, refunding(charge("ann"))) as p, AsyncClient(redis_url) as client:
        await p.submit()
        (asked,) = await pending(p, client)
        assert (asked.tool_id, asked.arguments, asked.agent_id) == ("charge", {"who": "ann"}, "a")
        assert (asked.session_id, asked.reason, asked.expires_at) == ("s1", "Charges somebody.", None)
        assert plugins.LOG == []

        decision = await client.approve("r1", asked.call_id, by="bob", note="go on")

        assert (await p.record()).state is RunState.QUEUED
        assert (await ended(p)).state is RunState.COMPLETED
        assert plugins.executed("charge") == ["ann"]
        (outcome,) = await told_to_model(p)
        assert outcome["decision"] == decision.model_dump(mode="json", exclude_none=True)
        names = await p.event_names()
        assert [names.count(name) for name in ("tool.approval_needed", "tool.approved")] == [1, 1]


async def test_the_model_is_told_that_a_call_was_denied_and_why(redis_url: str) -> None:
    async with process(redis_url, refunding(charge("ann"))) as p, AsyncClient(redis_url) as client:
        await p.submit()
        (asked,) = await pending(p, client)
        await client.deny("r1", asked.call_id, by="bob", note="she has paid")
        assert (await ended(p)).state is RunState.COMPLETED
        assert plugins.LOG == []
        messages = [json.dumps(message) for message in await p.transcript()]
        assert any("bob denied the call of 'charge': she has paid" in text for text in messages)
        assert "tool.denied" in await p.event_names()


async def test_edited_arguments_replace_those_of_the_model(redis_url: str) -> None:
    """They are what the intent, the tool, the event and the record have. The approval keeps its id."""
    definition = refunding(charge("ann"), tool="OnceOnly")
    async with process(redis_url, definition) as p, AsyncClient(redis_url) as client:
        await p.submit()
        (asked,) = await pending(p, client)
        await client.approve("r1", asked.call_id[:-4], by="bob", arguments={"who": "eve"})
        await ended(p)
        assert plugins.executed("charge") == ["eve"]
        (outcome,) = await told_to_model(p)
        assert outcome["ok"] == {"charged": "eve"}
        assert outcome["decision"]["arguments"] == {"who": "eve"}
        (approved,) = [event for event in await p.events() if event["name"] == "tool.approved"]
        assert approved["payload"]["arguments"] == {"who": "eve"}
        assert approved["payload"]["call_id"] == asked.call_id


async def test_edited_arguments_that_the_tool_does_not_accept_are_not_used(redis_url: str) -> None:
    definition = agent(
        llm=scripted(calls(("clock", {})), {"text": "done"}),
        tools=[{"id": "clock", "type": "current_time", **ALWAYS}],
    )
    async with process(redis_url, definition) as p, AsyncClient(redis_url) as client:
        await p.submit()
        (asked,) = await pending(p, client)
        await client.approve("r1", asked.call_id, by="bob", arguments={"timezone": 7})
        await ended(p)
        (outcome,) = await told_to_model(p)
        assert outcome["error"]["code"] == "tool.validation"


async def test_the_calls_of_one_turn_are_asked_together(redis_url: str) -> None:
    """The run goes on when all are decided, and makes the calls in the order of the model."""
    definition = refunding(charge("ann", "bob", "cid"))
    async with process(redis_url, definition) as p, AsyncClient(redis_url) as client:
        await p.submit()
        asked = await pending(p, client)
        assert [one.arguments["who"] for one in asked] == ["ann", "bob", "cid"]
        by_name = {one.arguments["who"]: one.call_id for one in asked}
        await client.approve("r1", by_name["cid"], by="x")
        await client.deny("r1", by_name["bob"], by="x")
        assert (await p.record()).state is RunState.AWAITING_APPROVAL
        assert [one.arguments["who"] for one in await client.handle("r1").approvals()] == ["ann"]
        await client.approve("r1", by_name["ann"], by="x")
        assert (await p.record()).state is RunState.QUEUED
        await ended(p)
        assert plugins.executed("charge") == ["ann", "cid"]


async def test_who_comes_second_gets_the_first_decision(redis_url: str) -> None:
    """While the run waits, and after it has followed the decision."""
    async with process(redis_url, refunding(charge("ann"))) as p, AsyncClient(redis_url) as client:
        await p.submit()
        (asked,) = await pending(p, client)
        await client.approve("r1", asked.call_id, by="bob")
        for _ in range(2):
            with pytest.raises(ApprovalNotPending) as caught:
                await client.deny("r1", asked.call_id, by="eve")
            assert (caught.value.decision.action, caught.value.decision.by) == ("approve", "bob")
            if (await p.record()).state is RunState.QUEUED:
                await ended(p)


@pytest.mark.parametrize(
    ("default", "called", "stored"),
    [("deny", [], "tool.permanent"), ("approve", ["ann"], None), ("fail", [], "approval.timeout")],
)
async def test_the_default_decides_if_nobody_does_in_time(
    redis_url: str, default: str, called: list[str], stored: str | None
) -> None:
    definition = refunding(charge("ann"), approval_timeout_ms=5_000, approval_default=default)
    async with process(redis_url, definition) as p, AsyncClient(redis_url) as client:
        await p.submit()
        (asked,) = await pending(p, client)
        assert (asked.default_action, asked.expires_at is not None) == (default, True)
        await time_passes(p)
        record = await ended(p)
        assert plugins.executed("charge") == called
        (outcome,) = await told_to_model(p)
        assert outcome.get("error", {}).get("code") == stored
        assert (outcome["decision"]["by"], outcome["decision"]["action"]) == ("timeout", default)
        assert record.state is (RunState.FAILED if default == "fail" else RunState.COMPLETED)
        with pytest.raises(ApprovalNotPending) as caught:
            await client.approve("r1", asked.call_id, by="too late")
        assert caught.value.decision.by == "timeout"


async def time_passes(p: Process) -> None:
    """The time-out of the approval is over, by the clock of Redis."""
    key, facts = p.store.keys("run", "r1"), p.store.keys("facts", "r1")
    for name, text in (await p.store.redis.hgetall(facts)).items():
        value = json.loads(text)
        for field in ("until_ms", "expires_ms"):
            if isinstance(value, dict) and field in value:
                await p.store.redis.hset(facts, name, json.dumps({**value, field: 1}))
    await p.store.redis.hset(key, "due", 1)
    await p.store.redis.zadd(p.store.keys("timeouts"), {"r1": 1})
    await p.store.run(scripts.wake(limit=10))


async def test_a_decision_at_the_moment_of_the_timeout_counts(redis_url: str) -> None:
    """The run is awake because of its time-out. Who decides before the run does is the first."""
    definition = refunding(charge("ann"), approval_timeout_ms=5_000)
    async with process(redis_url, definition) as p, AsyncClient(redis_url) as client:
        await p.submit()
        (asked,) = await pending(p, client)
        await time_passes(p)
        await client.approve("r1", asked.call_id, by="bob")
        await ended(p)
        assert plugins.executed("charge") == ["ann"]


async def test_a_cancelled_run_waits_for_no_approval(redis_url: str) -> None:
    async with process(redis_url, refunding(charge("ann"))) as p, AsyncClient(redis_url) as client:
        await p.submit()
        (asked,) = await pending(p, client)
        await client.cancel("r1")
        assert await client.handle("r1").approvals() == []
        assert len(await client.approvals()) == 0
        with pytest.raises(ApprovalNotPending):
            await client.approve("r1", asked.call_id, by="bob")


@pytest.mark.parametrize("decision", [True, "yes", "deny", "Allow", 1])
@pytest.mark.defect("A02")
async def test_only_allow_in_the_request_allows_a_call(redis_url: str, decision: Any) -> None:
    """A decision that is known beforehand needs nobody to ask; any other value denies."""
    async with process(redis_url, refunding(charge("ann"))) as p:
        await p.run(context_hints={"approvals": {"charge": decision}})
        assert plugins.LOG == []
        await p.run("r2", context_hints={"approvals": {"charge": "allow"}}, session_id="s2")
        assert plugins.executed("charge") == ["ann"]


async def test_a_run_that_is_not_durable_is_not_parked(redis_url: str) -> None:
    """Nobody could continue it: without a decision in its request, the call is denied."""
    async with process(redis_url, refunding(charge("ann"))) as p:
        await p.run(durable=False)
        assert plugins.LOG == []


async def test_approvals_are_listed_over_all_runs(redis_url: str) -> None:
    """With filters, in pages. Runs without approvals are in no list."""
    definition = refunding(charge("ann", "bob"))
    async with process(redis_url, definition) as p, AsyncClient(redis_url) as client:
        for number in range(3):
            run_id = f"r{number}"
            await p.submit(run_id, session_id=f"s{number}", tenant="t" if number else None)
            await p.execute(run_id)
        assert len(await client.approvals()) == 6
        assert {one.run_id for one in await client.approvals(tenant="t")} == {"r1", "r2"}
        assert {one.run_id for one in await client.approvals(session_id="s0")} == {"r0"}
        assert len(await client.approvals(agent_id="b")) == 0
        first = await client.approvals(limit=1)
        second = await client.approvals(limit=2, cursor=first.next_cursor)
        assert {one.run_id for one in first} | {one.run_id for one in second} == {"r0", "r1", "r2"}
        for number in range(3):
            await client.cancel(f"r{number}")


async def test_a_page_of_approvals_reads_the_runs_that_it_shows(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no others, however many wait: of each its record and what it asks, in two round trips."""
    monkeypatch.setattr(approvals, "FEWEST_RUNS", 1)
    async with process(redis_url, refunding(charge("ann"))) as p, AsyncClient(redis_url) as client:
        names = [f"r{number}" for number in range(4)]
        for name in names:
            await p.submit(name, session_id=name)
            await p.execute(name)

        async def reads() -> int:
            return int((await p.store.redis.info("commandstats"))["cmdstat_hmget"]["calls"])

        before = await reads()
        assert len(await client.approvals(limit=2)) == 2
        assert await reads() - before == 2 * 2
        for name in names:
            await client.cancel(name)


async def test_secrets_in_arguments_are_not_shown(redis_url: str) -> None:
    definition = refunding(calls(("charge", {"who": "ann", "api_key": "sk-0123456789abcdef0123"})))
    async with process(redis_url, definition) as p, AsyncClient(redis_url) as client:
        await p.submit()
        (asked,) = await pending(p, client)
        assert asked.arguments == {"who": "ann", "api_key": "***"}
        await client.cancel("r1")


async def test_the_next_life_of_a_run_asks_only_about_what_was_not_decided(redis_url: str) -> None:
    """A decision holds until its call is recorded. Nobody is asked about that call again."""
    async with process(redis_url, refunding(charge("ann", "ben"))) as p, AsyncClient(redis_url) as client:
        await p.submit()
        ann, ben = await pending(p, client)
        await client.approve("r1", ann.call_id, by="bob")
        await client.cancel("r1")
        await client.resume("r1")
        assert [asked.call_id for asked in await pending(p, client)] == [ben.call_id]
        asked_about = [
            event["payload"]["call_id"]
            for event in await p.events()
            if event["name"] == "tool.approval_needed"
        ]
        assert sorted(asked_about) == sorted([ann.call_id, ben.call_id, ben.call_id])
        await client.approve("r1", ben.call_id, by="bob")
        assert (await ended(p)).state is RunState.COMPLETED
        assert sorted(plugins.executed("charge")) == ["ann", "ben"]


@pytest.mark.parametrize("decision", ["deny", "approve"])
async def test_a_call_that_was_asked_about_is_made_only_as_it_was_decided(
    redis_url: str, decision: str
) -> None:
    """Also if its tool says meanwhile that it needs no approval."""
    Fickle.asked = 0
    definition = refunding(charge("ann"), approval=None)
    definition["tools"][0]["impl"] = "tests.runtime.waiting.Fickle"
    async with process(redis_url, definition) as p, AsyncClient(redis_url) as client:
        await p.submit()
        (asked,) = await pending(p, client)
        await getattr(client, decision)("r1", asked.call_id, by="bob")
        assert (await ended(p)).state is RunState.COMPLETED
        assert plugins.executed("charge") == (["ann"] if decision == "approve" else [])
