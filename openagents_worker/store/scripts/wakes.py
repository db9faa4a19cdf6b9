"""Wakes: the wake-ups that scripts return, for messages that the caller sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Wake", "Woken", "WokenRuns"]


@dataclass(frozen=True, slots=True)
class Wake:
    """A run to wake, with the fields of its Celery message. `sent_us` is the send time by the clock of Redis.

    `is_ended`: the run is over, and the message only serves to notify Celery.
    """

    run_id: str
    queue: str
    sent_us: int
    agent_id: str
    session_id: str
    attempt: int
    step: int
    canvas: str
    is_ended: bool = False

    @property
    def checkpoint_id(self) -> str:
        return f"{self.run_id}:step:{self.step}"


class Woken(NamedTuple):
    """The wake-ups that must be sent, and the number of entries that the script has examined.

    If `examined` is the limit of the call, there may be more.
    """

    wakes: tuple[Wake, ...]
    examined: int


class WokenRuns(NamedTuple):
    """The answer of `wake`, as `Woken`.

    `overdue` are interrupted runs that have not ended in time: the caller ends them by force
    (`worker.interruptions`).
    """

    wakes: tuple[Wake, ...]
    examined: int
    overdue: tuple[str, ...] = ()
