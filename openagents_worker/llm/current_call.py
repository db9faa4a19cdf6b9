"""The recorded call that is running: the only place through which a client learns what it is called for."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openagents_worker.quick_init import quick_init

if TYPE_CHECKING:
    from openagents_worker.llm.limits import FleetLimits

__all__ = ["CallInfo", "current_call", "ids_of_call", "quiet_http_clients"]


@quick_init
@dataclass(frozen=True, slots=True)
class CallInfo:
    """The recorded call that is running. The runtime sets it around every call of a model or a tool."""

    run_id: str
    call_id: str
    idempotency_key: str
    ordinal: int
    """The number of model calls that precede this one: in its own branch, and before the branch began. It is
    the same on every attempt. Concurrent branches count separately."""
    failed_tries: int = 0
    """How often this call has already failed with a retryable error, on any worker."""
    requests: int = 0
    """How many requests earlier attempts of the run sent for this call."""
    may_suspend: bool = False
    """Whether the run is suspended if the call fails with a retryable error."""
    kind: str = ""
    """`model`, `tool` and so on. `kind` and `name` describe the call to a person."""
    name: str = ""
    number: int = 0
    """1 for the first call of its kind in this attempt, 2 for the second, and so on."""
    emit: Callable[[str, Mapping[str, Any]], None] | None = field(default=None, repr=False, compare=False)
    """Emits an event of the run: the event's name and its payload."""
    noted: Mapping[str, Any] | None = None
    """What an earlier attempt noted about this call before it was interrupted; see `note`."""
    note: Callable[[Mapping[str, Any]], Awaitable[None]] | None = field(
        default=None, repr=False, compare=False
    )
    """Stores a note about this call (plain JSON) before its outcome is recorded. A later attempt that has to
    make the call again gets the note. None: nothing can be stored, because the run is not durable."""
    is_given_up: Callable[[], bool] | None = field(default=None, repr=False, compare=False)
    """Whether a cancelled call will not be made again: its run or its pattern gave it up."""
    tenant: str | None = None
    """The tenant of the run."""
    limits: FleetLimits | None = field(default=None, repr=False, compare=False)
    """The limits of the fleet for the requests of this call."""
    effect: Any = field(default=None, repr=False, compare=False)
    """What the runtime knows about a call that must not be repeated; None for any other call."""


current_call: ContextVar[CallInfo | None] = ContextVar("openagents_current_call", default=None)


def ids_of_call() -> dict[str, Any]:
    """The ids of the current call as fields of a log line; {} outside of a call."""
    call = current_call.get()
    return {} if call is None else {"run_id": call.run_id, "call_id": call.call_id}


class _DropModelCallLogs(logging.Filter):
    """Drops an HTTP client's log line per request during a model call. The run's events hold the same."""

    def filter(self, record: logging.LogRecord) -> bool:
        call = current_call.get()
        in_model_call = call is not None and call.kind == "model"
        has_own_level = logging.getLogger(record.name).level != logging.NOTSET
        return not in_model_call or has_own_level or record.levelno > logging.INFO


_DROP_MODEL_CALL_LOGS = _DropModelCallLogs()


def quiet_http_clients() -> None:
    """Stop httpx from logging the requests of model calls, unless its logger has a level of its own. Other
    requests are logged as before."""
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).addFilter(_DROP_MODEL_CALL_LOGS)
