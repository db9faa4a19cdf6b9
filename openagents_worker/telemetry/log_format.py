"""Log lines. The only place that says what a line of the log looks like, as text and as JSON.

A line of text is one line, whatever stands in it: what would end it is escaped, and the lines of a traceback
below it are indented. A line of JSON is one object.
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
EVENT = "openagents_event"  # the attribute of a LogRecord that carries an event's name
FIELDS = "openagents_fields"  # that which carries its fields
USERS = "openagents_user_error"  # and that which says that its exception is one of user code
MAX_TRACEBACK_BYTES = 20_000


class Pairs:
    """An event's fields as one text, put together only when somebody writes it."""

    def __init__(self, fields: Any) -> None:
        self.fields = fields

    def __str__(self) -> str:
        return " ".join(_pairs(self.fields))


class _Formatter(logging.Formatter):
    """What both formats share: an event, its fields and an exception, all redacted."""

    def __init__(self, wanted: LoggingConfig) -> None:
        super().__init__()
        self._wanted = wanted
        self._keys = (*DEFAULT_REDACT_KEYS, *wanted.redact_keys)

    def _parts(self, record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
        """The event's name and its fields; a line that is no event of ours is its own name."""
        event = record.__dict__.get(EVENT)
        if not isinstance(event, str):
            event = safe_message(_message(record))
        given, most = getattr(record, FIELDS, {}), self._wanted.max_value_length
        fields = redact(given, self._keys, max_chars=most, mask=mask_prose)
        return event, fields

    def _exception(self, record: logging.LogRecord) -> str | None:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, BaseException):
            is_users = bool(record.__dict__.get(USERS))
            return traceback_text(error, max_bytes=MAX_TRACEBACK_BYTES, collapse=is_users)
        return safe_message(record.exc_text) if record.exc_text else None

    @staticmethod
    def _time(record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(_Formatter):
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
            line["stack"] = safe_message(str(record.stack_info))
        return json_escaped(_json(line))


class TextFormatter(_Formatter):
    """`ts LEVEL logger event key=value …` on one line, a traceback below it, indented."""

    def format(self, record: logging.LogRecord) -> str:
        event, fields = self._parts(record)
        head = [self._time(record)] if self._wanted.show_time else []
        head += [f"{record.levelname:<7}", record.name.removeprefix(f"{ROOT}."), escaped_line(event)]
        pairs = _pairs(fields)
        if self._wanted.show_path:
            pairs.append(f"at={record.pathname}:{record.lineno}")
        line = (" " if not self._wanted.pretty else "\n    ").join([" ".join(head), *pairs])
        below = [self._exception(record), safe_message(str(record.stack_info)) if record.stack_info else None]
        texts = [line, *(textwrap.indent(text, "  ", lambda _: True) for text in below if text is not None)]
        return printable("\n".join(texts))


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
    return str(value) if plain else escaped_line(_json(value))


def _json(value: Any) -> str:
    """JSON that no reader of lines takes for two: Python and JavaScript end one at these three, too."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isascii():
        return text
    return text.translate({0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"})
