"""Scripts for the outbox: the recipients, besides Celery, that must be notified of the end of every run."""

from __future__ import annotations

from dataclasses import dataclass

from openagents_worker.store.scripts.calls import script_function

__all__ = ["RunEnd", "Taken", "outbox_done", "outbox_take"]


@dataclass(frozen=True, slots=True)
class RunEnd:
    """The end of one life of a run, and how often a recipient was to be notified of it, with this time."""

    run_id: str
    life: int
    tries: int = 1


@dataclass(frozen=True, slots=True)
class Taken:
    """The answer of `outbox_take`. `next_ms` is the time until the next end is due; None if there is none."""

    ends: tuple[RunEnd, ...] = ()
    next_ms: int | None = None


@script_function
def outbox_take(*, recipient: str, limit: int, retry_ms: int, max_retry_ms: int) -> Taken:
    """Take up to `limit` ends that this recipient must be notified of, and register the recipient.

    Each of them is due again after `retry_ms`, doubled with each try up to `max_retry_ms`, unless it is done
    before.
    """


@script_function
def outbox_done(*, recipient: str, ends: list[str]) -> int:
    """Remove ends from the outbox of a recipient: run id, life, run id, life …. Returns their number."""
