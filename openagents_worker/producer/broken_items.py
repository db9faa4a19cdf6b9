"""Broken items. The only place that says what is done with an item of a broker that is not a message.

It is taken out of its queue and out of kombu's list of messages that are not acknowledged, from which it
would come back; it is logged, and kept where it can be read. So is a key of kombu's that has another type
than kombu needs: every worker would end at its first command.
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
"""How long a key of the broker that was put aside is kept there: as long as a run is, by default."""
CODE = "message.unreadable"

Keep = Callable[[str, str, str, object], object]


class BrokenItems:
    """Logs what cannot be read, and gives it to `keep` (where it was, code, why, the item)."""

    def __init__(self, keep: Keep | None = None, key_prefix: str = "") -> None:
        """`key_prefix` is that of this library: no message goes back to a queue of such a name."""
        self._keep = keep
        self._key_prefix = key_prefix

    def add(self, where: str, item: object, why: str) -> None:
        why = why[:SHOWN_CHARS]
        log.error("message.unreadable", queue=where, error=why)
        if self._keep is not None:
            self._keep(where, CODE, why, item)

    def is_ours(self, queue: object) -> bool:
        """Whether a queue of this name would be a key of this library."""
        prefix = self._key_prefix
        return bool(prefix) and (queue == prefix or str(queue).startswith(f"{prefix}:"))

    def why_not_back(self, message: Any, exchange: Any, routing_key: Any) -> str | None:
        """Why a message that is not acknowledged cannot go back to its queue; None where it can."""
        if problem := problem_with_message(message):
            return problem
        if not isinstance(exchange, str) or not isinstance(routing_key, str):
            return "its exchange or its routing key is not text"
        return None if exchange else problem_with_read_queue(routing_key, self._key_prefix)


def problem_with_message(message: Any) -> str | None:
    """What keeps this from being a message of kombu's; None when nothing does."""
    if not isinstance(message, dict):
        return f"a {type(message).__name__} is not a message"
    properties = message.get("properties")
    if not isinstance(properties, dict) or "delivery_tag" not in properties:
        return "it has no properties.delivery_tag"
    if not isinstance(properties["delivery_tag"], str | int):
        return "its properties.delivery_tag is neither text nor a number"
    if not isinstance(properties.get("delivery_info"), dict):
        return "it has no properties.delivery_info"
    if not isinstance(message.get("headers", {}), Mapping | None):
        return "its headers are not an object"
    return None if isinstance(message.get("body"), str | bytes) else "it has no body"


def reason(error: BaseException) -> str:
    """An error as a reason: its type, and what it says."""
    said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return f"{type(error).__name__}: {said}"[:SHOWN_CHARS]


def put_keys_aside(client: Any, types: Iterable[tuple[str, str]], broken: BrokenItems) -> None:
    """Rename those of these keys that have another type than the one given."""
    for key, wanted in types:
        found = _text(client.type(key))
        if found in (wanted, "none"):
            continue
        moved_to = f"{key}.put_aside.{time.time_ns() // 1000}"
        client.rename(key, moved_to)
        client.pexpire(moved_to, KEPT_S * 1000)
        broken.add(key, f"renamed to {moved_to}", f"the key was a {found} and must be a {wanted}")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
