"""The fleet: the only place that reads which workers exist, what they serve, and which runs wait for them.

A worker stores information about itself when it registers (`WorkerCard`), and the lag of its event loop with
each heartbeat. A worker of an earlier version stores nothing: it is listed, but what it serves is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from openagents_worker.jsontext import dumps, loads
from openagents_worker.store.client import Plan
from openagents_worker.store.keys import Keys, decode_id
from openagents_worker.store.limits import LimitInfo, read_limits
from openagents_worker.store.part_health import PartHealth, parse_parts
from openagents_worker.store.redis_errors import default_if_wrong_type
from openagents_worker.store.row_reads import ReadBy, RowRead, read_each

__all__ = [
    "AgentInfo",
    "Fleet",
    "QueueInfo",
    "WorkerCard",
    "WorkerInfo",
    "message_age_ms",
    "own_version",
    "read_announced_agents",
    "read_fleet",
    "read_workers",
]

LATEST_MS = 253_402_300_799_000  # the end of the year 9999, the largest `datetime`
MAX_CHECKED_MESSAGES = 1000  # the oldest messages of a queue for which we check whether their runs are over
LEAST_CHECKED_MESSAGES = 10  # of one long queue among many, for a page
SCAN_COUNT = 1000  # keys that Redis examines for one answer of SCAN: less than a millisecond


@cache
def own_version() -> str:
    """The installed version of this library."""
    try:
        return version("openagents-worker")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


@dataclass(frozen=True, slots=True)
class WorkerCard:
    """The information that a worker process stores when it registers.

    `agents` maps agent ids to hashes of their definitions. `max_runs` None: no limit.
    """

    host: str
    pid: int
    queues: tuple[str, ...]
    agents: Mapping[str, str]
    max_runs: int | None
    version: str

    def to_json(self) -> str:
        return dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker process that is alive, or that is dead and whose runs were not reclaimed yet.

    `version` is None for a worker of an earlier version, which does not announce what it serves. Then
    `queues`, `agents`, `max_runs` and `started_at` are unknown. `loop_lag_ms` is the longest time between the
    last two heartbeats in which the event loop was blocked. `lease_left_ms` is negative after the end of the
    lease. `parts` are its background parts that have a problem, or had one in the last ten minutes.
    """

    incarnation: str
    host: str
    pid: int | None
    version: str | None
    queues: tuple[str, ...]
    agents: tuple[str, ...]
    runs: int
    max_runs: int | None
    loop_lag_ms: int | None
    lease_left_ms: int
    started_at: datetime | None
    definitions: Mapping[str, str]
    parts: tuple[PartHealth, ...] = ()

    @property
    def is_alive(self) -> bool:
        return self.lease_left_ms > 0

    @property
    def says_what_it_serves(self) -> bool:
        """Whether the worker has announced its queues and agents."""
        return self.version is not None

    def serves(self, queue: str, agent_id: str | None = None) -> bool:
        """Whether it is alive and has announced that it consumes the queue (and has the agent, if given)."""
        return self.is_alive and queue in self.queues and (agent_id is None or agent_id in self.agents)


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """A queue of runs.

    `waiting` is the number of runs that wait for a worker. `oldest_age_ms` is the longest wait, counted from
    the last message of a run. `workers` are the incarnations that consume the queue. `sent_again` is the
    number of messages of this queue that were lost and sent again.
    """

    name: str
    waiting: int
    oldest_age_ms: int | None
    workers: tuple[str, ...]
    sent_again: int


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """An agent that a worker has announced at some time. `workers` are the incarnations that serve it now."""

    id: str
    queue: str
    workers: tuple[str, ...]
    definition_hash: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers, queues, agents, and the limits for which runs wait, at one moment."""

    workers: tuple[WorkerInfo, ...]
    queues: tuple[QueueInfo, ...]
    agents: tuple[AgentInfo, ...]
    limits: tuple[LimitInfo, ...] = ()


def read_workers(keys: Keys, read_by: ReadBy = ReadBy.COMMANDS) -> Plan[tuple[WorkerInfo, ...]]:
    """A plan that returns the workers, ordered by their start, the newest one last."""

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=True)
        pipeline.time()
        pipeline.zrange(keys("workers"), 0, -1, withscores=True)
        pipeline.hgetall(keys("fleet"))
        pipeline.hgetall(keys("fleet_lag"))
        return pipeline.execute(raise_on_error=False)

    answers = yield question
    (seconds, micros), leases = (
        default_if_wrong_type(answers[0], (0, 0)),
        default_if_wrong_type(answers[1], []),
    )
    cards, lags = default_if_wrong_type(answers[2], {}), default_if_wrong_type(answers[3], {})
    now_ms = seconds * 1000 + micros // 1000
    leases = [(incarnation, min(max(at, 0.0), LATEST_MS)) for incarnation, at in leases]
    of_each = RowRead(
        "worker",
        (
            lambda r, incarnation: r.scard(keys("worker_runs", incarnation)),
            lambda r, incarnation: r.get(keys("worker_parts", incarnation)),
        ),
    )
    rows = yield from read_each(of_each, [incarnation for incarnation, _ in leases], read_by)
    found = [
        _worker_info(
            incarnation, cards.get(incarnation), lags.get(incarnation), runs, round(deadline - now_ms), parts
        )
        for (incarnation, deadline), (runs, parts) in zip(leases, rows, strict=True)
    ]
    return tuple(sorted(found, key=lambda worker: (worker.started_at or _UNKNOWN_START, worker.incarnation)))


def read_announced_agents(keys: Keys, default_queue: str) -> Plan[tuple[AgentInfo, ...]]:
    """A plan that returns the agents of `read_fleet`, without its queues."""
    workers = yield from read_workers(keys)
    return (yield from _agents_of(keys, default_queue, workers))


def read_fleet(
    keys: Keys,
    default_queue: str,
    *,
    scans_queues: bool = True,
    queues: Iterable[str] = (),
    read_by: ReadBy = ReadBy.COMMANDS,
) -> Plan[Fleet]:
    """A plan that returns the whole fleet. `default_queue` is the queue of agents without a queue.

    Queues that no worker has announced are found by their waiting runs. For this, all keys of the Redis are
    scanned, unless `scans_queues` is false. `queues` are read in any case.
    """
    workers = yield from read_workers(keys, read_by)
    agents = yield from _agents_of(keys, default_queue, workers)
    names = {default_queue, *queues, *(a.queue for a in agents), *(q for w in workers for q in w.queues)}
    if scans_queues:
        names |= yield from _queues_with_runs(keys)
    found = yield from _read_queues(keys, sorted(names), workers, read_by)
    limits = yield from read_limits(keys, read_by)
    return Fleet(workers, found, agents, limits)


_UNKNOWN_START = datetime.fromtimestamp(0, UTC)


def _agents_of(keys: Keys, default_queue: str, workers: Sequence[WorkerInfo]) -> Plan[tuple[AgentInfo, ...]]:
    [answer] = yield _read_announcements(keys)
    announced: dict[str, str] = default_if_wrong_type(answer, {})
    return tuple(
        _agent_info(id_, _parse_announcement(text), default_queue, workers)
        for id_, text in sorted(announced.items())
    )


def _read_announcements(keys: Keys) -> Any:
    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.hgetall(keys("agents"))
        return pipeline.execute(raise_on_error=False)

    return question


def _parse_announcement(text: str | None) -> Mapping[str, Any]:
    """Parse the JSON that a worker has announced; {} if it is not valid, so that the others are shown."""
    try:
        announcement = loads(text) if text else {}
    except ValueError:
        return {}
    return announcement if isinstance(announcement, dict) else {}


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list | dict) else ()


def _number(value: Any, maximum: float = LATEST_MS) -> int | None:
    """A stored integer from 0 to `maximum`; None for anything else."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number <= maximum else None


def _worker_info(
    incarnation: str, card: str | None, lag: str | None, runs: int, left_ms: int, parts: Any
) -> WorkerInfo:
    """`parts` may be an error: the ACL file of the previous version does not allow to read them."""
    announcement = _parse_announcement(card)
    at = _number(announcement.get("started_at"))
    agents = announcement.get("agents")
    definitions = agents if isinstance(agents, dict) else {}
    return WorkerInfo(
        incarnation=incarnation,
        host=str(announcement.get("host") or incarnation.rpartition(":")[0].rpartition("@")[2]),
        pid=_number(announcement.get("pid")),
        version=str(announcement["version"]) if announcement.get("version") is not None else None,
        queues=_strings(announcement.get("queues")),
        agents=tuple(sorted(definitions)),
        runs=default_if_wrong_type(runs, 0),
        max_runs=_number(announcement.get("max_runs")),
        loop_lag_ms=_number(lag),
        lease_left_ms=left_ms,
        started_at=None if at is None else datetime.fromtimestamp(at / 1000, UTC),
        definitions={id_: str(hash_) for id_, hash_ in definitions.items()},
        parts=parse_parts(parts),
    )


def _agent_info(
    id_: str, announcement: Mapping[str, Any], default_queue: str, workers: Iterable[WorkerInfo]
) -> AgentInfo:
    queue = announcement.get("queue")
    queue = queue if isinstance(queue, str) and queue else default_queue
    serving = tuple(worker.incarnation for worker in workers if worker.serves(queue, id_))
    return AgentInfo(id_, queue, serving, str(announcement.get("def_hash") or ""))


def _queues_with_runs(keys: Keys) -> Plan[set[str]]:
    start = keys("sent", "")
    pattern = f"{start.translate(_ESCAPED_IN_PATTERN)}*"
    found: set[str] = set()
    cursor: int | None = None
    while cursor != 0:
        at = cursor or 0
        cursor, page = yield lambda r, at=at: r.scan(at, match=pattern, count=SCAN_COUNT)
        found |= {decode_id(key.removeprefix(start)) for key in page}
    return found


# The characters that have a meaning in a Redis pattern.
_ESCAPED_IN_PATTERN = str.maketrans({c: f"\\{c}" for c in "\\*?[]^"})


def _read_queues(
    keys: Keys, names: Sequence[str], workers: Sequence[WorkerInfo], read_by: ReadBy
) -> Plan[tuple[QueueInfo, ...]]:
    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.time()
        pipeline.hgetall(keys("sent_again"))
        return pipeline.execute(raise_on_error=False)

    (seconds, micros), sent_again = yield question
    sent_again = default_if_wrong_type(sent_again, {})
    now_us = seconds * 1_000_000 + micros
    of_each = RowRead("queue", (lambda r, name: r.zcard(keys("sent", name)),))
    counts = [default_if_wrong_type(count, 0) for (count,) in (yield from read_each(of_each, names, read_by))]
    oldest_messages = yield from _read_oldest_messages(keys, names, counts, read_by)
    ended = yield from _read_ended_runs(
        keys, [run_id for messages in oldest_messages for run_id, _ in messages], read_by
    )

    def age_ms(messages: Messages) -> int | None:
        since_us = (at_us for run_id, at_us in messages if run_id not in ended)
        return next((message_age_ms(at_us, now_us) for at_us in since_us), None)

    return tuple(
        QueueInfo(
            name,
            max(0, count - sum(run_id in ended for run_id, _ in messages)),
            age_ms(messages),
            tuple(worker.incarnation for worker in workers if worker.serves(name)),
            _number(sent_again.get(name)) or 0,
        )
        for name, count, messages in zip(names, counts, oldest_messages, strict=True)
    )


Messages = Sequence[tuple[str, float]]
"""Ids of runs, each with the time at which its message was sent, in microseconds since 1970."""


def _read_oldest_messages(
    keys: Keys, names: Sequence[str], counts: Sequence[int], read_by: ReadBy
) -> Plan[list[Messages]]:
    """A plan that returns the oldest messages of each queue, which has as many as `counts` says."""
    last = _checked_messages(counts, read_by) - 1
    oldest = RowRead(
        "messages",
        (lambda r, name: r.zrange(keys("sent", name), 0, last, withscores=True),),
        words=(str(last),),
    )
    rows = yield from read_each(oldest, names, read_by)
    return [_messages(default_if_wrong_type(messages, [])) for (messages,) in rows]


def _checked_messages(counts: Sequence[int], read_by: ReadBy) -> int:
    """How many of the oldest messages of a queue are checked, at most. `counts`: the messages of each queue.

    A page checks so many in all, and what short queues do not need is left for the others.

    >>> _checked_messages([300, 0], ReadBy.SCRIPT), _checked_messages([5_000, 100, 5_000], ReadBy.SCRIPT)
    (1000, 450)
    """
    left = MAX_CHECKED_MESSAGES
    if read_by is ReadBy.SCRIPT:
        for at, count in enumerate(sorted(counts)):
            share = left // (len(counts) - at)
            if count > share:
                return max(share, LEAST_CHECKED_MESSAGES)
            left -= count
    return MAX_CHECKED_MESSAGES


def _messages(answer: Sequence[Any]) -> Messages:
    """A script answers with ids and times in turn, as text."""
    if not answer or isinstance(answer[0], tuple | list):
        return answer
    return [(run_id, float(at_us)) for run_id, at_us in zip(answer[::2], answer[1::2], strict=True)]


def message_age_ms(at_us: float, now_us: int) -> int:
    """How long ago a message was sent, in milliseconds. Another program may have stored any number."""
    return max(0, round((now_us - min(max(at_us, 0.0), LATEST_MS * 1000.0)) / 1000))


def _read_ended_runs(keys: Keys, run_ids: Sequence[str], read_by: ReadBy) -> Plan[set[str]]:
    """A plan that returns the runs that have ended: their message is only for the notification of Celery."""
    of_each = RowRead("run", (lambda r, id_: r.hmget(keys("run", id_), ["untold"]),), words=("untold",))
    rows = yield from read_each(of_each, run_ids, read_by)
    return {
        run_id
        for run_id, (fields,) in zip(run_ids, rows, strict=True)
        if default_if_wrong_type(fields, (None,))[0] == "1"
    }
