"""What is right where the original SDK has a defect, as far as no other test holds it."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from typing import Any

import pytest

from openagents_worker import Agent, RunContext, tool
from openagents_worker.agents import read_agents_file
from openagents_worker.errors import MaxStepsExceeded, PatternError
from openagents_worker.jsontext import dumps
from openagents_worker.models import RunState, StopReason
from openagents_worker.runtime.context import AttemptContext
from openagents_worker.runtime.start_checks import find_problems
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.support.runner import agent, calls, due, process, scripted

HERE = "tests.defects.test_defects"
MADE: Counter[str] = Counter()
PRICED = {"pricing": {"input": 1_000_000.0, "output": 0.0}}  # a dollar for each token of the input


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    MADE.clear()


@tool(durable_idempotent=False)
async def charge() -> str:
    """Take money."""
    MADE["charge"] += 1
    return "charged"


@tool(timeout_ms=20)
async def slow() -> str:
    """Take too long."""
    MADE["slow"] += 1
    await asyncio.Event().wait()
    return "never"


def with_tools(*replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    tools = [{"id": name, "impl": f"{HERE}.{name}"} for name in ("charge", "slow")]
    return agent(tools=tools, llm={**scripted(*replies), **fields})


@pytest.mark.defect("D10", "P14")
async def test_a_timeout_repeats_the_call_that_timed_out_and_not_the_run(redis_url: str) -> None:
    definition = with_tools(calls(("charge", {})), calls(("slow", {})), {"text": "gave up"})
    async with process(redis_url, definition) as p:
        await p.submit()
        await p.execute()
        while (await p.record()).state is RunState.RETRYING:
            await due(p)
            await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == "gave up"
        assert MADE["charge"] == 1
        assert MADE["slow"] > 1
        assert record.usage.tool_calls == 2


@pytest.mark.defect("B03")
async def test_a_known_price_is_not_reported_as_unknown(redis_url: str) -> None:
    async with process(redis_url, with_tools({"text": "hello"}, **PRICED)) as p:
        record = await p.run()
        names = await p.event_names()
        assert record.usage.cost_usd
        assert [name for name in names if name in ("llm.price_unknown", "budget.cost_skipped")] == []


@pytest.mark.defect("B06")
async def test_the_error_of_a_budget_says_what_is_used_up(redis_url: str) -> None:
    definition = with_tools(calls(("charge", {})), {"text": "hello"}, **PRICED)
    async with process(redis_url, definition) as p:
        record = await p.run(budget={"max_cost_usd": 0.5})
        assert record.result is not None
        assert record.result.stop_reason is StopReason.BUDGET_EXHAUSTED
        details = record.result.error_details
        assert details is not None
        assert (details.context["kind"], details.context["limit"]) == ("cost", 0.5)
        assert details.context["current"] == (record.usage.cost_usd or 0.0)


@pytest.mark.defect("P03")
async def test_the_model_gets_the_error_of_its_output_and_json_text_is_parsed(redis_url: str) -> None:
    asked: list[str] = []

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append(str(request.messages))
        return {"text": "warm" if len(asked) == 1 else '{"degrees": 21}'}

    schema = {"type": "object", "properties": {"degrees": {"type": "integer"}}, "required": ["degrees"]}
    async with ModelServer(reply) as server:
        llm = {"provider": "openai_compatible", "model": "m", "api_base": server.url}
        async with process(redis_url, agent(llm=llm)) as p:
            record = await p.run(output_type=schema)
    assert record.result is not None
    assert record.result.final_output == {"degrees": 21}
    assert len(asked) == 2
    assert "That answer does not fit" in asked[1]


@pytest.mark.defect("E03")
async def test_runs_at_the_same_time_have_their_own_metrics(redis_url: str) -> None:
    """Each has made one call of its model."""
    both_began = asyncio.Barrier(2)

    async def together(context: RunContext) -> str:
        await both_began.wait()
        reply = await context.call_llm("hello")
        await both_began.wait()
        return str(reply.output_text)

    definition = Agent("a", pattern=together, llm=scripted({"text": "one"}, {"text": "two"}))
    async with process(redis_url, definition) as p:
        for run_id in ("r1", "r2"):
            await p.submit(run_id, session_id=run_id)
        await asyncio.gather(p.execute("r1"), p.execute("r2"))
        for run_id in ("r1", "r2"):
            assert (await p.record(run_id)).usage.llm_calls == 1
            replies = [each for each in await p.events(run_id) if each["name"] == "llm.succeeded"]
            assert len(replies) == 1
            assert replies[0]["payload"]["_metrics"]


async def failing(context: RunContext) -> None:
    raise PatternError("three things are wrong:\n- the first\n- the second\n- the third")


@pytest.mark.defect("X02")
async def test_an_error_keeps_all_lines_of_its_message(redis_url: str) -> None:
    async with process(redis_url, Agent("a", pattern=failing, llm=scripted())) as p:
        record = await p.run()
        assert record.result is not None
        details = record.result.error_details
        assert details is not None
        assert "- the third" in details.message
        (event,) = [each for each in await p.events() if each["name"] == "run.failed"]
        assert "- the third" in event["payload"]["error_details"]["message"]


@pytest.mark.defect("D05")
async def test_the_items_of_a_batch_are_calls_like_any_other(redis_url: str) -> None:
    """They are counted, announced and recorded; beyond the budget, none is made."""

    async def batch(context: RunContext) -> Any:
        try:
            return await context.call_tool_batch([("charge", {})] * 3)
        except MaxStepsExceeded:
            return "caught"

    async with process(redis_url, Agent("a", pattern=batch, tools=[charge], llm=scripted())) as p:
        record = await p.run(budget={"max_tool_calls": 2})
        assert MADE["charge"] == 2
        assert record.usage.tool_calls == 2
        names = Counter(await p.event_names())
        assert names["tool.called"] == names["tool.succeeded"] == 2
        assert names["run.durable_idempotency_warning"] == 1


@pytest.mark.defect("D01")
async def test_the_tenth_step_is_stored_in_as_many_bytes_as_the_first(redis_url: str) -> None:
    """A record holds its own call only."""

    async def ten(context: RunContext) -> None:
        for _ in range(10):
            await context.call_tool("charge")

    async with process(redis_url, Agent("a", pattern=ten, tools=[charge], llm=scripted())) as p:
        await p.run()
        sizes = [len(dumps(record)) for record in await p.journal() if record["kind"] == "tool"]
        assert len(sizes) == 10
        assert max(sizes) - min(sizes) < 20, "the digits of the number of the call, and of its time"


@pytest.mark.defect("S09")
async def test_nothing_of_an_ended_run_is_kept_in_the_process(redis_url: str) -> None:
    async with process(redis_url, with_tools(*[{"text": "hello"}] * 5)) as p:
        for number in range(5):
            await p.run(f"r{number}", session_id=f"s{number}")
        gc.collect()
        kept = [each for each in gc.get_objects() if isinstance(each, AttemptContext)]
        assert [each for each in kept if each.run_request.run_id.startswith("r")] == []


@pytest.mark.defect("C01")
@pytest.mark.parametrize(
    ("where", "option"),
    [("runtime", "max_step"), ("pattern", "max_step"), ("memory", "max_item"), ("tool_executor", "timeout")],
)
def test_an_option_that_nothing_reads_is_refused(where: str, option: str) -> None:
    part: Any = {option: 1} if where == "runtime" else {"type": TYPES[where], "config": {option: 1}}
    file = read_agents_file(dumps({"agents": [agent(**{where: part})]}), env={})
    problems = find_problems(file, {})
    assert [problem for problem in problems if option in f"{problem.path} {problem.text}"]


TYPES = {"pattern": "react", "memory": "buffer", "tool_executor": "safe"}
