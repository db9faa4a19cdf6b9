"""Roles. The only place that says what each kind of process does with Redis, and writes its ACL.

The files in `config/acl/` are made from this table by `python docs/generate.py`. A worker asks at its start
whether its user has all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from openagents_worker.store.keys import KEYS
from openagents_worker.store.rights import Right, patterns
from openagents_worker.store.scripts import Script

__all__ = ["ROLES", "BrokerUse", "Role", "RoleName", "acl_line"]


class RoleName(StrEnum):
    WORKER = "worker"
    PRODUCER = "producer"
    WATCHER = "watcher"
    OPERATOR = "operator"
    FLOWER = "flower"


@dataclass(frozen=True, slots=True)
class BrokerUse:
    """What Celery does with the broker's keys. `{queue}` in a pattern stands for each queue."""

    commands: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    channels: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Role:
    """All that the processes of one kind do. `scripts` are names of Lua files."""

    name: RoleName
    task: str
    scripts: tuple[str, ...] = ()
    reads: frozenset[Right] = frozenset()
    """What is asked without a script, on our keys and channels."""
    plain: frozenset[str] = frozenset()
    """Commands without a key of ours."""
    broker: BrokerUse = BrokerUse()

    @property
    def rights(self) -> frozenset[Right]:
        """On our keys and channels, and commands that have none."""
        return self.reads.union(map(Right, self.plain), *(Script(name, {}).rights for name in self.scripts))


def _on(kind: str, *commands: str) -> frozenset[Right]:
    return frozenset(Right(command, kind) for command in commands)


CONNECTING = frozenset({"HELLO", "CLIENT|SETNAME"})
SCRIPTING = frozenset({"EVAL", "EVALSHA", "SCRIPT|LOAD"})

_WATCHES = frozenset().union(
    _on("run", "HMGET", "HGET"),
    _on("events", "XRANGE"),
    _on("reply", "HGETALL"),
    _on("channel", "SUBSCRIBE"),
    _on("session", "HGETALL", "HGET", "EXISTS", "MEMORY|USAGE"),
    _on("session_queue", "ZRANGE", "ZCARD", "ZRANK", "MEMORY|USAGE"),
    _on("transcript", "LRANGE", "LLEN", "MEMORY|USAGE"),
    _on("artifacts", "LRANGE", "LLEN", "MEMORY|USAGE"),
    _on("session_state", "HGETALL", "MEMORY|USAGE"),
    _on("index", "ZREVRANGEBYSCORE", "ZSCORE", "ZCARD"),
    _on("workers", "ZRANGE"),
    _on("worker_runs", "SCARD"),
    _on("fleet", "HGETALL"),
    _on("fleet_lag", "HGETALL"),
    _on("agents", "HGETALL"),
    _on("sent", "ZCARD", "ZRANGE"),
    _on("sent_again", "HGETALL"),
)
WATCHER = Role(
    RoleName.WATCHER,
    "reads runs, sessions, events and the fleet, and writes nothing",
    reads=_WATCHES,
    plain=CONNECTING | {"MULTI", "EXEC", "TIME", "SCAN", "UNSUBSCRIBE"},
)
PRODUCER = Role(
    RoleName.PRODUCER,
    "submits, watches, cancels, resumes and deletes",
    scripts=("submit", "cancel", "resume", "delete_session", "page"),
    reads=_WATCHES | _on("index", "ZRANGE") | _on("run", "HEXISTS"),
    plain=CONNECTING | SCRIPTING | {"MULTI", "EXEC", "TIME", "UNSUBSCRIBE", "INFO", "PING"},
    broker=BrokerUse(
        commands=frozenset({"LPUSH", "LLEN", "SADD", "SMEMBERS", "EXISTS"}),
        keys=frozenset({"{queue}*", "_kombu.binding*"}),
        channels=frozenset({"/0.celeryev/task.sent"}),
    ),
)
OPERATOR = replace(
    PRODUCER,
    name=RoleName.OPERATOR,
    task="is a producer, and looks for the queues that no worker has announced",
    plain=PRODUCER.plain | {"SCAN"},
)
_REMOTE_CONTROL = BrokerUse(
    commands=frozenset(
        {"BRPOP", "LPUSH", "RPOP", "LLEN", "SADD", "SMEMBERS", "SREM", "EXISTS", "DEL", "MULTI", "EXEC"}
        | {"PUBLISH", "SUBSCRIBE", "PSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE"}
    ),
    keys=frozenset({"_kombu.binding*", "celeryev*", "*.reply.celery.pidbox*"}),
    channels=frozenset({"/0.celeryev/*", "/0.celery.pidbox"}),
)
_SCRIPTS_OF_A_WORKER = (
    "accuse", "alarm", "cancel", "claim", "commit", "emit", "end_lease", "finish", "look", "page", "prune",
    "reclaim", "register", "reject", "release", "renew", "resend", "resend_unread", "retire", "suspend",
    "told", "wake",
)  # fmt: skip
WORKER = Role(
    RoleName.WORKER,
    "executes runs",
    scripts=_SCRIPTS_OF_A_WORKER,
    reads=frozenset().union(
        _on("run", "HGET", "HMGET"),
        _on("agents", "HEXISTS"),
        _on("workers", "ZRANGE"),
        _on("host", "HGETALL"),
        _on("session_state", "HGETALL"),
        _on("transcript", "LRANGE", "LLEN"),
        _on("artifacts", "LRANGE", "LLEN"),
        _on("alive", "SUBSCRIBE", "PUBSUB|NUMSUB"),
        _on("notices", "SUBSCRIBE"),
    ),
    plain=CONNECTING | SCRIPTING | {"PING", "TIME", "INFO", "CONFIG|GET", "COMMAND|INFO"},
    broker=BrokerUse(
        commands=_REMOTE_CONTROL.commands
        | {
            "HSET",
            "HGET",
            "HDEL",
            "ZADD",
            "ZREM",
            "ZREVRANGEBYSCORE",
            "SET",
            "RPUSH",
            "LRANGE",
            "PING",
            "SCRIPT|EXISTS",
        },
        keys=frozenset({"{queue}*", "unacked", "unacked_index", "unacked_mutex"})
        | {"_kombu.binding*", "celeryev*", "*.celery.pidbox*"},
        channels=_REMOTE_CONTROL.channels,
    ),
)
FLOWER = Role(
    RoleName.FLOWER,
    "is Celery's dashboard: it reads Celery's events and asks the workers",
    plain=CONNECTING | {"PING", "INFO"},
    broker=replace(_REMOTE_CONTROL, keys=_REMOTE_CONTROL.keys | {"{queue}*"}),
)

ROLES = {role.name: role for role in (WORKER, PRODUCER, WATCHER, OPERATOR, FLOWER)}


def acl_line(role: Role, *, prefix: str = "oa", queues: Sequence[str] = ("agents",), password: str) -> str:
    """The role's user as a line of an ACL file, or of redis.conf: `user openagents-worker on >… ~oa:* …`."""
    ours = [f"~{prefix}:*"] if _writes_all(role) else patterns(role.rights, prefix)
    channels = [pattern for pattern in ours if pattern.startswith("&")]
    keys = [pattern for pattern in ours if not pattern.startswith("&")]
    if _writes_all(role):
        channels = [pattern for pattern in patterns(role.rights, prefix) if pattern.startswith("&")]
    if role.scripts:
        keys.insert(0, f"~{prefix}")  # every script names the bare prefix as its key
    commands = {right.command for right in role.rights} | role.broker.commands
    words = [
        f"user openagents-{role.name} on >{password} resetkeys resetchannels -@all",
        *keys,
        *(f"~{key}" for key in sorted(_of_queues(role.broker.keys, queues))),
        *channels,
        *(f"&{channel}" for channel in sorted(role.broker.channels)),
        *sorted(f"+{command.lower()}" for command in commands),
    ]
    return " ".join(words)


def _writes_all(role: Role) -> bool:
    """Whether there is no kind of key that the role does not have: then one pattern says it."""
    return {spec.name for spec in KEYS} <= {right.kind for right in role.rights}


def _of_queues(keys: Iterable[str], queues: Sequence[str]) -> set[str]:
    return {key.replace("{queue}", queue) for key in keys for queue in queues}
