"""Telemetry. The only place that makes log lines: an event's name with fields, redacted, text or JSON.

A line of text is one line, whatever stands in it: what would end it is escaped, and the lines of a traceback
below it are indented. A line of JSON is one object.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from openagents_worker.errors import text_of
from openagents_worker.redaction import DEFAULT_REDACT_KEYS, redact, safe_text
from openagents_worker.settings import Settings
from openagents_worker.tracebacks import one_line, traceback_text

if TYPE_CHECKING:
    from openagents_worker.agents import LoggingConfig

__all__ = [
    "EventLogger",
    "LineGroups",
    "configure_logging",
    "formatter_for",
    "get_logger",
    "is_json_log",
    "is_set_up_elsewhere",
    "line_groups",
    "reset_logging",
]

ROOT = "openagents_worker"
_EVENT = "openagents_event"  # the attribute of a LogRecord that carries an event's name
_FIELDS = "openagents_fields"  # the attribute of a LogRecord that carries an event's fields
_USERS = "openagents_user_error"  # and the one that says that its exception is one of user code
MAX_TRACEBACK_BYTES = 20_000
TOGETHER_S = 3.0  # lines of many runs with one cause are one: about as long as runs take to stop
MAX_NAMED_RUNS = 5

_ExcInfo = BaseException | bool | tuple[type[BaseException], BaseException, TracebackType | None] | None


class EventLogger:
    """Writes events, not sentences: a name that never changes, and fields.

    Standard logging lies underneath, so levels, filters and an application's own handlers work as ever; a
    handler that knows nothing of fields gets them in its message.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._logger = logging.getLogger(name)

    def debug(self, event: str, /, *, exc_info: _ExcInfo = None, **fields: Any) -> None:
        self._write(logging.DEBUG, event, exc_info, fields)

    def info(self, event: str, /, *, exc_info: _ExcInfo = None, **fields: Any) -> None:
        self._write(logging.INFO, event, exc_info, fields)

    def warning(
        self,
        event: str,
        /,
        *,
        exc_info: _ExcInfo = None,
        user_error: BaseException | None = None,
        **fields: Any,
    ) -> None:
        """`user_error` is an exception of user code: its traceback is shown without frames of ours."""
        raised = exc_info if user_error is None else user_error
        self._write(logging.WARNING, event, raised, fields, user_error is not None)

    def error(
        self,
        event: str,
        /,
        *,
        exc_info: _ExcInfo = None,
        user_error: BaseException | None = None,
        **fields: Any,
    ) -> None:
        """`user_error` as above."""
        raised = exc_info if user_error is None else user_error
        self._write(logging.ERROR, event, raised, fields, user_error is not None)

    def write(self, level: int, event: str, /, **fields: Any) -> None:
        """A line of a level that is not known before."""
        self._write(level, event, None, fields)

    def of_run(self, level: int, event: str, /, *, run_id: str, **cause: Any) -> None:
        """A line about a run whose cause is not the run's own: Redis was away, for example. What meets many
        runs within seconds is one line, with their number and some of their ids."""
        line_groups.add(self, level, event, run_id, cause)

    def exception(self, event: str, /, **fields: Any) -> None:
        """An error with the traceback of the exception being handled."""
        self._write(logging.ERROR, event, True, fields)

    def _write(
        self, level: int, event: str, exc_info: _ExcInfo, fields: dict[str, Any], is_users: bool = False
    ) -> None:
        if not self._logger.isEnabledFor(level):
            return
        if isinstance(exc_info, BaseException):  # logging asks whether it is true, and its class may answer
            exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
        shown = redact(fields)
        # The name is the message's constant part: whoever groups messages by it groups by event.
        self._logger.log(
            level,
            f"{event.replace('%', '%%')} %s" if shown else event,
            *([_Pairs(shown)] if shown else []),
            exc_info=exc_info,
            extra={_EVENT: event, _FIELDS: shown, _USERS: is_users},
            stacklevel=3,
        )


def get_logger(name: str) -> EventLogger:
    """The logger of a module.

    >>> log = get_logger(__name__)
    >>> log.info("run.claimed", run_id="r1", attempt=1)
    """
    return EventLogger(name)


class _Pairs:
    """An event's fields as one text, put together only when somebody writes it."""

    def __init__(self, fields: Any) -> None:
        self.fields = fields

    def __str__(self) -> str:
        return " ".join(_pairs(self.fields))


# --- lines of many runs ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Group:
    log: EventLogger
    level: int
    event: str
    cause: dict[str, Any]
    run_ids: list[str] = field(default_factory=list)
    runs: int = 0


class LineGroups:
    """Lines that have one cause and meet many runs, until they are written as one.

    After an outage of Redis, a worker with forty runs would else say forty times that it lost one.
    """

    def __init__(self, after: Callable[[float, Callable[[], None]], object] | None = None) -> None:
        """`after(seconds, function)` calls the function once they have passed."""
        self._after = after or _call_in_thread
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._groups: dict[tuple[Any, ...], _Group] = {}

    def add(self, log: EventLogger, level: int, event: str, run_id: str, cause: dict[str, Any]) -> None:
        """Note a line; the first one of a cause has it written soon, with all that came till then."""
        if (
            self._pid != os.getpid()
        ):  # a forked child: what waits is its parent's, as is the thread that waits
            self._begin()
        key = (log.name, level, event, *((name, text_of(value)) for name, value in sorted(cause.items())))
        with self._lock:
            group = self._groups.get(key)
            is_first = group is None
            if group is None:
                group = self._groups[key] = _Group(log, level, event, cause)
            group.runs += 1
            if len(group.run_ids) < MAX_NAMED_RUNS:
                group.run_ids.append(run_id)
        if is_first:
            self._after(TOGETHER_S, lambda: self._flush([key]))

    def flush(self) -> None:
        """Write what waits: the process ends, or somebody reads its log now."""
        with self._lock:
            keys = list(self._groups)
        self._flush(keys)

    def _flush(self, keys: Collection[tuple[Any, ...]]) -> None:
        with self._lock:
            groups = [group for key in keys if (group := self._groups.pop(key, None)) is not None]
        for group in groups:
            which: dict[str, Any] = {"run_id": group.run_ids[0]}
            if group.runs > 1:
                which = {"runs": group.runs, "run_ids": group.run_ids}
            group.log.write(group.level, group.event, **which, **group.cause)


def _call_in_thread(after_s: float, function: Callable[[], None]) -> None:
    timer = threading.Timer(after_s, function)
    timer.name, timer.daemon = "openagents-log", True
    try:
        timer.start()
    except RuntimeError:  # the process ends, and starts no thread any more
        function()


line_groups = LineGroups()
"""Those of this process."""


def configure_logging(
    settings: Settings,
    stream: TextIO | None = None,
    *,
    logging_config: LoggingConfig | None = None,
    whole_process: bool = False,
) -> logging.Handler | None:
    """Write this library's log lines, as environment and agents file (in this order) want them.

    Only the logger `openagents_worker` is touched. Where the application has set up its own log, our lines
    go there and nothing changes, unless `auto_configure` asks; then None is returned. `whole_process` is for
    a process that is ours: Celery's and everybody else's lines look like ours then. No handler of anybody is
    removed. Calling it again replaces what the last call installed. `stream` goes before the configured one.
    """
    from openagents_worker.agents import LoggingConfig  # a producer, which has none, need not load it

    wanted = _wanted(settings, logging_config or LoggingConfig())
    reset_logging()
    if logging.getLogger(ROOT).hasHandlers() and not (wanted.auto_configure or whole_process):
        return None
    handler = _Handler(stream or (sys.stdout if wanted.stream == "stdout" else sys.stderr))
    handler.setFormatter(_formatter(settings, wanted))
    handler.addFilter(_by_prefix(wanted.include_prefixes, wanted.exclude_prefixes))
    at = None if whole_process else ROOT
    handler.install(
        at,
        {at: wanted.level, ROOT: wanted.level} | {_ours(k): v for k, v in wanted.per_logger_levels.items()},
    )
    return handler


def formatter_for(settings: Settings, logging_config: LoggingConfig | None = None) -> logging.Formatter:
    """The formatter of our lines, for handlers of somebody else's."""
    from openagents_worker.agents import LoggingConfig

    return _formatter(settings, _wanted(settings, logging_config or LoggingConfig()))


def _formatter(settings: Settings, wanted: LoggingConfig) -> logging.Formatter:
    return _JsonFormatter(wanted) if settings.log_format == "json" else _TextFormatter(wanted)


def is_json_log() -> bool:
    """Whether this process's log is JSON: then nothing else should be written beside it."""
    handlers = (*logging.getLogger().handlers, *logging.getLogger(ROOT).handlers)
    return any(isinstance(handler.formatter, _JsonFormatter) for handler in handlers)


def is_set_up_elsewhere() -> bool:
    """Whether the application has set up a log of its own."""
    return any(not isinstance(each, _Handler | logging.NullHandler) for each in logging.getLogger().handlers)


def reset_logging() -> None:
    """Take away what `configure_logging` installed, and nothing else."""
    for logger in (logging.getLogger(), logging.getLogger(ROOT)):
        for handler in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
            handler.uninstall()


class _Handler(logging.StreamHandler[TextIO]):
    """Our handler; it knows where it was put and which levels it found, so that it leaves nothing behind."""

    def install(self, at: str | None, levels: Mapping[str | None, str]) -> None:
        """Put it at a logger (None: the root) and set the levels of loggers by name."""
        self._logger = logging.getLogger(at)
        self._logger.addHandler(self)
        # Otherwise an application's handler would write each of our lines a second time.
        self._logger.propagate = False
        self._before = {name: logging.getLogger(name).level for name in levels}
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level.upper())

    def uninstall(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True
        for name, level in self._before.items():
            logging.getLogger(name).setLevel(level)
        self.close()


def _wanted(settings: Settings, config: LoggingConfig) -> LoggingConfig:
    """The agents file's logging section, with what the environment says instead."""
    from_env: dict[str, Any] = {
        "level": settings.log_level,
        "per_logger_levels": settings.log_levels,
        "auto_configure": settings.log_autoconfigure,
        "pretty": settings.log_pretty,
        "stream": settings.log_stream,
        "include_prefixes": settings.log_include,
        "exclude_prefixes": settings.log_exclude,
        "redact_keys": settings.log_redact,
        "max_value_length": settings.log_max_value_length,
    }
    return config.model_copy(update={name: value for name, value in from_env.items() if value is not None})


def _ours(name: str) -> str:
    """A logger's name; those of the original SDK (`openagents.llm`) mean ours."""
    return (
        ROOT + name.removeprefix("openagents")
        if name == "openagents" or name.startswith("openagents.")
        else name
    )


def _by_prefix(
    include: Collection[str] | None, exclude: Collection[str]
) -> Callable[[logging.LogRecord], bool]:
    included = None if include is None else tuple(map(_ours, include))
    excluded = tuple(map(_ours, exclude))

    def passes(record: logging.LogRecord) -> bool:
        return (included is None or record.name.startswith(included)) and not record.name.startswith(excluded)

    return passes


class _Formatter(logging.Formatter):
    """What both formats share: an event, its fields and an exception, all redacted."""

    def __init__(self, wanted: LoggingConfig) -> None:
        super().__init__()
        self._wanted = wanted
        self._keys = (*DEFAULT_REDACT_KEYS, *wanted.redact_keys)

    def _parts(self, record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
        """The event's name and its fields; a line that is no event of ours is its own name."""
        event = record.__dict__.get(_EVENT)
        if not isinstance(event, str):
            event = safe_text(_message(record))
        fields = redact(getattr(record, _FIELDS, {}), self._keys, max_chars=self._wanted.max_value_length)
        return event, fields

    def _exception(self, record: logging.LogRecord) -> str | None:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, BaseException):
            is_users = bool(record.__dict__.get(_USERS))
            return traceback_text(error, max_bytes=MAX_TRACEBACK_BYTES, collapse=is_users)
        return safe_text(record.exc_text) if record.exc_text else None

    @staticmethod
    def _time(record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _JsonFormatter(_Formatter):
    """One JSON object a line: ts (UTC), level, logger, event, the fields; `exception` has the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        event, fields = self._parts(record)
        line: dict[str, Any] = {
            "ts": self._time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": event,
        }
        line |= {f"{name}_" if name in line else name: value for name, value in fields.items()}
        if (exception := self._exception(record)) is not None:
            line["exception"] = exception
        if record.stack_info:
            line["stack"] = safe_text(str(record.stack_info))
        return _json(line)


class _TextFormatter(_Formatter):
    """`ts LEVEL logger event key=value …` on one line, a traceback below it, indented."""

    def format(self, record: logging.LogRecord) -> str:
        event, fields = self._parts(record)
        head = [self._time(record)] if self._wanted.show_time else []
        head += [f"{record.levelname:<7}", record.name.removeprefix(f"{ROOT}."), one_line(event)]
        pairs = _pairs(fields)
        if self._wanted.show_path:
            pairs.append(f"at={record.pathname}:{record.lineno}")
        line = (" " if not self._wanted.pretty else "\n    ").join([" ".join(head), *pairs])
        below = [self._exception(record), safe_text(str(record.stack_info)) if record.stack_info else None]
        texts = [line, *(textwrap.indent(text, "  ", lambda _: True) for text in below if text is not None)]
        return "\n".join(texts)


def _message(record: logging.LogRecord) -> str:
    """Its message; also of a line whose arguments do not fit, which logging would complain of at length."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - an argument's own __str__ may raise anything
        return f"{text_of(record.msg)} {text_of(record.args)}"


def _pairs(fields: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_shown(value)}" for name, value in fields.items()]


def _shown(value: Any) -> str:
    """A value that cannot be mistaken for two fields or two lines."""
    plain = (
        isinstance(value, str)
        and value
        and not any(c.isspace() or c in '"=' or not c.isprintable() for c in value)
    )
    return str(value) if plain else one_line(_json(value))


def _json(value: Any) -> str:
    """JSON that no reader of lines takes for two: Python and JavaScript end one at these three, too."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isascii():
        return text
    return text.translate({0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"})
