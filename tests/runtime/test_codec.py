"""A whole run whose payloads are encoded: submitted, killed, resumed, finished and read."""

from __future__ import annotations

from contextlib import aclosing, closing
from dataclasses import replace

from openagents_worker.models import RunState
from openagents_worker.settings import load_settings
from openagents_worker.store.client import Store
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.listing import RunFilter, list_runs
from openagents_worker.store.sessions import SessionStore, aread_session
from openagents_worker.store.stored_events import history
from openagents_worker.store.watch import awatch
from openagents_worker.submission.submit import asubmit, submit
from tests.properties.lab import Lab
from tests.runtime import plugins
from tests.runtime.test_replay import executed_until, open_gates, tool
from tests.store.test_codec import REVERSED, WORD
from tests.support.runner import agent, calls, crash, due, process, scripted

REQUEST = {"agent_id": "a", "session_id": "s1", "run_id": "r1"}


async def test_no_payload_is_readable_in_redis_and_every_reader_gets_it(redis_url: str) -> None:
    plugins.FAILURES["second"] = [plugins.rate_limited(), ValueError(WORD)]
    charge = [("charge", {"who": who, "gate": "g", "note": WORD}) for who in ("first", "second")]
    replies = [calls(charge[0]), calls(charge[1]), {"text": f"{WORD} paid"}]
    definition = agent(llm=scripted(*replies), tools=[tool("Charge")])
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url})
    async with (
        process(redis_url, definition, name="one", codec=REVERSED) as one,
        process(redis_url, definition, name="two", codec=REVERSED) as two,
    ):
        await asubmit(one.store, {**REQUEST, "input_text": WORD}, settings=settings)
        executing = await executed_until(one, lambda: len(plugins.LOG) == 1, "the first tool begins")
        await crash(one, "r1", executing)
        open_gates("g")
        await two.execute()
        assert (await two.record()).state is RunState.RETRYING
        await due(two)
        await two.execute()

        record = await two.record()
        assert record.state is RunState.COMPLETED
        assert record.request is not None
        assert record.request.input_text == WORD
        assert record.result is not None
        assert record.result.final_output == f"{WORD} paid"
        session = await aread_session(two.store, "s1")
        assert session.transcript[0]["content"] == WORD
        assert session.state["charged"] == ["first"]
        assert await SessionStore(two.store).load_messages("s1") == list(session.transcript)
        async with aclosing(awatch(two.store, "r1")) as watched:
            payloads = [event.payload async for event in watched]
        assert payloads == [event.payload for event in await two.store.execute(history(two.store.keys, "r1"))]
        page = await two.store.execute(list_runs(two.store.keys, RunFilter.of({}), limit=1, cursor=None))
        assert (page.items, page.problems) == ((record,), ())

        with closing(Lab(redis_url)) as lab:
            everything = repr(lab.read())
        assert WORD not in everything
        assert WORD[::-1] in everything


async def test_a_run_of_another_codec_fails_alone(redis_url: str) -> None:
    """Its texts are unreadable here. The worker executes the next run."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url})
    async with process(redis_url, agent(), codec=PayloadCodec()) as p:
        encoding = Store(replace(p.store.cell, codec=REVERSED))
        await asubmit(
            p.store, {**REQUEST, "input_text": "hi", "run_id": "r2", "session_id": "s2"}, settings=settings
        )
        submit(encoding, {**REQUEST, "input_text": WORD}, settings=settings)
        encoding.close()
        for run_id in ("r1", "r2"):
            await p.execute(run_id)
        result = (await p.record("r1")).result
        assert result is not None
        assert result.error_details is not None
        assert result.error_details.code == "record.unreadable"
        assert (await p.record("r2")).state is RunState.COMPLETED
