"""Patterns and tools written for the original SDK's contracts. Its package is not installed here."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from openagents_worker.models import RunState, StopReason
from tests.runtime import originals
from tests.support.runner import agent, calls, crash, process, scripted
from tests.support.waiting import await_for

HERE = "tests.runtime.originals"
LOOK = {"id": "look", "impl": f"{HERE}.Look"}
WORD = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    originals.CALLED.clear()
    originals.Bare.seen.clear()
    originals.BLOCKED[:] = [asyncio.Event()]


def duck(name: str, *replies: str | dict[str, Any], **fields: Any) -> dict[str, Any]:
    entries = [{"text": reply} if isinstance(reply, str) else reply for reply in replies]
    pattern = {"impl": f"{HERE}.{name}"}
    return agent(pattern=pattern, tools=[LOOK], llm=scripted(*entries), **fields)


async def test_every_method_of_the_originals_contract_works(redis_url: str) -> None:
    """What `setup` puts into its own context is kept, calls are recorded, and each event is there once."""
    async with process(redis_url, duck("Duck", "tea", "it is hot")) as p:
        record = await p.run()
        journal, events = await p.journal(), await p.events()
    assert record.result is not None
    assert record.result.final_output == {"greeting": "hello", "from": "setup", "answer": "it is hot"}
    assert record.result.finish_reason == "stop"
    assert [artifact.payload for artifact in record.result.artifacts] == [["about a", "about b"]]
    kinds = [each["kind"] for each in journal if each.get("kind") in ("model", "tool")]
    assert kinds == ["model", "tool", "tool", "tool", "model"]
    assert (record.usage.llm_calls, record.usage.tool_calls) == (2, 3)
    names = [event["name"] for event in events]
    assert [names.count(name) for name in ("llm.called", "llm.succeeded", "tool.called")] == [2, 2, 3]
    compressed = next(event["payload"] for event in events if event["name"] == "shop.compressed")
    assert compressed["size"] == 0
    assert "namespace(x=1)" in compressed["at"]


async def test_what_setup_changes_reaches_the_model(redis_url: str) -> None:
    """The input and the fragments of the context that `setup` has made."""
    sent: list[Any] = []
    async with process(redis_url, duck("Duck", "tea", "")) as p:
        model = p.runner._services.assembly.model(p.runner._services.assembly.config.agent("a"))
        respond = model.respond  # type: ignore[attr-defined]

        async def noted(request: Any) -> Any:
            sent.append(request.messages)
            return await respond(request)

        model.respond = noted  # type: ignore[attr-defined]
        record = await p.run()
    assert sent[0] == [{"role": "system", "content": "Go.\n\nHI\n\nBe kind."}]
    assert record.result is not None
    assert record.result.final_output["answer"] == "repaired"
    async with process(redis_url, duck("Duck")) as p:
        record = await p.run("r2", input_text="known", session_id="s2")
    assert record.result is not None
    assert record.result.final_output == "known"


async def test_a_duck_continues_after_a_crash(redis_url: str) -> None:
    """No finished call is made again."""
    definition = duck("Duck", "wait", "done")
    async with process(redis_url, definition, name="w1") as p, process(redis_url, definition, name="w2") as q:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: "wait" in originals.CALLED, "the tool waits")
        await crash(p, "r1", executing)
        await q.execute()
        record, names = await q.record(), await q.event_names()
    assert record.result is not None
    assert record.result.final_output["answer"] == "done"
    assert originals.CALLED == ["wait", "wait", "a", "b"]
    assert record.usage.llm_calls == 2
    assert names.count("shop.compressed") == 1


async def test_finalize_makes_the_output_and_may_refuse_it(redis_url: str) -> None:
    """The model gets the text of its `ModelRetryError`; without an output type as well."""
    async with process(redis_url, duck("Bare", "no", "yes")) as p:
        record = await p.run()
        retries = [each["payload"] for each in await p.events() if each["name"] == "validation.retry"]
    assert record.result is not None
    assert record.result.final_output == "yes"
    assert [(each["attempt"], each["error"]) for each in retries] == [(1, "longer, please")]
    assert [raw for raw, _ in originals.Bare.seen] == ["no", "yes"]


async def test_finalize_gets_the_type_of_the_output(redis_url: str) -> None:
    """It accepts JSON text (P03), and the runtime checks the result against the schema."""
    async with process(redis_url, duck("Bare", '{"wort": "tee"}', '```json\n{"word": "tea"}\n```')) as p:
        record = await p.run(output_type=WORD)
    assert record.result is not None
    assert record.result.final_output == {"word": "tea"}
    assert [schema for _, schema in originals.Bare.seen] == [WORD, WORD]


async def test_an_answer_that_is_refused_too_often_fails_the_run(redis_url: str) -> None:
    async with process(redis_url, duck("Bare", "no", "no")) as p:
        record = await p.run(budget={"max_validation_retries": 1})
    assert record.result is not None
    assert record.result.error_details is not None
    assert record.result.error_details.code == "execution.output_validation"
    assert "longer, please" in record.result.error_details.message


@pytest.mark.defect("B05")
async def test_b05_a_pattern_that_catches_the_error_of_a_budget_asks_no_model(redis_url: str) -> None:
    async with process(redis_url, duck("Greedy", "1", "2", "3")) as p:
        record = await p.run(budget={"max_tool_calls": 1})
    assert record.result is not None
    assert record.result.stop_reason is StopReason.MAX_STEPS
    assert (originals.CALLED, record.usage.llm_calls) == (["a"], 1)


@pytest.mark.defect("P10")
async def test_p10_max_steps_of_the_request_limits_the_model_calls(redis_url: str) -> None:
    async with process(redis_url, duck("Greedy", "1", "2", "3")) as p:
        record = await p.run(budget={"max_steps": 2})
    assert record.result is not None
    assert record.result.stop_reason is StopReason.MAX_STEPS
    assert record.usage.llm_calls == 2


async def test_a_call_of_call_llm_is_one_step_there_too(redis_url: str) -> None:
    async with process(redis_url, duck("Asker", "1", "2", "3")) as p:
        record = await p.run(budget={"max_steps": 2})
    assert record.result is not None
    assert record.result.stop_reason is StopReason.MAX_STEPS
    assert record.usage.llm_calls == 2


async def test_model_calls_of_a_tool_are_steps_after_a_crash_too(redis_url: str) -> None:
    """The tool is not called again, but it has asked the model of the pattern."""
    tools = [LOOK, {"id": "consult", "impl": f"{HERE}.Consult"}]
    definition = duck("Consulting", "1", "2", "3") | {"tools": tools}
    async with process(redis_url, definition, name="w1") as p, process(redis_url, definition, name="w2") as q:
        await p.submit(budget={"max_steps": 2})
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: "wait" in originals.CALLED, "the tool waits")
        await crash(p, "r1", executing)
        await q.execute()
        record = await q.record()
    assert record.result is not None
    assert record.result.stop_reason is StopReason.MAX_STEPS
    assert record.usage.llm_calls == 2


async def test_a_fallback_answers_for_a_failed_call(redis_url: str) -> None:
    """Its result is recorded as that of the call; without one the error goes to the model."""
    script = [calls(("look", {"word": "bad"})), calls(("look", {"word": "worse"})), {"text": "done"}]
    async with process(redis_url, agent(tools=[LOOK], llm=scripted(*script))) as p:
        record = await p.run()
        tools = [each for each in await p.journal() if each.get("kind") == "tool"]
        names = await p.event_names()
    assert record.state is RunState.COMPLETED
    assert tools[0]["outcome"] == {"ok": "instead of LookupError"}
    assert tools[1]["outcome"]["error"]["message"] == "LookupError: no worse"
    assert (names.count("tool.succeeded"), names.count("tool.failed")) == (1, 1)
    assert "no worse" in json.dumps(tools[1])


async def test_a_plugin_cannot_subscribe_to_events(redis_url: str) -> None:
    """The error says where the events can be watched."""
    async with process(redis_url, duck("Subscriber")) as p:
        record = await p.run()
    assert record.result is not None
    assert record.result.error_details is not None
    assert record.result.error_details.hint is not None
    assert "RunHandle.events()" in record.result.error_details.hint
