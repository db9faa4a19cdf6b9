"""A shared child writes nothing to the session: its parent holds its turn, until it writes its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from openagents_worker import Agent
from openagents_worker.models import RunState
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.formats import DELEGATES, HOLDS_TURNS
from openagents_worker.store.sessions import SessionStore
from openagents_worker.store.ttl import ttl_violations
from tests.runtime import delegating
from tests.runtime.delegating import agents, charge, execute_all, to
from tests.runtime.test_children import begin, cancel, children_of, finish, resume
from tests.runtime.waiting import retrieved
from tests.support.runner import Process, process


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    delegating.CALLS.clear()
    yield
    delegating.CALLS.clear()


class Reversing:
    name = "reversed"

    def encode(self, text: str) -> str:
        return text[::-1]

    def decode(self, text: str) -> str:
        return text[::-1]


def shared(text: str, agent_id: str = "worker", **more: Any) -> dict[str, Any]:
    return to(text, agent_id, session_isolation="shared", **more)


def seen(context: Any) -> list[Any]:
    """The state of the run, without that of its memory."""
    return sorted(item for item in context.state.items() if item[0] != "memory_buffer")


async def writes(context: Any) -> str:
    """Tells what it sees of the session, and changes its state as its input, JSON, says."""
    asked = [entry["content"] for entry in context.transcript if entry["role"] == "user"]
    told = f"{asked} {seen(context)} {len(context.session_artifacts)}"
    for key, value in json.loads(context.input_text).items():
        if value is None:
            context.state.pop(key, None)
        else:
            context.state[key] = value
    context.add_artifact("note", "text", context.input_text)
    return told


async def depends(context: Any) -> Any:
    """Delegates one after the other. Each recorded call depends on the state before it."""
    found = []
    for request in json.loads(context.input_text):
        await context.step("charge", charge, f"before {seen(context)}")
        found.append((await context.delegate(**request)).output)
        await context.step("charge", charge, f"after {seen(context)}")
    return found


async def lends(context: Any) -> str:
    """A shared child with a shared child of its own."""
    context.state["level"] = "middle"
    result = await context.delegate("writes", context.input_text, session_isolation="shared")
    return f"{result.output} then {seen(context)}"


def family() -> list[Agent]:
    own = [Agent(each.__name__, pattern=each, llm={"provider": "mock"}) for each in (writes, depends, lends)]
    return [*agents(), *own]


async def contents(p: Process, session_id: str = "s1") -> list[str]:
    return [entry["content"] for entry in await SessionStore(p.store).load_messages(session_id)]


async def state_of(p: Process, session_id: str = "s1") -> dict[str, Any]:
    texts = await SessionStore(p.store).load_state_texts(session_id)
    return {key: json.loads(text) for key, text in texts.items() if key != "memory_buffer"}


async def first_child_ends(p: Process, run_id: str = "r1") -> None:
    """The first child works and ends, its parent is not continued yet."""
    child = (await children_of(p, run_id))[0].run_id
    await p.execute(child)
    p.wakes[:] = [wake for wake in p.wakes if wake.run_id != child]


@pytest.mark.parametrize("mode", ["rollback", "cancel", "fail"])
async def test_a_parent_that_leaves_no_turn_takes_back_those_of_its_children(
    redis_url: str, mode: str
) -> None:
    async with process(redis_url, *family()) as p:
        asked = [shared('{"n": 1}', "writes"), to("one"), to("two", "nobody")]
        await begin(p, "depends", asked)
        await first_child_ends(p)
        assert (await contents(p), await state_of(p)) == ([], {})
        assert not (await p.record()).state.is_terminal
        if mode == "rollback":
            submitted = await p.submit("r2", agent_id="worker", input_text="next", on_busy="rollback")
            p.wakes += submitted.also
            if submitted.sent_us is not None:
                await p.execute("r2")
        else:
            if mode == "cancel":
                await cancel(p)
            await p.submit("r2", agent_id="worker", input_text="next")
            await p.execute("r2")
        await execute_all(p)
        assert (await p.record()).state is (RunState.FAILED if mode == "fail" else RunState.CANCELLED)
        assert (await contents(p), await state_of(p)) == (["next", "done: next"], {})
    assert ttl_violations(redis_url) == []


@pytest.mark.parametrize("is_taken", [True, False])
async def test_an_interrupted_parent_leaves_the_turns_of_its_children_before_its_own(
    redis_url: str, is_taken: bool
) -> None:
    """It leaves no state, as any interrupted run. Its next life does not write the turns again."""
    async with process(redis_url, *family()) as p:
        await begin(p, "depends", [shared('{"n": 1}', "writes"), to("two")])
        await first_child_ends(p)
        if is_taken:
            await p.execute()
        submitted = await p.submit("r2", agent_id="worker", input_text="next", on_busy="interrupt")
        p.wakes += submitted.also
        await execute_all(p)
        assert (await p.record()).state is RunState.CANCELLED
        found = await contents(p)
        assert [found[0], found[2][:1], found[4:]] == ['{"n": 1}', "[", ["next", "done: next"]]
        assert await state_of(p) == {}
        await resume(p)
        assert (await finish(p)).state is RunState.COMPLETED
        assert (await contents(p)).count('{"n": 1}') == 1
        assert await state_of(p) == {"n": 1}


@pytest.mark.parametrize("codec", [PayloadCodec(), PayloadCodec(Reversing())], ids=["plain", "encoded"])
async def test_turns_are_written_in_order_before_that_of_the_parent(
    redis_url: str, codec: PayloadCodec
) -> None:
    """The next child sees the turns and the state before it, the parent the state with each result."""
    changes = ('{"n": 1, "m": [1]}', '{"n": 2, "m": [1, 2]}', '{"n": null, "o": "x"}')
    async with process(redis_url, *family(), codec=codec) as p:
        await begin(p, "depends", [shared(text, "writes") for text in changes])
        record = await finish(p)
        assert record.result is not None, record
        first, second, _ = changes
        assert record.result.final_output == [
            "[] [] 0",
            f"[{first!r}] [('m', [1]), ('n', 1)] 1",
            f"[{first!r}, {second!r}] [('m', [1, 2]), ('n', 2)] 2",
        ]
        made = [
            "before []",
            "after [('m', [1]), ('n', 1)]",
            "before [('m', [1]), ('n', 1)]",
            "after [('m', [1, 2]), ('n', 2)]",
            "before [('m', [1, 2]), ('n', 2)]",
            "after [('m', [1, 2]), ('o', 'x')]",
        ]
        assert made == delegating.CALLS
        asked = [entry["content"] for entry in await SessionStore(p.store).load_messages("s1")][::2]
        assert asked == [*changes, json.dumps([shared(text, "writes") for text in changes])]
        assert await state_of(p) == {"m": [1, 2], "o": "x"}
        artifacts = await SessionStore(p.store).list_artifacts("s1")
        assert [artifact.payload for artifact in artifacts] == list(changes)
        assert (await p.run("r2", agent_id="writes", input_text="{}")).result is not None
    assert ttl_violations(redis_url) == []


async def test_a_parent_that_is_a_shared_child_hands_on_what_it_holds(redis_url: str) -> None:
    """Children of the next level see what the runs above them hold. Nothing is written before the end of the
    run that began with the session."""
    async with process(redis_url, *family()) as p:
        await begin(p, "depends", [shared('{"a": 1}', "writes"), shared('{"b": 2}', "lends"), to("x")])
        while not (delegating.CALLS and "level" in delegating.CALLS[-1]):
            wake = p.wakes.pop(0)
            await p.execute(wake.run_id)
            assert await contents(p) == []
        record = await finish(p)
        assert record.result is not None, record
        seen = """['{"a": 1}'] [('a', 1)] 1"""  # not what its own parent has only in mind
        assert record.result.final_output[1] == f"{seen} then [('a', 1), ('b', 2), ('level', 'middle')]"
        assert (await contents(p))[::2][:3] == ['{"a": 1}', '{"b": 2}', '{"b": 2}']
        assert await state_of(p) == {"a": 1, "b": 2, "level": "middle"}
        assert await p.store.redis.hget(p.store.keys("run", "r1"), "format") == str(HOLDS_TURNS)


async def test_the_next_life_of_a_cancelled_parent_writes_what_it_holds(redis_url: str) -> None:
    async with process(redis_url, *family()) as p:
        await begin(p, "depends", [shared('{"n": 1}', "writes"), shared('{"m": 2}', "writes")])
        await first_child_ends(p)
        await p.execute()
        await cancel(p)
        p.wakes.clear()
        await p.run("r2", agent_id="worker", input_text="next")
        await resume(p)
        record = await finish(p)
        assert record.state is RunState.COMPLETED, record.result
        assert (await contents(p))[::2][:3] == ["next", '{"n": 1}', '{"m": 2}']
        assert await state_of(p) == {"n": 1, "m": 2}


async def test_results_that_are_taken_in_another_order_leave_the_newest_state(redis_url: str) -> None:
    """The first result that is taken comes with the changes of all children before it."""

    async def last_first(context: Any) -> Any:
        tasks = [
            retrieved(context.delegate("writes", text, session_isolation="shared"))
            for text in ('{"n": 1, "m": 1}', '{"n": 2}')
        ]
        await tasks[1]
        await context.step("charge", charge, f"{seen(context)}")
        context.state["n"] = 3
        await tasks[0]
        return seen(context)

    own = Agent("last_first", pattern=last_first, llm={"provider": "mock"})
    async with process(redis_url, *family(), own) as p:
        await begin(p, "last_first", "go")
        record = await finish(p)
        assert record.result is not None, record
        assert record.result.final_output == [["m", 1], ["n", 3]]
        assert await state_of(p) == {"n": 3, "m": 1}


async def test_a_child_whose_result_nobody_takes_has_its_turn(redis_url: str) -> None:
    """Its program has given the call up, after the child had ended."""

    async def gives_up(context: Any) -> str:
        asked = retrieved(context.delegate("writes", '{"n": 1, "m": 1}', session_isolation="shared"))
        context.state["n"] = 5
        await context.receive("go")
        asked.cancel()
        await asyncio.wait([asked])
        return "gave up"

    own = Agent("gives_up", pattern=gives_up, llm={"provider": "mock"})
    async with process(redis_url, *family(), own) as p:
        await begin(p, "gives_up", "x")
        await p.store.run(
            scripts.fact(run_id="r1", name="signal:go:", value="1", message_id="", max_facts=9, max_bytes=999)
        )
        await first_child_ends(p)
        record = await finish(p)
        assert record.result is not None, record
        assert record.result.final_output == "gave up"
        assert (await contents(p))[::2] == ['{"n": 1, "m": 1}', "x"]
        assert await state_of(p) == {"n": 5, "m": 1}


async def test_a_child_whose_result_is_too_large_for_its_record_has_its_turn(redis_url: str) -> None:
    """Also if the result of the child behind it is recorded at the same time."""

    async def large(context: Any) -> str:
        context.state["n"] = 1
        for name in ("a", "b"):
            context.add_artifact(name, "text", "x" * 12_000)
        return "large"

    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_PAYLOAD_BYTES": "20000"})
    own = Agent("large", pattern=large, llm={"provider": "mock"})
    async with process(redis_url, *family(), own, settings=settings) as p:
        requests = [shared("go", "large"), shared('{"m": 2}', "writes")]
        await begin(p, "many", {"requests": requests})
        record = await finish(p)
        assert record.result is not None, record
        assert record.result.final_output == ["step.too_large", "['go'] [('n', 1)] 2"]
        assert (await contents(p))[::2][:2] == ["go", '{"m": 2}']
        assert await state_of(p) == {"n": 1, "m": 2}


async def test_a_forked_child_sees_the_turns_of_shared_children_before_it(redis_url: str) -> None:
    async with process(redis_url, *family()) as p:
        asked = [shared('{"n": 1}', "writes"), to('{"n": 2}', "writes", session_isolation="forked")]
        await begin(p, "depends", asked)
        record = await finish(p)
        assert record.result is not None, record
        assert record.result.final_output[1] == """['{"n": 1}'] [('n', 1)] 1"""
        assert await state_of(p) == {"n": 1}


async def test_a_child_that_the_version_before_has_executed_has_written_its_turn(redis_url: str) -> None:
    """That version lets a shared child write to the session at its own end."""
    async with process(redis_url, *family()) as p:
        await begin(p, "parent", [shared("one"), shared("two")])
        child = (await children_of(p))[0].run_id
        for run_id in ("r1", child):
            await p.store.redis.hset(p.store.keys("run", run_id), "format", str(DELEGATES))
        await p.store.redis.hdel(p.store.keys("run", child), "mode")
        await first_child_ends(p)
        assert await contents(p) == ["one", "done: one"]
        record = await finish(p)
        assert record.result is not None, record
        assert record.result.final_output == [["completed", "done: one"], ["completed", "done: two"]]
        assert (await contents(p))[::2][:2] == ["one", "two"]
        assert len(await contents(p)) == 6


async def test_a_resumed_child_sees_what_it_saw_at_its_start(redis_url: str) -> None:
    """The turns before it are in the session meanwhile, and its parent has ended."""
    async with process(redis_url, *family()) as p:
        own = json.dumps([shared('{"n": 1}', "writes"), shared("fail", "worker")])
        await begin(p, "parent", own)
        record = await finish(p)
        assert record.result is not None, record
        second = (await children_of(p))[1].run_id
        assert (await p.record(second)).state is RunState.FAILED
        start = (await p.journal(second))[0]
        assert start["outcome"]["context"]["held"][0] == "r1"
        await resume(p, second)
        assert (await p.record(second)).state is RunState.FAILED
