"""Telemetry. The only place that makes log lines: an event's name with fields, redacted, text or JSON."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from openagents_worker.printable import json_escaped, printable
from openagents_worker.redaction import DEFAULT_REDACT_KEYS, redact, safe_text
from openagents_worker.settings import Settings

if TYPE_CHECKING:
    from openagents_worker.agents import LoggingConfig

__all__ = ["EventLogger", "configure_logging", "get_logger", "reset_logging"]

ROOT = "openagents_worker"
_FIELDS = "openagents_fields"  # the attribute of a LogRecord that carries an event's fields
_MAX_TRACEBACK_CHARS = 20_000

_ExcInfo = BaseException | bool | tuple[type[BaseException], BaseException, TracebackType | None] | None


class EventLogger:
    """Writes events, not sentences: a name that never changes, and fields.

    Standard logging lies underneath, so levels, filters and an application's own handlers work as ever; a
    handler that knows nothing of fields gets them in its message.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, /, *, exc_info: _ExcInfo = None, **fields: Any) -> None:
        self._write(logging.DEBUG, event, exc_info, fields)

    def info(self, event: str, /, *, exc_info: _ExcInfo = None, **fields: Any) -> None:
        self._write(logging.INFO, event, exc_info, fields)

    def warning(self, event: str, /, *, exc_info: _ExcInfo = None, **fields: Any) -> None:
        self._write(logging.WARNING, event, exc_info, fields)

    def error(self, event: str, /, *, exc_info: _ExcInfo = None, **fields: Any) -> None:
        self._write(logging.ERROR, event, exc_info, fields)

    def exception(self, event: str, /, **fields: Any) -> None:
        """An error with the traceback of the exception being handled."""
        self._write(logging.ERROR, event, True, fields)

    def _write(self, level: int, event: str, exc_info: _ExcInfo, fields: dict[str, Any]) -> None:
        if not self._logger.isEnabledFor(level):
            return
        shown = redact(fields)
        self._logger.log(
            level, "%s", _Line(event, shown), exc_info=exc_info, extra={_FIELDS: shown}, stacklevel=3
        )


def get_logger(name: str) -> EventLogger:
    """The logger of a module.

    >>> log = get_logger(__name__)
    >>> log.info("run.claimed", run_id="r1", attempt=1)
    """
    return EventLogger(name)


class _Line:
    """An event as one text, put together only when somebody writes it."""

    def __init__(self, event: str, fields: Any) -> None:
        self.event = event
        self.fields = fields

    def __str__(self) -> str:
        return " ".join([self.event, *_pairs(self.fields)])


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
    handler.setFormatter(_JsonFormatter(wanted) if settings.log_format == "json" else _TextFormatter(wanted))
    handler.addFilter(_by_prefix(wanted.include_prefixes, wanted.exclude_prefixes))
    at = None if whole_process else ROOT
    handler.install(at, {at: wanted.level} | {_ours(k): v for k, v in wanted.per_logger_levels.items()})
    return handler


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
        line = record.args[0] if isinstance(record.args, tuple) and record.args else None
        event = line.event if isinstance(line, _Line) else safe_text(record.getMessage())
        fields = redact(getattr(record, _FIELDS, {}), self._keys, max_chars=self._wanted.max_value_length)
        return event, fields

    def _exception(self, record: logging.LogRecord) -> str | None:
        if not record.exc_info or record.exc_info[1] is None:
            return None
        text = safe_text("".join(traceback.format_exception(record.exc_info[1]))).rstrip()
        cut = len(text) - _MAX_TRACEBACK_CHARS
        return text if cut <= 0 else f"<{cut} more characters> …{text[cut:]}"

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
        return json_escaped(json.dumps(line, ensure_ascii=False))


class _TextFormatter(_Formatter):
    """`ts LEVEL logger event key=value …` on one line, a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        event, fields = self._parts(record)
        head = [self._time(record)] if self._wanted.show_time else []
        head += [f"{record.levelname:<7}", record.name.removeprefix(f"{ROOT}."), event]
        pairs = _pairs(fields)
        if self._wanted.show_path:
            pairs.append(f"at={record.pathname}:{record.lineno}")
        line = (" " if not self._wanted.pretty else "\n    ").join([" ".join(head), *pairs])
        exception = self._exception(record)
        return printable(line if exception is None else f"{line}\n{exception}")


def _pairs(fields: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_shown(value)}" for name, value in fields.items()]


def _shown(value: Any) -> str:
    """A value that cannot be mistaken for two fields or two lines."""
    plain = (
        isinstance(value, str)
        and value
        and not any(c.isspace() or c in '"=' or not c.isprintable() for c in value)
    )
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
