"""Logs: the only place that sets up the whole log of a worker: our lines, Celery's lines and all others.

In a process of our own app one handler writes all lines in one format. The worker of an app that has set up
its log keeps that log, unless JSON is requested: a log with some JSON lines cannot be parsed, so every line
on the console is JSON then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

from celery import signals
from celery.apps import worker as worker_program

from openagents_worker.agents import LoggingConfig
from openagents_worker.settings import Settings
from openagents_worker.telemetry.logs import (
    configure_logging,
    formatter_for,
    get_logger,
    is_set_up_elsewhere,
    log_what_is_printed,
    set_levels,
)

__all__ = ["set_up_logging"]

log = get_logger(__name__)

CELERY_LOGGERS = ("celery.task", "multiprocessing")
"""Loggers for which Celery adds handlers, and which do not propagate to the root logger."""


def set_up_logging(
    worker: Any,
    settings: Settings,
    logging_config: LoggingConfig | None,
    *,
    is_ours: bool,
    logfile: str | None = None,
) -> None:
    """Set up the log of a Celery worker, before Celery does, which then adds no handlers.

    May be called again. `logfile` is Celery's option. In an app that is not ours, our lines go to the app's
    handlers, at the levels of the environment. A setting for their format or destination gives them their own
    handler. With `OPENAGENTS_LOG_FORMAT=json` the app's lines become JSON too.
    """
    as_json = settings.log_format == "json"
    we_log_everything = (is_ours or as_json) and not logfile and not is_set_up_elsewhere()
    handler = None
    if is_ours or as_json or _has_own_log_settings(settings, logging_config):
        handler = configure_logging(settings, logging_config=logging_config, whole_process=we_log_everything)
    if handler is None:
        set_levels(settings)
    if not (we_log_everything or as_json):
        return
    logging.captureWarnings(True)

    def apply(signal: Any = None, **_: Any) -> None:
        if we_log_everything:
            _redirect_celery_loggers()
        if as_json:
            _set_json_formatter(formatter_for(settings, logging_config), logfile)
        if as_json and signal is signals.celeryd_after_setup:
            log_what_is_printed()  # Celery does it only if it has set up the log itself

    name = f"openagents log of {id(worker.app)}"
    # `celeryd_after_setup` is sent last, also after code that sets up the log instead of Celery.
    for signal in (signals.after_setup_logger, signals.after_setup_task_logger, signals.celeryd_after_setup):
        signal.disconnect(dispatch_uid=name)  # from a previous call
        signal.connect(apply, weak=False, dispatch_uid=name)
    _log_uncaught_exceptions()
    if as_json:
        worker.quiet = True  # its banner is not JSON
        _redirect_safe_say(formatter_for(settings, logging_config))
        apply()


def _has_own_log_settings(settings: Settings, logging_config: LoggingConfig | None) -> bool:
    """Whether the environment or the agents file sets the format or the destination of our lines."""
    in_environment = (
        settings.log_autoconfigure,
        settings.log_pretty,
        settings.log_stream,
        settings.log_include,
        settings.log_exclude,
        settings.log_redact,
        settings.log_max_value_length,
    )
    in_file = logging_config is not None and bool(logging_config.model_fields_set)
    return in_file or any(value is not None for value in in_environment)


def _redirect_celery_loggers() -> None:
    """Send the lines of Celery's task loggers and of billiard to the root logger's handlers."""
    for name in CELERY_LOGGERS:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if type(handler) is logging.StreamHandler and _is_console(handler):
                logger.removeHandler(handler)
                logger.propagate = True


def _set_json_formatter(formatter: logging.Formatter, logfile: str | None) -> None:
    """Make handlers of the console and of Celery's log file write JSON; other handlers are not changed."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if isinstance(handler, logging.FileHandler):
            is_wanted = logfile is not None and handler.baseFilename == str(Path(logfile).absolute())
        else:
            is_wanted = isinstance(handler, logging.StreamHandler) and _is_console(handler)
        if is_wanted:
            handler.setFormatter(formatter)


def _is_console(handler: logging.StreamHandler[Any]) -> bool:
    return handler.stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


def _redirect_safe_say(formatter: logging.Formatter) -> None:
    """Replace the function with which Celery's signal handlers write.

    It bypasses `logging`, because a signal may interrupt a thread that holds the lock of a log handler.
    """

    def write(message: str, file: Any = sys.__stderr__) -> None:
        record = logging.LogRecord(worker_program.__name__, logging.INFO, "", 0, message.strip(), None, None)
        with contextlib.suppress(OSError, ValueError):
            os.write(file.fileno(), f"{formatter.format(record)}\n".encode())

    worker_program.safe_say = write


def _log_uncaught_exceptions() -> None:
    """Log exceptions that end a thread or the process, unless another hook is installed for them."""

    def log_thread_exception(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, SystemExit):
            name = args.thread.name if args.thread is not None else None
            log.error("thread.failed", thread=name, exc_info=args.exc_value)

    def log_process_exception(kind: type[BaseException], error: BaseException, _: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            log.error("process.failed", exc_info=error)

    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = log_thread_exception
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = log_process_exception
