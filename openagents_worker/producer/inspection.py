"""Inspection. The only place that defines what a client reads besides the record of one run.

The functions are plans. Their docstrings are those of the methods of clients.
"""

from __future__ import annotations

from typing_extensions import Unpack

from openagents_worker.arguments import text_of_caller
from openagents_worker.models import RunRecord
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.store.client import Plan
from openagents_worker.store.dead_letters import PutAside, read_put_aside
from openagents_worker.store.fleet import (
    AgentInfo,
    QueueInfo,
    WorkerInfo,
    read_announced_agents,
    read_fleet,
    read_workers,
)
from openagents_worker.store.listing import (
    Page,
    Problem,
    RunFilter,
    RunFilters,
    SessionSummary,
    list_problems,
    list_runs,
    list_sessions,
)
from openagents_worker.store.sessions import SessionView, session_plan

__all__ = [
    "agents",
    "problems",
    "put_aside",
    "queues",
    "runs",
    "session",
    "sessions",
    "workers",
]


def runs(
    publishing: PublishingApp, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[RunFilters]
) -> Plan[Page[RunRecord]]:
    """A page of the runs that match all filters (see `RunFilters`), newest first.

    Raises `RequestInvalid` for a state, limit or cursor that is not valid.
    """
    return list_runs(publishing.keys, RunFilter.of(filters), limit=limit, cursor=cursor)


def sessions(
    publishing: PublishingApp, *, limit: int = 100, cursor: str | None = None
) -> Plan[Page[SessionSummary]]:
    """A page of the sessions. The session with the newest run is the first. Raises as `runs` does."""
    return list_sessions(publishing.keys, limit=limit, cursor=cursor)


def session(publishing: PublishingApp, session_id: str) -> Plan[SessionView]:
    """The current state of the session. Raises `SessionNotFound`."""
    return session_plan(publishing.keys, text_of_caller("session_id", session_id))


def workers(publishing: PublishingApp) -> Plan[list[WorkerInfo]]:
    """The worker processes: their queues and agents, their number of runs, and their health."""
    return list((yield from read_workers(publishing.keys)))


def queues(publishing: PublishingApp) -> Plan[list[QueueInfo]]:
    """The queues of runs: waiting runs, waiting times and consumers. It scans all keys of Redis."""
    return list((yield from read_fleet(publishing.keys, publishing.settings.queue)).queues)


def agents(publishing: PublishingApp) -> Plan[list[AgentInfo]]:
    """The agents that workers have announced, and the workers that serve each of them now."""
    return list((yield from read_announced_agents(publishing.keys, publishing.settings.queue)))


def problems(publishing: PublishingApp) -> Plan[list[Problem]]:
    """Keys with a wrong type, and the unreadable records among the 1,000 runs that were accepted last."""
    return list((yield from list_problems(publishing.keys)))


def put_aside(publishing: PublishingApp) -> Plan[list[PutAside]]:
    """The invalid messages that were put aside (dead letters): newest first, at most 100.

    They are kept as long as runs.
    """
    return list((yield from read_put_aside(publishing.keys)))
