"""Conversations with a model over HTTP: however a turn ends, it never makes a later request invalid.

The model server refuses whatever real chat APIs refuse, with its own text; a scripted refusal has another.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import FixedMessage
from openagents_worker.llm.transcript import usable_entries
from openagents_worker.models import RunBudget, RunRecord, RunState
from openagents_worker.patterns.turn import Conversation
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store import scripts
from openagents_worker.store.scripts import ReleaseKind, ResumeAnswer
from openagents_worker.store.sessions import aread_session
from openagents_worker.submission.submit import forking
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from openagents_worker.worker.interruptions import end_overdue
from tests.runtime import talking
from tests.runtime.talking import Script, talker
from tests.support.runner import Process, calls, crash, process
from tests.support.waiting import await_for

ANSWER = {"text": "Here you are."}
LARGEST_BYTES, HUGE = 12_000, 16_000


@asynccontextmanager
async def conversation(
    redis_url: str, *, can_stream: bool = True, **fields: Any
) -> AsyncIterator[tuple[Process, Script, ModelServer]]:
    script = Script()
    async with (
        ModelServer(script) as server,
        process(redis_url, talker(server.url, **fields), settings=small(redis_url)) as p,
    ):
        server.can_stream = can_stream
        yield p, script, server


def small(redis_url: str) -> Settings:
    """Lower the limits, so that a large message need not be huge."""
    return load_settings(
        {"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_PAYLOAD_BYTES": str(LARGEST_BYTES)}
    )


def code_of(record: RunRecord) -> str | None:
    assert record.result is not None
    return record.result.error_details.code if record.result.error_details else None


def messages_of(script: Script, run_id: str) -> list[list[dict[str, Any]]]:
    """The messages of each request of a run, as they were sent."""
    return [list(asked.body["messages"]) for asked in script.asked[run_id]]


# --- one conversation, sent once -------------------------------------------------------------------------


async def test_each_request_begins_with_the_one_before_it(redis_url: str) -> None:
    """Over five turns with three tools, byte for byte: the prompt caches of providers depend on it."""
    turns = [
        [calls(("add", {"x": 1, "y": 2})), calls(("shout", {"text": "three"})), {"text": "3, THREE."}],
        [{"text": "You are welcome."}],
        [calls(("add", {"x": 4}), ("add", {"x": 5}), ("shout", {"text": "nine"})), {"text": "9"}],
        [calls(("fail", {"text": "oh"}), ("fly", {})), calls(("shout", {})), {"text": "It does not work."}],
        [calls(("add", {"x": 1, "y": 2})), {"text": "Still 3."}],
    ]
    async with conversation(redis_url) as (p, script, _):
        for number, turn in enumerate(turns):
            script.by_run[f"r{number}"] = turn
            record = await p.run(f"r{number}", input_text=f"Question {number}")
            assert record.state is RunState.COMPLETED

    requests = [asked for number in range(len(turns)) for asked in script.asked[f"r{number}"]]
    assert len(requests) == 11
    texts = [dumps(asked.body["messages"]) for asked in requests]
    for before, after in itertools.pairwise(texts):
        assert after.startswith(before[:-1] + ",")
    assert len({dumps(asked.body["tools"]) for asked in requests}) == 1
    assert all(text.count("Question 0") == 1 for text in texts)


async def test_a_window_shows_the_newest_turns_with_their_calls(redis_url: str) -> None:
    """A buffer of two turns shows two complete turns and the question."""
    memory = {"type": "window_buffer", "config": {"window_size": 2}}
    async with conversation(redis_url, memory=memory) as (p, script, _):
        for number in range(4):
            script.by_run[f"r{number}"] = [calls(("add", {"x": number})), ANSWER]
            await p.run(f"r{number}", input_text=f"Question {number}")

    shown = messages_of(script, "r3")[0]
    roles = ["user", "assistant", "tool", "assistant"]
    assert [message["role"] for message in shown] == ["system", *roles, *roles, "user"]
    assert [message["content"] for message in shown if message["role"] == "user"] == [
        "Question 1",
        "Question 2",
        "Question 3",
    ]


async def test_the_calls_of_a_custom_pattern_are_shown_in_later_turns(redis_url: str) -> None:
    """Its `turn_messages` are stored in the session. Later runs see them, also those of other agents."""
    own = {"impl": "tests.runtime.talking.Own"}
    script = Script()
    async with (
        ModelServer(script) as server,
        process(redis_url, talker(server.url), {**talker(server.url, pattern=own), "id": "own"}) as p,
    ):
        await p.run("r1", agent_id="own", input_text="1?")
        script.by_run["r2"] = [ANSWER]
        await p.run("r2")

    shown = messages_of(script, "r2")[0][1:]
    assert [message["role"] for message in shown] == ["user", "assistant", "tool", "assistant", "user"]
    assert shown[1]["tool_calls"][0]["id"] == shown[2]["tool_call_id"] == "own"


async def test_without_a_transcript_the_memory_shows_the_turns(redis_url: str) -> None:
    """If the assembler shows no transcript, the memory sends the conversation. It is sent only once."""
    nothing = {"type": "truncating", "config": {"max_messages": 0, "include_summary_message": False}}
    async with conversation(redis_url, context_assembler=nothing) as (p, script, _):
        for run_id in ("r1", "r2"):
            script.by_run[run_id] = [ANSWER]
            await p.run(run_id, input_text=f"Question of {run_id}")

    _system, asked = messages_of(script, "r2")[0]
    assert asked["content"].count("Question of r1") == 1
    assert asked["content"].endswith("## question\nQuestion of r2")


@pytest.mark.parametrize("largest", [3_000, 1_500, 1_200])
async def test_a_session_that_is_too_long_for_the_model_continues(redis_url: str, largest: int) -> None:
    """First the calls of earlier turns are left out, then half of the rest, until the request fits."""
    script = Script()

    def reply(asked: ModelServerRequest) -> Any:
        entry = script(asked)
        if len(dumps(asked.body["messages"])) > largest:
            return {"error": "response", "message": "This model's maximum context length is 4096 tokens."}
        return entry

    async with ModelServer(reply) as server, process(redis_url, talker(server.url)) as p:
        for number in range(6):
            script.by_run[f"r{number}"] = [calls(("shout", {"text": "a" * 200})), ANSWER]
            record = await p.run(f"r{number}", input_text=f"Question {number}")
            assert code_of(record) is None
        names = await p.event_names("r5")

    assert names.count("pattern.past_shortened") == len(script.asked["r5"]) - 2 > 0
    *_, shown = messages_of(script, "r5")
    assert [message["role"] for message in shown[-3:]] == ["user", "assistant", "tool"]


async def test_a_question_that_is_too_long_fails_and_the_session_continues(redis_url: str) -> None:
    """Leaving out earlier turns does not help here."""
    script = Script()

    def reply(asked: ModelServerRequest) -> Any:
        too_long = {"error": "response", "message": "context_length_exceeded"}
        return too_long if len(dumps(asked.body["messages"])) > 5_000 else script(asked)

    async with ModelServer(reply) as server, process(redis_url, talker(server.url)) as p:
        script.by_run = {run_id: [ANSWER] for run_id in ("r1", "r2", "r3")}
        records = [
            await p.run(run_id, input_text=text)
            for run_id, text in [("r1", "One."), ("r2", "x" * 6_000), ("r3", "Three.")]
        ]

    assert [code_of(record) for record in records] == [None, "llm.context_length", None]
    assert [message["content"] for message in messages_of(script, "r3")[0]][1:] == [
        "One.",
        ANSWER["text"],
        "Three.",
    ]


# --- whatever the model says -----------------------------------------------------------------------------


def asks(name: Any = "add", arguments: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "arguments": {} if arguments is None else arguments, **more}


ODD_REPLIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an invented name": ({"tool_calls": [asks("fly")]}, ["tool.not_found"]),
    "an empty name": ({"tool_calls": [asks("")]}, ["tool.not_found"]),
    "no name": ({"tool_calls": [asks(None)]}, ["tool.not_found"]),
    "an illegal name": ({"tool_calls": [asks("say hi, please!")]}, ["tool.not_found"]),
    "a name in other letters": ({"tool_calls": [asks("добавить")]}, ["tool.not_found"]),
    "a name that is too long": ({"tool_calls": [asks("x" * 5000)]}, ["tool.not_found"]),
    "half a character": ({"tool_calls": [asks("\ud83d", '{"x": "\ud83d"}')]}, ["tool.not_found"]),
    "an id twice": ({"tool_calls": [asks(id="c"), asks("shout", {"text": "a"}, id="c")]}, ["0", "A"]),
    "no ids": ({"tool_calls": [asks(id=""), asks("fly", id=" ")]}, ["0", "tool.not_found"]),
    "arguments null": ({"tool_calls": [asks(arguments="null")]}, ["0"]),
    "blank arguments": ({"tool_calls": [asks(arguments=" \n")]}, ["0"]),
    "broken arguments": ({"tool_calls": [asks(arguments='{"x": 1')]}, ["tool.validation"]),
    "an array": ({"tool_calls": [asks(arguments="[1]")]}, ["tool.validation"]),
    "a number": ({"tool_calls": [asks(arguments="7")]}, ["tool.validation"]),
    "a text": ({"tool_calls": [asks(arguments='"x"')]}, ["tool.validation"]),
    "not a number": ({"tool_calls": [asks(arguments='{"x": NaN}')]}, ["tool.validation"]),
    "deep arguments": (
        {"tool_calls": [asks(arguments='{"x":' * 300 + "1" + "}" * 300)]},
        ["tool.validation"],
    ),
    "deeper arguments": ({"tool_calls": [asks(arguments="[" * 5_000)]}, ["tool.validation"]),
    "huge arguments": (
        {"tool_calls": [asks("shout", {"text": "x" * HUGE}), asks()]},
        ["tool.validation", "0"],
    ),
    "huge broken arguments": (
        {"tool_calls": [asks("shout", '{"text": "' + "x" * HUGE)]},
        ["tool.validation"],
    ),
    "wrong arguments": ({"tool_calls": [asks(arguments={"z": 1})]}, ["tool.validation"]),
    "text and calls": ({"text": "Let me see.", "tool_calls": [asks()]}, ["0"]),
}


def result_sent(message: dict[str, Any]) -> str:
    """The error code that was sent to the model, or the result."""
    content = json.loads(message["content"]) if message["content"].startswith("{") else message["content"]
    return content["error"] if isinstance(content, dict) else content


@pytest.mark.share(of=4)
@pytest.mark.parametrize("can_stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("name", ODD_REPLIES)
@pytest.mark.defect("P09")
async def test_whatever_the_model_says_the_next_requests_are_accepted(
    redis_url: str, name: str, can_stream: bool
) -> None:
    """The next requests of the same run and of the next run are valid. Errors are reported to the model."""
    odd, outcomes = ODD_REPLIES[name]
    async with conversation(redis_url, can_stream=can_stream) as (p, script, server):
        script.by_run["r1"] = [odd, odd, ANSWER]
        script.by_run["r2"] = [{"text": "Bye."}]
        first, second = await p.run("r1"), await p.run("r2")

        assert [line["status"] for line in server.log if line["event"] == "answered"] == [200] * 4
    assert (code_of(first), code_of(second)) == (None, None)
    once, twice = messages_of(script, "r1")[1:]
    assert [result_sent(message) for message in once if message["role"] == "tool"] == outcomes
    assert [result_sent(message) for message in twice if message["role"] == "tool"] == outcomes * 2
    assert messages_of(script, "r2")[0][: len(twice)] == twice


async def test_an_agent_without_tools_survives_an_invented_call(redis_url: str) -> None:
    """Its requests have no `tools`, as an empty list is refused. The call and its error are sent."""
    async with conversation(redis_url, tools=[]) as (p, script, _):
        script.by_run = {"r1": [{"tool_calls": [asks("fly")]}, ANSWER], "r2": [ANSWER]}
        first, second = await p.run("r1"), await p.run("r2")

    assert (code_of(first), code_of(second)) == (None, None)
    assert all("tools" not in asked.body for asked in script.asked["r1"] + script.asked["r2"])
    assert result_sent(messages_of(script, "r2")[0][3]) == "tool.not_found"


@pytest.mark.share(of=3)
@pytest.mark.parametrize("name", ODD_REPLIES)
async def test_replay_sends_the_same_request(redis_url: str, name: str) -> None:
    """A worker dies during a model call. The next worker sends the same request, byte for byte."""
    odd, _ = ODD_REPLIES[name]
    script, asked_again = Script(), asyncio.Event()
    script.by_run["r1"] = [odd, ANSWER]

    async def reply(asked: Any) -> Any:
        entry = script(asked)
        if asked.n == 1 and len(script.asked["r1"]) == 2:
            asked_again.set()
            await asyncio.Event().wait()
        return entry

    async with (
        ModelServer(reply) as server,
        process(redis_url, talker(server.url), settings=small(redis_url), name="one") as one,
        process(redis_url, talker(server.url), settings=small(redis_url), name="two") as two,
    ):
        await one.submit()
        executing = asyncio.create_task(one.execute())
        await asked_again.wait()
        await crash(one, "r1", executing)
        attempt_result = await two.execute()

    assert attempt_result.kind is AttemptOutcome.FINISHED
    _first, before, after = script.asked["r1"]
    assert dumps(before.body) == dumps(after.body)
    assert before.headers["idempotency-key"] == after.headers["idempotency-key"]


# --- however a turn ends ---------------------------------------------------------------------------------


class Talk:
    """One session. Each of its turns ends in another way."""

    def __init__(
        self,
        p: Process,
        script: Script,
        redis_url: str,
        server: ModelServer,
        session: str,
        *,
        llm: dict[str, Any] | None = None,
    ) -> None:
        self._more: dict[str, Any] = {} if llm is None else {"llm": llm}
        self._p, self._script, self._redis_url, self._url = p, script, redis_url, server.url
        self.session = session
        self._numbers = itertools.count(1)

    async def turn(self, *says: dict[str, Any], **fields: Any) -> RunRecord:
        run_id = self._new(says)
        return await self._p.run(run_id, session_id=self.session, **fields)

    def _new(self, says: tuple[dict[str, Any], ...]) -> str:
        run_id = f"{self.session}-{next(self._numbers)}"
        self._script.by_run[run_id] = list(says)
        return run_id

    async def _submit(self, *says: dict[str, Any], **fields: Any) -> str:
        run_id = self._new(says)
        await self._p.submit(run_id, session_id=self.session, **fields)
        return run_id

    # The endings, each with the error code of the run; None if it completes.

    async def completed(self) -> None:
        await self._ends(None, ANSWER)

    async def completed_with_tools(self) -> None:
        await self._ends(None, calls(("add", {"x": 1}), ("shout", {"text": "a"})), ANSWER)

    async def completed_by_odd_ways(self) -> None:
        odd = {"tool_calls": [asks(None, "[", id="c"), asks("a b", " ", id="c")]}
        await self._ends(None, odd, odd, ANSWER)

    async def refused(self) -> None:
        await self._ends("llm.filtered", {"error": "response", "message": "content_filter"})

    async def refused_after_a_tool(self) -> None:
        filtered = {"error": "response", "message": "context_length_exceeded"}
        await self._ends("llm.context_length", calls(("add", {})), filtered)

    async def rate_limited(self) -> None:
        await self._ends("llm.rate_limit", {"error": "rate_limit"}, budget=RunBudget(max_resume_attempts=0))

    async def server_error(self) -> None:
        await self._ends("llm.connection", {"error": "server_error"}, budget=RunBudget(max_resume_attempts=0))

    async def empty_answer(self) -> None:
        await self._ends("llm.empty", {"text": ""})

    async def blank_answer_after_a_tool(self) -> None:
        await self._ends("llm.empty", calls(("add", {})), {"text": " \n"})

    async def empty_question(self) -> None:
        await self._ends(None, ANSWER, input_text="")

    async def blank_question_refused(self) -> None:
        await self._ends("llm.response", {"error": "response"}, input_text=" ")

    async def tool_failure(self) -> None:
        await self._ends(None, calls(("fail", {})), ANSWER)

    async def only_tool_failures(self) -> None:
        await self._ends("tool.error", calls(("fail", {})))

    async def max_steps(self) -> None:
        await self._ends("execution.max_steps", calls(("add", {})), budget=RunBudget(max_steps=2))

    async def half_a_batch(self) -> None:
        batch = calls(("add", {"x": 1}), ("shout", {"text": "a"}), ("add", {"x": 2}))
        await self._ends("execution.max_steps", batch, ANSWER, budget=RunBudget(max_tool_calls=2))

    async def budget(self) -> None:
        await self._ends(
            "execution.budget_exhausted", calls(("add", {})), ANSWER, budget=RunBudget(max_cost_usd=1e-9)
        )

    async def output_mismatch(self) -> None:
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        await self._ends(
            "execution.output_validation",
            calls(("add", {})),
            {"text": "no number"},
            output_type=schema,
            budget=RunBudget(max_validation_retries=1),
        )

    async def output_at_the_second_try(self) -> None:
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        run_id = self._new(({"text": ""},))
        tries = iter([{"text": ""}, {"text": '{"n": 1}'}])
        self._script.by_run[run_id] = _Each(tries)
        record = await self._p.run(run_id, session_id=self.session, output_type=schema)
        assert code_of(record) is None

    async def cancelled_in_a_tool(self) -> None:
        run_id = await self._submit(calls(("add", {}), ("wait", {})), ANSWER)
        executing = asyncio.create_task(self._p.execute(run_id))
        await await_for(lambda: run_id in talking.BEGUN, "the tool begins")
        await self._p.store.run(scripts.cancel(run_id=run_id, reason="enough", force=False))
        self._p.runner.latch(run_id, LatchReason.CANCELLED)
        await executing
        assert (await self._p.record(run_id)).state is RunState.CANCELLED

    async def interrupted_in_a_tool(self) -> None:
        await self._stopped_by_another_run("interrupt")

    async def rolled_back_in_a_tool(self) -> None:
        await self._stopped_by_another_run("rollback")

    async def _stopped_by_another_run(self, on_busy: str) -> None:
        run_id = await self._submit(calls(("add", {}), ("wait", {}), ("add", {"x": 2})), ANSWER)
        executing = asyncio.create_task(self._p.execute(run_id))
        await await_for(lambda: run_id in talking.BEGUN, "the tool begins")
        following = await self._submit(ANSWER, on_busy=on_busy)
        self._p.runner.latch(run_id, LatchReason.CANCELLED)
        await executing
        assert (await self._p.record(run_id)).state is RunState.CANCELLED
        await self._p.execute(following)
        assert code_of(await self._p.record(following)) is None

    async def interrupted_after_a_hand_over(self) -> None:
        run_id = await self._submit(calls(("add", {}), ("wait", {})), ANSWER)
        executing = asyncio.create_task(self._p.execute(run_id))
        await await_for(lambda: run_id in talking.BEGUN, "the tool begins")
        self._p.runner.latch(run_id, LatchReason.HANDOVER)
        await self._p.runner.hurry_all()
        await executing
        following = await self._submit(calls(("add", {"x": 3})), ANSWER, on_busy="interrupt")
        for each in (run_id, following):
            await self._p.execute(each)
        assert (await self._p.record(run_id)).state is RunState.CANCELLED

    async def interrupted_by_force(self) -> None:
        run_id = await self._submit(calls(("add", {}), ("wait", {})), ANSWER)
        executing = asyncio.create_task(self._p.execute(run_id))
        await await_for(lambda: run_id in talking.BEGUN, "the tool begins")
        following = await self._submit(ANSWER, on_busy="interrupt")
        await self._p.store.redis.hset(self._p.store.keys("run", run_id), "force_at", 1)
        await end_overdue(self._p.store, run_id)
        self._p.runner.latch(run_id, LatchReason.CANCELLED)
        await executing
        await self._p.execute(following)
        assert (await self._p.record(run_id)).state is RunState.CANCELLED

    async def steered(self) -> None:
        run_id = await self._submit(calls(("add", {})), ANSWER)
        value = dumps({"text": "Be brief.", "by": ""})
        limits = {"max_facts": 10, "max_bytes": 1_000}
        call = scripts.fact(run_id=run_id, name="steer:", value=value, message_id="", **limits)
        assert (await self._p.store.run(call)).answer == "OK"
        await self._p.execute(run_id)
        assert code_of(await self._p.record(run_id)) is None
        assert "run.steered" in await self._p.event_names(run_id)

    async def forked_between_call_and_result(self) -> None:
        run_id = (await self.turn(calls(("add", {}), ("shout", {"text": "a"})), ANSWER)).run_id
        fork_id = self._new((ANSWER,))
        options: Any = {"run_id": fork_id, "session_id": self.session, "input_text": "And now?"}
        environment = load_settings({"OPENAGENTS_REDIS_URL": self._redis_url})
        await self._p.store.execute(forking(self._p.store.keys, environment, f"{run_id}:step:2", **options))
        await self._p.execute(fork_id)
        assert code_of(await self._p.record(fork_id)) is None

    async def interrupted_before_it_began(self) -> None:
        run_id = await self._submit(ANSWER)
        following = await self._submit(ANSWER, on_busy="interrupt")
        for each in (run_id, following):
            await self._p.execute(each)
        assert (await self._p.record(run_id)).state is RunState.CANCELLED

    async def killed_and_interrupted(self) -> None:
        run_id = await self._submit(calls(("add", {}), ("wait", {})), ANSWER)
        async with self._dying_in_a_tool(run_id) as (dying, executing):
            following = await self._submit(ANSWER, on_busy="interrupt")
            await crash(dying, run_id, executing)
        talking.BEGUN.clear()
        for each in (run_id, following):
            await self._p.execute(each)
        assert (await self._p.record(run_id)).state is RunState.CANCELLED
        assert not talking.BEGUN, "a call of the interrupted run is made again"

    async def killed_and_completed(self) -> None:
        run_id = await self._submit(calls(("add", {}), ("wait", {})), ANSWER)
        async with self._dying_in_a_tool(run_id) as (dying, executing):
            talking.LET_GO.add(run_id)
            await crash(dying, run_id, executing)
        await self._p.execute(run_id)
        assert code_of(await self._p.record(run_id)) is None

    async def poisoned(self) -> None:
        run_id = await self._submit(calls(("add", {}), ("wait", {})), ANSWER)
        for _ in range(2):  # the first time something is stored
            async with self._dying_in_a_tool(run_id) as (dying, executing):
                await self._given_back(run_id, dying)
                executing.cancel()
                await asyncio.wait({executing})
        assert code_of(await self._p.record(run_id)) == "run.poisoned"

    async def _given_back(self, run_id: str, dying: Process) -> None:
        dying.lease.left_s = 0.0
        fence = await self._p.store.redis.hget(self._p.store.keys("run", run_id), "fence")
        assert fence is not None
        given = scripts.release(
            run_id=run_id,
            incarnation=dying.lease.incarnation,
            fence=fence,
            kind=ReleaseKind.LOST,
            max_recoveries=0,
        )
        await self._p.store.run(given)

    async def failed_and_resumed(self) -> None:
        run_id = self._new((calls(("add", {})), {"error": "response"}))
        await self._p.run(run_id, session_id=self.session)
        self._script.by_run[run_id] = [calls(("add", {})), ANSWER]
        ids = {"run_id": run_id, "agent_id": "a", "session_id": self.session}
        resumed = await self._p.store.run(scripts.resume(**ids, input_text="", checkpoint_id=""))
        assert resumed.answer is ResumeAnswer.OK
        await self._p.execute(run_id)
        assert code_of(await self._p.record(run_id)) is None

    async def left_broken_by_an_older_version(self) -> None:
        """Entries that an older version wrote: an error as reply, an empty question, an empty reply."""
        await self.completed()
        key = self._p.store.keys("transcript", self.session)
        for number, (question, answer, is_error) in enumerate(
            [("?", "openai answered 400", True), ("", "", False), ("?", "", False), ("", "Yes.", False)]
        ):
            ids = {"run_id": f"old-{number}", "agent_id": "a"}
            said = {"role": "assistant", "content": answer, **ids, "stop_reason": "?", "is_error": is_error}
            asked = {"role": "user", "content": question, **ids}
            await self._p.store.redis.rpush(key, dumps(asked), dumps(said))

    async def _ends(self, code: str | None, *says: dict[str, Any], **fields: Any) -> None:
        record = await self.turn(*says, **fields)
        assert code_of(record) == code, record.result

    @asynccontextmanager
    async def _dying_in_a_tool(self, run_id: str) -> AsyncIterator[tuple[Process, asyncio.Task[Any]]]:
        async with process(self._redis_url, talker(self._url, **self._more), name="dying") as dying:
            talking.BEGUN.clear()
            executing = asyncio.create_task(dying.execute(run_id))
            await await_for(lambda: run_id in talking.BEGUN, "the tool begins")
            yield dying, executing


class _Each(list[Any]):
    """A script that returns its replies in order, in any run."""

    def __init__(self, entries: Any) -> None:
        super().__init__([None])
        self._entries = entries

    def __getitem__(self, _: Any) -> Any:
        return next(self._entries)


Ending = Callable[[Talk], Awaitable[None]]
ENDINGS: dict[str, Ending] = {
    name: ending for name, ending in vars(Talk).items() if not name.startswith("_") and name != "turn"
}
_sessions = itertools.count(1)


@pytest.mark.share(of=3)
@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.defect("D12")
async def test_after_each_ending_the_session_continues(redis_url: str, name: str) -> None:
    """Twice in a row, then a turn that completes: each request is valid and shows only complete turns."""
    await _talk(redis_url, [name, name])


@pytest.mark.share(of=3)
@pytest.mark.parametrize("name", ENDINGS)
async def test_after_each_ending_a_session_with_an_anthropic_model_continues(
    redis_url: str, name: str
) -> None:
    """The server refuses what the Messages API refuses: a call without a result, roles that do not fit."""
    script = Script()
    async with ModelServer(script) as server:
        llm = {"provider": "anthropic", "api_base": server.url, "model": "m", "retry": {"max_attempts": 1}}
        llm |= {"pricing": {"input": 1.0, "output": 1.0}, "max_tokens": 1000}
        async with process(redis_url, talker(server.url, llm=llm), settings=small(redis_url)) as p:
            talk = Talk(p, script, redis_url, server, f"s{next(_sessions)}", llm=llm)
            await ENDINGS[name](talk)
            last = await talk.turn(ANSWER, input_text="The last question.")

    assert code_of(last) is None, (name, last.result)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(sorted(ENDINGS)), min_size=3, max_size=6))
@example(["half_a_batch", "cancelled_in_a_tool", "poisoned", "output_mismatch", "empty_answer", "refused"])
def test_after_any_endings_the_session_continues(redis_url: str, endings: list[str]) -> None:
    """Whatever the order of earlier endings, the next run of the session sends a valid request."""
    asyncio.run(_talk(redis_url, endings))


async def _talk(redis_url: str, endings: list[str]) -> None:
    async with conversation(redis_url) as (p, script, server):
        talk = Talk(p, script, redis_url, server, f"s{next(_sessions)}")
        for name in endings:
            await ENDINGS[name](talk)
        last = await talk.turn(ANSWER, input_text="The last question.")

        assert code_of(last) is None, (endings, last.result)
        kept = (await aread_session(p.store, talk.session)).transcript
        ours = [dict(entry) for entry in kept if not str(entry.get("run_id")).startswith("old-")]
        assert usable_entries(ours) == ours, "only whole turns are written, not only shown"
        [shown] = messages_of(script, last.run_id)
        assert [message["role"] for message in shown][-1] == "user"
        said = [message for message in shown if message["role"] in ("user", "assistant")]
        texts = [message["content"] for message in said if message["role"] == "assistant"]
        assert not any("answered 4" in str(text) or "error" in str(text) for text in texts)
        questions = [at for at, message in enumerate(said) if message["role"] == "user"]
        assert all(two - one > 1 for one, two in itertools.pairwise(questions)), (
            "a question without an answer"
        )


# --- runs that the version before has begun --------------------------------------------------------------


def _opening_of_the_version_before(talk: Conversation, system_prompt: str) -> list[dict[str, Any]]:
    """The prompt of the previous version: memory in the system message, transcript as roles and texts."""
    context = talk._context
    system = ["You are a helpful assistant.", *context.system_prompt_fragments]
    system += [f"## {key}\n{dumps(value)}" for key, value in context.memory_view.items() if value]
    return [
        FixedMessage(role="system", content="\n\n".join(system)),
        *(FixedMessage(role=m["role"], content=m.get("content") or "") for m in context.transcript),
        FixedMessage(role="user", content=context.input_text),
    ]


@pytest.mark.parametrize("begun_by", ["the version before", "this version"])
@pytest.mark.parametrize("format_", [1, 2])
async def test_a_run_continues_with_the_prompt_of_another_version(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, begun_by: str, format_: int
) -> None:
    """Recorded calls are replayed although the prompt has another form. No call is repeated."""
    monkeypatch.setattr("openagents_worker.runtime.history.BEGUN", format_)
    old, new = _opening_of_the_version_before, Conversation._first_messages
    first, second = (old, new) if begun_by == "the version before" else (new, old)
    async with (
        conversation(redis_url) as (p, script, server),
        process(redis_url, talker(server.url), name="one") as one,
    ):
        script.by_run["r0"] = [calls(("add", {"x": 7})), {"text": "7"}]
        await p.run("r0", input_text="What is 7?")
        script.by_run["r1"] = [calls(("add", {"x": 1}), ("add", {"x": 2})), calls(("wait", {})), ANSWER]
        monkeypatch.setattr(Conversation, "_first_messages", first)
        await one.submit("r1")
        executing = asyncio.create_task(one.execute("r1"))
        await await_for(lambda: "r1" in talking.BEGUN, "the tool begins")
        talking.LET_GO.add("r1")
        await crash(one, "r1", executing)
        monkeypatch.setattr(Conversation, "_first_messages", second)
        await p.execute("r1")
        record = await p.record("r1")

    assert code_of(record) is None
    assert [asked.n for asked in script.asked["r1"]] == [0, 1, 2]
    assert record.usage.tool_calls == 3


@pytest.fixture(autouse=True)
def _no_call_waits() -> None:
    talking.BEGUN.clear()
    talking.LET_GO.clear()
