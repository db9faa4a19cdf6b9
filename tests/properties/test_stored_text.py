"""Written values are read back: random unusual values of every kind of output, by each reader, over a real
Redis."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openagents_worker.cli.show import read_run_details
from openagents_worker.errors import RequestInvalid
from openagents_worker.jsontext import replaced
from openagents_worker.models import RunState, parse_request
from openagents_worker.store.checkpoints import checkpoints
from openagents_worker.store.client import Store
from openagents_worker.store.listing import RunFilter, list_runs
from openagents_worker.store.records import read_record
from openagents_worker.store.sessions import read_session
from openagents_worker.store.watch import watch
from tests.runtime.plugins import Charge, _Pattern
from tests.support.runner import agent, process
from tests.unit.test_jsontext import NASTY

GIVEN: dict[str, Any] = {}
"""What the tool and the pattern leave: by door."""


class Gives(Charge):
    """Outputs the values of this example: as its result, an artifact, the state and an event."""

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        context.add_artifact("of the tool", payload=GIVEN["artifact"])
        context.state["of the tool"] = GIVEN["state"]
        await context.emit("shop.looked", seen=GIVEN["event"])
        return GIVEN["result"]


class Leaves(_Pattern):
    """Calls the tool, and outputs the same values itself."""

    async def execute(self) -> Any:
        got = await self.context.tools["tool"].invoke({})
        assert got == replaced(GIVEN["result"]), "the pattern gets what is stored"
        self.context.state["of the pattern"] = GIVEN["state"]
        self.context.add_artifact("of the pattern", payload=GIVEN["artifact"])
        await self.context.emit("shop.left", left=GIVEN["event"])
        return GIVEN["output"]


HERE = __name__


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.fixed_dictionaries(dict.fromkeys(("result", "artifact", "state", "event", "output"), NASTY)))
def test_every_reader_returns_the_same_output_of_a_run(redis_url: str, values: dict[str, Any]) -> None:
    """`record`, `result`, `runs()`, `session`, checkpoints, events and `show`."""
    GIVEN.update(values)

    store = asyncio.run(_carried(redis_url))

    stored = {door: replaced(value) for door, value in values.items()}
    record, session = read_record(store, "r1"), read_session(store, "s1")
    assert record.state is RunState.COMPLETED, record.result
    assert record.result is not None
    assert record.result.final_output == stored["output"]
    payloads = [artifact.payload for artifact in record.result.artifacts]
    assert payloads == [stored["artifact"]] * 2 == [artifact.payload for artifact in session.artifacts]
    assert session.state["of the tool"] == session.state["of the pattern"] == stored["state"]
    [call] = [one for one in checkpoints(store, "r1") if one.kind == "tool"]
    assert call.value == stored["result"]
    assert {"shop.looked", "shop.left"} <= {event.name for event in watch(store, "r1")}
    page = store.execute(list_runs(store.keys, RunFilter.of({}), limit=10, cursor=None))
    assert (page.problems, [one.run_id for one in page]) == ((), ["r1"])
    read_run_details(store, "r1").to_json()
    store.close()


async def _carried(redis_url: str) -> Store:
    definition = agent(pattern={"impl": f"{HERE}.Leaves"}, tools=[{"id": "tool", "impl": f"{HERE}.Gives"}])
    async with process(redis_url, definition) as p:
        await p.store.redis.flushdb()
    async with process(redis_url, definition) as p:
        await p.run()
        return Store(p.store.cell)


REQUEST = {"agent_id": "a", "session_id": "s1", "input_text": "hi"}


@given(value=NASTY)
def test_a_request_is_refused_or_read_back_unchanged(value: Any) -> None:
    """No value of a producer is ever replaced."""
    try:
        request = parse_request({**REQUEST, "metadata": {"x": value}})
    except RequestInvalid as error:
        assert replaced(value) is not value
        str(error).encode()
        return
    assert type(request).model_validate_json(request.model_dump_json()).metadata == {"x": value}
