"""Flower's log. The only place that escapes its lines: they contain paths from HTTP requests."""

from __future__ import annotations

import logging

from openagents_worker.printable import escaped_line

__all__ = ["escape_log_lines"]

LOGGERS = ("tornado.access", "tornado.application", "tornado.general", "flower")


def escape_log_lines() -> None:
    """Escape control characters in everything that Tornado and Flower log in this process."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if _escape_record not in logger.filters:
            logger.addFilter(_escape_record)


def _escape_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = escaped_line(record.getMessage()), ()
    return True
