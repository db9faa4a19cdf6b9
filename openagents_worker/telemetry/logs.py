"""Telemetry. The only place that writes log lines: an event's name with fields, redacted."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from openagents_worker.redaction import redact
from openagents_worker.secret_text import mask_prose
from openagents_worker.settings import Settings, load_settings
from openagents_worker.telemetry.line_groups import LineGroups
from openagents_worker.telemetry.log_format import (
    EVENT,
    FIELDS,
    ROOT,
    USERS,
    JsonFormatter,
    Pairs,
    TextFormatter,
)

if TYPE_CHECKING:
    from openagents_worker.agents import LoggingConfig

__all__ = [
    "EventLogger",
    "begin_log_of_child",
    "configure_logging",
    "formatter_for",
    "get_logger",
    "is_json_log",
    "is_set_up_elsewhere",
    "line_groups",
    "log_what_is_printed",
    "reset_logging",
    "set_levels",
]

line_groups = LineGroups()
"""Lines of this process that are written together."""

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
        shown = redact(fields, mask=mask_prose)
        # The name is the message's constant part: whoever groups messages by it groups by event.
        self._logger.log(
            level,
            f"{event.replace('%', '%%')} %s" if shown else event,
            *([Pairs(shown)] if shown else []),
            exc_info=exc_info,
            extra={EVENT: event, FIELDS: shown, USERS: is_users},
            stacklevel=3,
        )


def get_logger(name: str) -> EventLogger:
    """The logger of a module.

    >>> log = get_logger(__name__)
    >>> log.info("run.claimed", run_id="r1", attempt=1)
    """
    return EventLogger(name)


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


def set_levels(settings: Settings) -> None:
    """Set the levels that the environment asks for, where an application's own handlers write our lines."""
    levels = {_ours(name): level for name, level in (settings.log_levels or {}).items()}
    if settings.log_level is not None:
        levels = {ROOT: settings.log_level, **levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level.upper())


def formatter_for(settings: Settings, logging_config: LoggingConfig | None = None) -> logging.Formatter:
    """The formatter of our lines, for handlers of somebody else's."""
    from openagents_worker.agents import LoggingConfig

    return _formatter(settings, _wanted(settings, logging_config or LoggingConfig()))


def _formatter(settings: Settings, wanted: LoggingConfig) -> logging.Formatter:
    return JsonFormatter(wanted) if settings.log_format == "json" else TextFormatter(wanted)


def is_json_log() -> bool:
    """Whether this process's log is JSON: then nothing else should be written beside it."""
    handlers = (*logging.getLogger().handlers, *logging.getLogger(ROOT).handlers)
    return any(isinstance(handler.formatter, JsonFormatter) for handler in handlers)


def is_set_up_elsewhere() -> bool:
    """Whether the application has set up a log of its own."""
    return any(not isinstance(each, _Handler | logging.NullHandler) for each in logging.getLogger().handlers)


def reset_logging() -> None:
    """Take away what `configure_logging` installed, and nothing else."""
    for logger in (logging.getLogger(), logging.getLogger(ROOT)):
        for handler in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
            handler.uninstall()


def begin_log_of_child(as_json: bool) -> None:
    """In a process that a worker starts for its tools: where the worker's log is JSON, this one's lines are,
    too, with warnings and whatever is printed."""
    if not as_json:
        return
    configure_logging(load_settings(), whole_process=True)
    logging.captureWarnings(True)
    log_what_is_printed()


def log_what_is_printed() -> None:
    """Make lines of the log of what is printed, unless somebody else has taken the streams."""
    if sys.stdout is sys.__stdout__:
        sys.stdout = _Printed()
    if sys.stderr is sys.__stderr__:
        sys.stderr = _Printed()


class _Printed(io.TextIOBase):
    """A stream whose lines are lines of the log."""

    def __init__(self) -> None:
        self._log = logging.getLogger("printed")
        self._begun = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(None, lines):
            self._log.warning("%s", line)
        return len(text)


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
