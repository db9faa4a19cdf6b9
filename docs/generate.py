"""Generates what stands in the code: parts of the documentation, and the files of `config/acl/`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from openagents_worker.errors import RAISED_BY_PLUGINS, OpenAgentsError, RunFailed, error_classes
from openagents_worker.events import EVENT_SCHEMAS, LIVE_ONLY_EVENTS
from openagents_worker.store.keys import KEYS
from openagents_worker.store.roles import ROLES, acl_line
from openagents_worker.time_limits import TimeLimits, default_heartbeat_ms

HERE = Path(__file__).parent
PLACEHOLDER = "REPLACE-THIS-PASSWORD"
sys.path.insert(0, str(HERE))
from dashboard import dashboard_text  # noqa: E402 - docs is not a package
from door_limits import (  # noqa: E402 - as the next one
    DOOR_LIMITS,
    WHOLE_READS,
    door_limit_rows,
    whole_read_rows,
)
from reference import filled, has_tables  # noqa: E402 - docs is not a package

ERRORS = """# Error codes

Every error of this library has a code that does not change between versions. The table says whether a call
with this error may be retried, and which HTTP status a web application can use. In Python, errors are classes
of `openagents_worker.errors`. In results and events they are `error_details` (`code`, `message`, `hint`,
`retryable`, `context`, `cause`). Any other exception has the code `error.unknown`. If a run failed,
`RunHandle.get()` raises `RunFailed` with the error code of the run.

Codes with a star are raised only by plugins. The library passes on the message and the hint, and retries the
run if the error is retryable.

| code | class | meaning | retryable | HTTP |
|---|---|---|---|---|
"""

EVENTS = """# Events

Each event is a JSON object: `name`, `seq` (from 1 for each run, without gaps), `run_id`, `session_id`,
`agent_id`, `life`, `attempt`, `worker`, `timestamp`, `payload`, and `final` on the last event of a life.
Events are published on the pub/sub channel `{prefix}:events:{agent_id}:{session_id}:{run_id}` (ids
percent-encoded), and stored in one stream per run ([keys.md](keys.md)). Payload keys in brackets are
optional. [streaming.md](streaming.md) describes how to watch events.

The journal of a run contains the complete replies of models and results of tools. The events of a call
contain only the beginning of each text (`OPENAGENTS_EVENT_PREVIEW_CHARS`), so that nothing is stored twice.
To read everything, use `Client.checkpoints(run_id)`; `call` and `call_id` identify the call. Other texts in
events of the library are cut after 10,000 characters, also the answer in `run.completed`. The complete answer
is in the result of the run ([producer.md](producer.md#wait-and-get)). Secrets are masked
([logging.md](logging.md#redaction)).

| name | meaning | payload |
|---|---|---|
"""

KEY_TABLE = """# Keys in Redis

Every key begins with the prefix (`OPENAGENTS_KEY_PREFIX`, default `oa`), which the table omits. `{}` is a
percent-encoded id. All keys of a cell are in one slot: on a Redis Cluster, the prefix contains the only hash
tag (`oa:{c1}`).

| key | type | content | lives |
|---|---|---|---|
"""

LIMITS = """# Limits

This page lists the time limits of a worker process, the [limits of input](#limits-of-input), and the
[keys that are read whole](#keys-that-are-read-whole).

## Time limits of a worker

Most limits are computed from the lease (`OPENAGENTS_LEASE_MS`), so that they fit together. A worker does
not start with a heartbeat that is too slow for its lease. The table gives seconds, for the default lease of
10 s and for a lease of 3 s.

| limit | lease 10 s | lease 3 s | rule | meaning |
|---|---|---|---|---|
"""

INDEPENDENT = """
### If Redis does not answer for longer than a lease

1. At the end of the local lease, the worker cancels the code of its runs. It abandons writes that wait for
   an answer.
2. If all code has stopped within `confirm_s`, the worker waits for Redis. When Redis answers, the worker
   registers as a new incarnation and takes runs again, including its old ones.
3. If some code cannot be stopped (a tool in a thread), the process ends with code 70. The log line
   `worker.did_not_let_go` gives the reason and the runs.

### If a call holds the Python interpreter

A call that holds the global interpreter lock (GIL) stops all threads of its process: the heartbeat, the
watchdog, and the handling of SIGTERM. Examples are a regular expression with nested repetition, a C
extension, and arithmetic with huge integers.

A small process beside the worker, the stall monitor, notices this. It acts when the lease ends, or after
`loop_dead_s` if that is earlier:

1. It writes the stacks of all threads to the log of the worker (`loop.dead`, `thread.stack`).
2. It stores which run made the call, if this is known: if the code of the run blocks the event loop, or if
   only one thread computes. Otherwise `loop.dead` lists the candidates, and no run becomes suspect.
3. It kills the worker (exit code 137; process 1 of a container ends with a code above 34).

It ignores a process that is stopped (SIGSTOP, a debugger) or that gets no CPU time. The stall monitor needs
Linux with `/proc`. On other systems (macOS), the log has `guard.unavailable`. There, only the watchdog
thread is left, and it needs the interpreter itself.

## Times that do not depend on the lease

| constant | seconds | meaning |
|---|---|---|
"""

INDEPENDENT_OF_THE_LEASE = (
    (
        "worker.rescue",
        "GRACE_S",
        "a message is resent after this time; normally it is delivered within milliseconds",
    ),
    (
        "worker.rescue",
        "MAX_GRACE_S",
        "the longest time between two messages of one run, if the queue cannot be read",
    ),
    (
        "worker.rescue",
        "PERIOD_S",
        "the pause of the rescue loop; a due run is woken at most this much too late",
    ),
    ("worker.rescue", "CHECK_AGAIN_S", "the pause until the next check of a queue that has old messages"),
    (
        "worker.control_channel",
        "RETRY_S",
        "the pause before subscribing to cancel requests again; the next heartbeat gets a missed one",
    ),
    ("worker.heartbeat", "LOG_AGAIN_S", "the shortest time between two log lines about an unreachable Redis"),
    (
        "worker.watchdog",
        "BLOCKED_S",
        "an event loop that is blocked for this time is reported",
    ),
    (
        "worker.loop_thread",
        "STOP_TIMEOUT_S",
        "the time for cancelled tasks to stop when the process ends; the lease has ended before",
    ),
    (
        "worker.watchdog",
        "IDLE_TICK_S",
        "the time between two checks of the watchdog while no run is executed",
    ),
    (
        "worker.stall_monitor",
        "BEAT_S",
        "the time between two signals of the worker to the stall monitor that it is alive",
    ),
    ("worker.stall_monitor", "IDLE_BEAT_S", "the same while no run is executed"),
    ("worker.stall_monitor", "START_AGAIN_S", "the pause before a stall monitor that died is started again"),
    ("worker.stall_monitor_process", "CHECK_S", "the time between two checks of the stall monitor"),
    (
        "worker.stall_monitor_process",
        "IDLE_CHECK_S",
        "the same while no run is executed; the worker wakes the stall monitor when a run begins",
    ),
    (
        "worker.stall_monitor_process",
        "SHORTEST_HELD_S",
        "the stall monitor never acts if a call holds the interpreter for less than this",
    ),
    (
        "worker.stall_monitor_process",
        "REPORT_S",
        "the time to name and log the run, in addition to `accuse_s`; then the worker is killed",
    ),
    ("runtime.event_writer", "FLUSH_S", "events are collected for this time and stored together"),
    ("runtime.event_writer", "MAX_FLUSH_S", "the same, if the process is too busy to store them in time"),
    (
        "runtime.reply_stream",
        "PUBLISH_S",
        "pieces of a streamed reply are collected for this time and sent together",
    ),
    ("runtime.reply_stream", "MAX_PUBLISH_S", "the same, if a process streams very many replies at once"),
    ("runtime.deps", "LIMIT_S", "timeout for the factory of `context.deps` to open or close"),
    (
        "store.client",
        "CONNECT_TIMEOUT_S",
        "timeout for opening a connection to Redis; the end of the lease aborts it, too",
    ),
    (
        "store.client",
        "POOL_TIMEOUT_S",
        "the longest wait for a free connection of the pool; the end of the lease aborts it, too",
    ),
    ("store.client", "ANSWER_TIMEOUT_S", "timeout for the answer of Redis to a command of a producer"),
)


def pages() -> Iterator[tuple[Path, str]]:
    """Every page that is generated, or has generated parts, with its text."""
    for page in sorted(HERE.glob("*.md")):
        if has_tables(page):
            yield page, filled(page)
    yield HERE / "errors.md", ERRORS + "".join(_error_rows())
    yield HERE / "events.md", EVENTS + "".join(_event_rows())
    yield (
        HERE / "keys.md",
        KEY_TABLE
        + "".join(f"| `{spec.template}` | {spec.type} | {spec.content} | {spec.life} |\n" for spec in KEYS),
    )
    limits = [LIMITS, *_limit_rows(), INDEPENDENT, *_independent_rows(), DOOR_LIMITS, *door_limit_rows()]
    limits += [WHOLE_READS, *whole_read_rows()]
    yield HERE / "limits.md", "".join(limits)


def _limit_rows() -> Iterator[str]:
    long, short = (
        TimeLimits.of(lease_ms=lease_ms, heartbeat_ms=default_heartbeat_ms(lease_ms))
        for lease_ms in (10_000, 3_000)
    )
    for name, rule, reason in TimeLimits.explained():
        yield f"| `{name}` | {getattr(long, name):.3g} | {getattr(short, name):.3g} | {rule} | {reason} |\n"


def _independent_rows() -> Iterator[str]:
    for module, name, why in INDEPENDENT_OF_THE_LEASE:
        value = getattr(import_module(f"openagents_worker.{module}"), name)
        yield f"| `{module}.{name}` | {value:g} | {why} |\n"


def _error_rows() -> Iterator[str]:
    ours = (cls for cls in error_classes() if cls.__module__ == OpenAgentsError.__module__)
    for cls in sorted(ours, key=lambda cls: cls.code):
        if cls.__name__.startswith("_") or cls is RunFailed:  # RunFailed has the code of the run's own error
            continue
        meaning = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        retryable = "yes" if cls.retryable else ""
        star = " *" if cls in RAISED_BY_PLUGINS else ""
        yield f"| `{cls.code}`{star} | `{cls.__name__}` | {meaning} | {retryable} | {cls.http_status} |\n"


def _event_rows() -> Iterator[str]:
    for schema in EVENT_SCHEMAS.values():
        keys = [f"`{key}`" for key in schema.required] + [f"[`{key}`]" for key in schema.optional]
        live = " (live only)" if schema.name in LIVE_ONLY_EVENTS else ""
        yield f"| `{schema.name}`{live} | {schema.description} | {' '.join(keys)} |\n"


def acl_files() -> Iterator[tuple[Path, str]]:
    """The ACL of each role, for the default prefix and queue."""
    for role in ROLES.values():
        line = acl_line(role, password=PLACEHOLDER)
        yield HERE.parent / "config" / "acl" / f"{role.name}.acl", f"{line}\n"


def dashboard_file() -> tuple[Path, str]:
    """The dashboard for Grafana."""
    return HERE.parent / "config" / "monitoring" / "grafana-dashboard.json", dashboard_text()


if __name__ == "__main__":
    for path, text in (*pages(), *acl_files(), dashboard_file()):
        path.write_text(text)
