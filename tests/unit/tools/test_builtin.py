"""Rules that all built-in tools must follow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from openagents_worker.errors import PermanentToolError, PluginConfigError, ToolValidationError
from openagents_worker.tools.builtin import BUILTIN_TOOLS
from tests.unit.run_fakes import FakeRun

EFFECTS_OTHERS_SEE = {"write_file", "delete_file", "http_request"}
PURE = set(BUILTIN_TOOLS) - EFFECTS_OTHERS_SEE - {"save_artifact"}

every_tool = pytest.mark.parametrize("kind", sorted(BUILTIN_TOOLS))


@every_tool
def test_a_tool_describes_itself_and_its_arguments(kind: str) -> None:
    """Name, description and a valid schema. Every parameter is described, unknown ones are rejected."""
    described = BUILTIN_TOOLS[kind]().describe()
    schema = described["parameters"]

    jsonschema.Draft202012Validator.check_schema(schema)
    assert described["name"] == {"ripgrep": "grep_files"}.get(kind, kind)
    assert len(described["description"]) > 20
    assert schema["type"] == "object"
    assert schema["properties"]
    assert all(parameter["description"] for parameter in schema["properties"].values())
    assert schema["additionalProperties"] is False


def test_a_tool_is_loaded_when_it_is_used() -> None:
    """The table alone loads none of them, nor the libraries that they need."""
    show = "print(*(name for name in sys.modules if name.startswith(table.__name__ + '.')))"
    program = (
        f"import sys, openagents_worker.tools.builtin as table; {show}; table.BUILTIN_TOOLS['calc']; {show}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "openagents_worker.tools.builtin.compute"]


@every_tool
def test_the_runtime_knows_which_calls_may_be_repeated_or_run_together(kind: str) -> None:
    """Tools with visible effects are not repeated without permission. Read-only tools run concurrently."""
    made = BUILTIN_TOOLS[kind]()

    assert made.durable_idempotent is (kind not in EFFECTS_OTHERS_SEE)
    assert made.execution_spec().concurrency_safe is (kind in PURE)
    assert made.execution_spec().reads_files is (kind in {"read_file", "list_files", "grep_files", "ripgrep"})
    assert made.execution_spec().writes_files is (kind in {"write_file", "delete_file"})


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


# --- the small ones --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "result"),
    [
        ("percentage", {"value": 80, "percent": 15}, {"result": 12.0}),
        ("percentage", {"value": 80, "percent": 15, "operation": "increase"}, {"result": 92.0}),
        ("percentage", {"value": 80, "percent": 15, "operation": "decrease"}, {"result": 68.0}),
        ("min_max", {"numbers": [3, 1.5, 2]}, {"min": 1.5, "max": 3}),
        ("min_max", {"numbers": [3, 1.5, 2], "action": "max"}, {"max": 3}),
        ("json_parse", {"text": '{"a": [1, null]}'}, {"value": {"a": [1, None]}}),
        ("text_transform", {"text": "hello World", "operation": "title"}, {"result": "Hello World"}),
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
