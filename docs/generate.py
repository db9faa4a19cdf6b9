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
from door_limits import DOOR_LIMITS, door_limit_rows  # noqa: E402 - as the next one
from reference import filled  # noqa: E402 - it stands beside this file, which is no package

ERRORS = """# Error codes

Every error of this library has a code that does not change. The table says whether a run that met the error
may be tried again, and which HTTP status a web product would answer with. In Python, errors are classes of
`openagents_worker.errors`. In results and events they are `error_details` (`code`, `message`, `hint`,
`retryable`, `context`, `cause`). Any other exception has the code `error.unknown`. `RunHandle.get()` raises
`RunFailed` for a run that failed, with the run's own code.

Codes with a star are raised by plugins only. The library passes them on with message and hint, and tries
the run again if they are retryable.

| code | class | meaning | retryable | HTTP |
|---|---|---|---|---|
"""

EVENTS = """# Events

Each event is a JSON object: `name`, `seq` (from 1 for each run, without gaps), `run_id`, `session_id`,
`agent_id`, `life`, `attempt`, `worker`, `timestamp`, `payload`, and `final` on the last event of a life.
Events are published on the pub/sub channel `{prefix}:events:{agent_id}:{session_id}:{run_id}` (ids
percent-encoded), and kept in a stream for each run ([keys.md](keys.md)). Payload keys in brackets are not
always there. How to watch them: [streaming.md](streaming.md).

The journal of a run has what a model was told and what a tool returned. The events of the call show only
the beginning of each text (`OPENAGENTS_EVENT_PREVIEW_CHARS`), so that nothing is stored twice. Read all of
it with `Client.checkpoints(run_id)`; `call` and `call_id` say which call it was.

| name | meaning | payload |
|---|---|---|
"""

KEY_TABLE = """# Keys in Redis

Every key begins with the prefix (`OPENAGENTS_KEY_PREFIX`, `oa`), which the table leaves out. `{}` is an id,
percent-encoded. All keys of a cell are in one slot: on a Redis Cluster the prefix holds the only hash tag
(`oa:{c1}`).

| key | type | content | lives |
|---|---|---|---|
"""

LIMITS = """# Limits

This page says how long a worker process waits for what, and how much is taken at each door
([below](#limits-at-the-doors)).

## Time limits of a worker

Every limit follows from the lease
(`OPENAGENTS_LEASE_MS`), so that the limits fit one another. A heartbeat that cannot keep its lease is
refused when the worker starts. The figures are seconds, for the default lease of 10 s and for a lease of 3
s.

When Redis is silent for longer than a lease, this happens. At the end of the local lease, the worker
cancels the code of its runs and abandons writes that wait for an answer. If all of that code has stopped
within `confirm_s`, the worker goes on: it registers as a new incarnation when Redis answers, and takes runs
again, its old ones included. If some code cannot be stopped (a tool in a thread), the process ends with
code 70. The log line `worker.did_not_let_go` says why, and which runs it had.

A call that keeps the Python interpreter to itself (the GIL) stops all threads of its process: the
heartbeat, the watchdog, and whatever would handle SIGTERM. Examples are a regular expression with nested
repetition, an extension in C, and arithmetic with huge integers. A small process beside the worker notices
it. When the lease ends, or after `loop_dead_s` where that is earlier, it writes the stacks of all threads
to the worker's log (`loop.dead`, `thread.stack`), stores which run executed the call, and kills the worker
(exit code 137; process 1 of a container ends with a code above 34). A process that is stopped (SIGSTOP, a
debugger) or that gets no core is left alone. The run is known where its code blocks the event loop, and
where one thread alone computes; elsewhere `loop.dead` shows the candidates, and nobody is accused. The
process beside the worker needs Linux with `/proc`. Where that is missing (macOS) the log says
`guard.unavailable`, and only the watchdog's thread is left, which needs the interpreter.

| limit | lease 10 s | lease 3 s | rule | reason |
|---|---|---|---|---|
"""

INDEPENDENT = """
## What does not depend on the lease

| constant | seconds | why |
|---|---|---|
"""

INDEPENDENT_OF_THE_LEASE = (
    ("worker.rescue", "GRACE_S", "a message takes milliseconds; after so long it may be lost"),
    ("worker.rescue", "MAX_GRACE_S", "between two messages of one run, where nobody can read the queue"),
    ("worker.rescue", "PERIOD_S", "a run is woken this much too late at most"),
    ("worker.rescue", "LOOK_AGAIN_S", "at a queue whose messages are old, and still there"),
    ("worker.notices", "RETRY_S", "a notice that is missed meanwhile comes with the next beat"),
    ("worker.heartbeat", "SAY_AGAIN_S", "a log line about a Redis that is away at most so often"),
    (
        "worker.watch",
        "BLOCKED_S",
        "an event loop that is busy for so long delays every run; it is only reported",
    ),
    (
        "worker.bridge",
        "STOP_TIMEOUT_S",
        "for cancelled tasks at the end of the process; the lease has ended before",
    ),
    ("worker.watch", "IDLE_TICK_S", "between two looks of the watchdog while no run is executed"),
    ("worker.guard", "BEAT_S", "between two signs of life to the process beside the worker"),
    ("worker.guard", "IDLE_BEAT_S", "the same while no run is executed"),
    ("worker.guard", "START_AGAIN_S", "until that process is started again, once it was killed"),
    ("worker.guard_process", "LOOK_S", "between two of its looks at the worker"),
    (
        "worker.guard_process",
        "IDLE_LOOK_S",
        "the same while no run is executed; the worker wakes that process when one begins",
    ),
    (
        "worker.guard_process",
        "SHORTEST_HELD_S",
        "a call that keeps the interpreter for less ends nothing, however short the lease is",
    ),
    (
        "worker.guard_process",
        "REPORT_S",
        "to name the run and to write the log, beside `accuse_s`; then the worker is ended without that",
    ),
    ("runtime.ledger", "FLUSH_S", "events wait so long for company"),
    ("runtime.ledger", "DELTA_S", "pieces of a reply wait so long for company"),
    ("runtime.deps", "LIMIT_S", "for a deployment's own code that opens or closes what tools need"),
    ("store.client", "CONNECT_TIMEOUT_S", "for a connection; a lease that ends meanwhile abandons it"),
    ("store.client", "TURN_TIMEOUT_S", "for a free connection; a lease that ends meanwhile abandons it"),
    ("store.client", "ANSWER_TIMEOUT_S", "producers: somebody waits for the answer"),
)


def pages() -> Iterator[tuple[Path, str]]:
    """Every page with its text."""
    for name in ("agents-file.md", "command-line.md", "memory.md", "producer.md", "settings.md"):
        yield HERE / name, filled(HERE / name)
    yield HERE / "errors.md", ERRORS + "".join(_error_rows())
    yield HERE / "events.md", EVENTS + "".join(_event_rows())
    yield (
        HERE / "keys.md",
        KEY_TABLE
        + "".join(f"| `{spec.template}` | {spec.type} | {spec.content} | {spec.life} |\n" for spec in KEYS),
    )
    limits = [LIMITS, *_limit_rows(), INDEPENDENT, *_independent_rows(), DOOR_LIMITS, *door_limit_rows()]
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


if __name__ == "__main__":
    for path, text in (*pages(), *acl_files()):
        path.write_text(text)
