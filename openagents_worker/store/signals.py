"""Signals: the only place that checks the name and the value of what is sent to a run."""

from __future__ import annotations

from typing import Any

from openagents_worker.arguments import reject_unstorable
from openagents_worker.errors import RequestInvalid, RequestTooLarge
from openagents_worker.jsontext import dumps
from openagents_worker.models.fields import problem_with_id
from openagents_worker.store.facts import FactKind

__all__ = [
    "MAX_SIGNALS",
    "MAX_SIGNALS_BYTES",
    "check_message_id",
    "check_signal_name",
    "signal_fact",
    "signal_text",
]

MAX_SIGNALS = 1_000
"""How many values a run may have that it did not receive yet."""
MAX_SIGNALS_BYTES = 1024 * 1024
"""How many bytes of JSON they may have. Every claim of the run reads all of them."""


def check_signal_name(name: Any) -> None:
    """Raises `RequestInvalid` for a name that a signal cannot have."""
    if problem := problem_with_id(name):
        raise RequestInvalid(f"the name of a signal {problem}")


def check_message_id(message_id: Any) -> None:
    """Raises `RequestInvalid` for an id that a message cannot have."""
    if message_id is not None and (problem := problem_with_id(message_id)):
        raise RequestInvalid(f"message_id {problem}")


def signal_fact(name: str) -> str:
    """The name of the facts with the values of a signal: they are numbered."""
    return f"{FactKind.SIGNAL}:{name}:"


def signal_text(value: Any, max_bytes: int) -> str:
    """The value as JSON. Raises `RequestInvalid` if it is not JSON, `RequestTooLarge` if it is too large."""
    reject_unstorable(value, "value")
    try:
        text = dumps(value)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestInvalid(f"the value of a signal must be JSON: {error}") from None
    limit = min(max_bytes, MAX_SIGNALS_BYTES)
    if size > limit:
        raise RequestTooLarge(
            f"the value of a signal has {size:,} bytes, {limit:,} are allowed",
            hint="send a reference to the data, such as a URL",
        )
    return text
