"""Messages that are sent to a run while it works: the model sees them in its next call, once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from openagents_worker.jsontext import dumps
from openagents_worker.llm.transcript import usable_entries
from openagents_worker.models import RunState
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.facts import FactKind
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from openagents_worker.tools import tool
from tests.runtime import talking
from tests.runtime.talking import Script, talker
from tests.support.runner import Process, calls, crash, process
from tests.support.waiting import PATIENCE_S, await_for

ANSWER = {"text": "Here you are."}


@pytest.fixture(autouse=True)
def _no_call_waits() -> None:
    talking.BEGUN.clear()
    talking.LET_GO.clear()


class InOrder(Script):
    """The replies of a run in order: a message of the user does not start them again."""

    wait_again_at = 0
    """The number of the request after which the tool waits again."""

    def __call__(self, asked: ModelServerRequest) -> Any:
        super().__call__(asked)
        run_id = asked.headers["idempotency-key"].partition(":")[0]
        if len(self.asked[run_id]) == self.wait_again_at:
            talking.BEGUN.clear()
            talking.LET_GO.clear()
        return self.by_run[run_id][len(self.asked[run_id]) - 1]


@asynccontextmanager
async def worker(redis_url: str) -> AsyncIterator[tuple[Process, InOrder, str]]:
    script = InOrder()
    async with ModelServer(script) as server, process(redis_url, talker(server.url)) as p:
        script.by_run = {"r1": [calls(("wait", {})), ANSWER, {"text": "Only German ones."}], "r2": [ANSWER]}
        yield p, script, server.url


async def steer(p: Process, text: str, message_id: str = "") -> None:
    value = dumps({"text": text, "by": "ada"})
    limits = {"max_facts": 100, "max_bytes": 10_000}
    await p.store.run(scripts.fact(run_id="r1", name="steer:", value=value, message_id=message_id, **limits))
    number = await p.store.redis.hget(p.store.keys("run", "r1"), "facts_no")
    p.runner.announce_fact("r1", int(number or 0))


async def in_a_tool(p: Process) -> asyncio.Task[Any]:
    await p.submit("r1", input_text="Find books.")
    executing = asyncio.create_task(p.execute("r1"))
    await await_for(lambda: "r1" in talking.BEGUN, "the tool begins")
    return executing


def messages_of(asked: ModelServerRequest) -> list[tuple[str, str]]:
    shown = asked.body["messages"][1:]
    return [(message["role"], message["content"]) for message in shown if not message.get("tool_calls")]


async def let_go(p: Process, executing: asyncio.Task[Any]) -> None:
    """The tool that waits is stopped, and another attempt goes on."""
    talking.LET_GO.add("r1")
    await crash(p, "r1", executing)


async def test_the_next_model_call_contains_the_messages(redis_url: str) -> None:
    """In their order, behind the tool results; with an event each, and the same message_id once."""
    async with worker(redis_url) as (p, script, url):
        async with process(redis_url, talker(url), name="one") as one:
            executing = await in_a_tool(one)
            for text, message_id in (("In German.", "m1"), ("In German.", "m1"), ("Cheap ones.", "")):
                await steer(one, text, message_id)
            await let_go(one, executing)
        await p.execute("r1")
        events = await p.events("r1")
        facts = await p.store.redis.hgetall(p.store.keys("facts", "r1"))
        transcript = await p.transcript()
        await p.run("r2")
        later = script.asked["r2"][0].body["messages"]

    expected = [("user", "Find books."), ("tool", "gone"), ("user", "In German.\n\nCheap ones.")]
    assert messages_of(script.asked["r1"][-1]) == expected
    steered = [event["payload"] for event in events if event["name"] == "run.steered"]
    assert steered == [{"text": "In German.", "by": "ada"}, {"text": "Cheap ones.", "by": "ada"}]
    assert not [name for name in facts if name.startswith("steer:")]
    assert usable_entries(transcript) == transcript
    said = [message["content"] for message in later if message["role"] == "user"]
    assert said == ["Find books.", "In German.\n\nCheap ones.", "hi"]


async def test_a_message_before_the_first_call_belongs_to_the_question(redis_url: str) -> None:
    """Roles alternate, as some models demand."""
    async with worker(redis_url) as (p, script, _):
        script.by_run["r1"] = [ANSWER]
        await p.submit("r1", input_text="Find books.")
        await steer(p, "In German.")
        await p.execute("r1")
        question, _answer = await p.transcript()

    assert messages_of(script.asked["r1"][0]) == [("user", "Find books.\n\nIn German.")]
    assert question["content"] == "Find books.\n\nIn German."


async def test_replay_takes_the_messages_where_they_were_taken(redis_url: str) -> None:
    """A message that arrives later is not put before what the run has already done."""
    async with worker(redis_url) as (p, script, url):
        script.by_run["r1"] = [
            calls(("wait", {})),
            calls(("add", {"x": 1})),
            calls(("wait", {})),
            ANSWER,
        ]
        async with process(redis_url, talker(url), name="one") as one:
            executing = await in_a_tool(one)
            await steer(one, "First.")
            await let_go(one, executing)
        async with process(redis_url, talker(url), name="two") as two:
            script.wait_again_at = 3
            executing = asyncio.create_task(two.execute("r1"))
            await await_for(lambda: len(script.asked["r1"]) == 3 and talking.BEGUN, "the second tool begins")
            await steer(two, "Second.")
            await let_go(two, executing)
        requests = len(script.asked["r1"])
        await p.execute("r1")
        names = await p.event_names("r1")
        record = await p.record("r1")

    assert record.state is RunState.COMPLETED
    assert len(script.asked["r1"]) == requests + 1
    assert names.count("run.steered") == 2
    assert "replay.prompt_changed" not in names
    assert [text for role, text in messages_of(script.asked["r1"][-1]) if role == "user"] == [
        "Find books.",
        "First.",
        "Second.",
    ]


async def test_a_message_that_arrives_during_the_last_call_is_answered(redis_url: str) -> None:
    """The run goes on with one more step, and the transcript keeps both answers."""
    script, asked_once, released = InOrder(), threading.Event(), threading.Event()
    script.by_run["r1"] = [ANSWER, {"text": "Only German ones."}]

    async def reply(asked: ModelServerRequest) -> Any:
        asked_once.set()
        await asyncio.to_thread(released.wait, PATIENCE_S)
        return script(asked)

    async with ModelServer(reply) as server, process(redis_url, talker(server.url)) as p:
        await p.submit("r1", input_text="Find books.")
        executing = asyncio.create_task(p.execute("r1"))
        await await_for(asked_once.is_set, "the model is asked")
        await steer(p, "Only German ones?")
        facts = p.runner._attempts["r1"].facts
        await await_for(lambda: facts.of(FactKind.STEER), "the message is read")
        released.set()
        await executing
        record = await p.record("r1")
        _, asked = script.asked["r1"]
        _question, answer = await p.transcript()

    assert record.result is not None
    assert record.result.final_output == "Only German ones."
    assert messages_of(asked) == [
        ("user", "Find books."),
        ("assistant", "Here you are."),
        ("user", "Only German ones?"),
    ]
    assert [message["role"] for message in answer["tool_messages"]] == ["assistant", "user"]


async def test_a_message_that_arrives_during_the_last_review_is_answered(redis_url: str) -> None:
    """The reviewer of the pattern reflexion does not get it: the model does, and gives another answer."""
    script, reviewed, released = InOrder(), threading.Event(), threading.Event()
    accepted = {"text": "ACCEPT"}
    script.by_run["r1"] = [ANSWER, accepted, {"text": "Only German ones."}, accepted]

    async def reply(asked: ModelServerRequest) -> Any:
        if len(script.asked.get("r1", ())) == 1:
            reviewed.set()
            await asyncio.to_thread(released.wait, PATIENCE_S)
        return script(asked)

    reflecting = {"pattern": {"type": "reflexion"}}
    async with ModelServer(reply) as server, process(redis_url, talker(server.url, **reflecting)) as p:
        await p.submit("r1", input_text="Find books.")
        executing = asyncio.create_task(p.execute("r1"))
        await await_for(reviewed.is_set, "the answer is reviewed")
        await steer(p, "Only German ones?")
        facts = p.runner._attempts["r1"].facts
        await await_for(lambda: facts.of(FactKind.STEER), "the message is read")
        released.set()
        await executing
        record = await p.record("r1")
        _, _, asked, review = script.asked["r1"]

    assert record.result is not None
    assert record.result.final_output == "Only German ones."
    steered = [("user", "Find books."), ("assistant", "Here you are."), ("user", "Only German ones?")]
    assert messages_of(asked) == steered
    assert messages_of(review)[:4] == [*steered, ("assistant", "Only German ones.")]


@tool
async def sum_up(context: Any) -> str:
    """Asks the model, once the test lets it."""
    talking.BEGUN.append(context.run_id)
    await await_for(lambda: context.run_id in talking.LET_GO, "the test lets it go on")
    return str((await context.call_llm([{"role": "user", "content": "Sum up."}])).output_text)


async def test_a_model_call_of_a_tool_takes_no_messages(redis_url: str) -> None:
    """They are for the pattern: the model that is asked by a tool knows nothing of its conversation."""
    script = InOrder()
    script.by_run["r1"] = [calls(("sum_up", {})), {"text": "In short."}, ANSWER]
    tools = [{"id": "sum_up", "impl": f"{__name__}.sum_up"}]
    async with ModelServer(script) as server, process(redis_url, talker(server.url, tools=tools)) as p:
        executing = await in_a_tool(p)
        await steer(p, "Only German ones?")
        facts = p.runner._attempts["r1"].facts
        await await_for(lambda: facts.of(FactKind.STEER), "the message is read")
        talking.LET_GO.add("r1")
        await executing
    _, of_tool, of_pattern = script.asked["r1"]

    assert [message["content"] for message in of_tool.body["messages"]] == ["Sum up."]
    assert messages_of(of_pattern)[-1] == ("user", "Only German ones?")


async def test_messages_that_are_large_together_are_taken_together(redis_url: str) -> None:
    """Each was accepted alone, so that they do not fail the run."""
    env = {"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_PAYLOAD_BYTES": "4096"}
    script = Script()
    script.by_run = {"r1": [ANSWER]}
    texts = [letter * 3_000 for letter in "ab"]
    async with (
        ModelServer(script) as server,
        process(redis_url, talker(server.url), settings=load_settings(env)) as p,
    ):
        await p.submit("r1", input_text="Find books.")
        for text in texts:
            await steer(p, text)
        await p.execute("r1")
        assert (await p.record("r1")).state is RunState.COMPLETED
        [asked] = script.asked["r1"]
        assert messages_of(asked)[-1] == ("user", "\n\n".join(["Find books.", *texts]))


async def test_a_message_for_a_run_that_is_over_is_refused(redis_url: str) -> None:
    """It would be lost."""
    async with worker(redis_url) as (p, script, _):
        script.by_run["r1"] = [ANSWER]
        await p.run("r1")
        call = scripts.fact(
            run_id="r1", name="steer:", value="{}", message_id="", max_facts=1, max_bytes=1000
        )
        assert (await p.store.run(call)).answer == "ENDED"
