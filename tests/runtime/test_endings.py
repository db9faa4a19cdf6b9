"""Every attempt ends with an ending that can be written, whatever its run contains."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from openagents_worker.errors import AgentUnavailable, error_classes
from openagents_worker.models import RunRecord, RunState, StopReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.scripts import ReleaseKind
from openagents_worker.store.sessions import aread_session
from tests.runtime import plugins, unstorable
from tests.runtime.test_replay import executed_until, open_gates, patterned, tool
from tests.support.runner import Process, agent, due, process

HERE = "tests.runtime.unstorable"
OUTCOMES = list(unstorable.VALUES)
UNSTORABLE = [what for what in OUTCOMES if what not in unstorable.REPLACED]


def code_of(what: str) -> str:
    """The code of the error that says why a value cannot be stored."""
    return "step.too_deep" if what in unstorable.TOO_DEEP else "step.too_large"


PLACES = ("output", "artifact", "state")


def acting(pattern: str, tool: str | None = None, *, given: Any = None, **config: Any) -> dict[str, Any]:
    """An agent with this pattern and optionally this tool, both with the config."""
    tools = [{"id": "tool", "impl": f"{HERE}.{tool}", "config": config}] if tool else []
    return agent(pattern={"impl": f"{HERE}.{pattern}", "config": config}, tools=tools, **(given or {}))


def error_of(record: RunRecord) -> tuple[str, str]:
    """Code and message of the error that ended the run."""
    assert record.result is not None
    assert record.result.error_details is not None
    return record.result.error_details.code, record.result.error_details.message


async def ended(p: Process, **fields: Any) -> RunRecord:
    """The record of a run that must end in its first attempt, with its session released."""
    record = await p.run(**fields)
    assert record.state.is_terminal, record
    assert (record.attempt, record.recoveries) == (1, 0)
    assert await p.store.redis.hget(p.store.keys("session", "s1"), "holder") is None
    names = await p.event_names()
    assert names[-2:] == [f"run.{record.state}", "session.run.completed"]
    return record


# --- what a run leaves -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "where", "named"),
    [
        (what, where, named)
        for (where, named), what in itertools.product(
            (("output", "output"), ("artifact", "artifact 'plan'"), ("state", "state key 'plan'")), UNSTORABLE
        )
        if (what, where) != ("a model that cannot be serialised", "output")
    ],
)
async def test_an_end_that_cannot_be_stored_is_replaced_by_one_that_can(
    redis_url: str, what: str, where: str, named: str
) -> None:
    """The run fails. Its error says which part could not be stored."""
    async with process(redis_url, acting("Leaves", what=what, where=where)) as p:
        code, message = error_of(await ended(p))

    assert code == code_of(what)
    assert named in message


@pytest.mark.parametrize("what", list(unstorable.REPLACED))
@pytest.mark.defect("S10")
async def test_values_that_json_cannot_represent_are_replaced(redis_url: str, what: str) -> None:
    """A lone surrogate, NaN or a very long integer does not fail a run. Every reader can read the result."""
    stored = unstorable.REPLACED[what]
    async with process(
        redis_url, *(acting("Leaves", what=what, where=w, given={"agent_id": w}) for w in PLACES)
    ) as p:
        for where in PLACES:
            record = await p.run(where, agent_id=where, session_id=where)
            assert record.state is RunState.COMPLETED, where
            assert record.result is not None
            session = await aread_session(p.store, where)
            found = {
                "output": record.result.final_output,
                "artifact": [one.payload for one in record.result.artifacts],
                "state": dict(session.state).get("plan"),
            }
            assert found[where] == ([stored] if where == "artifact" else stored)


async def test_a_model_whose_serializer_fails_is_an_error_of_the_pattern(redis_url: str) -> None:
    """It is user code. The error names the exception."""
    async with process(
        redis_url, acting("Leaves", what="a model that cannot be serialised", where="output")
    ) as p:
        code, message = error_of(await ended(p))

    assert code == "pattern.error"
    assert "PydanticSerializationError" in message or "KeyError" in message


@pytest.mark.parametrize("where", ["no artifact", "all artifacts", "all state"])
@pytest.mark.parametrize("what", OUTCOMES)
async def test_a_run_ends_after_its_pattern_replaced_parts_of_the_context(
    redis_url: str, what: str, where: str
) -> None:
    """A pattern can assign any object to the attributes of its context."""
    is_a_state = (what, where) == ("half a character", "all state")  # with a key and a value
    async with process(redis_url, acting("Leaves", what=what, where=where)) as p:
        assert (await ended(p)).state is (RunState.COMPLETED if is_a_state else RunState.FAILED)


@pytest.mark.parametrize("what", OUTCOMES)
async def test_an_event_can_contain_any_value(redis_url: str, what: str) -> None:
    """Event payloads are for people: a value that is not JSON is shown as text."""
    async with process(redis_url, acting("Leaves", what=what, where="event")) as p:
        assert (await ended(p)).state is RunState.COMPLETED
        assert "app.looked" in await p.event_names()


async def test_an_event_may_have_any_name(redis_url: str) -> None:
    """A name that is not text, or has a lone surrogate, is shown as far as possible."""
    async with process(redis_url, acting("Names")) as p:
        assert (await ended(p)).state is RunState.COMPLETED
        assert "\ufffd" in await p.event_names()


async def test_a_failed_run_keeps_its_error_and_what_can_be_stored(redis_url: str) -> None:
    """Its error matters more than an artifact that cannot be stored. The result names the missing parts."""
    async with process(
        redis_url, acting("Leaves", what="a foreign object", where="artifact, then an error")
    ) as p:
        record = await ended(p)

    assert error_of(record)[0] == "pattern.error"
    assert record.result is not None
    assert [artifact.name for artifact in record.result.artifacts] == ["good"]
    assert "artifact 'plan'" in str(record.result.metadata["not_stored"])


async def test_a_run_whose_end_redis_refuses_ends(redis_url: str) -> None:
    """Another program has overwritten the transcript of the session. The run fails and names the key."""
    async with process(redis_url, patterned("Steps", tool("Charge"), n=1)) as p:
        await p.submit()
        executing = await executed_until(p, lambda: len(plugins.LOG) == 1, "the call begins")
        await p.store.redis.set(p.store.keys("transcript", "s1"), "not a list", ex=60)
        open_gates("charge-0")
        await executing
        await p.execute()
        code, message = error_of(await p.record())

    assert code == "redis.wrong_type"
    assert "transcript" in message
    assert plugins.executed("charge") == [0]


async def test_an_end_that_is_too_large_as_a_whole_names_its_largest_part(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis serves no other client while it stores an ending."""
    monkeypatch.setattr("openagents_worker.runtime.ending.LARGEST_ENDING_BYTES", 1_000)
    monkeypatch.setitem(unstorable.VALUES, "large", lambda: "x" * 900)
    async with process(redis_url, acting("Leaves", what="large", where="state")) as p:
        assert (await ended(p)).state is RunState.COMPLETED
    monkeypatch.setitem(unstorable.VALUES, "large", lambda: "x" * 1_100)
    async with process(redis_url, acting("Leaves", what="large", where="state")) as p:
        record = await p.run("r2", session_id="s2")

    assert error_of(record)[0] == "step.too_large"
    assert "the largest part is state key 'plan'" in error_of(record)[1]


@pytest.mark.parametrize("what", list(unstorable.ERRORS))
@pytest.mark.parametrize("by", ["pattern", "tool"])
async def test_an_error_that_cannot_be_stored_is_described(redis_url: str, what: str, by: str) -> None:
    """Its type is named, with the part of its text that can be stored."""
    definition = (
        acting("Raises", what=what) if by == "pattern" else acting("CallsTool", "ToolRaises", what=what)
    )
    async with process(redis_url, definition) as p:
        code, message = error_of(await ended(p))

    assert code in {"pattern.error", "tool.error", "step.too_large", "shop.unfinished"}
    assert message
    assert len(message) <= 10_000


# --- what a tool gives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["result", "artifact", "add_artifact", "state"])
@pytest.mark.parametrize("what", UNSTORABLE)
async def test_the_result_of_a_tool_is_checked_in_its_call(redis_url: str, what: str, where: str) -> None:
    """A result that cannot be stored is a recorded error of the call. The run continues."""
    async with process(redis_url, acting("UsesTool", "GivesBack", what=what, where=where)) as p:
        record = await ended(p)
        names = await p.event_names()

    assert record.result is not None
    assert record.state is RunState.COMPLETED
    code = record.result.final_output["code"]
    assert code == code_of(what) or (code == "tool.error" and what not in unstorable.TOO_DEEP)
    assert "tool.failed" in names
    assert "tool.succeeded" not in names
    if where in ("artifact", "state"):
        assert "plan" in record.result.final_output["message"]


@pytest.mark.parametrize("where", ["result", "artifact", "add_artifact", "state"])
@pytest.mark.parametrize("what", list(unstorable.REPLACED))
async def test_the_pattern_gets_the_stored_result_of_a_tool(redis_url: str, what: str, where: str) -> None:
    """Values are replaced before they reach the pattern, so that it sees the same after a crash."""
    stored = unstorable.REPLACED[what]
    async with process(redis_url, acting("UsesTool", "GivesBack", what=what, where=where)) as p:
        record = await ended(p)
        [call] = [one for one in await p.journal() if one["kind"] == "tool"]
        session = await aread_session(p.store, "s1")

    assert record.result is not None
    assert record.state is RunState.COMPLETED
    assert record.result.final_output == {"got": call["outcome"]["ok"]}
    assert call["outcome"]["ok"] == (stored if where == "result" else "done")
    if where in ("artifact", "add_artifact"):
        assert [one.payload for one in session.artifacts] == [stored]
    if where == "state":
        assert session.state["plan"] == stored


# --- what a memory gives ----------------------------------------------------------------------------------

STEPS = {"view": "inject", "state": "inject", "writeback": "writeback"}
"""The step of the memory that puts a value at this place."""
SUCCEEDED = {"inject": "memory.injected", "writeback": "memory.writeback_succeeded"}


def remembering(what: str, where: str, on_error: str) -> dict[str, Any]:
    """An agent with a memory that puts this value there."""
    memory = {"impl": f"{HERE}.Views", "config": {"what": what, "where": where}, "on_error": on_error}
    return agent(on_error, memory=memory, pattern={"impl": "tests.runtime.plugins.Silent"})


@pytest.mark.parametrize("where", STEPS)
@pytest.mark.parametrize("what", [*UNSTORABLE, "large"])
async def test_a_memory_that_gives_what_cannot_be_stored_has_failed(
    redis_url: str, what: str, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An event and a line of the log say so; `on_error` decides whether the run fails."""
    monkeypatch.setitem(unstorable.VALUES, "large", lambda: "x" * 2_000_000)
    failed, succeeded = f"memory.{STEPS[where]}_failed", SUCCEEDED[STEPS[where]]
    rules = ("continue", "fail")
    async with process(redis_url, *(remembering(what, where, rule) for rule in rules)) as p:
        records = [await p.run(rule, agent_id=rule, session_id=rule) for rule in rules]
        names = {rule: await p.event_names(rule) for rule in rules}
        sessions = [await aread_session(p.store, rule) for rule in rules]

    assert [record.state for record in records] == [RunState.COMPLETED, RunState.FAILED]
    assert error_of(records[1])[0] == code_of(what)
    for rule in rules:
        assert names[rule].count(failed) == 1
        assert succeeded not in names[rule]
    assert caplog.text.count(failed) == len(rules)
    assert not any("plan" in session.state for session in sessions)


@pytest.mark.parametrize("where", STEPS)
@pytest.mark.parametrize("what", list(unstorable.REPLACED))
async def test_values_of_a_memory_that_json_cannot_represent_are_replaced(
    redis_url: str, what: str, where: str
) -> None:
    """That is no failure of the memory."""
    async with process(redis_url, remembering(what, where, "fail")) as p:
        record = await p.run(agent_id="fail")
        names = await p.event_names()
        session = await aread_session(p.store, "s1")
        [stored] = [one for one in await p.journal() if one["name"] == STEPS[where]]

    assert record.state is RunState.COMPLETED
    assert names.count(SUCCEEDED[STEPS[where]]) == 1
    assert f"memory.{STEPS[where]}_failed" not in names
    if where == "view":
        assert stored["outcome"]["ok"] == {"plan": unstorable.REPLACED[what]}
    else:
        assert session.state["plan"] == unstorable.REPLACED[what]


# --- errors of the library, raised by plugins ------------------------------------------------------------

CODES = sorted({cls.code for cls in error_classes() if cls.__module__ == "openagents_worker.errors"})
CODES = [code for code in CODES if code != "openagents.recorded"]


@pytest.mark.parametrize("code", CODES)
async def test_a_library_error_raised_by_a_pattern_fails_the_run(redis_url: str, code: str) -> None:
    """For example, an AgentNotFoundError of a pattern does not mean that this worker is too old."""
    async with process(redis_url, acting("PatternSays", code=code)) as p:
        record = await ended(p)

    assert error_of(record)[0] == code
    assert record.state is (RunState.CANCELLED if code == "run.cancelled" else RunState.FAILED)


@pytest.mark.parametrize("code", CODES)
async def test_a_library_error_raised_by_a_tool_is_the_outcome_of_its_call(redis_url: str, code: str) -> None:
    """It is recorded, after the retries that its class allows, and raised in the pattern."""
    cls = next(cls for cls in error_classes() if cls.code == code)
    async with process(redis_url, acting("CallsTool", "ToolSays", code=code)) as p:
        await p.submit(budget={"max_resume_attempts": 1})
        attempt_result = await p.execute()
        if cls.retryable:
            assert (attempt_result.kind, attempt_result.reason) == (AttemptOutcome.SUSPENDED, code)
            await due(p)
            await p.execute()
        record = await p.record()

    assert record.state.is_terminal
    assert error_of(record)[0] == code


@pytest.mark.share(of=2)
@pytest.mark.parametrize("on_error", ["fail", "continue"])
@pytest.mark.parametrize("step", ["inject", "writeback"])
async def test_a_library_error_raised_by_a_memory_follows_on_error(
    redis_url: str, step: str, on_error: str
) -> None:
    """`on_error: fail` fails the run with it; `continue` continues without the memory."""

    def remembering(code: str) -> dict[str, Any]:
        config = {"step": step, "code": code}
        return agent(code, memory={"impl": f"{HERE}.MemorySays", "config": config, "on_error": on_error})

    async with process(redis_url, *map(remembering, CODES)) as p:
        for code in CODES:
            record = await p.run(code, agent_id=code, session_id=code)
            if on_error == "continue":
                assert record.state is RunState.COMPLETED, code
            else:
                assert error_of(record)[0] == code


# --- every way of giving a run back ----------------------------------------------------------------------


async def poisoned_after(p: Process, attempts: int) -> RunRecord:
    """The record of a run that was released `attempts` times after its claim."""
    for _ in range(attempts):
        assert not (await p.record()).state.is_terminal
        await p.execute()
    return await p.record()


async def test_a_run_whose_attempts_always_crash_is_poisoned(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug of the library is logged with its traceback. The run is released, and the release is counted."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_RECOVERIES": "2"})

    async def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr("openagents_worker.runtime.attempt.Attempt.execute", broken)
    async with process(redis_url, settings=settings) as p:
        await p.submit()
        record = await poisoned_after(p, 3)

    assert error_of(record)[0] == "run.poisoned"
    assert record.recoveries == 3
    assert "run.internal_error" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_handovers_are_not_counted_against_the_run(redis_url: str) -> None:
    """A handover is shown in the record, but is not a recovery."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_RECOVERIES": "1"})
    async with process(redis_url, settings=settings) as p:
        await p.submit()
        p.runner.accepting = False
        for _ in range(4):
            assert (await p.execute()).reason == "handover"
        p.runner.accepting = True

        assert (await p.event_names()).count("run.handed_over") == 4
        assert (await p.execute()).stop_reason is StopReason.COMPLETED
        assert (await p.record()).recoveries == 0


async def test_a_release_of_a_run_that_is_not_executed_is_counted(redis_url: str) -> None:
    """The heartbeat releases it. A run that is not durable is lost the first time."""
    async with process(redis_url) as p:
        for run_id, durable, times in (("r1", True, 3), ("r2", False, 1)):
            await p.submit(run_id, session_id=run_id, durable=durable)
            for _ in range(times):
                await release(p, run_id, ReleaseKind.LOST, max_recoveries=2)

        assert error_of(await p.record("r1"))[0] == "run.poisoned"
        assert error_of(await p.record("r2"))[0] == "worker.lost"


async def release(p: Process, run_id: str, kind: ReleaseKind, *, max_recoveries: int) -> None:
    claimed = await p.store.run(
        scripts.claim(
            run_id=run_id, incarnation=p.lease.incarnation, nonce="n", page_bytes=scripts.PAGE_BYTES
        )
    )
    await p.store.run(
        scripts.release(
            run_id=run_id,
            incarnation=p.lease.incarnation,
            fence=claimed.fence,
            kind=kind,
            max_recoveries=max_recoveries,
        )
    )


async def test_a_run_that_is_left_to_others_for_too_long_fails(redis_url: str) -> None:
    """A worker announced its agent once, and no worker with this agent comes."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_LEFT_TO_OTHERS_MAX_S": "3600"})
    async with process(redis_url, agent("gone"), name="gone") as gone:
        await gone.submit(agent_id="gone")
    async with process(redis_url, agent("old"), settings=settings) as p:
        delays = []
        for _ in range(6):
            attempt_result = await p.execute()
            assert (attempt_result.kind, attempt_result.reason) == (
                AttemptOutcome.SUSPENDED,
                "user.agent_not_found",
            )
            assert attempt_result.delay_ms is not None
            delays.append(attempt_result.delay_ms)
            await due(p)
        assert await p.store.redis.hget(p.store.keys("run", "r1"), "retries") in (None, "0")
        assert (await p.event_names()).count("run.left_to_others") == 1
        for n, delay_ms in enumerate(delays):
            least_ms = min(5_000 * 2**n, 60_000)
            assert least_ms <= delay_ms <= min(least_ms * 1.25, 60_000)
        await p.store.redis.hset(p.store.keys("run", "r1"), "left_since", 1)

        attempt_result = await p.execute()

        assert attempt_result.kind is AttemptOutcome.FINISHED
        code, message = error_of(await p.record())
        assert code == AgentUnavailable.code
        assert "gone" in message

    async with process(redis_url, agent("gone"), name="mended") as mended:
        resumed = await mended.store.run(
            scripts.resume(
                run_id="r1",
                agent_id="gone",
                session_id="s1",
                input_text="",
                checkpoint_id="",
                canvas="",
                by="",
            )
        )
        attempt_result = await mended.execute()
        assert (resumed.answer, attempt_result.kind) == ("OK", AttemptOutcome.FINISHED)
        assert (await mended.record()).state is RunState.COMPLETED


async def test_a_journal_that_no_worker_can_read_for_too_long_fails_the_run(redis_url: str) -> None:
    """A format that only another version reads is treated like an agent that only other workers have."""
    async with process(redis_url) as p:
        await p.submit()
        await p.store.redis.hset(p.store.keys("run", "r1"), mapping={"format": 99})
        assert (await p.execute()).reason == "other_format"
        await due(p)
        await p.store.redis.hset(p.store.keys("run", "r1"), "left_since", 1)

        assert (await p.execute()).kind is AttemptOutcome.FINISHED

        await p.store.redis.hset(p.store.keys("run", "r1"), mapping={"format": 1})
        assert error_of(await p.record())[0] == AgentUnavailable.code


async def test_retries_are_bounded(redis_url: str) -> None:
    """After `max_resume_attempts` retries the run fails with the last error."""
    async with process(redis_url, acting("CallsTool", "ToolSays", code="tool.unavailable")) as p:
        await p.submit(budget={"max_resume_attempts": 2})
        for _ in range(2):
            assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
            await due(p)

        assert (await p.execute()).kind is AttemptOutcome.FINISHED
        assert error_of(await p.record())[0] == "tool.unavailable"
