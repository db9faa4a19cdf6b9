"""How a run ends, is suspended, and continues."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from openagents_worker.models import RunBudget, RunState, StopReason
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.formats import NEWEST_READ
from openagents_worker.store.scripts import CancelAnswer, ResumeAnswer
from openagents_worker.worker.drain import drain
from tests.runtime import plugins
from tests.runtime.test_replay import executed_until, open_gates, patterned, tool
from tests.support.runner import Process, agent, calls, crash, due, process, scripted
from tests.support.waiting import await_for

SILENT = {"pattern": {"impl": "tests.runtime.plugins.Silent"}}


async def error_code(process: Process, run_id: str = "r1") -> str:
    record = await process.record(run_id)
    assert record.result is not None
    assert record.result.error_details is not None
    return record.result.error_details.code


async def test_a_session_keeps_the_messages_of_its_runs(redis_url: str) -> None:
    """The second run of a session gets the two messages of the first. Each run appends exactly two."""
    llm = scripted({"text": "I am Ada"}, {"text": "unused"})
    async with process(redis_url, agent(llm=llm)) as p:
        await p.run("r1", input_text="who are you?")
        await p.run("r2", input_text="and now?")

        messages = [
            (message["role"], message["content"], message["run_id"]) for message in await p.transcript()
        ]
        assert messages[:2] == [("user", "who are you?", "r1"), ("assistant", "I am Ada", "r1")]
        assert [entry[2] for entry in messages[2:]] == ["r2", "r2"]


async def test_an_exception_of_the_pattern_fails_the_run(redis_url: str) -> None:
    """A bug in a pattern fails its run, with the exception as cause. Nothing is written to the session."""
    async with process(redis_url, patterned("Broken", tool("Charge"))) as p:
        record = await p.run()

        assert record.state is RunState.FAILED
        assert record.result is not None
        assert record.result.stop_reason is StopReason.FAILED
        assert record.result.error_details is not None
        assert record.result.error_details.code == "pattern.error"
        assert record.result.error_details.cause is not None
        assert "a bug" in record.result.error_details.cause.message
        assert await p.transcript() == []
        assert (await p.event_names())[-2:] == ["run.failed", "session.run.completed"]


@pytest.mark.defect("D10")
async def test_a_retryable_error_suspends_the_run_until_it_is_due(redis_url: str) -> None:
    """The run waits in the due list, at least as long as the error requests, and occupies no slot."""
    plugins.FAILURES["0"] = [plugins.rate_limited(300)]
    open_gates(*(f"charge-{n}" for n in range(3)))
    async with process(redis_url, patterned("Steps", tool("Charge"), n=3)) as p:
        await p.submit()
        attempt_result = await p.execute()

        assert (attempt_result.kind, attempt_result.reason) == (AttemptOutcome.SUSPENDED, "tool.rate_limit")
        assert attempt_result.delay_ms is not None
        assert attempt_result.delay_ms >= 300
        assert (await p.record()).state is RunState.RETRYING
        assert (await p.execute()).reason == "not_due"
        await due(p)
        assert (await p.execute()).stop_reason is StopReason.COMPLETED
        names = await p.event_names()
        for name in ("run.retry_scheduled", "run.resume_attempted", "run.resume_succeeded"):
            assert names.count(name) == 1


async def test_the_start_is_a_checkpoint_before_the_first_call_has_ended(redis_url: str) -> None:
    """Checkpoint 0 is stored while the first call executes, or at the end of a run without calls."""
    plugins.FAILURES["0"] = [plugins.rate_limited()]
    async with process(redis_url, patterned("Steps", tool("Charge"), n=1), agent("silent", **SILENT)) as p:
        await p.submit()
        executing = await executed_until(p, lambda: len(plugins.LOG) == 1, "the first call begins")
        await await_for(p.journal, "the start is stored")
        open_gates("charge-0")
        assert (await executing).kind is AttemptOutcome.SUSPENDED
        await due(p)
        await p.execute()

        await p.run("r2", agent_id="silent", session_id="s2")
        for run_id, recorded in (("r1", [("prepare", ""), ("tool", "charge")]), ("r2", [("prepare", "")])):
            assert [(record["kind"], record["name"]) for record in await p.journal(run_id)] == recorded
        attempted = [event for event in await p.events() if event["name"] == "run.resume_attempted"]
        assert [event["payload"]["checkpoint_id"] for event in attempted] == ["r1:step:0"]


async def test_a_run_whose_first_call_fails_has_a_checkpoint(redis_url: str) -> None:
    """The first call fails before anything else was written."""
    plugins.FAILURES["a"] = [plugins.rate_limited()]
    async with process(redis_url, patterned("PlanB", tool("Charge"))) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED

        assert [record["call"] for record in await p.journal()] == ["prepare"]
        assert (await p.event_names()).count("run.checkpoint_saved") == 1


async def test_the_last_error_is_recorded_when_retries_are_used_up(redis_url: str) -> None:
    """After `max_resume_attempts` retries the error is recorded and raised in the pattern, like any other
    outcome.
    """
    plugins.FAILURES["a"] = [plugins.rate_limited() for _ in range(3)]
    async with process(redis_url, patterned("PlanB", tool("Charge"))) as p:
        await p.submit(budget=RunBudget(max_resume_attempts=2))
        for _ in range(2):
            assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
            await due(p)
        assert (await p.execute()).stop_reason is StopReason.COMPLETED

        assert [entry[1] for entry in plugins.LOG if entry[0] == "caught"] == ["ToolRateLimitError"]
        assert (await p.event_names()).count("run.resume_exhausted") == 1


async def test_a_call_that_must_not_repeat_is_not_retried(redis_url: str) -> None:
    """A retryable error of a tool with side effects is raised in the pattern at once:

    they may have happened.
    """
    plugins.FAILURES["a"] = [plugins.rate_limited()]
    charge = {"id": "charge", "impl": "tests.runtime.plugins.OnceOnly"}
    async with process(redis_url, patterned("PlanB", charge)) as p:
        record = await p.run()

        assert record.state is RunState.COMPLETED
        assert plugins.executed("charge") == ["b"]
        assert "run.durable_idempotency_warning" in await p.event_names()


async def test_a_run_that_is_not_durable_is_not_retried(redis_url: str) -> None:
    """Without durability nothing is recorded, and an error does not suspend the run."""
    plugins.FAILURES["a"] = [plugins.rate_limited()]
    async with process(redis_url, patterned("PlanB", tool("Charge"))) as p:
        await p.submit(durable=False)
        assert (await p.execute()).stop_reason is StopReason.COMPLETED

        assert await p.journal() == []
        assert "run.checkpoint_saved" not in await p.event_names()


async def test_cancelling_ends_a_running_call(redis_url: str) -> None:
    """A cancelled run ends as cancelled. Its call in progress is cancelled, and its session is released."""
    async with process(redis_url, patterned("Steps", tool("Charge"), n=3), agent("b")) as p:
        await p.submit("r1")
        await p.submit("r2", agent_id="b")
        executing = await executed_until(p, lambda: len(plugins.LOG) == 1, "the first call begins")
        answer = await p.store.run(scripts.cancel(run_id="r1", reason="changed my mind", force=False))
        assert answer.answer is CancelAnswer.REQUESTED
        p.runner.latch("r1", LatchReason.CANCELLED)

        assert (await executing).stop_reason is StopReason.CANCELLED
        assert plugins.executed("charge") == []
        assert [wake.run_id for wake in p.wakes] == ["r2"]
        assert (await p.execute("r2")).stop_reason is StopReason.COMPLETED
        assert (await p.event_names())[-2:] == ["run.cancelled", "session.run.completed"]


async def test_a_pattern_that_swallows_its_cancellation_is_cancelled(redis_url: str) -> None:
    """The latch decides, not the pattern. The call that it makes afterwards does not begin."""
    async with process(redis_url, patterned("Deaf", tool("Charge"))) as p:
        await p.submit()
        executing = await executed_until(p, lambda: ("waiting",) in plugins.LOG, "the pattern waits")
        p.runner.latch("r1", LatchReason.CANCELLED)

        assert (await executing).stop_reason is StopReason.CANCELLED
        assert ("swallowed",) in plugins.LOG
        assert plugins.executed("charge") == []


async def test_a_handover_waits_for_the_call_in_progress(redis_url: str) -> None:
    """A worker that stops hands its run over after the call in progress, so that no call is made twice."""
    definition = patterned("Steps", tool("Charge"), n=3)
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        executing = await executed_until(one, lambda: len(plugins.LOG) == 1, "the first call begins")
        one.runner.accepting = False
        stopping = asyncio.create_task(one.runner.latch_all(LatchReason.HANDOVER))
        open_gates("charge-0", "charge-1", "charge-2")

        assert (await executing).reason == "handover"
        await stopping
        assert [wake.run_id for wake in one.wakes] == ["r1"]
        assert (await two.execute()).stop_reason is StopReason.COMPLETED
        assert [entry[2] for entry in plugins.LOG if entry[0] == "begin"] == [0, 1, 2]
        assert (await two.record()).recoveries == 0


async def test_a_handover_cancels_a_call_that_takes_too_long(redis_url: str) -> None:
    """A worker without time left cancels the call. It is made once more, and no recovery is counted."""
    definition = patterned("Steps", tool("Charge"), n=3)
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        executing = await executed_until(one, lambda: len(plugins.LOG) == 1, "the first call begins")
        one.runner.accepting = False
        stopping = asyncio.create_task(one.runner.latch_all(LatchReason.HANDOVER))
        await asyncio.sleep(0)
        assert not stopping.done()

        await one.runner.hurry_all()

        assert (await executing).reason == "handover"
        await stopping
        open_gates("charge-0", "charge-1", "charge-2")
        assert (await two.execute()).stop_reason is StopReason.COMPLETED
        assert [entry[2] for entry in plugins.LOG if entry[0] == "begin"] == [0, 0, 1, 2]
        record = await two.record()
        assert (record.recoveries, record.attempt) == (0, 2)
        assert "run.handed_over" in await two.event_names()


async def test_a_worker_that_stops_releases_claimed_runs(redis_url: str) -> None:
    """A run that is claimed after the stop is released at once, with a wake-up for other workers."""
    async with process(redis_url, agent()) as p:
        await p.submit()
        p.runner.accepting = False

        assert (await p.execute()).reason == "handover"
        assert [wake.run_id for wake in p.wakes] == ["r1"]
        assert (await p.record()).state is RunState.QUEUED


@pytest.mark.parametrize("how", ["the worker stops", "the lease ends"])
async def test_a_worker_that_stops_while_a_run_is_prepared_does_not_begin_it(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Here it stops while it reads the definition of the agent that the run has kept."""
    async with process(redis_url, patterned("Silent")) as p:
        keeper = p.runner._services.assembly.keeper
        of_run, reads, read = keeper.of_run, asyncio.Event(), asyncio.Event()

        async def slow(*args: Any, **more: Any) -> Any:
            reads.set()
            await read.wait()
            return await of_run(*args, **more)

        monkeypatch.setattr(keeper, "of_run", slow)
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await reads.wait()
        if how == "the worker stops":
            assert await drain(p.runner, load_settings({"OPENAGENTS_REDIS_URL": redis_url}).time_limits)
        else:
            p.lease.left_s = 0.0
            await p.runner.latch_all(LatchReason.FENCED)
        read.set()
        assert (await executing).reason in ("handover", "given_back")
        assert (await p.record()).state is RunState.QUEUED
        assert "context.created" not in await p.event_names()


async def test_the_duration_limit_also_ends_a_call(redis_url: str) -> None:
    """`max_duration_ms` ends a run in the middle of a call, not after it."""
    async with process(redis_url, patterned("Endless", tool("Charge"))) as p:
        await p.submit(budget=RunBudget(max_duration_ms=100))
        attempt_result = await p.execute()

        assert attempt_result.stop_reason is StopReason.BUDGET_EXHAUSTED
        assert await error_code(p) == "execution.budget_exhausted"


async def test_a_pattern_cannot_catch_an_exhausted_budget(redis_url: str) -> None:
    """A pattern that catches the error of an exhausted budget fails with this error nevertheless."""
    plugins.FAILURES["a"] = [plugins.refused()]
    async with process(redis_url, patterned("PlanB", tool("Charge"))) as p:
        await p.submit(budget=RunBudget(max_tool_calls=1))
        assert (await p.execute()).stop_reason is StopReason.MAX_STEPS
        assert plugins.executed("charge") == []


async def test_a_cost_limit_stops_the_next_model_call(redis_url: str) -> None:
    """Once the cost budget is exhausted, no model call is made."""
    llm = scripted(
        *[
            {
                **calls(("calc", {"expression": "1+1"})),
                "usage": {"input_tokens": 1_000_000, "output_tokens": 0},
            }
        ]
        * 5
    )
    llm["pricing"] = {"input": 1.0, "output": 1.0}
    definition = agent(llm=llm, tools=[{"id": "calc", "type": "calc"}])
    async with process(redis_url, definition) as p:
        await p.submit(budget=RunBudget(max_cost_usd=1.5))
        assert (await p.execute()).stop_reason is StopReason.BUDGET_EXHAUSTED
        assert (await p.record()).usage.llm_calls == 2
        assert (await p.record()).usage.cost_usd == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("asked", "made"), [(None, 2), (RunBudget(max_tool_calls=1), 1), (RunBudget(max_tool_calls=9), 2)]
)
async def test_no_run_exceeds_the_limits_of_its_agent(
    redis_url: str, asked: RunBudget | None, made: int
) -> None:
    """The limits of the agents file hold for every run. A request can lower them, not raise them."""
    definition = agent(
        llm=scripted(*[calls(("calc", {"expression": "1+1"}))] * 5),
        tools=[{"id": "calc", "type": "calc"}],
        limits={"max_tool_calls": 2, "max_steps": 4},
    )
    async with process(redis_url, definition) as p:
        await p.submit(budget=asked)
        assert (await p.execute()).stop_reason is StopReason.MAX_STEPS
        assert (await p.record()).usage.tool_calls == made


async def test_the_step_limit_of_an_agent_overrides_that_of_its_pattern(redis_url: str) -> None:
    """The limits of the agent protect its operator from the config of a pattern."""
    definition = agent(
        llm=scripted(*[calls(("calc", {"expression": "1+1"}))] * 9),
        tools=[{"id": "calc", "type": "calc"}],
        limits={"max_steps": 3},
    )
    async with process(redis_url, definition) as p:
        await p.submit()
        assert (await p.execute()).stop_reason is StopReason.MAX_STEPS
        assert (await p.record()).usage.llm_calls == 3


async def test_an_outcome_that_is_too_large_is_recorded_as_an_error(redis_url: str) -> None:
    """A result over the limit is recorded as step.too_large. The tool is not called again."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_PAYLOAD_BYTES": "100000"})
    async with process(redis_url, patterned("Huge", tool("Charge")), settings=settings) as p:
        await p.run()
        assert await error_code(p) == "step.too_large"
        assert len(plugins.executed("charge")) == 1


async def test_an_external_memory_is_called_once(redis_url: str) -> None:
    """The view of an external memory is recorded, and its write-back is made once."""
    plugins.Diary.asked, plugins.Diary.kept = 0, []
    definition = {
        **patterned("Steps", tool("Charge"), n=2),
        "memory": {"impl": "tests.runtime.plugins.Diary"},
    }
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        open_gates("charge-0")
        dying = await executed_until(one, lambda: len(plugins.LOG) == 3, "the second call begins")
        await crash(one, "r1", dying)
        open_gates("charge-1")
        await two.execute()

        assert (plugins.Diary.asked, plugins.Diary.kept) == (1, [2])
        assert await two.store.redis.hget(two.store.keys("session_state", "s1"), "pages") == "1"


async def test_calls_inside_a_call_are_recorded(redis_url: str) -> None:
    """If a tool that calls the model dies afterwards, the reply inside is replayed and not paid for again."""
    llm = scripted({"text": "inner"}, {"text": "outer"})
    definition = patterned("Outer", tool("Inward"), tool("Charge")) | {"llm": llm}
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit()
        dying = await executed_until(
            one, lambda: ("begin", "inward", "one") in plugins.LOG, "the tool begins"
        )

        async def asked() -> bool:
            return (await one.record()).usage.llm_calls == 1

        await await_for(asked, "the model has replied inside")
        await crash(one, "r1", dying)
        open_gates("inward")
        second = await executed_until(
            two, lambda: any(e[2] == "last" for e in plugins.LOG), "the last call begins"
        )
        assert (await two.record()).usage.llm_calls == 2
        second.cancel()
        await asyncio.wait([second])


async def test_an_unknown_agent_fails_the_run_with_a_suggestion(redis_url: str) -> None:
    """A run submitted before any worker started fails with user.agent_not_found and the most similar name."""
    async with process(redis_url, agent("assistant")) as p:
        await p.store.redis.delete(p.store.keys("agents"))
        await p.submit(agent_id="asistant")
        await p.execute()

        record = await p.record()
        assert record.result is not None
        assert record.result.error_details is not None
        assert record.result.error_details.code == "user.agent_not_found"
        assert "assistant" in str(record.result.error_details.hint)


async def test_a_run_waits_for_workers_that_know_its_agent(redis_url: str) -> None:
    """In a rolling deployment an old worker does not fail the run. It suspends it for the new workers."""
    async with process(redis_url, agent("old")) as old, process(redis_url, agent("old"), agent("new")) as new:
        await new.submit(agent_id="new")
        attempt_result = await old.execute()
        assert (attempt_result.kind, attempt_result.reason) == (
            AttemptOutcome.SUSPENDED,
            "user.agent_not_found",
        )


async def test_a_journal_of_another_format_is_left_to_others(redis_url: str) -> None:
    """If a record has a format that the run record does not name, the run is suspended, not failed."""
    open_gates("charge-0", "charge-1")
    definition = patterned("Steps", tool("Charge"), n=3)
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as p:
        await p.submit()
        begun = ("begin", "charge", 2)
        dying = await executed_until(one, lambda: any(e[:3] == begun for e in plugins.LOG), "the last begins")
        await crash(one, "r1", dying)
        key = p.store.keys("journal", "r1")
        entry = json.loads(await p.store.redis.lindex(key, -1))
        await p.store.redis.lset(key, -1, json.dumps({**entry, "v": NEWEST_READ + 1}))

        attempt_result = await p.execute()

        assert (attempt_result.kind, attempt_result.reason) == (AttemptOutcome.SUSPENDED, "run.other_format")
        assert (await p.record()).state is RunState.RETRYING


async def test_a_failed_run_continues_in_another_life(redis_url: str) -> None:
    """Resuming a failed run keeps its finished calls and repeats the call that failed it."""
    plugins.FAILURES["1"] = [plugins.refused()]
    open_gates("charge-0", "charge-1", "charge-2")
    async with process(redis_url, patterned("Steps", tool("Charge"), n=3)) as p:
        assert (await p.run()).state is RunState.FAILED
        resumed = await p.store.run(
            scripts.resume(run_id="r1", agent_id="a", session_id="s1", input_text="", checkpoint_id="")
        )
        assert resumed.answer is ResumeAnswer.OK

        assert (await p.execute()).stop_reason is StopReason.COMPLETED
        record = await p.record()
        assert record.life == 2
        assert plugins.executed("charge") == [0, 1, 2]
        names = await p.event_names()
        assert names.count("run.failed") == names.count("run.completed") == names.count("run.resumed") == 1
        assert names.count("session.run.completed") == 2


@pytest.mark.parametrize("part", ["logging", "diagnostics"])
async def test_secret_fields_of_the_agents_file_are_in_no_event(redis_url: str, part: str) -> None:
    """They are masked in the events of calls, of the pattern and of the end.

    The result itself is unchanged.
    """
    file = {part: {"redact_keys": ["iban"]}}
    async with process(redis_url, patterned("Discreet", tool("Charge")), **file) as p:
        record = await p.run()

        payloads = {event["name"]: event["payload"] for event in await p.events()}
        assert payloads["tool.called"]["params"] == {"who": {"customerIBAN": "***"}}
        assert payloads["tool.succeeded"]["result"] == {"charged": {"customerIBAN": "***"}}
        assert payloads["app.charged"]["iban"] == "***"
        assert payloads["run.completed"]["result"] == {"iban": "***"}
        assert "DE02" not in json.dumps(await p.events())
        assert record.result is not None
        assert record.result.final_output == {"iban": "DE02"}


async def test_fields_of_custom_errors_are_redacted(redis_url: str) -> None:
    """They are masked in the event of the call and in the terminal event of the run."""
    plugins.FAILURES["before"] = [plugins.BadAccount("no such account", "charge")]
    async with process(
        redis_url, patterned("Broken", tool("Charge")), diagnostics={"redact_keys": ["iban"]}
    ) as p:
        await p.run()

        payloads = {event["name"]: event["payload"] for event in await p.events()}
        assert payloads["tool.failed"]["error_details"]["context"]["iban"] == "***"
        assert payloads["run.failed"]["error_details"]["context"]["iban"] == "***"


async def test_the_agents_file_limits_the_time_of_a_tool(redis_url: str) -> None:
    """Its limit overrides that of the tool. After the last try the error is raised in the pattern."""
    waits = {**tool("Charge"), "timeout_ms": 30}
    asks = calls(("charge", {"who": "alice", "gate": "never-opened"}))
    definition = agent(llm=scripted(asks, {"text": "later, then"}), tools=[waits])
    async with process(redis_url, definition) as p:
        await p.submit(budget=RunBudget(max_resume_attempts=0))
        assert (await p.execute()).stop_reason is StopReason.COMPLETED
        [failed] = [event["payload"] for event in await p.events() if event["name"] == "tool.failed"]

    assert failed["error_details"]["code"] == "tool.timeout"
    assert "30ms" in failed["error"]


async def test_a_worker_that_is_not_registered_claims_no_run(redis_url: str) -> None:
    """The message waits for the registration. Until then, no command is sent to Redis."""
    async with process(redis_url) as p:
        await p.submit()
        p.lease.left_s = 0.0
        asked = (await p.store.redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
        executing = asyncio.create_task(p.execute())
        await asyncio.sleep(0.12)
        assert (await p.store.redis.info("commandstats"))["cmdstat_evalsha"]["calls"] == asked
        assert (await p.record()).state is RunState.QUEUED

        p.lease.left_s = 60.0

        assert (await executing).stop_reason is StopReason.COMPLETED
