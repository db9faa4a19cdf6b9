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
from openagents_worker.store.scripts import rights_of_script

__all__ = ["ROLES", "BrokerRight", "Role", "RoleName", "acl_line"]


class RoleName(StrEnum):
    WORKER = "worker"
    PRODUCER = "producer"
    WATCHER = "watcher"
    OPERATOR = "operator"
    FLOWER = "flower"


@dataclass(frozen=True, slots=True, order=True)
class BrokerRight:
    """What Celery does with keys or channels of the broker. `{queue}` in a pattern is each queue, `{db}` the
    number of the database, '' no key at all."""

    pattern: str
    commands: tuple[str, ...]

    def patterns(self, queues: Iterable[str], db: int) -> list[str]:
        """One for each queue."""
        names = queues if "{queue}" in self.pattern else ("",)
        return sorted({self.pattern.replace("{queue}", name).replace("{db}", str(db)) for name in names})

    @property
    def sign(self) -> str:
        return "&" if self.pattern.startswith("/") else "~"


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
    broker: tuple[BrokerRight, ...] = ()
    optional: frozenset[Right] = frozenset()
    """What it does without when it is refused, with a warning; it stands in the file all the same."""

    @property
    def needed(self) -> frozenset[Right]:
        """On our keys and channels, and commands that have none: without these it does not work."""
        scripts = map(rights_of_script, self.scripts)
        return self.reads.union(map(Right, self.plain), *scripts)

    @property
    def rights(self) -> frozenset[Right]:
        return self.needed | self.optional


def _on(kind: str, *commands: str) -> frozenset[Right]:
    return frozenset(Right(command, kind) for command in commands)


CONNECTING = frozenset({"HELLO", "CLIENT|SETNAME", "ROLE"})  # ROLE: where sentinels say who the master is
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
    _on("aside", "LRANGE"),
    *(_on(spec.name, "TYPE") for spec in KEYS if "{}" not in spec.template),  # `status` looks at their types
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
    scripts=("submit", "cancel", "resume", "delete_session", "page", "mend_key"),
    reads=_WATCHES | _on("index", "ZRANGE") | _on("run", "HEXISTS"),
    plain=CONNECTING | SCRIPTING | {"MULTI", "EXEC", "TIME", "UNSUBSCRIBE", "PING"},
    broker=(
        BrokerRight("{queue}*", ("LPUSH", "LLEN")),
        BrokerRight("_kombu.binding*", ("SADD", "SMEMBERS", "EXISTS")),
        BrokerRight("/{db}.celeryev/task.sent", ("PUBLISH",)),
    ),
)
OPERATOR = replace(
    PRODUCER,
    name=RoleName.OPERATOR,
    task="is a producer, looks at the whole fleet, and takes what has expired out of the lists",
    scripts=(*PRODUCER.scripts, "prune"),
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
    # Whoever consumes also puts back what others took and did not acknowledge.
    BrokerRight("unacked", ("HSET", "HGET", "HDEL", "WATCH")),
    BrokerRight("unacked_index", ("ZADD", "ZREM", "ZRANGE", "ZREVRANGEBYSCORE")),
    BrokerRight("unacked_mutex", ("SET", "GET", "DEL")),
    BrokerRight("{queue}*", ("LLEN", "LPUSH", "RPUSH")),
    BrokerRight("", ("MULTI", "EXEC", "UNWATCH", "UNSUBSCRIBE", "PUNSUBSCRIBE", "PING", "TIME")),
    BrokerRight("", ("EVALSHA", "SCRIPT|EXISTS", "SCRIPT|LOAD")),
)
_SCRIPTS_OF_A_WORKER = (
    "accuse", "alarm", "aside_news", "cancel", "claim", "commit", "emit", "end_lease", "finish", "look",
    "mend_key", "page", "prune", "put_aside", "reclaim", "register", "reject", "release", "renew",
    "replaced", "resend", "resend_unread", "retire", "suspend", "told", "wake",
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
        _on("notices", "SUBSCRIBE"),
    ),
    plain=CONNECTING | SCRIPTING | {"PING", "TIME"},
    optional=_on("alive", "SUBSCRIBE", "PUBSUB|NUMSUB")
    | {Right("INFO"), Right("CONFIG|GET"), Right("COMMAND|INFO")},
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
    "is Celery's dashboard: it reads Celery's events and asks the workers",
    plain=CONNECTING,
    broker=_REMOTE_CONTROL,
)

ROLES = {role.name: role for role in (WORKER, PRODUCER, WATCHER, OPERATOR, FLOWER)}


def acl_line(
    role: Role, *, password: str, prefix: str = "oa", queues: Sequence[str] = ("agents",), db: int = 0
) -> str:
    """The role's user as a line of an ACL file, or of redis.conf: `user openagents-worker on >… ~oa:* …`.

    `db` is the number of the broker's database: Celery's channels begin with it.
    """
    ours = patterns(role.rights, prefix)
    keys = [f"~{prefix}:*"] if _has_all(role) else [word for word in ours if word[0] != "&"]
    if role.scripts:
        keys.insert(0, f"~{prefix}")  # every script names the bare prefix as its key
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


def _has_all(role: Role) -> bool:
    """Whether there is no kind of key that the role does not have: then one pattern says it."""
    return {spec.name for spec in KEYS} <= {right.kind for right in role.rights}
