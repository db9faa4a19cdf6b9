"""Model calls of a run over HTTP: what replies mean for the run, its events, its journal and its retries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from openagents_worker.runtime.runner import AttemptOutcome
from tests.runtime.talking import talker
from tests.support.runner import Process, crash, due, process
from tests.support.waiting import await_for
from tests.unit.llm.raw_server import JSON, STREAM, Sent, answering, delta, sse, whole

CALL = {"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"x": 1}'}}
ANSWER = Sent((sse(delta(content="Done."), delta("stop"), "[DONE]"),))
BROKEN = Sent((b"{}",), JSON, "500 Oops")


def _slow(ms: int) -> Sent:
    return Sent((b"{}",), f"{JSON}\r\nretry-after-ms: {ms}", "429 Slow")


class Model:
    """A server that sends these replies in order, the last one again and again."""

    def __init__(self, *replies: Sent) -> None:
        self.replies = replies
        self.asked: list[dict[str, Any]] = []

    def __call__(self, body: dict[str, Any]) -> Sent:
        self.asked.append(body)
        return self.replies[min(len(self.asked), len(self.replies)) - 1]


@asynccontextmanager
async def _run(redis_url: str, model: Callable[[Any], Sent], **llm: Any) -> AsyncIterator[Process]:
    pattern = {"type": "react", "config": llm.pop("config", {})}
    async with answering(model) as url:
        definition = talker(url, pattern=pattern)
        definition["llm"] = definition["llm"] | llm
        async with process(redis_url, definition) as p:
            yield p


# --- tries -----------------------------------------------------------------------------------------------


async def test_a_call_sends_max_attempts_requests_in_all_attempts(redis_url: str) -> None:
    """Two requests before the run was suspended for a long pause count in the next attempt."""
    model = Model(BROKEN, _slow(2_500), BROKEN)
    retry = {"max_attempts": 4, "initial_backoff_ms": 0}
    async with _run(redis_url, model, retry=retry) as p:
        await p.submit()
        first = await p.execute()
        suspended = await p.record()
        await due(p)
        await p.execute()
        ended = await p.record()

    assert first.kind is AttemptOutcome.SUSPENDED
    assert suspended.last_error is not None
    assert len(model.asked) == 4
    assert ended.result is not None
    assert ended.result.error_details is not None
    assert ended.result.error_details.code == "llm.connection"


async def test_an_answer_after_a_suspension_completes_the_run(redis_url: str) -> None:
    """The tries that failed are part of the usage."""
    model = Model(_slow(2_500), BROKEN, ANSWER)
    async with _run(redis_url, model, retry={"max_attempts": 4, "initial_backoff_ms": 0}) as p:
        await p.submit()
        await p.execute()
        await due(p)
        await p.execute()
        record = await p.record()

    assert record.result is not None
    assert record.result.final_output == "Done."
    assert record.result.usage.llm_retry_count == 1


# --- why an answer ended ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message", "code", "accepted"),
    [
        ("length", {"content": "The answer is"}, "llm.truncated", True),
        ("length", {"content": "", "reasoning_content": "Let me see"}, "llm.truncated", False),
        ("content_filter", {"content": "You take the"}, "llm.filtered", True),
        ("content_filter", {"content": None}, "llm.filtered", False),
        ("stop", {"content": None, "refusal": "I cannot."}, "llm.refused", False),
        ("stop", {"content": " "}, "llm.empty", False),
    ],
)
async def test_an_answer_that_is_not_whole_fails_the_run(
    redis_url: str, word: str, message: dict[str, Any], code: str, accepted: bool
) -> None:
    """The code says why. A pattern may accept a text that was cut."""
    model = Model(Sent((json.dumps(whole(word, **message)).encode(),), JSON))
    async with _run(redis_url, model) as p:
        failed = (await p.run("r1")).result
    async with _run(redis_url, model, config={"accept_truncated": True}) as p:
        tolerated = (await p.run("r2")).result

    assert failed is not None
    assert failed.error_details is not None
    assert failed.error_details.code == code
    assert tolerated is not None
    assert tolerated.ok is accepted
    assert tolerated.finish_reason == (word if accepted else None)


async def test_a_blocked_reply_is_part_of_the_usage(redis_url: str) -> None:
    """The provider bills it, so it counts to the budget of the run. What was not counted is not estimated."""
    usage = {"prompt_tokens": 1_000, "completion_tokens": 10, "total_tokens": 1_010}
    blocked = whole("content_filter", content=None, usage=usage)
    uncounted = whole("content_filter", content=None)
    results = []
    for run_id, reply in (("r1", blocked), ("r2", uncounted)):
        model = Model(Sent((json.dumps(reply).encode(),), JSON))
        async with _run(redis_url, model, pricing={"input": 1, "output": 100}) as p:
            results.append((await p.run(run_id)).result)

    counted, rest = results
    assert counted is not None
    assert rest is not None
    assert [each.error_details and each.error_details.code for each in (counted, rest)] == [
        "llm.filtered"
    ] * 2
    assert (counted.usage.llm_calls, counted.usage.total_tokens) == (1, 1_010)
    assert counted.usage.cost_usd == pytest.approx(0.002)
    assert rest.usage.total_tokens == 0


async def test_events_and_result_say_why_the_answer_ended(redis_url: str) -> None:
    """With the id of the request, for the provider's support."""
    model = Model(Sent(ANSWER.chunks, f"{STREAM}\r\nx-request-id: req-1"))
    async with _run(redis_url, model) as p:
        result = (await p.run()).result
        events = {event["name"]: event["payload"] for event in await p.events()}

    assert result is not None
    assert result.finish_reason == "stop"
    succeeded = events["llm.succeeded"]
    assert (succeeded["finish_reason"], succeeded["request_id"]) == ("stop", "req-1")


async def test_a_failed_call_names_its_request(redis_url: str) -> None:
    """In the event and in the error of the run."""
    model = Model(Sent((b"{}",), f"{JSON}\r\nrequest-id: req-2", "400 Bad"))
    async with _run(redis_url, model) as p:
        result = (await p.run()).result
        events = {event["name"]: event["payload"] for event in await p.events()}

    assert events["llm.failed"]["request_id"] == "req-2"
    assert result is not None
    assert result.error_details is not None
    assert result.error_details.context["request_id"] == "req-2"


async def test_an_unknown_price_is_one_event_and_no_cost(redis_url: str) -> None:
    """Once for each model and run, not with every call. It says what has no price."""
    turn = Sent((sse(delta(tool_calls=[CALL]), delta("tool_calls"), "[DONE]"),))
    async with _run(redis_url, Model(turn, ANSWER), pricing=None) as p:
        result = (await p.run()).result
        events = await p.events()

    assert result is not None
    assert result.usage.cost_usd is None
    (unknown,) = [event["payload"] for event in events if event["name"] == "llm.price_unknown"]
    assert unknown["parts"] == ["input", "output"]


async def test_a_fallback_is_recorded_with_its_call(redis_url: str) -> None:
    """The events say why, and which model answered."""
    broken = BROKEN._replace(head=f"{JSON}\r\nx-request-id: req-3")
    model = Model(broken, broken, ANSWER)
    retry = {"max_attempts": 2, "initial_backoff_ms": 0}
    async with _run(redis_url, model, fallbacks=[{"model": "second"}], retry=retry) as p:
        result = (await p.run()).result
        events = {event["name"]: event["payload"] for event in await p.events()}

    assert result is not None
    assert result.final_output == "Done."
    assert [asked["model"] for asked in model.asked] == ["m", "m", "second"]
    assert events["llm.fallback"]["code"] == "llm.connection"
    assert events["llm.fallback"]["request_id"] == events["llm.retrying"]["request_id"] == "req-3"
    assert events["llm.succeeded"]["answered_by"] == "openai_compatible/second"


# --- what is wanted back ---------------------------------------------------------------------------------


async def test_opaque_fields_survive_a_crash(redis_url: str) -> None:
    """A worker dies in the second model call. The next worker sends the reasoning and the signature again."""
    thinking = delta(reasoning_content="Let me see.")
    signature = {"google": {"thought_signature": "abc"}}
    call = delta(tool_calls=[{**CALL, "extra_content": signature}])
    turn = Sent((sse(thinking, call, delta("tool_calls"), "[DONE]"),))
    model = Model(turn, Sent((b": waiting\n\n",), hangs=True), ANSWER)
    async with answering(model) as url:
        definition = talker(url)
        async with (
            process(redis_url, definition, name="one") as one,
            process(redis_url, definition, name="two") as two,
        ):
            await one.submit()
            executing = asyncio.create_task(one.execute())
            await await_for(lambda: len(model.asked) == 2, "the second model call begins")
            await crash(one, "r1", executing)
            await two.execute()
            record, transcript = await two.record(), await two.transcript()

    assert record.result is not None
    assert record.result.final_output == "Done."
    before, after = (asked["messages"] for asked in model.asked[1:])
    assert before == after
    asks = before[-2]
    assert asks["reasoning_content"] == "Let me see."
    assert asks["tool_calls"][0]["extra_content"] == signature
    stored = transcript[-1]["tool_messages"][0]
    assert stored["provider_fields"] == {"chat_completions": {"reasoning_content": "Let me see."}}


# --- pieces ----------------------------------------------------------------------------------------------


async def test_reasoning_and_arguments_are_streamed_apart_from_the_text(redis_url: str) -> None:
    """Each kind has its own offsets."""
    halves = [{**CALL, "function": {"name": "add", "arguments": '{"x"'}}]
    halves += [{"index": 0, "function": {"arguments": ": 1}"}}]
    chunks = [delta(reasoning_content="Let me see."), delta(content="I add.")]
    chunks += [delta(tool_calls=[half]) for half in halves]
    model = Model(Sent((sse(*chunks, delta("tool_calls"), "[DONE]"),)), ANSWER)
    async with _run(redis_url, model) as p, p.store.redis.pubsub() as heard:
        await heard.psubscribe("*:events:*")
        await p.run()
        pieces = [json.loads(message["data"]) async for message in _messages(heard)]
        pieces = [event["payload"] for event in pieces if event["name"] == "llm.delta"]

    first = pieces[0]["call"]
    own = [piece for piece in pieces if piece["call"] == first]
    texts = {"text": "", "reasoning": "", "tool_arguments": ""}
    for piece in own:
        assert piece["offset"] == len(texts[piece["kind"]])
        texts[piece["kind"]] += piece["text"]
    arguments = CALL["function"]["arguments"]
    assert texts == {"text": "I add.", "reasoning": "Let me see.", "tool_arguments": arguments}
    calls = {(piece["tool_call"], piece["tool_name"]) for piece in own if piece["kind"] == "tool_arguments"}
    assert calls == {(0, "add")}


async def _messages(heard: Any) -> AsyncIterator[dict[str, Any]]:
    while (message := await heard.get_message(timeout=1.0)) is not None:
        if message["type"] == "pmessage":
            yield message
            if b"session.run.completed" in _bytes(message["data"]):
                return


def _bytes(data: Any) -> bytes:
    return data if isinstance(data, bytes) else data.encode()
