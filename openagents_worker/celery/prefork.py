"""Reaping. The only place where the parent of a prefork pool ends the leases of children that have died."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from openagents_worker.errors import OpenAgentsError
from openagents_worker.producer.client import cell_of
from openagents_worker.settings import Settings
from openagents_worker.store.client import Store
from openagents_worker.store.scripts import end_lease
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.local_processes import Sign, sign_of, this_process

__all__ = ["end_leases_of_reaped", "end_leases_of_the_dead"]

log = get_logger(__name__)

PATIENCE_S = 0.5  # the parent's loop stands still meanwhile; the other children look for themselves


def end_leases_of_reaped(pool: Any, settings: Settings) -> None:
    """From now on each child that this billiard pool reaps loses its lease in the same moment."""
    reap = pool._join_exited_workers

    def reap_and_end_leases(*args: Any, **kwargs: Any) -> list[int]:
        exit_codes: list[int] = reap(*args, **kwargs)
        if exit_codes:
            end_leases_of_the_dead(settings)
        return exit_codes

    pool._join_exited_workers = reap_and_end_leases


def end_leases_of_the_dead(settings: Settings) -> list[str]:
    """End the lease of each process of this host that has died; returns their incarnations.

    The connection is closed before the pool forks again.
    """
    own = this_process() if settings.watch_processes else None
    if own is None:
        return []
    ended = []
    store = Store(
        cell_of(settings), max_connections=1, answer_timeout_s=PATIENCE_S, connect_timeout_s=PATIENCE_S
    )
    with closing(store):
        try:
            known: dict[str, str] = store.ask(lambda r: r.hgetall(store.keys("host", own.host)))
            for incarnation, process in known.items():
                if sign_of(process) is Sign.DEAD:
                    call = end_lease(incarnation=incarnation, host=own.host, process=process)
                    if store.run(call) == "OK":
                        log.warning("worker.process_dead", incarnation=incarnation, process=process)
                        ended.append(incarnation)
        except OpenAgentsError as error:
            log.warning("worker.leases_not_ended", error=error.message)
    return ended
