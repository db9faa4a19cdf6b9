"""The only place that records which run blocks a process that is about to be ended."""

from __future__ import annotations

from contextlib import closing

from openagents_worker.store.client import Cell, Store
from openagents_worker.store.scripts import accuse
from openagents_worker.telemetry.logs import get_logger

__all__ = ["accuse_run"]

log = get_logger(__name__)


def accuse_run(cell: Cell, *, within_s: float, run_id: str, incarnation: str) -> None:
    """Record the run as the cause, over a new connection. Raises `RedisUnreachable` after `within_s`
    seconds."""
    timeout_s = within_s / 2  # once for the connect and once for the answer
    with closing(
        Store(cell, max_connections=1, answer_timeout_s=timeout_s, connect_timeout_s=timeout_s)
    ) as store:
        accused = store.run(accuse(run_id=run_id, incarnation=incarnation))
    log.error("run.accused", run_id=run_id, incarnation=incarnation, accused=accused)
