"""Scripts that find the messages that must be sent again, and those that are not needed any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from openagents_worker.store.scripts.calls import script_function
from openagents_worker.store.scripts.wakes import Wake, Woken, WokenRuns

__all__ = ["confirm_completion", "first_due", "replaced", "resend", "resend_unread", "wake"]


@script_function
def wake(*, limit: int) -> WokenRuns:
    """Wake runs that are due."""


class FirstDue(NamedTuple):
    """The answer of `first_due`: ms since 1970 as text, None if there is none.

    `run_ms`: when the first run is due, the first wait of a parked run is over, or since when children of a
    run that has ended must end. `limit_ms`: when the queue of a limit of the fleet is checked next.
    """

    run_ms: str | None = None
    limit_ms: str | None = None


@script_function
def first_due() -> FirstDue:
    """Find out when `wake` and `limit_serve` have something to do."""


@script_function
def resend(*, queue: str, oldest_us: int, grace_ms: int, limit: int) -> tuple[Wake, ...]:
    """Resend lost wake-ups: those older than the oldest message of the queue and older than the grace."""


@script_function
def resend_unread(*, queue: str, grace_ms: int, max_grace_ms: int, limit: int) -> Woken:
    """As `resend`, for a queue whose messages cannot be inspected.

    The grace of a run doubles with each resend.
    """


@script_function
def replaced(*, messages: Sequence[str]) -> frozenset[int]:
    """The positions (from 0) of the messages that are not needed any more.

    A message is four items: queue, run id, send time in µs, and `ended` if it only notifies Celery, else ''.
    """


@script_function
def confirm_completion(*, runs: list[str]) -> tuple[bool, ...]:
    """Store that Celery was notified of the end of these lives: run id, life, run id, life ….

    False for a run that is in another life.
    """
