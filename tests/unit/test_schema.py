"""The schema of the agents file says of every field what it is: type, unit and default included."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel

from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.llm.providers import EXTRAS, PROVIDERS
from openagents_worker.memory import BUILTIN_MEMORIES
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.runtime.schema import agents_file_schema
from openagents_worker.tools.builtin import TOOL_TYPES

ROOT = Path(__file__).parents[2]
SCHEMA = agents_file_schema()
UNITS = {
    "_ms": "Milliseconds",
    "_bytes": "Bytes",
    "_usd": "USD",
    "_tokens": "tokens",
    "timeout": "Seconds",
    "_length": "characters",
    "_steps": "Number",
    "_attempts": "Number",
    "_calls": "Number",
    "_items": "Number",
    "_size": "Number",
}
"""How a name ends, and the word that its description has then."""

PLUGINS: dict[str, type[Any]] = {
    **BUILTIN_ASSEMBLERS,
    **BUILTIN_MEMORIES,
    **BUILTIN_PATTERNS,
    **TOOL_TYPES,
}


def fields() -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """Every field: of which part, its name, its schema, and whether it must be given."""
    parts = {"the file": SCHEMA, **SCHEMA["$defs"]}
    for case in SCHEMA["$defs"]["LLMOptions"]["allOf"]:
        parts[f"llm of {case['if']['properties']['provider']['const']}"] = case["then"]
    for part, definition in parts.items():
        for name, field in definition.get("properties", {}).items():
            yield part, name, field, name in definition.get("required", ())


ALL = list(fields())


def _is_number(field: dict[str, Any]) -> bool:
    types = json.dumps([field.get("type"), *(choice.get("type") for choice in field.get("anyOf", ()))])
    return "integer" in types or "number" in types


@pytest.mark.parametrize(
    ("part", "name", "field", "is_required"), ALL, ids=[f"{part}.{name}" for part, name, *_ in ALL]
)
def test_every_field_is_described(part: str, name: str, field: dict[str, Any], is_required: bool) -> None:
    """A sentence, a type, and a default unless it must be given; a number says its unit."""
    assert re.fullmatch(r"[A-Z].{10,}\.", field.get("description", "")), f"{part}.{name} has no description"
    assert any(key in field for key in ("type", "anyOf", "$ref", "const", "enum")), f"{part}.{name}: no type"
    assert is_required or "default" in field, f"{part}.{name} has no default"
    for ending, word in UNITS.items():
        if name.endswith(ending) and _is_number(field):
            assert word.lower() in field["description"].lower(), (
                f"{part}.{name} does not say its unit: {word}"
            )


@pytest.mark.parametrize("part", sorted(SCHEMA["$defs"].keys() - {"JsonValue"}))
def test_every_part_is_described(part: str) -> None:
    """What it is for, in a sentence; of a plugin's config the plugin is named."""
    definition = SCHEMA["$defs"][part]
    assert definition.get("description") or "Config." in part


def test_every_plugin_and_every_provider_has_its_config_in_the_schema() -> None:
    """So an editor completes it, whichever is chosen."""
    configs = {name.partition("Config.")[2] for name in SCHEMA["$defs"] if "Config." in name}
    assert configs == set(PLUGINS)
    assert set(EXTRAS) == set(PROVIDERS)


@pytest.mark.parametrize("name", sorted(PLUGINS))
def test_no_field_of_a_plugins_config_is_left_out(name: str) -> None:
    """The schema's part is the model that checks the config."""
    config: type[BaseModel] = PLUGINS[name].Config
    [part] = [part for key, part in SCHEMA["$defs"].items() if key.endswith(f"Config.{name}")]
    assert set(part.get("properties", {})) == set(config.model_fields)


@pytest.mark.parametrize("path", ["config/agents.json", "examples/demo/agents.json"])
def test_the_shipped_files_fit_the_schema(path: str) -> None:
    """An editor has nothing to complain of."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads((ROOT / path).read_text()))


@pytest.mark.parametrize(
    ("agent", "fits"),
    [
        ({"pattern": {"type": "react", "config": {"max_steps": 3}}}, True),
        ({"pattern": {"type": "react", "config": {"max_step": 3}}}, False),
        ({"runtime": {"max_steps": "${STEPS:-3}"}}, True),
        ({"runtime": {"max_steps": "many"}}, False),
        ({"llm": {"provider": "openai_compatible", "top_p": 0.5}}, True),
        ({"llm": {"provider": "openai_compatible", "top_p": 5}}, False),
        ({"tools": [{"id": "f", "type": "read_file", "config": {"rot": "."}}]}, False),
        ({"tools": [{"id": "f", "impl": "shop.tools.Find", "config": {"rot": "."}}]}, True),
    ],
)
def test_the_schema_finds_what_a_worker_would_refuse(agent: dict[str, Any], fits: bool) -> None:
    """Plugins' configs and providers' options included; a variable may stand for a number."""
    whole = {
        "id": "a",
        "name": "A",
        "llm": {"provider": "mock"},
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
        **agent,
    }
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid({"agents": [whole]}) is fits
