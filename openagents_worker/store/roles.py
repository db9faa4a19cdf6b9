"""Roles: the only place that lists what each kind of process does with Redis, and writes its ACL rules.

`python docs/generate.py` generates the files in `config/acl/` from this table. A worker checks at its start
whether its user has all rights of its role.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from openagents_worker.store.keys import KEYS
from openagents_worker.store.rights import Right, patterns
from openagents_worker.store.scripts.source import rights_of_script

__all__ = ["ROLES", "BrokerRight", "Role", "RoleName", "acl_line"]


class RoleName(StrEnum):
    WORKER = "worker"
    PRODUCER = "producer"
    WATCHER = "watcher"
    OPERATOR = "operator"
    FLOWER = "flower"


@dataclass(frozen=True, slots=True, order=True)
class BrokerRight:
    """Commands of Celery on keys or channels of the broker.

    In a pattern, `{queue}` stands for every queue and `{db}` for the number of the database. '' means
    commands without a key.
    """

    pattern: str
    commands: tuple[str, ...]

    def patterns(self, queues: Iterable[str], db: int) -> list[str]:
        """The patterns for these queues."""
        names = queues if "{queue}" in self.pattern else ("",)
        return sorted({self.pattern.replace("{queue}", name).replace("{db}", str(db)) for name in names})

    @property
    def sign(self) -> str:
        return "&" if self.pattern.startswith("/") else "~"


@dataclass(frozen=True, slots=True)
class Role:
    """Everything that one kind of process does with Redis. `scripts` are names of Lua files."""

    name: RoleName
    task: str
    scripts: tuple[str, ...] = ()
    reads: frozenset[Right] = frozenset()
    """Commands outside scripts, on keys and channels of the library."""
    plain: frozenset[str] = frozenset()
    """Commands without a key."""
    broker: tuple[BrokerRight, ...] = ()
    optional: frozenset[Right] = frozenset()
    """Rights without which the process works with a warning. They are part of the ACL file, too."""

    @property
    def needed(self) -> frozenset[Right]:
        """The rights, except for the broker, without which the process does not work."""
        scripts = map(rights_of_script, self.scripts)
        return self.reads.union(map(Right, self.plain), *scripts)

    @property
    def rights(self) -> frozenset[Right]:
        return self.needed | self.optional


def _rights_on(kind: str, *commands: str) -> frozenset[Right]:
    return frozenset(Right(command, kind) for command in commands)


COMMANDS_TO_CONNECT = frozenset({"HELLO", "CLIENT|SETNAME", "ROLE"})  # ROLE is used with sentinels
COMMANDS_TO_RUN_SCRIPTS = frozenset({"EVAL", "EVALSHA", "SCRIPT|LOAD"})

_READS_FOR_METRICS = frozenset().union(
    _rights_on("index", "ZCARD"),
    _rights_on("workers", "ZRANGE"),
    _rights_on("worker_runs", "SCARD"),
    _rights_on("fleet", "HGETALL"),
    _rights_on("fleet_lag", "HGETALL"),
    _rights_on("worker_parts", "GET"),
    _rights_on("agents", "HGETALL"),
    _rights_on("sent", "ZCARD", "ZRANGE"),
    _rights_on("sent_again", "HGETALL"),
    _rights_on("due", "ZCARD"),
    _rights_on("timeouts", "ZCARD"),
    _rights_on("aside", "LLEN"),
    _rights_on("limits", "ZRANGE"),
    _rights_on("limit_queue", "ZCARD"),
    _rights_on("limit_calls", "ZCARD"),
    {Right("MULTI"), Right("EXEC"), Right("TIME")},
)
_READS_OF_A_WATCHER = frozenset().union(
    _rights_on("due", "ZCARD"),
    _rights_on("timeouts", "ZCARD"),
    _rights_on("aside", "LLEN"),
    _rights_on("run", "HMGET", "HGET"),
    _rights_on("events", "XRANGE"),
    _rights_on("facts", "HKEYS", "HMGET"),
    _rights_on("reply", "HGETALL"),
    _rights_on("channel", "SUBSCRIBE"),
    _rights_on("session", "HGETALL", "HGET", "EXISTS", "MEMORY|USAGE"),
    _rights_on("session_queue", "ZRANGE", "ZCARD", "ZRANK", "MEMORY|USAGE"),
    _rights_on("transcript", "LRANGE", "LLEN", "MEMORY|USAGE"),
    _rights_on("artifacts", "LRANGE", "LLEN", "MEMORY|USAGE"),
    _rights_on("session_state", "HGETALL", "MEMORY|USAGE"),
    _rights_on("index", "ZREVRANGEBYSCORE", "ZSCORE", "ZMSCORE", "ZCARD"),
    _rights_on("workers", "ZRANGE"),
    _rights_on("worker_runs", "SCARD"),
    _rights_on("fleet", "HGETALL"),
    _rights_on("fleet_lag", "HGETALL"),
    _rights_on("worker_parts", "GET"),
    _rights_on("agents", "HGETALL"),
    _rights_on("sent", "ZCARD", "ZRANGE"),
    _rights_on("sent_again", "HGETALL"),
    _rights_on("aside", "LRANGE"),
    _rights_on("limits", "ZRANGE"),
    _rights_on("limit_queue", "ZCARD"),
    _rights_on("limit_calls", "ZCARD"),
    # `status` checks the types of the keys without an id.
    *(_rights_on(spec.name, "TYPE") for spec in KEYS if "{}" not in spec.template),
)
WATCHER = Role(
    RoleName.WATCHER,
    "reads runs, sessions, events and the fleet, and writes nothing",
    reads=_READS_OF_A_WATCHER,
    plain=COMMANDS_TO_CONNECT | {"MULTI", "EXEC", "TIME", "SCAN", "UNSUBSCRIBE"},
)
PRODUCER = Role(
    RoleName.PRODUCER,
    "submits, watches, cancels, resumes and deletes runs, sends them values, and decides about calls",
    scripts=(
        "submit",
        "cancel",
        "resume",
        "decide",
        "fact",
        "delete_session",
        "page",
        "mend_key",
        "fork",
        "fork_session",
        "in_states",
    ),
    reads=_READS_OF_A_WATCHER | _rights_on("index", "ZRANGE") | _rights_on("run", "HEXISTS"),
    plain=COMMANDS_TO_CONNECT | COMMANDS_TO_RUN_SCRIPTS | {"MULTI", "EXEC", "TIME", "UNSUBSCRIBE", "PING"},
    broker=(
        BrokerRight("{queue}*", ("LPUSH", "LLEN")),
        BrokerRight("_kombu.binding*", ("SADD", "SMEMBERS", "EXISTS")),
        BrokerRight("/{db}.celeryev/task.sent", ("PUBLISH",)),
    ),
)
OPERATOR = replace(
    PRODUCER,
    name=RoleName.OPERATOR,
    task="does everything that a producer does, reads the whole fleet, and prunes the indexes",
    scripts=(*PRODUCER.scripts, "prune", "read_rows"),
    plain=PRODUCER.plain | {"SCAN"},
)
_QUEUE_OF_ONE = ("BRPOP", "LPUSH", "LLEN", "DEL")
_REMOTE_CONTROL = (
    BrokerRight(
        "_kombu.binding*", ("SADD", "SMEMBERS", "SREM", "EXISTS", "DEL", "ZADD", "ZRANGEBYSCORE", "ZREM")
    ),
    BrokerRight("celeryev*", _QUEUE_OF_ONE),
    BrokerRight("*.celery.pidbox*", _QUEUE_OF_ONE),
    BrokerRight("/{db}.celeryev/*", ("PUBLISH", "PSUBSCRIBE")),
    BrokerRight("/{db}.celery.pidbox", ("PUBLISH", "PSUBSCRIBE")),
    # Every consumer also restores messages that another consumer took and did not acknowledge.
    BrokerRight("unacked", ("HSET", "HGET", "HDEL", "WATCH")),
    BrokerRight("unacked_index", ("ZADD", "ZREM", "ZRANGE", "ZREVRANGEBYSCORE")),
    BrokerRight("unacked_mutex", ("SET", "GET", "DEL")),
    BrokerRight("{queue}*", ("LLEN", "LPUSH", "RPUSH")),
    BrokerRight("", ("MULTI", "EXEC", "UNWATCH", "UNSUBSCRIBE", "PUNSUBSCRIBE", "PING", "TIME")),
    BrokerRight("", ("EVALSHA", "SCRIPT|EXISTS", "SCRIPT|LOAD")),
)
_SCRIPTS_OF_A_WORKER = (
    "accuse", "alarm", "aside_news", "ask", "cancel", "claim", "commit", "confirm_completion",
    "confirm_notices", "decide", "delegate", "emit",
    "end_lease", "finish", "first_due", "intent",
    "limit_serve", "limit_settle", "limit_take", "look", "mend_key", "notify",
    "outbox_done", "outbox_take", "page", "prune", "put_aside", "reclaim", "register",
    "reject", "release", "renew", "replaced", "resend", "resend_unread", "retire",
    "suspend", "wake",
)  # fmt: skip
WORKER = Role(
    RoleName.WORKER,
    "executes runs",
    scripts=_SCRIPTS_OF_A_WORKER,
    reads=frozenset().union(
        _rights_on("run", "HGET", "HMGET"),
        _rights_on("agents", "HEXISTS"),
        _rights_on("workers", "ZRANGE"),
        _rights_on("host", "HGETALL"),
        _rights_on("facts", "HGETALL", "HKEYS", "HMGET"),
        _rights_on("session_state", "HGETALL"),
        _rights_on("transcript", "LRANGE", "LLEN"),
        _rights_on("artifacts", "LRANGE", "LLEN"),
        _rights_on("held", "LRANGE"),
        _rights_on("notices", "SUBSCRIBE"),
    ),
    plain=COMMANDS_TO_CONNECT | COMMANDS_TO_RUN_SCRIPTS | {"PING", "TIME"},
    optional=_rights_on("alive", "SUBSCRIBE", "PUBSUB|NUMSUB")
    | {Right("INFO"), Right("CONFIG|GET"), Right("COMMAND|INFO")}
    | _rights_on("definition", "GETRANGE", "SET", "PEXPIRE")
    | _rights_on("definition_of", "GETRANGE", "SET")
    | _READS_FOR_METRICS,
    broker=(
        *_REMOTE_CONTROL,
        BrokerRight("{queue}*", ("BRPOP", "RPOP", "LRANGE")),
        # A key of another type than kombu needs is moved out of the way.
        *(BrokerRight(key, ("TYPE", "RENAME")) for key in ("unacked", "unacked_index")),
        *(BrokerRight(f"{key}.put_aside*", ("RENAME", "PEXPIRE")) for key in ("unacked", "unacked_index")),
        *(BrokerRight(key, ("TYPE", "RENAME", "PEXPIRE")) for key in ("{queue}*", "_kombu.binding*")),
    ),
)
FLOWER = Role(
    RoleName.FLOWER,
    "is the dashboard of Celery: it reads the events of Celery and sends commands to workers",
    plain=COMMANDS_TO_CONNECT,
    optional=_READS_FOR_METRICS,
    broker=_REMOTE_CONTROL,
)

ROLES = {role.name: role for role in (WORKER, PRODUCER, WATCHER, OPERATOR, FLOWER)}


def acl_line(
    role: Role, *, password: str, prefix: str = "oa", queues: Sequence[str] = ("agents",), db: int = 0
) -> str:
    """The user of a role as a line of an ACL file or of redis.conf: `user openagents-worker on >… ~oa:* …`.

    `db` is the number of the database of the broker, which is part of the names of Celery's channels.
    """
    ours = patterns(role.rights, prefix)
    keys = [f"~{prefix}:*"] if _uses_all_keys(role) else [word for word in ours if word[0] != "&"]
    if role.scripts:
        keys.insert(0, f"~{prefix}")  # the key argument of every script is the prefix itself
    of_broker = sorted(
        {
            right.sign + pattern
            for right in role.broker
            if right.pattern
            for pattern in right.patterns(queues, db)
        }
    )
    channels = [word for word in ours if word[0] == "&"]
    commands = {right.command for right in role.rights}.union(*(right.commands for right in role.broker))
    words = [
        f"user openagents-{role.name} on >{password} resetkeys resetchannels -@all",
        *keys,
        *(word for word in of_broker if word[0] == "~"),
        *channels,
        *(word for word in of_broker if word[0] == "&"),
        *sorted(f"+{command.lower()}" for command in commands),
    ]
    return " ".join(words)


def _uses_all_keys(role: Role) -> bool:
    """Whether the role uses every kind of key, so that one pattern for the whole prefix is sufficient."""
    return {spec.name for spec in KEYS} <= {right.kind for right in role.rights}
