"""Recorded waits: the only place that makes the calls `sleep`, `receive` and `now` of a run."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from openagents_worker.errors import RequestInvalid, SignalTimeout
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import WaitKind
from openagents_worker.runtime.journal import digest_of
from openagents_worker.runtime.recorder import Outcome, Recorder
from openagents_worker.store.signals import check_signal_name, signal_fact

__all__ = ["MAX_WAIT", "now", "receive", "sleep"]

MAX_WAIT = timedelta(days=3_660)
"""The longest time that a call may wait. A longer one is a mistake, such as milliseconds for seconds."""


async def sleep(recorder: Recorder, delay: float | timedelta) -> None:
    """Wait for a time, recorded. Raises `RequestInvalid` for an invalid one."""
    delay_ms = _milliseconds("the delay of sleep", delay)

    async def make(info: CallInfo) -> Outcome:
        await recorder.waits.until(info, WaitKind.TIMER, timeout_ms=delay_ms)
        return Outcome()

    await recorder.call("sleep", "sleep", digest_of(str(delay_ms)), make)


async def receive(
    recorder: Recorder, name: str, timeout: float | timedelta | None, type_: Any, default: Any
) -> Any:
    """The next value that was sent to the run under this name, recorded. `default` ...: there is none.

    Raises `SignalTimeout`, and `RequestInvalid` for a value that does not have the type.
    """
    check_signal_name(name)
    timeout_ms = None if timeout is None else _milliseconds("the timeout of receive", timeout)

    async def make(info: CallInfo) -> Outcome:
        fact = await recorder.waits.until(
            info, WaitKind.SIGNAL, name=name, fact=signal_fact(name), timeout_ms=timeout_ms
        )
        if fact is not None:
            received = ("signal.received", {"name": name, "call_id": info.call_id})
            value = {"value": fact.value(run_id=recorder.run_id)}
            return Outcome(value=value, events=[received], is_accepted=True)
        if default is not ...:
            return Outcome(value={"timed_out": True})
        return Outcome(error=_timed_out(name, timeout_ms or 0), may_retry=False)

    outcome = await recorder.call("receive", name, digest_of(str(timeout_ms)), make)
    if "value" not in outcome:
        return default
    return outcome["value"] if type_ is None else _validated(name, outcome["value"], type_)


async def now(recorder: Recorder) -> datetime:
    """The time of Redis (UTC), recorded."""

    async def make(_: CallInfo) -> Outcome:
        return Outcome(value=recorder.waits.clock.now_ms())

    return datetime.fromtimestamp(await recorder.call("now", "now", "", make) / 1000, UTC)


def _milliseconds(what: str, time: float | timedelta) -> int:
    """A time in seconds, or a `timedelta`, as milliseconds. Raises `RequestInvalid` for an invalid one."""
    seconds = time.total_seconds() if isinstance(time, timedelta) else time
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise RequestInvalid(f"{what} must be a number of seconds or a timedelta, not {type(time).__name__}")
    if not 0 <= seconds <= MAX_WAIT.total_seconds():  # also False for NaN
        raise RequestInvalid(
            f"{what} must be from 0 to {MAX_WAIT.total_seconds():,.0f} seconds",
            hint="the unit is seconds, not milliseconds",
        )
    return round(seconds * 1000)


def _timed_out(name: str, timeout_ms: int) -> SignalTimeout:
    error = SignalTimeout(
        f"no value was sent to the run as {name!r} within {timeout_ms / 1000:,.3g} s",
        hint=f"send one: openagents-worker send RUN {name} JSON; or give receive a default",
    )
    error.signal = name
    return error


_adapter = cache(TypeAdapter)


def _validated(name: str, value: Any, type_: Any) -> Any:
    try:
        return _adapter(type_).validate_json(dumps(value))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'value'}: {each['msg']}"
            for each in error.errors(include_url=False, include_input=False, include_context=False)[:3]
        )
        raise RequestInvalid(f"the value that was sent as {name!r} is not valid: {problems}") from error
