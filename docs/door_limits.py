"""The limits of input, for `limits.md`: each value is read from the constant that is the limit."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.loading import MAX_AGENTS
from openagents_worker.celery.message_size import PAYLOADS_A_MESSAGE
from openagents_worker.settings import PREFIX, Settings
from openagents_worker.store.scripts import MAX_CHILDREN
from openagents_worker.store.signals import MAX_SIGNALS

__all__ = ["DOOR_LIMITS", "OPEN_READS", "WHOLE_READS", "door_limit_rows", "whole_read_rows"]

DOOR_LIMITS = """
## Limits of input

Everything that comes from outside has a limit. The last column says what happens beyond the limit: an error
with this code, or something else. Sizes count after decompression. A request, reply, message or file that is
too large does not affect any other.

| input | what | limit | set by | beyond the limit |
|---|---|---|---|---|
"""

WHOLE_READS = """
## Keys that are read whole

All that may grow without end is read in pages: events, transcripts, artifacts, the queue of a session, lists
of runs. These keys are read with one command, because something else bounds them.

| key | what bounds it |
|---|---|
"""

RUNS_OF_A_WORKER = "the runs of one process: `OPENAGENTS_CONCURRENCY`"
WORKERS = "the worker processes of the cell; a process that has ended is removed"

OPEN_READS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "agents": (
        f"the agents that workers have announced: {MAX_AGENTS:,} a file at most",
        (
            ("store/lua/submit.lua", "HKEYS"),
            ("store/lua/delegate.lua", "HKEYS"),
            ("store/fleet.py", "HGETALL"),
            ("store/figures.py", "HGETALL"),
        ),
    ),
    "children": (
        f"{MAX_CHILDREN:,} runs to which one run has delegated and that have not ended",
        (("store/lua/lib/end_run.lua", "SMEMBERS"),),
    ),
    "facts": (
        "one entry for each decided call, each approval and each child of the run, and "
        f"{MAX_SIGNALS:,} values that were sent to the run and that it did not receive yet",
        (
            ("store/lua/claim.lua", "HGETALL"),
            ("store/lua/claim.lua", "HKEYS"),
            ("store/lua/delete_session.lua", "HKEYS"),
            ("store/lua/fact.lua", "HKEYS"),
            ("store/lua/fork.lua", "HKEYS"),
            ("store/lua/read_rows.lua", "HKEYS"),
            ("store/lua/lib/revived.lua", "HKEYS"),
            ("store/lua/lib/children_usage.lua", "HKEYS"),
            ("store/lua/lib/end_run.lua", "HKEYS"),
            ("store/lua/lib/index.lua", "HKEYS"),
            ("runtime/facts.py", "HKEYS"),
            ("store/approvals.py", "HKEYS"),
            ("producer/deciding.py", "HKEYS"),
            ("store/records.py", "HGETALL"),
        ),
    ),
    "fleet": (
        WORKERS,
        (
            ("store/lua/lib/readers.lua", "HGETALL"),
            ("store/lua/register.lua", "HKEYS"),
            ("store/fleet.py", "HGETALL"),
        ),
    ),
    "fleet_lag": (WORKERS, (("store/fleet.py", "HGETALL"),)),
    "gone": (RUNS_OF_A_WORKER, (("store/lua/alarm.lua", "HGETALL"),)),
    "host": (
        "the worker processes of one host",
        (("store/lua/lib/neighbours.lua", "HGETALL"), ("celery/prefork.py", "HGETALL")),
    ),
    "lease_end_runs": (RUNS_OF_A_WORKER, (("store/lua/lib/deaths.lua", "HGETALL"),)),
    "lost_leases": (
        "1,000 leases; those within one heartbeat are read",
        (("store/lua/lib/deaths.lua", "ZRANGEBYSCORE"),),
    ),
    "recipients": (
        "the kinds of recipients of ended runs that workers serve, besides Celery",
        (("store/lua/lib/end_run.lua", "ZRANGEBYSCORE"),),
    ),
    "reply": ("the fields of the one reply that streams", (("store/watch.py", "HGETALL"),)),
    "sent_again": ("the queues of runs", (("store/fleet.py", "HGETALL"), ("store/figures.py", "HGETALL"))),
    "session": ("its fields, which are fixed", (("store/sessions.py", "HGETALL"),)),
    "session_queue": (
        f"the shared children of the runs that have lent the session: {MAX_CHILDREN:,} of each run",
        (("store/lua/lib/session.lua", "ZRANGEBYSCORE"),),
    ),
    "session_state": (
        "what the runs of the session store in it; one run stores at most `LARGEST_ENDING_BYTES`",
        (("store/lua/claim.lua", "HGETALL"), ("store/sessions.py", "HGETALL")),
    ),
    "watched": (WORKERS, (("store/lua/look.lua", "HKEYS"),)),
    "worker_box": (RUNS_OF_A_WORKER, (("store/lua/renew.lua", "SMEMBERS"),)),
    "worker_runs": (
        RUNS_OF_A_WORKER,
        (("store/lua/look.lua", "SMEMBERS"), ("store/lua/renew.lua", "SMEMBERS")),
    ),
    "workers": (
        WORKERS,
        (
            ("store/lua/lib/deaths.lua", "ZRANGEBYSCORE"),
            ("store/lua/look.lua", "ZRANGEBYSCORE"),
            ("local/stack.py", "ZRANGE"),
            ("store/fleet.py", "ZRANGE"),
        ),
    ),
}
"""By kind of key: its bound, and the commands that read all of it. A test finds them in the source."""

PAYLOAD = "OPENAGENTS_MAX_PAYLOAD_BYTES"
SCHEMA = "`request.invalid`; a tool's: `plugin.config`"
REPLY = "`llm.max_reply_bytes` in the agents file"

# door, what, where the value is (module, constant; or a setting), unit, set by, what becomes of more
_ROWS: tuple[tuple[str, str, str, str, str, str], ...] = (
    ("request", "as JSON", PAYLOAD, "bytes", PAYLOAD, "`request.too_large`"),
    ("request", "an id", "models.MAX_ID_CHARS", "characters", "", "`request.invalid`"),
    ("request", "labels", "models.MAX_LABELS", "", "", "`request.invalid`"),
    ("request", "nesting of lists and objects", "jsontext.MAX_NESTING", "levels", "", "`request.invalid`"),
    ("request", "an integer", "jsontext.LARGEST_INTEGER", "", "", "`request.invalid`"),
    ("request", "a delay, an expiry, a timeout", "arguments.TEN_YEARS_MS", "ms", "", "`request.invalid`"),
    ("request", "a queue's name", "queue_names.MAX_QUEUE_BYTES", "bytes", "", "`request.invalid`"),
    ("request", "a reason, a cursor", "arguments.MAX_TEXT_CHARS", "characters", "", "`request.invalid`"),
    ("schema", "as JSON", "json_schema.rules.MAX_SCHEMA_BYTES", "bytes", "", SCHEMA),
    ("schema", "values in it", "json_schema.rules.MAX_SCHEMA_VALUES", "", "", SCHEMA),
    ("schema", "levels", "json_schema.rules.MAX_SCHEMA_DEPTH", "levels", "", SCHEMA),
    (
        "schema",
        "schemas for one value, each `$ref` followed",
        "json_schema.rules.MAX_BRANCHES",
        "",
        "",
        SCHEMA,
    ),
    ("schema", "one pattern", "json_schema.rules.MAX_PATTERN_CHARS", "characters", "", SCHEMA),
    (
        "schema",
        "processor time of one check",
        "OPENAGENTS_CHECK_CPU_S",
        "s",
        "OPENAGENTS_CHECK_CPU_S",
        "`execution.check_limit`; arguments: `tool.validation`",
    ),
    ("schema", "memory of a process that checks", "tools.checks.MEMORY_BYTES", "bytes", "", "the same"),
    (
        "broker message",
        "as received",
        "payloads",
        "bytes",
        PAYLOAD,
        "put aside; log line `message.unreadable`",
    ),
    (
        "broker message",
        "after decompression",
        "payloads",
        "bytes",
        PAYLOAD,
        "failed run, `request.too_large`",
    ),
    (
        "broker message",
        "compression: zlib, bzip2 and xz; memory for xz",
        "celery.message_size.LZMA_MEMORY_BYTES",
        "bytes",
        "",
        "failed run, `request.invalid`",
    ),
    ("agents file", "the file", "agents.loading.MAX_FILE_BYTES", "bytes", "", "`config.load`"),
    ("agents file", "agents", "agents.loading.MAX_AGENTS", "", "", "`config.validation`"),
    ("agents file", "nesting", "agents.positions.MAX_DEPTH", "levels", "", "`config.load`"),
    ("agents file", "problems that are listed", "agents.loading.MAX_PROBLEMS", "", "", "only counted"),
    ("model reply", "a whole reply", "max_reply_bytes", "bytes", REPLY, "`llm.too_large`"),
    ("model reply", "text and tool calls of a stream", "max_reply_bytes", "bytes", REPLY, "`llm.too_large`"),
    (
        "model reply",
        "one event or line of a stream",
        "max_reply_bytes",
        "characters",
        REPLY,
        "`llm.too_large`",
    ),
    ("model reply", "all bytes of a stream", "stream", "bytes", REPLY, "`llm.too_large`"),
    (
        "model reply",
        "bytes of one piece, on average, at least",
        "http_replies.BYTES_A_PIECE",
        "bytes",
        "",
        "`llm.too_large`",
    ),
    (
        "model reply",
        "body of an error reply",
        "llm.reading.MAX_ERROR_BYTES",
        "bytes",
        "",
        "cut",
    ),
    ("model reply", "`Retry-After`", "retry_after.MAX_RETRY_AFTER_MS", "ms", "", "the limit is used"),
    ("`http_request`", "body", "http_max_bytes", "bytes", "`max_bytes` of the tool", "cut, `truncated`"),
    ("`http_request`", "redirects", "tools.builtin.http.MAX_REDIRECTS", "", "", "`tool.permanent`"),
    (
        "`shell_exec`, `execute_command`",
        "stdout, stderr",
        "capture_bytes",
        "bytes",
        "`capture_bytes` of the tool",
        "cut, `truncated`",
    ),
    ("`shell_exec`", "arguments", "tools.builtin.commands.MAX_ARGUMENTS", "", "", "`tool.validation`"),
    (
        "`shell_exec`, `execute_command`",
        "a command",
        "tools.builtin.commands.MAX_COMMAND_CHARS",
        "characters",
        "",
        "`tool.validation`",
    ),
    (
        "`set_env`",
        "variables of a session",
        "tools.builtin.environment.MAX_VARIABLES",
        "",
        "",
        "`tool.permanent`",
    ),
    (
        "`set_env`",
        "a value",
        "tools.builtin.environment.MAX_VALUE_CHARS",
        "characters",
        "",
        "`tool.validation`",
    ),
    (
        "`url_parse`, `url_build`, `query_param`, `host_lookup`",
        "a URL",
        "tools.builtin.urls.MAX_URL_CHARS",
        "characters",
        "",
        "`tool.validation`",
    ),
    (
        "`tavily_search`",
        "the reply of the service",
        "tools.builtin.tavily.MAX_REPLY_BYTES",
        "bytes",
        "",
        "`tool.permanent`",
    ),
    ("tool result", "the outcome of a call, as JSON", PAYLOAD, "bytes", PAYLOAD, "`step.too_large`"),
    ("result", "the output of a run, as JSON", PAYLOAD, "bytes", PAYLOAD, "`step.too_large`"),
    (
        "state, artifacts",
        "everything that a run stores at its end",
        "runtime.ending.LARGEST_ENDING_BYTES",
        "bytes",
        "",
        "`step.too_large`",
    ),
    (
        "recorded function",
        "lists and objects in an argument",
        "runtime.calls.recorded_values.MAX_ARGUMENT_CONTAINERS",
        "",
        "",
        "`step.failed`",
    ),
    (
        "recorded function",
        "the name of a step",
        "runtime.calls.recorded_values.MAX_NAME_CHARS",
        "characters",
        "",
        "`step.failed`",
    ),
    ("tool result, state", "levels", "jsontext.MAX_NESTING", "levels", "", "`step.too_deep`"),
    ("error", "its message", "models.MAX_MESSAGE_CHARS", "characters", "", "cut"),
    ("error", "a reason of `cancel` or `resume`", "redaction.MAX_REASON_CHARS", "characters", "", "cut"),
    ("file tools", "a path", "tools.builtin.file_tool.MAX_PATH_CHARS", "characters", "", "`tool.validation`"),
    ("file tools", "a glob", "tools.builtin.files.MAX_GLOB_CHARS", "characters", "", "`tool.validation`"),
    ("`list_files`", "entries of a list", "tools.builtin.files.MAX_ENTRIES", "", "", "cut, `truncated`"),
    (
        "`list_files`, `grep_files`",
        "files and folders that one call looks at",
        "tools.builtin.search.MAX_VISITED",
        "",
        "",
        "cut, `truncated`",
    ),
    ("`grep_files`, `ripgrep`", "matches", "tools.builtin.grep.MAX_MATCHES", "", "", "cut, `truncated`"),
    (
        "`grep_files`, `ripgrep`",
        "a file that is searched",
        "tools.builtin.grep.MAX_SEARCHED_BYTES",
        "bytes",
        "",
        "left out, counted in `skipped`",
    ),
    (
        "toolset",
        "the tools that it lists",
        "runtime.toolsets.MAX_LISTED_TOOLS",
        "tools",
        "",
        "`plugin.config`",
    ),
    (
        "MCP server",
        "a message",
        "tools.mcp.stdio.MAX_MESSAGE_BYTES",
        "bytes",
        "",
        "`tool.permanent`; over stdio the connection ends",
    ),
    ("MCP server", "the tools that it lists", "tools.mcp.options.MAX_SERVER_TOOLS", "tools", "", "left out"),
    (
        "MCP server",
        "a list, as JSON",
        "tools.mcp.lists.MAX_LIST_BYTES",
        "bytes",
        "",
        "cut; log line `mcp.list_cut`",
    ),
    ("MCP server", "the name of a tool", "tools.mcp.listed.MAX_NAME_CHARS", "characters", "", "left out"),
    (
        "MCP server",
        "lines on stdout without a message",
        "tools.mcp.stdio.MAX_LINES_WITHOUT_MESSAGE",
        "lines",
        "",
        "`tool.permanent`, and the connection ends",
    ),
    (
        "MCP server",
        "its resources or prompts in a list",
        "tools.mcp.lists.MAX_LISTED",
        "elements",
        "",
        "left out",
    ),
    (
        "MCP server",
        "the description of a tool",
        "tools.mcp.listed.MAX_DESCRIPTION_CHARS",
        "characters",
        "",
        "cut",
    ),
    (
        "`openagents-worker mcp`",
        "a message of the client",
        "cli.mcp.protocol.MAX_LINE_BYTES",
        "bytes",
        "",
        "an error of JSON-RPC",
    ),
    (
        "`openagents-worker mcp`",
        "requests that are open",
        "cli.mcp.protocol.MAX_OPEN_REQUESTS",
        "requests",
        "",
        "an error of JSON-RPC",
    ),
    ("event", "its payload, as JSON", PAYLOAD, "bytes", PAYLOAD, "`step.too_large`, where it is emitted"),
    (
        "event",
        "its name",
        "runtime.event_text.MAX_EVENT_NAME_CHARS",
        "characters",
        "",
        "`step.too_large`, where it is emitted",
    ),
    (
        "child of a run",
        "children that have not ended",
        "store.scripts.delegation.MAX_CHILDREN",
        "",
        "",
        "`request.invalid`",
    ),
    (
        "`delegate`, `transfer`",
        "the task",
        "tools.builtin.delegation.MAX_TASK_CHARS",
        "characters",
        "",
        "`tool.validation`",
    ),
    ("event", "values in it", "redaction.MAX_VALUES", "", "", "`step.too_large`, where it is emitted"),
    (
        "event",
        "events in one script call",
        "runtime.event_writer.BATCH_EVENTS",
        "events",
        "",
        "the next script call",
    ),
    (
        "event",
        "text of the events in one script call",
        "runtime.event_writer.BATCH_BYTES",
        "characters",
        "",
        "the next script call",
    ),
    (
        "event",
        "events that are not stored yet",
        "runtime.event_writer.PENDING_EVENTS",
        "events",
        "",
        "`emit` waits",
    ),
    ("event", "text of these events", "runtime.event_writer.PENDING_BYTES", "characters", "", "`emit` waits"),
    ("event", "one piece of a reply", "runtime.reply_stream.DELTA_CHARS", "characters", "", "the next piece"),
    (
        "event",
        "stored for one run",
        "events_maxlen",
        "events",
        "OPENAGENTS_EVENTS_MAXLEN",
        "trimmed, `events.gap`",
    ),
    (
        "watcher",
        "watchers of runs in one process",
        "max_watchers",
        "",
        "OPENAGENTS_MAX_WATCHERS",
        "`watch.too_many`",
    ),
    (
        "page",
        "messages in memory for one watcher",
        "store.pubsub.INBOX_MESSAGES",
        "",
        "",
        "later ones are read from the stream",
    ),
    (
        "page",
        "frames of `sse` that wait to be sent",
        "producer.sse.MAX_READY_FRAMES",
        "",
        "",
        "later ones wait as messages",
    ),
    ("page", "digits of `Last-Event-ID`", "producer.sse.MAX_DIGITS", "digits", "", "`request.invalid`"),
    (
        "put aside",
        "the stored part of an item that is not a message",
        "store.dead_letters.MAX_ITEM_CHARS",
        "characters",
        "",
        "cut",
    ),
    ("skill", "skills of a toolset", "tools.skills.packages.MAX_SKILLS", "", "", "`plugin.config`"),
    (
        "skill",
        "`SKILL.md`, or a reference",
        "tools.skills.packages.MAX_FILE_BYTES",
        "bytes",
        "",
        "`plugin.config`",
    ),
    ("skill", "references", "tools.skills.packages.MAX_FILES", "", "", "`plugin.config`"),
    (
        "diagnostics",
        "reports that wait in a worker for its exporter",
        "worker.run_export.MAX_WAITING",
        "",
        "",
        "they stay in Redis",
    ),
    ("diagnostics", "tries of a report", "worker.run_export.MAX_TRIES", "", "", "`diagnostics.dropped`"),
    ("journal", "records in one answer", "store.scripts.PAGE_BYTES", "bytes", "", "the next page"),
    (
        "slots",
        "free slots for each notification of an ended run, at least",
        "celery.completion_messages.MAX_SHARE_DIVISOR",
        "",
        "",
        "they wait",
    ),
    (
        "slots",
        "notifications that wait in a worker",
        "celery.completion_messages.MAX_WAITING",
        "",
        "",
        "sent again later",
    ),
)


def door_limit_rows() -> Iterator[str]:
    """The rows of the table."""
    for door, what, where, unit, set_by, beyond in _ROWS:
        named = f"`{set_by}`" if set_by.startswith(PREFIX) else set_by
        yield f"| {door} | {what} | {_value(where):,} {unit}".rstrip() + f" | {named} | {beyond} |\n"


def whole_read_rows() -> Iterator[str]:
    """The rows of the table of keys that are read whole."""
    for kind, (bound, _) in sorted(OPEN_READS.items()):
        yield f"| `{kind}` | {bound} |\n"


def _value(where: str) -> int:
    payload = int(Settings.model_fields["max_payload_bytes"].default)
    reply = int(LLMOptions.model_fields["max_reply_bytes"].default)
    match where:
        case "payloads":
            return PAYLOADS_A_MESSAGE * payload
        case "max_reply_bytes":
            return reply
        case "stream":
            return reply * _constant("llm.reading.STREAM_OVERHEAD")
        case "http_max_bytes":
            tool = import_module("openagents_worker.tools.builtin.http").HttpRequest
            return int(tool.Config.model_fields["max_bytes"].default)
        case "capture_bytes":
            tool = import_module("openagents_worker.tools.builtin.commands").ShellExec
            return int(tool.Config.model_fields["capture_bytes"].default)
    if where.startswith(PREFIX):
        where = where.removeprefix(PREFIX).lower()
    field = Settings.model_fields.get(where)
    return _constant(where) if field is None else int(field.default)


def _constant(where: str) -> int:
    module, _, name = where.rpartition(".")
    return int(getattr(import_module(f"openagents_worker.{module}"), name))
