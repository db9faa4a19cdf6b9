"""A recorded call behaves equally wherever it is made: it is suspended, stopped, cancelled and replayed.

The places: the pattern, a tool, inject, write-back and compaction of a memory (external or in the session
state), assembly and compaction of a context assembler.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openagents_worker.models import StopReason
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.store import scripts
from tests.runtime import plugins
from tests.runtime.asking import AFTER
from tests.support.runner import Process, agent, crash, due, process, scripted
from tests.support.waiting import await_for

PLACES = [
    "pattern",
    "tool",
    "inject",
    "writeback",
    "compact",
    "inject of the state",
    "writeback of the state",
    "compact of the state",
    "assemble",
    "context.compact",
]
HERE = "tests.runtime.asking"


def asking(place: str, kind: str, *, fails: bool = False) -> dict[str, Any]:
    """An agent that makes its call at this place; its last reply is `hello`."""
    where, _, of_state = place.partition(" of the ")
    refused = [{"error": "rate_limit", "retry_after_ms": 1}] if fails else []
    aside = [*refused, {"text": "aside"}] if kind == "model" else []
    answers = (
        [{"text": "hello"}, *aside] if where in ("writeback", "compact") else [*aside, {"text": "hello"}]
    )
    memory = {"where": where, "kind": kind, "external": not of_state}
    return agent(
        llm=scripted(*answers),
        pattern={"impl": f"{HERE}.AskingPattern", "config": {"where": where, "kind": kind}},
        memory={"impl": f"{HERE}.AskingMemory", "config": memory, "on_error": "fail"},
        context_assembler={"impl": f"{HERE}.AskingAssembler", "config": {"where": where, "kind": kind}},
        tools=[
            {"id": "charge", "impl": "tests.runtime.plugins.Charge"},
            {"id": "asking", "impl": f"{HERE}.AskingTool", "config": {"kind": kind}},
        ],
    )


def open_gates() -> None:
    for name in ("aside", AFTER):
        plugins.GATES[name].set()


async def ended_well(last: Process, kind: str, *, begun: int = 1) -> None:
    """The run has its output. The call was finished once, and its usage counts once."""
    record = await last.record()
    assert record.result is not None
    assert (record.state, record.result.final_output) == ("completed", "hello"), record.result.error_details
    if kind == "tool":
        assert plugins.executed("charge") == ["aside"]
        keys = [entry[3] for entry in plugins.LOG if entry[:2] == ("begin", "charge")]
        assert (len(keys), len(set(keys))) == (begun, 1)
    assert record.usage.llm_calls == (2 if kind == "model" else 1)
    assert len({entry for entry in plugins.LOG if entry[0] == "asked"}) == 1


async def at(p: Process, moment: str) -> asyncio.Task[Any]:
    """Execute run r1 until it is inside the tool call, or has finished it."""
    if moment == "behind the call":
        plugins.GATES["aside"].set()
    executing = asyncio.create_task(p.execute())
    reached = ("begin", "charge", "aside") if moment == "inside the call" else ("asked",)
    await await_for(lambda: any(entry[: len(reached)] == reached for entry in plugins.LOG), moment)
    return executing


MOMENTS = [("model", "behind the call"), ("tool", "inside the call"), ("tool", "behind the call")]
each_moment = pytest.mark.parametrize(("kind", "moment"), MOMENTS, ids=[" ".join(each) for each in MOMENTS])
each_place = pytest.mark.parametrize("place", PLACES)


@pytest.mark.share(of=3)
@each_place
@pytest.mark.parametrize("kind", ["model", "tool"])
async def test_a_retryable_error_suspends_the_run(redis_url: str, place: str, kind: str) -> None:
    """After one 429 the run is suspended.

    When it is due, it is replayed from its first line and completes.
    """
    open_gates()
    if kind == "tool":
        plugins.FAILURES["aside"] = [plugins.rate_limited()]
    async with process(redis_url, asking(place, kind, fails=True)) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        await due(p)
        assert (await p.execute()).stop_reason is StopReason.COMPLETED
        await ended_well(p, kind, begun=2)


@pytest.mark.share(of=3)
@each_place
@each_moment
async def test_a_killed_worker(redis_url: str, place: str, kind: str, moment: str) -> None:
    """Another worker executes the run: recorded calls are replayed, the call in flight is made once more."""
    definition = asking(place, kind)
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        await one.submit()
        dying = await at(one, moment)
        await crash(one, "r1", dying)
        open_gates()
        await two.execute()
        await ended_well(two, kind, begun=2 if moment == "inside the call" else 1)


@pytest.mark.share(of=3)
@each_place
@each_moment
async def test_a_worker_that_is_asked_to_stop(redis_url: str, place: str, kind: str, moment: str) -> None:
    """The run is handed over after the calls in progress have ended."""
    definition = asking(place, kind)
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        await one.submit()
        executing = await at(one, moment)
        one.runner.latch("r1", LatchReason.HANDOVER)
        open_gates()
        result = await executing
        assert (result.kind, result.reason) == (AttemptOutcome.SUSPENDED, "handover")
        await two.execute()
        await ended_well(two, kind)


@pytest.mark.share(of=3)
@each_place
@each_moment
async def test_a_run_that_is_cancelled(redis_url: str, place: str, kind: str, moment: str) -> None:
    """The run ends at once, wherever the call is made."""
    async with process(redis_url, asking(place, kind)) as p:
        await p.submit()
        executing = await at(p, moment)
        await p.store.run(scripts.cancel(run_id="r1", reason="enough", force=False))
        p.runner.latch("r1", LatchReason.CANCELLED)
        assert (await executing).stop_reason is StopReason.CANCELLED
        assert (await p.record()).state == "cancelled"


@pytest.mark.parametrize("verb", ["inject", "writeback"])
async def test_a_retryable_error_of_a_memory_suspends_the_run(redis_url: str, verb: str) -> None:
    """The store of the memory is unavailable:

    the run is retried later, and the calls of the pattern are not repeated.
    """
    open_gates()
    definition = asking("pattern", "tool")
    definition["memory"] = {"impl": f"{__name__}.Forgetful", "config": {"verb": verb}, "on_error": "fail"}
    Forgetful.failures = 1
    async with process(redis_url, definition) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        await due(p)
        await p.execute()
        await ended_well(p, "tool")


async def test_a_write_back_is_not_repeated(redis_url: str) -> None:
    """The worker dies between the write-back and the end. The next worker only ends the run."""
    definition = asking("writeback", "tool")
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        await one.submit()
        open_gates()
        original = one.store.run_until

        async def dies_at_the_end(call: Any, until: Any) -> Any:
            if call.script.name == "finish":
                await asyncio.Event().wait()
            return await original(call, until)

        one.store.run_until = dies_at_the_end  # type: ignore[method-assign]
        executing = asyncio.create_task(one.execute())

        async def written_back() -> bool:
            return any((r["kind"], r["name"]) == ("memory", "compact") for r in await one.journal())

        await await_for(written_back, "the memory has kept what it wants")
        await crash(one, "r1", executing)
        await two.execute()
        await ended_well(two, "tool")
        assert [entry[1] for entry in plugins.LOG if entry[0] == "verb"] == ["inject", "writeback", "compact"]


class Forgetful:
    """A memory whose store is unavailable for a while."""

    failures = 0

    def __init__(self, config: dict[str, Any]) -> None:
        self._verb = config["verb"]

    async def inject(self, context: Any) -> None:
        self._at("inject")

    async def writeback(self, context: Any) -> None:
        self._at("writeback")

    def _at(self, verb: str) -> None:
        if verb == self._verb and Forgetful.failures:
            Forgetful.failures -= 1
            raise plugins.rate_limited()
