"""Scripts for the leases of worker processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openagents_worker.store.scripts.calls import script_function
from openagents_worker.store.scripts.wakes import Wake

__all__ = [
    "FalseAlarm",
    "LookResult",
    "Reclaimed",
    "Registration",
    "Renewal",
    "accuse",
    "alarm",
    "confirm_notices",
    "end_lease",
    "look",
    "notify",
    "reclaim",
    "register",
    "renew",
    "retire",
]


@dataclass(frozen=True, slots=True)
class Registration:
    """The answer of `register`.

    `neighbours` are the other live workers of this host: incarnation -> process id and start time. `data_id`
    stays the same as long as Redis keeps its data.
    """

    neighbours: dict[str, str]
    data_id: str


@script_function
def register(
    *,
    incarnation: str,
    lease_ms: int,
    agents: list[str],
    previous: str = "",
    host: str = "",
    process: str = "",
    info: str = "",
) -> Registration:
    """Start the lease of a worker.

    `agents` is id, JSON, id, JSON …. `host` and `process` identify the process for the other workers of this
    host; `host` '' if they cannot check it. `info` is the JSON of `fleet.WorkerCard`. `previous` is an
    earlier incarnation of this process that has lost its lease: the process is alive, so no run has killed
    it.
    """


@dataclass(frozen=True, slots=True)
class Renewal:
    """The answer to a heartbeat. `lost`: the lease is over and cannot be renewed.

    `owned` are the runs of this worker. `notices` are the texts in its box (`store.notice`). `others` is the
    number of leases of other workers.
    """

    lost: bool = False
    owned: frozenset[str] = frozenset()
    notices: frozenset[str] = frozenset()
    others: int = 0


@script_function
def renew(
    *,
    incarnation: str,
    lease_ms: int,
    server: str = "",
    renewed_within_ms: int = 0,
    loop_lag_ms: int = 0,
    parts: str = "",
) -> Renewal:
    """A heartbeat: extend the lease to `lease_ms` from now.

    `server` is the `run_id` of the Redis server of the heartbeat connection. If the process is alive, it will
    call this again within `renewed_within_ms`. `loop_lag_ms` is the lag of its event loop. `parts` is a JSON
    list of its background parts that have a problem (`store.part_health`), '' if there are none.
    """


@script_function
def notify(*, incarnation: str, notice: str) -> Literal["OK", "GONE"]:
    """Send a notice (`store.notice`) to a worker. GONE: this incarnation has no lease."""


@script_function
def confirm_notices(*, incarnation: str, notices: list[str]) -> int:
    """Take handled notices out of the box of a worker. Returns how many were in it."""


@script_function
def retire(*, incarnation: str, host: str = "") -> Literal["GONE", "OVER"]:
    """End the lease of a worker that stops. GONE: it owned no runs. OVER: `reclaim` must take its runs."""


@script_function
def end_lease(*, incarnation: str, host: str, process: str) -> Literal["OK", "OVER"]:
    """End the lease of a dead process of this host. OVER: there is no lease of this process."""


@script_function
def accuse(*, run_id: str, incarnation: str) -> bool:
    """Name the run that blocks the event loop of a process that is about to end.

    False: this worker does not own the run.
    """


@dataclass(frozen=True, slots=True)
class LookResult:
    """The answer of `look`. `given_up` are the workers whose leases it has ended.

    `next_ms` is the time until the next check, if it is earlier than usual. `neighbours` are as in
    `Registration`; None if no worker has started on this host. Pass `joined` to the next call.
    """

    given_up: tuple[str, ...] = ()
    next_ms: int | None = None
    joined: str = ""
    neighbours: dict[str, str] | None = None


@script_function
def look(*, server: str, silence_ms: int, host: str = "", joined: str = "") -> LookResult:
    """End the leases of workers without a connection for `silence_ms` that should have renewed since then.

    `server` is the `run_id` of this Redis server, '' if it cannot observe connections. `joined` is the value
    in the answer to the previous call.
    """


@dataclass(frozen=True, slots=True)
class FalseAlarm:
    """The lease of a live process was ended early. `runs` is the number of its runs.

    `seen_by` is the check that was wrong: `process` or `connection`. `off`: this check is now switched off
    for an hour.
    """

    runs: int
    seen_by: str
    off: bool


@script_function
def alarm(*, incarnation: str) -> FalseAlarm | None:
    """Report that this process is alive after its lease has ended. None: the lease was not ended early."""


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """The answer of `reclaim`. `incarnation` is the dead worker, '' if no lease is over.

    `left` is the number of its runs that are not reclaimed yet, `age_ms` the time since its lease was over.
    """

    wakes: tuple[Wake, ...]
    incarnation: str
    left: int
    age_ms: int = 0


@script_function
def reclaim(*, limit: int, max_recoveries: int, blameless: bool, heartbeat_ms: int = 0) -> Reclaimed:
    """Take up to `limit` runs of one worker whose lease is over, and make them available to other workers.

    `blameless`: Redis was unreachable, so no run is suspected of having killed the worker. The same applies
    if other leases were lost within `heartbeat_ms` (0: this is not checked).
    """
