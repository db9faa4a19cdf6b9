"""Answers: the only place that writes completions as OpenAI does, and that fails as providers fail."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from openagents_worker.llm.script import ScriptedCall, ScriptedFault, ScriptedReply, words
from openagents_worker.llm.scripted import usage_of
from openagents_worker.models import dumps
from openagents_worker.testing.model_server.connection import Connection, Hangup, HttpRequest

__all__ = ["Answer", "FAULTS", "Log", "ModelRequest", "error_body", "model_request"]

FAULTS = {
    "bad_json": "200 with a body that is no JSON",
    "connection": "the connection is closed without a reply",
    "cut_stream": "a stream that ends without saying that it is done",
    "disconnect": "the connection is closed in the middle of the reply",
    "hang": "no reply, until the client gives up",
    "rate_limit": "429",
    "response": "400",
    "server_error": "500",
}
"""The values of an entry's `error`; `status` replaces the status of the last three."""

TORN_TEXT = "This reply is torn before it is whole."


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """What the model was asked. Header names are in lower case."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    model: str
    stream: bool
    headers: Mapping[str, str]
    n: int
    """Which turn this is: how many assistant messages follow the last user message."""
    body: Mapping[str, Any]


def model_request(request: HttpRequest) -> ModelRequest:
    body = json.loads(request.body)
    messages = tuple(body["messages"])
    return ModelRequest(
        messages=messages,
        tools=tuple(body.get("tools") or ()),
        model=str(body["model"]),
        stream=bool(body.get("stream")),
        headers=request.headers,
        n=_turn(messages),
        body=body,
    )


def _turn(messages: Sequence[Mapping[str, Any]]) -> int:
    roles = [message["role"] for message in messages]
    asked = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    return roles[asked + 1 :].count("assistant")


class Log:
    """What was asked and answered, in memory and, line by line as it happens, in a file."""

    def __init__(self, path: Path | None) -> None:
        self.events: list[dict[str, Any]] = []
        self._path = path
        self._file: TextIO | None = None

    def open(self) -> None:
        if self._path is not None:
            self._file = self._path.open("a", encoding="utf-8", errors="replace")

    def write(self, **event: Any) -> None:
        self.events.append({**event, "at": time.time()})
        if self._file is not None:
            self._file.write(dumps(self.events[-1]) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Answer:
    """The answer to one completion request, logged before its last bytes leave."""

    def __init__(
        self, number: int, asked: ModelRequest, connection: Connection, log: Log, token_delay_ms: int
    ) -> None:
        self._id, self._asked, self._connection, self._log = number, asked, connection, log
        self._token_delay_ms = token_delay_ms
        self._logged = False
        self._head = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": asked.model}

    def log_received(self) -> None:
        asked = self._asked
        self._log.write(
            event="received",
            id=self._id,
            call=asked.headers.get("x-call"),
            key=asked.headers.get("idempotency-key"),
            model=asked.model,
            messages=list(asked.messages),
            tools=[tool.get("function", {}).get("name") for tool in asked.tools],
            stream=asked.stream,
        )

    def log_answered(self, status: int | None) -> None:
        """Once an answer; `status` None: the connection was closed without one."""
        if not self._logged:
            self._logged = True
            self._log.write(event="answered", id=self._id, status=status)

    async def give(self, entry: ScriptedReply | ScriptedFault) -> None:
        if isinstance(entry, ScriptedFault):
            await self._fail(entry)
        elif self._asked.stream:
            await self._stream(entry)
        else:
            self.log_answered(200)
            await self._connection.send_json(200, self._completion(entry))

    # --- whole replies -----------------------------------------------------------------------------------

    def _completion(self, entry: ScriptedReply) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": entry.text or None}
        if calls := self._calls(entry):
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "finish_reason": _finish_reason(entry)}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": self._usage(entry)}

    def _calls(self, entry: ScriptedReply) -> list[dict[str, Any]]:
        return [
            {
                "id": call.id or f"call_{self._asked.n}_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call)},
            }
            for index, call in enumerate(entry.tool_calls)
        ]

    def _usage(self, entry: ScriptedReply) -> dict[str, Any]:
        usage = usage_of(entry, self._asked.messages)
        return {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.metadata.get("cached_tokens", 0)},
        }

    # --- streams -----------------------------------------------------------------------------------------

    async def _stream(self, entry: ScriptedReply) -> None:
        await self._connection.begin_stream()
        await self._send_choice({"role": "assistant", "content": ""})
        for delta in self._deltas(entry):
            await asyncio.sleep(self._token_delay_ms / 1000)
            await self._send_choice(delta)
        await self._send_choice({}, finish_reason=_finish_reason(entry))
        if (self._asked.body.get("stream_options") or {}).get("include_usage"):
            await self._send_chunk(choices=[], usage=self._usage(entry))
        self.log_answered(200)
        await self._connection.send_event("[DONE]")
        await self._connection.end_stream()

    def _deltas(self, entry: ScriptedReply) -> Iterator[dict[str, Any]]:
        """The reply in pieces: words, then each call's name and its arguments, eight characters at a time."""
        for word in words(entry.text):
            yield {"content": word}
        for index, call in enumerate(self._calls(entry)):
            function = call["function"]
            yield {"tool_calls": [{**call, "index": index, "function": {**function, "arguments": ""}}]}
            for at in range(0, len(function["arguments"]), 8):
                fragment = {"arguments": function["arguments"][at : at + 8]}
                yield {"tool_calls": [{"index": index, "function": fragment}]}

    async def _send_choice(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> None:
        await self._send_chunk(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])

    async def _send_chunk(self, **fields: Any) -> None:
        await self._connection.send_event(dumps(self._head | {"object": "chat.completion.chunk"} | fields))

    # --- faults ------------------------------------------------------------------------------------------

    async def _fail(self, fault: ScriptedFault) -> None:
        match fault.error:
            case "connection":
                self.log_answered(None)
                raise Hangup
            case "hang":
                await self._connection.client_gone()
                raise ConnectionResetError
            case "bad_json":
                self.log_answered(200)
                await self._connection.send(200, b'{"choices": [', {"content-type": "application/json"})
            case "disconnect" | "cut_stream":
                await self._tear(fault)
            case _:
                await self._refuse(fault)

    async def _tear(self, fault: ScriptedFault) -> None:
        torn = ScriptedReply(text=TORN_TEXT)
        if not self._asked.stream:
            self.log_answered(200)
            await self._connection.send_half(dumps(self._completion(torn)).encode())
            raise Hangup
        pieces = list(self._deltas(torn))
        await self._connection.begin_stream()
        for delta in pieces[: len(pieces) // 2]:
            await asyncio.sleep(self._token_delay_ms / 1000)
            await self._send_choice(delta)
        self.log_answered(200)
        if fault.error == "disconnect":
            raise Hangup
        await self._connection.end_stream()

    async def _refuse(self, fault: ScriptedFault) -> None:
        defaults = {"rate_limit": (429, "rate_limit_exceeded"), "server_error": (500, "server_error")}
        status, code = defaults.get(fault.error, (400, "invalid_request_error"))
        status = fault.status or status
        headers = {}
        if fault.retry_after_ms is not None:
            seconds = math.ceil(fault.retry_after_ms / 1000)
            headers = {"retry-after-ms": str(fault.retry_after_ms), "retry-after": str(seconds)}
        self.log_answered(status)
        body = error_body(fault.message or f"scripted {fault.error}", code)
        await self._connection.send_json(status, body, headers)


def _arguments(call: ScriptedCall) -> str:
    return call.arguments if isinstance(call.arguments, str) else dumps(call.arguments)


def _finish_reason(entry: ScriptedReply) -> str:
    return "tool_calls" if entry.tool_calls else "stop"


def error_body(message: str, code: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": code, "param": None, "code": code}}
