"""Script sources: the only place that joins a Lua script with its libraries, arguments and reply.

The Lua code that reads the arguments and orders the fields of the reply is generated from the Python
signature, so the positions are always the same on both sides.
"""

from __future__ import annotations

import re
from functools import cache, cached_property
from hashlib import sha1
from importlib import resources
from typing import Any

from openagents_worker.store.facts import facts_as_text, with_fact_sets
from openagents_worker.store.lua_keys import left_in_place_in_lua, lua_key_functions, with_keys_inline
from openagents_worker.store.lua_parts import without_unused
from openagents_worker.store.permission import MISSING_RIGHTS_MARK
from openagents_worker.store.rights import PUT_ASIDE_RIGHTS, Right, rights_of, sample_of, smallest_cover
from openagents_worker.store.run_fields import run_fields_in_lua
from openagents_worker.store.scripts.replies import reply_in_lua
from openagents_worker.store.states import states_as_text, with_state_sets

__all__ = ["Script", "rights_of_script"]

_COMMON = ("EVENTS_MAXLEN", "RUN_TTL_MS", "SESSION_TTL_MS")
_LUA = resources.files("openagents_worker.store") / "lua"


class Script:
    """A Lua script: its file, with the libraries, key functions, arguments and reply that it needs.

    `parameters` maps the name of each argument to its type (str, int, bool or a sequence of str). `reply` is
    the type of its reply (`replies`). It is a part of the source: two versions of the library that order the
    fields of a reply differently have different SHA-1s, and each calls its own script.
    """

    def __init__(self, name: str, parameters: dict[str, Any], reply: Any = None) -> None:
        self.name = name
        self.signal = (f"openagents.redis {name}", {"db.system.name": "redis", "openagents.script": name})
        """The name and the attributes of the span of a call."""
        self.reply = reply
        types, self.body = _types_and_body(name)
        body = with_keys_inline(f"{types}\n{self.body}")
        parts = [lua_key_functions(body), _arguments(parameters, body), reply_in_lua(reply), body]
        self.source = "\n".join(part for part in parts if part)
        self.sha, _ = _with_sha(self.source)

    @property
    def rights(self) -> tuple[Right, ...]:
        """The rights that the Redis user needs, sorted."""
        return rights_of_script(self.name)

    @cached_property
    def guarded(self) -> tuple[str, str]:
        """SHA-1 and source of the script with a short check of rights, for a user who may lose a right.

        As `checking`, but much cheaper: it checks each command and each kind of key once. No other command
        can run between the check and the writes. Redis 6 has no function for this check, so there a script
        may be refused after its first writes.
        """
        cover = smallest_cover(self.rights)
        probes = [
            f"if not may_({_probe_arguments(right)}) then lacking_[#lacking_ + 1] = {at} end"
            for at, right in enumerate(self.rights, 1)
            if right in cover
        ]
        return _with_sha(
            f"{_GUARD.format(probes=chr(10).join(probes), lacking=MISSING_RIGHTS_MARK)}\n{self.source}"
        )

    def checking(self) -> tuple[str, str]:
        """SHA-1 and source of the script with a complete check of rights before its first write.

        If rights are missing, the script writes nothing and fails with an error that begins with
        `MISSING_RIGHTS_MARK`, followed by the positions of the missing rights in `rights`, counted from 1.
        """
        rights = ", ".join(_right_in_lua(right) for right in self.rights)
        check = _CHECK.format(
            may=_with_libraries("lib/may.lua", set()), rights=rights, lacking=MISSING_RIGHTS_MARK
        )
        return _with_sha(f"{check}\n{self.source}")


def _with_sha(source: str) -> tuple[str, str]:
    return sha1(source.encode(), usedforsecurity=False).hexdigest(), source


# In a `do` block, because Lua limits the number of local variables of a function.
_CHECK = """do
{may}
local lacking_ = {{}}
for i, right in ipairs({{{rights}}}) do
  if not may(right[1], right[2] and KEYS[1] .. right[2] or '') then lacking_[#lacking_ + 1] = i end
end
if #lacking_ > 0 then return redis.error_reply('{lacking} ' .. table.concat(lacking_, ' ')) end
end"""


_GUARD = """if redis.acl_check_cmd then
local may_, lacking_ = redis.acl_check_cmd, {{}}
{probes}
if #lacking_ > 0 then return redis.error_reply('{lacking} ' .. table.concat(lacking_, ' ')) end
end"""


def _probe_arguments(right: Right) -> str:
    """The arguments of `redis.acl_check_cmd`: the words of the command, and its key or channel."""
    words = [f"'{word}'" for word in right.command.split("|")]
    if right.kind:
        words += [f"KEYS[1] .. '{sample_of(right.kind, '')}'"] * (2 if right.command == "RENAME" else 1)
    return ", ".join(words)


def _right_in_lua(right: Right) -> str:
    key = f", '{sample_of(right.kind, '')}'" if right.kind else ""
    return f"{{'{right.command}'{key}}}"


def _arguments(parameters: dict[str, Any], body: str) -> str:
    """Lua code that reads ARGV into locals, in the order of the signature. A list is its length and items."""
    lines = ["local argv_ = ARGV"]
    lines += [f"local {name} = tonumber(argv_[{at}])" for at, name in enumerate(_COMMON, 1) if name in body]
    after_list, offset = "", len(_COMMON) + 1
    for name, kind in parameters.items():
        at = f"{after_list}{offset}".removesuffix(" + 0")
        if kind in (int, bool):
            lines.append(f"local {name} = tonumber(argv_[{at}])")
        elif kind is str:
            lines.append(f"local {name} = argv_[{at}]")
        elif after_list:
            lines.append(f"local {name}; {name}, at_ = list_({at})")
        else:
            lines += [_READ_LIST, f"local {name}, at_ = list_({at})"]
        if kind in (int, bool, str):
            offset += 1
        else:
            after_list, offset = "at_ + ", 0
    return "\n".join(lines)


# list_(at): the list at this position, and the position after it.
_READ_LIST = """local function list_(at)
  local t, n = {}, tonumber(argv_[at])
  for i = 1, n do t[i] = argv_[at + i] end
  return t, at + n + 1
end"""


_INCLUDE = re.compile(r"^--#include (\w+)$", re.MULTILINE)


@cache
def rights_of_script(name: str) -> tuple[Right, ...]:
    """The rights that a Redis user needs to run this script, sorted."""
    _, body = _types_and_body(name)
    return tuple(sorted(rights_of(body) | PUT_ASIDE_RIGHTS))


@cache
def _types_and_body(name: str) -> tuple[str, str]:
    """The library that precedes every script (`lib/types.lua`), and the script with its other libraries."""
    done: set[str] = set()
    types = _with_libraries("lib/types.lua", done).replace("LEFT_IN_PLACE_PATTERNS", left_in_place_in_lua())
    body = without_unused(_with_libraries(f"{name}.lua", done))
    return types, run_fields_in_lua(with_fact_sets(with_state_sets(body)))


@cache  # many scripts include the same library
def _text_of(path: str) -> str:
    """A file, with the names of states and facts replaced by their texts."""
    return facts_as_text(states_as_text(_LUA.joinpath(*path.split("/")).read_text("utf-8")))


def _with_libraries(path: str, done: set[str]) -> str:
    text = _text_of(path)
    before = []
    for library in _INCLUDE.findall(text):
        if library not in done:
            done.add(library)
            before.append(_with_libraries(f"lib/{library}.lua", done))
    return "\n".join([*before, text])
