"""Every limit of a budget: it ends the run, or the run waits and is extended, and nothing is done twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from openagents_worker import Agent, RunContext, ToolContext
from openagents_worker import tool as tool_function
from openagents_worker.models import RunRecord, RunState, StopReason, WaitKind
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.runtime import clock
from openagents_worker.testing.model_server import ModelServer
from tests.runtime import plugins, talking
from tests.runtime.talking import Script, talker
from tests.runtime.test_extending import extend, payloads
from tests.runtime.test_replay import executed_until, open_gates, patterned, tool
from tests.support.runner import Process, calls, crash, process, scripted
from tests.support.waiting import await_for

LIMITS: dict[str, tuple[float, float, str]] = {
    "max_steps": (1, 10, "steps"),
    "max_tool_calls": (1, 10, "tool_calls"),
    "max_total_tokens": (1, 10**6, "tokens"),
    "max_cost_usd": (1e-9, 100.0, "cost"),
    "max_duration_ms": (60_000, 600_000, "duration"),
}
"""Limit -> a value that is used up after the first step, a larger one, and the kind that its error names."""
STOPS = {"max_steps": StopReason.MAX_STEPS, "max_tool_calls": StopReason.MAX_STEPS}
REPLIES = [calls(("add", {"x": 1})), calls(("add", {"x": 2})), {"text": "Done."}]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock by which runs measure their active time. A test moves it."""
    at = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: at.s))
    return at


@asynccontextmanager
async def workers(redis_url: str, now: SimpleNamespace, count: int = 1) -> AsyncIterator[tuple[Any, ...]]:
    """The script of the model, then these processes. Each model call takes 90 s by the clock of runs."""
    script = Script()

    def answer(asked: Any) -> Any:
        now.s += 90
        return script(asked)

    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(ModelServer(answer))
        script.by_run = {"r1": REPLIES}
        made = [
            await stack.enter_async_context(process(redis_url, talker(server.url), name=f"w{n}"))
            for n in range(count)
        ]
        yield (script, *made)


async def count_time(p: Process, now: SimpleNamespace) -> None:
    """Redis counts the active time of earlier attempts by its own clock: add what the test's clock shows."""
    await p.store.redis.hset(p.store.keys("run", "r1"), "active_ms", round((now.s - 1000) * 1000))


def result(record: RunRecord) -> Any:
    assert record.result is not None
    return record.result


@pytest.mark.parametrize("limit", LIMITS)
async def test_a_limit_ends_the_run_with_its_own_stop_reason(
    redis_url: str, now: SimpleNamespace, limit: str
) -> None:
    """The result has the usage so far, and its error names the limit and how much was used."""
    small, _, kind = LIMITS[limit]
    async with workers(redis_url, now) as (script, p):
        await p.submit(budget={limit: small})
        await p.execute()
        ended = result(await p.record())

    assert ended.stop_reason is STOPS.get(limit, StopReason.BUDGET_EXHAUSTED)
    assert ended.usage.llm_calls == len(script.asked.get("r1", ())) <= 2
    context = ended.error_details.context
    assert (context["kind"], context["limit"]) == (kind, small)
    assert context["current"] >= small or kind == "cost"


@pytest.mark.parametrize("limit", LIMITS)
async def test_a_paused_run_goes_on_after_an_extension_and_a_death(
    redis_url: str, now: SimpleNamespace, limit: str
) -> None:
    """It waits once for each limit, the worker that takes the extension dies, and the next one finishes."""
    small, large, _ = LIMITS[limit]
    async with workers(redis_url, now, 3) as (script, one, two, three):
        script.by_run["r1"] = [*REPLIES[:2], calls(("wait", {})), REPLIES[2]]
        talking.BEGUN.clear()
        await one.submit(budget={limit: small, "on_breach": "pause"})
        await one.execute()
        paused = await one.record()
        await count_time(one, now)
        await extend(one, **{limit: large})
        dying = await executed_until(two, lambda: "r1" in talking.BEGUN, "the tool waits")
        await crash(two, "r1", dying)
        await count_time(two, now)
        talking.LET_GO.add("r1")
        await three.execute()
        talking.LET_GO.discard("r1")
        record = await three.record()
        exceeded = await payloads(three, "run.budget_exceeded")
        extended = await payloads(three, "run.budget_extended")

    assert paused.state is RunState.PAUSED
    assert [(each.kind, each.name) for each in paused.waiting] == [(WaitKind.BUDGET, limit)]
    assert record.state is RunState.COMPLETED, record.result
    assert [each["kind"] for each in exceeded] == [limit]
    assert [each["budget"] for each in extended] == [{limit: large}]
    assert len(script.asked["r1"]) == record.usage.llm_calls == 4
    assert record.usage.tool_calls == 3


@pytest.mark.parametrize("limit", LIMITS)
async def test_a_run_that_was_extended_before_goes_on_after_a_death(
    redis_url: str, now: SimpleNamespace, limit: str
) -> None:
    """Also if its budget ends it. The worker that takes over knows the extension from the journal."""
    small, large, _ = LIMITS[limit]
    async with workers(redis_url, now, 2) as (script, one, two):
        script.by_run["r1"] = [*REPLIES[:2], calls(("wait", {})), REPLIES[2]]
        talking.BEGUN.clear()
        await one.submit(budget={limit: small})
        await extend(one, **{limit: large})
        dying = await executed_until(one, lambda: "r1" in talking.BEGUN, "the tool waits")
        await crash(one, "r1", dying)
        await count_time(one, now)
        talking.LET_GO.add("r1")
        await two.execute()
        talking.LET_GO.discard("r1")
        record = await two.record()

    assert record.state is RunState.COMPLETED, record.result
    assert len(script.asked["r1"]) == 4


# --- cost ------------------------------------------------------------------------------------------------


class Parallel(PatternPlugin):
    """Asks the model twice at the same time."""

    async def execute(self) -> list[str]:
        replies = await asyncio.gather(*(self.context.call_llm(text) for text in ("one", "two")))
        return [reply.output_text for reply in replies]


def priced(url: str, **fields: Any) -> dict[str, Any]:
    """An agent whose replies cost up to 1 USD: 1,000 tokens at 1,000 USD a million. They do cost 0.2 USD."""
    llm = {"pricing": {"input": 0.0, "output": 1000.0}, "max_tokens": 1000}
    talking = talker(url, **fields)
    return {**talking, "llm": {**talking["llm"], **llm}}


def cheap(*_: Any) -> dict[str, Any]:
    return {"text": "Done.", "usage": {"input_tokens": 1, "output_tokens": 200}}


async def test_a_call_that_may_exceed_the_cost_is_not_made(redis_url: str) -> None:
    """The most that it can cost is reserved before: no call can exceed the limit without bound."""
    async with ModelServer(cheap) as server, process(redis_url, priced(server.url)) as p:
        refused = result(await p.run(budget={"max_cost_usd": 0.9}))
        allowed = result(await p.run("r2", budget={"max_cost_usd": 1.0}))

    assert (refused.stop_reason, refused.usage.llm_calls) == (StopReason.BUDGET_EXHAUSTED, 0)
    assert "may cost 1.0" in refused.error_details.message
    assert "llm.max_tokens" in refused.error_details.hint
    assert (allowed.final_output, allowed.usage.cost_usd) == ("Done.", 0.2)


@pytest.mark.parametrize(("limit", "side_by_side"), [(1.5, 1), (2.0, 2)])
async def test_calls_side_by_side_reserve_their_cost_together(
    redis_url: str, limit: float, side_by_side: int
) -> None:
    """A call that does not fit beside another one waits until that has ended, and cost less."""
    working, most = 0, 0
    both = asyncio.Event()

    async def reply(asked: Any) -> dict[str, Any]:
        nonlocal working, most
        working += 1
        most = max(most, working)
        if working == side_by_side:
            both.set()
        await both.wait()
        working -= 1
        return cheap()

    pattern = {"impl": f"{__name__}.Parallel"}
    async with ModelServer(reply) as server, process(redis_url, priced(server.url, pattern=pattern)) as p:
        ended = result(await p.run(budget={"max_cost_usd": limit}))

    assert (ended.final_output, ended.usage.cost_usd) == (["Done.", "Done."], 0.4)
    assert most == side_by_side


@pytest.mark.parametrize(("limit", "side_by_side"), [(300, 1), (1_900, 1), (2_500, 2)])
async def test_calls_side_by_side_reserve_their_tokens_together(
    redis_url: str, limit: int, side_by_side: int
) -> None:
    """A call whose estimated tokens do not fit beside another one waits for its end. Each may use more than
    1,000, and uses 201."""
    working, most = 0, 0
    together = asyncio.Event()

    async def reply(asked: Any) -> dict[str, Any]:
        nonlocal working, most
        working += 1
        most = max(most, working)
        if working == side_by_side:
            together.set()
        await together.wait()
        working -= 1
        return cheap()

    pattern = {"impl": f"{__name__}.Parallel"}
    async with ModelServer(reply) as server, process(redis_url, priced(server.url, pattern=pattern)) as p:
        ended = result(await p.run(budget={"max_total_tokens": limit}))

    assert (ended.final_output, ended.usage.total_tokens) == (["Done.", "Done."], 402)
    assert most == side_by_side


async def test_calls_side_by_side_pass_the_limit_of_tokens_by_one_call_at_most(redis_url: str) -> None:
    """As calls one after the other do: the one that begins last may use more than is left."""

    async def program(context: RunContext) -> None:
        await asyncio.gather(*(context.call_llm(str(number)) for number in range(5)))

    definition = Agent("a", pattern=program, llm=scripted(*[cheap()] * 5))
    async with process(redis_url, definition) as p:
        ended = result(await p.run(budget={"max_total_tokens": 300}))

    assert ended.stop_reason is StopReason.BUDGET_EXHAUSTED
    assert (ended.usage.llm_calls, ended.usage.total_tokens) == (2, 402)


async def test_a_pattern_cannot_catch_a_refused_call(redis_url: str) -> None:
    """Nor go on with something else (B05)."""
    pattern = {"impl": f"{__name__}.Careless"}
    async with ModelServer(cheap) as server, process(redis_url, priced(server.url, pattern=pattern)) as p:
        ended = result(await p.run(budget={"max_cost_usd": 0.5}))

    assert (ended.stop_reason, ended.final_output) == (StopReason.BUDGET_EXHAUSTED, None)
    assert [artifact.name for artifact in ended.artifacts] == ["draft"]


class Careless(PatternPlugin):
    """Adds an artifact, and catches every error of the model."""

    async def execute(self) -> str:
        self.add_artifact("draft", payload="so far")
        with suppress(Exception):
            await self.context.call_llm("one")
        return "I do not need a model."


# --- in the middle of a call -----------------------------------------------------------------------------


async def test_a_call_ends_before_the_time_pauses_the_run(redis_url: str, now: SimpleNamespace) -> None:
    """So nothing has to be made twice. Without a pause, the call is cancelled."""
    async with process(redis_url, patterned("Steps", tool("Charge"), n=2)) as p:
        await p.submit(budget={"max_duration_ms": 60_000, "on_breach": "pause"})
        begun = ("begin", "charge", 0)
        executing = await executed_until(p, lambda: any(e[:3] == begun for e in plugins.LOG), "a call begins")
        now.s += 90
        open_gates("charge-0", "charge-1")
        await executing
        paused = await p.record()
        made = plugins.executed("charge")
        await extend(p, max_duration_ms=120_000)
        await p.execute()
        record = await p.record()

    assert paused.state is RunState.PAUSED
    assert made == [0]
    assert record.state is RunState.COMPLETED
    assert plugins.executed("charge") == [0, 1]


async def test_time_in_which_a_run_is_paused_does_not_count(redis_url: str, now: SimpleNamespace) -> None:
    """The extension is for the whole active time: 60 s more than the first limit are 60 s more of work."""
    async with workers(redis_url, now) as (_, p):
        await p.submit(budget={"max_duration_ms": 60_000, "on_breach": "pause"})
        await p.execute()
        await count_time(p, now)
        now.s += 10_000_000  # of waiting
        await extend(p, max_duration_ms=120_000)
        await p.execute()
        exceeded = await payloads(p, "run.budget_exceeded")

    assert [each["limit"] for each in exceeded] == [60_000, 120_000]
    assert exceeded[1]["current"] == 180_000


async def test_an_extension_of_the_time_lets_a_call_go_on(redis_url: str, now: SimpleNamespace) -> None:
    """It comes while a call is made, in a run that its budget would end."""
    async with process(redis_url, patterned("Steps", tool("Charge"), n=2)) as p:
        await p.submit(budget={"max_duration_ms": 60_000})
        begun = ("begin", "charge", 0)
        executing = await executed_until(p, lambda: any(e[:3] == begun for e in plugins.LOG), "a call begins")
        await extend(p, max_duration_ms=600_000)
        now.s += 90
        open_gates("charge-0", "charge-1")
        await executing
        record = await p.record()

    assert record.state is RunState.COMPLETED, record.result
    assert plugins.executed("charge") == [0, 1]


async def test_an_extension_that_was_taken_for_another_limit_extends_the_time(redis_url: str) -> None:
    """A run that has got both with one extension does not end when the first time is over."""
    async with process(redis_url, patterned("Steps", tool("Charge"), n=2)) as p:
        await p.submit(budget={"max_tool_calls": 1, "max_duration_ms": 500})
        await extend(p, max_tool_calls=9, max_duration_ms=600_000)
        open_gates("charge-0")
        begun = ("begin", "charge", 1)
        executing = await executed_until(p, lambda: any(e[:3] == begun for e in plugins.LOG), "a call begins")
        own_clock = p.runner._attempts["r1"]._clock
        await await_for(lambda: executing.done() or own_clock.active_ms > 700, "the first time is over")
        open_gates("charge-1")
        await executing
        record = await p.record()

    assert record.state is RunState.COMPLETED, record.result


@pytest.mark.parametrize("on_breach", ["end", "pause"])
async def test_a_limit_is_reached_beside_a_call_in_progress(redis_url: str, on_breach: str) -> None:
    """A run that ends cancels the call. A run that is paused lets it end, and does not make it again."""
    both = patterned("Branches", tool("Charge", safe=True), tool("Look", safe=True))
    async with process(redis_url, both) as p:
        await p.submit(budget={"max_tool_calls": 2, "on_breach": on_breach})
        open_gates("look-alice", "charge-alice", "charge-bob")
        executing = await executed_until(p, lambda: plugins.executed("look") == ["alice"], "one has looked")
        if on_breach == "pause":
            await await_for(lambda: _has(p, "run.budget_exceeded"), "the limit is reached")
            assert not executing.done()
            open_gates("look-bob")
        await executing
        record = await p.record()
        if on_breach == "pause":
            assert record.state is RunState.PAUSED
            await extend(p, max_tool_calls=4)
            await p.execute()
            record = await p.record()

    assert result(record).stop_reason is (
        StopReason.COMPLETED if on_breach == "pause" else StopReason.MAX_STEPS
    )
    assert plugins.executed("look") == (["alice", "bob"] if on_breach == "pause" else ["alice"])


async def _has(p: Process, name: str) -> bool:
    return name in await p.event_names()


async def test_calls_inside_a_finished_call_count_after_a_death(redis_url: str) -> None:
    """The limit is that of the run: what an earlier attempt has called inside another tool counts, too."""
    hold, noted = asyncio.Event(), []

    @tool_function
    async def note(text: str) -> None:
        """Note a text."""
        noted.append(text)

    @tool_function
    async def pair(context: ToolContext) -> None:
        """Note two texts."""
        for text in ("a", "b"):
            await context.call_tool("note", {"text": text})

    async def program(context: RunContext) -> None:
        await context.call_tool("pair")
        await hold.wait()
        await context.call_tool("note", {"text": "c"})

    definition = Agent("a", pattern=program, tools=[note, pair], llm={"provider": "mock"})
    record = await _after_a_death(redis_url, definition, hold, "pair", budget={"max_tool_calls": 3})

    assert result(record).stop_reason is StopReason.MAX_STEPS
    assert noted == ["a", "b"]


async def test_what_a_cancelled_call_has_cost_counts_after_a_death(redis_url: str) -> None:
    """The next worker does not ask for it again, but it was paid for."""
    hold, asked = asyncio.Event(), asyncio.Event()

    async def ask(context: RunContext) -> None:
        await context.call_llm("first")
        asked.set()
        await asyncio.Event().wait()

    async def program(context: RunContext) -> None:
        asking = asyncio.create_task(context.step("ask", ask, context))
        await asked.wait()
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        await hold.wait()
        await context.call_llm("second")

    llm = scripted(*[{"text": "hi", "usage": {"input_tokens": 1_000_000, "output_tokens": 0}}] * 2)
    definition = Agent("a", pattern=program, llm={**llm, "pricing": {"input": 1.0, "output": 1.0}})
    record = await _after_a_death(redis_url, definition, hold, "ask", budget={"max_cost_usd": 1.0})

    assert result(record).stop_reason is StopReason.BUDGET_EXHAUSTED
    assert record.usage.llm_calls == 1


async def test_model_calls_inside_a_finished_call_are_steps_after_a_death(redis_url: str) -> None:
    """Each `call_llm` of a tool is a step of the run, whichever worker made it, and no other model call."""
    hold = asyncio.Event()

    @tool_function
    async def nested(context: ToolContext) -> None:
        """Ask the model once, and once as no step."""
        await context.call_llm("a")
        message = {"role": "user", "content": "not a step"}
        await context.llm_client.generate(messages=[message])  # type: ignore[attr-defined]

    @tool_function
    async def pair(context: ToolContext) -> None:
        """Ask the model twice, once in another tool."""
        await context.call_tool("nested")
        await context.call_llm("b")

    async def program(context: RunContext) -> None:
        await context.call_tool("pair")
        await hold.wait()
        for text in ("c", "d"):
            await context.call_llm(text)

    llm = scripted(*[{"text": "hi"}] * 5)
    definition = Agent("a", pattern=program, tools=[nested, pair], llm=llm)
    record = await _after_a_death(redis_url, definition, hold, "pair", budget={"max_steps": 3})

    assert result(record).stop_reason is StopReason.MAX_STEPS
    assert record.usage.llm_calls == 4


async def test_what_a_cancelled_call_has_changed_is_there_after_a_death(redis_url: str) -> None:
    """A finished call inside it has changed the state and taken an extension: the next worker has both."""
    hold, changed = asyncio.Event(), asyncio.Event()

    @tool_function
    async def put(context: ToolContext) -> None:
        """Change the state."""
        context.state["n"] = 1

    async def outer(context: RunContext) -> None:
        for _ in range(2):
            await context.call_tool("put")
        changed.set()
        await asyncio.Event().wait()

    async def program(context: RunContext) -> Any:
        doing = asyncio.create_task(context.step("outer", outer, context))
        await changed.wait()
        await asyncio.sleep(0)
        doing.cancel()
        await asyncio.wait([doing])
        await hold.wait()
        found = context.state.get("n")
        await context.call_tool("put")
        return found, context.usage.tool_calls

    definition = Agent("a", pattern=program, tools=[put], llm={"provider": "mock"})
    record = await _after_a_death(
        redis_url, definition, hold, "outer", extension={"max_tool_calls": 3}, budget={"max_tool_calls": 1}
    )

    assert result(record).final_output == [1, 3]


async def _after_a_death(
    redis_url: str,
    definition: Agent,
    hold: asyncio.Event,
    name: str,
    *,
    extension: dict[str, float] | None = None,
    **request: Any,
) -> RunRecord:
    """The record of a run whose worker died once the call with this name was recorded, before `hold`."""
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit(**request)
        if extension is not None:
            await extend(one, **extension)

        async def is_recorded() -> bool:
            return name in [each.get("name") for each in await one.journal()]

        dying = await executed_until(one, is_recorded, f"{name} is recorded")
        await crash(one, "r1", dying)
        hold.set()
        await two.execute()
        return await two.record()
