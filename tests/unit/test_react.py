"""ReAct: what the model is shown, what becomes of its tool calls, and where the loop ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openagents_worker.errors import (
    BudgetExhausted,
    MaxStepsExceeded,
    ModelRetryError,
    OpenAgentsError,
    PermanentToolError,
    PluginConfigError,
    RunCancelled,
    StepTimeoutError,
    StepTooLarge,
    ToolError,
    ToolUnavailableError,
)
from openagents_worker.llm.base import LLMResponse, LLMToolCall
from openagents_worker.llm.transcript import model_messages, turn_entries
from openagents_worker.models import RunBudget, RunRequest
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.patterns.react import ReActPattern
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from openagents_worker.tools import tool
from openagents_worker.tools.builtin import BUILTIN_TOOLS
from tests.support.waiting import until_cancelled
from tests.unit.llm.wire import FORMATS, Format, client_of
from tests.unit.run_fakes import FakeRun, Gate, ScriptedModel, asks, execute, says


class RuntimeSignal(BaseException):
    """Stands for what the runtime raises to put a run aside."""


def failing(error: BaseException) -> Any:
    """A tool that always raises this."""

    @tool(name="failing", description="Fails.")
    async def failing_tool() -> None:
        raise error

    return failing_tool.build()


def echo(safe: bool = True, before: Callable[[str], Any] | None = None) -> Any:
    """A tool that gives its text back, after `before(text)`."""

    @tool(name="echo", description="Echoes.", concurrency_safe=safe)
    async def echo_tool(text: str) -> str:
        if before is not None:
            await before(text)
        return text

    return echo_tool.build()


def tool_messages(model: ScriptedModel) -> list[dict[str, Any]]:
    """The tool messages of the newest request."""
    return [message for message in model.requests[-1]["messages"] if message["role"] == "tool"]


# --- what the model is shown -----------------------------------------------------------------------------


@pytest.mark.defect("P02")
async def test_the_first_request_shows_all_that_is_known() -> None:
    """One system message, history, then the question after what a memory holds; tools by their ids."""
    model = ScriptedModel(says("391"))
    run = FakeRun(
        model,
        system_prompt_fragments=["Answer in German."],
        memory_view={"facts": ["likes pears", {"age": 7}], "user_goals": "learn", "empty": []},
        transcript=[
            {"role": "user", "content": "hi", "run_id": "r0"},
            {"role": "assistant", "content": "hello"},
        ],
    ).give(zeta=BUILTIN_TOOLS["calc"](), alpha=BUILTIN_TOOLS["calc"]())

    answer = await execute(ReActPattern({"system_prompt": "You count."}), run)

    assert answer == "391"
    request = model.requests[0]
    assert request["messages"] == [
        {"role": "system", "content": "You count.\n\nAnswer in German."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {
            "role": "user",
            "content": '## facts\n- likes pears\n- {"age":7}\n\n## user_goals\nlearn\n\n'
            "## question\nWhat is 17*23?",
        },
    ]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("gpt", 0.5, 100)
    assert [offered["function"]["name"] for offered in request["tools"]] == ["alpha", "zeta"]
    assert {offered["type"] for offered in request["tools"]} == {"function"}


PIXEL = {"type": "image", "data": "iVBORw0KGgo=", "media_type": "image/png"}


def camera(result: Any) -> Any:
    """A tool that returns this."""

    @tool(name="camera", description="Takes a photo.")
    async def camera_tool() -> Any:
        return result

    return camera_tool.build()


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
async def test_an_image_that_a_tool_returns_is_shown_to_the_model(wire: Format) -> None:
    """As an image, in the way of each wire format, not as text of base64."""
    asked: list[dict[str, Any]] = []

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append(request.body)
        return (
            {"text": "a pixel"} if len(asked) > 1 else {"tool_calls": [{"name": "camera", "arguments": {}}]}
        )

    async with ModelServer(reply) as server:
        client = client_of(wire, server.url)
        run = FakeRun(client).give(camera=camera([{"type": "text", "text": "Here:"}, PIXEL]))  # type: ignore[arg-type]
        answer = await execute(ReActPattern(), run)
        await client.aclose()

    assert answer == "a pixel"
    shown = json.dumps(asked[1])
    kinds = {"openai_compatible": '"image_url"', "openai_responses": '"input_image"', "anthropic": '"base64"'}
    assert kinds[wire.provider] in shown
    assert '\\"type\\"' not in shown  # as JSON inside a text


@pytest.mark.parametrize(
    "result",
    [
        [],
        [{"type": "text", "text": "only text"}],
        [{"type": "image", "caption": "a sunset"}],
        [{**PIXEL, "alt": "a pixel"}],
        [PIXEL, "text"],
        [PIXEL, {"type": "table"}],
        {"type": "image", "url": "not a URL"},
        {"type": "image", "data": "not base64", "media_type": "image/png"},
        {"image": PIXEL},
    ],
)
async def test_other_json_is_not_taken_for_an_image(result: Any) -> None:
    """The model gets it as JSON, unless every element is a valid block without other fields."""
    model = ScriptedModel(asks(("camera", {})), says("done"))
    await execute(ReActPattern(), FakeRun(model).give(camera=camera(result)))

    content = model.requests[1]["messages"][-1]["content"]
    assert json.loads(content) == result


async def test_opaque_fields_of_an_answer_are_kept_for_the_transcript() -> None:
    """Its provider wants them back in the next turn of the session, but no readable reasoning."""
    opaque = {"chat_completions": {"extra_content": {"google": {"thought_signature": "s"}}}}
    reasoning = {"chat_completions": {**opaque["chat_completions"], "reasoning_content": "The user wants …"}}
    pattern = ReActPattern()
    await execute(pattern, FakeRun(ScriptedModel(LLMResponse("391", provider_fields=reasoning))))

    _, entry = turn_entries("17*23?", "391", {}, stop_reason="completed", tool_messages=pattern.turn_messages)
    assert entry["provider_fields"] == opaque
    assert "tool_messages" not in entry
    assert model_messages([entry]) == [{"role": "assistant", "content": "391", "provider_fields": opaque}]


async def test_an_agent_without_tools_offers_none() -> None:
    """Providers refuse an empty list of tools, so there is none."""
    model = ScriptedModel(says("hello"))

    await execute(ReActPattern(), FakeRun(model))

    assert model.requests[0]["tools"] is None


@pytest.mark.defect("P12")
async def test_a_turn_goes_back_as_one_assistant_message_and_one_result_per_call() -> None:
    """The next request holds the model's whole turn, then the results in the order of its calls."""
    turn = asks(("echo", {"text": "a"}), ("calc", {"expression": "17*23"}), text="Let me see.")
    model = ScriptedModel(turn, says("391"))
    run = FakeRun(model).give(echo=echo(), calc=BUILTIN_TOOLS["calc"]())

    await execute(ReActPattern(), run)

    assert model.requests[1]["messages"][2:] == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {"id": "id-0", "name": "echo", "arguments": {"text": "a"}},
                {"id": "id-1", "name": "calc", "arguments": {"expression": "17*23"}},
            ],
        },
        {"role": "tool", "tool_call_id": "id-0", "name": "echo", "content": "a"},
        {"role": "tool", "tool_call_id": "id-1", "name": "calc", "content": '{"result":391}'},
    ]
    assert run.tool_results == [
        {"tool_id": "echo", "result": "a"},
        {"tool_id": "calc", "result": {"result": 391}},
    ]


async def test_calls_without_an_id_get_one_that_is_the_same_in_every_attempt() -> None:
    """Some servers send none; ours is made of step and place, never of chance."""
    call = LLMToolCall(name="echo", arguments={"text": "a"})
    model = ScriptedModel(LLMResponse(tool_calls=[call, call]), says("done"))

    await execute(ReActPattern(), FakeRun(model).give(echo=echo()))

    assert [message["tool_call_id"] for message in tool_messages(model)] == ["call_1_1", "call_1_2"]


async def test_every_step_is_announced_and_closed() -> None:
    """`pattern.step_started` and `pattern.step_finished` come in pairs, counted from 1."""
    run = FakeRun(ScriptedModel(asks(("echo", {"text": "a"})), says("done"))).give(echo=echo())

    await execute(ReActPattern(), run)

    assert run.events == [
        ("pattern.step_started", {"step": 1}),
        ("pattern.step_finished", {"step": 1, "action": "tool_calls"}),
        ("pattern.step_started", {"step": 2}),
        ("pattern.step_finished", {"step": 2, "action": "final"}),
    ]


# --- tool errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        PermanentToolError("the disk is on fire", hint="try another disk"),
        ToolUnavailableError("nobody there"),
        ModelRetryError("argument must be positive"),
        ToolError("odd"),
        StepTooLarge("the result is larger than allowed"),
    ],
)
@pytest.mark.defect("P04")
async def test_a_tools_error_is_told_to_the_model_and_the_run_goes_on(error: OpenAgentsError) -> None:
    """The model reads code, message and hint, marked as an error, and may try something else."""
    model = ScriptedModel(asks(("failing", {})), says("I cannot"))

    answer = await execute(ReActPattern(), FakeRun(model).give(failing=failing(error)))

    [message] = tool_messages(model)
    told = {"error": error.code, "message": error.message} | ({"hint": error.hint} if error.hint else {})
    assert (answer, message["is_error"], json.loads(message["content"])) == ("I cannot", True, told)


async def test_an_unknown_tool_is_answered_with_the_name_that_was_meant() -> None:
    """A model that misspells a tool reads which one it meant."""
    model = ScriptedModel(asks(("ehco", {})), says("ok"))

    await execute(ReActPattern(), FakeRun(model).give(echo=echo(), calc=BUILTIN_TOOLS["calc"]()))

    told = json.loads(tool_messages(model)[0]["content"])
    assert told == {
        "error": "tool.not_found",
        "message": "there is no tool 'ehco'",
        "hint": "did you mean 'echo'?",
    }


async def test_arguments_that_are_no_json_are_answered_without_running_the_tool() -> None:
    """The model reads what was wrong with them; the tool is not called with guessed arguments."""
    called: list[str] = []

    async def note(text: str) -> None:
        called.append(text)

    broken = LLMToolCall(name="echo", id="x", raw_arguments="{", parse_error="unexpected end")
    model = ScriptedModel(LLMResponse(tool_calls=[broken]), says("ok"))

    await execute(ReActPattern(), FakeRun(model).give(echo=echo(before=note)))

    told = json.loads(tool_messages(model)[0]["content"])
    assert told["error"] == "tool.validation"
    assert "unexpected end" in told["message"]
    assert called == []


async def test_a_model_that_only_makes_errors_ends_the_run_with_the_last_of_them() -> None:
    """`max_tool_errors_in_a_row` turns without a good call end it; one good call starts the count anew."""
    bad, good = asks(("failing", {})), asks(("echo", {"text": "a"}), ("failing", {}))
    model = ScriptedModel(bad, good, bad, bad, says("never asked"))
    run = FakeRun(model).give(failing=failing(PermanentToolError("no")), echo=echo())

    with pytest.raises(PermanentToolError, match="no"):
        await execute(ReActPattern({"max_tool_errors_in_a_row": 2}), run)
    assert len(model.requests) == 4


@pytest.mark.parametrize(
    "error", [BudgetExhausted("spent"), MaxStepsExceeded("enough"), RunCancelled("stop")]
)
async def test_what_concerns_the_run_and_not_the_tool_ends_it(error: OpenAgentsError) -> None:
    """Budgets and cancellation are no matter of the model's."""
    model = ScriptedModel(asks(("failing", {})), says("never asked"))

    with pytest.raises(type(error)):
        await execute(ReActPattern(), FakeRun(model).give(failing=failing(error)))
    assert len(model.requests) == 1


# --- side by side ----------------------------------------------------------------------------------------


@pytest.mark.defect("P12")
async def test_safe_neighbours_run_side_by_side() -> None:
    """Three safe calls of one turn are inside their tool at the same time."""
    gate = Gate(expected=3)
    model = ScriptedModel(asks(*(("echo", {"text": t}) for t in "abc")), says("done"))

    await execute(ReActPattern(), FakeRun(model).give(echo=echo(before=lambda _: gate.meet())))

    assert gate.inside == 3


async def test_an_unsafe_call_waits_for_those_before_it_and_holds_those_after_it() -> None:
    """Only neighbours that are all safe share their time; the order of effects is the order of the calls."""
    seen: list[str] = []

    async def note(text: str) -> None:
        seen.append(f"+{text}")
        await asyncio.sleep(0)
        seen.append(f"-{text}")

    turn = asks(*((name, {"text": text}) for name, text in [("s", "a"), ("s", "b"), ("u", "c"), ("s", "d")]))
    run = FakeRun(ScriptedModel(turn, says("done"))).give(
        s=echo(before=note), u=echo(safe=False, before=note)
    )

    await execute(ReActPattern(), run)

    assert seen == ["+a", "+b", "-a", "-b", "+c", "-c", "+d", "-d"]


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.sampled_from(["safe", "unsafe", "failing", "unknown"]), st.integers(0, 3))))
def test_results_come_in_the_order_of_the_calls(plan: list[tuple[str, int]]) -> None:
    """Whatever is safe, slow or failing: the n-th tool message answers the n-th call."""

    async def turns(text: str) -> None:
        for _ in range(int(text)):
            await asyncio.sleep(0)

    turn = asks(*((name, {"text": str(n)} if name != "failing" else {}) for name, n in plan))
    model = ScriptedModel(turn, says("done"))
    run = FakeRun(model).give(
        safe=echo(before=turns), unsafe=echo(safe=False, before=turns), failing=failing(ToolError("no"))
    )

    asyncio.run(execute(ReActPattern(), run))

    expected = [(f"id-{i}", name) for i, (name, _) in enumerate(plan)]
    assert [(m["tool_call_id"], m["name"]) for m in tool_messages(model)] == expected
    good = [str(n) for name, n in plan if name in ("safe", "unsafe")]
    assert [result["result"] for result in run.tool_results] == good


async def test_a_signal_of_the_runtime_comes_out_of_a_group_and_leaves_nobody_behind() -> None:
    """The siblings are ended and awaited first, and the signal itself comes out, not a group around it."""
    gate, ended = Gate(expected=2), []

    async def held(text: str) -> None:
        try:
            await gate.meet()
            if text == "b":
                raise RuntimeSignal
            await asyncio.Event().wait()
        finally:
            ended.append(text)

    model = ScriptedModel(asks(("echo", {"text": "a"}), ("echo", {"text": "b"})), says("never asked"))

    with pytest.raises(RuntimeSignal):
        await execute(ReActPattern(), FakeRun(model).give(echo=echo(before=held)))
    assert sorted(ended) == ["a", "b"]


async def test_a_signal_of_the_runtime_goes_before_an_error_that_came_first() -> None:
    """A sibling that is put aside while a budget ends the group is still put aside."""
    gate = Gate(expected=2)

    async def held(text: str) -> None:
        await gate.meet()
        if text == "a":
            raise BudgetExhausted("spent")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise RuntimeSignal from None

    model = ScriptedModel(asks(("echo", {"text": "a"}), ("echo", {"text": "b"})))

    with pytest.raises(RuntimeSignal):
        await execute(ReActPattern(), FakeRun(model).give(echo=echo(before=held)))


async def test_cancelling_the_run_cancels_what_its_tools_do() -> None:
    """When `execute` is cancelled, no tool goes on in the background."""
    gate, ended = Gate(expected=2), []
    inside = asyncio.Event()

    async def held(text: str) -> None:
        try:
            await gate.meet()
            inside.set()
            await asyncio.Event().wait()
        finally:
            ended.append(text)

    model = ScriptedModel(asks(("echo", {"text": "a"}), ("echo", {"text": "b"})))
    running = asyncio.create_task(execute(ReActPattern(), FakeRun(model).give(echo=echo(before=held))))
    await inside.wait()

    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await running
    assert sorted(ended) == ["a", "b"]


# --- limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("configured", "budget", "limit"), [(2, None, 2), (5, 3, 3), (2, 9, 2)])
async def test_the_smallest_step_limit_counts(configured: int, budget: int | None, limit: int) -> None:
    """The request's budget can lower the agent's `max_steps`, never raise it."""
    model = ScriptedModel(*[asks(("echo", {"text": "again"}))] * 9)
    request = RunRequest(
        agent_id="a", session_id="s", input_text="", budget=RunBudget(max_steps=budget) if budget else None
    )

    with pytest.raises(MaxStepsExceeded, match=rf"^Pattern exceeded max_steps \({limit}\)"):
        await execute(
            ReActPattern({"max_steps": configured}), FakeRun(model, run_request=request).give(echo=echo())
        )
    assert len(model.requests) == limit


@pytest.mark.defect("P11")
async def test_a_step_that_takes_too_long_ends_the_run_and_its_tool() -> None:
    """Its error names the limit and the step, and the tool was cancelled, not left running."""
    ended: list[str] = []

    async def forever(text: str) -> None:
        try:
            await until_cancelled()
        finally:
            ended.append(text)

    model = ScriptedModel(asks(("echo", {"text": "a"})))

    with pytest.raises(StepTimeoutError, match=r"^Pattern step timed out after 20ms at step 1") as caught:
        await execute(ReActPattern({"step_timeout_ms": 20}), FakeRun(model).give(echo=echo(before=forever)))
    assert (caught.value.step_number, ended) == (1, ["a"])


async def test_somebody_elses_timeout_is_not_taken_for_the_steps() -> None:
    """Only the step's own deadline makes a `StepTimeoutError`."""

    async def times_out() -> LLMResponse:
        raise TimeoutError("the model's own")

    with pytest.raises(TimeoutError, match="the model's own"):
        await execute(ReActPattern(), FakeRun(ScriptedModel(times_out)))


async def test_a_step_runs_in_the_task_of_the_pattern() -> None:
    """Call keys are counted by task; a step in a task of its own would be another place in the program."""
    tasks: set[Any] = set()

    async def answer() -> LLMResponse:
        tasks.add(asyncio.current_task())
        return says("done")

    await execute(ReActPattern(), FakeRun(ScriptedModel(answer)))

    assert tasks == {asyncio.current_task()}


@pytest.mark.parametrize(
    "config", [{"max_steps": 0}, {"step_timeout_ms": 0}, {"native_tool_calls": False}, {"max_step": 3}]
)
def test_a_config_that_cannot_work_is_refused_at_load(config: dict[str, Any]) -> None:
    """Limits are positive, settings known, and tool calls native."""
    with pytest.raises(PluginConfigError, match=next(iter(config))):
        BUILTIN_PATTERNS["react"](config)


def test_the_originals_native_tool_calls_setting_is_accepted() -> None:
    """`native_tool_calls: true` says what is so anyway."""
    assert ReActPattern({"native_tool_calls": True}).cfg.max_steps == 16
