"""Size limits: input that is too large, also after decompression, is rejected with a code."""

from __future__ import annotations

import base64
import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

from tests.hostile.matrix import UNBOUND
from tests.hostile.table import Attack, Case, cases, hostile
from tests.hostile.world import RawReply

MB = 1024 * 1024
CHAT = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}
CHUNK = {"choices": [{"delta": {"content": "fine"}, "finish_reason": "stop"}]}
TOO_LARGE, UNUSABLE = "llm.too_large", "llm.response"

# --- the broker's messages -------------------------------------------------------------------------------


@cache
def _bomb(wbits: int) -> bytes:
    """20 MB of spaces. Every test process imports this module, so the fastest level is used."""
    made = zlib.compressobj(1, wbits=wbits)
    return b"".join(made.compress(b" " * MB) for _ in range(20)) + made.flush()


def _compressed(
    body: Callable[[bytes], bytes] | bytes, name: object
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A message with this body that declares this compression."""

    def alter(envelope: dict[str, Any]) -> dict[str, Any]:
        packed = body if isinstance(body, bytes) else body(envelope["body"].encode())
        return {
            **envelope,
            "body": base64.b64encode(packed).decode(),
            "headers": {**envelope["headers"], "compression": name},
            "properties": {**envelope["properties"], "body_encoding": "base64"},
        }

    return alter


def _with(**more: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda envelope: {**envelope, "headers": {**envelope["headers"], **more}}


MESSAGES = {
    "20 MB in zlib": (_compressed(lambda _: _bomb(zlib.MAX_WBITS), "zlib"), "request.too_large"),
    "20 MB by its whole name": (
        _compressed(lambda _: _bomb(zlib.MAX_WBITS), "application/x-gzip"),
        "request.too_large",
    ),
    "20 MB in bzip2": (_compressed(lambda _: bz2.compress(b" " * 20 * MB), "bzip2"), "request.too_large"),
    "20 MB in xz": (
        _compressed(lambda _: lzma.compress(b" " * 20 * MB, preset=0), "xz"),
        "request.too_large",
    ),
    "a good one in zlib": (_compressed(zlib.compress, "zlib"), "completed"),
    "a good one in bzip2": (_compressed(bz2.compress, "bzip2"), "completed"),
    "a good one in xz": (_compressed(lzma.compress, "xz"), "completed"),
    "a compression nobody knows": (_compressed(zlib.compress, "zip"), "request.invalid"),
    "a compression that is not text": (_compressed(zlib.compress, ["zlib"]), "request.invalid"),
    "a compression that is a number": (_compressed(zlib.compress, 7), "request.invalid"),
    "a compression of a long name": (_compressed(zlib.compress, "x" * 9_000), "request.invalid"),
    "brotli": (_compressed(b"\x00", "brotli"), "request.invalid"),
    "zstd": (_compressed(b"\x28\xb5\x2f\xfd", "zstd"), "request.invalid"),
    "not compressed": (_compressed(lambda body: body, "zlib"), "request.invalid"),
    "torn": (_compressed(lambda body: zlib.compress(body)[:20], "zlib"), "request.invalid"),
    "gzip under the name of zlib": (_compressed(gzip.compress, "zlib"), "request.invalid"),
    "an xz that wants 4 GB": (
        _compressed(
            lambda _: lzma.compress(
                b"x", format=lzma.FORMAT_ALONE, filters=[{"id": lzma.FILTER_LZMA1, "dict_size": 2**30}]
            ),
            "xz",
        ),
        "request.invalid",
    ),
    "no bytes": (_compressed(b"", "zlib"), "request.invalid"),
    "10 MB of headers": (_with(x="x" * 10 * MB), "gone"),
    "a million headers": (lambda envelope: _with(**{f"h{n}": n for n in range(500_000)})(envelope), "gone"),
    "10 MB that are not JSON": (b"{" * 10 * MB, "gone"),
    "10 MB of lists": (b"[" + b"[]," * (3 * MB) + b"[]]", "gone"),
    "a request of 2 MB": (
        lambda envelope: {**envelope, "body": envelope["body"].replace("Go.", "x" * 2 * MB)},
        "request.too_large",
    ),
}

# --- replies ---------------------------------------------------------------------------------------------


def _reply(body: bytes, **headers: str) -> RawReply:
    return RawReply(body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def _gzip_bomb() -> bytes:
    return _bomb(zlib.MAX_WBITS | 16)


REPLIES = {
    "20 MB in gzip": (_reply(_gzip_bomb(), content_encoding="gzip"), TOO_LARGE),
    "20 MB in deflate": (_reply(_bomb(zlib.MAX_WBITS), content_encoding="deflate"), TOO_LARGE),
    "a good one in gzip": (
        _reply(gzip.compress(json.dumps(CHAT).encode()), content_encoding="gzip"),
        "completed",
    ),
    "a good one in deflate": (
        _reply(zlib.compress(json.dumps(CHAT).encode()), content_encoding="deflate"),
        "completed",
    ),
    "gzip in gzip": (_reply(gzip.compress(_gzip_bomb()), content_encoding="gzip, gzip"), UNUSABLE),
    "brotli": (_reply(b"\x00", content_encoding="br"), UNUSABLE),
    "zstd": (_reply(b"\x28\xb5\x2f\xfd", content_encoding="zstd"), UNUSABLE),
    "an encoding of 9,000 letters": (_reply(b"{}", content_encoding="x" * 9_000), UNUSABLE),
    "not gzip": (_reply(b"{}", content_encoding="gzip"), UNUSABLE),
    "5 MB of text": (json.dumps({**CHAT, "x": "x" * 5 * MB}).encode(), TOO_LARGE),
    "5 MB of lists": (b"[" + b"[]," * (5 * MB // 3) + b"[]]", TOO_LARGE),
    "3 MB of lists": (b"[" + b"[]," * MB + b"[]]", UNUSABLE),
    "3 MB of brackets": (b"[" * 3 * MB, UNUSABLE),
    "3 MB of digits": (b"9" * 3 * MB, UNUSABLE),
    "an answer larger than a run may store": (
        json.dumps({"choices": [{"message": {"content": "x" * 2 * MB}, "finish_reason": "stop"}]}).encode(),
        "step.too_large",
    ),
    "a character set that is a codec": (
        RawReply(b"{}", content_type="application/json; charset=hex"),
        UNUSABLE,
    ),
    "a character set that fails": (
        RawReply(b"{}", content_type="application/json; charset=undefined"),
        UNUSABLE,
    ),
    "a failure of 5 MB": (RawReply(b"x" * 5 * MB, status=400), UNUSABLE),
    "a failure in gzip": (
        RawReply(_gzip_bomb(), status=400, headers={"content-encoding": "gzip"}),
        UNUSABLE,
    ),
    "chunks of one byte": (
        _reply(b"1\r\nx\r\n" * 40_000 + b"0\r\n\r\n", transfer_encoding="chunked"),
        TOO_LARGE,
    ),
}


def _event(delta: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n"


GOOD_EVENT = b"data: " + json.dumps(CHUNK).encode() + b"\n\n"
MANY_CALLS = [{"index": number, "id": str(number)} for number in range(30_000)]
LONG_CALL = {"tool_calls": [{"index": 0, "function": {"arguments": "x" * 9_000}}]}

STREAMS = {
    "a line of 5 MB": (b"data: " + b"x" * 5 * MB, TOO_LARGE),
    "an event of 5 MB of lines": (b"data:\n" * MB, TOO_LARGE),
    "text of 5 MB": (_event({"content": "x" * 9_000}) * 600, TOO_LARGE),
    "arguments of 5 MB": (_event(LONG_CALL) * 600, TOO_LARGE),
    "30,000 tool calls": (_event({"tool_calls": MANY_CALLS}), TOO_LARGE),
    "empty lines": (b"\n" * 3 * MB + GOOD_EVENT, "completed"),
    "comments": (b":\n" * MB + GOOD_EVENT, "completed"),
    "carriage returns": (b"\r" * MB + GOOD_EVENT.replace(b"\n", b"\r"), "completed"),
    "an error in it": (b'data: {"error": {"message": "x", "code": 400}}\n\n', UNUSABLE),
    **{
        f"choices {choices}": (f'data: {{"choices": {choices}}}\n\n'.encode(), UNUSABLE)
        for choices in ("7", '"x"', "[7]", "[[1]]", '["x"]', '{"a": 1}')
    },
    **{
        f"delta {delta}": (f'data: {{"choices": [{{"delta": {delta}}}]}}\n\n'.encode(), UNUSABLE)
        for delta in (
            "[1]",
            "7",
            '{"tool_calls": 7}',
            '{"tool_calls": [7]}',
            '{"tool_calls": [{"index": {}}]}',
        )
    },
}

# --- headers and addresses -------------------------------------------------------------------------------

HEADERS = {
    **{
        f"retry-after {value[:30]!r}": ({"retry-after": value}, "completed")
        for value in ("1e308", "nan", "-1", "9" * 400, "Fri, 31 Dec 9999 23:59:59 -2359", "," * 500)
    },
    **{
        f"set-cookie {value[:20]!r}": ({"set-cookie": value}, "completed")
        for value in ("a=b", "=", ";;;", "a=b; domain=.com; path=/", "x" * 9_000, "a=b; expires=" + "9" * 99)
    },
    **{
        f"content-type {value[:20]!r}": ({"content-type": f"application/json; {value}"}, "completed")
        for value in ("charset=", 'charset="', "charset=x-unknown", "x" * 9_000, "boundary=;=;")
    },
    "90 KB of headers": ({f"x-{n}": "x" * 900 for n in range(90)}, "completed"),
    "a date that is not": ({"date": "yesterday"}, "completed"),
}

PRIVATE = (
    *(
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "localhost",
        "localhost.",
        "[::1]",
        "[::]",
        "0",
    ),
    *(
        "[::ffff:127.0.0.1]",
        "[::127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::1]",
    ),
    *("[2002:7f00:1::]", "[2001:0:1::1]", "[fec0::1]", "[fe80::1]", "[fd00::1]", "[::ffff:0:10.0.0.1]"),
    *(
        "169.254.169.254",
        "100.64.0.1",
        "10.0.0.1",
        "user:pass@127.0.0.1",
        "example.com@127.0.0.1",
        "127。0。0。1",
    ),
)
URLS = {
    **{f"http://{host}/": (f"http://{host}/", "tool.permanent") for host in PRIVATE},
    **{
        url[:40]: (url, "tool.validation")
        for url in ("http://", "http://[::1", "http://a:b/", "http://h:99999/", "http://xn--a/", "x" * 9_000)
    },
}

# --- the agents file -------------------------------------------------------------------------------------

ONE = {
    "id": "a",
    "name": "a",
    "llm": {"provider": "mock"},
    "pattern": {"type": "react"},
    "memory": {"type": "buffer"},
}
INVALID, UNREADABLE = "config.validation", "config.load"


def _file(*agents: Any, **more: Any) -> str:
    return json.dumps({"agents": agents, **more})


def _keys(count: int) -> dict[str, int]:
    return {f"key{number}": number for number in range(count)}


X_TWICE = ", ".join(['"x": 1'] * 4_000)
TOOL = {"id": "t", "type": "calc"}
AGENTS_FILES = {
    "4,000 keys of an agent": (_file({**ONE, **_keys(4_000)}), INVALID),
    "4,000 keys of the file": (_file(ONE, **_keys(4_000)), INVALID),
    "4,000 options of a model": (_file({**ONE, "llm": {"provider": "mock", **_keys(4_000)}}), "loaded"),
    "4,000 options of a pattern": (
        _file({**ONE, "pattern": {"type": "react", "config": _keys(4_000)}}),
        "loaded",
    ),
    "4,000 headers": (_file({**ONE, "llm": {"provider": "mock", "extra_headers": _keys(4_000)}}), INVALID),
    "4,000 tools": (_file({**ONE, "tools": [{**TOOL, "id": f"t{n}"} for n in range(4_000)]}), "loaded"),
    "4,000 tools of one id": (_file({**ONE, "tools": [TOOL] * 4_000}), INVALID),
    "4,000 tools that are none": (_file({**ONE, "tools": [7] * 4_000}), INVALID),
    "1,000 agents": (_file(*({**ONE, "id": f"a{n}"} for n in range(1_000))), "loaded"),
    "5,001 agents": (_file(*({**ONE, "id": f"a{n}"} for n in range(5_001))), INVALID),
    "1,000 agents of one id": (_file(*[ONE] * 1_000), INVALID),
    "6,000 agents that are none": (_file(*[7] * 6_000), INVALID),
    "4,000 variables that are not set": (
        _file({**ONE, "tools": [{**TOOL, "id": f"${{NOT_SET_{n}}}"} for n in range(4_000)]}),
        INVALID,
    ),
    "one variable 4,000 times": (_file({**ONE, "name": "${NOT_SET}" * 4_000}), INVALID),
    "4,000 beginnings of variables": (_file({**ONE, "name": "${" * 4_000}), "loaded"),
    "one key 4,000 times": (f'{{"agents": [{json.dumps(ONE)}], {X_TWICE}}}', UNREADABLE),
    "a key of a megabyte": (_file(ONE, **{"agents" * 200_000: 1}), INVALID),
    "5 MB": (_file({**ONE, "name": "x" * 5 * MB}), UNREADABLE),
    "5 MB of spaces": (b" " * 5 * MB + _file(ONE).encode(), UNREADABLE),
    "5 MB of bytes that are not text": (b"\xff" * 5 * MB, UNREADABLE),
    "a million brackets": ("{" + "[" * MB, UNREADABLE),
}

# --- what code of a run leaves ---------------------------------------------------------------------------

EVENTS = {
    "2 MB in parts": (
        "{'parts': [['x' * 450] * 50] * 50 + [['y' * 450] * 50] * 50}",
        ("completed", "step.too_large"),
    ),
    "2 MB of umlauts": ("{'parts': [['\\xfc' * 450] * 45] * 48}", "step.too_large"),
    "a long name": (("x" * 300, "{'n': 1}"), "step.too_large"),
    "a very long name": (("x" * 30_000, "{'n': 1}"), "step.too_large"),
    "a long text": ("{'text': 'x' * 3_000_000}", "completed"),
    "texts": ("{'texts': ['x' * 3_000] * 3_000}", "completed"),
    "an int of 300 digits": ("{'n': 10 ** 300}", "completed"),
    "numbers": ("{'numbers': list(range(100_000))}", "completed"),
    "lists in lists": ("{'lists': [[[[1] * 40] * 40] * 40] * 40}", ("completed", "step.too_large")),
    "objects in objects": (
        "{'o': [{f'k{a}': {f'k{b}': 'x' * 400 for b in range(40)} for a in range(40)}] * 40}",
        "step.too_large",
    ),
    "long keys": (
        "{'o': [{('k' * 250 + str(a)): 'x' * 450 for a in range(45)}] * 45}",
        ("completed", "step.too_large"),
    ),
    "bytes": ("{'b': b'x' * 1_000_000}", ("completed", "step.too_large")),
    "a set": ("{'s': set(range(100_000))}", ("completed", "step.too_large")),
    "no payload": ("{}", "completed"),
    "an empty name": (("", "{'n': 1}"), "completed"),
    "a name of spaces": ((" " * 256, "{'n': 1}"), "completed"),
    "a name of line ends": (("\n" * 300, "{'n': 1}"), "step.too_large"),
    "a name of umlauts": (("ü" * 256, "{'n': 1}"), "completed"),
    "the name of one of ours": (("run.completed", "{'n': 1}"), "completed"),
    "many keys": ("{f'k{n}': n for n in range(50_000)}", "completed"),
}

TABLE: list[Case] = [
    *cases("message", MESSAGES),
    *cases("reply", REPLIES),
    *cases("stream", STREAMS),
    *cases("header", HEADERS),
    *cases("url", URLS),
    *cases("event", EVENTS),
    *cases("agents_file", AGENTS_FILES),
]


@hostile(UNBOUND, TABLE)
def test_no_bound(case: Case, attack: Attack) -> None:
    attack(case)
