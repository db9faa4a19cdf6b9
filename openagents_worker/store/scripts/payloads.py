"""Payloads: the only place that marks which arguments and reply fields of scripts are payload text.

`ScriptCall` encodes these arguments and decodes these fields (`store.codec`). So nobody else needs to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated, Any, get_args, get_origin

from openagents_worker.store.codec import PayloadCodec, digest_of
from openagents_worker.store.event_items import event_items

__all__ = [
    "OF_CODEC",
    "Digested",
    "Events",
    "Payload",
    "PayloadPairs",
    "encoder_of",
    "is_payload",
    "plain_type",
]


class _Treatment(StrEnum):
    ENCODED = "encoded"
    EVERY_SECOND = "every second item is encoded"
    EVENTS = "names and payloads of events"
    DIGESTED = "the script gets a digest instead"


Payload = Annotated[str, _Treatment.ENCODED]
"""A payload text: JSON, or the text of a reply."""
PayloadPairs = Annotated[Sequence[str], _Treatment.EVERY_SECOND]
"""Name, payload, name, payload …"""
Events = Annotated[Sequence[str], _Treatment.EVENTS]
"""Name, payload, name, payload … of events (`store.event_items`)."""
Digested = Annotated[str, _Treatment.DIGESTED]
"""A text that scripts only compare with another one."""

Encoder = Callable[[Any, PayloadCodec], Any]


def plain_type(hint: Any) -> Any:
    """The type without its mark."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def is_payload(hint: Any) -> bool:
    return _treatment_of(hint) is _Treatment.ENCODED


def _treatment_of(hint: Any) -> _Treatment | None:
    return get_args(hint)[1] if get_origin(hint) is Annotated else None


def encoder_of(hint: Any) -> Encoder | None:
    """The function that prepares an argument of this type for a script. None if it is sent as it is."""
    match _treatment_of(hint):
        case _Treatment.ENCODED:
            return _encode
        case _Treatment.EVERY_SECOND:
            return _encode_every_second
        case _Treatment.EVENTS:
            return event_items
        case _Treatment.DIGESTED:
            return _digest
    items = get_args(hint)
    return _encode_all if items and is_payload(items[0]) else None


def _encode(text: str, codec: PayloadCodec) -> str:
    return codec.encode(text)


def _encode_all(texts: Sequence[str], codec: PayloadCodec) -> Sequence[str]:
    return [codec.encode(text) for text in texts]


def _encode_every_second(items: Sequence[str], codec: PayloadCodec) -> Sequence[str]:
    return [codec.encode(item) if at % 2 else item for at, item in enumerate(items)]


OF_CODEC = frozenset({_encode, _encode_all, _encode_every_second})
"""Encoders that only apply the codec: a plain one changes nothing."""


def _digest(text: str, _: PayloadCodec) -> str:
    return digest_of(text)
