"""The schema of the agents file: the only place that combines its fields with the configs of plugins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from openagents_worker.agents import AppConfig
from openagents_worker.agents.variables import VARIABLE
from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.llm.providers import EXTRAS
from openagents_worker.memory import BUILTIN_MEMORIES
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.tools.builtin import TOOL_TYPES

__all__ = ["agents_file_schema"]

_BUILTIN: dict[str, Mapping[str, Any]] = {
    "ContextAssemblerRef": BUILTIN_ASSEMBLERS,
    "MemoryRef": BUILTIN_MEMORIES,
    "PatternRef": BUILTIN_PATTERNS,
    "ToolRef": TOOL_TYPES,
}
"""The built-in plugins that each kind of reference can name."""


_SCALARS = ("integer", "number", "boolean")
_VARIABLE = rf"^{VARIABLE.pattern}$"


def agents_file_schema() -> dict[str, Any]:
    """The JSON Schema of the agents file (draft 2020-12). Every field has a description with its unit.

    The schema of `config` depends on the `type` of a built-in plugin. The options of a model depend on its
    `provider`.
    """
    schema = AppConfig.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    for ref, plugins in _BUILTIN.items():
        _add_cases(
            definitions, ref, "type", {name: plugin.Config for name, plugin in plugins.items()}, "config"
        )
    _add_cases(definitions, "LLMOptions", "provider", EXTRAS, None)
    for definition in (schema, *definitions.values()):
        for field in definition.get("properties", {}).values():
            _allow_variable(field)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _allow_variable(field: dict[str, Any]) -> None:
    """Let a number or boolean also be a string that consists of one variable."""
    if field.get("type") in _SCALARS:
        field |= {"type": [field["type"], "string"], "pattern": _VARIABLE}
    elif any(choice.get("type") in _SCALARS for choice in field.get("anyOf", ())):
        field["anyOf"].append({"type": "string", "pattern": _VARIABLE})


def _add_cases(
    definitions: dict[str, Any],
    definition: str,
    key: str,
    models: Mapping[str, type[BaseModel]],
    into: str | None,
) -> None:
    """Add one case per model: if `key` has its name, `into` has its schema.

    If `into` is None, the object itself gets the properties of the model.
    """
    part = definitions[definition]
    part["allOf"] = []
    for name, model in models.items():
        shape = model.model_json_schema()
        for inner, inner_definition in shape.pop("$defs", {}).items():
            definitions.setdefault(inner, inner_definition)
        if into is None:
            then: dict[str, Any] = {"properties": shape.get("properties", {})}
        else:
            config_name = f"{definition.removesuffix('Ref')}Config.{name}"
            definitions[config_name] = {**shape, "title": f"The config of {name}"}
            then = {"properties": {into: {"$ref": f"#/$defs/{config_name}"}}}
        condition = {"properties": {key: {"const": name}}, "required": [key]}
        part["allOf"].append({"if": condition, "then": then})
