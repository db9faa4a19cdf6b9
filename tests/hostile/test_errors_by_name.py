"""Error codes: an exception of any library for invalid input becomes an error with a code."""

from __future__ import annotations

import json
from typing import Any

from tests.hostile.matrix import LIBRARY
from tests.hostile.table import Attack, Case, cases, hostile
from tests.support.hostile_server import FAULTY, Answer, _bytes

HALF = "\ud800"
# Values that are not a text, a number or an object. Each causes another exception in another reader.
ODD: dict[str, Any] = {
    "None in a list": [None], "a number": 7, "a fraction": 1.5, "yes": True, "a list": ["x"], "lists": [[]],
    "an object": {"x": {}}, "bytes": b"\xff", "a set": {1}, "a class": int, "a function": print,
    "an exception": ValueError("x"), "a complex number": 1j, "a range": range(3), "Ellipsis": ...,
    "NotImplemented": NotImplemented, "a memoryview": memoryview(b"x"), "an iterator": iter([1]),
    "half of a pair": HALF, "a zero": "\0",
}  # fmt: skip
FIELDS = (
    "agent_id", "session_id", "input_text", "budget", "labels", "queue", "on_busy", "metadata",
    "output_type", "run_id",
)  # fmt: skip
REFUSED = ("request.invalid", "request.too_large", "user.agent_not_found")
OPTIONS = (
    "queue", "task_id", "link", "countdown", "eta", "expires", "chain", "headers", "priority", "link_error",
)  # fmt: skip


def body(text: str | bytes, **properties: Any) -> Any:
    def changed(envelope: dict[str, Any]) -> dict[str, Any]:
        given = text if isinstance(text, str) else text.decode("latin-1")
        return {**envelope, "body": given, "properties": {**envelope["properties"], **properties}}

    return changed


def typed(content_type: Any, encoding: Any = "utf-8") -> Any:
    return lambda envelope: {**envelope, "content-type": content_type, "content-encoding": encoding}


def without(*path: str) -> Any:
    def changed(envelope: dict[str, Any]) -> dict[str, Any]:
        part: Any = envelope
        for name in path[:-1]:
            part = part[name]
        del part[path[-1]]
        return envelope

    return changed


ANSWERED = ("gone", "request.invalid", "completed", "user.agent_not_found")
MESSAGES = {
    "base64 that is not": (body("%%%", body_encoding="base64"), ANSWERED),
    "base64 of no length": (body("a", body_encoding="base64"), ANSWERED),
    "base64 that is not ASCII": (body("ü", body_encoding="base64"), ANSWERED),
    "an encoding that there is not": (body("[]", body_encoding="rot13"), ANSWERED),
    "an encoding that is a number": (body("[]", body_encoding=7), ANSWERED),
    "a body that is no list": (body("{}"), ANSWERED),
    "a body that is a number": (body("7"), ANSWERED),
    "a body of two": (body("[[], {}]"), ANSWERED),
    "a body of four": (body("[[], {}, {}, {}]"), ANSWERED),
    "arguments that are none": (body("[7, {}, {}]"), ANSWERED),
    "names that are none": (body("[[], 7, {}]"), ANSWERED),
    "a type that there is not": (typed("application/x-none"), ANSWERED),
    "a type that runs": (typed("application/x-python-serialize", "binary"), ANSWERED),
    "a type that is a number": (typed(7), ANSWERED),
    "a type that is a list": (typed([]), ANSWERED),
    "a character set that there is not": (typed("application/json", "x-none"), ANSWERED),
    "a character set that is a codec": (typed("application/json", "hex"), ANSWERED),
    "a character set that is a number": (typed("application/json", 7), ANSWERED),
    **{
        f"no {' '.join(path)}": (without(*path), ANSWERED)
        for path in (
            ("body",), ("headers",), ("properties",), ("content-type",), ("content-encoding",), ("headers",
            "task"),
            ("headers", "id"), ("properties", "delivery_tag"), ("properties", "delivery_info"),
        )
    },
}  # fmt: skip


def field(name: str, value: Any) -> Any:
    return lambda redis, keys, run_id: redis.hset(keys("run", run_id), name, value)


STORED = {"nothing": "", "a word": "x", "bytes": b"\xff\xfe", "a list": "[]"}
RECORDS = {
    f"{name} is {what}": (field(name, value), ("completed", "record.unreadable", "request.invalid"))
    for name in ("request", "usage", "active_ms", "attempt", "format", "created_at", "last_error")
    for what, value in STORED.items()
}

ONE = {
    "id": "a",
    "name": "a",
    "llm": {"provider": "mock"},
    "pattern": {"type": "react"},
    "memory": {"type": "buffer"},
}
BAD_PARTS = (None, 7, [], "x", {"type": 7}, [7], "none", {"impl": 7}, {"impl": "x"}, {})
FILES: dict[str, Any] = {
    "nothing": b"", "a zero": b"\0", "half a file": b'{"agents": [',
    "UTF-16": '{"agents": []}'.encode("utf-16"),
    "UTF-32": '{"agents": []}'.encode("utf-32"), "Latin-1": '{"agents": "ü"}'.encode("latin-1"),
    "a mark of order": b"\xef\xbb\xbf[]", "a number": b"7", "a text": b'"x"', "null": b"null",
    "a list": b"[]",
    "two files": b'{"agents": []} {"agents": []}', "a comment": b'// x\n{"agents": []}',
    "a comma too many": b'{"agents": [],}', "single quotes": b"{'agents': []}", "YAML": b"agents:\n- id: a\n",
    "agents that are none": b'{"agents": 7}', "an agent that is none": b'{"agents": [7]}',
    "NaN": b'{"agents": [{"id": NaN}]}', "a half": b'{"agents": [{"id": "\\ud800"}]}',
    **{
        f"{part} is {value!r}": json.dumps({"agents": [{**ONE, part: value}]})
        for part, value in zip(("llm", "pattern", "memory", "tools", "context") * 2, BAD_PARTS, strict=True)
    },
}  # fmt: skip

RAISED = (
    "ValueError('x')", "KeyError(())", "RecursionError()", "MemoryError()", "StopIteration(1)",
    "StopAsyncIteration()",
    "UnicodeDecodeError('utf-8', b'x', 0, 1, 'x')", "AssertionError()", "OSError(2, 'x')", "TimeoutError()",
    "ConnectionError()", "NotImplementedError()", "ExceptionGroup('x', [ValueError()])", "EOFError()",
    "asyncio.TimeoutError()", "asyncio.InvalidStateError()", "asyncio.IncompleteReadError(b'', 1)",
    "SyntaxError('x')",
    "ZeroDivisionError()", "BufferError()", "ImportError('x', name=7)", "OverflowError()", "Warning()",
)  # fmt: skip
BASES = ("object", "dict", "list", "str", "int", "float", "tuple", "set")
EXPLOSIONS = {
    f"{base}, {error}": f"explodes({base}, {error})"
    for error in ("ValueError('x')", "RecursionError()", "KeyError(7)")
    for base in BASES
}
LEFT = ("completed", "tool.error", "step.too_large", "step.too_deep")


def streamed(*lines: bytes) -> bytes:
    return b"".join(b"data: " + line + b"\n\n" for line in lines)


TORN = ("llm.connection", "llm.response")
STREAMS: dict[str, Any] = {
    name: answer for name, answer in FAULTY.items() if "stream" in name and "never" not in name
} | {
    "not JSON": streamed(b"<html>"), "half of JSON": streamed(b'{"choices": ['),
    "no choices": streamed(b"{}"),
    "a number": streamed(b"7"), "null": streamed(b"null"), "a text": streamed(b'"x"'), "no bytes": b"",
    "only the end": streamed(b"[DONE]"), "the end twice": streamed(b"[DONE]", b"[DONE]"),
    "bytes that are not UTF-8": streamed(b"\xff\xfe"), "a mark of order": b"\xef\xbb\xbf" + streamed(b"{}"),
    "UTF-16": streamed(b"{}").decode().encode("utf-16"), "HTML": b"<html></html>", "NaN": streamed(b"NaN"),
    "an event of another name": b"event: error\n" + streamed(b'{"error": 7}'),
    "a choice of null": streamed(b'{"choices": [null]}'),
    "a delta of null": streamed(b'{"choices":[{"delta":null}]}'),
    "content that is an object": streamed(b'{"choices":[{"delta":{"content":{}}}]}'),
    "usage that is a text": streamed(b'{"choices":[],"usage":"x"}'),
    "an error that is a list": streamed(b'{"error": []}'),
    "an error that is null": streamed(b'{"error": null}'),
}  # fmt: skip
OF_HEADERS = ("header", "length", "status line", "encoding", "character set", "redirect", "cookie", "pause",
"protocol",
              "codec", "trailers", "informational")  # fmt: skip
HEADERS: dict[str, Any] = {
    name: answer for name,
    answer in FAULTY.items() if any(part in name for part in OF_HEADERS) and "stream" not in name
} | {
    f"a line {line[:12]!r}": Answer(
        _bytes(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n" + line + b"\r\n\r\n{}"), ("llm.connection",
        "llm.response")
    )
    for line in (b"no colon", b": no name", b"na me: x", b"x: \0", b" folded: x", b"x\xff: y", b"x:\x01",
    b"\x7f: x")
}  # fmt: skip
REPLIES = {name: answer for name, answer in FAULTY.items() if name not in HEADERS and name not in STREAMS}
BODIES = {
    f"the body {text!r}": (text, "llm.response" if text else "llm.connection")
    for text in (b"", b"null", b"7", b'"x"', b"[]", b"{", b"\xff", b"<html>", b'{"choices": null}',
    b'{"choices": [7]}',
                 b'{"choices": [{"message": []}]}', b'{"choices": [{"message": {"tool_calls": 7}}]}',)
}  # fmt: skip

URLS = (
    "http://[", "http://[::1", "http://[::1]x/", "http://[v1.x]/", "http://a:port/", "http://a:-1/",
    "http://a:70000/",
    "http://", "http:///x", "http:x", "://x", "http://a b/", "http://xn--a-/", "http://" + "a" * 64 + ".x/",
    "http://\u2100.x/", "http://a\0b/", "http://a\nb/", "http://\ud800/", "http://%zz/", "http://a..b/",
    "http://.",
    "http://" + "x." * 200, "//x", "", " ", "http://user:@:80/", "http://@/", "http://\u0130.x/", "1",
)  # fmt: skip
NO_URL = ("tool.validation", "tool.permanent", "tool.unavailable", "tool.error", "llm.response")

USAGE = ("exit 1", "exit 3", "exit 2", "exit 2 config.load", "exit 2 config.validation",
"exit 2 config.error",
"exit 2 request.invalid",
         "exit 2 run.not_found", "exit 3 run.not_found", "exit 2 user.agent_not_found",
         "exit 2 session.not_found")  # fmt: skip
COMMANDS = (
    ["none"], ["--none"], ["run"], ["run", "clerk"], ["runs", "x"], ["runs", "--limit"], ["runs", "--limit",
    "x"],
    ["runs", "--limit", "1e3"], ["runs", "--since", "9" * 400 + "w"], ["runs", "--since", "2024-13-01"],
    ["runs", "--since", "0001-01-01"], ["runs", "--until", "9999-12-31T23:59:59-23:59"], ["runs", "--state",
    "none"],
    ["runs", "--label", "x"], ["runs", "--cursor", "%%%"], ["runs", "--cursor", "AAAA"], ["runs", "--cursor",
    "bnVsbA=="],
    ["show"], ["show", "none"], ["show", "none", "--json"], ["watch", "none", "--after", "x"], ["watch",
    "none"],
    ["cancel", "none"], ["resume"], ["resume", "none", "--yes"], ["session", "none"], ["sessions", "--limit",
    "x"],
    ["validate", "/none"], ["validate", "/"], ["validate", "/dev/null"], ["validate", "/proc/self/mem"],
    ["run", "clerk", "x", "--budget", "x"], ["run", "clerk", "x", "--budget", "max_steps=x"], ["run", "none",
    "x"],
    ["run", "clerk", "x", "--budget", "none=1"],
)  # fmt: skip


def request_line(line: str, *headers: str) -> bytes:
    return "\r\n".join([line, *headers, "connection: close", "", ""]).encode("latin-1")


PAGES: dict[str, Any] = {
    "no HTTP": b"hello\r\n\r\n", "no version": b"GET /\r\n\r\n",
    "another version": request_line("GET / HTTP/9.9", "host: x"),
    "no host": request_line("GET / HTTP/1.1"), "no method": request_line(" / HTTP/1.1", "host: x"),
    "a method that there is not": request_line("NONE / HTTP/1.1", "host: x"),
    "a path without a slash": request_line("GET x HTTP/1.1", "host: localhost"),
    "a header without a colon": request_line("GET / HTTP/1.1", "host: x", "none"),
    "two lengths": request_line("POST / HTTP/1.1", "host: x", "content-length: 1", "content-length: 2"),
    "a length that is none": request_line("POST / HTTP/1.1", "host: x", "content-length: x"),
    "a length below zero": request_line("POST / HTTP/1.1", "host: x", "content-length: -1"),
    "a length and chunks": request_line("POST / HTTP/1.1", "host: x", "content-length: 1",
    "transfer-encoding: chunked"),
    "an encoding that is none": request_line("POST / HTTP/1.1", "host: x", "transfer-encoding: none"),
    "a cookie that is none": request_line("GET / HTTP/1.1", "host: localhost", "cookie: \xff=;;="),
    "a part that is none": request_line("GET /static/css/flower.css HTTP/1.1", "host: localhost",
    "range: bytes=x-y"),
    "a time that is none": request_line("GET /static/css/flower.css HTTP/1.1", "host: localhost",
    "if-modified-since: x"),
    "a login that is none": request_line("GET / HTTP/1.1", "host: localhost", "authorization: Basic %%%"),
    "a percent without digits": "/task/%", "a percent without hex": "/task/%zz", "not UTF-8": "/task/%ff%fe",
    "a query that is not UTF-8": "/tasks?x=%ff", "a task that there is not": "/task/none",
    "a worker that there is not": "/none", "a limit that is none": "/api/tasks?limit=x",
    "an offset below zero": "/api/tasks?offset=-1",
    "a time of a task that is none": "/api/tasks?received_start=x",
    "a sort that is none": "/tasks/datatable?draw=x&start=x&length=x&order[0][column]=x",
    "a refresh that is none": "/workers?refresh=x&json=x", "no such page": "/a/b/c",
}  # fmt: skip
STATUSES = ("200", "302", "304", "400", "401", "403", "404", "405", "416", "500", "501", "505", "closed")

TABLE = [
    *cases(
        "request",
        {f"{name} is {what}": ({name: value}, REFUSED) for name, (what, value) in zip(FIELDS * 2,
        ODD.items(), strict=True)},
    ),
    *cases(
        "options",
        {f"{name} is {what}": ({name: value}, REFUSED) for name, (what, value) in zip(OPTIONS * 2,
        ODD.items(), strict=True)},
    ),
    *cases("message", MESSAGES),
    *cases("record", RECORDS),
    *cases("agents_file", {name: (raw, ("config.load", "config.validation")) for name, raw in FILES.items()}),
    *cases("reply", {name: (answer, answer.codes) for name, answer in REPLIES.items()}),
    *cases("reply", BODIES),
    *cases("stream", {n: (a, a.codes if isinstance(a, Answer) else TORN) for n, a in STREAMS.items()}),
    *cases("header", {name: (answer, answer.codes) for name, answer in HEADERS.items()}),
    *cases("tool_error", {source: (source, "tool.error") for source in RAISED}),
    *cases("tool_result", {name: (source, LEFT) for name, source in EXPLOSIONS.items()}),
    *cases("event", {name: (f"{{'x': {source}}}", LEFT) for name, source in EXPLOSIONS.items()}),
    *cases("state", {name: (source, LEFT) for name, source in EXPLOSIONS.items()}),
    *cases("url", {url[:30].encode("unicode_escape").decode(): (url, NO_URL) for url in URLS}),
    *cases("cli", {" ".join(given)[:50]: (list(given), USAGE) for given in COMMANDS}),
    *cases("page", {name: (asked, STATUSES) for name, asked in PAGES.items()}),
]  # fmt: skip


@hostile(LIBRARY, TABLE)
def test_what_a_library_raises_has_a_code(case: Case, attack: Attack) -> None:
    attack(case)
