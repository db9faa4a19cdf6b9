"""Tables of the reference pages: settings, agents file, command line. `generate.py` puts them into the pages.

A page holds `<!-- generated: NAME -->` and `<!-- end -->`; `TABLES[NAME]` writes what stands between them.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from openagents_worker import agents
from openagents_worker.agents.sections import McpLimits
from openagents_worker.cli.commands import commands
from openagents_worker.cli.exits import Exit
from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.context.budget import Compaction
from openagents_worker.memory import BUILTIN_MEMORIES
from openagents_worker.models import RunBudget, RunRequest, RunResult, RunUsage
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.settings import OTHER_VARIABLES, PREFIX, Settings
from openagents_worker.telemetry.series import FLEET_SERIES, PROCESS_SERIES, SIGNALS, Series
from openagents_worker.time_limits import default_heartbeat_ms
from openagents_worker.tools.builtin import BUILTIN_TOOLS
from openagents_worker.tools.mcp.options import McpOptions, McpToolOptions, ServerOptions

__all__ = ["TABLES", "filled", "has_tables", "settings_without_advice", "texts_without_reader"]

_MARKED = re.compile(r"(<!-- generated: (?P<name>[\w. ]+) -->\n).*?(<!-- end -->)", re.DOTALL)

TEXTS = tomllib.loads((Path(__file__).parent / "reference.toml").read_text())
WHEN_TO_CHANGE: Mapping[str, Mapping[str, str]] = TEXTS["settings"]
"""Advice on each setting, by subject. A setting that is missing there fails tests/docs/test_reference.py."""
FIELDS: Mapping[str, Mapping[str, str]] = TEXTS["fields"]
"""What a field means whose model does not say so itself by `Field(description=…)`."""

PATTERN_FIRST = ("system_prompt", "max_steps", "step_timeout_ms")


# --- settings --------------------------------------------------------------------------------------------


def settings_without_advice() -> list[str]:
    """Settings that no subject of this module names."""
    known = {name for subject in WHEN_TO_CHANGE.values() for name in subject}
    return sorted(Settings.model_fields.keys() - known)


def texts_without_reader() -> list[str]:
    """Texts of reference.toml about a setting or field that does not exist, or that describes itself."""
    advice = {name for subject in WHEN_TO_CHANGE.values() for name in subject}
    fields = {model.__name__: model.model_fields for model in (RunRequest, RunResult, RunUsage)}
    unread = [
        f"{owner}.{name}"
        for owner, texts in FIELDS.items()
        for name in texts
        if name not in fields.get(owner, {}) or fields[owner][name].description
    ]
    return sorted(advice - Settings.model_fields.keys()) + unread


def _settings() -> Iterator[str]:
    fields = Settings.model_fields
    for subject, advice in WHEN_TO_CHANGE.items():
        yield f"\n## {subject}\n\n| variable | default | meaning | change it when |\n|---|---|---|---|\n"
        for name in advice:
            meaning = f"{_first_upper(fields[name].description or '')} {_bounds(Settings, name)}".strip()
            row = (f"`{PREFIX}{name.upper()}`", _default(name), meaning, advice[name])
            yield f"| {' | '.join(map(_cell, row))} |\n"
    yield "\n## Read by other parts of a deployment\n\n| variable | meaning |\n|---|---|\n"
    for variable, meaning in OTHER_VARIABLES.items():
        yield f"| `{variable}` | {_cell(meaning)} |\n"


def _default(name: str) -> str:
    default = Settings.model_fields[name].default
    if name == "heartbeat_ms":
        return (
            f"a quarter of the lease: {default_heartbeat_ms(Settings.model_fields['lease_ms'].default):,} ms"
        )
    if name == "broker_url":
        return "the Redis of `REDIS_URL`"
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    unit = next((u for suffix, u in UNITS.items() if name.endswith(suffix)), "")
    if isinstance(default, int | float) and unit:
        return f"{default:,} {unit}{_in_days(default, unit)}"
    return f"`{default}`"


UNITS = {"_ms": "ms", "_s": "s", "_bytes": "bytes", "_chars": "characters"}


def _in_days(number: float, unit: str) -> str:
    days, rest = divmod(number, 24 * 60 * 60)
    return f" ({days:.0f} days)" if unit == "s" and days and not rest else ""


# --- agents file -----------------------------------------------------------------------------------------


def _fields(
    model: type[BaseModel], *, named: str | None = None, first: tuple[str, ...] = ()
) -> Callable[[], Iterator[str]]:
    """A table of the fields of a model, those of `first` first. `named` is its name in reference.toml."""

    def rows() -> Iterator[str]:
        schema = model.model_json_schema()
        if not model.model_fields:
            yield "No options.\n"
            return
        yield "| field | value | default | meaning |\n|---|---|---|---|\n"
        names = sorted(
            model.model_fields, key=lambda name: first.index(name) if name in first else len(first)
        )
        for name in names:
            field = model.model_fields[name]
            value = _value(schema["properties"][name], schema.get("$defs", {}))
            section = SECTIONS.get(f"{model.__name__}.{name}") or SECTIONS.get(name)
            value = f"[{value}]({section})" if "object" in value and section else value
            meaning = field.description or _text(named or model.__name__, name)
            yield f"| `{name}` | {value} | {_shown(field)} | {_cell(_first_upper(meaning))} |\n"

    return rows


def _text(owner: str, field: str) -> str:
    """What reference.toml says of a field."""
    return FIELDS.get(owner, {}).get(field, "")


def _config_of(plugins: Mapping[str, type[Any]], name: str, **options: Any) -> Callable[[], Iterator[str]]:
    """The options of a plugin that we ship."""
    return _fields(plugins[name].Config, named=plugins[name].__name__, **options)


SECTIONS = {
    "agents": "#an-agent",
    "context_assembler": "#context_assembler",
    "diagnostics": "diagnostics.md",
    "limits": "#limits",
    "llm": "#llm",
    "LLMOptions.limits": "#llmlimits",
    "logging": "#logging",
    "McpOptions.server": "#server",
    "memory": "#memory",
    "multi_agent": "children.md#what-a-child-gets-and-what-it-returns",
    "pattern": "#pattern",
    "pricing": "#llmpricing",
    "retry": "#llmretry",
    "runtime": "#runtime",
    "skills": "skills.md#give-an-agent-skills",
    "tool_executor": "tools.md#executors-how-the-calls-of-an-agents-tools-are-made",
    "tools": "#tools",
}
"""Fields that a section explains, of the same page or of another one."""


def _shown(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, str) and field.default_factory is not None:
        return "a new one"  # another one each time
    if isinstance(default, BaseModel) or default in (None, [], {}):
        return ""
    if isinstance(default, list) and len(default) > 4:
        return "the built-in list"
    return f"`{json.dumps(default, ensure_ascii=False)}`"


def _value(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """A JSON Schema in a few words."""
    if "anyOf" in schema:
        kinds = [_value(part, defs) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds)) or "null"
    if "enum" in (named := defs.get(schema.get("$ref", "").rpartition("/")[2], {})):
        return _value(named, defs)
    if "$ref" in schema or "allOf" in schema or "properties" in schema:
        return "object"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "any JSON")
    if kind == "array":
        inner = _value(schema.get("items", {}), defs)
        return f"list of {inner}s" if inner in ("object", "string") else f"list of {inner}"
    limits = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most"}
    said = [f"{word} {schema[key]:,}" for key, word in limits.items() if key in schema]
    return ", ".join([str(kind), *said])


def _tools() -> Iterator[str]:
    yield "| `type` | what it does | options |\n|---|---|---|\n"
    for name, tool in BUILTIN_TOOLS.items():
        options = ", ".join(f"`{option}`" for option in tool.Config.model_fields)
        yield f"| `{name}` | {_cell(tool.description)} | {options} |\n"


def _tool_parameters() -> Iterator[str]:
    yield "| tool | arguments | effects | after a crash | together |\n|---|---|---|---|---|\n"
    for name, tool in BUILTIN_TOOLS.items():
        made = tool()
        schema, spec = made.schema(), made.execution_spec()
        shown = [
            f"`{each}`" if each in schema["required"] else f"[`{each}`]" for each in schema["properties"]
        ]
        repeated = "is repeated" if made.durable_idempotent else "see [effects.md](effects.md)"
        together = "yes" if spec.concurrency_safe else "no"
        yield f"| `{name}` | {', '.join(shown)} | {spec.side_effects} | {repeated} | {together} |\n"


def _pattern_options() -> Iterator[str]:
    """The options that the other patterns have besides those of `react`."""
    yield "| pattern | option | value | default | meaning |\n|---|---|---|---|---|\n"
    for name, pattern in BUILTIN_PATTERNS.items():
        shapes = pattern.Config.model_json_schema()["properties"]
        for option, field in pattern.Config.model_fields.items():
            if option not in BUILTIN_PATTERNS["react"].Config.model_fields:
                value = _value(shapes[option], {})
                meaning = _cell(field.description or "")
                yield f"| `{name}` | `{option}` | {value} | {_shown(field)} | {meaning} |\n"


def _tool_options() -> Iterator[str]:
    yield "| tools | option | default | meaning |\n|---|---|---|---|\n"
    rows: dict[str, list[str]] = {}
    for name, tool in BUILTIN_TOOLS.items():
        for option, field in tool.Config.model_fields.items():
            row = f"`{option}` | {_shown(field) or 'none'} | {_cell(field.description or '')} |"
            rows.setdefault(row, []).append(name)
    for row, names in rows.items():
        yield f"| {', '.join(f'`{name}`' for name in names)} | {row}\n"


# --- command line ----------------------------------------------------------------------------------------


def _commands() -> Iterator[str]:
    context = click.Context(commands, info_name="openagents-worker")
    for name in sorted(commands.list_commands(context)):
        command = commands.get_command(context, name)
        if command is not None and not command.hidden:
            yield from _command(command, name, context)


def _command(command: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"\n### `{name}`\n\n```text\nopenagents-worker {name} {usage}\n```\n\n"
    yield f"{_paragraphs(command.help or '')}\n"
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    if options:
        yield "\n| option | meaning |\n|---|---|\n"
    for option in options:
        record = option.get_help_record(context)
        if record is not None:
            usage = re.sub(r"INTEGER( RANGE)?", "N", record[0])
            yield f"| `{_cell(usage)}` | {_cell(record[1])} |\n"


def _paragraphs(text: str) -> str:
    parts = [_as_written(part) if "\b" in part else " ".join(part.split()) for part in text.split("\n\n")]
    return "\n\n".join(part for part in parts if part)


def _as_written(part: str) -> str:
    """What click does not wrap: lines of examples."""
    lines = [line.strip() for line in part.replace("\b", "").splitlines()]
    return "\n".join(["```text", *filter(None, lines), "```"])


EXITS = {
    Exit.SUCCESS: "The command did what it says.",
    Exit.USAGE: "The command line is wrong: an unknown command or option, a missing argument.",
    Exit.INVALID: "The agents file, a setting, a plugin or the request is not valid.",
    Exit.RUN_FAILED: "The run failed or was cancelled (`run`, `watch`), the worker is not healthy "
    "(`health`), a process of `dev` has ended, or there is an error of another kind, such as a bug.",
    Exit.NO_REDIS: "Redis cannot be reached, has refused a command, or its answer was lost.",
    Exit.INTERRUPTED: "Ctrl-C. The run continues. (`dev` ends with 0.)",
}


def _exits() -> Iterator[str]:
    yield "| exit code | meaning |\n|---|---|\n"
    for code in Exit:
        yield f"| {code.value} | {EXITS[code]} |\n"


# --- pages -----------------------------------------------------------------------------------------------


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _first_upper(text: str) -> str:
    """A sentence; one that begins with a value (`strict: …`) keeps it."""
    return text if re.match(r"\w+:", text) else text[:1].upper() + text[1:]


def _bounds(model: type[BaseModel], name: str) -> str:
    """Choices are part of what a setting means."""
    schema = model.model_json_schema()["properties"][name]
    options = next((part["enum"] for part in (schema, *schema.get("anyOf", ())) if "enum" in part), [])
    described = model.model_fields[name].description or ""
    missing = [option for option in options if str(option) not in described]
    return f"One of {', '.join(f'`{option}`' for option in options)}." if missing else ""


# --- metrics ---------------------------------------------------------------------------------------------


def _series(series: Iterable[Series]) -> Callable[[], Iterator[str]]:
    def rows() -> Iterator[str]:
        yield "| series | type | labels | meaning |\n|---|---|---|---|\n"
        for one in series:
            labels = ", ".join(f"`{label}`" for label in one.labels)
            yield f"| `{one.full_name}` | {one.kind} | {labels} | {_cell(one.help)} |\n"

    return rows


def _signals() -> Iterator[str]:
    yield "| name | attributes | series |\n|---|---|---|\n"
    for name, series in SIGNALS.items():
        attributes = ", ".join(f"`{attribute}`" for attribute in series.labels.values())
        yield f"| `{name}` | {attributes} | `{series.full_name}` |\n"


TABLES: Mapping[str, Callable[[], Iterator[str]]] = {
    "settings": _settings,
    "worker series": _series(PROCESS_SERIES),
    "fleet series": _series(FLEET_SERIES),
    "signals": _signals,
    "commands": _commands,
    "exit codes": _exits,
    "file": _fields(agents.AppConfig),
    "agent": _fields(agents.AgentDefinition, first=("id", "name", "pattern", "llm", "tools", "memory")),
    "llm": _fields(agents.LLMOptions),
    "pricing": _fields(agents.LLMPricing),
    "retry": _fields(agents.LLMRetryOptions),
    "model limits": _fields(agents.LLMLimits),
    "tool": _fields(agents.ToolRef, first=("id", "type", "impl", "config")),
    "builtin tools": _tools,
    "builtin tool options": _tool_options,
    "builtin tool parameters": _tool_parameters,
    "runtime": _fields(agents.RuntimeOptions),
    "limits": _fields(RunBudget),
    "request": _fields(RunRequest),
    "result": _fields(RunResult),
    "usage": _fields(RunUsage),
    "logging": _fields(agents.LoggingConfig),
    "react": _config_of(BUILTIN_PATTERNS, "react", first=PATTERN_FIRST),
    "patterns": _pattern_options,
    "buffer": _config_of(BUILTIN_MEMORIES, "buffer"),
    "window_buffer": _config_of(BUILTIN_MEMORIES, "window_buffer"),
    "markdown_memory": _config_of(BUILTIN_MEMORIES, "markdown_memory"),
    "zep": _config_of(BUILTIN_MEMORIES, "zep"),
    "chain": _config_of(BUILTIN_MEMORIES, "chain"),
    "truncating": _config_of(BUILTIN_ASSEMBLERS, "truncating"),
    "sliding_window": _config_of(BUILTIN_ASSEMBLERS, "sliding_window"),
    "head_tail": _config_of(BUILTIN_ASSEMBLERS, "head_tail", first=("head_messages",)),
    "compaction": _fields(Compaction),
    "mcp options": _fields(McpOptions),
    "mcp server": _fields(ServerOptions),
    "mcp overrides": _fields(McpToolOptions),
    "mcp limits": _fields(McpLimits),
    "memory": _fields(agents.MemoryRef, first=("type", "impl", "config")),
}


def has_tables(page: Path) -> bool:
    """Whether the page has parts that `filled` writes."""
    return _MARKED.search(page.read_text()) is not None


def filled(page: Path) -> str:
    """The page with every marked part written anew."""
    return _MARKED.sub(
        lambda m: f"{m[1]}\n{''.join(TABLES[m['name']]()).strip()}\n\n{m[3]}", page.read_text()
    )
