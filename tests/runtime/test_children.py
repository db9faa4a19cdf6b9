"""A run that delegates to other agents: it parks, its children are runs of their own, each is made once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from openagents_worker.models import RunRecord, RunState, StopReason, WaitKind
from openagents_worker.store.formats import DELEGATES
from tests.runtime import delegating
from tests.runtime.delegating import agents, execute_all, to
from tests.support.runner import Process, process


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    delegating.CALLS.clear()
    yield
    delegating.CALLS.clear()


async def begin(p: Process, agent_id: str, asked: Any, **fields: Any) -> None:
    text = asked if isinstance(asked, str) else json.dumps(asked)
    await p.submit(agent_id=agent_id, input_text=text, **fields)
    await p.execute()


async def finish(p: Process, run_id: str = "r1") -> RunRecord:
    await execute_all(p)
    return await p.record(run_id)


async def children_of(p: Process, run_id: str = "r1") -> list[RunRecord]:
    ids = await p.store.redis.zrange(p.store.keys("index", f"parent={run_id}"), 0, -1)
    return [await p.record(id_) for id_ in ids]


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


async def test_a_failed_child_is_told_from_a_completed_one(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "parent", [to("fail one"), to("two")])
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == [["failed", None], ["completed", "done: two"]]


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
        assert record.result is not None and record.result.error_details is not None
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
        assert record.result is not None and record.result.error_details is not None
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


async def test_a_transfer_to_an_agent_that_fails_fails_for_the_same_reason(redis_url: str) -> None:
    async with process(redis_url, *agents()) as p:
        await begin(p, "hands_over", "fail it")
        record = await finish(p)
        [child] = await children_of(p)
        assert record.result is not None and child.result is not None
        assert (record.state, record.result.stop_reason) == (RunState.FAILED, StopReason.FAILED)
        assert record.result.error_details is not None and child.result.error_details is not None
        assert record.result.error_details.code == child.result.error_details.code == "tool.permanent"
        assert record.result.metadata["handoff_from"] == child.run_id
