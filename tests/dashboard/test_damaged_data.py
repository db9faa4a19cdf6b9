"""Pages about data that another program has damaged, or that a pattern has made up."""

from __future__ import annotations

from typing import Any

import pytest

from openagents_worker.store.records import RECORD_FIELDS
from tests.dashboard.reading import ASKS, USES, asking, words_of
from tests.dashboard.server import Server
from tests.support.runner import agent, process

LISTS = ("/runs", "/overview", "/sessions", "/approvals", "/fleet")
OF_THE_RUN = ("/run/r1", "/session/s1")
NOT_EXPLAINED = "the server could not make this page"


@pytest.mark.long
@pytest.mark.parametrize("value", ["-1", "9" * 30, "[]", "x"])
async def test_a_damaged_record_hides_no_other_run(server: Server, redis_url: str, value: str) -> None:
    """Whatever the field. The page of the run itself shows it, or says with a code that it cannot be read."""
    async with process(redis_url, USES) as worker:
        for run_id, session_id in (("r1", "s1"), ("r2", "s2")):
            await worker.run(run_id, agent_id="uses", session_id=session_id)
        redis, key = worker.store.redis, worker.store.keys("run", "r1")
        good = await redis.hgetall(key)
        for field in RECORD_FIELDS:
            await redis.hset(key, field, value)
            for path in LISTS:
                answer = await server.get(path)
                assert answer.status_code == 200, (field, path, answer.text[-2000:])
            assert "r2" in await server.text("/runs"), field
            for path in OF_THE_RUN:
                assert NOT_EXPLAINED not in (await server.get(path)).text, (field, path)
            await (redis.hset(key, field, good[field]) if field in good else redis.hdel(key, field))


@pytest.mark.parametrize(
    ("kind", "id_", "path"),
    [
        ("run", "r1", "/runs"),
        ("run", "r1", "/overview"),
        ("run", "r1", "/session/s1"),
        ("session", "s1", "/sessions"),
        ("facts", "r1", "/approvals"),
    ],
)
async def test_a_list_names_what_it_leaves_out(
    server: Server, redis_url: str, kind: str, id_: str, path: str
) -> None:
    """A key that another program has overwritten. Nobody would miss the run otherwise."""
    async with process(redis_url, ASKS) as worker:
        await asking(worker)
        redis, key = worker.store.redis, worker.store.keys(kind, id_)
        await redis.rename(key, "kept")
        await redis.set(key, "text", ex=60)
        page = words_of(await server.text(path))
        await redis.rename("kept", key)

    assert f"1 record cannot be read, the first one is {key} (redis.wrong_type)" in page


class MakesUpEvents:
    """Emits events under names of the library, with what the library would never write."""

    context: Any

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    async def execute(self) -> str:
        for value in ("x", -1, [1], {"a": "b"}, None, 2**62, "<b>"):
            call = {"call": str(value), "call_id": str(value)}
            for name in ("llm.called", "tool.called", "step.started", "run.waiting", "run.retry_scheduled"):
                await self.context.emit(name, **call, model=value, tool_id=value, params=value, waiting=value)
            waits = [{"call_id": value, "kind": value, "name": value}]
            await self.context.emit("run.attempt_started")
            await self.context.emit("run.waiting", **call, waiting=waits)
            metrics = dict.fromkeys(("input_tokens", "output_tokens", "cost_usd", "ttft_ms"), value)
            for name in ("llm.succeeded", "llm.failed", "usage.updated", "run.child_started"):
                await self.context.emit(
                    name, **call, _metrics=metrics, usage=value, tool_calls=value, child_run_id=str(value)
                )
            for name in ("run.attempt_started", "run.completed", "run.child_completed"):
                await self.context.emit(name, **call, error_details=value, delay_ms=value, reason=value)
        return "done"


async def test_events_that_a_pattern_makes_up_do_not_hide_its_run(server: Server, redis_url: str) -> None:
    """Patterns for the original SDK emit events with these names themselves."""
    made_up = agent(pattern={"impl": f"{__name__}.MakesUpEvents"})
    async with process(redis_url, made_up) as worker:
        assert (await worker.run()).state == "completed"

        for path in (*LISTS, *OF_THE_RUN):
            answer = await server.get(path)
            assert answer.status_code == 200, (path, answer.text[-2000:])
            assert "<b>" not in answer.text.replace("<b>Flower", "")
