"""Prefork: the only place where the parent of a prefork pool ends the leases of dead children."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from openagents_worker.errors import OpenAgentsError
from openagents_worker.producer.client import cell_of
from openagents_worker.settings import Settings
from openagents_worker.store.client import Store
from openagents_worker.store.scripts import end_lease
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.local_processes import ProcessState, process_state, this_process

__all__ = ["end_leases_on_reap", "end_leases_of_dead_processes"]

log = get_logger(__name__)

TIMEOUT_S = 0.5  # short, because it blocks the parent's loop; the other children also detect the death


def end_leases_on_reap(pool: Any, settings: Settings) -> None:
    """Make this billiard pool end the lease of each child that it reaps."""
    reap = pool._join_exited_workers

    def reap_and_end_leases(*args: Any, **kwargs: Any) -> list[int]:
        exit_codes: list[int] = reap(*args, **kwargs)
        if exit_codes:
            end_leases_of_dead_processes(settings)
        return exit_codes

    pool._join_exited_workers = reap_and_end_leases


def end_leases_of_dead_processes(settings: Settings) -> list[str]:
    """End the lease of each dead process of this host; returns their incarnations.

    The connection to Redis is closed before the pool forks again.
    """
    own = this_process() if settings.watch_processes else None
    if own is None:
        return []
    ended = []
    store = Store(
        cell_of(settings), max_connections=1, answer_timeout_s=TIMEOUT_S, connect_timeout_s=TIMEOUT_S
    )
    with closing(store):
        try:
            known: dict[str, str] = store.ask(lambda r: r.hgetall(store.keys("host", own.host)))
            for incarnation, process in known.items():
                if process_state(process) is ProcessState.DEAD:
                    call = end_lease(incarnation=incarnation, host=own.host, process=process)
                    if store.run(call) == "OK":
                        log.warning("worker.process_dead", incarnation=incarnation, process=process)
                        ended.append(incarnation)
        except OpenAgentsError as error:
            log.warning("worker.leases_not_ended", error=error.message)
    return ended
