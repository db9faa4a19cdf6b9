"""The names of keys in Lua: the only place that writes them for the scripts."""

from __future__ import annotations

import re

from openagents_worker.store.key_table import KEYS, LEFT_IN_PLACE, KeySpec

__all__ = ["left_in_place_in_lua", "lua_key_functions"]


def lua_key_functions(used_in: str | None = None) -> str:
    """Lua functions for the keys and channels: `k.run(id)` …. They use the prefix in `KEYS[1]`.

    `used_in` is the text of a script: only the functions that it uses are returned, because Redis creates all
    functions again in each call of a script.
    """
    functions = {spec.name: _lua_key_function(spec) for spec in KEYS} | {
        "channel": "function k.channel(a, s, r) "
        "return P .. ':events:' .. enc(a) .. ':' .. enc(s) .. ':' .. enc(r) end",
        "notices": "function k.notices(i) return P .. ':notices:' .. enc(i) end",
        "alive": "function k.alive(i) return P .. ':alive:' .. enc(i) end",
    }
    wanted = set(functions) if used_in is None else set(re.findall(r"\bk\.(\w+)", used_in))
    lines = [
        "local P = KEYS[1]",
        "local function escaped(c) return string.format('%%%02X', string.byte(c)) end",
        "local function enc(id)",
        "  if not string.find(id, '[^%w%-_.~]') then return id end",
        "  return (string.gsub(id, '[^%w%-_.~]', escaped))",
        "end",
        "local k = {}",
    ]
    return "\n".join([*lines, *(text for name, text in functions.items() if name in wanted)])


def left_in_place_in_lua() -> str:
    """`LEFT_IN_PLACE` as a Lua table of patterns for a key without its prefix."""
    templates = [spec.template.replace("{}", "[^:]+") for spec in KEYS if spec.name in LEFT_IN_PLACE]
    return "{" + ", ".join(f"'^{template}$'" for template in templates) + "}"


def _lua_key_function(spec: KeySpec) -> str:
    if "{}" not in spec.template:
        return f"function k.{spec.name}() return P .. ':{spec.template}' end"
    before, after = spec.template.split("{}")
    tail = f" .. '{after}'" if after else ""
    return f"function k.{spec.name}(id) return P .. ':{before}' .. enc(id){tail} end"
