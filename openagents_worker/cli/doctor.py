"""The doctor: the only place that looks for everything that keeps a deployment from executing runs safely.

Each check yields findings. A check that cannot be made is a finding, too, and keeps no other check from
being made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from openagents_worker.agents import AppConfig
from openagents_worker.cli.finding import Finding, FindingKind
from openagents_worker.cli.health import problems_of, read_known_fleet
from openagents_worker.dashboard.flower_options import is_this_machine, is_true
from openagents_worker.errors import (
    ConfigValidationError,
    OpenAgentsError,
    RedisRefused,
    RedisUnreachable,
    RedisUnsafe,
)
from openagents_worker.local.redis_server import keeps_nothing
from openagents_worker.producer.broker_check import ask_broker, is_app_of_user, with_broker_of
from openagents_worker.producer.client import Client
from openagents_worker.producer.time_text import age_text
from openagents_worker.producer.waiting_reason import why_not_served
from openagents_worker.redaction import safe_url
from openagents_worker.redis_url import is_redis_url
from openagents_worker.settings import Settings
from openagents_worker.store.client import Store
from openagents_worker.store.durability import PersistenceInfo
from openagents_worker.store.fleet import Fleet
from openagents_worker.store.part_health import DATA_LOST
from openagents_worker.store.server import OLDEST_VERSION, ServerInfo, read_server

__all__ = ["Finding", "FindingKind", "agent_findings", "examine", "without_variables_of_workers"]

CLOCK_SKEW_MS = 1000
FULL_SHARE = 0.8  # of maxmemory
UNSET = re.compile(r"the environment variable \S+ is not set$")
POSITION = re.compile(r"agents\[(\d+)\]")
HASH_TAG = re.compile(r"\{[^}]+\}")
BACKLOG_MS = 60_000  # a run that has waited so long for a slot
BROKER_TODO = "check that the broker is running, and that {} is correct"


def examine(
    client: Client, config: AppConfig | None, env: Mapping[str, str], *, checks_rights: bool
) -> Iterator[Finding]:
    """All findings about Flower, Redis, rights, the broker, workers and queues, in this order.

    `config` is the agents file of this machine, None if there is none. `checks_rights`: this machine runs
    workers with the Redis user of the settings, so check that the user has the rights of a worker. Raises
    `RedisUnreachable` after the findings that need no Redis, if it does not answer.
    """
    settings, store = client.settings, client.store
    of_user = is_app_of_user(client.app)
    if of_user:
        settings = with_broker_of(client.app, settings)
    broker_todo = BROKER_TODO.format("broker_url of the app" if of_user else "OPENAGENTS_BROKER_URL")
    yield from _flower_findings(env)
    yield from _made("redis", lambda: _redis_findings(read_server(store), settings))
    if checks_rights:
        yield from _rights_or_broker(settings, broker_todo)
    if not _is_checked_with_rights(settings, checks_rights):
        yield from _made("broker", lambda: _broker_findings(client, broker_todo))
    yield from _made("workers", lambda: _fleet_findings(client, config))


def agent_findings(
    read: Callable[[], tuple[str, AppConfig]],
    remarks: Callable[[AppConfig], Iterable[str]],
    read_ids: Callable[[], Sequence[str]],
) -> tuple[AppConfig | None, list[Finding]]:
    """The agents of this machine, and what is wrong with them. `read` raises `ConfigError` for problems.

    `read_ids` returns the ids of the agents, which the paths of problems count.
    """
    try:
        path, config = read()
    except ConfigValidationError as error:
        ids = read_ids() if error.problems else ()
        return None, [_problem_of(each, ids) for each in error.problems] or [_failed("agents", error)]
    except OpenAgentsError as error:
        return None, [_failed("agents", error)]
    names = ", ".join(agent.id for agent in config.agents)
    found = [Finding(FindingKind.OK, "agents", f"{path}: valid; agents: {names}")]
    return config, [*found, *(Finding(FindingKind.NOTE, "agents", remark) for remark in remarks(config))]


def without_variables_of_workers(found: Sequence[Finding], client: Client) -> list[Finding]:
    """The findings, where a variable that is not set here is a note if a live worker serves its agent.

    That worker has the variable: `dev` sets those of its scripted model, and an operator may have no keys.
    """
    served: set[str] = set()
    if any(map(_is_unset_variable, found)):
        with suppress(RedisRefused):  # a finding about the workers says so
            served = {agent.id for agent in client.agents() if agent.workers}
    return [
        replace(one, kind=FindingKind.NOTE, text=f"{one.text} here, but a worker serves the agent", todo=None)
        if _is_unset_variable(one) and one.agent_id in served
        else one
        for one in found
    ]


def _is_unset_variable(finding: Finding) -> bool:
    return finding.agent_id is not None and UNSET.search(finding.text) is not None


def _problem_of(each: Mapping[str, Any], ids: Sequence[str]) -> Finding:
    line, place, hint = each.get("line"), each.get("place"), each.get("hint")
    where = f"{place}, " if place else f"line {line}, " if line else ""
    text = f"{where}{each.get('path')}: {each.get('message')}"
    return Finding(
        FindingKind.PROBLEM, "agents", text, str(hint) if hint else None, agent_id=_agent_of(each, ids)
    )


def _agent_of(problem: Mapping[str, Any], ids: Sequence[str]) -> str | None:
    """The agent that a problem is about, by its place in Python or its position in the agents file."""
    if place := problem.get("place"):
        return next((id_ for id_ in ids if str(place).startswith(f"the agent {id_!r} at ")), None)
    found = POSITION.match(str(problem.get("path")))
    return ids[int(found[1])] if found and int(found[1]) < len(ids) else None


def _made(subject: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; if it fails, its error. Raises `RedisUnreachable`: nothing can be checked."""
    try:
        return list(check())
    except RedisRefused as error:
        return [_failed(subject, error)]
    except RedisUnreachable:
        raise
    except OpenAgentsError as error:
        return [_failed(subject, error)]


def _failed(subject: str, error: OpenAgentsError) -> Finding:
    return Finding(FindingKind.PROBLEM, subject, f"{error.code}: {error.message}", error.hint)


# --- Redis ----------------------------------------------------------------------------------------------


def _redis_findings(server: ServerInfo, settings: Settings) -> Iterator[Finding]:
    url = safe_url(settings.redis_url)
    yield Finding(
        FindingKind.OK, "redis", f"{url} answers in {server.answer_ms} ms: Redis {server.version_text}"
    )
    if server.version is not None and server.version < OLDEST_VERSION:
        yield _redis_problem(f"Redis {server.version_text} is too old", "use Redis 6.2 or later, or Valkey")
    if server.is_replica:
        yield _redis_problem(
            "this Redis is a replica: nothing can be written to it",
            "put the address of the primary, or of its sentinels, into OPENAGENTS_REDIS_URL",
        )
    if server.is_cluster:
        yield from _cluster_findings(settings)
    yield from _memory_findings(server)
    yield from _disk_findings(server, settings)
    if abs(server.clock_ms) > CLOCK_SKEW_MS:
        direction = "ahead of" if server.clock_ms > 0 else "behind"
        yield Finding(
            FindingKind.NOTE,
            "clock",
            f"the clock of Redis is {abs(server.clock_ms) / 1000:.1f} s {direction} that of this machine",
            "synchronise both with NTP; ETAs of producers and times in logs are wrong by as much",
        )


def _cluster_findings(settings: Settings) -> Iterator[Finding]:
    """A cell can be a slot of a cluster: with a hash tag in the prefix, and another Redis as the broker."""
    node = "this Redis is a node of a Redis Cluster"
    if not HASH_TAG.search(settings.key_prefix):
        yield _redis_problem(
            f"{node}: the keys of a run would lie on several nodes",
            "use a Redis without cluster mode; for a second server use Sentinel",
        )
    elif settings.broker_url == settings.redis_url:
        yield _redis_problem(
            f"{node}, which cannot be the broker of Celery",
            "put the URL of a Redis without cluster mode into OPENAGENTS_BROKER_URL",
        )


def _redis_problem(text: str, todo: str, fix: Callable[[Store], object] | None = None) -> Finding:
    return Finding(FindingKind.PROBLEM, "redis", text, todo, fix)


def _memory_findings(server: ServerInfo) -> Iterator[Finding]:
    persistence, used = server.persistence, server.used_memory_bytes
    if persistence.maxmemory_policy is None:
        yield Finding(
            FindingKind.NOTE,
            "redis",
            "this Redis user may not ask how memory and disk are configured (INFO, CONFIG GET)",
            "make sure that maxmemory-policy is noeviction and appendonly is yes",
        )
    elif persistence.may_evict:
        kind = FindingKind.PROBLEM if persistence.maxmemory_bytes else FindingKind.NOTE
        text = f"Redis deletes runs when its memory is full: maxmemory-policy {persistence.maxmemory_policy}"
        yield Finding(kind, "redis", text, "CONFIG SET maxmemory-policy noeviction", _keep_everything)
    limit = persistence.maxmemory_bytes
    if limit and used is not None and used > FULL_SHARE * limit:
        yield _redis_problem(
            _full_text(used, limit, persistence),
            "raise maxmemory, or delete sessions: openagents-worker delete-session SESSION; a lower "
            "OPENAGENTS_RUN_TTL_S changes nothing for runs that have ended",
        )


def _full_text(used: int, limit: int, persistence: PersistenceInfo) -> str:
    """How full the memory of Redis is, in bytes, and what that means for runs."""
    effect = "deletes runs" if persistence.may_evict else "accepts no runs"
    if used >= limit:  # Redis may use any multiple of `maxmemory`, for example after that was lowered
        return (
            f"the memory of Redis is full, so it {effect}: {used:,} bytes are in use, and maxmemory is "
            f"{limit:,} bytes"
        )
    share = int(100 * used / limit)
    return f"{share} % of the memory is in use ({used:,} of {limit:,} bytes): a full Redis {effect}"


def _disk_findings(server: ServerInfo, settings: Settings) -> Iterator[Finding]:
    persistence = server.persistence
    if settings.durability == "strict":
        try:
            persistence.check_disk()
        except RedisUnsafe as error:
            yield _failed("redis", error)
    elif persistence.appendonly is False and keeps_nothing(server.folder):
        yield Finding(
            FindingKind.NOTE,
            "redis",
            "this is the Redis of `openagents-worker dev`: it keeps its data in memory, until dev ends",
            "openagents-worker dev --data-dir DIR keeps the data; for production, start a Redis of your own",
        )
    elif persistence.appendonly is False:
        yield _redis_problem(
            f"a restart of Redis loses {_lost_text(server.saves)}",
            "CONFIG SET appendonly yes, and the same in redis.conf",
            _write_to_disk,
        )
    if server.last_write_failed:
        yield _redis_problem(
            "the last write to the disk failed: Redis refuses writes (MISCONF) or loses them at a restart",
            "look at the log of Redis, and at the space on its disk",
        )


def _lost_text(saves: bool | None) -> str:
    """What a Redis without an append-only file loses, and why. None: its user may not ask for snapshots."""
    if saves is None:
        return "every run since its last snapshot, or every run if it writes none: appendonly is off"
    if saves:
        return "every run since its last snapshot: appendonly is off"
    return "every run: appendonly is off, and it writes no snapshots"


def _keep_everything(store: Store) -> object:
    return store.use(lambda redis: redis.config_set("maxmemory-policy", "noeviction"))


def _write_to_disk(store: Store) -> object:
    return store.use(lambda redis: redis.config_set("appendonly", "yes"))


# --- rights, workers, Flower ----------------------------------------------------------------------------


def _rights_or_broker(settings: Settings, broker_todo: str) -> list[Finding]:
    """The rights of a worker at Redis and at the broker, or that the broker does not answer."""
    try:
        return _made("rights", lambda: _rights_findings(settings))
    except RedisUnreachable as error:
        if settings.broker_url == settings.redis_url:
            raise
        return [Finding(FindingKind.PROBLEM, "broker", f"{error.code}: {error.message}", broker_todo)]


def _is_checked_with_rights(settings: Settings, checks_rights: bool) -> bool:
    """Whether the checks of Redis and of the rights include the broker: it is a Redis, too."""
    is_redis = is_redis_url(settings.broker_url)
    return is_redis and (checks_rights or settings.broker_url == settings.redis_url)


def _broker_findings(client: Client, broker_todo: str) -> Iterator[Finding]:
    """Whether the broker answers. Until it does, runs are accepted, but no worker hears of them."""
    answer = ask_broker(client.app)
    if answer.problem is None:
        yield Finding(FindingKind.OK, "broker", f"{answer.where} answers")
    else:
        text = f"the broker of Celery does not answer at {answer.where}: {answer.problem}"
        yield Finding(FindingKind.PROBLEM, "broker", text, broker_todo)


def _rights_findings(settings: Settings) -> Iterator[Finding]:
    from openagents_worker.celery.access import check_access

    check_access(settings, [settings.queue])
    yield Finding(FindingKind.OK, "rights", "the Redis user has all rights of a worker")


def _fleet_findings(client: Client, config: AppConfig | None) -> Iterator[Finding]:
    fleet = read_known_fleet(client)
    for problem in problems_of(fleet, client.problems(), client.put_aside()):
        text, _, todo = problem.partition("; ")
        yield Finding(FindingKind.PROBLEM, "workers", text, todo or "openagents-worker status shows more")
    yield from _data_lost_findings(fleet)
    yield from _unserved_queues(fleet, config, client.settings.queue)
    for queue in fleet.queues:
        if queue.workers and queue.oldest_age_ms is not None and queue.oldest_age_ms > BACKLOG_MS:
            yield Finding(
                FindingKind.PROBLEM,
                "queues",
                f"queue {queue.name} has a backlog: "
                f"{'1 run waits' if queue.waiting == 1 else f'{queue.waiting} runs wait'}, the oldest for "
                f"{age_text(queue.oldest_age_ms)}",
                "start more workers, or raise OPENAGENTS_CONCURRENCY",
            )
    alive = [worker for worker in fleet.workers if worker.is_alive]
    if alive:
        runs = sum(worker.runs for worker in alive)
        workers = "1 worker is alive" if len(alive) == 1 else f"{len(alive)} workers are alive"
        yield Finding(
            FindingKind.OK, "workers", f"{workers}, with {runs} active {'run' if runs == 1 else 'runs'}"
        )


def _data_lost_findings(fleet: Fleet) -> Iterator[Finding]:
    """That Redis lost its data in the last ten minutes: a worker that was registered before reports it."""
    parts = [part for worker in fleet.workers for part in worker.parts if part.code == DATA_LOST]
    if parts:
        since = min(part.since for part in parts)
        yield Finding(
            FindingKind.NOTE,
            "redis",
            f"Redis has lost its data, at {since:%H:%M:%S} UTC or before: the runs of that time are gone",
            "submit these runs again; a Redis with appendonly yes keeps its data",
        )


def _unserved_queues(fleet: Fleet, config: AppConfig | None, default: str) -> Iterator[Finding]:
    """Queues that agents of the agents file use, and that no living worker consumes."""
    if config is None or not any(worker.is_alive for worker in fleet.workers):
        return
    agents_of: dict[str, list[str]] = {}
    for agent in config.agents:
        agents_of.setdefault(agent.queue or default, []).append(agent.id)
    for queue, agents in sorted(agents_of.items()):
        if problem := why_not_served(fleet.workers, queue):
            text, _, todo = problem.rpartition("; ")
            yield Finding(FindingKind.PROBLEM, "queues", f"{text}; agents: {', '.join(agents)}", todo)


def _flower_findings(env: Mapping[str, str]) -> Iterator[Finding]:
    """What the variables of this environment would make of Flower."""
    address = env.get("FLOWER_ADDRESS", "")
    has_password = bool(env.get("FLOWER_BASIC_AUTH") or env.get("FLOWER_AUTH"))
    if address and not is_this_machine(address) and not has_password:
        yield Finding(
            FindingKind.PROBLEM,
            "flower",
            f"Flower would listen on {address} without a password (FLOWER_ADDRESS)",
            "set FLOWER_BASIC_AUTH=user:password, or unset FLOWER_ADDRESS",
        )
    if is_true(env.get("FLOWER_UNAUTHENTICATED_API", "")) and not has_password:
        yield Finding(
            FindingKind.PROBLEM,
            "flower",
            "everybody who reaches Flower can revoke runs and stop workers (FLOWER_UNAUTHENTICATED_API)",
            "set FLOWER_BASIC_AUTH=user:password, or unset FLOWER_UNAUTHENTICATED_API",
        )
