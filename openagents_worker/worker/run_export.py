"""Run export: the only place that gives reports of ended runs to the exporter of the agents file.

It is a recipient of the outbox: a run that has ended is exported from what is stored of it, by any worker, at
least once. So an exporter that is slow or fails costs no run anything, and a kill loses no report. A report
that cannot be exported is dropped after `MAX_TRIES` tries.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from openagents_worker.diagnostics.base import CallReport, LLMCallMetrics, ReportExporter, RunReport
from openagents_worker.errors import RunNotFound
from openagents_worker.events import RunEvent
from openagents_worker.models import RunRecord, WaitKind
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.records import aread_record
from openagents_worker.store.scripts import RunEnd
from openagents_worker.store.stored_events import history
from openagents_worker.telemetry import signals
from openagents_worker.telemetry.logs import get_logger

__all__ = ["MAX_TRIES", "RunExport", "report_of"]

log = get_logger(__name__)

MAX_TRIES = 8
"""With the default limits of the outbox, a report is dropped after about two hours."""
MAX_WAITING = 64
"""Reports that wait for the exporter's thread. More of them stay in the outbox."""


_Waiting = tuple[RunReport, asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class RunExport:
    """A recipient of the ends of runs that gives each to an exporter, in a thread of the exporter's own."""

    def __init__(self, store: AsyncStore, exporter: ReportExporter, *, name: str) -> None:
        """`name` is that of the exporter. It must not change between versions."""
        self.name = f"diagnostics.{name}"
        self.dropped = 0
        self._store = store
        self._exporter = exporter
        self._queue: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._waiting = 0

    async def deliver(self, end: RunEnd) -> None:
        """Export a run. Raises an error for a new try."""
        if end.tries > MAX_TRIES:
            self.dropped += 1
            signals.count("openagents.diagnostics.dropped", 1, {"openagents.exporter": self.name})
            log.of_run(logging.WARNING, "diagnostics.dropped", run_id=end.run_id, exporter=self.name)
            return
        try:
            record = await aread_record(self._store, end.run_id)
            if record.life != end.life or record.result is None:
                return  # it was resumed, and is exported when it ends again
            events = await self._store.execute(history(self._store.keys, end.run_id))
        except RunNotFound:
            return
        await self._export(report_of(record, events))

    async def _export(self, report: RunReport) -> None:
        if self._waiting >= MAX_WAITING:
            raise RuntimeError(f"{self._waiting} reports wait for the exporter")
        if self._thread is None:
            # A daemon: an exporter that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._serve, name="openagents-diagnostics", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._waiting += 1
        self._queue.put((report, loop, done))
        await done

    def _serve(self) -> None:
        """Export one report after the other, for as long as the process lives."""
        while True:
            report, loop, done = self._queue.get()
            error: Exception | None = None
            if not done.cancelled():  # the outbox waits no longer: it will give the report again
                try:
                    self._exporter.export(report)
                except Exception as raised:  # noqa: BLE001 - an exporter may raise anything
                    error = raised
                except BaseException as raised:  # noqa: BLE001 - SystemExit would end the thread of all reports
                    error = RuntimeError(f"the exporter has raised {type(raised).__qualname__}")
            with suppress(RuntimeError):  # the loop is closed: the worker ends
                loop.call_soon_threadsafe(self._end, done, error)

    def _end(self, done: asyncio.Future[None], error: Exception | None) -> None:
        self._waiting -= 1
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)


# --- reports ---------------------------------------------------------------------------------------------


def report_of(record: RunRecord, events: Sequence[RunEvent]) -> RunReport:
    """The report of the last life of an ended run, from its record and its stored events."""
    assert record.result is not None, "the run has ended"
    own = [event for event in events if event.life == record.life]
    ended_at = _time(record.ended_ms) or (own[-1].timestamp if own else datetime.now(UTC))
    began_at = next((each.timestamp for each in own if each.name == "run.attempt_started"), ended_at)
    return RunReport(
        key=record.run_id if record.life == 1 else f"{record.run_id}:{record.life}",
        agent_id=record.agent_id,
        session_id=record.session_id,
        result=record.result,
        began_at=min(began_at, ended_at),
        ended_at=ended_at,
        calls=tuple(_calls(own, ended_at)),
        attempts=record.attempt,
        labels=dict(record.request.labels) if record.request is not None else {},
    )


@dataclass(slots=True)
class _StartedCall:
    """A call that has begun, and how often."""

    report: CallReport
    attempt: int = 1


# Name of an event -> the kind of its call, the field with the name of what is called, and that with its id.
_BEGINS = {"llm.called": ("model", "model", "call"), "tool.called": ("tool", "tool_id", "call_id")}
_ENDS = {
    "llm.succeeded": "call",
    "llm.failed": "call",
    "tool.succeeded": "call_id",
    "tool.failed": "call_id",
}


def _calls(events: Sequence[RunEvent], ended_at: datetime) -> list[CallReport]:
    """The calls of models and tools in the order in which they began. A repeated call counts once."""
    calls: dict[str, _StartedCall] = {}
    for event in events:
        if event.name in _BEGINS:
            kind, name, id_ = _BEGINS[event.name]
            call_id, called = str(event.payload.get(id_)), str(event.payload.get(name))
            earlier = calls.get(call_id)
            report = CallReport(call_id, kind, called, event.timestamp, ended_at)
            calls[call_id] = _StartedCall(report, 1 if earlier is None else earlier.attempt + 1)
        elif event.name in _ENDS:
            begun = calls.get(str(event.payload.get(_ENDS[event.name])))
            if begun is not None:
                begun.report = _ended(begun, event)
        elif event.name == "run.waiting":
            for call_id in _not_sent(event):
                if (begun := calls.get(call_id)) is not None:
                    begun.attempt -= 1  # it begins again when the limit has room
    return [begun.report for begun in calls.values()]


def _not_sent(waiting: RunEvent) -> list[str]:
    """The calls of models in which the run is parked for a limit of the fleet, before their requests."""
    waits = waiting.payload.get("waiting")
    found = [each for each in waits if isinstance(each, dict)] if isinstance(waits, list) else []
    return [str(each.get("call_id")) for each in found if each.get("kind") == WaitKind.LIMIT]


def _ended(begun: _StartedCall, event: RunEvent) -> CallReport:
    error = _error_code(event) if event.name.endswith(".failed") else None
    report = replace(begun.report, ended_at=event.timestamp, error=error)
    if report.kind != "model":
        return report
    shown = event.payload.get("_metrics")
    shown = shown if isinstance(shown, dict) else {}
    metrics = {name: value for name, value in shown.items() if isinstance(value, int | float)}
    took_ms = (report.ended_at - report.began_at).total_seconds() * 1000
    ttft_ms = metrics.get("ttft_ms")
    return replace(
        report,
        metrics=LLMCallMetrics(
            model=report.name,
            latency_ms=float(metrics.get("latency_ms") or took_ms),
            input_tokens=int(metrics.get("input_tokens") or 0),
            output_tokens=int(metrics.get("output_tokens") or 0),
            cached_tokens=int(metrics.get("input_tokens_cached") or 0),
            ttft_ms=None if ttft_ms is None else float(ttft_ms),
            attempt=begun.attempt,
            error=error,
        ),
    )


def _error_code(event: RunEvent) -> str:
    details = event.payload.get("error_details")
    code = details.get("code") if isinstance(details, dict) else event.payload.get("code")
    return str(code or "error.unknown")


def _time(at_ms: int | None) -> datetime | None:
    return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC)
