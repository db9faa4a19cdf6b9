"""Logs. The only place that says how a worker's whole log looks: ours, Celery's and everybody else's lines.

In a process of ours one handler writes everybody's lines alike. A worker of an app that has set up its own
log keeps it, unless JSON is asked for: a log that is partly JSON can be read by nobody, so every line that
goes to the console is JSON then, whoever writes it.
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

CELERYS_OWN = ("celery.task", "multiprocessing")
"""Loggers for which Celery makes handlers beside the root's, and which pass nothing on to it."""


def set_up_logging(
    worker: Any,
    settings: Settings,
    logging_config: LoggingConfig | None,
    *,
    is_ours: bool,
    logfile: str | None = None,
) -> None:
    """Set up the log of a Celery worker; called before Celery sets it up, which then adds nothing. May be
    called again. `logfile` is the one that Celery was told to write.

    In an app that is not ours our lines go where the app's go, at the levels that the environment asks for; a
    setting of their form or their place gives them a handler of their own. With `OPENAGENTS_LOG_FORMAT=json`
    the app's lines become JSON, too.
    """
    as_json = settings.log_format == "json"
    ours_is_everybodys = (is_ours or as_json) and not logfile and not is_set_up_elsewhere()
    installed = None
    if is_ours or as_json or _is_asked_for(settings, logging_config):
        installed = configure_logging(
            settings, logging_config=logging_config, whole_process=ours_is_everybodys
        )
    if installed is None:
        set_levels(settings)
    if not (ours_is_everybodys or as_json):
        return
    logging.captureWarnings(True)

    def take_over(signal: Any = None, **_: Any) -> None:
        if ours_is_everybodys:
            _take_over_celerys()
        if as_json:
            _make_json(formatter_for(settings, logging_config), logfile)
        if as_json and signal is signals.celeryd_after_setup:
            log_what_is_printed()  # Celery does so only where it has set up the log itself

    name = f"openagents log of {id(worker.app)}"
    # The last one is sent when whoever sets up the log instead of Celery has done so, too.
    for signal in (signals.after_setup_logger, signals.after_setup_task_logger, signals.celeryd_after_setup):
        signal.disconnect(dispatch_uid=name)  # that of the call before
        signal.connect(take_over, weak=False, dispatch_uid=name)
    _log_what_nobody_catches()
    if as_json:
        worker.quiet = True  # its banner is no JSON
        _log_what_celery_says(formatter_for(settings, logging_config))
        take_over()


def _is_asked_for(settings: Settings, logging_config: LoggingConfig | None) -> bool:
    """Whether the environment or the agents file says how our lines look, or where they go."""
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


def _take_over_celerys() -> None:
    """Let the lines of Celery's task loggers and of billiard go where all others go."""
    for name in CELERYS_OWN:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if type(handler) is logging.StreamHandler and _is_console(handler):
                logger.removeHandler(handler)
                logger.propagate = True


def _make_json(formatter: logging.Formatter, logfile: str | None) -> None:
    """What writes to the console or to Celery's file writes JSON; the app's other handlers are left alone."""
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


def _log_what_celery_says(formatter: logging.Formatter) -> None:
    """Celery writes past the log in handlers of signals, which may interrupt who holds its lock; so do we."""

    def say(message: str, file: Any = sys.__stderr__) -> None:
        record = logging.LogRecord(worker_program.__name__, logging.INFO, "", 0, message.strip(), None, None)
        with contextlib.suppress(OSError, ValueError):
            os.write(file.fileno(), f"{formatter.format(record)}\n".encode())

    worker_program.safe_say = say


def _log_what_nobody_catches() -> None:
    """Exceptions that end a thread or the process are lines of the log, and not Python's own; where somebody
    else has a hook for them, it is theirs."""

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, SystemExit):
            name = args.thread.name if args.thread is not None else None
            log.error("thread.failed", thread=name, exc_info=args.exc_value)

    def of_process(kind: type[BaseException], error: BaseException, _: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            log.error("process.failed", exc_info=error)

    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = of_thread
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = of_process
