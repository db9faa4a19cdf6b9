"""Sources of agents: the only place that knows a definition as it was written, before `${VAR}` was replaced.

The source of an agent does not contain the values of variables, so it can be stored. Its content hash
identifies it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from openagents_worker.agents.code_path import CodePath
from openagents_worker.agents.loading import AgentsFile, check_definition
from openagents_worker.agents.schema import SKILLS_ID, SKILLS_IMPL
from openagents_worker.agents.sections import SkillsConfig
from openagents_worker.agents.variables import VARIABLE, Expanded, expand
from openagents_worker.jsontext import canonical_json
from openagents_worker.redaction import MASK, redact
from openagents_worker.secret_text import mask_prose

__all__ = ["AgentSource", "has_variable", "literal_secret", "read_source", "sources_of"]

DEFAULTS = ("tool_executor", "context_assembler")
"""The options of `runtime.config` that an agent without them gets."""
_AROUND_SECRETS = frozenset({"basic", "bearer", "token", "apikey", "key"})
"""Words that may stand beside the variable of a secret: `Bearer ${TOKEN}`."""
_PATHS = frozenset({"api_key_file"})
"""Options that look like the name of a secret, and hold the path of a file."""


@dataclass(frozen=True)
class AgentSource:
    """The definition of one agent as it was written, with the defaults of `runtime.config` and its skills.

    `in_code`: it was written in Python, where `${VAR}` is ordinary text.
    """

    data: Mapping[str, Any]
    in_code: bool = False

    @cached_property
    def content_hash(self) -> str:
        """The SHA-256 of its canonical JSON."""
        return sha256(canonical_json({"agent": self.data, "in_code": self.in_code}).encode()).hexdigest()


def sources_of(file: AgentsFile) -> dict[str, AgentSource]:
    """The sources of the valid agents of a file that was read, by agent id."""
    if file.config is None:
        return {}
    valid = {agent.id for agent in file.config.agents}
    written, expanded = file.text.value, file.expanded.value
    found: dict[str, AgentSource] = {}
    for index, (data, values) in enumerate(zip(written["agents"], expanded["agents"], strict=True)):
        if isinstance(values, Mapping) and values.get("id") in valid:
            in_code = index in file.places
            source = _with_defaults(data, written, skills=file.config.skills.is_used)
            if not (in_code and _uses_variables_of_file(data, source)):
                found[str(values["id"])] = AgentSource(source, in_code)
    return found


def _with_defaults(data: Mapping[str, Any], document: Mapping[str, Any], *, skills: bool) -> dict[str, Any]:
    """The agent with what `AppConfig.agent` adds to it, from the sections of the file before expansion."""
    defaults = (document.get("runtime") or {}).get("config") or {}
    source = dict(data)
    for name in DEFAULTS:
        if source.get(name) is None and defaults.get(name) is not None:
            source[name] = defaults[name]
    tools = source.get("tools") or []
    if skills and all(tool.get("id") != SKILLS_ID for tool in tools):
        config = {**SkillsConfig().model_dump(), **((document.get("skills") or {}).get("config") or {})}
        source["tools"] = [*tools, {"id": SKILLS_ID, "impl": SKILLS_IMPL, "config": config}]
    return source


def _uses_variables_of_file(data: Mapping[str, Any], source: Mapping[str, Any]) -> bool:
    """Whether an agent in Python has got a part of the file in which a variable must be replaced."""
    added = [source[name] for name in (*DEFAULTS, "tools") if source.get(name) is not data.get(name)]
    return any(map(has_variable, added))


def has_variable(value: Any) -> bool:
    """Whether a text in the value contains `${VAR}`."""
    return any(VARIABLE.search(text) for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


# --- storing ---------------------------------------------------------------------------------------------


def literal_secret(source: AgentSource, redact_keys: Collection[str]) -> bool:
    """Whether the source contains what looks like a secret, instead of the variable that holds it."""
    plain = _without_variables(source.data)
    shown = redact(plain, redact_keys, max_chars=None, max_items=None, max_depth=100, mask=mask_prose)
    return _differs(plain, shown)


def _without_variables(value: Any) -> Any:
    """The value without `${VAR}`. A text of which only words such as `Bearer` remain becomes null."""
    if isinstance(value, Mapping):
        return {key: _without_variables(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_variables(item) for item in value]
    if not isinstance(value, str) or not VARIABLE.search(value):
        return str(value) if isinstance(value, str) else value
    text = VARIABLE.sub(lambda found: found[2] or "", value)
    return None if set(text.lower().split()) <= _AROUND_SECRETS else text


def _differs(plain: Any, shown: Any) -> bool:
    """Whether a secret was masked. A null was a variable alone; another value under its name is a secret."""
    if isinstance(plain, dict) and isinstance(shown, dict):
        return plain.keys() != shown.keys() or any(
            _differs(plain[key], shown[key]) for key in plain if key not in _PATHS
        )
    if isinstance(plain, list) and isinstance(shown, list):
        return len(plain) != len(shown) or any(map(_differs, plain, shown))
    return bool(plain != shown and (isinstance(shown, str) or shown == MASK))


# --- reading ---------------------------------------------------------------------------------------------


def read_source(source: AgentSource, env: Mapping[str, str], like: Iterable[AgentSource]) -> AgentsFile:
    """A file with this agent alone, checked as an agents file is.

    The classes and functions of an agent in Python are those that this process has under the same path in
    the sources `like`.
    """
    document = {"agents": [source.data]}
    if source.in_code:
        code = {str(path): path for each in like if each.in_code for path in _code_paths(each.data)}
        return check_definition(document, Expanded(_with_code(document, code)))
    return check_definition(document, expand(document, env))


def _code_paths(value: Any) -> Iterator[CodePath]:
    return (text for text in _texts(value) if isinstance(text, CodePath))


def _with_code(value: Any, code: Mapping[str, CodePath]) -> Any:
    """The value with the code itself under each `impl` whose path is known."""
    if isinstance(value, Mapping):
        return {
            key: code.get(item, item) if key == "impl" and isinstance(item, str) else _with_code(item, code)
            for key, item in value.items()
        }
    return [_with_code(item, code) for item in value] if isinstance(value, list) else value
