"""A run that delegates to other agents: it parks, its children are runs of their own, each is made once."""

from __future__ import annotations

import asyncio
import json
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openagents_worker import Agent, Client
from openagents_worker.errors import StepTooLarge
from openagents_worker.models import RunRecord, RunState, StopReason, WaitKind
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.formats import DELEGATES
from openagents_worker.store.signals import signal_fact
from tests.runtime import delegating
from tests.runtime.delegating import agents, execute_all, to
from tests.runtime.test_waiting import time_out
from tests.runtime.waiting import retrieved
from tests.support.runner import Process, agent, calls, crash, process, scripted
from tests.support.waiting import await_for


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    delegating.CALLS.clear()
    yield
    delegating.CALLS.clear()


async def begin(p: Process, agent_id: str, asked: Any, run_id: str = "r1", **fields: Any) -> None:
    text = asked if isinstance(asked, str) else json.dumps(asked)
    await p.submit(run_id, agent_id=agent_id, input_text=text, **fields)
    await p.execute(run_id)


async def finish(p: Process, run_id: str = "r1") -> RunRecord:
    await execute_all(p)
    return await p.record(run_id)


async def children_of(p: Process, run_id: str = "r1") -> list[RunRecord]:
    ids = await p.store.redis.zrange(p.store.keys("index", f"parent={run_id}"), 0, -1)
    return [await p.record(id_) for id_ in ids]


@pytest.mark.defect("E05")
async def test_a_parent_parks_until_its_child_has_ended(redis_url: str) -> None:
    """The end of the child stores its result as a fact of the parent and wakes it, in one script."""
    async with process(redis_url, *agents()) as p:
        await begin(p, "parent", [to("one")], tenant="acme", labels={"team": "blue"})
        record = await p.record()
        assert (record.state, record.worker) == (RunState.WAITING_CHILD, None)
        [wait] = record.waiting
        [child] = await children_of(p)
        assert (wait.kind, wait.name) == (WaitKind.CHILD, child.run_id)
        assert (child.parent_run_id, child.state, child.agent_id) == ("r1", RunState.QUEUED, "worker")
        assert child.session_id == f"child:{child.run_id}"
        assert child.request is not None
        assert (child.request.tenant, child.request.labels) == ("acme", {"team": "blue"})
        assert [wake.run_id for wake in p.wakes] == [child.run_id]
        assert await p.store.redis.hget(p.store.keys("run", "r1"), "format") == str(DELEGATES)
        assert await p.store.redis.hget(p.store.keys("run", child.run_id), "format") == str(DELEGATES)

        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == [["completed", "done: one"]]
        assert record.steps == 2, "the call that delegates and one after it, not those of the child"
        assert delegating.CALLS == ["one", "after one"]
        assert await p.store.redis.hgetall(p.store.keys("facts", "r1")) == {}
        names = [name for name in await p.event_names() if "child" in name or name == "run.woken"]
        assert names == ["run.child_started", "run.child_completed", "run.woken"]
        [completed] = [each for each in await p.events() if each["name"] == "run.child_completed"]
        assert completed["payload"]["child_run_id"] == child.run_id
        assert completed["payload"]["stop_reason"] == "completed"


async def test_three_levels_end_in_a_process_that_executes_one_run_at_a_time(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "level", "3")
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == "3 2 1 bottom"
        assert delegating.CALLS == ["level 3", "level 2", "level 1", "level 0"]


async def test_a_chain_of_children_has_a_greatest_length(redis_url: str) -> None:
    """The error is raised in the run that would be too deep, and its parents get it as a failed result."""
    async with process(redis_url, *agents(), multi_agent={"max_delegation_depth": 2}) as p:
        await begin(p, "level", "5")
        record = await finish(p)
        assert record.result is not None
        assert record.result.error_details is not None
        assert record.result.error_details.code == "delegation.depth"
        assert delegating.CALLS == ["level 5", "level 4", "level 3"]


@pytest.mark.defect("R03")
async def test_a_failed_child_is_told_from_a_completed_one(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "parent", [to("fail one"), to("two")])
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == [["failed", None], ["completed", "done: two"]]


@pytest.mark.defect("R04")
async def test_the_usage_of_a_child_is_added_to_that_of_its_parent(redis_url: str) -> None:
    script = {"provider": "scripted", "script": [{"text": "hi"}] * 9, "pricing": {"input": 1, "output": 1}}
    model = {"id": "model", "name": "m", "memory": {"type": "buffer"}, "pattern": {"type": "react"}}
    async with process(redis_url, *agents(), {**model, "llm": script}) as p:
        await begin(p, "parent", [to("one", "model"), to("two", "model")])
        record = await finish(p)
        children = [child.usage for child in await children_of(p)]
        assert [usage.llm_calls for usage in children] == [1, 1]
        assert record.usage.llm_calls == 2
        assert record.usage.total_tokens == sum(usage.total_tokens for usage in children) > 0


async def test_an_unknown_agent_is_an_error_of_the_call(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "parent", [to("one", "worke")])
        record = await p.record()
        assert record.result is not None
        assert record.result.error_details is not None
        assert record.result.error_details.code == "user.agent_not_found"
        assert "worker" in str(record.result.error_details.hint)
        assert await children_of(p) == []


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (to("one", "no such agent"), "agent_id"),
        (to("one", session_isolation="private"), "session_isolation"),
        (to("one", budget={"max_steps": 0}), "budget.max_steps"),
        (to("one", labels={"a=b": "c"}), "labels"),
        (to("one", session_isolation="shared", background=True), "share the session"),
    ],
)
async def test_a_bad_request_is_refused_at_the_call(redis_url: str, request_: Any, named: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "parent", [request_])
        record = await p.record()
        assert record.result is not None
        assert record.result.error_details is not None
        assert record.result.error_details.code == "request.invalid"
        assert named in record.result.error_details.message


async def test_side_by_side_children_are_woken_for_and_kept_in_order(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "side_by_side", [to(text) for text in "abc"])
        assert len((await p.record()).waiting) == 3
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == ["done: a", "done: b", "done: c"]
        assert sorted(delegating.CALLS) == ["a", "b", "c"]


@pytest.mark.parametrize("max_concurrency", [None, 2])
async def test_many_children_keep_the_order_and_a_failed_one_stops_no_other(
    redis_url: str, max_concurrency: int | None
) -> None:
    async with process(redis_url, *agents()) as p:
        requests = [to("same"), to("same"), to("fail x"), to("x", "nobody"), to("last")]
        await begin(p, "many", {"requests": requests, "max_concurrency": max_concurrency})
        assert len((await p.record()).waiting) == (max_concurrency or 4)
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == [
            "done: same",
            "done: same",
            "tool.permanent",
            "user.agent_not_found",
            "done: last",
        ]
        assert sorted(delegating.CALLS) == ["fail x", "last", "same", "same"]


@pytest.mark.defect("R05")
async def test_a_transfer_ends_the_run_with_the_result_of_the_other_agent(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "hands_over", "one")
        record = await finish(p)
        [child] = await children_of(p)
        assert record.result is not None
        assert (record.state, record.result.final_output) == (RunState.COMPLETED, "done: one")
        assert record.result.metadata["handoff_from"] == child.run_id
        question, answer = await p.transcript()
        assert (question["content"], answer["content"]) == ("one", "done: one")
        assert answer["handoff_from"] == child.run_id


@pytest.mark.defect("R02")
async def test_a_transfer_to_an_agent_that_fails_fails_for_the_same_reason(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "hands_over", "fail it")
        record = await finish(p)
        [child] = await children_of(p)
        assert record.result is not None
        assert child.result is not None
        assert (record.state, record.result.stop_reason) == (RunState.FAILED, StopReason.FAILED)
        assert record.result.error_details is not None
        assert child.result.error_details is not None
        assert record.result.error_details.code == child.result.error_details.code == "tool.permanent"
        assert record.result.metadata["handoff_from"] == child.run_id


@pytest.mark.defect("R08")
async def test_a_restart_does_not_delegate_again(redis_url: str) -> None:
    """The id of a child derives from the call, so the next attempt finds the child that was begun."""
    gate = asyncio.Event()

    async def waits_for_gate() -> str:
        await gate.wait()
        return "open"

    async def busy(context: Any) -> Any:
        result, _ = await asyncio.gather(
            context.delegate("worker", "one"), context.step("gate", waits_for_gate)
        )
        return result.output

    own = Agent("busy", pattern=busy, llm={"provider": "mock"})
    async with process(redis_url, *agents(), own) as dead, process(redis_url, *agents(), own) as p:
        await dead.submit(agent_id="busy")
        executing = asyncio.create_task(dead.execute())
        children = dead.store.keys("children", "r1")
        await await_for(lambda: dead.store.redis.exists(children), what="a child")
        await crash(dead, "r1", executing)
        [child] = await children_of(p)
        await p.execute(child.run_id)
        gate.set()
        await p.execute("r1")
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == "done: one"
        assert delegating.CALLS == ["one"]
        assert len(await children_of(p)) == 1


async def cancel(p: Process, run_id: str = "r1") -> Any:
    cancelled = await p.store.run(scripts.cancel(run_id=run_id, reason="enough", force=False))
    p.wakes += cancelled.wakes
    return cancelled


async def test_a_cancelled_parent_cancels_its_children_although_no_worker_holds_it(redis_url: str) -> None:
    """All levels end in one script; a run whose worker executes it ends as soon as that worker is told."""
    async with process(redis_url, *agents()) as p:
        await begin(p, "level", "2")
        await p.execute(p.wakes.pop(0).run_id)
        [middle] = await children_of(p)
        [lowest] = await children_of(p, middle.run_id)
        assert (middle.state, lowest.state) == (RunState.WAITING_CHILD, RunState.QUEUED)
        assert (await cancel(p)).answer == "CANCELLED"
        for run_id in ("r1", middle.run_id, lowest.run_id):
            assert (await p.record(run_id)).state is RunState.CANCELLED
        assert not [wake for wake in p.wakes if not wake.is_ended and wake.run_id != lowest.run_id]
        await execute_all(p)
        assert delegating.CALLS == ["level 2", "level 1"]


async def test_a_cancelled_child_is_a_result_for_its_parent(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "parent", [to("one")])
        [child] = await children_of(p)
        await cancel(p, child.run_id)
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == [["cancelled", None]]


async def test_a_failed_parent_ends_its_children_and_its_next_life_continues_them(redis_url: str) -> None:
    """Children that have ended are not executed again; one that was cancelled continues where it was."""
    async with process(redis_url, *agents()) as p:
        await begin(p, "side_by_side", [to("a"), to("b", "level"), to("c", "nobody")])
        record = await p.record()
        assert (record.state, record.reason_code) == (RunState.FAILED, "user.agent_not_found")
        first, second = await children_of(p)
        assert {first.state, second.state} == {RunState.CANCELLED}


async def resume(p: Process, run_id: str = "r1") -> None:
    record = await p.record(run_id)
    call = scripts.resume(
        run_id=run_id,
        agent_id=record.agent_id,
        session_id=record.session_id,
        input_text="",
        checkpoint_id="",
    )
    assert (await p.store.run(call)).answer == "OK"
    await p.execute(run_id)


async def test_the_next_life_of_a_cancelled_parent_continues_its_children(redis_url: str) -> None:
    """A child that has ended is not executed again. One that was cancelled with it continues where it was."""
    async with process(redis_url, *agents()) as p:
        await begin(p, "side_by_side", [to("a"), to("1", "level"), to("c")])
        await p.execute(p.wakes.pop(0).run_id)
        level = next(wake for wake in p.wakes if wake.agent_id == "level")
        p.wakes.remove(level)
        await p.execute(level.run_id)  # it parks, because it delegates
        assert delegating.CALLS == ["a", "level 1"]
        await cancel(p)
        p.wakes.clear()
        children = await children_of(p)
        assert [child.state for child in children] == ["completed", "cancelled", "cancelled"]

        await resume(p)
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == ["done: a", "1 bottom", "done: c"]
        assert sorted(delegating.CALLS) == ["a", "c", "level 0", "level 1"]
        assert [child.life for child in await children_of(p)] == [1, 2, 2]


async def test_a_fork_behind_a_child_takes_its_recorded_result(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "parent", [to("one"), to("two")])
        await finish(p)
        journal = [record["name"] for record in await p.journal()]
        steps = journal.index("worker")
        request = (await p.record()).request
        assert request is not None
        fork = scripts.fork(
            run_id="r2",
            from_run_id="r1",
            steps=steps,
            session_id="s2",
            digest="f",
            uid="u2",
            request=request.model_copy(update={"run_id": "r2", "session_id": "s2"}).model_dump_json(),
            messages=0,
            artifacts=0,
        )
        assert (await p.store.run(fork)).answer == "NEW"
        await p.execute("r2")
        record = await finish(p, "r2")
        assert record.result is not None
        assert record.result.final_output == [["completed", "done: one"], ["completed", "done: two"]]
        assert delegating.CALLS == ["one", "after one", "two", "after two", "after one", "two", "after two"]
        assert len(await children_of(p, "r2")) == 1


async def test_a_child_that_ended_in_secret_is_found_after_a_while(redis_url: str) -> None:
    """A worker of an earlier version may end a child without a notice to its parent."""
    async with process(redis_url, *agents()) as p:
        await begin(p, "parent", [to("one")])
        [child] = await children_of(p)
        key = p.store.keys("run", child.run_id)
        call, life = await p.store.redis.hmget(key, "parent_call", "parent_life")
        await p.store.redis.hdel(key, "parent_call")
        await p.execute(child.run_id)
        assert (await p.record()).state is RunState.WAITING_CHILD
        await p.store.redis.hset(key, mapping={"parent_call": call, "parent_life": life})
        await time_out(p)
        await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == [["completed", "done: one"]]
        assert delegating.CALLS == ["one", "after one"]


@pytest.mark.defect("S03")
async def test_shared_children_work_one_after_the_other_in_the_session_of_their_parent(
    redis_url: str,
) -> None:
    """The session is lent to a child while the parent is parked; it never waits for its own parent."""
    async with process(redis_url, *agents()) as p:
        asked = [to(text, session_isolation="shared") for text in "ab"]
        await begin(p, "side_by_side", [*asked, to("c")])
        await p.submit("r9", agent_id="worker", input_text="next")
        session = p.store.keys("session", "s1")
        children = {child.request.input_text: child for child in await children_of(p) if child.request}
        first, second = children["a"], children["b"]
        assert await p.store.redis.hget(session, "holder") == first.run_id
        assert (first.session_id, second.state) == ("s1", RunState.WAITING_SESSION)
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == ["done: a", "done: b", "done: c"]
        assert await p.store.redis.hget(session, "holder") is None
        assert (await p.record("r9")).state is RunState.COMPLETED
        answers = [entry["content"] for entry in await p.transcript() if entry["role"] == "assistant"]
        assert answers[:2] == ["done: a", "done: b"]
        assert answers[-1] == "done: next"


async def test_shared_children_of_shared_children(redis_url: str) -> None:
    async with process(redis_url, *agents(), multi_agent={"default_session_isolation": "shared"}) as p:
        await begin(p, "level", "3")
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == "3 2 1 bottom"
        assert {child.session_id for child in await children_of(p)} == {"s1"}
        fields = await p.store.redis.hgetall(p.store.keys("session", "s1"))
        assert not [name for name in fields if name.startswith("below:") or name == "holder"]


async def test_a_shared_child_of_a_shared_child_does_not_wait_for_its_siblings(redis_url: str) -> None:
    """A child of the run that has the session now comes before those of the runs below it."""
    async with process(redis_url, *agents(), multi_agent={"default_session_isolation": "shared"}) as p:
        await begin(p, "side_by_side", [to("1", "level"), to("x")])
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == ["1 bottom", "done: x"]
        assert delegating.CALLS == ["level 1", "level 0", "x"]


async def test_a_run_that_looks_again_and_again_lends_its_session(redis_url: str) -> None:
    """A wait of less than a second does not park a run, but the child begins only while it is parked."""

    async def polls(context: Any) -> Any:
        asked = retrieved(context.delegate("worker", "one", session_isolation="shared"))
        while not asked.done():
            await context.sleep(0.5)
        return (await asked).output

    async with process(redis_url, *agents(), Agent("polls", pattern=polls, llm={"provider": "mock"})) as p:
        await begin(p, "polls", "x")
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == "done: one"


async def test_a_parent_that_is_resumed_gets_its_session_when_its_shared_child_has_ended(
    redis_url: str,
) -> None:
    """The child is still being executed when its parent is cancelled and resumed."""
    waits, gate = asyncio.Event(), asyncio.Event()

    async def at_the_gate() -> None:
        waits.set()
        await gate.wait()

    async def slow(context: Any) -> str:
        await context.step("wait", at_the_gate)
        return "slow"

    async with process(redis_url, *agents(), Agent("slow", pattern=slow, llm={"provider": "mock"})) as p:
        await begin(p, "parent", [to("one", "slow", session_isolation="shared")])
        [child] = await children_of(p)
        executing = asyncio.create_task(p.execute(child.run_id))
        # In its step it sends no command: the answer would tell it that it is cancelled, and it would end.
        await await_for(waits.is_set, what="the child is in its step")
        await cancel(p)
        p.wakes.clear()
        await p.store.run(
            scripts.resume(run_id="r1", agent_id="parent", session_id="s1", input_text="", checkpoint_id="")
        )
        assert (await p.record()).state is RunState.WAITING_SESSION
        p.runner.latch(child.run_id, LatchReason.CANCELLED)
        await executing
        gate.set()
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == [["completed", "slow"]]


async def test_a_run_that_interrupts_a_lent_session_ends_all_who_work_in_it(redis_url: str) -> None:
    for mode, state in (("rollback", RunState.CANCELLED), ("interrupt", RunState.CANCELLED)):
        run, next_run = f"r-{mode}", f"next-{mode}"
        async with process(
            redis_url, *agents(), multi_agent={"default_session_isolation": "shared"}, name=mode
        ) as p:
            await p.submit(run, agent_id="level", input_text="2", session_id=mode)
            await p.execute(run)
            await p.execute(p.wakes.pop(0).run_id)  # the child parks above its parent
            submitted = await p.submit(
                next_run, agent_id="worker", input_text="x", session_id=mode, on_busy=mode
            )
            p.wakes += submitted.also
            if submitted.sent_us is not None:
                await p.execute(next_run)
            record = await finish(p, next_run)
            assert record.result is not None
            assert record.result.final_output == "done: x"
            assert (await p.record(run)).state is state
            assert {child.state for child in await children_of(p, run)} == {RunState.CANCELLED}


@pytest.mark.defect("R01")
async def test_a_forked_child_sees_the_conversation_and_leaves_it_as_it_is(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await p.run("r0", agent_id="worker", input_text="before")
        asked = [to("one", session_isolation="forked"), to("two", session_isolation="forked")]
        await begin(p, "parent", asked)
        await finish(p)
        first, second = await children_of(p)
        assert first.session_id != second.session_id
        contents = [entry["content"] for entry in await p.transcript(first.session_id)]
        assert contents == ["before", "done: before", "one", "done: one"]
        assert len(await p.transcript()) == 4


async def test_a_child_in_the_background_outlives_its_parent(redis_url: str) -> None:
    async with process(redis_url, *agents(), Agent("starts", pattern=starts, llm={"provider": "mock"})) as p:
        await begin(p, "starts", ["one", "fail two"])
        record = await p.record()
        assert record.result is not None
        task_ids, statuses = record.result.final_output
        assert statuses == ["running", "running"]
        children = await children_of(p)
        assert [child.run_id for child in children] == task_ids
        assert {child.state for child in children} == {RunState.QUEUED}
        await execute_all(p)
        assert [child.state for child in await children_of(p)] == ["completed", "failed"]


async def starts(context: Any) -> Any:
    asked = json.loads(context.input_text)
    results = [await context.delegate("worker", text, background=True) for text in asked]
    task_ids = [result.task_id for result in results]
    return [task_ids, [await context.task_status(task_id) for task_id in task_ids]]


@pytest.mark.defect("R09")
async def test_delegation_leaves_no_files(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a router nor a child in the background has a folder. A result is in Redis."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = Agent("starts", pattern=starts, llm={"provider": "mock"})
    for _ in range(2):
        async with process(redis_url, *agents(), own, multi_agent={"enabled": True}) as p:
            run_id = uuid.uuid4().hex
            await begin(p, "starts", ["one"], run_id=run_id)
            await begin(p, "parent", [to("two")], run_id=f"{run_id}-2")
            await execute_all(p)
            assert (await p.record(f"{run_id}-2")).state is RunState.COMPLETED
    assert list(tmp_path.iterdir()) == []


@pytest.mark.defect("R06")
async def test_an_agent_that_is_added_later_can_be_delegated_to(redis_url: str) -> None:
    """Also by a run that has begun before, on a worker that does not know this agent."""
    async with process(redis_url, *agents(), name="old") as old:
        await begin(old, "parent", [to("one"), to("two", "added")])
        await old.execute((await children_of(old))[0].run_id)
        added = Agent("added", pattern=delegating.worker, llm={"provider": "mock"})
        async with process(redis_url, *agents(), added, name="new") as new:
            await old.execute()
            assert (await old.record()).state is RunState.WAITING_CHILD
            await new.execute((await children_of(old))[1].run_id)
            await old.execute()
            record = await old.record()
    assert record.result is not None
    assert record.result.final_output == [["completed", "done: one"], ["completed", "done: two"]]


@pytest.mark.defect("R03")
async def test_the_status_of_a_task_tells_failed_from_completed(redis_url: str) -> None:
    async def polls(context: Any) -> Any:
        results = [await context.delegate("worker", text, background=True) for text in ("one", "fail two")]
        await context.receive("go")
        return [await context.task_status(result.task_id) for result in results]

    async with process(redis_url, *agents(), Agent("polls", pattern=polls, llm={"provider": "mock"})) as p:
        await begin(p, "polls", "x")
        await execute_all(p)
        sent = await p.store.run(
            scripts.fact(
                run_id="r1", name=signal_fact("go"), value="1", message_id="", max_facts=9, max_bytes=999
            )
        )
        p.wakes += sent.wakes
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == ["completed", "failed"]


@pytest.mark.defect("R04")
async def test_children_share_the_budget_of_their_parent(redis_url: str) -> None:
    """What a child may use is reserved; the next one gets what is left after the first one has ended."""
    calling = {
        **agent("calling"),
        "llm": scripted(*[calls(("charge", {"who": "x"}))] * 2, {"text": "paid"}),
        "tools": [{"id": "charge", "impl": "tests.runtime.plugins.Charge"}],
    }
    async with process(redis_url, *agents(), calling) as p:
        asked = [to("a", "calling"), to("b", "calling")]
        await begin(p, "side_by_side", asked, budget={"max_tool_calls": 3})
        [first] = await children_of(p)
        assert first.request is not None
        assert first.request.budget is not None
        assert first.request.budget.max_tool_calls == 3
        record = await finish(p)
        first, second = await children_of(p)
        assert second.request is not None
        assert second.request.budget is not None
        assert second.request.budget.max_tool_calls == 1
        assert (first.usage.tool_calls, second.usage.tool_calls) == (2, 1)
        assert record.usage.tool_calls == 3


async def test_many_children_share_evenly_what_is_left(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        requests = [to(str(n)) for n in range(3)]
        await begin(p, "many", {"requests": requests}, budget={"max_cost_usd": 0.9, "max_total_tokens": 10})
        budgets = [child.request.budget for child in await children_of(p) if child.request]
        assert [round(budget.max_cost_usd or 0, 6) for budget in budgets if budget] == [0.3] * 3
        assert [budget.max_total_tokens for budget in budgets if budget] == [3, 3, 4]
        assert (await finish(p)).state is RunState.COMPLETED


async def test_nothing_left_of_the_budget_ends_the_run(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "parent", [to("one")], budget={"max_tool_calls": 0})
        record = await p.record()
        assert record.result is not None
        assert record.result.error_details is not None
        assert record.result.stop_reason is StopReason.BUDGET_EXHAUSTED
        assert record.result.error_details.context["kind"] == "tool_calls"


async def test_a_call_that_the_program_gives_up_cancels_its_child(redis_url: str) -> None:
    async def impatient(context: Any) -> Any:
        waiting = retrieved(context.delegate("worker", "slow"))
        await context.receive("go")
        waiting.cancel()
        await asyncio.wait([waiting])
        return "gave up"

    async with process(
        redis_url, *agents(), Agent("hurry", pattern=impatient, llm={"provider": "mock"})
    ) as p:
        await begin(p, "hurry", "x")
        p.wakes.clear()
        call = scripts.fact(
            run_id="r1", name=signal_fact("go"), value="1", message_id="", max_facts=9, max_bytes=999
        )
        await p.store.run(call)
        await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == "gave up"
        [child] = await children_of(p)
        assert child.state is RunState.CANCELLED


def with_tools(*replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An agent whose model can ask the agent `worker`, and hand over to it."""
    tools = [
        {"id": "ask_worker", "type": "delegate", "config": {"agent": "worker", "description": "Works."}},
        {"id": "hand_over", "type": "transfer", "config": {"agent": "worker"}},
    ]
    return agent("boss", llm=scripted(*replies), tools=tools, **more)


async def test_a_model_delegates_with_tools_of_the_agents_file(redis_url: str) -> None:
    """Calls of one turn are made side by side. A failed child is an error that the model sees."""
    asked = calls(*(("ask_worker", {"input_text": text}) for text in ("one", "fail two")))
    async with process(redis_url, *agents(), with_tools(asked, {"text": "both"})) as p:
        await begin(p, "boss", "go")
        assert len((await p.record()).waiting) == 2
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == "both"
        succeeded = [each for each in await p.events() if each["name"] == "tool.succeeded"]
        assert [each["payload"]["result"] for each in succeeded] == [{"answer": "done: one"}]
        assert sorted(delegating.CALLS) == ["fail two", "one"]
        failed = [each for each in await p.events() if each["name"] == "tool.failed"]
        assert [each["payload"]["error_details"]["code"] for each in failed] == ["child.failed"]


async def test_a_model_hands_the_run_over(redis_url: str) -> None:
    asked = calls(("hand_over", {"input_text": "take it"}))
    async with process(redis_url, *agents(), with_tools(asked, {"text": "not reached"})) as p:
        await begin(p, "boss", "go")
        record = await finish(p)
        [child] = await children_of(p)
        assert record.result is not None
        assert record.result.final_output == "done: take it"
        assert record.result.metadata["handoff_from"] == child.run_id
        assert record.usage.llm_calls == 1


async def test_plugins_of_the_original_sdk_have_a_router(redis_url: str) -> None:
    """`context.agent_router` exists if the agents file says so, and delegates with the same guarantees."""

    async def routes(context: Any) -> Any:
        if context.agent_router is None:
            return "no router"
        result = await context.agent_router.delegate("worker", "one", context, session_isolation="forked")
        task = await context.agent_router.delegate("worker", "two", context, background=True)
        info = await context.agent_router.task_status(task.task_id)
        if context.input_text == "stay":
            return [result.final_output, info.status, await context.agent_router.task_status("another")]
        return await context.agent_router.transfer("worker", "three", context)

    own = Agent("routes", pattern=routes, llm={"provider": "mock"})
    async with process(redis_url, *agents(), own, multi_agent={"enabled": True}) as p:
        await begin(p, "routes", "stay")
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == ["done: one", "running", None]
        await p.run("r2", agent_id="routes", input_text="go")
        record = await finish(p, "r2")
        assert record.result is not None
        assert record.result.final_output == "done: three"
    async with process(redis_url, *agents(), own, name="w2") as p:
        record = await p.run("r3", agent_id="routes")
        assert record.result is not None
        assert record.result.final_output == "no router"


async def test_the_router_of_the_original_sdk_tells_what_became_of_a_task(redis_url: str) -> None:
    """Its `task_status` returns what is known of a task, and not only its state."""

    async def polls(context: Any) -> Any:
        router = context.agent_router
        results = [await router.delegate("worker", text, background=True) for text in ("one", "fail two")]
        await context.receive("go")
        found = [await router.task_status(result.task_id) for result in results]
        return [[info.agent_id, info.status, info.output, info.error] for info in found]

    own = Agent("polls", pattern=polls, llm={"provider": "mock"})
    async with process(redis_url, *agents(), own, multi_agent={"enabled": True}) as p:
        await begin(p, "polls", "x")
        await execute_all(p)
        sent = await p.store.run(
            scripts.fact(
                run_id="r1", name=signal_fact("go"), value="1", message_id="", max_facts=9, max_bytes=999
            )
        )
        p.wakes += sent.wakes
        record = await finish(p)

    assert record.result is not None
    assert record.result.final_output == [
        ["worker", "completed", "done: one", ""],
        ["worker", "failed", "", "no: fail two"],
    ]


@pytest.mark.parametrize(("artifact_bytes", "code"), [(0, None), (15_000, "step.too_large")])
async def test_an_answer_that_a_child_may_give_reaches_its_parent(
    redis_url: str, artifact_bytes: int, code: str | None
) -> None:
    """Its size was checked when the child ended. The record of the parent holds more than the answer.

    Artifacts of the child count for the record like those of a tool.
    """

    async def large(context: Any) -> str:
        for name in ("a", "b") if artifact_bytes else ():
            context.add_artifact(name, "text", "x" * artifact_bytes)
        return "x" * 19_990

    async def asks(context: Any) -> Any:
        try:
            return len((await context.delegate("large", "go")).output)
        except StepTooLarge as error:
            return error.code

    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_PAYLOAD_BYTES": "20000"})
    llm = {"provider": "mock"}
    own = [Agent("large", pattern=large, llm=llm), Agent("asks", pattern=asks, llm=llm)]
    async with process(redis_url, *own, settings=settings) as p:
        await begin(p, "asks", "go")
        record = await finish(p)

    assert record.result is not None
    assert record.result.final_output == (code or 19_990)


async def test_a_run_that_is_not_durable_waits_in_its_place(redis_url: str) -> None:
    """It is never parked, because it would lose its work; its child is not durable either."""
    async with process(redis_url, *agents()) as p:
        await p.submit(agent_id="parent", input_text=json.dumps([to("one")]), durable=False)
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: p.wakes, what="a child")
        assert (await p.record()).state is RunState.RUNNING
        await execute_all(p)
        p.runner.announce_fact("r1", 1)  # as the notice of the script does
        await executing
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == [["completed", "done: one"]]
        [child] = await children_of(p)
        assert child.request is not None
        assert child.request.durable is False
        refused = await p.run(
            "r2",
            agent_id="parent",
            input_text=json.dumps([to("a", session_isolation="shared")]),
            durable=False,
        )
        assert refused.reason_code == "request.invalid"


@pytest.mark.defect("R07")
async def test_the_sessions_of_children_are_not_listed_and_are_deleted_with_that_of_the_parent(
    redis_url: str,
) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "level", "2")
        await finish(p)
        redis, keys = p.store.redis, p.store.keys
        assert await redis.zrange(keys("index", "sessions"), 0, -1) == ["s1"]
        [middle] = await children_of(p)
        [lowest] = await children_of(p, middle.run_id)
        notified = [word for child in (middle, lowest) for word in (child.run_id, "1")]
        await p.store.run(scripts.confirm_completion(runs=notified))
        with Client(redis_url) as client:
            assert await asyncio.to_thread(client.delete_session, "s1") == 3
        left = [
            key async for key in redis.scan_iter("*") if "run:" in key or "sess:" in key or "journal" in key
        ]
        assert left == []


async def test_a_budget_that_pauses_is_extended_for_a_child(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "parent", [to("one")], budget={"max_tool_calls": 0, "on_breach": "pause"})
        record = await p.record()
        assert record.state is RunState.PAUSED
        assert [(wait.kind, wait.name) for wait in record.waiting] == [(WaitKind.BUDGET, "max_tool_calls")]
        extension = json.dumps({"budget": {"max_tool_calls": 4}, "by": "anna"})
        call = scripts.fact(
            run_id="r1", name="extend:", value=extension, message_id="", max_facts=9, max_bytes=999
        )
        p.wakes += (await p.store.run(call)).wakes
        record = await finish(p)
        [child] = await children_of(p)
        assert child.request is not None
        assert child.request.budget is not None
        assert child.request.budget.max_tool_calls == 4
        assert record.result is not None
        assert record.result.final_output == [["completed", "done: one"]]


async def test_a_cancelled_transfer_ends_as_its_child_does(redis_url: str) -> None:
    """The stop reason of the other agent is that of the run, whatever it is."""
    async with process(redis_url, *agents()) as p:
        await begin(p, "hands_over", "one")
        [child] = await children_of(p)
        await cancel(p, child.run_id)
        record = await finish(p)
        assert record.result is not None
        assert (record.state, record.result.stop_reason) == (RunState.CANCELLED, StopReason.CANCELLED)


async def test_results_that_are_too_large_for_one_answer_are_read_in_pages(redis_url: str) -> None:
    """The claim of the parent does not return the results of all of its children."""

    async def talks(context: Any) -> str:
        return str(context.input_text) * 100_000

    async with process(redis_url, *agents(), Agent("talks", pattern=talks, llm={"provider": "mock"})) as p:
        await begin(p, "side_by_side", [to(text, "talks") for text in "abcd"])
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == [text * 100_000 for text in "abcd"]
        assert await p.store.redis.hgetall(p.store.keys("facts", "r1")) == {}


async def test_a_child_that_is_made_again_has_the_budget_that_is_reserved_for_it(redis_url: str) -> None:
    """Its record was deleted while its parent waited."""
    async with process(redis_url, *agents()) as p:
        await begin(p, "parent", [to("one")], budget={"max_tool_calls": 3})
        [child] = await children_of(p)
        await p.store.redis.delete(p.store.keys("run", child.run_id))
        await time_out(p)
        await p.execute()
        [child] = await children_of(p)
        assert child.request is not None
        assert child.request.budget is not None
        assert child.request.budget.max_tool_calls == 3
        assert (await finish(p)).state is RunState.COMPLETED
