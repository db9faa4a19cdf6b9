"""The guards of a tool call, each alone, and their order.

A real schema check and a real context of a call; of the run there is only what a guard reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openagents_worker.agents.executors import FilesystemOptions, RetryOptions
from openagents_worker.errors import (
    MaxStepsExceeded,
    ModelRetryError,
    PermanentToolError,
    RetryableToolError,
    ToolTimeoutError,
    ToolValidationError,
)
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import RunBudget, RunRequest
from openagents_worker.patterns.call_order import begin_together
from openagents_worker.runtime.calls import guards
from openagents_worker.runtime.calls.tool_call import BoundTool, Guard, ToolCall, ToolRun, in_order, is_needed
from openagents_worker.runtime.calls_in_progress import CallsInProgress
from openagents_worker.runtime.context import CallContext
from openagents_worker.runtime.latch import LatchReason, RunLatched
from openagents_worker.runtime.spending import Spending
from openagents_worker.runtime.working_budget import WorkingBudget
from openagents_worker.tools.base import ToolExecutionSpec, ToolPlugin
from openagents_worker.tools.checks import SchemaChecks
from openagents_worker.tools.executors import CallRules
from openagents_worker.tools.policies import FilesystemPolicy
from openagents_worker.tools.toolset import SingleTool


@dataclass
class Events:
    """The parts of the writer and its store that guards use. `has_lease` is False once the lease is over."""

    emitted: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    has_lease: bool = True

    def emit(self, name: str, payload: dict[str, Any]) -> None:
        self.emitted.append((name, payload))

    def preview(self, value: Any) -> Any:
        return value

    @property
    def store(self) -> Events:
        return self

    def check_lease(self) -> None:
        if not self.has_lease:
            raise RunLatched(LatchReason.FENCED)


class Refund(ToolPlugin):
    """Pays back, and logs what happens to it."""

    name = "refund"

    def __init__(self, **own: Any) -> None:
        super().__init__()
        self.log: list[Any] = []
        self.__dict__.update(own)

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": {"cents": {"type": "integer"}}, "required": ["cents"]}

    async def before_invoke(self, params: dict[str, Any], context: Any) -> None:
        self.log.append("before")

    async def after_invoke(
        self, params: dict[str, Any], context: Any, result: Any, exception: BaseException | None = None
    ) -> None:
        self.log.append(("after", result, type(exception).__name__))


@pytest.fixture
async def checks() -> AsyncIterator[SchemaChecks]:
    checks = SchemaChecks()
    yield checks
    await checks.aclose()


@pytest.fixture
def events() -> Events:
    return Events()


async def _nothing_new() -> None:
    """Nobody has extended the budget."""


@pytest.fixture
def make_call(checks: SchemaChecks, events: Events) -> Any:
    """Makes a call of a tool, by default a valid one."""

    def make(
        tool: Any = None, params: Any = None, *, number: int = 1, timeout_ms: int | None = None, **limits: Any
    ) -> ToolCall:
        hints, is_known = limits.pop("hints", {}), limits.pop("is_known", False)
        request = RunRequest(agent_id="a", session_id="s", input_text="", run_id="r", context_hints=hints)
        budget = WorkingBudget(RunBudget(**limits), durable=True)
        announced = SimpleNamespace(
            is_known=lambda _: is_known, was_interrupted=lambda _: False, in_progress=lambda _: nullcontext()
        )
        recorder = SimpleNamespace(
            announced=announced,
            in_progress=CallsInProgress(),
            is_latched=False,
            budget=budget,
            rules=SimpleNamespace(next_kind=lambda: ""),
            spending=Spending(),
            waits=SimpleNamespace(
                facts=SimpleNamespace(of=lambda kind: [], refresh=_nothing_new), begin_again=lambda *_: None
            ),
        )
        context: Any = SimpleNamespace(
            run_id="r", agent_id="a", run_request=request, run_state={}, recorder=recorder
        )
        info = CallInfo(
            run_id="r",
            call_id="c1",
            idempotency_key="k",
            ordinal=0,
            failed_tries=0,
            kind="tool",
            number=number,
        )
        tool = tool or Refund()
        return ToolCall(
            tool=BoundTool("refund", tool, SingleTool(tool), timeout_ms=timeout_ms),
            run=ToolRun(context, events, RunBudget(**limits), checks, guards.GUARDS),  # type: ignore[arg-type]
            info=info,
            context=CallContext(context, "k", "c1"),
            params={"cents": 5} if params is None else params,
        )

    return make


async def passed(guard: Guard, call: ToolCall) -> bool:
    """Whether the guard lets the call proceed. Raises what it raises."""
    reached = []

    async def proceed(call: ToolCall) -> str:
        reached.append(call)
        return "done"

    assert await guard(call, proceed) == "done"
    return reached == [call]


async def test_a_budget_allows_so_many_calls(make_call: Any) -> None:
    assert await passed(guards.budget, make_call(number=2, max_tool_calls=2))
    with pytest.raises(MaxStepsExceeded):
        await passed(guards.budget, make_call(number=3, max_tool_calls=2))


async def test_a_call_is_announced_with_its_arguments(make_call: Any, events: Events) -> None:
    """A tool that must not be repeated is named once per attempt."""
    call = make_call(Refund(durable_idempotent=False))
    for _ in range(2):
        assert await passed(guards.announcement, call)
    assert call.is_announced
    called = ("tool.called", {"tool_id": "refund", "params": {"cents": 5}, "call_id": "c1"})
    assert [event for event in events.emitted if event[0] == "tool.called"] == [called, called]
    assert [name for name, _ in events.emitted].count("run.durable_idempotency_warning") == 1


async def test_a_call_that_watchers_have_seen_begin_is_not_announced_again(
    make_call: Any, events: Events
) -> None:
    """Its end is an event all the same."""
    call = make_call(is_known=True)
    assert await passed(guards.announcement, call)
    assert (call.is_announced, events.emitted) == (True, [])


async def test_arguments_must_match_the_schema_and_the_tool(make_call: Any) -> None:
    class Careful(Refund):
        def validate_params(self, params: dict[str, Any]) -> tuple[bool, str | None]:
            return params["cents"] < 100, "too much"

    assert await passed(guards.arguments, make_call(Careful()))
    for wrong, said in (({}, "cents"), ({"cents": "5"}, "cents"), ({"cents": 100}, "too much")):
        with pytest.raises(ToolValidationError, match=said):
            await passed(guards.arguments, make_call(Careful(), wrong))


@pytest.mark.parametrize("decision", [None, "deny", True, "yes", "Allow"])
async def test_only_allow_approves_a_call(make_call: Any, decision: Any) -> None:
    tool = Refund(requires_approval=lambda params, context: True)
    hints = {"approvals": {"refund": decision}} if decision is not None else {}
    with pytest.raises(PermanentToolError, match="requires approval"):
        await passed(guards.approval, make_call(tool, hints=hints))
    for key in ("c1", "refund", "*"):
        assert await passed(guards.approval, make_call(tool, hints={"approvals": {key: "allow"}}))


async def test_a_call_is_executed_after_those_before_it_in_its_turn(make_call: Any) -> None:
    """Each has its turn when the earlier ones have ended, whatever the order in which they are approved."""
    gate, log = asyncio.Event(), []

    def guarded(name: str, ready: asyncio.Event | None) -> Any:
        async def execute(_: ToolCall) -> None:
            log.append(name)

        async def call() -> None:
            if ready is not None:
                await ready.wait()
            await guards.order(make_call(), execute)

        return call()

    calls = begin_together([(guarded("first", gate), False), (guarded("second", None), False)])
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks)
    assert log == ["first", "second"]


async def test_a_call_without_effects_needs_no_intent(make_call: Any) -> None:
    """`tests/runtime/test_effects.py` shows what becomes of a call that has one."""
    assert await passed(guards.intent, make_call())


async def test_a_call_begins_only_under_the_lease(make_call: Any, events: Events) -> None:
    assert await passed(guards.lease_margin, make_call())
    events.has_lease = False
    with pytest.raises(RunLatched):
        await passed(guards.lease_margin, make_call())


async def test_the_hooks_stand_around_the_tool(make_call: Any) -> None:
    """`after_invoke` gets the result, or the exception as the tool raised it."""
    call = make_call()
    assert await passed(guards.hooks, call)
    assert call.tool.plugin.log == ["before", ("after", "done", "NoneType")]

    async def fail(_: ToolCall) -> None:
        raise ZeroDivisionError

    failing = make_call()
    with pytest.raises(ZeroDivisionError):
        await guards.hooks(failing, fail)
    assert failing.tool.plugin.log == ["before", ("after", None, "ZeroDivisionError")]
    assert failing.has_begun


async def test_a_fallback_is_asked_after_an_error_of_the_tool(make_call: Any) -> None:
    """Not after an error of the run, and not if the model is asked for other arguments."""
    asked: list[Any] = []

    async def instead(error: Exception, params: dict[str, Any], context: Any) -> Any:
        asked.append((type(error), params))
        return params.get("instead")

    async def outcome(error: Exception, **params: Any) -> Any:
        async def fail(_: ToolCall) -> None:
            raise error

        return await guards.fallback(make_call(Refund(fallback=instead), params), fail)

    assert await passed(guards.fallback, make_call(Refund(fallback=instead)))
    assert await outcome(LookupError("gone"), instead="this") == "this"
    with pytest.raises(LookupError):
        await outcome(LookupError("gone"))
    assert [kind for kind, _ in asked] == [LookupError, LookupError]
    for error in (ModelRetryError("other"), MaxStepsExceeded("over")):
        with pytest.raises(type(error)):
            await outcome(error, instead="this")
    assert len(asked) == 2


async def test_a_call_that_takes_too_long_is_cancelled(make_call: Any) -> None:
    cancelled = []

    async def never(_: ToolCall) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    assert await passed(guards.deadline, make_call(timeout_ms=60_000))
    with pytest.raises(ToolTimeoutError):
        await guards.deadline(make_call(timeout_ms=1), never)
    assert cancelled == [True]


async def test_a_time_out_of_the_tool_itself_is_not_the_deadline(make_call: Any) -> None:
    async def times_out(_: ToolCall) -> None:
        raise TimeoutError("its server")

    with pytest.raises(TimeoutError, match="its server"):
        await guards.deadline(make_call(timeout_ms=60_000), times_out)


async def test_the_first_guard_is_the_outermost(make_call: Any) -> None:
    """Each may change the arguments for those after it, and see how they ended."""
    log: list[Any] = []

    def named(name: str) -> Guard:
        async def guard(call: ToolCall, proceed: Any) -> Any:
            log.append((name, call.params["cents"]))
            call.params = {"cents": call.params["cents"] + 1}
            try:
                return await proceed(call)
            finally:
                log.append(f"{name} ends")

        return guard

    async def execute(call: ToolCall) -> Any:
        raise RetryableToolError(f"got {call.params['cents']}", call.tool_id)

    with pytest.raises(RetryableToolError, match="got 7"):
        await in_order([named("one"), named("two")], execute)(make_call())
    assert log == [("one", 5), ("two", 6), "two ends", "one ends"]


def test_a_tool_passes_the_guards_that_it_needs(make_call: Any) -> None:
    """The others let every call of the tool proceed, and are left out once for all calls."""
    optional = {guards.concurrency, guards.intent, guards.fallback, guards.retry, guards.deadline}
    optional |= {guards.interruption}

    def left_out(call: ToolCall, **of_run: Any) -> set[Guard]:
        run = replace(call.run, **of_run)
        return {guard for guard in guards.GUARDS if not is_needed(guard, call.tool, run)}

    async def instead(*_: Any) -> None: ...

    retried = make_call()
    retried.tool.rules = CallRules(retry=RetryOptions())
    retried_once = make_call(Refund(durable_idempotent=False))
    retried_once.tool.rules = retried.tool.rules
    assert left_out(make_call()) == optional
    assert left_out(make_call(), slots=asyncio.Semaphore(1)) == optional - {guards.concurrency}
    assert left_out(make_call(Refund(fallback=instead))) == optional - {guards.fallback}
    assert left_out(make_call(timeout_ms=1)) == optional - {guards.deadline}
    assert left_out(make_call(Blocking())) == optional - {guards.interruption}
    assert left_out(retried) == optional - {guards.retry}
    assert left_out(retried_once) == optional - {guards.intent}


class Blocking(Refund):
    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(interrupt_behavior="block")


async def test_a_tool_that_blocks_ends_before_it_is_cancelled(make_call: Any) -> None:
    """The cancellation takes effect when the task waits the next time: its outcome is recorded before."""
    call, may_end = make_call(Blocking()), asyncio.Event()
    assert await passed(guards.interruption, call)
    seen: list[Any] = []

    async def work(call: ToolCall) -> str:
        await may_end.wait()
        return "done"

    async def record() -> None:
        seen.append(await guards.interruption(call, work))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    recording = asyncio.create_task(record())
    await asyncio.sleep(0)
    recording.cancel()
    await asyncio.sleep(0)
    assert seen == []
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await recording
    assert seen == ["done", "cancelled"]


@pytest.mark.parametrize("ends", [True, False])
async def test_a_tool_that_blocks_does_not_go_on_when_it_is_cancelled_twice(
    make_call: Any, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """For example by the time limits of two blocks of the pattern. If it does not end, it is cancelled."""
    monkeypatch.setitem(guards.interruption.__globals__, "LONGEST_BLOCK_S", 60.0 if ends else 0.01)
    call, may_end, log = make_call(Blocking()), asyncio.Event(), []

    async def work(call: ToolCall) -> str:
        try:
            await may_end.wait()
            log.append("done")
        finally:
            await asyncio.sleep(0)
            log.append("ended")
        return "outcome"

    async def record() -> None:
        log.append(await guards.interruption(call, work))

    recording = asyncio.create_task(record())
    for _ in range(3):
        await asyncio.sleep(0)
        recording.cancel()
    if ends:
        may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await recording
    assert recording.cancelling() == 3
    assert log == (["done", "ended", "outcome"] if ends else ["ended"])


async def test_a_retryable_error_is_tried_again_if_the_executor_says_so(make_call: Any) -> None:
    """Not a call with effects, and not another error. The last error is raised."""
    tries = RetryOptions(max_attempts=3, initial_delay_ms=0)

    async def made(tool: Refund, error: Exception, retry: RetryOptions | None = tries) -> int:
        call, begun = make_call(tool), []
        call.tool.rules = CallRules(retry=retry)

        async def fail(call: ToolCall) -> Any:
            begun.append(call)
            raise error

        with pytest.raises(type(error)):
            await guards.retry(call, fail)
        return len(begun)

    later = RetryableToolError("later", "refund")
    assert await made(Refund(), later) == 3
    assert await made(Refund(), later, None) == 1
    assert await made(Refund(durable_idempotent=False), later) == 1
    assert await made(Refund(), PermanentToolError("never", "refund")) == 1
    assert await made(Refund(), ValueError("a bug")) == 1
    assert await passed(guards.retry, make_call())


async def test_calls_wait_until_fewer_are_made(make_call: Any) -> None:
    """A call inside another one counts with it."""
    call = make_call()
    assert await passed(guards.concurrency, call)
    call.run = replace(call.run, slots=asyncio.Semaphore(1))
    gate, log = asyncio.Event(), []

    async def hold(call: ToolCall) -> None:
        log.append("held")
        assert await passed(guards.concurrency, call)
        await gate.wait()

    both = [asyncio.create_task(guards.concurrency(call, hold)) for _ in range(2)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert log == ["held"]
    gate.set()
    await asyncio.gather(*both)
    assert log == ["held", "held"]


async def test_a_policy_is_asked_about_the_arguments(make_call: Any) -> None:
    call = make_call()
    call.tool.rules = CallRules(policies=(FilesystemPolicy(FilesystemOptions(deny_tools=["refund"])),))
    with pytest.raises(PermanentToolError, match="policy denied: the tool is in deny_tools"):
        await passed(guards.arguments, call)


def test_each_guard_has_a_test_here() -> None:
    """A new guard is one file, one entry in the list, and a test of it alone."""
    tests = Path(__file__).read_text()
    names = [guard.__name__ for guard in guards.GUARDS]  # type: ignore[attr-defined]
    assert [name for name in names if f"guards.{name}" not in tests] == []
