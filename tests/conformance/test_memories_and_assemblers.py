"""Every memory and every context assembler: three runs of a session, one of which loses its worker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.memory import BUILTIN_MEMORIES
from openagents_worker.models import RunState
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.support.runner import agent, crash, process
from tests.support.waiting import await_for

CONFIG: dict[str, dict[str, Any]] = {"chain": {"memories": [{"type": "window_buffer"}]}}
"""The config of a type that does not work without one."""
ELSEWHERE = {"zep": "it needs a server of its own: tests/extras/test_zep.py"}

PARTS = [
    *(("memory", name) for name in sorted(BUILTIN_MEMORIES) if name not in ELSEWHERE),
    *(("context_assembler", name) for name in sorted(BUILTIN_ASSEMBLERS)),
]


@pytest.mark.parametrize(("slot", "type_"), PARTS, ids=[f"{slot}-{type_}" for slot, type_ in PARTS])
async def test_a_session_goes_on_with_what_it_knows(redis_url: str, slot: str, type_: str) -> None:
    """Each question is the end of its prompt, and stands there once. Earlier turns are shown in order. The
    second run is continued by another worker: its model gets the same prompt, and the session one turn."""
    asked: list[str] = []
    may_answer = asyncio.Event()
    may_answer.set()

    async def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append("\n".join(str(message["content"]) for message in request.messages))
        number = len(asked)
        await may_answer.wait()
        return {"text": f"answer {number}"}

    async with ModelServer(reply) as server:
        llm = {"provider": "openai_compatible", "model": "m", "api_base": server.url}
        definition = agent(llm=llm, **{slot: {"type": type_, "config": CONFIG.get(type_, {})}})
        async with (
            process(redis_url, definition, name="one") as one,
            process(redis_url, definition, name="two") as two,
        ):
            await one.run("r1", input_text="question one")
            may_answer.clear()
            await one.submit("r2", input_text="question two")
            dying = asyncio.create_task(one.execute("r2"))
            await await_for(lambda: len(asked) == 2, "the model is asked")
            await crash(one, "r2", dying)
            may_answer.set()
            await two.execute("r2")
            assert asked[2] == asked[1]
            record = await two.run("r3", input_text="question three")
            assert record.state is RunState.COMPLETED, record.result
            for number, text in ((0, "question one"), (2, "question two"), (3, "question three")):
                assert asked[number].rstrip().endswith(text)
                assert asked[number].count(text) == 1
            last = asked[3]
            places = [last.find(text) for text in ("question one", "question two", "question three")]
            assert places == sorted(places)
            turns = [message["content"] for message in await two.transcript()]
            assert turns[0::2] == ["question one", "question two", "question three"]
