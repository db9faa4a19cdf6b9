"""The log. The only place that writes log lines: the name of an event with fields, redacted."""

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
"""The groups of log lines of this process."""

_ExcInfo = BaseException | bool | tuple[type[BaseException], BaseException, TracebackType | None] | None


class EventLogger:
    """Writes events: a constant name and fields, not a sentence.

    It uses the standard `logging`, so levels, filters and the handlers of an application work as usual. A
    handler that does not know the fields gets them in the message.
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
        """`user_error` is an exception of user code. Its traceback is shown without this library's frames."""
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
        """As `warning`, at the level ERROR."""
        raised = exc_info if user_error is None else user_error
        self._write(logging.ERROR, event, raised, fields, user_error is not None)

    def write(self, level: int, event: str, /, **fields: Any) -> None:
        """Write an event at the level `level`."""
        self._write(level, event, None, fields)

    def of_run(self, level: int, event: str, /, *, run_id: str, **cause: Any) -> None:
        """Write an event about a run whose cause may affect many runs, for example that Redis is unreachable.

        Events with the same cause within a few seconds become one line, with the number of runs and some ids.
        """
        line_groups.add(self, level, event, run_id, cause)

    def exception(self, event: str, /, **fields: Any) -> None:
        """Write an event at the level ERROR with the traceback of the exception that is being handled."""
        self._write(logging.ERROR, event, True, fields)

    def _write(
        self, level: int, event: str, exc_info: _ExcInfo, fields: dict[str, Any], is_user_error: bool = False
    ) -> None:
        if not self._logger.isEnabledFor(level):
            return
        if isinstance(exc_info, BaseException):  # `logging` would call its `__bool__`, which may be user code
            exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
        shown = redact(fields, mask=mask_prose)
        # The name is the constant part of the message, so tools that group by it group by event.
        self._logger.log(
            level,
            f"{event.replace('%', '%%')} %s" if shown else event,
            *([Pairs(shown)] if shown else []),
            exc_info=exc_info,
            extra={EVENT: event, FIELDS: shown, USERS: is_user_error},
            stacklevel=3,
        )


def get_logger(name: str) -> EventLogger:
    """The event logger of a module.

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
    """Install a handler for the log lines of this library. Return it, or None if none is installed.

    The environment overrides the logging section of the agents file. If the application has its own handlers,
    they get the lines and None is returned, unless `auto_configure` is set.

    With `whole_process`, the handler is installed at the root logger: the lines of Celery and other libraries
    get the same format. Otherwise only the logger `openagents_worker` is changed. Handlers of an application
    are never removed. A second call replaces the handler of the first. `stream` overrides the configured one.
    """
    from openagents_worker.agents import LoggingConfig  # here, so that producers do not load it

    config = _effective_config(settings, logging_config or LoggingConfig())
    reset_logging()
    if logging.getLogger(ROOT).hasHandlers() and not (config.auto_configure or whole_process):
        return None
    handler = _Handler(stream or (sys.stdout if config.stream == "stdout" else sys.stderr))
    handler.setFormatter(_formatter(settings, config))
    handler.addFilter(_prefix_filter(config.include_prefixes, config.exclude_prefixes))
    logger_name = None if whole_process else ROOT
    levels: dict[str | None, str] = {logger_name: config.level, ROOT: config.level}
    levels |= {_logger_name(name): level for name, level in config.per_logger_levels.items()}
    handler.install(logger_name, levels)
    return handler


def set_levels(settings: Settings) -> None:
    """Set the levels of the environment, for applications whose own handlers write the lines."""
    levels = {_logger_name(name): level for name, level in (settings.log_levels or {}).items()}
    if settings.log_level is not None:
        levels = {ROOT: settings.log_level, **levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level.upper())


def formatter_for(settings: Settings, logging_config: LoggingConfig | None = None) -> logging.Formatter:
    """The formatter for the lines of this library, for handlers of an application."""
    from openagents_worker.agents import LoggingConfig

    return _formatter(settings, _effective_config(settings, logging_config or LoggingConfig()))


def _formatter(settings: Settings, config: LoggingConfig) -> logging.Formatter:
    return JsonFormatter(config) if settings.log_format == "json" else TextFormatter(config)


def is_json_log() -> bool:
    """Whether the log of this process is JSON. Then all other output should be JSON, too."""
    handlers = (*logging.getLogger().handlers, *logging.getLogger(ROOT).handlers)
    return any(isinstance(handler.formatter, JsonFormatter) for handler in handlers)


def is_set_up_elsewhere() -> bool:
    """Whether the application has configured handlers of the root logger."""
    return any(not isinstance(each, _Handler | logging.NullHandler) for each in logging.getLogger().handlers)


def reset_logging() -> None:
    """Remove the handler that `configure_logging` installed, and restore the levels."""
    for logger in (logging.getLogger(), logging.getLogger(ROOT)):
        for handler in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
            handler.uninstall()


def begin_log_of_child(as_json: bool) -> None:
    """Configure the log of a child process of a worker, such as a process for tools.

    If the log of the worker is JSON, the child writes JSON, too, including warnings and printed text.
    """
    if not as_json:
        return
    configure_logging(load_settings(), whole_process=True)
    logging.captureWarnings(True)
    log_what_is_printed()


def log_what_is_printed() -> None:
    """Write text that is printed to standard streams to the log, unless a stream was replaced already."""
    if sys.stdout is sys.__stdout__:
        sys.stdout = _LoggedStream()
    if sys.stderr is sys.__stderr__:
        sys.stderr = _LoggedStream()


class _LoggedStream(io.TextIOBase):
    """A stream that writes each line to the log."""

    def __init__(self) -> None:
        self._log = logging.getLogger("printed")
        self._unfinished_line = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._unfinished_line = (self._unfinished_line + text).split("\n")
        for line in filter(None, lines):
            self._log.warning("%s", line)
        return len(text)


class _Handler(logging.StreamHandler[TextIO]):
    """The handler of `configure_logging`. `uninstall` restores everything that `install` has changed."""

    def install(self, logger_name: str | None, levels: Mapping[str | None, str]) -> None:
        """Add this handler to a logger (None: the root logger) and set the levels of loggers."""
        self._logger = logging.getLogger(logger_name)
        self._logger.addHandler(self)
        # Otherwise the handlers of an application would write each line a second time.
        self._logger.propagate = False
        self._previous_levels = {name: logging.getLogger(name).level for name in levels}
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level.upper())

    def uninstall(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True
        for name, level in self._previous_levels.items():
            logging.getLogger(name).setLevel(level)
        self.close()


def _effective_config(settings: Settings, config: LoggingConfig) -> LoggingConfig:
    """The logging section of the agents file, overridden by the settings of the environment."""
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


def _logger_name(name: str) -> str:
    """The name of a logger. Names of the original SDK (`openagents.llm`) are translated."""
    return (
        ROOT + name.removeprefix("openagents")
        if name == "openagents" or name.startswith("openagents.")
        else name
    )


def _prefix_filter(
    include: Collection[str] | None, exclude: Collection[str]
) -> Callable[[logging.LogRecord], bool]:
    included = None if include is None else tuple(map(_logger_name, include))
    excluded = tuple(map(_logger_name, exclude))

    def passes(record: logging.LogRecord) -> bool:
        return (included is None or record.name.startswith(included)) and not record.name.startswith(excluded)

    return passes
