"""Series: the only place that lists the metrics of this library, with their names, labels and meanings.

A worker measures with signals (`telemetry.signals`). A series says under which name Prometheus gets the
measurements of a signal, and which attributes of the signal become labels. A series without a signal is read
when the metrics are scraped. Labels never contain the id of a run, of a session or of a tenant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

__all__ = [
    "FLEET_SERIES",
    "MAX_LABEL_SETS",
    "MAX_LABEL_VALUES",
    "OTHER",
    "PROCESS_SERIES",
    "SERIES",
    "SIGNALS",
    "Sample",
    "Series",
    "SeriesKind",
]

MAX_LABEL_VALUES = 100
"""Different values of one label in one series. Each further value is counted as `OTHER`."""
MAX_LABEL_SETS = 500
"""Combinations of label values in one series. Each further one is counted with all labels as `OTHER`."""
OTHER = "other"

SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
RUN_S = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


class SeriesKind(StrEnum):
    """The type of a metric of Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric of Prometheus. The name of a counter ends with `_total`; times are in seconds.

    `labels` maps the name of a label to the attribute of the signal that gives its value. `buckets` are the
    upper bounds of a histogram, without infinity.
    """

    name: str
    kind: SeriesKind
    help: str
    labels: Mapping[str, str] = field(default_factory=dict)
    signal: str = ""
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """The name of its samples, apart from the endings of a histogram."""
        return f"{self.name}_total" if self.kind is SeriesKind.COUNTER else self.name


class Sample(NamedTuple):
    """The value of a series without a signal, at one moment. `labels` are in the order of the series."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


def _counter(name: str, help_: str, *, signal: str = "", **labels: str) -> Series:
    return Series(name=name, kind=SeriesKind.COUNTER, help=help_, labels=labels, signal=signal)


def _gauge(name: str, help_: str, *labels: str) -> Series:
    return Series(name=name, kind=SeriesKind.GAUGE, help=help_, labels={label: label for label in labels})


def _duration(name: str, help_: str, buckets: tuple[float, ...], *, signal: str, **labels: str) -> Series:
    return Series(
        name=f"{name}_seconds",
        kind=SeriesKind.HISTOGRAM,
        help=help_,
        labels=labels,
        signal=signal,
        buckets=buckets,
    )


AGENT, MODEL, TOOL = "gen_ai.agent.id", "gen_ai.request.model", "gen_ai.tool.name"
KIND, CODE = "openagents.call.kind", "error.type"

PROCESS_SERIES = (
    _counter(
        "openagents_runs_ended",
        "Runs that this worker has ended, by agent and by the reason of their end.",
        signal="openagents.runs.ended",
        agent=AGENT,
        stop_reason="openagents.stop_reason",
    ),
    _duration(
        "openagents_run_active",
        "Time for which workers have executed a run that has ended, over all its attempts.",
        RUN_S,
        signal="openagents.run.active",
        agent=AGENT,
    ),
    _counter(
        "openagents_attempts",
        "Attempts at runs: finished, suspended (the run continues later) or skipped (it was lost).",
        signal="openagents.attempts",
        agent=AGENT,
        outcome="openagents.outcome",
    ),
    _counter(
        "openagents_run_retries",
        "Runs that were suspended for a retry, by the code of the error.",
        signal="openagents.runs.retried",
        code=CODE,
    ),
    _counter(
        "openagents_runs_parked",
        "Runs that were parked, by what they wait for. A run that waits for two kinds counts for both.",
        signal="openagents.runs.parked",
        kind="openagents.wait.kind",
    ),
    _counter(
        "openagents_calls",
        "Steps: recorded calls that were made, by kind. The code is empty for a call that has succeeded.",
        signal="openagents.calls",
        kind=KIND,
        code=CODE,
    ),
    _duration(
        "openagents_call_duration",
        "Duration of a step: a recorded call that was made, by kind.",
        LONG_S,
        signal="openagents.call.duration",
        kind=KIND,
    ),
    _counter(
        "openagents_calls_replayed",
        "Finished steps that were answered from the journal and not executed again, by kind.",
        signal="openagents.calls.replayed",
        kind=KIND,
    ),
    _duration(
        "openagents_model_call_duration",
        "Duration of a model call, with its own retries and its wait for a limit of the fleet.",
        LONG_S,
        signal="gen_ai.client.operation.duration",
        model=MODEL,
    ),
    _duration(
        "openagents_model_time_to_first_token",
        "Time from the request to the first piece of a streamed reply.",
        LONG_S,
        signal="gen_ai.client.operation.time_to_first_chunk",
        model=MODEL,
    ),
    _counter(
        "openagents_model_calls",
        "Model calls by agent and model. The code is empty for a call that has succeeded.",
        signal="openagents.model.calls",
        agent=AGENT,
        model=MODEL,
        code=CODE,
    ),
    _counter(
        "openagents_model_call_retries",
        "Requests to a model that were repeated within one call.",
        signal="openagents.model.retries",
        model=MODEL,
    ),
    _counter(
        "openagents_tokens",
        "Tokens that the provider has counted: `input` or `output`.",
        signal="openagents.tokens",
        agent=AGENT,
        model=MODEL,
        type="gen_ai.token.type",
    ),
    _counter(
        "openagents_cached_input_tokens",
        "Input tokens that the provider has read from its cache. They are part of the input tokens.",
        signal="openagents.tokens.cached",
        agent=AGENT,
        model=MODEL,
    ),
    _counter(
        "openagents_cost_usd",
        "Cost of model calls whose price is known, in US dollars.",
        signal="openagents.cost",
        agent=AGENT,
        model=MODEL,
    ),
    _duration(
        "openagents_tool_call_duration",
        "Duration of a tool call.",
        LONG_S,
        signal="gen_ai.execute_tool.duration",
        tool=TOOL,
    ),
    _counter(
        "openagents_tool_calls",
        "Tool calls by agent and tool. The code is empty for a call that has succeeded.",
        signal="openagents.tool.calls",
        agent=AGENT,
        tool=TOOL,
        code=CODE,
    ),
    _counter(
        "openagents_claims",
        "Wake-up messages by the answer of the claim. An answer other than `claimed` is an execution that "
        "was prevented: the run is executed elsewhere, has ended, or is not due.",
        signal="openagents.claims",
        answer="openagents.answer",
    ),
    _counter(
        "openagents_writes_refused",
        "Writes that Redis has refused because another worker owns the run (`fenced`), or because the "
        "record is in the wrong place (`misplaced`).",
        signal="openagents.writes.refused",
        answer="openagents.answer",
    ),
    _duration(
        "openagents_recovery_delay",
        "Time from the end of the lease of a dead worker to the moment when this worker has taken its run. "
        "The count is the number of recovered runs.",
        SHORT_S,
        signal="openagents.recovery.delay",
    ),
    _counter(
        "openagents_workers_lost",
        "Dead workers whose runs this worker has taken.",
        signal="openagents.workers.lost",
    ),
    _counter(
        "openagents_leases_lost",
        "Leases that this process has lost. It has stopped its runs and has registered again.",
        signal="openagents.leases.lost",
    ),
    _duration(
        "openagents_lease_renewal",
        "Time in which Redis has answered a renewal of the lease.",
        SHORT_S,
        signal="openagents.lease.renewal",
    ),
    _gauge("openagents_worker_info", "1. The label is the version of the library.", "version"),
    _gauge("openagents_runs_in_progress", "Runs that this worker is executing."),
    _gauge("openagents_run_slots", "Runs that this worker can execute at the same time."),
    _gauge(
        "openagents_lease_remaining_seconds", "Time until the lease of this worker ends, by its own clock."
    ),
    _gauge(
        "openagents_loop_lag_seconds",
        "Longest time without an answer of the event loop since the heartbeat before the last one.",
    ),
    _counter("openagents_loop_blocks", "Blocks of the event loop of 250 ms or more."),
    _gauge("openagents_tool_threads", "Threads for tools: `limit`, `started` or `busy`.", "state"),
    _gauge("openagents_tool_threads_waiting", "Tool calls that wait for a thread."),
    _gauge("openagents_part_failing", "1 if this background part of the worker fails or is late.", "part"),
    _gauge("openagents_ready", "1 if this worker takes new runs, as `/readyz` reports it."),
)
"""What one worker process measures."""

FLEET_SERIES = (
    _gauge("openagents_fleet_up", "1 if the figures of the fleet could be read from Redis."),
    _gauge(
        "openagents_fleet_workers",
        "Workers by state: `alive`, or `dead` until their runs are taken.",
        "state",
    ),
    _gauge("openagents_fleet_run_slots", "Runs that all live workers can execute at the same time."),
    _gauge(
        "openagents_fleet_runs",
        "Runs by state: `running`; `queued`; `due_later` (delayed, or suspended for a retry); "
        "`awaiting_approval`; `waiting_with_timeout` (parked with a time-out); `waiting_for_limit`. A run "
        "that expires, and was not started yet, counts in `due_later`, too.",
        "state",
    ),
    _gauge("openagents_fleet_loop_lag_seconds", "The longest lag of the event loop of a live worker."),
    _gauge("openagents_queue_runs", "Runs that wait for a worker in this queue.", "queue"),
    _gauge(
        "openagents_queue_oldest_run_age_seconds",
        "How long the oldest run of this queue has waited for a worker; 0 if none waits.",
        "queue",
    ),
    _gauge("openagents_queue_workers", "Live workers that consume this queue.", "queue"),
    _counter(
        "openagents_queue_messages_resent",
        "Messages of this queue that were lost and sent again.",
        queue="queue",
    ),
    _gauge("openagents_limit_runs_waiting", "Runs that wait for this limit of the fleet.", "limit"),
    _gauge("openagents_items_put_aside", "Items that no worker could read, and that were put aside."),
)
"""What is read from Redis. The figures are those of the whole fleet, so do not add them up over processes."""

SERIES = (*PROCESS_SERIES, *FLEET_SERIES)
SIGNALS: Mapping[str, Series] = {series.signal: series for series in SERIES if series.signal}
"""The series of each signal that is measured."""
