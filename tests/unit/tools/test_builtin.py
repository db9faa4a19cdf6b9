"""Rules that all built-in tools must follow."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from openagents_worker.errors import PermanentToolError, PluginConfigError, ToolError, ToolValidationError
from openagents_worker.tools.builtin import BUILTIN_TOOLS
from openagents_worker.tools.builtin.supervisor import descendants
from tests.support.listening import listening
from tests.support.waiting import wait_for
from tests.unit.run_fakes import FakeRun
from tests.unit.tools.rows import ROWS, filled, prepared

every_tool = pytest.mark.parametrize("kind", sorted(BUILTIN_TOOLS))
ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\nConnection: close\r\n\r\n{"results":[]}'


@asynccontextmanager
async def an_http_server(asked: asyncio.Event) -> AsyncIterator[str]:
    """The URL of a server that answers every request but `/silent` with an empty search result."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if b"/silent" in request:
            asked.set()
            await reader.read()
        else:
            writer.write(ANSWER)
            await writer.drain()
        writer.close()

    async with listening(serve) as port:
        yield f"http://127.0.0.1:{port}"


def test_every_tool_has_a_row() -> None:
    """A new tool is tested like the others as soon as its row says what it declares, accepts and refuses."""
    assert sorted(ROWS) == sorted(BUILTIN_TOOLS)


@every_tool
@pytest.mark.defect("P13")
def test_p13_a_tool_describes_itself_and_its_arguments(kind: str) -> None:
    """P13: name, description and a valid schema. Every parameter is described, unknown ones are rejected."""
    described = BUILTIN_TOOLS[kind]().describe()
    schema = described["parameters"]

    jsonschema.Draft202012Validator.check_schema(schema)
    assert described["name"] == kind
    assert len(described["description"]) > 20
    assert schema["type"] == "object"
    assert schema["properties"]
    assert all(parameter["description"] for parameter in schema["properties"].values())
    assert schema["additionalProperties"] is False


def test_a_tool_is_loaded_when_it_is_used() -> None:
    """The table alone loads none of them, nor the libraries that they need."""
    loaded = "(table.__name__ + '.', 'httpx', 'dateutil')"
    show = f"print(*(name for name in sys.modules if name.startswith({loaded})))"
    program = (
        f"import sys, openagents_worker.tools.builtin as table; {show}; table.BUILTIN_TOOLS['calc']; {show}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "openagents_worker.tools.builtin.compute"]


@every_tool
def test_the_runtime_knows_which_calls_may_be_repeated_or_run_together(kind: str) -> None:
    """Tools with visible effects are not repeated without permission. Read-only tools run concurrently."""
    made, row = BUILTIN_TOOLS[kind](), ROWS[kind]
    spec = made.execution_spec()

    assert made.durable_idempotent is row.may_repeat
    assert spec.concurrency_safe is row.concurrency_safe
    assert spec.side_effects == row.side_effects
    assert (spec.reads_files, spec.writes_files) == (row.reads_files, row.writes_files)
    assert row.may_repeat or row.side_effects != "none"


@pytest.mark.parametrize(
    ("kind", "config", "own_ms"),
    [
        ("execute_command", {"timeout": 3_000}, 3_000_000),
        ("shell_exec", {"default_timeout_ms": 1}, 600_000),
        ("http_request", {"timeout": 120}, 120_000),
        ("tavily_search", {"timeout_ms": 60_000}, 60_000),
        ("grep_files", {"timeout_ms": 60_000}, 60_000),
        ("ripgrep", {"timeout_ms": 60_000}, 60_000),
    ],
)
def test_the_default_limit_does_not_end_a_call_before_the_limit_of_its_tool(
    kind: str, config: dict[str, Any], own_ms: int
) -> None:
    """Executors end a call after 30 s unless its tool says more. A tool with an option for it does."""
    assert (BUILTIN_TOOLS[kind](config).execution_spec().default_timeout_ms or 0) > own_ms


@every_tool
async def test_a_good_call_has_a_result_that_can_be_stored(kind: str, tmp_path: Path) -> None:
    """Its arguments fit the schema that the model gets, and its result is a JSON object."""
    row, folder = ROWS[kind], prepared(tmp_path)
    async with an_http_server(asyncio.Event()) as url:
        made = BUILTIN_TOOLS[kind](filled(row.config, folder, url))
        arguments = filled(row.good, folder, url)
        jsonschema.validate(arguments, made.schema())

        result = await made.invoke(arguments, FakeRun())

        assert isinstance(result, dict)
        assert result == json.loads(json.dumps(result, allow_nan=False))
        if hasattr(made, "close"):
            await made.close()


@pytest.mark.parametrize("kind", sorted(kind for kind, row in ROWS.items() if row.lasting is not None))
async def test_a_cancelled_call_has_ended_with_all_its_processes(kind: str, tmp_path: Path) -> None:
    """When the caller gets `CancelledError`, nothing of the call is running any more."""
    row, folder, asked = ROWS[kind], prepared(tmp_path), asyncio.Event()
    before = descendants(os.getpid())
    async with an_http_server(asked) as url:
        made = BUILTIN_TOOLS[kind](filled({**row.config, **row.lasting_config}, folder, url))
        call = asyncio.create_task(
            made.invoke(filled(row.lasting or {}, folder, url), FakeRun()), name="call"
        )
        await asyncio.to_thread(
            wait_for,
            lambda: asked.is_set() or descendants(os.getpid()) - before or call.done(),
            "it has begun",
        )
        assert not call.done()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert descendants(os.getpid()) - before == set()
        if hasattr(made, "close"):
            await made.close()


@every_tool
async def test_bad_arguments_get_a_coded_error(kind: str, tmp_path: Path) -> None:
    """Each argument has a bound. The error is short, and it is not retryable."""
    row, folder = ROWS[kind], prepared(tmp_path)
    made = BUILTIN_TOOLS[kind](filled(row.config, folder, "http://127.0.0.1:9"))
    assert row.bad
    for arguments in row.bad:
        with pytest.raises(ToolError) as caught:
            await made.invoke(dict(arguments), FakeRun())
        assert caught.value.code in {"tool.validation", "tool.permanent"}, arguments
        assert not caught.value.retryable
        assert len(str(caught.value)) < 1_000


@every_tool
def test_an_unknown_setting_is_refused_at_load(kind: str) -> None:
    """A misspelt setting in the agents file is found before the first run."""
    with pytest.raises(PluginConfigError, match="rooot"):
        BUILTIN_TOOLS[kind]({"rooot": "."})


@every_tool
async def test_an_unknown_argument_is_refused(kind: str) -> None:
    """No argument is silently ignored."""
    with pytest.raises(ToolValidationError, match="surprise: unknown argument"):
        await BUILTIN_TOOLS[kind]().invoke({"surprise": 1}, None)


SESSION = {
    "title": "Session Concurrency Guide",
    "snippet": "Same session serial, cross session concurrent orchestration.",
}
URL_WITH_QUERY = "https://[::1]/?a=x%26y&a=1&b=true"
URL_WITH_PARTS = "https://a?q=a%20b#f"
URL_WITH_PERCENT = "https://a/50%25%20off/%2F?q=9%25"


def host(name: str, port: int | None, has_https: bool, domain: str) -> dict[str, Any]:
    return {"host": name, "port": port, "has_https": has_https, "domain": domain}


# --- the small ones --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "result"),
    [
        ("percentage", {"value": 80, "percent": 15}, {"result": 12.0}),
        ("percentage", {"value": 80, "percent": 15, "operation": "increase"}, {"result": 92.0}),
        ("percentage", {"value": 80, "percent": 15, "operation": "decrease"}, {"result": 68.0}),
        ("min_max", {"numbers": [3, 1.5, 2]}, {"min": 1.5, "max": 3}),
        ("min_max", {"numbers": [3, 1.5, 2], "action": "max"}, {"max": 3, "result": 3}),
        ("min_max", {"numbers": "1, 2.5,4", "action": "sum"}, {"sum": 7.5, "result": 7.5}),
        ("min_max", {"numbers": "9007199254740993"}, {"min": 2**53 + 1, "max": 2**53 + 1}),
        ("min_max", {"numbers": [4, 1, 2], "action": "avg"}, {"avg": 7 / 3, "result": 7 / 3}),
        ("min_max", {"numbers": [4, 1, 2], "action": "median"}, {"median": 2, "result": 2}),
        ("builtin_search", {"query": "Session xyz"}, {"query": "Session xyz", "items": [SESSION]}),
        ("url_build", {"host": "a.org:80", "path": "b c"}, {"url": "https://a.org:80/b%20c"}),
        ("url_build", {"host": "::1", "query": {"a": ["x&y", 1], "b": True}}, {"url": URL_WITH_QUERY}),
        ("url_build", {"host": "a", "path": "", "query": "q=a b", "fragment": "f"}, {"url": URL_WITH_PARTS}),
        ("query_param", {"url": "http://a/?b=1&b=2", "key": "b"}, {"key": "b", "value": ["1", "2"]}),
        ("url_build", {"host": "a", "path": "50% off/%2F", "query": "q=9%"}, {"url": URL_WITH_PERCENT}),
        ("query_param", {"url": "http://a/?b=1", "key": "c"}, {"key": "c", "value": None}),
        ("query_param", {"url": "http://a/?b=&c", "key": "b"}, {"key": "b", "value": ""}),
        (
            "query_param",
            {"url": "http://a/?b&c=1&b=2", "action": "list"},
            {"params": {"b": ["", "2"], "c": "1"}},
        ),
        ("query_param", {"url": "http://a/?b=1&c=%20", "action": "list"}, {"params": {"b": "1", "c": " "}}),
        ("host_lookup", {"url": "https://u:pw@A.co.uk:8/x"}, host("A.co.uk", 8, True, "uk")),
        ("host_lookup", {"url": "a.org:80/x"}, host("a.org", 80, False, "org")),
        ("host_lookup", {"url": "http://[::1]:80/"}, host("::1", 80, False, "::1")),
        ("host_lookup", {"url": "a.org:80/?next=https://b.com"}, host("a.org", 80, False, "org")),
        ("host_lookup", {"url": "a.org/b//c"}, host("a.org", None, False, "org")),
        ("json_parse", {"text": '{"a": [1, null]}'}, {"value": {"a": [1, None]}}),
        ("text_transform", {"text": "hello World", "operation": "title"}, {"result": "Hello World"}),
        (
            "text_transform",
            {"text": "it's the USER\u2019S 3rd well-known cafe\u0301s", "operation": "title"},
            {"result": "It's The User\u2019s 3rd Well-Known Cafe\u0301s"},
        ),
        ("text_transform", {"text": "abc", "operation": "reverse"}, {"result": "cba"}),
        ("text_transform", {"text": " a ", "operation": "strip"}, {"result": "a"}),
    ],
)
async def test_small_tools_compute(kind: str, arguments: dict[str, Any], result: Any) -> None:
    """Equal arguments give equal results."""
    assert await BUILTIN_TOOLS[kind]().invoke(arguments, None) == result


@pytest.mark.parametrize(
    "text", ["{", "NaN", "1e999", '"\\ud800"', "[" * 100_000, "1" * 5000, '{"a": Infinity}']
)
async def test_text_that_is_not_json_is_rejected(text: str) -> None:
    """Also values that only Python accepts: NaN, infinity, lone surrogates, too deep nesting."""
    with pytest.raises(ToolValidationError, match=r"^text: no JSON"):
        await BUILTIN_TOOLS["json_parse"]().invoke({"text": text}, None)


async def test_a_percentage_too_large_for_a_number_is_an_error_and_not_infinity() -> None:
    """Results are valid JSON numbers."""
    with pytest.raises(ToolValidationError, match="too large"):
        await BUILTIN_TOOLS["percentage"]().invoke({"value": 1e308, "percent": 1e10}, None)


async def test_an_artifact_is_handed_to_the_run() -> None:
    """The result has its name and its size in bytes as UTF-8."""
    run, made = FakeRun(), BUILTIN_TOOLS["save_artifact"]()

    saved = await made.invoke(
        {"name": "r.md", "content": "für", "kind": "markdown", "metadata": {"n": 1}}, run
    )
    table = await made.invoke({"name": "t", "content": [1, 2]}, run)

    assert (saved, table) == ({"saved": "r.md", "bytes": 4}, {"saved": "t", "bytes": 5})
    assert run.artifacts == [
        {"name": "r.md", "kind": "markdown", "payload": "für", "metadata": {"n": 1}},
        {"name": "t", "kind": "generic", "payload": [1, 2], "metadata": {}},
    ]


async def test_an_artifact_needs_a_run() -> None:
    """Outside of a run it cannot be stored."""
    with pytest.raises(PermanentToolError):
        await BUILTIN_TOOLS["save_artifact"]().invoke({"name": "a", "content": "b"}, None)


@pytest.mark.parametrize(
    ("kind", "arguments", "state"),
    [
        ("write_file", {"path": "there.txt", "content": "x"}, "not_done"),
        ("write_file", {"path": "there.txt", "content": "x", "mode": "a"}, "unknown"),
        ("delete_file", {"path": "there.txt"}, "not_done"),
        ("delete_file", {"path": "gone.txt"}, "done"),
        ("http_request", {"url": "https://example.com/"}, "not_done"),
        ("http_request", {"url": "https://example.com/", "method": "POST"}, "unknown"),
    ],
)
async def test_an_interrupted_call_whose_repetition_is_harmless_asks_nobody(
    tmp_path: Path, kind: str, arguments: dict[str, Any], state: str
) -> None:
    """`reconcile` says so. Whoever can only guess leaves it to `on_interrupted`."""
    (tmp_path / "there.txt").write_text("x")
    made = BUILTIN_TOOLS[kind]({"root": str(tmp_path)} if "path" in arguments else {})
    reconciled = await made.reconcile(arguments, "key", None)
    assert reconciled.state == state
    if state == "done":
        assert reconciled.result == {"path": "gone.txt", "deleted": True}
