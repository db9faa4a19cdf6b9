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
        return pipeline.execute()

    (seconds, micros), leases, cards, lags = yield question
    now_ms = seconds * 1000 + micros // 1000
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
    announced: dict[str, str] = yield lambda r: r.hgetall(keys("agents"))
    agents = tuple(
        _agent(id_, loads(said), default_queue, workers) for id_, said in sorted(announced.items())
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
        return pipeline.execute()

    return question


def _worker(incarnation: str, card: str | None, lag: str | None, runs: int, left_ms: int) -> WorkerInfo:
    said: Mapping[str, Any] = loads(card) if card else {}
    at = said.get("started_at")
    return WorkerInfo(
        incarnation=incarnation,
        host=str(said.get("host") or incarnation.rpartition(":")[0].rpartition("@")[2]),
        pid=said.get("pid"),
        version=said.get("version"),
        queues=tuple(said.get("queues", ())),
        agents=tuple(sorted(said.get("agents", ()))),
        runs=runs,
        max_runs=said.get("max_runs"),
        loop_lag_ms=None if lag is None else int(lag),
        lease_left_ms=left_ms,
        started_at=None if at is None else datetime.fromtimestamp(at / 1000, UTC),
        definitions=dict(said.get("agents", {})),
    )


def _agent(id_: str, said: Mapping[str, Any], default_queue: str, workers: Iterable[WorkerInfo]) -> AgentInfo:
    queue = said.get("queue") or default_queue
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
            pipeline.zrange(keys("sent", name), 0, 0, withscores=True)
        return pipeline.execute()

    (seconds, micros), sent_again, *answers = yield question
    now_us = seconds * 1_000_000 + micros

    def age_ms(oldest: Sequence[tuple[str, float]]) -> int | None:
        return max(0, round((now_us - oldest[0][1]) / 1000)) if oldest else None

    return tuple(
        QueueInfo(
            name,
            waiting,
            age_ms(oldest),
            tuple(worker.incarnation for worker in workers if worker.serves(name)),
            int(sent_again.get(name, 0)),
        )
        for name, waiting, oldest in zip(names, answers[::2], answers[1::2], strict=True)
    )
