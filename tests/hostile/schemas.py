"""JSON Schemas that are crafted to block the process that reads or uses them, and tools with such schemas."""

from __future__ import annotations

from typing import Any

from openagents_worker.tools.base import ToolContext, ToolPlugin
from tests.support.refused_schemas import wide

__all__ = [
    "CATASTROPHE",
    "CATASTROPHIC",
    "HARMLESS_BUT_LARGE",
    "MULTIPLIED",
    "Catastrophe",
    "Multiplied",
    "Strict",
]

CATASTROPHE = {"type": "string", "pattern": "^(a+)+$"}
CATASTROPHIC = "a" * 40 + "!"
HARMLESS_BUT_LARGE = wide(1_300)
MULTIPLIED = {
    "$ref": "#/$defs/n",
    "$defs": {"n": {"properties": {"a": {"allOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/n"}]}}}},
}


class _Tool(ToolPlugin):
    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> Any:
        return "called"


class Catastrophe(_Tool):
    """The pattern of its argument makes Python's `re` run forever."""

    name = "catastrophe"

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": {"a": CATASTROPHE}}


class Multiplied(_Tool):
    """Each level of its argument doubles the work of a check."""

    name = "multiplied"

    def schema(self) -> dict[str, Any]:
        return {"type": "object", **MULTIPLIED}


class Strict(_Tool):
    """Its schema uses every keyword."""

    name = "strict"

    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {
                "few": {"type": "array", "maxItems": 2, "uniqueItems": True},
                "short": {"type": "string", "maxLength": 5, "pattern": "^[a-z]*$"},
                "one": {"enum": ["x", 1, None]},
                "step": {"type": "number", "multipleOf": 0.1, "minimum": 0, "maximum": 10},
                "tree": {"$ref": "#/$defs/tree"},
            },
            "additionalProperties": False,
            "$defs": {"tree": {"type": "object", "additionalProperties": {"$ref": "#/$defs/tree"}}},
        }
