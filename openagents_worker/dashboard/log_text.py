"""Flower's log. The only place that makes its lines fit for a terminal: a path comes from whoever asks."""

from __future__ import annotations

import logging

from openagents_worker.printable import escaped_line

__all__ = ["escape_log_lines"]

LOGGERS = ("tornado.access", "tornado.application", "tornado.general", "flower")


def escape_log_lines() -> None:
    """From now on what Tornado and Flower log in this process holds no control sequence."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if _escaped not in logger.filters:
            logger.addFilter(_escaped)


def _escaped(record: logging.LogRecord) -> bool:
    record.msg, record.args = escaped_line(record.getMessage()), ()
    return True
