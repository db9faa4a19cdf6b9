"""The names of keys in Lua: the only place that writes them for the scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from openagents_worker.store.key_table import KEYS, LEFT_IN_PLACE

__all__ = ["left_in_place_in_lua", "lua_key_functions", "with_keys_inline"]

_CHANNELS = {"channel": "events:{}:{}:{}", "notices": "notices:{}", "alive": "alive:{}"}
_TEMPLATES = {spec.name: spec.template for spec in KEYS} | _CHANNELS
_ARGUMENT = r"[\w.]+(?:\[\w+\])?"
_CALL = re.compile(rf"\bk\.(\w+)\(((?:{_ARGUMENT}(?:, {_ARGUMENT})*)?)\)")


def lua_key_functions(used_in: str | None = None) -> str:
    """Lua functions for the keys and channels: `k.run(id)` …. They use the prefix in `KEYS[1]`.

    `used_in` is the text of a script: only the functions that it uses are returned, because Redis creates all
    functions again in each call of a script.
    """
    wanted = set(_TEMPLATES) if used_in is None else set(re.findall(r"\bk\.(\w+)", used_in))
    lines = [
        "local P = KEYS[1]",
        "local encoded_ = {}",
        "local function escaped(c) return string.format('%%%02X', string.byte(c)) end",
        "local function enc(id)",
        "  local found = encoded_[id]",
        "  if found then return found end",
        "  found = string.find(id, '[^%w%-_.~]') and string.gsub(id, '[^%w%-_.~]', escaped) or id",
        "  encoded_[id] = found",
        "  return found",
        "end",
        "local k = {}",
    ]
    return "\n".join([*lines, *(_key_function(name) for name in _TEMPLATES if name in wanted)])


def with_keys_inline(lua: str) -> str:
    """Replace calls of key functions by the keys: a function costs time in each call of a script.

    >>> with_keys_inline("redis.call('LLEN', k.journal(run.id))")
    "redis.call('LLEN', (P .. ':journal:' .. enc(run.id)))"
    """

    def key(call: re.Match[str]) -> str:
        return f"({_key_in_lua(call[1], call[2].split(', ') if call[2] else [])})"

    return _CALL.sub(key, lua)


def left_in_place_in_lua() -> str:
    """`LEFT_IN_PLACE` as a Lua table of patterns for a key without its prefix."""
    templates = [spec.template.replace("{}", "[^:]+") for spec in KEYS if spec.name in LEFT_IN_PLACE]
    return "{" + ", ".join(f"'^{template}$'" for template in templates) + "}"


def _key_function(name: str) -> str:
    arguments = ["a", "b", "c"][: _TEMPLATES[name].count("{}")]
    return f"function k.{name}({', '.join(arguments)}) return {_key_in_lua(name, arguments)} end"


def _key_in_lua(name: str, arguments: Sequence[str]) -> str:
    """The Lua expression of a key. `arguments` are the expressions of its ids."""
    first, *texts = _TEMPLATES[name].split("{}")
    parts = [f"P .. ':{first}'"]
    for argument, text in zip(arguments, texts, strict=True):
        parts += [f"enc({argument})", *([f"'{text}'"] if text else [])]
    return " .. ".join(parts)
