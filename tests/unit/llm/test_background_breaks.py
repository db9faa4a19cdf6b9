"""A response in the background whose state cannot be asked for a while: it goes on, and is paid for once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from openagents_worker.errors import LLMConnectionError, LLMRateLimitError
from openagents_worker.llm.base import Delta, DeltaKind, LLMResponse, ModelRequest
from openagents_worker.llm.openai_background import MAX_RECONNECTS
from tests.unit.llm.raw_server import JSON, STREAM, Sent, answering, sse
from tests.unit.llm.wire import HI, RESPONSES, Heard, client_of

TEXT = "one two"
GONE = Sent((), "", "")
"""The connection breaks before the status."""
BUSY = Sent((b"{}",), JSON, "503 Busy")
UNKNOWN = Sent((b'{"error": {"message": "no such response"}}',), JSON, "404 Not Found")


def response(status: str) -> dict[str, Any]:
    output = [{"type": "message", "content": [{"type": "output_text", "text": TEXT}]}]
    return {
        "object": "response",
        "id": "resp_1",
        "status": status,
        "output": output if status == "completed" else [],
    }


def state(status: str) -> Sent:
    return Sent((json.dumps(response(status)).encode(),), JSON)


def events(*kinds: str, begin: int = 0) -> Sent:
    """The events of a stream, and its end."""
    found: list[dict[str, Any]] = []
    for number, kind in enumerate(kinds, begin):
        event: dict[str, Any] = {"type": f"response.{kind}", "sequence_number": number}
        if kind == "output_text.delta":
            event |= {"delta": TEXT, "output_index": 0}
        else:
            event |= {"response": response("completed" if kind == "completed" else "in_progress")}
        found.append(event)
    return Sent((sse(*found),), STREAM)


class Provider:
    """Creates one response, and answers the questions for it one by one; the last answer is repeated."""

    def __init__(self, created: Sent, *answers: Sent) -> None:
        self._created, self._answers = created, list(answers)
        self.created = self.asked = 0

    def __call__(self, body: Any) -> Sent:
        if body is not None:
            self.created += 1
            return self._created
        self.asked += 1
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


async def answered(provider: Callable[[Any], Sent], *, streamed: bool, attempts: int = 1) -> LLMResponse:
    retry = {"max_attempts": attempts, "initial_backoff_ms": 0}
    async with answering(provider) as url:
        client = client_of(RESPONSES, url, background=True, background_poll_ms=50, retry=retry)
        try:
            return await client.generate(messages=list(HI), on_delta=Heard() if streamed else None)
        finally:
            await client.aclose()


@pytest.mark.parametrize("fault", [BUSY, GONE], ids=["busy", "broken"])
async def test_states_that_cannot_be_asked_are_asked_again(fault: Sent) -> None:
    """However often, if others are read in between: a long response has thousands of them."""
    answers = [fault, state("in_progress")] * (3 * MAX_RECONNECTS)
    provider = Provider(state("queued"), *answers, state("completed"))

    reply = await answered(provider, streamed=False)

    assert (reply.output_text, provider.created) == (TEXT, 1)


@pytest.mark.parametrize("fault", [BUSY, GONE], ids=["busy", "broken"])
async def test_a_stream_that_cannot_be_continued_at_once_is_continued_later(fault: Sent) -> None:
    provider = Provider(events("created"), fault, fault, events("output_text.delta", "completed", begin=1))

    reply = await answered(provider, streamed=True)

    assert (reply.output_text, provider.created, provider.asked) == (TEXT, 1, 3)


async def test_a_stream_that_breaks_at_the_same_event_is_not_continued_for_ever() -> None:
    provider = Provider(events("created"), events("created", "in_progress"))

    with pytest.raises(LLMConnectionError):
        await answered(provider, streamed=True)

    assert (provider.created, provider.asked) == (1, 2 + MAX_RECONNECTS)


async def test_a_provider_that_stays_busy_is_an_error_of_the_call() -> None:
    """The next attempt continues the response."""
    provider = Provider(state("queued"), BUSY)

    with pytest.raises(LLMConnectionError, match="503"):
        await answered(provider, streamed=False)

    assert (provider.created, provider.asked) == (1, 1 + MAX_RECONNECTS)


async def test_a_long_wait_that_the_provider_asks_for_is_not_waited_inside_the_request() -> None:
    limited = Sent((b"{}",), f"{JSON}\r\nretry-after: 600", "429 Slow")
    provider = Provider(state("queued"), limited)

    with pytest.raises(LLMRateLimitError) as caught:
        await answered(provider, streamed=False)

    assert (caught.value.retry_after_ms, provider.asked) == (600_000, 1)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_response_that_its_provider_does_not_know_yet_is_asked_for_again(streamed: bool) -> None:
    """Some servers store it late, or in another process."""
    begun = events("created") if streamed else state("queued")
    end = events("output_text.delta", "completed", begin=1) if streamed else state("completed")

    with pytest.raises(LLMConnectionError, match="does not know"):
        await answered(Provider(begun, UNKNOWN), streamed=streamed)
    provider = Provider(begun, UNKNOWN, end)
    reply = await answered(provider, streamed=streamed, attempts=2)

    assert (reply.output_text, provider.created, provider.asked) == (TEXT, 1, 2)


# --- what is watched -------------------------------------------------------------------------------------


def calls(begin: int, *parts: tuple[int, str]) -> list[dict[str, Any]]:
    """The events of the pieces, by the place of their call. The name of a tool begins a call."""
    found: list[dict[str, Any]] = []
    for number, (place, text) in enumerate(parts, begin):
        event: dict[str, Any] = {"sequence_number": number, "output_index": place}
        if text.isalpha():
            item = {"type": "function_call", "name": text, "call_id": f"call_{place}", "arguments": ""}
            found.append({**event, "type": "response.output_item.added", "item": item})
        else:
            found.append({**event, "type": "response.function_call_arguments.delta", "delta": text})
    return found


PIECES = [(0, "add"), (0, '{"a":'), (1, "sub"), (1, '{"b":'), (1, "2}"), (0, "1}")]
ENDED = {
    "object": "response",
    "id": "resp_1",
    "status": "completed",
    "output": [
        {"type": "function_call", "name": "add", "call_id": "call_0", "arguments": '{"a":1}'},
        {"type": "function_call", "name": "sub", "call_id": "call_1", "arguments": '{"b":2}'},
    ],
}


@pytest.mark.parametrize("seen_again", [0, 1, 5], ids=lambda number: f"{number} events again")
async def test_pieces_of_arguments_keep_the_number_of_their_call_after_a_break(seen_again: int) -> None:
    """A watcher joins them by this number. What the server sends again is not said again."""
    created = {"type": "response.created", "sequence_number": 0, "response": response("in_progress")}
    every = [created, *calls(1, *PIECES)]
    completed = {"type": "response.completed", "sequence_number": len(every), "response": ENDED}
    rest = [*every[5 - seen_again :], completed]
    provider = Provider(Sent((sse(*every[:5]),), STREAM), Sent((sse(*rest),), STREAM))
    heard: list[Delta] = []

    async def listen(piece: Delta) -> None:
        heard.append(piece)

    async with answering(provider) as url:
        client = client_of(RESPONSES, url, background=True)
        try:
            reply = await client.respond(ModelRequest(HI, on_piece=listen))
        finally:
            await client.aclose()

    assert provider.asked == 1
    assert heard == [
        Delta(DeltaKind.ARGUMENTS, '{"a":', 0, "add"),
        Delta(DeltaKind.ARGUMENTS, '{"b":', 1, "sub"),
        Delta(DeltaKind.ARGUMENTS, "2}", 1, "sub"),
        Delta(DeltaKind.ARGUMENTS, "1}", 0, "add"),
    ]
    assert [call.arguments for call in reply.tool_calls] == [{"a": 1}, {"b": 2}]


async def test_half_a_character_before_a_break_is_joined_with_the_other_half() -> None:
    created = {"type": "response.created", "sequence_number": 0, "response": response("in_progress")}
    halves = [
        {"type": "response.output_text.delta", "sequence_number": number, "output_index": 0, "delta": half}
        for number, half in enumerate(("\ud83d", "\ude00"), 1)
    ]
    completed = {"type": "response.completed", "sequence_number": 3, "response": response("completed")}
    first, second = sse(created, halves[0]), sse(halves[1], completed)
    heard = Heard()

    async with answering(Provider(Sent((first,), STREAM), Sent((second,), STREAM))) as url:
        client = client_of(RESPONSES, url, background=True)
        try:
            await client.generate(messages=list(HI), on_delta=heard)
        finally:
            await client.aclose()

    assert heard.text == "😀"


async def test_a_server_that_cannot_stream_a_response_is_asked_for_its_state() -> None:
    """It answers a question for the events with the state, which is not the reply before it has ended."""
    provider = Provider(state("queued"), state("queued"), state("in_progress"), state("completed"))
    heard = Heard()

    async with answering(provider) as url:
        client = client_of(RESPONSES, url, background=True, background_poll_ms=50)
        try:
            reply = await client.generate(messages=list(HI), on_delta=heard)
        finally:
            await client.aclose()

    assert (reply.output_text, provider.created, provider.asked) == (TEXT, 1, 3)
    assert heard.text == TEXT


async def test_the_text_that_was_heard_before_a_break_is_not_heard_again_from_a_whole_reply() -> None:
    created = {"type": "response.created", "sequence_number": 0, "response": response("in_progress")}
    piece = {"type": "response.output_text.delta", "sequence_number": 1, "output_index": 0, "delta": "one "}
    provider = Provider(Sent((sse(created, piece),), STREAM), state("in_progress"), state("completed"))
    heard = Heard()

    async with answering(provider) as url:
        client = client_of(RESPONSES, url, background=True, background_poll_ms=50)
        try:
            reply = await client.generate(messages=list(HI), on_delta=heard)
        finally:
            await client.aclose()

    assert (reply.output_text, heard.text) == (TEXT, "one ")
