"""The registration of a worker: the only place that says what a worker process announces in Redis."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from openagents_worker.runtime.assembly import Assembly
from openagents_worker.store.fleet import WorkerCard, own_version
from openagents_worker.worker.heartbeat import WorkerRegistration
from openagents_worker.worker.local_processes import ProcessIdentity

__all__ = ["WorkerIdentity", "registration_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    """The name of a worker, the queues that it consumes, and its limit of concurrent runs for listings.

    `max_runs` is None if the limit is unknown.
    """

    node: str
    queues: Sequence[str]
    max_runs: int | None = None


def registration_of(
    identity: WorkerIdentity, assembly: Assembly, own: ProcessIdentity | None
) -> WorkerRegistration:
    """What this process announces in Redis. `own` is None if no worker watches the process."""
    return WorkerRegistration(
        node=identity.node,
        announcements=assembly.announcements(),
        process=own,
        card=WorkerCard(
            host=socket.gethostname(),
            pid=os.getpid(),
            version=own_version(),
            queues=tuple(identity.queues),
            agents=dict(assembly.hashes),
            max_runs=identity.max_runs,
        ),
    )
