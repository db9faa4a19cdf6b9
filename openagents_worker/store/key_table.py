"""The table of Redis keys: the only place that defines type, content and lifetime, and who deletes a key."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ANY_TYPE", "KEYS", "LEFT_IN_PLACE", "KeySpec"]


@dataclass(frozen=True, slots=True)
class KeySpec:
    """A kind of key. `{}` in the template is an encoded id. `life`: when the key expires or is deleted."""

    name: str
    template: str
    type: str
    content: str
    life: str


ANY_TYPE = "any"
"""The type in `KeySpec` of a key that may have any type."""

_RUN = "none while the run lives; RUN_TTL from its end"
_SESSION = "none while the session has a holder or a queue; else SESSION_TTL from the last end"
_WORKER = "deleted with the worker's lease"

KEYS = (
    KeySpec(
        "run",
        "run:{}",
        "hash",
        "the record of a run: format, state, fence, owner, counters, request, input_digest, result",
        _RUN,
    ),
    KeySpec(
        "decisions",
        "run:{}:decisions",
        "hash",
        "call -> the first decision about it as JSON: what, who, when",
        _RUN,
    ),
    KeySpec(
        "facts",
        "run:{}:facts",
        "hash",
        "what was decided outside the journal, by `kind:call id`",
        _RUN,
    ),
    KeySpec(
        "events",
        "run:{}:events",
        "stream",
        "the run's events, id {seq}-0: name, life, attempt, worker, at (ms), final, payload (JSON)",
        _RUN,
    ),
    KeySpec(
        "children",
        "run:{}:children",
        "set",
        "runs to which the run has delegated, and that have not ended",
        f"{_RUN}; deleted with its last member",
    ),
    KeySpec(
        "stopping",
        "stopping",
        "zset",
        "`life:all:run` of a run that has ended, and whose children must end, too (`all` 1: also those in "
        "the background) -> since when, ms",
        "permanent; wake empties it",
    ),
    KeySpec(
        "stopping_children",
        "stopping:{}",
        "set",
        "the children of such a run that have not been asked to end yet",
        "permanent; wake empties it",
    ),
    KeySpec(
        "journal", "journal:{}", "list", "the recorded calls of a run, in order of commit; 0 is prepare", _RUN
    ),
    KeySpec(
        "held",
        "run:{}:held",
        "list",
        "what shared children of the run have left for the session: messages, artifacts, changes of the "
        "state, by the first letter of the item (`store/held_turns.py`)",
        _RUN,
    ),
    KeySpec(
        "reply",
        "run:{}:reply",
        "hash",
        "the reply that is streaming: attempt, call, chars, bytes, at, and its text in parts: text, text1 …; "
        "a tool's output: the same after tool_",
        "a minute after its last piece; the event that ends the text deletes it",
    ),
    KeySpec(
        "session",
        "sess:{}",
        "hash",
        "holder, ordinals of the last places given, version, format, epoch, summaries",
        _SESSION,
    ),
    KeySpec("session_queue", "sess:{}:queue", "zset", "waiting runs by place", _SESSION),
    KeySpec("transcript", "sess:{}:transcript", "list", "messages as JSON, oldest first", _SESSION),
    KeySpec("artifacts", "sess:{}:artifacts", "list", "artifacts as JSON, oldest first", _SESSION),
    KeySpec("session_state", "sess:{}:state", "hash", "state by top-level key, values as JSON", _SESSION),
    KeySpec(
        "workers",
        "workers",
        "zset",
        "incarnation -> deadline of its lease, ms",
        "permanent; reclaim empties it",
    ),
    KeySpec("worker_runs", "worker:{}:runs", "set", "runs the incarnation owns", _WORKER),
    KeySpec(
        "worker_box",
        "worker:{}:box",
        "set",
        "requests to the worker: the id of a run to cancel, or a space and JSON with `kind` and `run`",
        _WORKER,
    ),
    KeySpec(
        "worker_parts",
        "worker:{}:parts",
        "string",
        "background parts that fail, are late, or have failed in the last minutes, JSON: at (ms), parts "
        "(part, state, age_ms, failures, code)",
        "the lease of the worker, from its last heartbeat on",
    ),
    KeySpec(
        "worker_suspect",
        "worker:{}:suspect",
        "string",
        "the one suspect run that a worker of the previous version executes",
        _WORKER,
    ),
    KeySpec(
        "suspects",
        "worker:{}:suspects",
        "set",
        "owned runs that may have killed a process, all of one group",
        "deleted with the worker's lease; a day after its last entry at the latest",
    ),
    KeySpec(
        "alone",
        "alone",
        "zset",
        "suspect that must be executed alone -> until when it waits for an empty process, ms; 2^53: not yet",
        "a day after its last entry; claim removes entries",
    ),
    KeySpec(
        "lease_end",
        "worker:{}:end",
        "hash",
        "the end of a lease: number of runs (`carried`), of `suspects`, `answered` (the process lives), "
        "`died`, `named` (the run that its watchdog named)",
        "ten minutes",
    ),
    KeySpec(
        "lease_end_runs",
        "worker:{}:end:runs",
        "hash",
        "run that became suspect -> its suspicion before that, JSON",
        "ten minutes, or until the process answers",
    ),
    KeySpec(
        "lost_leases",
        "lost",
        "zset",
        "incarnation -> when its lease ended, ms; the last thousand",
        "ten minutes after the last one",
    ),
    KeySpec(
        "host",
        "host:{}",
        "hash",
        "incarnation -> process id and start time of a worker on this host; '' -> number of registrations",
        "a day after the last check of one of them",
    ),
    KeySpec(
        "watched",
        "watched",
        "hash",
        "incarnation -> run_id of the Redis server that sees its connection, when it must have renewed, ms",
        "permanent; retire and reclaim empty it",
    ),
    KeySpec(
        "silent",
        "silent",
        "zset",
        "incarnation without a connection -> since when, ms",
        "permanent; renew, retire and reclaim empty it",
    ),
    KeySpec("looked", "looked", "string", "a worker has checked for lost connections", "a second"),
    KeySpec(
        "gone",
        "gone:{}",
        "hash",
        "'' -> which check declared the incarnation dead; run taken from it -> its life",
        "ten minutes",
    ),
    KeySpec(
        "false_alarms",
        "false_alarms:{}",
        "zset",
        "incarnation that was alive -> when it reported this, ms; one key per check",
        "an hour after the last one",
    ),
    KeySpec(
        "looks_off",
        "looks_off:{}",
        "string",
        "this check is switched off: `connection` or `process`",
        "an hour",
    ),
    KeySpec(
        "agents", "agents", "hash", "agent id -> queue and definition hash, announced by workers", "permanent"
    ),
    KeySpec(
        "data_id",
        "data_id",
        "string",
        "when a worker first registered with this data, ms; another value means that Redis has lost its data",
        "permanent",
    ),
    KeySpec(
        "definition",
        "definition:{}",
        "string",
        "the definition of an agent with its `${VAR}` as they are written, JSON; the id is its content hash",
        "two years and RUN_TTL from the last time that a worker stored or loaded it",
    ),
    KeySpec(
        "definition_of",
        "definition_of:{}",
        "string",
        "the content hash of the definition that checkpoint 0 of a run names by the hash in this key",
        "two years and RUN_TTL from the last time that a worker stored it",
    ),
    KeySpec(
        "fleet",
        "fleet",
        "hash",
        "incarnation -> information from the registration of its worker, JSON: host, pid, version, queues, "
        "agents, max_runs, started_at (ms)",
        "permanent; retire, reclaim and register empty it",
    ),
    KeySpec(
        "fleet_lag",
        "fleet_lag",
        "hash",
        "incarnation -> lag of its event loop since the previous heartbeat, ms",
        "permanent; retire, reclaim and register empty it",
    ),
    KeySpec(
        "sent_again",
        "sent_again",
        "hash",
        "queue -> number of lost messages that were sent again",
        "permanent",
    ),
    KeySpec(
        "due", "due", "zset", "run -> ms when it is due (retry, delayed start)", "permanent; wake empties it"
    ),
    KeySpec(
        "timeouts",
        "timeouts",
        "zset",
        "parked run -> ms when it continues without the facts that it waits for",
        "permanent; wake empties it",
    ),
    KeySpec(
        "message_ids",
        "run:{}:message_ids",
        "zset",
        "id of a message that was sent to the run -> its number; the last ten thousand",
        "a week after the last message",
    ),
    KeySpec(
        "sent",
        "sent:{}",
        "zset",
        "queued run, or one whose end Celery has not been notified of -> µs of its last message",
        "permanent; `claim` and `confirm_completion` empty it",
    ),
    KeySpec(
        "recipients",
        "recipients",
        "zset",
        "recipient of the ends of runs, besides Celery -> when a worker last served it, ms",
        "a day after the last time",
    ),
    KeySpec(
        "outbox",
        "outbox:{}",
        "zset",
        "`{life}:{run}` of which this recipient must be notified -> when the next try is due, ms",
        "RUN_TTL from the last end; outbox_done empties it",
    ),
    KeySpec(
        "outbox_tries",
        "outbox:{}:tries",
        "hash",
        "`{life}:{run}` -> number of tries to notify this recipient",
        "RUN_TTL from the last try; outbox_done empties it",
    ),
    KeySpec(
        "index",
        "index:{}",
        "zset",
        "run -> when it was accepted, ms: `all`, `agent=…`, `session=…`, `tenant=…`, "
        "`label=name=value`, `parent=…`; in "
        "`sessions` session -> when its last run took its place",
        "permanent; submit, prune and delete_session take out of it",
    ),
    KeySpec(
        "indexes",
        "indexes",
        "zset",
        "index -> when prune is due for it, ms",
        "permanent; prune empties it",
    ),
    KeySpec(
        "resend",
        "resend:{}",
        "zset",
        "run in a queue that cannot be read -> µs when its message counts as lost",
        "twenty minutes after the last check of such a queue",
    ),
    KeySpec(
        "aside",
        "aside",
        "list",
        "items put aside, as JSON, newest first: at_us, key (or queue), code, what, moved_to or item",
        "RUN_TTL after the last one; the last thousand",
    ),
    KeySpec(
        "aside_said", "aside:said", "string", "at_us of the newest one that a worker has logged", "RUN_TTL"
    ),
    KeySpec(
        "aside_key",
        "aside:key:{}",
        ANY_TYPE,
        "a key with the wrong type, unchanged; the id is its name and the time, µs",
        "RUN_TTL from when it was moved",
    ),
    KeySpec(
        "served",
        "served",
        "zset",
        "queue -> until when a worker is known to consume it, ms; negative: none does; the last thousand",
        "an hour after the last check",
    ),
    KeySpec(
        "limits",
        "limits",
        "zset",
        "limit of the fleet for which runs wait -> when a worker checks its queue again, ms",
        "a day after the last change",
    ),
    KeySpec(
        "limit",
        "limit:{}",
        "hash",
        "a limit of the fleet: its numbers, when the next request and its tokens are on schedule (µs), "
        "blocked_until_ms, tokens of the last reservation",
        "a day after the last request",
    ),
    KeySpec(
        "limit_calls",
        "limit:{}:calls",
        "zset",
        "reserved request (fence, call, run) -> when it may be sent, or when it was last examined, ms",
        "a week after the last request",
    ),
    KeySpec(
        "limit_queue",
        "limit:{}:queue",
        "zset",
        "run that waits for the limit -> its place; of the tenants in turn",
        "a day after the last entry",
    ),
    KeySpec(
        "limit_tenants",
        "limit:{}:tenants",
        "hash",
        "tenant -> the last place in the queue that one of its runs got",
        "deleted when no run waits; a day after the last entry",
    ),
    KeySpec(
        "limit_called",
        "limit:{}:called",
        "zset",
        "run that was woken because there is room, and has not asked for it yet -> since when, ms",
        "a day after the last entry",
    ),
    KeySpec(
        "resend_seen",
        "resend:{}:seen",
        "string",
        "runs whose message was sent before this time have been checked, µs",
        "ten minutes; then all are checked again",
    ),
)

LEFT_IN_PLACE = frozenset(
    {"run", "facts", "decisions", "journal", "transcript", "artifacts", "session_state"}
)
"""Kinds of keys that are never moved. If such a key has a wrong type, operations that need it fail with an
error that names the key. Any other key of a wrong type is renamed to `aside_key`, and the operation continues
as if the key did not exist: it cannot contain data of this library."""
