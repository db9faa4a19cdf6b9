"""Scripts for the limits of the fleet: how often, and how many at once, all workers together call a model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from openagents_worker.store.scripts.calls import script_function
from openagents_worker.store.scripts.wakes import Wake, Woken

__all__ = ["Admission", "AdmissionAnswer", "limit_serve", "limit_settle", "limit_take"]


class AdmissionAnswer(StrEnum):
    """OK: the request is reserved. BUSY: ask again soon. LATER: not soon. FENCED: the run has another owner.

    Nothing is reserved unless the answer is OK.
    """

    OK = "OK"
    BUSY = "BUSY"
    LATER = "LATER"
    FENCED = "FENCED"


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer of `limit_take`. A reserved request may be sent after `delay_ms`; else it is an estimate."""

    answer: AdmissionAnswer
    delay_ms: int = 0
    wakes: tuple[Wake, ...] = ()


@script_function
def limit_take(
    *,
    name: str,
    run_id: str,
    fence: str,
    call: str,
    tokens: int,
    wait_ms: int,
    may_park: bool,
    requests_per_minute: int = 0,
    tokens_per_minute: int = 0,
    max_concurrency: int = 0,
) -> Admission:
    """Reserve a request with so many tokens, if it may be sent within `wait_ms`. 0: no such limit.

    `call` names the request within its attempt: repeating this with the same name reserves it once. The
    reservation ends with `limit_settle`, or when the attempt does not own the run any more. `may_park`:
    whether the run can be parked; then it does not get ahead of runs that wait.
    """


@script_function
def limit_settle(
    *,
    name: str,
    run_id: str,
    fence: str,
    call: str,
    tokens: int,
    used: int = -1,
    was_sent: bool = True,
    blocked_ms: int = 0,
) -> tuple[Wake, ...]:
    """End a reserved request. `tokens` were reserved, `used` is what it used (-1: as reserved).

    A request that was not sent is given back if its time is still to come. `blocked_ms`: nobody may send a
    request for so long. Repeating this changes nothing more.
    """


@script_function
def limit_serve(*, most: int) -> Woken:
    """Call the next runs of the limits that were not served for a second: at most `most` limits."""
