"""What an MCP server sends in place of a list of tools, or of the result of a call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.hostile.matrix import LIBRARY, TEXT, UNBOUND
from tests.hostile.table import Attack, Case, cases, hostile

MB = 1024 * 1024
CALL, LIST, INIT = "tools/call", "tools/list", "initialize"
NO_ANSWER = ("tool.timeout", "tool.unavailable")
EITHER = ("completed", "tool.error", "tool.permanent", *NO_ANSWER)
NO_LOOK = ("tool.not_found", "plugin.config", "tool.error", "tool.permanent", *NO_ANSWER)
"""The run has no tool `look`, or does not begin."""


def reply(result: bytes | str) -> bytes:
    """The answer of JSON-RPC with this JSON as its result."""
    text = result if isinstance(result, bytes) else result.encode("utf-8", "surrogatepass")
    return b'{"jsonrpc": "2.0", "id": ID, "result": ' + text + b"}"


def said(text: str) -> bytes:
    """A result with this JSON as its text."""
    return reply('{"content": [{"type": "text", "text": ' + text + "}]}")


def structured(value: str) -> bytes:
    """A result with this JSON as its structured content."""
    return reply('{"content": [], "structuredContent": {"x": ' + value + "}}")


def listed(*tools: Any) -> bytes:
    return reply(json.dumps({"tools": tools}))


def look(**fields: Any) -> dict[str, Any]:
    return {"name": "look", "inputSchema": {"type": "object"}, **fields}


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def many(raw: bytes, times: int) -> bytes:
    return b"\n".join([raw] * times)


VALUES = {
    "half of a pair": r'"\ud800"', "two halves in the wrong order": r'"\udc00\ud800"',
    "a pair": r'"\ud83d\ude00"',
    "a zero byte": r'"\u0000"', "a control sequence": r'"\u001b]52;c;eA==\u0007"', "bidi": '"\u202eabc"',
    "NaN": "NaN", "infinite": "-Infinity", "1e999": "1e999", "30 digits": "9" * 30,
    "4,000 digits": "9" * 4_000, "5,000 digits": "9" * 5_000,
    "90 levels": nested(90), "110 levels": nested(110), "190 levels": nested(190),
    "300 levels": nested(300), "50,000 levels": nested(50_000),
}  # fmt: skip


def texts() -> Iterator[tuple[str, tuple[Any, tuple[str, ...]]]]:
    for name, value in VALUES.items():
        yield f"a value: {name}", ((CALL, structured(value)), (*EITHER, "step.too_deep"))
        if value.startswith('"'):
            yield f"a text: {name}", ((CALL, said(value)), EITHER)
    for name, value in list(VALUES.items())[:9]:
        schema = '{"tools": [{"name": "look", "inputSchema": {"type": "object", "default": ' + value + "}}]}"
        yield f"a schema: {name}", ((LIST, reply(schema)), ("completed", *NO_LOOK))
    yield "a line that is not UTF-8", ((CALL, said('"@"').replace(b"@", b"\xff\xfe")), EITHER)


ODD: dict[str, Any] = {
    "no result": ((CALL, b'{"jsonrpc": "2.0", "id": ID}'), EITHER),
    "not JSON": ((CALL, b"Traceback (most recent call last):"), NO_ANSWER),
    "an empty line": ((CALL, b""), NO_ANSWER),
    "a list": ((CALL, b"[1]"), NO_ANSWER),
    "another id": ((CALL, b'{"jsonrpc": "2.0", "id": 99, "result": {"content": []}}'), NO_ANSWER),
    "an id that is a text": ((CALL, b'{"jsonrpc": "2.0", "id": "ID", "result": {"content": []}}'), EITHER),
    "a result that is a number": ((CALL, reply("7")), EITHER),
    "a result that is a list": ((CALL, reply("[]")), EITHER),
    "an empty result": ((CALL, reply("{}")), EITHER),
    "content that is a text": ((CALL, reply('{"content": "a"}')), EITHER),
    "content that is null": ((CALL, reply('{"content": null}')), EITHER),
    "a block that is a number": ((CALL, reply('{"content": [7]}')), EITHER),
    "a block of no type": ((CALL, reply('{"content": [{}]}')), EITHER),
    "a block of a later version": ((CALL, reply('{"content": [{"type": "video", "x": [NaN]}]}')), EITHER),
    "a text that is a number": ((CALL, said("7")), EITHER),
    "an image without its data": ((CALL, reply('{"content": [{"type": "image"}]}')), EITHER),
    "an image that is not base64": (
        (CALL, reply('{"content": [{"type": "image", "data": "\\u0000", "mimeType": "a b"}]}')),
        EITHER,
    ),
    "an error without a message": ((CALL, b'{"jsonrpc": "2.0", "id": ID, "error": {"code": 1}}'), EITHER),
    "an error with a text as its code": (
        (CALL, b'{"jsonrpc": "2.0", "id": ID, "error": {"code": "x", "message": "y"}}'),
        EITHER,
    ),
    "the code of a lost connection": (
        (CALL, b'{"jsonrpc": "2.0", "id": ID, "error": {"code": -32000, "message": "Connection closed"}}'),
        EITHER,
    ),
    "a request for input": ((CALL, reply('{"resultType": "input_required"}')), EITHER),
    "two answers": ((CALL, many(said('"a"'), 2)), "completed"),
    "no list of tools": ((LIST, reply("{}")), NO_LOOK),
    "tools that are null": ((LIST, reply('{"tools": null}')), NO_LOOK),
    "a tool that is a number": ((LIST, listed(look(), 7)), ("completed", *NO_LOOK)),
    "a tool without a name": ((LIST, listed(look(), {"inputSchema": {}})), ("completed", *NO_LOOK)),
    "an empty name": ((LIST, listed(look(), look(name=""))), ("completed", *NO_LOOK)),
    "a name of signs": ((LIST, listed(look(), look(name="../\u202e\x00"))), ("completed", *NO_LOOK)),
    "a schema that is a text": ((LIST, listed(look(inputSchema="x"))), NO_LOOK),
    "a schema that is false": ((LIST, listed(look(inputSchema={"not": {}}))), ("tool.validation", *NO_LOOK)),
    "a pattern that takes for ever": (
        (LIST, listed(look(inputSchema={"type": "object", "pattern": "^(a+)+$"}))),
        ("completed", *NO_LOOK),
    ),
    "hints that are texts": (
        (LIST, listed(look(annotations={"readOnlyHint": "yes"}))),
        ("completed", *NO_LOOK),
    ),
    "a version that is a number": ((INIT, reply('{"protocolVersion": 7}')), NO_LOOK),
    "nothing at the beginning": ((INIT, b""), NO_LOOK),
}

LARGE: dict[str, Any] = {
    "a result of 2 MB": ((CALL, said(json.dumps("x" * 2 * MB))), ("step.too_large", *EITHER)),
    "a result of 9 MB": ((CALL, said(json.dumps("x" * 9 * MB))), "tool.permanent"),
    "100,000 blocks": (
        (CALL, reply(json.dumps({"content": [{"type": "text", "text": "x"}] * 100_000}))),
        ("step.too_large", *EITHER),
    ),
    "an error of 2 MB": (
        (CALL, reply(json.dumps({"isError": True, "content": [{"type": "text", "text": "x" * 2 * MB}]}))),
        "tool.error",
    ),
    "a message of an error of 2 MB": (
        (CALL, b'{"jsonrpc": "2.0", "id": ID, "error": {"code": 1, "message": "' + b"x" * 2 * MB + b'"}}'),
        "tool.error",
    ),
    "20,000 lines that are not messages": ((CALL, many(b"debug", 20_000) + b"\n" + said('"a"')), "completed"),
    "200,000 lines that are not messages": ((CALL, many(b"debug", 200_000)), "tool.permanent"),
    "200,000 empty lines": ((CALL, many(b"", 200_000)), "tool.permanent"),
    "2,000 notifications": (
        (CALL, many(b'{"jsonrpc": "2.0", "method": "notifications/x"}', 2_000) + b"\n" + said('"a"')),
        "completed",
    ),
    "a description of 2 MB": ((LIST, listed(look(description="x" * 2 * MB))), "completed"),
    "a description of 5 MB": ((LIST, listed(look(description="x" * 5 * MB))), NO_LOOK),
    "a name of 2 MB": ((LIST, listed(look(), look(name="x" * 2 * MB))), "completed"),
    "10,000 tools": ((LIST, listed(look(), *[look(name=f"t{n}") for n in range(10_000)])), "completed"),
    "10,000 tools with one name": ((LIST, listed(*[look()] * 10_000)), "completed"),
    "a schema of 1 MB": ((LIST, listed(look(inputSchema={"type": "object", "title": "x" * MB}))), NO_LOOK),
    "pages without an end": (
        (LIST, reply(json.dumps({"tools": [look()], "nextCursor": "again"}))),
        "completed",
    ),
    "empty pages without an end": ((LIST, reply('{"tools": [], "nextCursor": "again"}')), NO_LOOK),
    "a cursor of 5 MB": (
        (LIST, reply(json.dumps({"tools": [look()], "nextCursor": "x" * 5 * MB}))),
        "completed",
    ),
    "images in the descriptions": (
        (LIST, listed(*[look(name=n, icons=[{"src": "data:" + "x" * MB}]) for n in ("look", *"abcd")])),
        "completed",
    ),
    "a name of the server of 2 MB": (
        (
            INIT,
            reply(
                json.dumps(
                    {
                        "protocolVersion": "2025-06-18",
                        "capabilities": {"tools": {}},
                        "serverInfo": {"name": "x" * 2 * MB, "version": "1"},
                    }
                )
            ),
        ),
        ("completed", *NO_LOOK),
    ),
}


@hostile(TEXT, cases("mcp", dict(texts())))
def test_text_and_numbers_of_a_server(case: Case, attack: Attack) -> None:
    attack(case)


@hostile(LIBRARY, cases("mcp", ODD))
def test_what_is_not_the_protocol(case: Case, attack: Attack) -> None:
    attack(case)


@pytest.mark.long
@hostile(UNBOUND, cases("mcp", LARGE))
def test_what_a_server_sends_is_bounded(case: Case, attack: Attack) -> None:
    attack(case)
