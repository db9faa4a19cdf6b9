"""Log lines. The only place that formats them, as text and as JSON.

An event in text format is one line: line breaks in it are escaped. The lines of a traceback follow it and are
indented. An event in JSON format is one object on one line.
"""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from openagents_worker.errors import text_of
from openagents_worker.printable import escaped_line, json_escaped, printable
from openagents_worker.redaction import DEFAULT_REDACT_KEYS, redact, safe_message
from openagents_worker.secret_text import mask_prose
from openagents_worker.tracebacks import traceback_text

if TYPE_CHECKING:
    from openagents_worker.agents import LoggingConfig

__all__ = ["EVENT", "FIELDS", "ROOT", "USERS", "JsonFormatter", "Pairs", "TextFormatter"]

ROOT = "openagents_worker"
# Attributes of a LogRecord:
EVENT = "openagents_event"  # the name of the event
FIELDS = "openagents_fields"  # the fields of the event
USERS = "openagents_user_error"  # whether the exception was raised by user code
MAX_TRACEBACK_BYTES = 20_000


class Pairs:
    """The fields of an event. They are formatted only if a handler writes the line."""

    def __init__(self, fields: Any) -> None:
        self.fields = fields

    def __str__(self) -> str:
        return " ".join(_pairs(self.fields))


class _Formatter(logging.Formatter):
    """What both formats share: they redact the event, its fields and its exception."""

    def __init__(self, config: LoggingConfig) -> None:
        super().__init__()
        self._config = config
        self._redacted_keys = (*DEFAULT_REDACT_KEYS, *config.redact_keys)

    def _parts(self, record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
        """The name and the fields of the event. For a line of another library, the message is the name."""
        event = record.__dict__.get(EVENT)
        if not isinstance(event, str):
            event = safe_message(_message(record))
        fields, max_chars = getattr(record, FIELDS, {}), self._config.max_value_length
        return event, redact(fields, self._redacted_keys, max_chars=max_chars, mask=mask_prose)

    def _exception(self, record: logging.LogRecord) -> str | None:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, BaseException):
            is_user_error = bool(record.__dict__.get(USERS))
            return traceback_text(error, max_bytes=MAX_TRACEBACK_BYTES, collapse=is_user_error)
        return safe_message(record.exc_text) if record.exc_text else None

    @staticmethod
    def _time(record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(_Formatter):
    """One JSON object per line: ts (UTC), level, logger, event, the fields; `exception` is the traceback."""

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
            line["stack"] = safe_message(str(record.stack_info))
        return json_escaped(_json(line))


class TextFormatter(_Formatter):
    """One line `ts LEVEL logger event key=value …`, then the traceback, indented."""

    def format(self, record: logging.LogRecord) -> str:
        event, fields = self._parts(record)
        head = [self._time(record)] if self._config.show_time else []
        head += [f"{record.levelname:<7}", record.name.removeprefix(f"{ROOT}."), escaped_line(event)]
        pairs = _pairs(fields)
        if self._config.show_path:
            pairs.append(f"at={record.pathname}:{record.lineno}")
        line = (" " if not self._config.pretty else "\n    ").join([" ".join(head), *pairs])
        below = [self._exception(record), safe_message(str(record.stack_info)) if record.stack_info else None]
        texts = [line, *(textwrap.indent(text, "  ", lambda _: True) for text in below if text is not None)]
        return printable("\n".join(texts))


def _message(record: logging.LogRecord) -> str:
    """The message of a line, also if its arguments do not match the format string.

    For such a line, `logging` itself would print a traceback.
    """
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - an argument's own __str__ may raise anything
        return f"{text_of(record.msg)} {text_of(record.args)}"


def _pairs(fields: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_value_text(value)}" for name, value in fields.items()]


def _value_text(value: Any) -> str:
    """A value without quotes if it is a plain word, otherwise as escaped JSON."""
    plain = (
        isinstance(value, str)
        and value
        and not any(c.isspace() or c in '"=' or not c.isprintable() for c in value)
    )
    return str(value) if plain else escaped_line(_json(value))


def _json(value: Any) -> str:
    """JSON on one line. Unicode characters that Python or JavaScript read as line breaks are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isascii():
        return text
    return text.translate({0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"})
