"""Tools whose schema has branches at its root, which OpenAI and Anthropic refuse."""

from __future__ import annotations

from typing import Any

import pytest

from openagents_worker.json_schema.mistakes import mistakes
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import ModelRequest
from openagents_worker.llm.structured import response_format
from openagents_worker.testing.model_server.wire_format import InvalidRequest
from tests.unit.llm.wire import ANTHROPIC, CHAT, FORMATS, HI, Format

URL, FILE = {"url": {"type": "string"}}, {"file": {"type": "string"}}
KINDS = {
    "oneOf": [
        {"properties": {"kind": {"const": "page"}, **URL}, "required": ["kind", "url"]},
        {"properties": {"kind": {"const": "disk"}, **FILE}, "required": ["kind", "file"]},
    ]
}
KIND = {"anyOf": [{"const": "page"}, {"const": "disk"}]}
REUSED = {
    "anyOf": [
        {"type": "object", "properties": {"to": {"type": "string"}, **URL}, "required": ["to", "url"]},
        {"type": "object", "properties": {"to": {"$ref": "#/anyOf/0/properties/to"}}, "required": ["to"]},
    ]
}
REFERRED = {
    "allOf": [{"$ref": "#/$defs/Size"}, {"properties": {"n": {"maximum": 9}}, "required": ["n"]}],
    "$defs": {
        "Size": {
            "properties": {"n": {"type": "integer"}, "unit": {"$ref": "#/$defs/Unit"}},
            "anyOf": [{"required": ["unit"]}, {"required": ["factor"]}],
        },
        "Unit": {"enum": ["m", "s"]},
    },
}
CASES: list[tuple[dict[str, Any], dict[str, Any], list[str], str | None]] = [
    (
        {"properties": {**URL, **FILE}, "anyOf": [{"required": ["url"]}, {"required": ["file"]}]},
        {**URL, **FILE},
        [],
        "at least one of these sets: url; file.",
    ),
    (
        KINDS,
        {"kind": KIND, **URL, **FILE},
        ["kind"],
        'exactly one of these sets: kind = "page", url; kind = "disk", file.',
    ),
    (REUSED, {"to": {"type": "string"}, **URL}, ["to"], None),
    (
        REFERRED,
        {"n": {"allOf": [{"type": "integer"}, {"maximum": 9}]}, "unit": {"$ref": "#/$defs/Unit"}},
        ["n"],
        "at least one of these sets: unit; factor.",
    ),
    ({"properties": URL, "not": {"required": ["file"]}}, URL, [], None),
    ({"anyOf": [KINDS, {"properties": FILE}]}, {"kind": KIND, **URL, **FILE}, [], None),
]
ARGUMENTS: list[dict[str, Any]] = [
    {"url": "u"},
    {"file": "f"},
    {"kind": "page", "url": "u"},
    {"kind": "disk", "file": "f"},
    {"to": "t", "url": "u"},
    {"to": "t"},
    {"n": 1, "unit": "m"},
    {"n": 1, "factor": 2},
]


def tool_with(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "find", "parameters": schema, **more}}


def sent_tool(wire: Format, schema: dict[str, Any], **more: Any) -> tuple[dict[str, Any], str, Any]:
    """The schema, the description and `strict` of a tool in a request that its provider accepts."""
    body = wire.body(HI, tools=[tool_with(schema, **more)])
    wire.check(body)
    (tool,) = body["tools"]
    tool = tool.get("function", tool)
    return tool.get("parameters") or tool["input_schema"], tool.get("description", ""), tool.get("strict")


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
@pytest.mark.parametrize(("schema", "properties", "required", "rule"), CASES)
def test_a_tool_with_branches_is_sent_as_one_object(
    wire: Format, schema: dict[str, Any], properties: dict[str, Any], required: list[str], rule: str | None
) -> None:
    """With the properties of all branches. The description says which of them belong together."""
    sent, description, _ = sent_tool(wire, schema, description="Finds it.")

    assert sent["type"] == "object"
    assert sent["properties"] == properties
    assert sent.get("required", []) == required
    expected = "Finds it." if rule is None else f"Finds it.\n\nThe arguments must have {rule}"
    assert description == expected


@pytest.mark.parametrize("schema", [case[0] for case in CASES])
def test_no_arguments_that_the_tool_accepts_are_excluded(schema: dict[str, Any]) -> None:
    sent, _, _ = sent_tool(CHAT, schema)
    accepted = [each for each in ARGUMENTS if mistakes(dumps(schema), each, "arguments") is None]

    assert accepted
    assert [each for each in accepted if mistakes(dumps(sent), each, "arguments") is not None] == []


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
def test_the_rules_of_the_provider_refuse_the_schema_as_it_is(wire: Format) -> None:
    body = wire.body(HI, tools=[tool_with({"type": "object"})])
    tool = body["tools"][0].get("function", body["tools"][0])
    tool["input_schema" if wire is ANTHROPIC else "parameters"] = {"type": "object", **KINDS}

    with pytest.raises(InvalidRequest, match="top level"):
        wire.check(body)


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
def test_a_schema_without_branches_is_sent_unchanged(wire: Format) -> None:
    """Branches below the root are accepted."""
    schema = {
        "type": "object",
        "properties": {"a": {"anyOf": [{"type": "null"}, {"type": "integer"}]}},
        "required": ["a"],
        "additionalProperties": False,
    }

    assert sent_tool(wire, schema, description="d", strict=True) == (schema, "d", True)


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
def test_a_tool_with_branches_is_not_strict(wire: Format) -> None:
    """A strict schema requires all of its properties."""
    assert not sent_tool(wire, KINDS, strict=True)[2]


def test_the_tool_for_an_output_with_branches_is_accepted() -> None:
    body = ANTHROPIC.codec().body(
        ModelRequest(HI, response_format=response_format("output", {"type": "object", **KINDS})),
        "claude-3-5-haiku-latest",
    )

    ANTHROPIC.check(body)
    assert set(body["tools"][0]["input_schema"]["properties"]) == {"kind", "url", "file"}
