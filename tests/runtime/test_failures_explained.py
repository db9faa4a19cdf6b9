"""A failed run explains itself: one log line, the traceback of the user's code everywhere, and no secret."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from openagents_worker.errors import RunFailed
from openagents_worker.llm import providers
from openagents_worker.models import MAX_MESSAGE_CHARS, RunRecord, RunState
from openagents_worker.producer.run_results import result_or_error
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.settings import load_settings
from openagents_worker.telemetry import logs as telemetry
from openagents_worker.telemetry.line_groups import LineGroups
from openagents_worker.tracebacks import MAX_TRACEBACK_BYTES
from tests.runtime import failing
from tests.runtime.failing import SECRET
from tests.runtime.test_replay import executed_until
from tests.support.runner import Process, agent, calls, crash, process, scripted
from tests.support.waiting import await_for

HERE = "tests.runtime.failing"
FRAME = "failing.py"


def pricing(tool: str = "price", **fields: Any) -> dict[str, Any]:
    """An agent whose pattern calls one of the failing tools."""
    given = {"pattern": {"impl": f"{HERE}.CallsAndRaises", "config": {"tool": tool}}, **fields}
    return agent(tools=[{"id": tool, "impl": f"{HERE}.{tool}"}], **given)


def react(*replies: dict[str, Any], tool: str = "price") -> dict[str, Any]:
    return agent(tools=[{"id": tool, "impl": f"{HERE}.{tool}"}], llm=scripted(*replies))


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[logging.LogRecord]:
    """The log lines of this level, without those about a blocked loop, which a busy machine causes."""
    found = [record for record in caplog.records if record.levelno == level]
    return [record for record in found if not record.getMessage().startswith("loop.blocked")]


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return {"event": record.getMessage().split()[0], **record.__dict__["openagents_fields"]}


def raised_in(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if record.exc_info else None


async def failed_tool_event(p: Process) -> dict[str, Any]:
    return next(event["payload"] for event in await p.events() if event["name"] == "tool.failed")


def traceback_of(record: RunRecord) -> str:
    assert record.result is not None
    assert record.result.error_details is not None
    text = record.result.error_details.traceback
    assert text is not None
    return text


@pytest.mark.parametrize("tool", ["price", "price_in_thread", "price_in_process"])
async def test_a_failed_run_is_one_error_line_with_the_users_traceback(
    redis_url: str, caplog: pytest.LogCaptureFixture, tool: str
) -> None:
    """It has run, agent, session, code, message and attempts. The exception is the user's own."""
    async with process(redis_url, pricing(tool)) as p:
        record = await p.run()

    (line,) = lines(caplog, logging.ERROR)
    assert fields_of(line) == {
        "event": "run.failed", "run_id": "r1", "agent_id": "a", "session_id": "s1", "stop_reason": "failed",
        "attempts": 1, "code": "tool.error", "message": "ValueError: no price at redis://:***@shop/0",
    }  # fmt: skip
    assert type(raised_in(line)) is ValueError
    assert record.state is RunState.FAILED
    assert "in price_of" in traceback_of(record)


@pytest.mark.share(of=2)
@pytest.mark.parametrize(
    "tool", ["price", "price_in_thread", "price_in_process", "odd_in_process", "refuses", "large"]
)
async def test_the_traceback_is_stored_and_shown_wherever_people_look(redis_url: str, tool: str) -> None:
    """In the result, in the events of the tool and of the run, and below the exception of a producer."""
    async with process(redis_url, pricing(tool)) as p:
        record = await p.run()
        event = await failed_tool_event(p)
        (last,) = [each["payload"] for each in await p.events() if each["name"] == "run.failed"]

    text = traceback_of(record)
    assert FRAME in text
    assert len(text.encode()) <= MAX_TRACEBACK_BYTES
    assert "openagents_worker/" not in text
    assert event["error_details"]["context"]["traceback"] == text
    assert last["error_details"]["context"]["traceback"] == text
    assert event["code"] in ("tool.error", "tool.permanent")
    assert event["type"] in ("ValueError", "OddError", "PermanentToolError", "ToolError")
    error = result_or_error(record)
    assert isinstance(error, RunFailed)
    assert error.__notes__ == [f"On the worker:\n{text}"]


@pytest.mark.parametrize("tool", ["price", "price_in_thread", "price_in_process"])
async def test_no_secret_of_an_exceptions_text_is_in_a_traceback(redis_url: str, tool: str) -> None:
    """Tracebacks are redacted like everything else. The chain of causes is included."""
    async with process(redis_url, pricing(tool)) as p:
        text = traceback_of(await p.run())
        events = json.dumps(await p.events())

    assert SECRET not in text
    assert "KeyError: 'B2'" in text
    assert "ValueError: no price at redis://:***@shop/0" in text
    assert SECRET not in events


async def test_a_library_error_has_no_traceback(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A budget or a model's refusal has code and message, without frames of the library."""
    broken = scripted({"error": "response"}, {"text": "never"})
    async with process(redis_url, agent(llm=broken)) as p:
        record = await p.run()

    (line,) = lines(caplog, logging.ERROR)
    assert fields_of(line)["code"] == "llm.response"
    assert raised_in(line) is None
    assert record.result is not None
    assert record.result.error_details is not None
    assert record.result.error_details.traceback is None


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"pattern": {"impl": f"{HERE}.Broken"}}, "ValueError", "pattern.error"),
        ({"memory": {"impl": f"{HERE}.Amnesia", "on_error": "fail"}}, "ValueError", "pattern.error"),
        ({"llm": {"provider": "own"}, "pattern": {"type": "react"}}, "ValueError", "llm.response"),
        (
            {"pattern": {"impl": f"{HERE}.CallsAndRaises", "config": {"wraps": True}}},
            "RuntimeError",
            "pattern.error",
        ),
    ],
)
async def test_the_exception_of_user_code_is_in_the_log_line(
    redis_url: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    kind: str,
    code: str,
) -> None:
    """For patterns, memories and model clients; with the causes, also across a recorded call."""
    monkeypatch.setattr(providers, "PROVIDERS", {**providers.PROVIDERS, "own": lambda *_: failing.Model()})
    async with process(redis_url, pricing(**fields)) as p:
        record = await p.run()

    (line,) = lines(caplog, logging.ERROR)
    assert (fields_of(line)["code"], type(raised_in(line)).__name__) == (code, kind)
    assert FRAME in traceback_of(record)
    chain = [raised_in(line)]
    while chain[-1] is not None:
        chain.append(chain[-1].__cause__)
    assert "KeyError" in [type(each).__name__ for each in chain]


async def test_a_tool_error_sent_to_the_model_is_a_warning(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One line with the traceback. The run continues."""
    async with process(redis_url, react(calls(("price", {"order": "B2"})), {"text": "sorry"})) as p:
        record = await p.run()

    assert record.state is RunState.COMPLETED
    assert lines(caplog, logging.ERROR) == []
    (line,) = lines(caplog, logging.WARNING)
    fields = fields_of(line)
    assert fields.pop("call_id")
    assert fields == {
        "event": "tool.failed", "run_id": "r1", "agent_id": "a", "tool_id": "price", "code": "tool.error",
        "message": "ValueError: no price at redis://:***@shop/0",
    }  # fmt: skip
    assert type(raised_in(line)) is ValueError


async def test_a_tool_that_asks_for_other_arguments_has_no_traceback(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not a failure of its code."""
    replies = [calls(("asks_again", {"order": "B2"})), {"text": "sorry"}]
    async with process(redis_url, react(*replies, tool="asks_again")) as p:
        await p.run()
        event = await failed_tool_event(p)

    (line,) = lines(caplog, logging.WARNING)
    assert (fields_of(line)["code"], raised_in(line)) == ("llm.model_retry", None)
    assert "traceback" not in event["error_details"]["context"]


async def test_a_call_of_an_unknown_tool_is_logged_once(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The model invented a name. It is logged once, also if the run is resumed."""
    async with process(redis_url, react(calls(("prise", {"order": "B2"})), {"text": "sorry"})) as p:
        record = await p.run()
        event = await failed_tool_event(p)

    assert record.state is RunState.COMPLETED
    assert (event["tool_id"], event["code"], event["type"]) == (
        "prise",
        "tool.not_found",
        "ToolNotFoundError",
    )
    (line,) = lines(caplog, logging.WARNING)
    assert fields_of(line) == {
        "event": "tool.failed", "run_id": "r1", "tool_id": "prise", "code": "tool.not_found",
        "message": "there is no tool 'prise'",
    }  # fmt: skip


async def test_a_memory_that_fails_is_logged(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """With the traceback, also if the run continues without it."""
    async with process(redis_url, agent(memory={"impl": f"{HERE}.Amnesia", "on_error": "continue"})) as p:
        record = await p.run()
        names = await p.event_names()

    assert record.state is RunState.COMPLETED
    assert [fields_of(line)["event"] for line in lines(caplog, logging.WARNING)] == [
        "memory.inject_failed",
        "memory.writeback_failed",
    ]
    assert all(type(raised_in(line)) is ValueError for line in lines(caplog, logging.WARNING))
    assert {"memory.inject_failed", "memory.writeback_failed"} <= set(names)


async def test_a_scheduled_retry_is_logged(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """One line: the error, and when the run continues."""
    async with process(redis_url, pricing("busy")) as p:
        record = await p.run()

    assert record.state is RunState.RETRYING
    (line,) = [each for each in lines(caplog, logging.WARNING) if "run.retry_scheduled" in each.getMessage()]
    fields = fields_of(line)
    assert (fields["run_id"], fields["code"], fields["message"]) == (
        "r1",
        "tool.retryable",
        "the shop is busy",
    )
    assert fields["delay_ms"] > 0


async def test_the_traceback_survives_its_worker(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """The tool failed on a worker that died. The worker that ends the run takes the text from the journal."""
    failing.close_gate()
    wanted = pricing(pattern={"impl": f"{HERE}.WaitsAndRaises"})
    async with process(redis_url, wanted, name="one") as one, process(redis_url, wanted, name="two") as two:
        await one.submit()
        dying = await executed_until(one, lambda: failing.WAITING, "the tool has failed")
        await crash(one, "r1", dying)
        failing.GATE.set()
        await two.execute()
        record = await two.record()

    assert record.attempt == 2
    assert FRAME in traceback_of(record)
    (line,) = lines(caplog, logging.ERROR)
    assert (fields_of(line)["attempts"], raised_in(line)) == (2, None)


async def test_a_traceback_never_makes_an_outcome_too_large(redis_url: str) -> None:
    """If the traceback makes the record too large, it is dropped and the error kept."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_PAYLOAD_BYTES": "1024"})
    async with process(redis_url, pricing("price"), settings=settings) as p:
        record = await p.run()

    assert record.result is not None
    assert record.result.error_details is not None
    assert record.result.error_details.code == "tool.error"


async def test_many_runs_fenced_at_once_are_one_log_line(
    redis_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an outage of Redis. The line has their number."""
    groups = LineGroups(lambda *_: None)  # the test writes them
    monkeypatch.setattr(telemetry, "line_groups", groups)
    failing.close_gate()
    async with process(redis_url, pricing(pattern={"impl": f"{HERE}.WaitsAndRaises"})) as p:
        for number in range(40):
            await p.submit(f"r{number}", session_id=f"s{number}")
        executing = [asyncio.create_task(p.execute(f"r{number}")) for number in range(40)]
        await await_for(lambda: len(failing.WAITING) == 40, "all runs work")
        await p.runner.latch_all(LatchReason.FENCED, "the lease is over")
        await asyncio.gather(*executing)
        groups.flush()

    fenced = [fields_of(line) for line in caplog.records if line.getMessage().startswith("run.fenced")]
    (line,) = [line for line in fenced if line["detail"] == "the lease is over"]  # not those of other tests
    assert (line["runs"], line["detail"], len(line["run_ids"])) == (40, "the lease is over", 5)


@pytest.mark.parametrize(("tool", "code"), [("huge", "tool.error"), ("refuses_at_length", "tool.permanent")])
async def test_a_long_error_message_is_shortened(redis_url: str, tool: str, code: str) -> None:
    """It does not become an error about its size."""
    async with process(redis_url, pricing(tool)) as p:
        record = await p.run()

    assert record.result is not None
    assert record.result.error_details is not None
    assert record.result.error_details.code == code
    assert len(record.result.error_details.message) <= MAX_MESSAGE_CHARS


async def test_a_run_that_ends_without_a_worker_is_logged_by_the_notifying_worker(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its worker died and it is not durable.

    A script ends it, and another worker notifies Celery and logs it.
    """
    failing.close_gate()
    wanted = pricing(pattern={"impl": f"{HERE}.WaitsAndRaises"})
    async with process(redis_url, wanted, name="one") as one, process(redis_url, wanted, name="two") as two:
        await one.submit(durable=False, tell=True)
        dying = await executed_until(one, lambda: failing.WAITING, "the run works")
        await crash(one, "r1", dying)
        await two.execute()

    (line,) = lines(caplog, logging.ERROR)
    fields = fields_of(line)
    assert (fields["event"], fields["run_id"], fields["agent_id"], fields["session_id"]) == (
        "run.failed",
        "r1",
        "a",
        "s1",
    )
    assert (fields["code"], raised_in(line)) == ("worker.lost", None)
