"""The records of a journal, and how a run continues from them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from openagents_worker.llm.base import LLMResponse
from openagents_worker.models import StopReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.store import scripts
from tests.runtime import plugins
from tests.support.runner import Process, agent, crash, due, process, scripted
from tests.support.waiting import await_for

HERE = __name__


@pytest.fixture(autouse=True)
def _fresh_plugins() -> None:
    plugins.reset()


def patterned(pattern: str, *, llm: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    names = {"charge": "tests.runtime.plugins.Charge", "asks": f"{HERE}.Asks"}
    fields: dict[str, Any] = {"llm": llm} if llm else {}
    return agent(
        pattern={"impl": f"{HERE}.{pattern}", "config": config},
        tools=[{"id": id_, "impl": impl} for id_, impl in names.items()],
        **fields,
    )


class Plain:
    """A custom pattern."""

    context: Any

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    async def charge(self, who: str, gate: str = "") -> Any:
        return await self.context.tools["charge"].invoke({"who": who, **({"gate": gate} if gate else {})})


# --- a clock in the prompt -------------------------------------------------------------------------------


class Clocked(Plain):
    """Puts the time into the prompt, which therefore differs in every attempt."""

    asked = 0

    async def execute(self) -> Any:
        Clocked.asked += 1
        where = self.config["where"]
        prompt = [
            {"role": "system", "content": f"It is {Clocked.asked if where == 'system' else 0} o'clock."},
            {"role": "user", "content": f"Go at {Clocked.asked if where == 'user' else 0}."},
        ]
        reply = await self.context.llm_client.generate(messages=prompt)
        return reply.output_text


@pytest.mark.parametrize("where", ["system", "user"])
async def test_tries_of_a_prompt_with_a_clock_are_bounded(redis_url: str, where: str) -> None:
    """A provider that always fails ends the run after the usual number of retries."""
    down = scripted({"error": "rate_limit", "retry_after_ms": 1, "times": 100}, {"text": "never"})
    async with process(redis_url, patterned("Clocked", llm=down, where=where)) as p:
        await p.submit(budget={"max_resume_attempts": 2})
        for _ in range(2):
            assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
            await due(p)
        ended = await p.execute()
        assert (ended.kind, ended.error and ended.error.code) == (AttemptOutcome.FINISHED, "llm.rate_limit")


async def test_a_changed_prompt_is_replayed_with_an_event(redis_url: str) -> None:
    """The event has both digests, so that the changed part can be found."""

    definition = patterned("ClockedThenCharge", where="system", llm=scripted({"text": "hello"}))
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        await one.submit()
        dying = await begun(one, "charge")
        await crash(one, "r1", dying)
        plugins.GATES["charge"].set()
        assert (await two.execute()).stop_reason is StopReason.COMPLETED
        payloads = [
            event["payload"] for event in await two.events() if event["name"] == "replay.prompt_changed"
        ]
        assert len(payloads) == 1
        assert payloads[0]["recorded_digest"] != payloads[0]["digest"]


class ClockedThenCharge(Clocked):
    async def execute(self) -> Any:
        output = await super().execute()
        await self.charge("x", "charge")
        return output


# --- a life after a failure ------------------------------------------------------------------------------


class Grouped(Plain):
    """Three calls in a TaskGroup: one fails, the others are cancelled or have ended."""

    async def execute(self) -> Any:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.charge(who, f"charge-{who}")) for who in "abc"]
        return [task.result() for task in tasks]


async def test_a_run_whose_task_group_failed_can_be_resumed(redis_url: str) -> None:
    """Neither the error nor the cancellations that it caused are replayed in the next life."""
    plugins.FAILURES["b"] = [plugins.refused()]
    for who in "ab":
        plugins.GATES[f"charge-{who}"].set()
    async with process(redis_url, patterned("Grouped")) as p:
        assert (await p.run()).state == "failed"
        plugins.GATES["charge-c"].set()
        await resumed(p)
        assert (await p.execute()).stop_reason is StopReason.COMPLETED
        assert sorted(plugins.executed("charge")) == ["a", "b", "c"]


class Limited(Plain):
    """Gives a call a short time limit, and fails after it."""

    async def execute(self) -> Any:
        async with asyncio.timeout(0.05):
            return await self.charge("slow", "slow")


async def test_a_run_whose_step_timed_out_can_be_resumed(redis_url: str) -> None:
    """The call that the time limit cancelled is made again in the next life."""
    async with process(redis_url, patterned("Limited")) as p:
        assert (await p.run()).state == "failed"
        plugins.GATES["slow"].set()
        await resumed(p)
        assert (await p.execute()).stop_reason is StopReason.COMPLETED


async def test_a_resumed_run_may_make_other_calls(redis_url: str) -> None:
    """A new life need not repeat the call that failed: people resume a run after they changed something."""
    plugins.FAILURES["broken"] = [plugins.refused()]
    async with process(redis_url, patterned("Mended"), name="one") as p:
        assert (await p.run()).state == "failed"
        Mended.way = "sound"
        try:
            await resumed(p)
            assert (await p.execute()).stop_reason is StopReason.COMPLETED
        finally:
            Mended.way = "broken"


class Mended(Plain):
    way = "broken"

    async def execute(self) -> Any:
        await self.charge("first")
        return await self.charge(Mended.way)


# --- calls inside a call ---------------------------------------------------------------------------------


class Asks(plugins.Charge):
    """A tool that calls the model, charges, and changes the state."""

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        reply: LLMResponse = await context.llm_client.generate(
            messages=[{"role": "user", "content": "inside"}]
        )
        await context.tools["charge"].invoke({"who": "inside"})
        context.state["asks"] = reply.output_text
        return reply.output_text


class Nesting(Plain):
    async def execute(self) -> Any:
        inside = await self.context.tools["asks"].invoke({})
        outside = await self.context.llm_client.generate(messages=[{"role": "user", "content": "outside"}])
        await self.charge("last", "last")
        return [inside, outside.output_text]


async def test_usage_and_changes_inside_a_finished_call_are_replayed(redis_url: str) -> None:
    """The tool is not called again, but usage and changes of its inner calls apply."""
    definition = patterned("Nesting", llm=scripted({"text": "one"}, {"text": "two"}))
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        await one.submit()
        dying = await begun(one, "last")
        await crash(one, "r1", dying)
        plugins.GATES["last"].set()
        await two.execute()

        record = await two.record()
        assert record.result is not None
        assert record.result.final_output == ["one", "two"], "a call of a model inside a tool counts as one"
        assert (record.usage.llm_calls, record.usage.tool_calls) == (2, 3)
        state = await two.store.redis.hgetall(two.store.keys("session_state", "s1"))
        assert json.loads(state["charged"]) == ["inside", "last"]
        assert json.loads(state["asks"]) == "one"


# --- tools -----------------------------------------------------------------------------------------------


async def begun(p: Process, who: str) -> asyncio.Task[Any]:
    """Execute run r1 until it waits at this gate of `charge`."""
    executing = asyncio.create_task(p.execute())
    at_gate = {"charge": "x", "last": "last"}[who]
    await await_for(
        lambda: any(entry[:3] == ("begin", "charge", at_gate) for entry in plugins.LOG), f"{who} begins"
    )
    return executing


async def resumed(p: Process) -> None:
    done = await p.store.run(
        scripts.resume(run_id="r1", agent_id="a", session_id="s1", input_text="", checkpoint_id="")
    )
    assert done.answer == "OK"
