"""Broken items. The only place that handles items in the broker that are not valid messages.

A broken item is removed from its queue, and from kombu's unacknowledged messages, from which it would return.
It is logged and stored for inspection. A key of kombu with a wrong Redis type is renamed, because otherwise
every worker would end at its first command.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from openagents_worker.queue_names import problem_with_read_queue
from openagents_worker.telemetry.logs import get_logger

__all__ = ["BrokenItems", "Keep", "problem_with_message", "put_keys_aside", "reason"]

log = get_logger(__name__)

SHOWN_CHARS = 200
KEPT_S = 7 * 24 * 3600
"""How long a renamed key of the broker is kept: as long as a run, by default."""
CODE = "message.unreadable"

Keep = Callable[[str, str, str, object], object]


class BrokenItems:
    """Logs broken items and stores each with `keep(queue, code, reason, item)`."""

    def __init__(self, keep: Keep | None = None, key_prefix: str = "") -> None:
        """`key_prefix` is the prefix of this library: no message is returned to a queue with such a name."""
        self._keep = keep
        self._key_prefix = key_prefix

    def add(self, key: str, item: object, problem: str) -> None:
        """Log and store an item that was removed from `key`, a queue or another key of the broker."""
        problem = problem[:SHOWN_CHARS]
        log.error("message.unreadable", queue=key, error=problem)
        if self._keep is not None:
            self._keep(key, CODE, problem, item)

    def is_ours(self, queue: object) -> bool:
        """Whether a queue with this name would be a key of this library."""
        prefix = self._key_prefix
        return bool(prefix) and (queue == prefix or str(queue).startswith(f"{prefix}:"))

    def problem_with_return(self, message: Any, exchange: Any, routing_key: Any) -> str | None:
        """Why an unacknowledged message cannot be returned to its queue; None if it can."""
        if problem := problem_with_message(message):
            return problem
        if not isinstance(exchange, str) or not isinstance(routing_key, str):
            return "its exchange or routing key is not text"
        return None if exchange else problem_with_read_queue(routing_key, self._key_prefix)


def problem_with_message(message: Any) -> str | None:
    """Why this is not a valid message of kombu; None for a valid message."""
    if not isinstance(message, dict):
        return f"a {type(message).__name__} is not a message"
    properties = message.get("properties")
    if not isinstance(properties, dict) or "delivery_tag" not in properties:
        return "it has no properties.delivery_tag"
    if not isinstance(properties["delivery_tag"], str | int):
        return "properties.delivery_tag must be text or a number"
    if not isinstance(properties.get("delivery_info"), dict):
        return "it has no properties.delivery_info"
    if not isinstance(message.get("headers", {}), Mapping | None):
        return "headers must be an object"
    return None if isinstance(message.get("body"), str | bytes) else "it has no body"


def reason(error: BaseException) -> str:
    """The type and the message of an error, at most 200 characters."""
    text = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return f"{type(error).__name__}: {text}"[:SHOWN_CHARS]


def put_keys_aside(client: Any, types: Iterable[tuple[str, str]], broken: BrokenItems) -> None:
    """Rename each key whose Redis type is not the given one. `types` are pairs of key and type."""
    for key, right_type in types:
        found_type = _text(client.type(key))
        if found_type in (right_type, "none"):
            continue
        moved_to = f"{key}.put_aside.{time.time_ns() // 1000}"
        client.rename(key, moved_to)
        client.pexpire(moved_to, KEPT_S * 1000)
        broken.add(key, f"renamed to {moved_to}", f"the key was a {found_type} and must be a {right_type}")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
