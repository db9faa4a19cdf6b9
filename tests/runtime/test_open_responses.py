"""A model call that goes on at the provider, and whose run ends while no worker executes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from openagents_worker.agents import load_agents
from openagents_worker.errors import AgentNotFoundError
from openagents_worker.jsontext import dumps
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.store import scripts
from openagents_worker.store.records import aread_facts
from openagents_worker.store.scripts import RunEnd
from openagents_worker.testing.model_server import ModelServer
from openagents_worker.worker.open_responses import OpenResponses
from openagents_worker.worker.outbox import Outbox, OutboxLimits, Recipients
from tests.support.runner import Process, agent, crash, process
from tests.support.waiting import await_for

END = RunEnd("r1", 1)
NEVER_MS = 3_600_000


def model(url: str, **options: Any) -> dict[str, Any]:
    return {"provider": "openai_responses", "model": "gpt-5", "api_base": url, "background": True, **options}


def assembly_of(*definitions: dict[str, Any]) -> Assembly:
    return Assembly(load_agents(dumps({"agents": list(definitions)}), env={}), env={})


@asynccontextmanager
async def abandoned(redis_url: str) -> AsyncIterator[tuple[ModelServer, Process, Assembly]]:
    """A run whose worker died during a call in the background; nobody executes it."""
    async with ModelServer(lambda _: {"text": "hello", "latency_ms": NEVER_MS}) as server:
        definition = agent(llm=model(server.url))
        async with process(redis_url, definition, name="one") as one:
            await one.submit()
            executing = asyncio.create_task(one.execute())

            async def is_noted() -> bool:
                return len(await aread_facts(one.store, "r1")) > 0

            while not await is_noted():
                await asyncio.sleep(0)
            await crash(one, "r1", executing)
            assembly = assembly_of(definition)
            yield server, one, assembly
            await assembly.aclose()


def cancelled(server: ModelServer) -> int:
    return [entry["event"] for entry in server.log].count("cancelled")


async def cancel(p: Process) -> None:
    await p.store.run(scripts.cancel(run_id="r1", reason="", force=False))


async def test_a_call_of_a_run_that_was_cancelled_without_a_worker_is_cancelled(redis_url: str) -> None:
    """By the outbox of any worker that serves the agent, so that nobody pays for a useless reply."""
    async with abandoned(redis_url) as (server, p, assembly):
        recipients = Recipients(
            all=(OpenResponses(p.store, assembly),), limits=OutboxLimits(poll_s=0.01, retry_s=0.01)
        )
        outbox = Outbox(p.store, recipients, leave=lambda _: None)
        await p.store.run(
            scripts.outbox_take(recipient=OpenResponses.name, limit=1, retry_ms=0, max_retry_ms=0)
        )
        assert cancelled(server) == 0
        await cancel(p)
        await outbox.start()
        await await_for(lambda: cancelled(server) == 1, "the provider is told")
        await outbox.aclose()


async def test_a_run_that_goes_on_keeps_its_call(redis_url: str) -> None:
    """It is not over, or it was resumed: another life has an end of its own."""
    async with abandoned(redis_url) as (server, p, assembly):
        recipient = OpenResponses(p.store, assembly)
        await recipient.deliver(END)
        await cancel(p)
        await recipient.deliver(RunEnd("r1", 2))
        await recipient.deliver(RunEnd("unknown", 1))
        assert cancelled(server) == 0
        await recipient.deliver(END)
        assert cancelled(server) == 1


async def test_a_call_of_a_run_that_is_resumed_at_once_goes_on(redis_url: str) -> None:
    """Nobody has cancelled it yet, and the next attempt continues it instead of making a second call. If
    the run ends again, it is cancelled."""
    async with abandoned(redis_url) as (server, p, assembly):
        await cancel(p)
        call = scripts.resume(run_id="r1", agent_id="a", session_id="s1", checkpoint_id="", input_text="")
        await p.store.run(call)
        recipient = OpenResponses(p.store, assembly)
        await recipient.deliver(END)
        assert cancelled(server) == 0
        await cancel(p)
        await recipient.deliver(RunEnd("r1", 2))
        assert cancelled(server) == 1


async def test_a_worker_that_cannot_cancel_the_call_leaves_it_to_others(redis_url: str) -> None:
    """It does not know the agent, or does not reach the provider. A call of another provider is none of its
    business."""
    async with abandoned(redis_url) as (server, p, _):
        await cancel(p)
        with pytest.raises(AgentNotFoundError):
            await OpenResponses(p.store, assembly_of(agent("b"))).deliver(END)
        elsewhere = assembly_of(agent(llm=model("http://127.0.0.1:1/v1")))
        await OpenResponses(p.store, elsewhere).deliver(END)
        await server.stop()
        same = assembly_of(agent(llm=model(server.url)))
        with pytest.raises(httpx.ConnectError):
            await OpenResponses(p.store, same).deliver(END)
        for assembly in (elsewhere, same):
            await assembly.aclose()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"background": True}, True),
        ({"background": False}, False),
        ({"background": False, "fallbacks": [{"background": True}]}, True),
    ],
)
def test_only_workers_with_such_models_look_at_ends(options: dict[str, Any], expected: bool) -> None:
    """The others are not registered as a recipient, so an end costs nothing."""
    assert assembly_of(agent(llm=model("http://x.test/v1", **options))).has_background_models() is expected
