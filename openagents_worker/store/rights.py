"""Rights. The only place that knows which commands a script runs on which keys, and how an ACL says so.

Redis does not take back what a script has written when it refuses the script's next command. So a process
asks, before it runs a script for the first time, whether its user may do all that the script does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from openagents_worker.store.keys import KEYS, Keys

__all__ = [
    "CHANNELS",
    "MENDING",
    "Access",
    "Right",
    "access_of",
    "covering",
    "pattern_of",
    "patterns",
    "rights_of",
    "sample_of",
    "words_of",
]

CHANNELS = ("channel", "notices", "alive")
"""The pub/sub channels of a cell, by the names of their functions in `Keys` and in Lua."""
_TYPE_OF = {spec.name: spec.type for spec in KEYS} | dict.fromkeys(CHANNELS, "channel")
_TEMPLATE_OF = {spec.name: spec.template for spec in KEYS} | {
    "channel": "events:{}",
    "notices": "notices:{}",
    "alive": "alive:{}",
}
_OWN_TYPE = {
    "EXPIRE": "any", "PEXPIRE": "any", "PERSIST": "any", "PTTL": "any", "TTL": "any", "TYPE": "any",
    "EXISTS": "any", "DEL": "any", "UNLINK": "any", "MEMORY|USAGE": "any", "RENAME": "any",
    "GET": "string", "SET": "string", "GETDEL": "string", "STRLEN": "string", "INCR": "string",
    "LINDEX": "list", "LLEN": "list", "LPOP": "list", "LPUSH": "list", "LRANGE": "list", "LREM": "list",
    "LTRIM": "list", "RPOP": "list", "RPUSH": "list",
    "SADD": "set", "SCARD": "set", "SISMEMBER": "set", "SMEMBERS": "set", "SPOP": "set",
    "SRANDMEMBER": "set", "SREM": "set",
    "PUBLISH": "channel", "PUBSUB|NUMSUB": "channel", "SUBSCRIBE": "channel",
    "TIME": "", "PING": "",
}  # fmt: skip
_TYPE_OF_LETTER = {"H": "hash", "Z": "zset", "X": "stream"}
_READS = {
    "EXISTS", "GET", "HEXISTS", "HGET", "HGETALL", "HKEYS", "HLEN", "HMGET", "HSTRLEN", "HVALS",
    "LINDEX", "LLEN", "LRANGE", "MEMORY|USAGE", "PTTL", "SCARD", "SISMEMBER", "SMEMBERS",
    "SRANDMEMBER", "STRLEN", "TTL", "TYPE", "XLEN", "XRANGE", "XREVRANGE", "ZCARD", "ZCOUNT",
    "ZRANGE", "ZRANGEBYSCORE", "ZRANK", "ZREVRANGE", "ZREVRANGEBYSCORE", "ZSCORE",
}  # fmt: skip
_CALL = re.compile(r"redis\.(p?)call\(\s*'(\w+)'\s*(?:,\s*('\w+'|k\.\w+)?)?")
_FUNCTION = re.compile(r"local function (\w+)")
_KEY = re.compile(r"\bk\.(\w+)")
_MAY_BE_REFUSED = frozenset({"PUBSUB"})  # a script that tries them goes on without them
_SAMPLE_ID = "0"


class Access(StrEnum):
    """What a user may do with a key. Redis tells reading from writing from version 7 on."""

    READ = "%R~"
    WRITE = "~"


@dataclass(frozen=True, slots=True, order=True)
class Right:
    """A command as an ACL names it (`HSET`, `CLIENT|SETNAME`), and the kind of key or channel that it is for.

    `kind` is a name of `KEYS` or of `CHANNELS`, or '' for a command without a key.
    """

    command: str
    kind: str = ""

    @property
    def access(self) -> Access:
        return Access.READ if self.command in _READS else Access.WRITE


MENDING = frozenset(
    {Right(command, "aside") for command in ("TYPE", "LINDEX", "LPUSH", "LTRIM", "PEXPIRE", "RENAME")}
    | {Right(command, "aside_key") for command in ("PEXPIRE", "RENAME")}
)
"""What each script may do to a key that another program has overwritten (`lua/lib/types.lua`)."""


def rights_of(lua: str) -> frozenset[Right]:
    """All that a script needs, read from its text.

    A key that stands in a call is exact. A key that is kept in a variable may be that of any call which names
    a variable, if its type fits.
    """
    lua = _what_is_run(lua)
    exact, loose_commands, required = set(), set(), set()
    direct_kinds: list[str] = []
    for optional, command, argument in _CALL.findall(lua):
        if argument.startswith("k."):
            direct_kinds.append(argument[2:])
        if optional and command in _MAY_BE_REFUSED:
            continue
        if not _type_of(command):
            required.add(Right(command))
        elif argument.startswith("k."):
            exact.add(Right(command, argument[2:]))
        else:
            loose_commands.add(command)
    mentioned = [kind for kind in _KEY.findall(lua) if kind in _TYPE_OF]
    for kind in direct_kinds:
        mentioned.remove(kind)
    loose = {Right(command, kind) for command in loose_commands for kind in mentioned if _fits(command, kind)}
    return frozenset(required | exact | loose)


def covering(rights: Iterable[Right]) -> frozenset[Right]:
    """Some of these in which each command occurs, and each kind of key with the access that it needs.

    An ACL gives commands and keys apart from each other (but for selectors): who has these has all of them.
    """
    found: set[Right] = set()
    rights = sorted(rights)
    needed = access_of(rights)
    commands, kinds = {right.command for right in rights}, {right.kind for right in rights if right.kind}

    def is_full(right: Right) -> bool:
        return right.kind in CHANNELS or right.access is needed.get(right.kind)

    for wanted in (2, 1):  # first those that stand for a command and a kind
        for right in rights:
            new_kind = right.kind in kinds and is_full(right)
            if (right.command in commands) + new_kind >= wanted:
                found.add(right)
                commands.discard(right.command)
                if new_kind:
                    kinds.discard(right.kind)
    return frozenset(found)


def _what_is_run(lua: str) -> str:
    """A script without its comments, and without the functions of its libraries that nothing in it calls.

    A function begins with `local function` at the margin, and ends before what stands at the margin next.
    """
    parts: list[list[str]] = []
    for line in lua.splitlines():
        code = line.partition("--")[0].rstrip()
        if code and not code[0].isspace() and code != "end":
            parts.append([])
        if code:
            parts[-1].append(code)
    texts = ["\n".join(part) for part in parts]
    functions = {found[1]: text for text in texts if (found := _FUNCTION.match(text))}
    run = [text for text in texts if not _FUNCTION.match(text)]
    names = _names_in(run)
    while called := names & functions.keys():
        added = [functions.pop(name) for name in sorted(called)]
        names = _names_in(added)  # those in what was there before have been found
        run += added
    return "\n".join(run)


def _names_in(texts: Iterable[str]) -> set[str]:
    return {name for text in texts for name in re.findall(r"\w+", text)}


def _type_of(command: str) -> str:
    """The type of key that a command is for. Raises `LookupError` for one that this table does not know."""
    return _OWN_TYPE[command] if command in _OWN_TYPE else _TYPE_OF_LETTER[command[0]]


def _fits(command: str, kind: str) -> bool:
    wanted, found = _type_of(command), _TYPE_OF[kind]
    return wanted == found or (wanted == "any" and found != "channel")


# --- as an ACL says it ------------------------------------------------------------------------------------


def pattern_of(kind: str, prefix: str) -> str:
    """The keys or channels of one kind: `oa:run:*`."""
    return f"{prefix}:{_TEMPLATE_OF[kind].format('*')}"


def sample_of(kind: str, prefix: str) -> str:
    """A key or channel of that kind, which no run, session or worker has."""
    keys = Keys(prefix)
    match kind:
        case "channel":
            return keys.channel(_SAMPLE_ID, _SAMPLE_ID, _SAMPLE_ID)
        case "notices":
            return keys.notices(_SAMPLE_ID)
        case "alive":
            return keys.alive(_SAMPLE_ID)
    return keys(kind, _SAMPLE_ID) if "{}" in _TEMPLATE_OF[kind] else keys(kind)


def words_of(right: Right, prefix: str) -> str:
    """What an ACL has to say for it: `+hset ~oa:run:*`."""
    command = f"+{right.command.lower()}"
    if not right.kind:
        return command
    sign = "&" if right.kind in CHANNELS else right.access
    return f"{command} {sign}{pattern_of(right.kind, prefix)}"


def access_of(rights: Iterable[Right]) -> dict[str, Access]:
    """What is done with each kind of key."""
    found: dict[str, Access] = {}
    for right in rights:
        if right.kind and right.kind not in CHANNELS and found.get(right.kind) is not Access.WRITE:
            found[right.kind] = right.access
    return found


def patterns(rights: Iterable[Right], prefix: str) -> list[str]:
    """The key and channel patterns of an ACL, none of which another one covers."""
    rights = list(rights)
    signs: set[tuple[str, str]] = {
        (access, pattern_of(kind, prefix)) for kind, access in access_of(rights).items()
    }
    signs |= {("&", pattern_of(right.kind, prefix)) for right in rights if right.kind in CHANNELS}
    return sorted(sign + glob for sign, glob in signs if not _is_covered(sign, glob, signs))


def _is_covered(sign: str, glob: str, among: Iterable[tuple[str, str]]) -> bool:
    return any(
        other != (sign, glob) and other[0] in (sign, Access.WRITE if sign == Access.READ else sign)
        and fnmatchcase(glob, other[1])
        for other in among
    )  # fmt: skip
