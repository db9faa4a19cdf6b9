"""The original SDK's own package, as the index has it today: its patterns, tools and errors in real runs."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from openagents_worker import Agent, register_output
from openagents_worker.agents import PatternRef
from openagents_worker.errors import OpenAgentsError, PluginConfigError, error_from_wire
from openagents_worker.models import ChunkKind, RunState, RunStreamChunk, StopReason
from openagents_worker.producer.client import AsyncClient
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.original.errors import as_original, translated
from openagents_worker.runtime.plugins import make_plugin
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.testing.model_server import ModelServer
from tests.support.runner import Process, agent, calls, due, process, scripted
from tests.support.waiting import await_for

pytestmark = pytest.mark.extras

BUILTIN = "openagents.plugins.builtin.pattern"
HERE = "tests.extras.original_plugins"
PATTERNS = {
    "react": f"{BUILTIN}.react.ReActPattern",
    "plan_execute": f"{BUILTIN}.plan_execute.PlanExecutePattern",
    "reflexion": f"{BUILTIN}.reflexion.ReflexionPattern",
    "subclass": f"{HERE}.Polite",
}
every_pattern = pytest.mark.parametrize("name", sorted(PATTERNS))
WORD = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}


@pytest.fixture(autouse=True)
def plugins(original_sdk_on_path: Path) -> Any:
    """The module of the plugins, with nothing called yet."""
    module = importlib.import_module(HERE)
    module.CALLED.clear()
    module.CANCELLED.clear()
    return module


def look(word: str) -> dict[str, Any]:
    return calls(("look", {"word": word}))


def text(answer: str) -> dict[str, Any]:
    return {"text": answer}


def of_pattern(
    name: str, *replies: dict[str, Any], tool: str = "Look", config: Any = None, **fields: Any
) -> dict[str, Any]:
    """An agent with a pattern of the package, or one of the plugins. `plan_execute` gets a plan first."""
    plan = [text('{"plan": []}')] if name == "plan_execute" else []
    pattern = {"impl": PATTERNS.get(name, f"{HERE}.{name}"), "config": config or {}}
    tools = [{"id": "look", "impl": f"{HERE}.{tool}"}]
    return agent(pattern=pattern, tools=tools, llm=scripted(*plan, *replies), **fields)


def of_ours(*replies: dict[str, Any], tool: str = "Look", **fields: Any) -> dict[str, Any]:
    return agent(tools=[{"id": "look", "impl": f"{HERE}.{tool}"}], llm=scripted(*replies), **fields)


async def result_of(p: Process, **fields: Any) -> Any:
    record = await p.run(**fields)
    assert record.result is not None
    return record.result


# --- patterns --------------------------------------------------------------------------------------------


@every_pattern
async def test_d11_p01_a_pattern_of_the_package_runs_and_its_calls_are_recorded(
    redis_url: str, name: str
) -> None:
    """Each model call is counted, and there is one event of each call, although the package emits its own."""
    async with process(redis_url, of_pattern(name, look("tea"), text("done"))) as p:
        result = await result_of(p)
        journal, events = await p.journal(), await p.events()
    expected = 3 if name == "plan_execute" else 2
    assert (result.final_output, result.finish_reason) == ("done", "stop")
    assert (result.usage.llm_calls, result.usage.tool_calls) == (expected, 1)
    assert sum(each.get("kind") == "model" for each in journal) == expected
    names = [event["name"] for event in events]
    for event, times in (("llm.called", expected), ("llm.succeeded", expected), ("tool.succeeded", 1)):
        assert names.count(event) == times
    actions = {event["payload"]["action"] for event in events if event["name"] == "pattern.step_finished"}
    assert actions <= {"continue", "final"}


async def test_p07_the_answer_of_plan_execute_is_that_of_the_model(redis_url: str) -> None:
    """The package returns `Plan executed` if no tool was called."""
    async with process(redis_url, of_pattern("plan_execute", text("THE ANSWER"))) as p:
        assert (await result_of(p)).final_output == "THE ANSWER"


async def test_p06_the_model_calls_a_tool_by_its_id(redis_url: str, plugins: Any) -> None:
    """The class of the tool has another name."""
    two = [{"id": id_, "impl": f"{HERE}.Look"} for id_ in ("look", "look_again")]
    script = [calls(("look_again", {"word": "tea"})), text("done")]
    async with process(redis_url, of_pattern("react", *script) | {"tools": two}) as p:
        assert (await result_of(p)).final_output == "done"
        assert [each["name"] for each in await p.journal() if each.get("kind") == "tool"] == ["look_again"]


@pytest.mark.parametrize("provider", ["openai_compatible", "openai_responses", "anthropic"])
@every_pattern
async def test_p09_a_pattern_of_the_package_may_use_each_provider(
    redis_url: str, name: str, provider: str
) -> None:
    """The server checks the conversation as the provider does.

    The package makes two messages of two calls in one reply.
    """
    two = {"tool_calls": [{"name": "look", "arguments": {"word": word}} for word in ("tea", "milk")]}

    def reply(request: Any) -> dict[str, Any]:
        if "about milk" in json.dumps(request.messages):
            return text("done")
        return two if request.body.get("tools") else text('{"plan": []}')

    async with ModelServer(reply) as server:
        url = server.url.removesuffix("/v1") if provider == "anthropic" else server.url
        llm = {"provider": provider, "model": "m", "api_base": url, "max_tokens": 100}
        async with process(redis_url, of_pattern(name) | {"llm": llm}) as p:
            result = await result_of(p)
    assert result.final_output == "done", result.error_details
    assert result.usage.tool_calls == 2


@pytest.mark.parametrize("pattern", ["ours", "theirs"])
async def test_p02_only_our_patterns_send_the_history(redis_url: str, pattern: str) -> None:
    """The package's patterns send their own prompt and the input."""
    sent: list[list[str]] = []

    def reply(request: Any) -> dict[str, Any]:
        sent.append([message["content"] for message in request.messages])
        return text("Hello, Ann.")

    async with ModelServer(reply) as server:
        llm = {"provider": "openai_compatible", "model": "m", "api_base": server.url}
        definition = (of_ours() if pattern == "ours" else of_pattern("react")) | {"llm": llm}
        async with process(redis_url, definition) as p:
            await result_of(p, input_text="I am Ann.")
            await result_of(p, run_id="r2", input_text="Who am I?")
    history = ["I am Ann.", "Hello, Ann."] if pattern == "ours" else []
    assert sent[1][1:] == [*history, "Who am I?"]


@every_pattern
async def test_p10_max_steps_is_a_stop_reason(redis_url: str, name: str) -> None:
    """The limit of the agent, which the package reports without a code, and that of the request."""
    script = [look(word) for word in "abcdef"]
    async with process(redis_url, of_pattern(name, *script, runtime={"max_steps": 2})) as p:
        result = await result_of(p)
        limited = await result_of(p, run_id="r2", session_id="s2", budget={"max_steps": 1})
    for each in (result, limited):
        assert (each.stop_reason, each.error_details.code) == (StopReason.MAX_STEPS, "execution.max_steps")
    assert limited.usage.llm_calls == 1


async def test_an_unknown_tool_has_a_code(redis_url: str) -> None:
    async with process(redis_url, of_pattern("react", calls(("lok", {})))) as p:
        details = (await result_of(p)).error_details
    assert details.code == "tool.not_found"
    assert "Did you mean 'look'?" in details.message


@pytest.mark.parametrize("name", ["react", "reflexion", "subclass"])
async def test_p11_a_step_that_takes_too_long_is_cancelled(redis_url: str, plugins: Any, name: str) -> None:
    """The tool does not go on. As in the package, the run ends; it is not tried again.

    The time limit of `plan_execute` covers its model calls only.
    """
    definition = of_pattern(name, look("slow"), config={"step_timeout_ms": 200})
    async with process(redis_url, definition) as p:
        result = await result_of(p)
    assert (result.stop_reason, plugins.CANCELLED) == (StopReason.TIMEOUT, ["slow"])
    assert "timed out after 200ms" in result.error_details.message


@every_pattern
async def test_b05_no_pattern_swallows_a_budget(redis_url: str, plugins: Any, name: str) -> None:
    """`plan_execute` shows the error to the model; here it makes no further call."""
    script = [look("a"), look("b"), look("c"), text("done")]
    async with process(redis_url, of_pattern(name, *script)) as p:
        result = await result_of(p, budget={"max_tool_calls": 1})
    assert (result.stop_reason, plugins.CALLED) == (StopReason.MAX_STEPS, ["a"])


async def test_b03_the_runtime_alone_enforces_the_cost(redis_url: str) -> None:
    """With a known price, the package's `call_llm` says that it is unknown, and checks it once more."""
    definition = of_pattern("Batch", text("done"))
    definition["llm"] |= {"model": "m", "pricing": {"input": 100, "output": 100}}
    async with process(redis_url, definition) as p:
        result = await result_of(p, input_text="a", budget={"max_cost_usd": 0.5})
        names = await p.event_names()
    assert result.final_output[1] == "done"
    assert "budget.cost_skipped" not in names


async def test_d05_a_batch_of_the_package_passes_the_guards(redis_url: str, plugins: Any) -> None:
    """Each item is a recorded call, counted and with its events. An error is the result of its item."""
    async with process(redis_url, of_pattern("Batch", text("done"))) as p:
        result = await result_of(p, input_text="a never b")
        names = await p.event_names()
        over = await result_of(
            p, run_id="r2", session_id="s2", input_text="c d", budget={"max_tool_calls": 1}
        )
    assert result.final_output == [["about a", "tool.permanent", "about b"], "done"]
    assert (result.usage.tool_calls, names.count("tool.called")) == (3, 3)
    assert (names.count("tool.batch.started"), names.count("tool.batch.completed")) == (1, 1)
    assert (over.stop_reason, plugins.CALLED) == (StopReason.MAX_STEPS, ["a", "never", "b", "c"])


async def test_a_subclass_may_change_setup_and_finalize(redis_url: str) -> None:
    """What its `setup` changes is in the prompt; its `finalize` may refuse an answer and clean one."""
    async with process(redis_url, of_pattern("subclass", text("rude"), text("Sir: fine"))) as p:
        result = await result_of(p)
        (first, second) = [each for each in await p.journal() if each.get("kind") == "model"]
    assert result.final_output == "fine"
    assert [artifact.payload for artifact in result.artifacts] == ["kept"]
    assert first["call"] != second["call"]


async def test_the_artifacts_of_a_session_reach_its_next_run(redis_url: str) -> None:
    """The package's `setup` accepts them only as objects of its own class."""
    async with process(redis_url, of_pattern("subclass", text("done"))) as p:
        await result_of(p)
        assert (await result_of(p, run_id="r2")).final_output == "done"
        assert p.store.keys("artifacts", "s1") in await p.store.redis.keys("*")


async def test_a_pattern_may_answer_without_a_model_and_repair_an_empty_answer(redis_url: str) -> None:
    """What `repair_empty_response` asks the model is a recorded call."""
    async with process(redis_url, of_pattern("Knows", text(""), text("repaired"))) as p:
        known = await result_of(p, input_text="known")
        repaired = await result_of(p, run_id="r2", session_id="s2")
    assert (known.final_output, known.usage.llm_calls) == ("I know", 0)
    assert (repaired.final_output, repaired.usage.llm_calls) == ("repaired", 2)


async def test_a_pattern_of_the_package_is_cancelled(redis_url: str, plugins: Any) -> None:
    async with process(redis_url, of_pattern("react", look("slow"))) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: plugins.CALLED, "the tool begins")
        p.runner.latch("r1", LatchReason.CANCELLED)
        await executing
        record = await p.record()
    assert (record.state, plugins.CANCELLED) == (RunState.CANCELLED, ["slow"])


class Word(BaseModel):
    word: str


@every_pattern
async def test_p03_structured_output_is_parsed_and_corrected(redis_url: str, name: str) -> None:
    """JSON in the model's text is an output, and the model learns why another answer is not."""
    script = [text('{"wort": "tee"}'), text('{"word": "tea"}')]
    async with process(redis_url, of_pattern(name, *script)) as p:
        result = await result_of(p, output_type=WORD)
        retries = [each for each in await p.events() if each["name"] == "validation.retry"]
    assert result.final_output == {"word": "tea"}
    assert [each["payload"]["attempt"] for each in retries] == [1]


async def test_finalize_gets_the_registered_class(redis_url: str) -> None:
    """It may hand a text of JSON to the `finalize` of the package."""
    register_output("extras-word", Word)
    async with process(redis_url, of_pattern("subclass", text("{}"), text('Sir: {"word": "tea"}'))) as p:
        result = await result_of(p, output_type="extras-word")
    assert result.final_output == {"word": "tea"}


def test_a_mistake_in_the_config_of_a_pattern_is_found_at_start() -> None:
    ref = PatternRef(impl=PATTERNS["react"], config={"max_steps": "many"})
    with pytest.raises(PluginConfigError, match="invalid config"):
        make_plugin("pattern", ref, {})


# --- errors ----------------------------------------------------------------------------------------------


def every_class(base: Any) -> Iterator[Any]:
    yield base
    for kind in base.__subclasses__():
        if not issubclass(kind, OpenAgentsError):
            yield from every_class(kind)


def test_every_error_class_of_the_package_is_one_of_ours() -> None:
    """Code and `retryable` are the same, before and after the journal, and each can be caught as theirs."""
    base = importlib.import_module("openagents.errors.exceptions").OpenAgentsError
    classes = [kind for kind in every_class(base) if kind.__module__.startswith("openagents.")]
    assert len(classes) >= 31
    for kind in classes:
        error = translated(kind("what\nhappened", hint="do this").with_context(run_id="r"))
        assert error is not None
        for each in (error, error_from_wire(error.to_dict())):
            assert (each.code, each.retryable) == (kind.code, kind.retryable)
            assert (each.message, each.hint, each.run_id) == ("what\nhappened", "do this", "r")
            assert type(each).__name__ == kind.__name__
            assert isinstance(as_original(each), kind)
            assert isinstance(as_original(each), type(each))


def test_a_class_of_a_user_keeps_what_it_says(plugins: Any) -> None:
    """Its own code, its delay, the kind of error that it is, and a changed `retryable`."""
    for word, code in (("busy", "shop.busy"), ("often", "tool.error")):
        raised = plugins.RAISED[word]()
        error = translated(raised)
        assert error is not None
        read = error_from_wire(error.to_dict())
        for each in (error, read, error_from_wire(read.to_dict())):
            assert (each.code, each.retryable) == (code, True)
            assert isinstance(as_original(each), type(raised) if word == "busy" else plugins.ToolError)
    assert read.to_dict()["code"] == "tool.error"
    busy = error_from_wire(translated(plugins.RAISED["busy"]()).to_dict())  # type: ignore[union-attr]
    assert (getattr(busy, "retry_after_ms", None), busy.to_dict()["context"]["retry_after_ms"]) == (40, 40)


@pytest.mark.parametrize(
    ("word", "code"), [("busy", "shop.busy"), ("often", "tool.error"), ("retry", "tool.retryable")]
)
async def test_a_retryable_error_of_a_tool_is_retried(
    redis_url: str, plugins: Any, word: str, code: str
) -> None:
    """The run is suspended with the code; after the last retry it is in the result, with all that it says."""
    async with process(redis_url, of_pattern("react", look(word))) as p:
        await p.submit(budget={"max_resume_attempts": 1})
        suspended = await p.execute()
        assert (suspended.kind, suspended.reason) == (AttemptOutcome.SUSPENDED, code)
        assert word != "busy" or (suspended.delay_ms or 0) >= 40
        await due(p)
        await p.execute()
        record = await p.record()
    assert record.result is not None
    details = record.result.error_details
    assert details is not None
    assert (details.code, details.retryable, plugins.CALLED) == (code, True, [word, word])
    if word == "busy":
        assert (details.message, details.hint) == ("come back\nlater", "at noon")
        assert details.context["retry_after_ms"] == 40


async def test_an_error_of_a_pattern_keeps_its_code(redis_url: str) -> None:
    async with process(redis_url, of_pattern("Raising")) as p:
        details = (await result_of(p, input_text="busy")).error_details
        plain = (await result_of(p, run_id="r2", input_text="plain", session_id="s2")).error_details
    assert (details.code, details.retryable, details.message) == ("shop.busy", True, "come back\nlater")
    assert "original_plugins.py" in (details.traceback or "")
    assert (plain.code, plain.message) == ("pattern.error", "LookupError: a bug")


@pytest.mark.parametrize(
    ("word", "caught"),
    [
        ("never", ["permanent", "tool.permanent", "no such word"]),
        ("other", ["model retry", "llm.model_retry"]),
        ("busy", ["rate limit", "shop.busy", 40, True, False]),
        ("plain", ["other", "tool.error"]),
    ],
)
async def test_a_pattern_catches_errors_by_the_classes_of_the_package(
    redis_url: str, word: str, caught: list[Any]
) -> None:
    """Also those that the runtime has read from the journal. Attributes of their own are lost."""
    async with process(redis_url, of_pattern("Catching")) as p:
        result = await result_of(p, input_text=word, budget={"max_resume_attempts": 0})
    assert result.final_output == caught


async def test_p04_our_react_shows_every_error_of_a_tool_to_the_model(redis_url: str) -> None:
    """The package's ends the run with the code of the error, also of a `ModelRetryError`."""
    script = [look("other"), look("never"), look("plain"), text("done")]
    async with process(redis_url, of_ours(*script)) as p:
        assert (await result_of(p)).final_output == "done"
        assert (await p.event_names()).count("tool.retry_requested") == 1
    async with process(redis_url, of_pattern("react", *script)) as p:
        details = (await result_of(p, run_id="r2", session_id="s2")).error_details
    assert (details.code, details.message) == ("llm.model_retry", "another word, please")


# --- tools -----------------------------------------------------------------------------------------------


async def test_the_result_objects_of_the_package_are_unwrapped(redis_url: str) -> None:
    script = [look("success"), look("failure"), look("executed"), text("done")]
    async with process(redis_url, of_ours(*script)) as p:
        result = await result_of(p, budget={"max_resume_attempts": 0})
        outcomes = [each["outcome"] for each in await p.journal() if each.get("kind") == "tool"]
    assert result.final_output == "done"
    assert outcomes[0] == {"ok": {"found": 1}}
    assert outcomes[1]["error"]["message"] == "it was not found"
    assert outcomes[2]["error"]["code"] == "shop.busy"


@pytest.mark.parametrize("pattern", ["ours", "theirs"])
async def test_a_fallback_is_the_result_of_a_failed_call(redis_url: str, pattern: str) -> None:
    """It is recorded; the package's own `fallback` raises the error again."""
    script = [look("never"), text("done")]
    make = of_ours if pattern == "ours" else lambda *replies, **more: of_pattern("react", *replies, **more)
    async with process(redis_url, make(*script, tool="LookOrGuess")) as p:
        assert (await result_of(p)).final_output == "done"
        outcomes = [each["outcome"] for each in await p.journal() if each.get("kind") == "tool"]
    assert outcomes == [{"ok": "a guess, after tool.permanent"}]


@pytest.mark.parametrize("by", ["impl", "type"])
async def test_p14_functions_with_the_decorator_of_the_package_are_tools(redis_url: str, by: str) -> None:
    """By their path, or by the name under which the package has registered them."""
    named = {"impl": [f"{HERE}.greet", f"{HERE}.loud", f"{HERE}.add"], "type": ["greet", "shout", "add"]}[by]
    tools = [{"id": id_, by: name} for id_, name in zip(("greet", "loud", "add"), named, strict=True)]
    script = [
        calls(("greet", {"name": "Ann"}), ("loud", {"name": "Bob"}), ("add", {"first": 1, "second": 2})),
        text("done"),
    ]
    async with process(redis_url, agent(tools=tools, llm=scripted(*script))) as p:
        assert (await result_of(p)).final_output == "done"
        outcomes = [each["outcome"]["ok"] for each in await p.journal() if each.get("kind") == "tool"]
    assert outcomes == [{"hello": "Ann", "run": "r1"}, "BOB", 3]


async def test_a_run_waits_for_an_approval_inside_a_pattern_of_the_package(
    redis_url: str, plugins: Any
) -> None:
    """It holds no slot meanwhile, and the time limit of the step does not end the wait."""
    tools = [{"id": "look", "impl": f"{HERE}.Look", "approval": "always"}]
    definition = of_pattern("react", look("tea"), text("done"), config={"step_timeout_ms": 3_000})
    async with process(redis_url, definition | {"tools": tools}) as p, AsyncClient(redis_url) as client:
        await p.submit()
        parked = await p.execute()
        assert (parked.kind, (await p.record()).state) == (
            AttemptOutcome.SUSPENDED,
            RunState.AWAITING_APPROVAL,
        )
        (asked,) = await client.handle("r1").approvals()
        await client.approve("r1", asked.call_id, by="bob")
        await p.execute()
        record = await p.record()
    assert record.result is not None
    assert (record.result.final_output, plugins.CALLED) == ("done", ["tea"])
    assert record.usage.llm_calls == 2


async def test_a_memory_of_the_package_remembers(redis_url: str) -> None:
    memory = {"impl": "openagents.plugins.builtin.memory.buffer.BufferMemory"}
    async with process(redis_url, of_pattern("react", text("first"), text("second"), memory=memory)) as p:
        await result_of(p)
        await result_of(p, run_id="r2")
        view = [each for each in await p.journal("r2") if each.get("kind") == "memory"]
    assert [turn["output"] for turn in view[0]["outcome"]["ok"]["history"]] == ["first"]


def test_the_chunks_of_a_stream_are_those_of_the_package(original_sdk_on_path: Path) -> None:
    """The same kinds and the same fields: what one of them writes the other reads."""
    theirs = importlib.import_module("openagents.interfaces.runtime")
    kinds = {str(kind.value) for kind in theirs.RunStreamChunkKind}
    assert kinds == set(map(str, ChunkKind))
    assert set(theirs.RunStreamChunk.model_fields) == set(RunStreamChunk.model_fields)
    ours = RunStreamChunk(kind=ChunkKind.LLM_DELTA, run_id="r1", sequence=3, payload={"text": "hi"})
    read = theirs.RunStreamChunk.model_validate_json(ours.model_dump_json())
    assert RunStreamChunk.model_validate_json(read.model_dump_json()) == ours


# --- jobs and executors ----------------------------------------------------------------------------------


def with_job(**fields: Any) -> dict[str, Any]:
    tools = [{"id": "look", "impl": f"{HERE}.Printer", **fields}]
    return agent(tools=tools, llm=scripted(look("pandas"), text("done")))


@pytest.mark.parametrize("background", [True, None])
async def test_a_tool_of_the_package_starts_a_job_if_the_file_says_so(
    redis_url: str, plugins: Any, background: bool | None
) -> None:
    """Its class does not say it. The handle is given back as it was."""
    async with process(redis_url, with_job(background=background)) as p:
        result = await result_of(p)
        assert result.final_output == "done"
        expected = ["start", ("poll", "7", 1.0), ("poll", "7", 1.0)] if background else ["invoke"]
        assert expected == plugins.CALLED


async def test_a_pattern_of_the_package_may_call_tools_in_the_background(
    redis_url: str, plugins: Any
) -> None:
    """Such a call is a recorded call like any other, with its job at the service; its states are recorded."""
    tools = [{"id": "look", "impl": f"{HERE}.Printer", "background": True}]
    definition = agent(pattern={"impl": f"{HERE}.Waits"}, tools=tools, llm=scripted())
    async with process(redis_url, definition) as p:
        result = await result_of(p)
        assert result.error_details is None
        assert result.final_output == [["running", "succeeded"], {"printed": True}, True]
        assert plugins.CALLED.count("start") >= 1
        kinds = [entry["kind"] for entry in await p.journal()]
        assert kinds.count("tool") == 2
        assert "tool.background.completed" in await p.event_names()


EXECUTORS = "openagents.plugins.builtin.tool_executor"


@pytest.mark.parametrize(
    ("path", "config"),
    [
        ("safe.SafeToolExecutor", {"default_timeout_ms": 1_000}),
        ("retry.RetryToolExecutor", {"max_attempts": 2, "initial_delay_ms": 1}),
        ("filesystem_aware.FilesystemAwareExecutor", {"deny_tools": []}),
        ("concurrent_batch.ConcurrentBatchExecutor", {}),
    ],
)
async def test_an_executor_of_the_package_makes_the_calls(
    redis_url: str, plugins: Any, path: str, config: dict[str, Any]
) -> None:
    executor = {"impl": f"{EXECUTORS}.{path}", "config": config}
    async with process(redis_url, of_ours(look("pandas"), text("done"), tool_executor=executor)) as p:
        result = await result_of(p)
        assert result.final_output == "done", result.error_details
        assert len(plugins.CALLED) == 1


async def test_a_denial_of_an_executor_of_the_package_keeps_its_reason(redis_url: str, plugins: Any) -> None:
    path = f"{EXECUTORS}.filesystem_aware.FilesystemAwareExecutor"
    executor = {"impl": path, "config": {"deny_tools": ["look"]}}
    async with process(redis_url, of_ours(look("pandas"), text("done"), tool_executor=executor)) as p:
        await result_of(p)
        (failed,) = [event["payload"] for event in await p.events() if event["name"] == "tool.failed"]
        assert "is denied" in failed["error"]
        assert plugins.CALLED == []


# --- the router ------------------------------------------------------------------------------------------


async def test_r03_the_router_returns_the_task_info_of_the_package(redis_url: str) -> None:
    """And None for an unknown task, as the package's own router does."""
    kind = importlib.import_module("openagents.interfaces.agent_router").TaskInfo

    async def polls(context: Any) -> Any:
        router = context.agent_router
        started = await router.delegate("a", "go", context, background=True)
        info = await router.task_status(started.task_id)
        assert type(info) is kind
        return [vars(info), await router.task_status("another")]

    own = Agent("polls", pattern=polls, llm={"provider": "mock"})
    async with process(redis_url, agent(), own, multi_agent={"enabled": True}) as p:
        result = await result_of(p, agent_id="polls")
    info, unknown = result.final_output
    assert info == {**info, "agent_id": "a", "status": "running", "output": "", "error": ""}
    assert unknown is None
