"""Published messages: the only place that parses a message of pub/sub once for all watchers that receive it.

The watchers of a run in a process receive the same message. Its text is decoded and parsed when the first of
them reads it. Each watcher gets an event of its own, because the payload of an event is a dict, which its
receiver may change.
"""

from __future__ import annotations

from typing import Any

from openagents_worker.events import RunEvent
from openagents_worker.store.codec import PayloadCodec

__all__ = ["PublishedMessage"]


class PublishedMessage:
    """A message of the channel of a run. It is in the inboxes of all listeners of the channel."""

    __slots__ = ("_codec", "_event", "_is_flat", "_is_shared", "text")

    def __init__(self, text: str, *, is_shared: bool = False) -> None:
        self.text = text
        self._is_shared = is_shared
        self._codec: PayloadCodec | None = None  # of the parsed event
        self._event: RunEvent | None = None
        self._is_flat = False

    def event(self, codec: PayloadCodec) -> RunEvent | None:
        """The event, which belongs to the caller. None: another program has published the message."""
        if self._codec is not codec:
            self._parse(codec)
        if self._event is None or not self._is_shared:
            return self._event
        payload = self._event.payload
        return _with_payload(self._event, payload.copy() if self._is_flat else _copied(payload))

    def _parse(self, codec: PayloadCodec) -> None:
        self._codec = codec
        try:
            self._event = RunEvent.from_json(codec.decode_event(self.text))
        except (ValueError, RecursionError):
            self._event = None
        else:
            self._is_flat = not any(isinstance(value, dict | list) for value in self._event.payload.values())


def _copied(value: Any) -> Any:
    """A copy of a parsed JSON value. Texts and numbers are shared, because nobody can change them."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copied(each) for each in value]
    return value


_set = object.__setattr__  # the class forbids assignment


def _with_payload(event: RunEvent, payload: dict[str, Any]) -> RunEvent:
    """As `event.model_copy(update={"payload": payload})`, which takes twice as long."""
    other = RunEvent.__new__(RunEvent)
    fields = event.__dict__.copy()
    fields["payload"] = payload
    _set(other, "__dict__", fields)
    _set(other, "__pydantic_fields_set__", event.__pydantic_fields_set__)
    _set(other, "__pydantic_extra__", None)
    _set(other, "__pydantic_private__", None)
    return other
