"""A model in a process of its own that sends prepared bytes. The only place that defines them.

`python -m bench._raw_model PAUSE_MS` prints its port and serves until its standard input ends. The first part
of the path is the kind of the reply: `/text/v1` or `/mixed/v1`, which has reasoning, text and the arguments
of a tool call. Its three formats are those of OpenAI and Anthropic. A streamed reply has `PIECES` pieces.
Each is an event of its own, and `PAUSE_MS` pass between two events.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

PIECES = 200
WORDS_OF_A_WHOLE = 300
CHAT, RESPONSES, MESSAGES = "/chat/completions", "/responses", "/messages"
MIXED_KINDS = ("reasoning", "text", "arguments")  # a reply has as many pieces of each

Event = dict[str, Any]


@contextmanager
def raw_model(pause_ms: float) -> Iterator[str]:
    """The URL of a model in a new process, without the kind of the reply and the version."""
    command = [sys.executable, "-m", "bench._raw_model", str(pause_ms)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


# --- what it sends ---------------------------------------------------------------------------------------


def _words(count: int) -> list[str]:
    return [f" word{number % 10}" for number in range(count)]


def _kinds(mixed: bool) -> list[tuple[str, str]]:
    """The kind and the text of each piece of a stream."""
    words = _words(PIECES)
    if not mixed:
        return [("text", word) for word in words]
    share = PIECES // len(MIXED_KINDS)
    kinds = [kind for kind in MIXED_KINDS for _ in range(share)]
    kinds += ["arguments"] * (PIECES - len(kinds))
    first, last = kinds.index("arguments"), PIECES - 1
    ends = {first: '{"text": "', last: '"}'}
    return [
        (kind, ends.get(number, word)) for number, (kind, word) in enumerate(zip(kinds, words, strict=True))
    ]


def chat_events(mixed: bool) -> list[str]:
    """The events of chat completions."""

    def chunk(delta: Event, reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _data({**head, "choices": [choice], "usage": None, **more})

    head = {
        "id": "chatcmpl-CYx1N6r0aN2Rw0V7bVWhJ3b1Zk5aT",
        "object": "chat.completion.chunk",
        "created": 1763000000,
        "model": "gpt-4o-mini-2024-07-18",
        "service_tier": "default",
        "system_fingerprint": "fp_560af6e559",
    }
    fields = {
        "text": lambda text: {"content": text},
        "reasoning": lambda text: {"reasoning_content": text},
        "arguments": lambda text: {"tool_calls": [{"index": 0, "function": {"arguments": text}}]},
    }
    events = [chunk({"role": "assistant", "content": "", "refusal": None})]
    if mixed:
        call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "note", "arguments": ""}}
        events[0] = chunk({"role": "assistant", "content": None, "tool_calls": [call]})
    events += [chunk(fields[kind](text), obfuscation="aB3dE5fG7h") for kind, text in _kinds(mixed)]
    events.append(chunk({}, "tool_calls" if mixed else "stop"))
    usage = {"prompt_tokens": 20, "completion_tokens": PIECES, "total_tokens": 20 + PIECES}
    return [*events, _data({**head, "choices": [], "usage": usage}), "data: [DONE]\n\n"]


def responses_events(mixed: bool) -> list[str]:
    """The events of the responses API. The last one has the whole response."""
    pieces, number = _kinds(mixed), iter(range(10_000))

    def event(kind: str, **fields: Any) -> str:
        value = {"type": kind, "sequence_number": next(number), **fields}
        return f"event: {kind}\n{_data(value)}"

    kinds = list(dict.fromkeys(kind for kind, _ in pieces))
    whole = {kind: "".join(text for of, text in pieces if of == kind) for kind in kinds}
    items = {kind: _response_item(kind, whole[kind]) for kind in kinds}
    names = {
        "text": "response.output_text.delta",
        "reasoning": "response.reasoning_summary_text.delta",
        "arguments": "response.function_call_arguments.delta",
    }
    more = {"text": {"content_index": 0, "logprobs": []}, "reasoning": {"summary_index": 0}, "arguments": {}}
    events = [event("response.created", response=_response([], "in_progress"))]
    for index, kind in enumerate(kinds):
        started = {**items[kind], **_EMPTY[kind]}
        events.append(event("response.output_item.added", output_index=index, item=started))
        item_id = items[kind]["id"]
        events += [
            event(
                names[kind],
                item_id=item_id,
                output_index=index,
                delta=text,
                obfuscation="aB3dE5",
                **more[kind],
            )
            for of, text in pieces
            if of == kind
        ]
        events.append(event("response.output_item.done", output_index=index, item=items[kind]))
    return [*events, event("response.completed", response=_response(list(items.values()), "completed"))]


_EMPTY: dict[str, Event] = {
    "text": {"content": []},
    "reasoning": {"summary": []},
    "arguments": {"arguments": ""},
}


def _response_item(kind: str, text: str) -> Event:
    if kind == "text":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [part],
        }
    if kind == "reasoning":
        return {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}
    call = {"call_id": "call_1", "name": "note", "arguments": text, "status": "completed"}
    return {"id": "fc_1", "type": "function_call", **call}


def _response(output: list[Event], status: str, tokens: int = PIECES) -> Event:
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    usage = {"input_tokens": 20, "output_tokens": tokens, "total_tokens": 20 + tokens, **details}
    return {
        "id": "resp_68af4030592c81938ec0a5fbab4a3e9f",
        "object": "response",
        "created_at": 1763000000,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": "gpt-4o-mini-2024-07-18",
        "output": output,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": usage if status == "completed" else None,
    }


def messages_events(mixed: bool) -> list[str]:
    """The events of Anthropic's messages."""

    def event(kind: str, **fields: Any) -> str:
        return f"event: {kind}\n{_data({'type': kind, **fields})}"

    begun = {
        "text": {"type": "text", "text": ""},
        "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
        "arguments": {"type": "tool_use", "id": "toolu_1", "name": "note", "input": {}},
    }
    deltas = {
        "text": lambda text: {"type": "text_delta", "text": text},
        "reasoning": lambda text: {"type": "thinking_delta", "thinking": text},
        "arguments": lambda text: {"type": "input_json_delta", "partial_json": text},
    }
    pieces = _kinds(mixed)
    events = [event("message_start", message=_message([], None, 1)), event("ping")]
    for index, kind in enumerate(dict.fromkeys(kind for kind, _ in pieces)):
        events.append(event("content_block_start", index=index, content_block=begun[kind]))
        events += [
            event("content_block_delta", index=index, delta=deltas[kind](text))
            for of, text in pieces
            if of == kind
        ]
        events.append(event("content_block_stop", index=index))
    reason = {"stop_reason": "tool_use" if mixed else "end_turn", "stop_sequence": None}
    return [
        *events,
        event("message_delta", delta=reason, usage={"output_tokens": PIECES}),
        event("message_stop"),
    ]


def _message(content: list[Event], reason: str | None, tokens: int) -> Event:
    usage = {
        "input_tokens": 20,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": tokens,
    }
    return {
        "id": "msg_013Zva2CMHLNnXjNJJKqJ2EF",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5-20250929",
        "content": content,
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": usage,
    }


def _data(value: Event) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


def _whole_body(path: str) -> Event:
    text = "".join(_words(WORDS_OF_A_WHOLE))
    if path == MESSAGES:
        return _message([{"type": "text", "text": text}], "end_turn", WORDS_OF_A_WHOLE)
    if path == RESPONSES:
        return _response([_response_item("text", text)], "completed", WORDS_OF_A_WHOLE)
    message = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    tokens = WORDS_OF_A_WHOLE
    usage = {"prompt_tokens": 20, "completion_tokens": tokens, "total_tokens": 20 + tokens}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1763000000, "model": "gpt-4o-mini"}
    return {**head, "choices": [choice], "usage": usage}


EVENTS = {CHAT: chat_events, RESPONSES: responses_events, MESSAGES: messages_events}


@cache
def _stream(path: str, mixed: bool) -> list[bytes]:
    """A streamed reply as it is sent: one part for each event; the first one has the head, too."""
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    first, *others = (f"{len(text):x}\r\n{text}\r\n" for text in EVENTS[path](mixed))
    return [part.encode() for part in (head + first, *others[:-1], others[-1] + "0\r\n\r\n")]


@cache
def _whole(path: str) -> bytes:
    body = json.dumps(_whole_body(path)).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class _Connection(asyncio.Protocol):
    """One client: reads a request at a time, and answers it."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._received = b""
        self._gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport  # uvloop's is not an asyncio.Transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode("latin-1").lower().split("\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith("content-length:")), 0)
        if len(body) < length:
            return
        self._received = b""
        _, kind, _, path = lines[0].split(" ")[1].split("/", 3)
        path = f"/{path}"
        if not json.loads(body).get("stream"):
            self._transport.write(_whole(path))
            return
        self._send_next(iter(_stream(path, kind == "mixed")), asyncio.get_running_loop().time())

    def _send_next(self, parts: Iterator[bytes], at: float) -> None:
        part = next(parts, None)
        if part is None or self._gone:
            return
        self._transport.write(part)
        at += self._pause_s
        asyncio.get_running_loop().call_at(at, self._send_next, parts, at)


async def _serve(pause_s: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(pause_s), "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


def _run() -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(_serve(float(sys.argv[1]) / 1000))
    else:
        uvloop.run(_serve(float(sys.argv[1]) / 1000))


if __name__ == "__main__":
    _run()
