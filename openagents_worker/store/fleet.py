"""The fleet. The only place that reads which workers there are, what they serve, and what waits for them.

A worker says at its registration what it is (`WorkerCard`), and at each heartbeat how its event loop does. A
worker of the version before says nothing: it is listed, and what it serves is not known.
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
from openagents_worker.store.redis_errors import or_else

__all__ = [
    "AgentInfo",
    "Fleet",
    "QueueInfo",
    "WorkerCard",
    "WorkerInfo",
    "own_version",
    "read_fleet",
    "read_workers",
]

LATEST_MS = 253_402_300_799_000  # the end of the year 9999: what a datetime holds
LOOKED_AT = 1000  # messages of a queue, the oldest, of which it is asked whether their runs are over
SCAN_COUNT = 1000  # keys that Redis looks at for one answer: under a millisecond


@cache
def own_version() -> str:
    """The installed version of this library."""
    try:
        return version("openagents-worker")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


@dataclass(frozen=True, slots=True)
class WorkerCard:
    """What a worker process says of itself when it registers. `agents` is id -> hash of the definition."""

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
    """A worker process that is alive, or whose runs nobody has taken over yet.

    `version` None: a worker of an earlier version, which does not say what it serves; then `queues`,
    `agents`, `max_runs` and `started_at` say nothing. `loop_lag_ms` is for how long at most, between its last
    two heartbeats, its event loop answered nobody. `lease_left_ms` is negative once its lease is over.
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

    @property
    def is_alive(self) -> bool:
        return self.lease_left_ms > 0

    @property
    def says_what_it_serves(self) -> bool:
        return self.version is not None

    def serves(self, queue: str, agent_id: str | None = None) -> bool:
        """Whether it has said that it consumes the queue, and has the agent where one is given."""
        return self.is_alive and queue in self.queues and (agent_id is None or agent_id in self.agents)


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """A queue of runs. `waiting` runs wait for a worker; the one that waits longest does so for
    `oldest_age_ms`, counted from its last message. `workers` are the incarnations that consume it.
    `sent_again` is how many of its messages were lost so far, and sent again."""

    name: str
    waiting: int
    oldest_age_ms: int | None
    workers: tuple[str, ...]
    sent_again: int


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """An agent that a worker has announced once. `workers` are the incarnations that serve it now."""

    id: str
    queue: str
    workers: tuple[str, ...]
    definition_hash: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers, queues and agents at one moment."""

    workers: tuple[WorkerInfo, ...]
    queues: tuple[QueueInfo, ...]
    agents: tuple[AgentInfo, ...]


def read_workers(keys: Keys) -> Plan[tuple[WorkerInfo, ...]]:
    """The workers, the one that was started last at the end."""

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=True)
        pipeline.time()
        pipeline.zrange(keys("workers"), 0, -1, withscores=True)
        pipeline.hgetall(keys("fleet"))
        pipeline.hgetall(keys("fleet_lag"))
        return pipeline.execute(raise_on_error=False)

    answers = yield question
    (seconds, micros), leases = or_else(answers[0], (0, 0)), or_else(answers[1], [])
    cards, lags = or_else(answers[2], {}), or_else(answers[3], {})
    now_ms = seconds * 1000 + micros // 1000
    leases = [(incarnation, min(max(at, 0.0), LATEST_MS)) for incarnation, at in leases]
    owned = yield _counts(keys, [incarnation for incarnation, _ in leases])
    found = [
        _worker(incarnation, cards.get(incarnation), lags.get(incarnation), runs, round(deadline - now_ms))
        for (incarnation, deadline), runs in zip(leases, owned, strict=True)
    ]
    return tuple(sorted(found, key=lambda worker: (worker.started_at or _LONG_AGO, worker.incarnation)))


def read_fleet(keys: Keys, default_queue: str) -> Plan[Fleet]:
    """All that an operator asks first. `default_queue` is that of agents that name none.

    Queues that nobody has announced are found by their waiting runs, for which all keys are looked through.
    """
    workers = yield from read_workers(keys)
    [answer] = yield _announced(keys)
    announced: dict[str, str] = or_else(answer, {})
    agents = tuple(
        _agent(id_, _said(said), default_queue, workers) for id_, said in sorted(announced.items())
    )
    names = {default_queue, *(agent.queue for agent in agents), *(q for w in workers for q in w.queues)}
    names |= yield from _queues_with_runs(keys)
    queues = yield from _queues(keys, sorted(names), workers)
    return Fleet(workers, queues, agents)


_LONG_AGO = datetime.fromtimestamp(0, UTC)


def _counts(keys: Keys, incarnations: Sequence[str]) -> Any:
    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for incarnation in incarnations:
            pipeline.scard(keys("worker_runs", incarnation))
        return pipeline.execute(raise_on_error=False)

    return question


def _announced(keys: Keys) -> Any:
    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.hgetall(keys("agents"))
        return pipeline.execute(raise_on_error=False)

    return question


def _said(text: str | None) -> Mapping[str, Any]:
    """What a worker has announced; nothing where it cannot be read: that must not hide the others."""
    try:
        said = loads(text) if text else {}
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list | dict) else ()


def _number(value: Any, most: float = LATEST_MS) -> int | None:
    """A whole number that was stored, from 0; None for anything else."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number <= most else None


def _worker(incarnation: str, card: str | None, lag: str | None, runs: int, left_ms: int) -> WorkerInfo:
    said = _said(card)
    at = _number(said.get("started_at"))
    agents = said.get("agents")
    definitions = agents if isinstance(agents, dict) else {}
    return WorkerInfo(
        incarnation=incarnation,
        host=str(said.get("host") or incarnation.rpartition(":")[0].rpartition("@")[2]),
        pid=_number(said.get("pid")),
        version=str(said["version"]) if said.get("version") is not None else None,
        queues=_texts(said.get("queues")),
        agents=tuple(sorted(definitions)),
        runs=or_else(runs, 0),
        max_runs=_number(said.get("max_runs")),
        loop_lag_ms=_number(lag),
        lease_left_ms=left_ms,
        started_at=None if at is None else datetime.fromtimestamp(at / 1000, UTC),
        definitions={id_: str(hash_) for id_, hash_ in definitions.items()},
    )


def _agent(id_: str, said: Mapping[str, Any], default_queue: str, workers: Iterable[WorkerInfo]) -> AgentInfo:
    queue = said.get("queue")
    queue = queue if isinstance(queue, str) and queue else default_queue
    serving = tuple(worker.incarnation for worker in workers if worker.serves(queue, id_))
    return AgentInfo(id_, queue, serving, str(said.get("def_hash") or ""))


def _queues_with_runs(keys: Keys) -> Plan[set[str]]:
    start = keys("sent", "")
    pattern = f"{start.translate(_ESCAPED)}*"
    found: set[str] = set()
    cursor: int | None = None
    while cursor != 0:
        at = cursor or 0
        cursor, page = yield lambda r, at=at: r.scan(at, match=pattern, count=SCAN_COUNT)
        found |= {decode_id(key.removeprefix(start)) for key in page}
    return found


# What a pattern of Redis reads as more than itself.
_ESCAPED = str.maketrans({c: f"\\{c}" for c in "\\*?[]^"})


def _queues(keys: Keys, names: Sequence[str], workers: Sequence[WorkerInfo]) -> Plan[tuple[QueueInfo, ...]]:
    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.time()
        pipeline.hgetall(keys("sent_again"))
        for name in names:
            pipeline.zcard(keys("sent", name))
            pipeline.zrange(keys("sent", name), 0, LOOKED_AT - 1, withscores=True)
        return pipeline.execute(raise_on_error=False)

    (seconds, micros), sent_again, *answers = yield question
    sent_again = or_else(sent_again, {})
    now_us = seconds * 1_000_000 + micros
    sent = [or_else(first, []) for first in answers[1::2]]
    over = yield from _over(keys, [run_id for first in sent for run_id, _ in first])

    def age_ms(first: Sequence[tuple[str, float]]) -> int | None:
        for run_id, at_us in first:
            if run_id not in over:
                age: int = round((now_us - min(max(at_us, 0.0), LATEST_MS * 1000.0)) / 1000)
                return max(0, age)
        return None

    return tuple(
        QueueInfo(
            name,
            max(0, or_else(count, 0) - sum(run_id in over for run_id, _ in first)),
            age_ms(first),
            tuple(worker.incarnation for worker in workers if worker.serves(name)),
            _number(sent_again.get(name)) or 0,
        )
        for name, count, first in zip(names, answers[::2], sent, strict=True)
    )


def _over(keys: Keys, run_ids: Sequence[str]) -> Plan[set[str]]:
    """Those of the runs that have ended, and whose message waits because Celery is to be told of it."""

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for run_id in run_ids:
            pipeline.hget(keys("run", run_id), "untold")
        return pipeline.execute(raise_on_error=False)

    answers = (yield question) if run_ids else []
    return {run_id for run_id, untold in zip(run_ids, answers, strict=True) if or_else(untold, None) == "1"}
