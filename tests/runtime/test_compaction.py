"""Summaries by a model: a recorded call in place of the oldest turns, stored by the end of the run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openagents_worker.cli.lists import session_lines
from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.llm.scripted import ScriptedClient
from openagents_worker.models import StopReason
from openagents_worker.runtime.compaction import _lines
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.store import scripts
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.formats import PARKS, SUMMARIES
from openagents_worker.store.scripts import ForkSessionAnswer
from openagents_worker.store.sessions import aread_session
from tests.support.runner import Process, agent, crash, due, process, scripted
from tests.support.waiting import await_for

LONG = "word " * 40  # 50 tokens by the estimate
FIRST, SECOND = {"text": "first"}, {"text": "second"}
"""The replies to the first model calls of each run. A run that writes a summary answers with the second."""


def compacting(*replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An agent whose turns of 51 tokens are summarized above 150 tokens."""
    config = {
        "max_input_tokens": 150,
        "reserve_for_response": 0,
        "compaction": {"keep_tokens": 60, "max_summary_tokens": 40},
    }
    assembler = {"type": "sliding_window", "config": config}
    return agent(llm=scripted(*(replies or (FIRST, SECOND))), context_assembler=assembler, **more)


class Model:
    """What the scripted models were asked, in order. The request with the number `held` waits for `go`."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, Any]]] = []
        self.held = 0
        self.go = asyncio.Event()

    def shown(self) -> list[list[str]]:
        """The first word of each message of each request, without system messages."""
        return [[m["content"].split()[0] for m in each if m["role"] != "system"] for each in self.asked]

    async def is_asked(self, number: int) -> None:
        await await_for(lambda: len(self.asked) >= number, f"request {number}")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    noted, original = Model(), ScriptedClient.respond

    async def respond(self: Any, request: Any) -> Any:
        noted.asked.append([dict(message) for message in request.messages])
        if len(noted.asked) == noted.held:
            await noted.go.wait()
        return await original(self, request)

    monkeypatch.setattr(ScriptedClient, "respond", respond)
    return noted


async def turns(p: Process, *numbers: int) -> None:
    for number in numbers:
        record = await p.run(f"r{number}", input_text=f"q{number} {LONG}")
        assert record.state == "completed", record.result


async def summary_of(p: Process, session_id: str = "s1") -> tuple[int, int, str] | None:
    summary = (await aread_session(p.store, session_id)).summary
    return None if summary is None else (summary.epoch, summary.messages, summary.text)


async def test_a_summary_replaces_the_oldest_turns_for_this_run_and_later_ones(
    redis_url: str, model: Model
) -> None:
    """The model is asked once for it. Everything that was said stays in the transcript."""
    async with process(redis_url, compacting()) as p:
        await turns(p, 1, 2, 3)
        assert await summary_of(p) is None
        await turns(p, 4, 5)

        assert await summary_of(p) == (1, 4, "first")
        assert model.shown()[3:] == [
            ["user:"],  # the first two turns as text
            ["Summarize", "first", "q3", "first", "q4"],
            ["Summarize", "first", "q3", "first", "q4", "second", "q5"],
        ]
        written = await p.transcript()
        assert [entry["content"].split()[0] for entry in written[::2]] == ["q1", "q2", "q3", "q4", "q5"]
        shown = "\n".join(map(str, session_lines(await aread_session(p.store, "s1"))))
        assert "summary   of the first 4 messages: first" in shown
        assert (await p.record("r4")).usage.llm_calls == 2
        assert (await p.record("r5")).usage.llm_calls == 1


async def test_a_later_summary_includes_the_one_before(redis_url: str, model: Model) -> None:
    """Each summary has a number. The prompt for the next one begins with it."""
    async with process(redis_url, compacting()) as p:
        await turns(p, 1, 2, 3, 4, 5, 6)

        assert await summary_of(p) == (2, 8, "first")
        asked = next(
            each for each in reversed(model.asked) if each[1]["content"].startswith("user: Summarize")
        )
        assert asked[1]["content"].splitlines()[:3] == [
            "user: Summarize our conversation so far.",
            "assistant: first",
            f"user: q3 {LONG}",
        ]


async def test_a_single_turn_that_is_larger_than_the_budget_is_summarized_in_parts(
    redis_url: str, model: Model
) -> None:
    """The prompt has a limit. Otherwise the model would refuse it in each further run of the session."""
    async with process(redis_url, compacting()) as p:
        await p.run("r1", input_text=f"q1 {LONG * 500}")
        await turns(p, 2)

        prompt = model.asked[1][1]["content"]
        assert prompt.startswith("user: q1 word")
        assert prompt.endswith(" …\nassistant: first")
        assert len(prompt) < 8 * 150
        assert await summary_of(p) == (1, 2, "first")


def test_the_model_that_writes_a_summary_reads_names_in_place_of_images_and_files() -> None:
    """Their base64 would be all that it gets of a message, and the text behind them would be lost."""
    data = "AAAA" * 10_000
    shot = [
        {"type": "image", "data": data, "media_type": "image/png"},
        {"type": "file", "data": data, "media_type": "application/pdf", "name": "bill.pdf"},
        {"type": "text", "text": "A login form."},
    ]
    thought = [{"type": "reasoning", "text": "", "encrypted": data}, {"type": "text", "text": "I look."}]
    call = {"id": "c1", "name": "look", "arguments": {"at": 1}}
    answer = {
        "role": "assistant",
        "content": "Done.",
        "tool_messages": [
            {"role": "assistant", "content": thought, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "name": "look", "content": shot},
        ],
    }

    assert list(_lines([{"role": "user", "content": "What is there?"}, answer], 8_000)) == [
        "user: What is there?",
        "assistant: I look.",
        'assistant calls look: {"at":1}',
        "tool: [image]\n[file bill.pdf]\nA login form.",
        "assistant: Done.",
    ]


async def test_a_turn_that_does_not_fit_alone_is_logged(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise nobody learns why an agent knows nothing of the question before."""
    limited = {"type": "sliding_window", "config": {"max_input_tokens": 60, "reserve_for_response": 0}}
    async with process(redis_url, agent(llm=scripted(FIRST), context_assembler=limited)) as p:
        await p.run("r1", input_text="q1")
        assert "context.no_turn_fits" not in caplog.text
        await p.run("r2", input_text=f"q2 {LONG * 2}")
        await p.run("r3", input_text="q3")

    (line,) = [record for record in caplog.records if "context.no_turn_fits" in record.getMessage()]
    assert "r3" in line.getMessage()


async def test_the_events_of_a_run_say_how_it_was_shortened(redis_url: str, model: Model) -> None:
    """The counter of tokens is named. The summary is not streamed to those who watch the run."""
    async with process(redis_url, compacting()) as p:
        await turns(p, 1, 2, 3, 4)

        events = await p.events("r4")
        names = [event["name"] for event in events]
        assert names.index("context.compact.started") < names.index("context.compact_succeeded")
        assert names.index("context.compact.completed") < names.index("context.assemble.started")
        (assembled,) = (event for event in events if event["name"] == "context.assemble.completed")
        assert assembled["payload"]["counted_by"] == "estimate: bytes/4"
        assert assembled["payload"]["transcript_size"] == 4


SUMMARY, ANSWER = 4, 5
"""The numbers of the requests of run r4, the first one that writes a summary."""


async def begun(p: Process, model: Model, held: int) -> asyncio.Task[Any]:
    """Run r4 in the middle of this request."""
    await turns(p, 1, 2, 3)
    model.held = held
    await p.submit("r4", input_text=f"q4 {LONG}")
    executing = asyncio.create_task(p.execute("r4"))
    await model.is_asked(held)
    return executing


@pytest.mark.parametrize(("held", "asked"), [(SUMMARY, 2), (ANSWER, 1)])
async def test_a_killed_worker_repeats_no_summary(
    redis_url: str, model: Model, held: int, asked: int
) -> None:
    """Only a summary that was being written is asked for once more. It is stored once."""
    definition = compacting()
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        executing = await begun(one, model, held)
        await crash(one, "r4", executing)
        await two.execute("r4")

        record = await two.record("r4")
        assert (record.state, record.usage.llm_calls) == ("completed", 2)
        assert len([each for each in model.shown() if each == ["user:"]]) == asked
        assert model.shown()[-1] == ["Summarize", "first", "q3", "first", "q4"]
        assert await summary_of(two) == (1, 4, "first")


async def test_a_worker_dies_between_summary_and_answer_of_its_model(redis_url: str, model: Model) -> None:
    """The reply of the model is recorded before the summary is. The next worker does not ask again."""
    definition = compacting()
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        await turns(one, 1, 2, 3)
        original = one.store.run_until

        async def stops_at_the_summary(call: Any, until: Any) -> Any:
            if call.script.name == "commit" and '"name":"compact"' in str(call.args):
                await asyncio.Event().wait()
            return await original(call, until)

        one.store.run_until = stops_at_the_summary  # type: ignore[method-assign]
        await one.submit("r4", input_text=f"q4 {LONG}")
        executing = asyncio.create_task(one.execute("r4"))

        async def replied() -> bool:
            return any(record["kind"] == "model" for record in await one.journal("r4"))

        await await_for(replied, "the reply is recorded")
        await crash(one, "r4", executing)
        await two.execute("r4")

        assert model.shown().count(["user:"]) == 1
        assert await summary_of(two) == (1, 4, "first")


async def test_a_run_that_is_handed_over_keeps_its_summary(redis_url: str, model: Model) -> None:
    """The worker is asked to stop while the model answers."""
    definition = compacting()
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        executing = await begun(one, model, ANSWER)
        one.runner.latch("r4", LatchReason.HANDOVER)
        model.go.set()
        assert (await executing).kind is AttemptOutcome.SUSPENDED
        await two.execute("r4")

        assert model.shown().count(["user:"]) == 1
        assert await summary_of(two) == (1, 4, "first")


async def test_a_run_that_does_not_complete_leaves_no_summary(redis_url: str, model: Model) -> None:
    """The session is as it was: a failed run adds nothing, and a cancelled one adds nothing."""
    failing = compacting({"text": "ok"}, {"error": "response"})
    async with process(redis_url, failing) as p:
        await turns(p, 1, 2, 3)
        assert (await p.run("r4", input_text=LONG)).state == "failed"
        assert await summary_of(p) is None
        model.held = len(model.asked) + 2
        await p.submit("r5", input_text=LONG)
        executing = asyncio.create_task(p.execute("r5"))
        await model.is_asked(model.held)
        await p.store.run(scripts.cancel(run_id="r5", reason="enough", force=False))
        p.runner.latch("r5", LatchReason.CANCELLED)
        assert (await executing).stop_reason is StopReason.CANCELLED
        assert await summary_of(p) is None
        assert len(await p.transcript()) == 6


@pytest.mark.parametrize("replies", [[{"error": "response"}, FIRST, SECOND], [{"text": " "}, SECOND]])
async def test_without_a_summary_the_run_sees_what_fits(
    redis_url: str, model: Model, replies: list[dict[str, Any]]
) -> None:
    """A model that fails, or writes nothing, does not end the run."""
    async with process(redis_url, compacting({"text": "ok"})) as p:
        await turns(p, 1, 2, 3)
    async with process(redis_url, compacting(*replies)) as p:
        record = await p.run("r4", input_text=f"q4 {LONG}")

        assert record.state == "completed"
        assert model.shown()[-1] == ["q2", "ok", "q3", "ok", "q4"]
        assert "context.compact_failed" in await p.event_names("r4")
        assert await summary_of(p) is None


async def test_an_overloaded_model_is_asked_later_for_the_summary(redis_url: str, model: Model) -> None:
    """A retryable error suspends the run, as in every other place."""
    busy = {"error": "rate_limit", "retry_after_ms": 60_000}
    async with process(redis_url, compacting({"text": "ok"})) as p:
        await turns(p, 1, 2, 3)
    async with process(redis_url, compacting(busy, FIRST, SECOND)) as p:
        await p.submit("r4", input_text=f"q4 {LONG}")
        assert (await p.execute("r4")).kind is AttemptOutcome.SUSPENDED
        await due(p, "r4")
        await p.execute("r4")

        assert await summary_of(p) == (1, 4, "first")


async def test_a_run_that_is_resumed_sees_the_summary_with_which_it_began(
    redis_url: str, model: Model
) -> None:
    """Other runs have written further summaries since. Its own summary does not replace theirs."""
    fails = compacting(FIRST, {"error": "response"})
    async with process(redis_url, compacting()) as p:
        await turns(p, 1, 2, 3, 4, 5)
    async with process(redis_url, fails) as p:
        assert (await p.run("r6", input_text=f"q6 {LONG}")).state == "failed"
        began_with = model.shown()[-1]
    async with process(redis_url, compacting()) as p:
        await turns(p, 7, 8, 9)
        newest = await summary_of(p)
        assert newest is not None
        assert newest[0] > 1
        await p.store.run(
            scripts.resume(run_id="r6", agent_id="a", session_id="s1", input_text="", checkpoint_id="")
        )
        await p.execute("r6")

        assert (await p.record("r6")).state == "completed"
        assert model.shown()[-1] == began_with
        assert await summary_of(p) == newest


async def test_a_fork_begins_with_the_summary_of_its_source(redis_url: str, model: Model) -> None:
    """A copy of a session has its summaries; a fork of an earlier run only those of its messages."""
    async with process(redis_url, compacting()) as p:
        await turns(p, 1, 2, 3, 4, 5)
        copied = await p.store.run(scripts.fork_session(session_id="s1", new_session_id="s2"))
        assert copied is ForkSessionAnswer.OK
        await turns(p, 6)
        assert await summary_of(p) == (2, 8, "first")
        assert await summary_of(p, "s2") == (1, 4, "first")
        for run_id, messages, expected in (("f2", 2, None), ("f5", 8, (2, 8, "first"))):
            call = scripts.fork(
                run_id=run_id,
                from_run_id="r5",
                steps=0,
                session_id=f"session of {run_id}",
                digest=run_id,
                uid="u",
                request="{}",
                messages=messages,
                artifacts=0,
            )
            await p.store.run(call)
            assert await summary_of(p, f"session of {run_id}") == expected


async def test_a_worker_that_does_not_know_summaries_leaves_the_session_to_others(
    redis_url: str, model: Model
) -> None:
    """The session has a higher format from its first summary on."""
    async with process(redis_url, compacting()) as p:
        await turns(p, 1, 2, 3, 4)
        await p.submit("r5")
        claim = {"run_id": "r5", "incarnation": p.lease.incarnation, "page_bytes": scripts.PAGE_BYTES}

        old = await p.store.run(scripts.claim(**claim, nonce="n1", newest=PARKS))
        assert old.answer is scripts.ClaimAnswer.OTHER_FORMAT
        await due(p, "r5")
        new = await p.store.run(scripts.claim(**claim, nonce="n2", newest=SUMMARIES))

        assert new.answer is scripts.ClaimAnswer.CLAIMED
        assert (new.epoch, new.compacted, new.compaction) == (1, 4, '{"text":"first"}')


async def test_a_summary_is_encoded_as_other_text_of_users(redis_url: str, model: Model) -> None:
    """With a codec, Redis holds nothing that can be read."""

    class Reversing:
        name = "reversed"

        def encode(self, text: str) -> str:
            return text[::-1]

        def decode(self, text: str) -> str:
            return text[::-1]

    async with process(redis_url, compacting(), codec=PayloadCodec(Reversing())) as p:
        await turns(p, 1, 2, 3, 4, 5)

        assert await summary_of(p) == (1, 4, "first")
        assert model.shown()[-1][:2] == ["Summarize", "first"]
        stored = await p.store.redis.hget(p.store.keys("session", "s1"), "compaction:1")
        assert "tsrif" in stored


@pytest.mark.parametrize("kind", BUILTIN_ASSEMBLERS)
async def test_C02_every_assembler_may_be_the_default_of_the_file(
    redis_url: str, model: Model, kind: str
) -> None:
    """One table of types for agents and for `runtime.config`. P02: what it returns reaches the model."""
    runtime = {"type": "default", "config": {"context_assembler": {"type": kind}}}
    async with process(redis_url, agent(), runtime=runtime) as p:
        await turns(p, 1, 2)

        assert model.shown()[-1] == ["q1", "hello", "q2"]
        (assembled,) = (e for e in await p.events("r2") if e["name"] == "context.assemble.completed")
        assert assembled["payload"]["transcript_size"] == 2


async def test_another_worker_selects_the_same_messages_whatever_it_counts_with(
    redis_url: str, model: Model
) -> None:
    """One worker has a tokenizer and the next has none: the selection is recorded at the start of the run."""
    definition = compacting({"tool_calls": [{"name": "charge", "arguments": {"who": "x"}}]}, SECOND)
    definition["context_assembler"]["config"].pop("compaction")
    definition["tools"] = [{"id": "charge", "impl": "tests.runtime.plugins.Charge"}]
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        await turns(one, 1, 2)
        model.held = len(model.asked) + 2
        await one.submit("r3", input_text="q3")
        executing = asyncio.create_task(one.execute("r3"))
        await model.is_asked(model.held)
        await crash(one, "r3", executing)
        parts = two.runner._services.assembly.parts("a")
        parts.assembler.counter = type("Huge", (), {"name": "huge", "count": lambda *_: 10_000})()
        await two.execute("r3")

        assert (await two.record("r3")).state == "completed"
        assert model.asked[-1] == model.asked[-2]
