"""Checks of values against schemas, with real check processes and their limits."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from openagents_worker.errors import (
    CheckLimitExceeded,
    PluginConfigError,
    RequestInvalid,
    ToolUnavailableError,
)
from openagents_worker.json_schema import mistakes as mistakes_module
from openagents_worker.json_schema.rules import Schema, read_schema
from openagents_worker.tools import checks as module
from openagents_worker.tools.checks import SchemaChecks, schema_of_output, schema_of_tool
from openagents_worker.tools.offload import WorkOffLoop, work_off_loop

CHEAP = read_schema({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
PATTERN = read_schema({"type": "object", "properties": {"n": {"pattern": "^[a-z]+$"}}, "required": ["n"]})
CATASTROPHE = read_schema({"pattern": "^(a+)+$"})
CATASTROPHIC = "a" * 40 + "!"
RECURSIVE = read_schema(
    {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"properties": {"a": {"allOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/n"}]}}}},
    }
)
UNIQUE = read_schema({"uniqueItems": True})


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.fixture
async def checks() -> AsyncGenerator[SchemaChecks]:
    made = SchemaChecks(cpu_s=0.3)
    yield made
    await made.aclose()


async def test_a_cheap_check_runs_on_the_event_loop(checks: SchemaChecks) -> None:
    """No process is started for it."""
    assert await checks.mistakes(CHEAP, {"n": 1}, "argument") is None
    assert await checks.mistakes(CHEAP, {}, "argument") == "argument 'n' is missing"
    assert checks._idle == []


async def test_an_expensive_check_runs_in_a_process_with_the_same_texts(checks: SchemaChecks) -> None:
    """One process answers many questions, with the same texts as a check on the loop."""
    assert await checks.mistakes(PATTERN, {"n": "a"}, "field") is None
    first = checks._idle[:]
    assert await checks.mistakes(PATTERN, {"n": "A"}, "field") == 'n: does not satisfy pattern "^[a-z]+$"'
    assert await checks.mistakes(PATTERN, {"n": "ä€\ud800"}, "field") is not None
    assert checks._idle == first


@pytest.mark.parametrize(
    "value",
    [{"n": 1, "more": ["x"] * 5_000}, {"n": 1, "more": "x" * 500_000}, {"n": 1, "x" * 500_000: 1}],
    ids=["many values", "a long text", "a long name"],
)
async def test_a_large_value_is_checked_in_a_process(checks: SchemaChecks, value: Any) -> None:
    """With any schema."""
    assert await checks.mistakes(CHEAP, value, "field") is None
    assert len(checks._idle) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (CATASTROPHE, CATASTROPHIC),
        (RECURSIVE, nested(60)),
        (UNIQUE, [{"n": n} for n in range(20_000)]),
    ],
    ids=["a pattern", "a schema that multiplies itself", "each with each"],
)
async def test_a_check_that_takes_too_long_is_given_up(
    checks: SchemaChecks, schema: Schema, value: Any
) -> None:
    """The error names the limit and a remedy. The next check works. On a busy machine the limit of the wall
    clock may be exceeded first."""
    with pytest.raises(CheckLimitExceeded, match=r"given up: (0.3 s of processor time|4.5 s)") as given_up:
        await checks.mistakes(schema, value, "field")

    assert given_up.value.code == "execution.check_limit"
    assert "OPENAGENTS_CHECK_CPU_S" in (given_up.value.hint or "")
    assert await checks.mistakes(PATTERN, {"n": "a"}, "field") is None


async def test_the_loop_answers_while_a_check_takes_for_ever(checks: SchemaChecks) -> None:
    """Another check runs too, because there are two processes."""
    hostile = asyncio.create_task(checks.mistakes(CATASTROPHE, CATASTROPHIC, "field"))
    other = await checks.mistakes(PATTERN, {"n": "a"}, "field")
    turns = 0
    while not hostile.done():
        await asyncio.sleep(0)
        turns += 1

    assert other is None
    assert turns > 100
    with pytest.raises(CheckLimitExceeded):
        hostile.result()


async def test_waiting_checks_are_scheduled_fairly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with many slow checks does not delay others: agents take turns, and the runs of an agent too."""
    checks, begun, go_on = SchemaChecks(processes=1), [], threading.Event()

    def answer(_: SchemaChecks, question: bytes) -> dict[str, Any]:
        begun.append(json.loads(question)["value"]["n"])
        go_on.wait()
        return {"problem": None}

    monkeypatch.setattr(SchemaChecks, "_ask_process", answer)

    async def of_run(group: str, *values: str) -> None:
        work_off_loop.set(WorkOffLoop(group=group))
        await asyncio.gather(*(checks.mistakes(PATTERN, {"n": value}, "field") for value in values))

    try:
        waiting = [asyncio.create_task(of_run("shop", *(f"a{n}" for n in range(5))))]
        await until(lambda: begun == ["a0"])
        for group, values in (("shop", "b0 b1"), ("school", "c0 c1 c2"), ("shop", "d0"), ("bank", "e0")):
            before = checks._threads.stats()["waiting"]
            waiting.append(asyncio.create_task(of_run(group, *values.split())))
            await until(lambda before=before: checks._threads.stats()["waiting"] > before)
        cancelled = waiting.pop()
        cancelled.cancel()
        await asyncio.wait([cancelled])
        go_on.set()
        await asyncio.gather(*waiting)
    finally:
        go_on.set()
        await checks.aclose()

    assert begun == ["a0", "a1", "c0", "b0", "c1", "d0", "c2", "a2", "b1", "a3", "a4"]


async def test_a_check_that_takes_all_memory_is_given_up() -> None:
    """A process cannot exceed its memory limit. It answers the next question."""
    checks = SchemaChecks(cpu_s=60)
    schema = read_schema({"items": {"enum": ["x" * 30_000]}, "pattern": "a", "uniqueItems": True})
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(module, "MEMORY_BYTES", 60 * 1024 * 1024)
            with pytest.raises(CheckLimitExceeded, match="memory"):
                await checks.mistakes(schema, ["y" * 1_000] * 20_000, "field")
            assert await checks.mistakes(PATTERN, {"n": "a"}, "field") is None
    finally:
        await checks.aclose()


async def test_a_value_nested_deeper_than_the_checker_goes_is_given_up(checks: SchemaChecks) -> None:
    """Values of a run are rejected earlier. A value of a custom tool may get here."""
    deep = read_schema({"$ref": "#/$defs/n", "$defs": {"n": {"additionalProperties": {"$ref": "#/$defs/n"}}}})

    with pytest.raises(CheckLimitExceeded, match="nesting"):
        await checks.mistakes(deep, nested(400), "field")


async def test_what_is_not_json_is_a_mistake(checks: SchemaChecks) -> None:
    told = await checks.mistakes(PATTERN, {"n": object()}, "field")

    assert told is not None
    assert told.startswith("it is not JSON")


async def test_a_check_survives_the_end_of_its_process(checks: SchemaChecks) -> None:
    """The question is asked once more."""
    assert await checks.mistakes(PATTERN, {"n": "a"}, "field") is None
    (idle,) = checks._idle
    os.kill(idle._process.pid, signal.SIGKILL)

    assert await checks.mistakes(PATTERN, {"n": "a"}, "field") is None


async def test_signals_to_a_workers_group_do_not_end_its_checks(checks: SchemaChecks) -> None:
    """A worker that drains still executes runs for a while."""
    assert await checks.mistakes(PATTERN, {"n": "a"}, "field") is None
    before = checks._idle[:]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(before[0]._process.pid, number)

    assert await checks.mistakes(PATTERN, {"n": "a"}, "field") is None
    assert checks._idle == before


async def test_closing_ends_the_processes(checks: SchemaChecks) -> None:
    """Also a process that is checking."""
    running = asyncio.create_task(checks.mistakes(CATASTROPHE, CATASTROPHIC, "field"))
    await until(lambda: len(checks._busy) == 1)
    (process,) = checks._busy
    await checks.aclose()

    assert process.ended_by is not None
    with pytest.raises(ToolUnavailableError):
        await running


async def test_a_process_that_cannot_be_started_is_an_error_that_may_be_retried(
    checks: SchemaChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example if the host's limit of processes is reached."""
    monkeypatch.setattr("sys.executable", "/nowhere/python")

    with pytest.raises(ToolUnavailableError, match="cannot be started") as refused:
        await checks.mistakes(PATTERN, {"n": "a"}, "field")

    assert refused.value.retryable


def test_the_error_of_a_rejected_schema_names_its_author() -> None:
    """The error is that of the request, or that of the tool's configuration."""
    with pytest.raises(RequestInvalid, match="output_type is not a supported JSON Schema: type: 'x'"):
        schema_of_output({"type": "x"})
    with pytest.raises(PluginConfigError, match="a tool's arguments is not a supported JSON Schema"):
        schema_of_tool({"type": "x"})


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await asyncio.sleep(0)


async def test_a_process_that_cannot_load_its_modules_is_an_error_that_may_be_retried(
    checks: SchemaChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schema is not the reason."""
    monkeypatch.setattr("sys.path", [])

    with pytest.raises(ToolUnavailableError, match="has ended with code 1"):
        await checks.mistakes(PATTERN, {"n": "a"}, "field")


async def test_a_large_schema_is_not_cached() -> None:
    """So many large schemas cannot fill the memory."""
    large = read_schema({"properties": {f"field_{n:04}": {"type": "string"} for n in range(500)}})
    before = mistakes_module._cached_checks.cache_info().currsize

    assert mistakes_module.mistakes(large.text, {}, "field") is None
    assert mistakes_module._cached_checks.cache_info().currsize == before
