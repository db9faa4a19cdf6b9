"""Rights: the only place that finds out which commands a script runs on which keys, and writes ACL rules.

If Redis refuses a command of a script, it does not undo the earlier writes of the script. Therefore a process
checks all rights that a script needs before it runs the script for the first time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from openagents_worker.store.keys import KEYS, Keys
from openagents_worker.store.lua_parts import reachable_parts

__all__ = [
    "CHANNELS",
    "PUT_ASIDE_RIGHTS",
    "Access",
    "Right",
    "access_by_kind",
    "smallest_cover",
    "pattern_of",
    "patterns",
    "rights_of",
    "sample_of",
    "acl_words",
]

CHANNELS = ("channel", "notices", "alive")
"""The pub/sub channels of a cell, by the names of their functions in `Keys` and in Lua."""
_TYPE_OF = {spec.name: spec.type for spec in KEYS} | dict.fromkeys(CHANNELS, "channel")
_TEMPLATE_OF = {spec.name: spec.template for spec in KEYS} | {
    "channel": "events:{}",
    "notices": "notices:{}",
    "alive": "alive:{}",
}
_TYPE_OF_COMMAND = {
    "EXPIRE": "any", "PEXPIRE": "any", "PERSIST": "any", "PTTL": "any", "TTL": "any", "TYPE": "any",
    "EXISTS": "any", "DEL": "any", "UNLINK": "any", "MEMORY|USAGE": "any", "RENAME": "any",
    "COPY": "any",
    "GET": "string", "SET": "string", "GETDEL": "string", "STRLEN": "string", "INCR": "string",
    "GETRANGE": "string",
    "LINDEX": "list", "LLEN": "list", "LPOP": "list", "LPUSH": "list", "LRANGE": "list", "LREM": "list",
    "LTRIM": "list", "RPOP": "list", "RPUSH": "list",
    "SADD": "set", "SCARD": "set", "SISMEMBER": "set", "SMEMBERS": "set", "SPOP": "set",
    "SRANDMEMBER": "set", "SREM": "set",
    "PUBLISH": "channel", "PUBSUB|NUMSUB": "channel", "SUBSCRIBE": "channel",
    "TIME": "", "PING": "",
}  # fmt: skip
_TYPE_OF_LETTER = {"H": "hash", "Z": "zset", "X": "stream"}
_READS = {
    "EXISTS", "GET", "GETRANGE", "HEXISTS", "HGET", "HGETALL", "HKEYS", "HLEN", "HMGET", "HSTRLEN", "HVALS",
    "LINDEX", "LLEN", "LRANGE", "MEMORY|USAGE", "PTTL", "SCARD", "SISMEMBER", "SMEMBERS",
    "SRANDMEMBER", "STRLEN", "TTL", "TYPE", "XLEN", "XRANGE", "XREVRANGE", "ZCARD", "ZCOUNT",
    "ZMSCORE", "ZRANGE", "ZRANGEBYSCORE", "ZRANK", "ZREVRANGE", "ZREVRANGEBYSCORE", "ZSCORE",
}  # fmt: skip
_CALL = re.compile(r"redis\.(p?)call\(\s*'(\w+)'\s*(?:,\s*('\w+'|k\.\w+)?)?")
_KEY = re.compile(r"\bk\.(\w+)")
_MAY_BE_REFUSED = frozenset({"PUBSUB"})  # scripts call it with `pcall` and continue if it is refused
_SAMPLE_ID = "0"


class Access(StrEnum):
    """What a user may do with a key. Redis distinguishes reading and writing since version 7."""

    READ = "%R~"
    WRITE = "~"


@dataclass(frozen=True, slots=True, order=True)
class Right:
    """The right to run a command on a kind of key or channel.

    `command` has the form of an ACL rule (`HSET`, `CLIENT|SETNAME`). `kind` is a name in `KEYS` or
    `CHANNELS`, or '' for a command without a key.
    """

    command: str
    kind: str = ""

    @property
    def access(self) -> Access:
        return Access.READ if self.command in _READS else Access.WRITE


PUT_ASIDE_RIGHTS = frozenset(
    {Right(command, "aside") for command in ("TYPE", "LINDEX", "LPUSH", "LTRIM", "PEXPIRE", "RENAME")}
    | {Right(command, "aside_key") for command in ("PEXPIRE", "RENAME")}
)
"""The rights with which every script puts a key of a wrong type aside (`lua/lib/types.lua`)."""


def rights_of(lua: str) -> frozenset[Right]:
    """The rights that a script needs, found in its source.

    If the key function stands in the call (`redis.call('HGET', k.run(id), …)`), the right is exact. If the
    key is in a variable, every key that is assigned to a variable and whose type fits the command counts.
    """
    parts = reachable_parts(lua)
    exact, loose_commands, required = set(), set(), set()
    direct_kinds: list[str] = []
    for optional, command, argument in (call for part in parts for call in _CALL.findall(part.code)):
        if argument.startswith("k."):
            direct_kinds.append(argument[2:])
        if optional and command in _MAY_BE_REFUSED:
            continue
        if not _key_type_of(command):
            required.add(Right(command))
        elif argument.startswith("k."):
            exact.add(Right(command, argument[2:]))
        else:
            loose_commands.add(command)
    mentioned = [kind for part in parts for kind in _KEY.findall(part.code) if kind in _TYPE_OF]
    for kind in direct_kinds:
        mentioned.remove(kind)
    loose = {
        Right(command, kind)
        for command in loose_commands
        for kind in dict.fromkeys(mentioned)
        if _type_matches(command, kind)
    }
    return frozenset(required | exact | loose)


def smallest_cover(rights: Iterable[Right]) -> frozenset[Right]:
    """A small subset with every command, and with every kind of key with the access that it needs.

    An ACL grants commands and keys independently of each other (except with selectors). So a user who has
    this subset has all of the rights.
    """
    found: set[Right] = set()
    rights = sorted(rights)
    needed = access_by_kind(rights)
    commands, kinds = {right.command for right in rights}, {right.kind for right in rights if right.kind}

    def is_full(right: Right) -> bool:
        return right.kind in CHANNELS or right.access is needed.get(right.kind)

    for wanted in (2, 1):  # first the rights that add both a command and a kind
        for right in rights:
            new_kind = right.kind in kinds and is_full(right)
            if (right.command in commands) + new_kind >= wanted:
                found.add(right)
                commands.discard(right.command)
                if new_kind:
                    kinds.discard(right.kind)
    return frozenset(found)


def _key_type_of(command: str) -> str:
    """The type of key on which the command works. Raises `LookupError` if the table does not have it."""
    return _TYPE_OF_COMMAND[command] if command in _TYPE_OF_COMMAND else _TYPE_OF_LETTER[command[0]]


def _type_matches(command: str, kind: str) -> bool:
    wanted, found = _key_type_of(command), _TYPE_OF[kind]
    return wanted == found or (wanted == "any" and found != "channel")


# --- ACL rules --------------------------------------------------------------------------------------------


def pattern_of(kind: str, prefix: str) -> str:
    """The pattern of the keys or channels of a kind: `oa:run:*`."""
    return f"{prefix}:{_TEMPLATE_OF[kind].format('*')}"


def sample_of(kind: str, prefix: str) -> str:
    """A key or channel of this kind for a check of rights. No run, session or worker uses it."""
    keys = Keys(prefix)
    match kind:
        case "channel":
            return keys.channel(_SAMPLE_ID, _SAMPLE_ID, _SAMPLE_ID)
        case "notices":
            return keys.notices(_SAMPLE_ID)
        case "alive":
            return keys.alive(_SAMPLE_ID)
    return keys(kind, _SAMPLE_ID) if "{}" in _TEMPLATE_OF[kind] else keys(kind)


def acl_words(right: Right, prefix: str) -> str:
    """The ACL rule for a right: `+hset ~oa:run:*`."""
    command = f"+{right.command.lower()}"
    if not right.kind:
        return command
    sign = "&" if right.kind in CHANNELS else right.access
    return f"{command} {sign}{pattern_of(right.kind, prefix)}"


def access_by_kind(rights: Iterable[Right]) -> dict[str, Access]:
    """Kind of key -> the access that these rights need."""
    found: dict[str, Access] = {}
    for right in rights:
        if right.kind and right.kind not in CHANNELS and found.get(right.kind) is not Access.WRITE:
            found[right.kind] = right.access
    return found


def patterns(rights: Iterable[Right], prefix: str) -> list[str]:
    """The key and channel patterns of an ACL, without patterns that another one covers."""
    rights = list(rights)
    signs: set[tuple[str, str]] = {
        (access, pattern_of(kind, prefix)) for kind, access in access_by_kind(rights).items()
    }
    signs |= {("&", pattern_of(right.kind, prefix)) for right in rights if right.kind in CHANNELS}
    return sorted(sign + glob for sign, glob in signs if not _is_covered(sign, glob, signs))


def _is_covered(sign: str, glob: str, among: Iterable[tuple[str, str]]) -> bool:
    return any(
        other != (sign, glob) and other[0] in (sign, Access.WRITE if sign == Access.READ else sign)
        and fnmatchcase(glob, other[1])
        for other in among
    )  # fmt: skip
