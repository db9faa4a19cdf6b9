"""Calls with effects: a call that was interrupted before its outcome was stored is never repeated unasked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from openagents_worker import AsyncClient, Reconciled
from openagents_worker.errors import ToolRateLimitError
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRecord, RunState, WaitKind
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.latch import LatchReason, RunLatched
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.scripts import DecideAnswer, DecideResult
from tests.runtime import plugins
from tests.support.runner import Process, agent, crash, due, process
from tests.support.waiting import await_for

REFUSED = "run.outcome_unknown"


def paying(tool: str = "OnceOnly", *, pattern: str = "Steps", **options: Any) -> dict[str, Any]:
    """An agent that charges twice with a tool that must not be repeated."""
    return agent(
        pattern={"impl": f"tests.runtime.plugins.{pattern}", "config": {"n": 2}},
        tools=[{"id": "charge", "impl": f"tests.runtime.plugins.{tool}", **options}],
    )


@asynccontextmanager
async def interrupted(
    definition: dict[str, Any], redis_url: str, *, charge: int = 1
) -> AsyncIterator[tuple[Process, Process]]:
    """Two workers. The first one has died in this charge of the run."""
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        dying = asyncio.create_task(one.execute())
        await await_for(lambda: begun() == charge, "the charge begins")
        await crash(one, "r1", dying)
        for gate in ("charge-0", "charge-1", "charge", "then"):
            plugins.GATES[gate].set()
        yield one, two


def begun() -> int:
    return sum(entry[0] == "begin" for entry in plugins.LOG)


async def facts(p: Process) -> dict[str, str]:
    stored: dict[str, str] = await p.store.redis.hgetall(p.store.keys("facts", "r1"))
    return stored


async def is_resolved(p: Process) -> bool:
    return any(name.startswith("resolution:") for name in await facts(p))


async def call_in_question(p: Process) -> str:
    """The id of the only call with an intent."""
    (name,) = [name for name in await facts(p) if name.startswith("intent:")]
    return name.removeprefix("intent:")


async def resolve(p: Process, call: str, action: str, *, fence: str = "", **more: Any) -> DecideResult:
    value = {"action": action, "by": "anna", "at": "2026-01-01T00:00:00Z", **more}
    payload = json.dumps({"call_id": call, "action": action, "by": "anna"})
    return await p.store.run(
        scripts.decide(
            run_id="r1",
            kind="resolution",
            call=call,
            value=json.dumps(value),
            event="tool.outcome_resolved",
            payload=payload,
            fence=fence,
        )
    )


def code_of(record: RunRecord) -> str | None:
    assert record.result is not None
    details = record.result.error_details
    return details.code if details is not None else None


async def ended(p: Process) -> RunRecord:
    await p.execute()
    return await p.record()


async def test_a_call_with_effects_leaves_an_intent_until_its_record_is_stored(redis_url: str) -> None:
    """The intent is written before the tool is called. The record of the call replaces it."""
    async with process(redis_url, paying()) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: begun() == 1, "the charge begins")
        call = await call_in_question(p)
        intent = json.loads((await facts(p))[f"intent:{call}"])
        assert intent["outcome"]["begun"]["key"] == f"r1:u1:{call}" == plugins.LOG[0][3]
        assert "tool.called" in await p.event_names(), "the event was stored in the same round trip"
        for number in range(2):
            plugins.GATES[f"charge-{number}"].set()
        await executing
        assert await facts(p) == {}


async def test_a_call_that_may_be_repeated_has_no_intent(redis_url: str) -> None:
    async with process(redis_url, paying("Charge")) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: begun() == 1, "the charge begins")
        assert await facts(p) == {}
        for number in range(2):
            plugins.GATES[f"charge-{number}"].set()
        await executing


async def test_an_interrupted_call_is_repeated_if_the_agents_file_allows_it(redis_url: str) -> None:
    """It is made with the same idempotency key, under a new intent."""
    async with interrupted(paying(on_interrupted="rerun"), redis_url) as (_, two):
        record = await ended(two)
        assert record.state is RunState.COMPLETED
        assert plugins.executed("charge") == [0, 1]
        keys = [entry[3] for entry in plugins.LOG if entry[:3] == ("begin", "charge", 0)]
        assert len(keys) == 2
        assert len(set(keys)) == 1
        assert await facts(two) == {}


async def test_an_interrupted_call_fails_the_run_if_the_agents_file_says_so(redis_url: str) -> None:
    """The error cannot be caught by the pattern, and the tool is not called again."""
    async with interrupted(paying(pattern="Undeterred", on_interrupted="fail"), redis_url) as (_, two):
        record = await ended(two)
        assert code_of(record) == REFUSED
        assert begun() == 1


async def test_the_time_for_an_approval_does_not_limit_the_decision_about_its_outcome(redis_url: str) -> None:
    """One call may wait for an approval and, after its worker died, for a decision: each has its own time."""
    definition = paying(approval="always", approval_timeout_ms=3_600_000)
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
        AsyncClient(redis_url) as client,
    ):
        await one.submit()
        await one.execute()
        (asked,) = await client.handle("r1").approvals()
        await client.approve("r1", asked.call_id, by="anna")
        dying = asyncio.create_task(one.execute())
        await await_for(lambda: begun() == 1, "the charge begins")
        await crash(one, "r1", dying)
        await two.execute()
        (wait,) = (await two.record()).waiting
        assert (wait.kind, wait.until) == (WaitKind.OUTCOME, None)
        assert (await two.event_names()).count("run.outcome_unknown") == 1


KNOWING = ["Reconciling", "Till"]
"""A tool, and a toolset, that can say what became of an interrupted call."""


@pytest.mark.parametrize("tool", KNOWING)
async def test_a_tool_that_knows_the_outcome_is_asked_first(redis_url: str, tool: str) -> None:
    """`reconcile` gets the arguments and the key of the call. Its result is that of the call."""
    plugins.ANSWERS.append(Reconciled.done({"charged": "before"}))
    async with interrupted(paying(tool, on_interrupted="fail"), redis_url) as (_, two):
        record = await ended(two)
        assert record.state is RunState.COMPLETED
        assert plugins.executed("charge") == [1]
        (asked,) = [entry for entry in plugins.LOG if entry[0] == "reconcile"]
        assert asked[2:] == (0, plugins.LOG[0][3])
        assert {"ok": {"charged": "before"}} in [record["outcome"] for record in await two.journal()]
        assert await facts(two) == {}


@pytest.mark.parametrize("tool", KNOWING)
async def test_a_call_that_had_no_effect_is_made_again(redis_url: str, tool: str) -> None:
    plugins.ANSWERS.append(Reconciled.not_done())
    async with interrupted(paying(tool, on_interrupted="fail"), redis_url) as (_, two):
        assert (await ended(two)).state is RunState.COMPLETED
        assert plugins.executed("charge") == [0, 1]


@pytest.mark.parametrize("answer", [Reconciled.unknown(), ZeroDivisionError("a bug"), {"done": True}])
async def test_a_tool_that_cannot_tell_leaves_it_to_the_agents_file(redis_url: str, answer: Any) -> None:
    """So does an error of `reconcile`, and a value that is not its own."""
    plugins.ANSWERS.append(answer)
    async with interrupted(paying("Reconciling", on_interrupted="fail"), redis_url) as (_, two):
        assert code_of(await ended(two)) == REFUSED
        assert begun() == 1


async def test_a_toolset_that_is_never_able_to_tell_leaves_it_to_the_agents_file(redis_url: str) -> None:
    """`reconcile` is optional."""
    async with interrupted(paying("Drawer", on_interrupted="fail"), redis_url) as (_, two):
        assert code_of(await ended(two)) == REFUSED
        assert begun() == 1


async def test_a_run_waits_until_somebody_knows_what_became_of_its_call(redis_url: str) -> None:
    """It holds no slot, and nothing is called. The decision wakes it."""
    async with interrupted(paying(), redis_url) as (_, two):
        call = await call_in_question(two)
        assert (await two.execute()).kind is AttemptOutcome.SUSPENDED
        record = await two.record()
        assert record.state is RunState.PAUSED
        (waiting,) = record.waiting
        assert (waiting.kind, waiting.name, waiting.call_id) == (WaitKind.OUTCOME, "charge", call)
        assert begun() == 1
        assert (await two.event_names()).count("run.outcome_unknown") == 1
        decided = await resolve(two, call, "rerun")
        assert [wake.run_id for wake in decided.wakes] == ["r1"]
        assert (await ended(two)).state is RunState.COMPLETED
        assert plugins.executed("charge") == [0, 1]
        assert await facts(two) == {}


async def test_a_late_outcome_wakes_a_run_that_waits_for_it(redis_url: str) -> None:
    """A worker that was believed dead ends its call, while the run waits for a person."""
    definition = paying()
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        executing = asyncio.create_task(one.execute())
        await await_for(lambda: begun() == 1, "the charge begins")
        await two.store.redis.zadd(two.store.keys("workers"), {one.lease.incarnation: 1})
        await two.store.run(scripts.reclaim(limit=100, max_recoveries=50, blameless=False))
        assert (await two.execute()).kind is AttemptOutcome.SUSPENDED
        assert (await two.record()).state is RunState.PAUSED
        plugins.GATES["charge-0"].set()
        plugins.GATES["charge-1"].set()
        await executing
        await await_for(partial(is_resolved, two), "the outcome is reported")
        assert (await two.record()).state is RunState.QUEUED
        assert (await ended(two)).state is RunState.COMPLETED
        assert plugins.executed("charge") == [0, 1]


async def test_a_resumed_run_asks_although_its_tool_fails_runs(redis_url: str) -> None:
    """Somebody has resumed the failed run: that is no permission to repeat the call."""
    async with interrupted(paying(on_interrupted="fail"), redis_url) as (_, two):
        assert code_of(await ended(two)) == REFUSED
        resumed = scripts.resume(run_id="r1", agent_id="a", session_id="s1", input_text="", checkpoint_id="")
        await two.store.run(resumed)
        assert (await ended(two)).state is RunState.PAUSED
        assert begun() == 1
        await two.store.run(scripts.cancel(run_id="r1", reason="", force=False))


async def test_a_person_decides_that_a_call_is_made_again(redis_url: str) -> None:
    async with interrupted(paying(on_interrupted="fail"), redis_url) as (_, two):
        call = await call_in_question(two)
        assert (await resolve(two, call, "rerun")).answer is DecideAnswer.OK
        assert (await ended(two)).state is RunState.COMPLETED
        assert plugins.executed("charge") == [0, 1]
        assert await facts(two) == {}


async def test_a_person_gives_the_result_of_a_call(redis_url: str) -> None:
    async with interrupted(paying(on_interrupted="fail"), redis_url) as (_, two):
        call = await call_in_question(two)
        await resolve(two, call, "skip", result={"charged": "by hand"})
        assert (await ended(two)).state is RunState.COMPLETED
        assert plugins.executed("charge") == [1]
        assert (await two.journal())[1]["outcome"] == {"ok": {"charged": "by hand"}}


async def test_the_first_decision_counts(redis_url: str) -> None:
    async with interrupted(paying(on_interrupted="fail"), redis_url) as (_, two):
        call = await call_in_question(two)
        await resolve(two, call, "skip", result=1)
        second = await resolve(two, call, "rerun")
        assert second.answer is DecideAnswer.ALREADY
        assert json.loads(second.decision)["action"] == "skip"


async def test_only_interrupted_calls_can_be_resolved(redis_url: str) -> None:
    """Not one that is being made, not one that was never begun, and not one of a run that has ended."""
    async with process(redis_url, paying()) as p:
        assert (await resolve(p, "charge:00:1", "rerun")).answer is DecideAnswer.UNKNOWN
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: begun() == 1, "the charge begins")
        call = await call_in_question(p)
        assert (await resolve(p, call, "rerun")).answer is DecideAnswer.NOT_PENDING
        assert (await resolve(p, "charge:00:1", "rerun")).answer is DecideAnswer.NOT_PENDING
        for number in range(2):
            plugins.GATES[f"charge-{number}"].set()
        await executing
        assert (await resolve(p, call, "rerun")).answer is DecideAnswer.GONE


async def test_a_decision_that_comes_while_the_run_is_prepared_counts(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt has read the facts already. It learns of the decision when it writes its intent."""
    async with interrupted(paying(on_interrupted="rerun"), redis_url) as (_, two):
        call = await call_in_question(two)
        original = Recorder.call

        async def decided_first(self: Recorder, kind: str, *args: Any, **options: Any) -> Any:
            if kind == "tool":
                await resolve(two, call, "skip", result="by hand")
            return await original(self, kind, *args, **options)

        monkeypatch.setattr(Recorder, "call", decided_first)
        assert (await ended(two)).state is RunState.COMPLETED
        assert plugins.executed("charge") == [1]
        assert (await two.journal())[1]["outcome"] == {"ok": "by hand"}


async def test_a_failed_run_that_is_resumed_does_not_repeat_the_call_either(redis_url: str) -> None:
    """The intent stays until somebody knows the outcome. A decision holds for one life."""
    async with interrupted(paying(on_interrupted="ask"), redis_url) as (_, two):
        call = await call_in_question(two)
        await resolve(two, call, "fail", note="who knows")
        record = await ended(two)
        assert code_of(record) == REFUSED
        assert record.result is not None
        assert record.result.error_details is not None
        assert "anna" in record.result.error_details.message
        assert list(await facts(two)) == [f"intent:{call}", f"fence:{call}", f"resolution:{call}"]
        resumed = scripts.resume(run_id="r1", agent_id="a", session_id="s1", input_text="", checkpoint_id="")
        await two.store.run(resumed)
        assert list(await facts(two)) == [f"intent:{call}", f"fence:{call}"]
        await resolve(two, call, "rerun")
        assert (await ended(two)).state is RunState.COMPLETED
        assert plugins.executed("charge") == [0, 1]


async def test_a_call_that_the_program_cancelled_keeps_its_intent(redis_url: str) -> None:
    """A later attempt that does not cancel it must not repeat it. One that cancels it again is not asked."""
    definition = paying(pattern="Impatient", on_interrupted="rerun")
    async with interrupted(definition, redis_url, charge=2) as (_, two):
        assert sum(name.startswith("intent:") for name in await facts(two)) == 2
        assert (await ended(two)).state is RunState.COMPLETED
        assert [entry[2] for entry in plugins.LOG if entry[0] == "begin"] == ["slow", "then", "then"]
        assert sum(name.startswith("intent:") for name in await facts(two)) == 1


async def test_an_interrupted_call_with_other_arguments_is_in_question_too(redis_url: str) -> None:
    """Its arguments depend on a clock. A call that is made again has the key of the first one."""
    plugins.Clocked.count = 0
    async with interrupted(paying(pattern="Clocked", on_interrupted="fail"), redis_url) as (_, two):
        call = await call_in_question(two)
        await resolve(two, call, "rerun")
        assert (await ended(two)).state is RunState.COMPLETED
        assert plugins.executed("charge") == ["at 2"]
        assert len({entry[3] for entry in plugins.LOG if entry[0] == "begin"}) == 1
        assert await facts(two) == {}


async def test_a_run_that_waits_for_a_decision_names_the_call_that_was_begun(redis_url: str) -> None:
    """The call that is made in its place has another id, because its arguments differ."""
    plugins.Clocked.count = 0
    async with (
        interrupted(paying(pattern="Clocked"), redis_url) as (_, two),
        AsyncClient(redis_url) as client,
    ):
        await two.execute()
        (wait,) = (await two.record()).waiting
        assert wait.call_id == await call_in_question(two)
        await client.resolve("r1", wait.call_id, "rerun", by="anna")
        assert (await ended(two)).state is RunState.COMPLETED
        assert not any(name.startswith("intent:") for name in await facts(two))


async def test_other_arguments_without_a_decision_are_not_used(redis_url: str) -> None:
    plugins.Clocked.count = 0
    async with interrupted(paying(pattern="Clocked", on_interrupted="fail"), redis_url) as (_, two):
        assert code_of(await ended(two)) == REFUSED
        assert begun() == 1


async def test_a_worker_that_lost_the_run_reports_the_outcome_of_its_call(redis_url: str) -> None:
    """The tool had ended, but the commit was refused: the next attempt takes the outcome as it is."""
    definition = paying(on_interrupted="fail")
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        executing = asyncio.create_task(one.execute())
        await await_for(lambda: begun() == 1, "the charge begins")
        await two.store.redis.zadd(two.store.keys("workers"), {one.lease.incarnation: 1})
        await two.store.run(scripts.reclaim(limit=100, max_recoveries=50, blameless=False))
        plugins.GATES["charge-0"].set()
        plugins.GATES["charge-1"].set()
        assert (await executing).reason == "fenced"
        await await_for(partial(is_resolved, two), "the outcome is reported")
        assert (await ended(two)).state is RunState.COMPLETED
        assert plugins.executed("charge") == [0, 1]
        record = await two.record()
        assert record.usage.tool_calls == 2
        state = await two.store.redis.hgetall(two.store.keys("session_state", "s1"))
        assert json.loads(state["charged"]) == [0, 1], "the change of the state came with the outcome"
        assert "tool.outcome_resolved" in await two.event_names()


async def reclaimed(p: Process, dead: Process) -> None:
    """The lease of a worker is over, and another one has taken its runs."""
    await p.store.redis.zadd(p.store.keys("workers"), {dead.lease.incarnation: 1})
    await p.store.run(scripts.reclaim(limit=100, max_recoveries=50, blameless=False))


@pytest.mark.parametrize("outcome", ["made", "not executed"])
async def test_a_worker_reports_before_the_run_has_changed_hands(redis_url: str, outcome: str) -> None:
    """It stops its runs before its lease ends, and another worker takes them some time later."""
    definition = paying("OnceOnly", on_interrupted="fail")
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        executing = asyncio.create_task(one.execute())
        await await_for(lambda: begun() == 1, "the charge begins")
        if outcome == "not executed":
            error = ToolRateLimitError("the bank is closed", "charge", retry_after_ms=1)
            error.was_executed = False
            plugins.FAILURES["0"] = [error]
        one.runner.latch("r1", LatchReason.FENCED)
        plugins.GATES["charge-0"].set()
        assert (await executing).reason == "fenced"
        await await_for(partial(is_resolved, two), "the outcome is reported")
        await reclaimed(two, one)
        plugins.GATES["charge-1"].set()
        assert (await ended(two)).state is RunState.COMPLETED
        assert plugins.executed("charge") == [0, 1]


async def test_a_call_whose_intent_was_not_answered_was_not_begun(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has stored the intent, and the lease of the worker was over before it knew."""
    write_ahead = FencedStore.write_ahead

    async def lose_the_answer(store: FencedStore, call: Any) -> Any:
        await write_ahead(store, call)
        store.lose_run("the lease is over")
        raise RunLatched(LatchReason.FENCED)

    definition = paying("OnceOnly", on_interrupted="fail")
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        with monkeypatch.context() as lossy:
            lossy.setattr(FencedStore, "write_ahead", lose_the_answer)
            assert (await one.execute()).reason == "fenced"
        await await_for(partial(is_resolved, two), "that it was not begun is reported")
        await reclaimed(two, one)
        for number in range(2):
            plugins.GATES[f"charge-{number}"].set()
        assert (await ended(two)).state is RunState.COMPLETED
        assert plugins.executed("charge") == [0, 1]


async def test_a_run_that_is_not_durable_writes_no_intent(redis_url: str) -> None:
    async with process(redis_url, paying()) as p:
        await p.submit(durable=False)
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: begun() == 1, "the charge begins")
        assert await facts(p) == {}
        for number in range(2):
            plugins.GATES[f"charge-{number}"].set()
        await executing


async def test_a_call_that_parks_is_not_an_interrupted_one(redis_url: str) -> None:
    """It begins again at its first line. The suspension that parks the run closes its intent."""
    async with (
        process(redis_url, paying("Patient", on_interrupted="fail")) as p,
        AsyncClient(redis_url) as client,
    ):
        await p.submit()
        for number in range(2):
            assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
            assert (await p.record()).state is RunState.WAITING
            assert not any(name.startswith("intent:") for name in await facts(p))
            await client.send("r1", "go", number)
        assert (await ended(p)).state is RunState.COMPLETED
        assert plugins.executed("charge") == [0, 1]
        assert await facts(p) == {}


def beside(pattern: str, tool: str, **fields: Any) -> dict[str, Any]:
    """An agent that charges, and makes another call beside it. Interrupted charges fail the run."""
    return agent(
        pattern={"impl": f"tests.runtime.waiting.{pattern}"},
        tools=[
            {"id": "charge", "impl": tool, "on_interrupted": "fail"},
            {"id": "beside", "impl": "tests.runtime.plugins.Charge"},
        ],
        **fields,
    )


def waits_in(p: Process) -> bool:
    attempt = p.runner._attempts.get("r1")
    return bool(attempt and attempt._recorder and attempt._recorder.waits._open)


@pytest.mark.parametrize("reason", ["handover", "retry"])
async def test_a_call_that_waits_is_not_interrupted_when_the_run_is_suspended(
    redis_url: str, reason: str
) -> None:
    """Its worker stops, or a call beside it is retried. It begins again, as when it parks."""
    definition = beside("Beside", "tests.runtime.plugins.Patient")
    async with process(redis_url, definition) as p, AsyncClient(redis_url) as client:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: waits_in(p) and begun() == 2, "one call waits, and the other one is made")
        if reason == "handover":
            p.runner.latch("r1", LatchReason.HANDOVER)
        else:
            plugins.FAILURES["beside"] = [plugins.rate_limited()]
        plugins.GATES["beside"].set()
        assert (await executing).kind is AttemptOutcome.SUSPENDED
        assert not any(name.startswith("intent:") for name in await facts(p))
        if reason == "retry":
            await due(p)
        await client.send("r1", "go", 1)
        assert (await ended(p)).state is RunState.COMPLETED
        assert sorted(plugins.executed("charge")) == ["beside", "waits"]


@pytest.mark.parametrize("reason", ["handover", "retry"])
async def test_a_call_with_effects_ends_before_its_run_is_suspended(redis_url: str, reason: str) -> None:
    """Also if it makes calls itself: nobody has to be asked about a call that could end."""
    async with process(redis_url, beside("Beside", "tests.runtime.waiting.ChargesThenLooks")) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: begun() == 2 and plugins.executed("charge") == ["waits"], "the effect")
        if reason == "handover":
            p.runner.latch("r1", LatchReason.HANDOVER)
        else:
            plugins.FAILURES["beside"] = [plugins.rate_limited()]
        plugins.GATES["beside"].set()
        await await_for(lambda: p.runner._attempts["r1"].latch.reason is not None, "the run stops")
        plugins.GATES["inside"].set()
        assert (await executing).kind is AttemptOutcome.SUSPENDED
        assert not any(name.startswith("intent:") for name in await facts(p))
        if reason == "retry":
            await due(p)
        assert (await ended(p)).state is RunState.COMPLETED
        assert sorted(plugins.executed("charge")) == ["beside", "inside", "waits"]


async def test_a_call_that_does_not_wait_is_interrupted_when_the_run_parks(redis_url: str) -> None:
    """A call of a model beside it waits for the fleet. Nobody knows whether it has had its effect."""
    llm = {"provider": "scripted", "script": [{"text": "hello"}] * 9, "limits": {"requests_per_minute": 1}}
    definition = beside("BesideAModel", "tests.runtime.waiting.ChargesThenWaits", llm=llm)
    async with process(redis_url, definition, agent("b", llm=llm)) as p:
        await p.run("other", agent_id="b", session_id="other")
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: plugins.executed("charge") == ["once"], "the charge has had its effect")
        plugins.GATES["ask"].set()

        def is_parking() -> bool:
            attempt = p.runner._attempts.get("r1")
            return attempt is not None and attempt.latch.reason is LatchReason.PARKED

        await await_for(is_parking, "the call of the model waits for the fleet")
        plugins.GATES["inside"].set()
        assert (await executing).kind is AttemptOutcome.SUSPENDED
        assert any(name.startswith("intent:") for name in await facts(p))
        plugins.GATES["ask"].clear()
        await p.store.redis.zadd(p.store.keys("timeouts"), {"r1": 1}, xx=True)
        await p.store.run(scripts.wake(limit=10))
        assert code_of(await ended(p)) == REFUSED
        assert plugins.executed("charge") == ["once"]


async def test_with_strict_durability_the_intent_is_on_disk_before_the_call(tmp_path: Path) -> None:
    """Otherwise a crash of Redis may lose it, and the call would be repeated unasked."""
    redis = await asyncio.to_thread(EmbeddedRedis(tmp_path / "data").__enter__)
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis.url, "OPENAGENTS_DURABILITY": "strict"})
    try:
        async with process(redis.url, paying(), settings=settings) as p:
            await p.submit()
            plugins.GATES["charge-0"].set()
            plugins.GATES["charge-1"].set()
            assert (await ended(p)).state is RunState.COMPLETED
            stats = await p.store.redis.info("commandstats")
            assert stats["cmdstat_waitaof"]["calls"] >= 2, "one for each intent"
    finally:
        await asyncio.to_thread(redis.__exit__, None, None, None)
