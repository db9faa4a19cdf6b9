"""Any exception of user code, from any hook, is an outcome of the run and names its type."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from openagents_worker import Agent, RunContext, StepFailed, register_deps, register_output
from openagents_worker.errors import PatternError, ToolError
from openagents_worker.models import RunRecord, RunState
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.registry import DEPS, OUTPUTS
from openagents_worker.runtime.user_code import (
    RunCode,
    cancelling_itself_only,
    coded,
    current_run,
    described,
    user_code,
)
from tests.runtime import plugins, raising
from tests.runtime.test_endings import error_of
from tests.runtime.test_replay import executed_until, patterned, tool
from tests.runtime.test_stop import worker
from tests.runtime.unstorable import EXCEPTIONS, KINDS
from tests.support.runner import Process, agent, process

HERE = "tests.runtime.raising"


@pytest.fixture(autouse=True)
def _nothing_is_raised_yet(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    monkeypatch.setattr(DEPS, "_by_name", {})
    monkeypatch.setattr(OUTPUTS, "_by_name", {})
    raising.NEXT.clear()
    raising.CALLS.clear()
    yield
    raising.NEXT.clear()


@contextmanager
def raises(name: str) -> Iterator[None]:
    raising.NEXT[:] = [name]
    try:
        yield
    finally:
        raising.NEXT.clear()


def acting(
    pattern: str, *, tool_impl: str = "", given: dict[str, Any] | None = None, **config: Any
) -> dict[str, Any]:
    tools = [{"id": "tool", "impl": f"{HERE}.{tool_impl}", "config": config}] if tool_impl else []
    return agent(pattern={"impl": f"{HERE}.{pattern}"}, tools=tools, **(given or {}))


@pytest.fixture(params=["kinds", pytest.param("all", marks=pytest.mark.slow)])
def names(request: pytest.FixtureRequest) -> Sequence[str]:
    """The exceptions of the table that a test raises: one of each kind, or all."""
    return KINDS if request.param == "kinds" else list(EXCEPTIONS)


async def each(p: Process, names: Sequence[str], **fields: Any) -> list[tuple[str, RunRecord]]:
    """One run per exception, each in its own session; it must end in its first attempt."""
    records = []
    for number, name in enumerate(names):
        with raises(name):
            record = await p.run(f"r{number}", session_id=f"s{number}", **fields)
        assert record.state.is_terminal, name
        assert (record.attempt, record.recoveries, record.retries) == (1, 0, 0), name
        records.append((name, record))
    return records


def names_it(name: str, message: str) -> bool:
    """Whether the message names the type; of an exception group, also those of its members."""
    error = EXCEPTIONS[name]()
    members = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
    return all(type(member).__name__ in message for member in members)


def answer_of(record: RunRecord) -> dict[str, Any]:
    assert record.result is not None
    answer: dict[str, Any] = record.result.final_output
    return answer


# --- tools ------------------------------------------------------------------------------------------------


@pytest.mark.share(of=2)
@pytest.mark.parametrize("once", [False, True], ids=["may be repeated", "not durable_idempotent"])
@pytest.mark.parametrize("hook", ["invoke", "before_invoke", "validate_params"])
async def test_an_exception_of_a_tool_is_the_outcome_of_its_call(
    redis_url: str, names: Sequence[str], hook: str, once: bool
) -> None:
    """The call is made once. Its error names the type and is not retryable. The pattern continues."""
    async with process(redis_url, acting("Caller", tool_impl="RaisingTool", hook=hook, once=once)) as p:
        for name, record in await each(p, names):
            answer = answer_of(record)
            assert (answer["code"], answer["retryable"]) == ("tool.error", False), name
            assert names_it(name, answer["message"]), name
    assert len(raising.CALLS) == len(names)


@pytest.mark.parametrize("function", ["in_coroutine", "in_thread", "in_plain_thread", "in_task"])
async def test_an_exception_of_a_function_tool_is_the_outcome_of_its_call(
    redis_url: str, names: Sequence[str], function: str
) -> None:
    """Also from a thread, whose future cannot hold every exception, and from a task, where some exceptions
    would stop the loop.
    """
    async with worker(redis_url, acting("Caller", tool_impl=function)) as p:
        for name, record in await each(p, names):
            assert answer_of(record)["code"] == "tool.error", name
            assert names_it(name, answer_of(record)["message"]), name
    assert len(raising.CALLS) == len(names)


@pytest.mark.parametrize("function", ["in_coroutine", "in_thread", "in_plain_thread", "in_task"])
async def test_an_exception_of_a_recorded_function_is_the_outcome_of_its_call(
    redis_url: str, names: Sequence[str], function: str
) -> None:
    """Like that of a tool. It is not retryable, and the program continues."""

    async def program(context: RunContext) -> Any:
        try:
            return await context.step("act", getattr(raising, function).function)
        except StepFailed as error:
            return {"code": error.code, "message": error.message, "retryable": error.retryable}

    async with worker(redis_url, Agent("a", llm="mock", pattern=program)) as p:
        for name, record in await each(p, names):
            answer = answer_of(record)
            assert (answer["code"], answer["retryable"]) == ("step.failed", False), name
            assert names_it(name, answer["message"]), name
    assert len(raising.CALLS) == len(names)


async def test_an_exception_in_a_future_ends_its_run_or_its_call(
    redis_url: str, names: Sequence[str]
) -> None:
    """GeneratorExit from a future closes the coroutine that awaits it. Even then the run ends."""
    async with worker(redis_url, acting("Caller", tool_impl="in_future")) as p:
        for name, record in await each(p, names):
            if name == "GeneratorExit":
                assert "GeneratorExit" in error_of(record)[1]
            else:
                assert answer_of(record)["code"] == "tool.error", name
                assert names_it(name, answer_of(record)["message"]), name


async def test_an_exception_in_another_process_is_the_outcome_of_its_call(
    redis_url: str, names: Sequence[str]
) -> None:
    """Also if it cannot be pickled or would end the process. Other calls in that process continue."""
    definition = acting("Caller", tool_impl="in_process")
    definition["pattern"]["config"] = {"says_which": True}
    async with process(redis_url, definition) as p:
        for name, record in await each(p, names):
            assert answer_of(record)["code"] == "tool.error", name
            assert names_it(name, answer_of(record)["message"]), name


async def test_an_exception_of_after_invoke_changes_nothing(
    redis_url: str, names: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It is only logged."""
    async with process(redis_url, acting("Caller", tool_impl="RaisingTool", hook="after_invoke")) as p:
        for name, record in await each(p, names):
            assert answer_of(record) == {"got": "fine"}, name
    assert caplog.text.count("tool.after_invoke_failed") == len(names)


@pytest.mark.defect("A03")
async def test_an_approval_check_that_fails_forbids_the_call(redis_url: str, names: Sequence[str]) -> None:
    """If `requires_approval` raises, the tool is not called without an approval."""
    async with process(redis_url, acting("Caller", tool_impl="RaisingTool", hook="requires_approval")) as p:
        for name, record in await each(p, names):
            assert answer_of(record)["code"] == "tool.permanent", name
            assert "requires approval" in answer_of(record)["message"], name


# --- what fails the run -----------------------------------------------------------------------------------


HOOKS: dict[str, dict[str, Any]] = {
    "preflight": acting("Caller", tool_impl="RaisingTool", hook="preflight"),
    "pattern": acting("Raiser"),
    "setup": acting("Setter"),
    "assemble": agent(context_assembler={"impl": f"{HERE}.RaisingAssembler"}),
} | {
    f"{memory}.{hook}": agent(
        memory={"impl": f"{HERE}.{memory}", "config": {"hook": hook}, "on_error": "fail"},
        pattern={"impl": "tests.runtime.plugins.Silent"},
    )
    for memory in ("RaisingMemory", "ExternalMemory")
    for hook in ("inject", "writeback", "compact")
}


@pytest.mark.share(of=2)
@pytest.mark.parametrize("hook", list(HOOKS))
async def test_an_exception_of_a_hook_fails_its_run(redis_url: str, names: Sequence[str], hook: str) -> None:
    """With an error that names the type. The process and its loop continue."""
    async with process(redis_url, HOOKS[hook]) as p:
        for name, record in await each(p, names):
            code, message = error_of(record)
            assert code == "pattern.error", name
            assert names_it(name, message), (name, message)
        assert (await p.run("fine", session_id="fine")).state is RunState.COMPLETED


@pytest.mark.parametrize("hook", ["inject", "writeback", "compact"])
async def test_an_exception_of_a_memory_can_be_ignored(
    redis_url: str, names: Sequence[str], hook: str
) -> None:
    """With `on_error: continue` the run continues without its memory."""
    memory = {"impl": f"{HERE}.RaisingMemory", "config": {"hook": hook}, "on_error": "continue"}
    async with process(
        redis_url, agent(memory=memory, pattern={"impl": "tests.runtime.plugins.Silent"})
    ) as p:
        for name, record in await each(p, names):
            assert record.state is RunState.COMPLETED, name
    assert len(raising.CALLS) == len(names)


@pytest.mark.parametrize(
    "definition",
    [acting("Closer"), agent(context_assembler={"impl": f"{HERE}.CompactingAssembler"})],
    ids=["close", "assembler compact"],
)
async def test_exceptions_of_optional_hooks_are_ignored(
    redis_url: str, names: Sequence[str], definition: dict[str, Any]
) -> None:
    """A plugin that cannot be closed, an assembler that cannot compact: the run continues."""
    async with process(redis_url, definition) as p:
        for name, record in await each(p, names):
            assert record.state is RunState.COMPLETED, name
    assert raising.CALLS


@pytest.mark.parametrize("hook", ["factory", "async factory", "enter", "exit", "async enter", "async exit"])
async def test_an_exception_of_deps_fails_the_run(redis_url: str, names: Sequence[str], hook: str) -> None:
    """Ordinary errors as `deps.unavailable`, which is retried if the run allows it.

    Others are not retried.
    """
    factories = {
        "factory": raising.raising_deps,
        "async factory": raising.raising_deps_async,
        "enter": lambda: raising.FromDeps("enter"),
        "exit": lambda: raising.FromDeps("exit"),
        "async enter": lambda: raising.FromDepsAsync("enter"),
        "async exit": lambda: raising.FromDepsAsync("exit"),
    }
    register_deps("mine", factories[hook])
    async with process(redis_url, patterned("Silent")) as p:
        for name, record in await each(p, names, deps="mine", budget={"max_resume_attempts": 0}):
            code, message = error_of(record)
            is_exception = isinstance(EXCEPTIONS[name](), Exception) and name != "StopIteration"
            if "exit" in hook:
                assert code == "pattern.error", name
            elif is_exception:
                assert code == "deps.unavailable", name
            else:
                assert code in ("pattern.error", "deps.unavailable"), name
            assert names_it(name, message), (name, message)


async def test_an_exception_of_an_output_validator_fails_the_run(
    redis_url: str, names: Sequence[str]
) -> None:
    """Exceptions that pydantic converts are validation errors. Others fail the run with their type."""
    register_output("answer", raising.Answer)
    async with process(redis_url, acting("Answering")) as p:
        for name, record in await each(p, names, output_type="answer", budget={"max_validation_retries": 0}):
            code, message = error_of(record)
            if issubclass(type(EXCEPTIONS[name]()), ValueError | AssertionError):
                assert code == "execution.output_validation", name
            else:
                assert code == "pattern.error", name
                assert names_it(name, message), (name, message)


async def test_an_exception_of_a_model_client_is_the_outcome_of_its_call(
    redis_url: str, names: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A custom client can raise anything. The pattern gets a coded error that was recorded."""
    monkeypatch.setattr(Assembly, "model", lambda *_: raising.RaisingModel())
    async with process(redis_url, acting("AsksModel")) as p:
        for name, record in await each(p, names):
            assert (answer_of(record)["code"], answer_of(record)["retryable"]) == ("llm.response", False), (
                name
            )
            assert names_it(name, answer_of(record)["message"]), name
        journal = await p.journal("r0")
    assert "error" in journal[-1]["outcome"]


# --- what is not user code's to raise --------------------------------------------------------------------


async def test_a_pattern_that_catches_everything_is_stopped(redis_url: str) -> None:
    """The latch decides, not the pattern."""
    async with process(redis_url, patterned("CatchesAll", tool("Charge"))) as p:
        await p.submit()
        executing = await executed_until(p, lambda: len(plugins.LOG) == 1, "the call begins")
        p.runner.latch("r1", LatchReason.CANCELLED)
        await executing

        assert (await p.record()).state is RunState.CANCELLED
        assert ("caught", "RunLatched") in plugins.LOG


async def test_a_run_latched_of_the_pattern_is_an_error(redis_url: str) -> None:
    """A pattern that raises RunLatched itself does not stop the run silently."""
    async with process(redis_url, patterned("LatchesItself")) as p:
        code, message = error_of(await p.run())

    assert code == "pattern.error"
    assert "RunLatched" in message


async def test_a_requested_cancellation_passes() -> None:
    """It is not an outcome of user code."""

    async def work() -> None:
        with user_code(PatternError):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("timeout_ms", [None, 10_000])
@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("cancels_itself", "CancelledError: "),
        ("cancels_itself_too_late", "fine"),
        ("catches_its_cancellation", "fine"),
    ],
)
async def test_a_tool_that_cancels_itself_cancels_only_itself(
    redis_url: str, name: str, outcome: str, timeout_ms: int | None
) -> None:
    """It executes in the task of its pattern. The pattern and its next calls continue."""
    tools = [
        {"id": "tool", "impl": f"{HERE}.{name}", "timeout_ms": timeout_ms},
        {"id": "other", "impl": f"{HERE}.in_coroutine"},
    ]
    async with process(redis_url, agent(pattern={"impl": f"{HERE}.CallsTwice"}, tools=tools)) as p:
        record = await p.run()

        assert record.result is not None
        assert record.result.final_output == [outcome, "fine"]
        assert [entry["name"] for entry in await p.journal()][1:] == ["tool", "other"]


async def test_a_cancellation_from_outside_reaches_a_tool_that_has_cancelled_itself() -> None:
    """Both are requested. The one from outside counts."""
    entered = asyncio.Event()

    async def tool() -> None:
        me = asyncio.current_task()
        assert me is not None
        me.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        entered.set()
        await asyncio.Event().wait()

    async def work() -> None:
        with user_code(PatternError):
            await cancelling_itself_only(tool())

    task = asyncio.create_task(work())
    await entered.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_run_latched_passes_in_a_latched_run() -> None:
    """Only in a latched run."""
    run = RunCode("r1", "a", Latch())
    token = current_run.set(run)
    try:
        with pytest.raises(PatternError, match="RunLatched"), user_code(PatternError):
            raise RunLatched(LatchReason.RETRY)
        run.latch.set(LatchReason.RETRY)
        for signal in (RunLatched(LatchReason.RETRY), _of_a_task_group(RunLatched(LatchReason.RETRY))):
            with pytest.raises(RunLatched), user_code(PatternError):
                raise signal
    finally:
        current_run.reset(token)


def _of_a_task_group(error: BaseException) -> BaseException:
    return BaseExceptionGroup("unhandled errors in a TaskGroup", [ValueError("beside it"), error])


def test_each_member_of_a_group_is_named() -> None:
    """Also those of nested groups."""
    inner = BaseExceptionGroup("inner", [SystemExit(3)])
    error = coded(BaseExceptionGroup("outer", [ValueError("one"), inner]), ToolError)

    assert error.message == (
        "BaseExceptionGroup: outer (2 sub-exceptions) "
        "[ValueError: one; BaseExceptionGroup: inner (1 sub-exception) [SystemExit: 3]]"
    )
    assert error.__cause__ is not None
    assert described(KeyError("x")) == "KeyError: 'x'"
