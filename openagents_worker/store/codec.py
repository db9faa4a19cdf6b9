"""The codec: the only place that encodes and decodes payload text, between this process and Redis.

Payload text is what users and models wrote: requests, journal records, session state, transcripts, results
and the payloads of events. Scripts never read it. Everything that a script needs is an argument or a field of
its own, so a codec may compress or encrypt payload text. Without one, it is stored as it is.

An encoded text is a JSON string, so that a script can put it into the JSON of a published event. It begins
with `MARK`, in which one letter is escaped without need: no JSON that this library or a script writes begins
so. Therefore plain text (of scripts, or from before there was a codec) is read by every codec.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha1
from typing import Protocol

from openagents_worker.jsontext import dumps, loads

__all__ = ["PLAIN", "PayloadCodec", "TextCodec", "digest_of"]

MARK = '"\\u006fa:'  # the beginning of the JSON string "oa:NAME:TEXT"
_PARSED_MARK = "oa:"
_MARK_IN_JSON = "u006fa:"  # also where the mark stands in a string inside of JSON
_next_json = json.JSONDecoder().raw_decode


class TextCodec(Protocol):
    """How one kind of encoding changes a text. It may give another result each time (encryption)."""

    name: str
    """Identifies the encoding in stored texts. It has no colon."""

    def encode(self, text: str) -> str: ...

    def decode(self, text: str) -> str: ...


class PayloadCodec:
    """Encodes with one `TextCodec` and reads several: those of workers that write in another way.

    >>> class Reversing:
    ...     name = "reversed"
    ...     def encode(self, text: str) -> str: return text[::-1]
    ...     def decode(self, text: str) -> str: return text[::-1]
    >>> codec = PayloadCodec(Reversing())
    >>> codec.encode('{"a":1}')
    '"\\\\u006fa:reversed:}1:\\\\"a\\\\"{"'
    >>> codec.decode(codec.encode('{"a":1}')), codec.decode('{"a":1}')
    ('{"a":1}', '{"a":1}')
    """

    def __init__(self, writes: TextCodec | None = None, *, also_reads: Sequence[TextCodec] = ()) -> None:
        self._writes = writes
        readable = [*also_reads, *([writes] if writes is not None else [])]
        self._by_name = {each.name: each for each in readable}
        self.is_plain = not readable
        """Whether this codec stores texts as they are and reads no other form."""

    def encode(self, text: str) -> str:
        """The form in which the text is stored. An empty text stays empty: it means that there is none."""
        if self._writes is None or not text:
            return text
        return MARK + dumps(f"{self._writes.name}:{self._writes.encode(text)}")[1:]

    def decode(self, text: str) -> str:
        """The text from its stored form.

        A text that cannot be decoded (another name, another key) is returned as it is. It is a JSON string
        where an object is expected, so its reader raises `RecordUnreadable` for this one run or session.
        """
        if not self._by_name or not text.startswith(MARK):
            return text
        try:
            return self._decoded(loads(text))
        except (ValueError, LookupError):
            return text

    def decode_pieces(self, text: str) -> str:
        """A text that a script has joined from several encoded or plain texts."""
        if not self._by_name or not text.startswith(MARK):
            return text
        pieces, at = [], 0
        try:
            while at < len(text):
                piece, at = _next_json(text, at)
                pieces.append(self._decoded(piece))
        except (ValueError, LookupError, AttributeError):
            return text
        return "".join(pieces)

    def decode_event(self, envelope: str) -> str:
        """The JSON of a published event. A script has put the encoded payload into it."""
        if not self._by_name or _MARK_IN_JSON not in envelope:
            return envelope
        try:
            event = loads(envelope)
            payload = event["payload"]
            if isinstance(payload, str):
                event["payload"] = loads(self._decoded(payload))
            else:  # `llm.delta`: the script makes the payload, and only its text is encoded
                payload["text"] = self.decode_pieces(payload["text"])
            return dumps(event)
        except (ValueError, LookupError, TypeError, AttributeError):
            return envelope

    def decode_fields(self, fields: Mapping[str, str], *names: str) -> dict[str, str]:
        """The fields with these ones decoded."""
        return {name: self.decode(text) if name in names else text for name, text in fields.items()}

    def _decoded(self, framed: str) -> str:
        mark, name, text = framed.split(":", 2)
        if f"{mark}:" != _PARSED_MARK:
            raise ValueError("the text is not encoded")
        return self._by_name[name].decode(text)


PLAIN = PayloadCodec()
"""The codec that changes nothing."""


def digest_of(text: str) -> str:
    """The digest by which scripts compare texts that they do not read. An empty text has an empty digest."""
    return sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest() if text else ""
