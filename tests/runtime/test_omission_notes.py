"""Notes about left-out messages: a run that another version has begun continues with what it has recorded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openagents_worker.context import assemblers, budget
from openagents_worker.llm.scripted import ScriptedClient
from openagents_worker.llm.transcript import model_messages
from tests.support.runner import agent, crash, process, scripted
from tests.support.waiting import await_for

HERE = "tests.runtime.test_omission_notes"
LONG = "word " * 40  # 50 tokens by the estimate


class AsksInBranches:
    """Asks the model in two branches at once, then once more, with the messages of the session."""

    context: Any

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    async def execute(self) -> str:
        past = model_messages(self.context.transcript)

        async def ask(question: str) -> str:
            reply = await self.context.llm_client.generate(
                messages=[*past, {"role": "user", "content": question}]
            )
            return str(reply.output_text)

        first = await asyncio.gather(ask("left"), ask("right"))
        return await ask(f"both: {first}")


def note_of_the_version_before(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


TRUNCATING = {"type": "truncating", "config": {"max_messages": 2}}
HEAD_TAIL = {
    "type": "head_tail",
    "config": {"max_input_tokens": 210, "reserve_for_response": 0, "head_messages": 1},
}


@pytest.mark.parametrize("assembler", [TRUNCATING, HEAD_TAIL], ids=["truncating", "head_tail"])
async def test_a_run_that_the_version_before_has_begun_repeats_no_call(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, assembler: dict[str, Any]
) -> None:
    """The note is no part of what identifies a call, also when branches ask at the same time."""
    asked: list[list[dict[str, Any]]] = []
    respond = ScriptedClient.respond

    async def noted(self: Any, request: Any) -> Any:
        asked.append([dict(message) for message in request.messages])
        if len(asked) == 3:
            await asyncio.Event().wait()
        return await respond(self, request)

    definition = agent(llm=scripted({"text": "a"}, {"text": "b"}, {"text": "c"}), context_assembler=assembler)
    branches = {**definition, "pattern": {"impl": f"{HERE}.AsksInBranches"}}
    async with process(redis_url, definition, name="talks") as talks:
        for number in range(5):
            await talks.run(f"t{number}", input_text=f"q{number} {LONG}")
    monkeypatch.setattr(ScriptedClient, "respond", noted)
    async with (
        process(redis_url, branches, name="one") as one,
        process(redis_url, branches, name="two") as two,
    ):
        with monkeypatch.context() as before:
            for module in (assemblers, budget):
                before.setattr(module, "omission_note", note_of_the_version_before)
            await one.submit("r1", input_text="now")
            executing = asyncio.create_task(one.execute("r1"))
            await await_for(lambda: len(asked) == 3, "the third request")
            await crash(one, "r1", executing)
        await two.execute("r1")

        assert (await two.record("r1")).state == "completed"
        questions = [messages[-1]["content"].split()[0] for messages in asked]
        assert questions == ["left", "right", "both:", "both:"]
        notes = [[each for each in messages if each["role"] == "system"] for messages in asked]
        assert [note.get("name") for (note,) in notes] == [None, None, None, "omitted_messages"]
