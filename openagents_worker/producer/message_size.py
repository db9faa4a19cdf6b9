"""Message sizes. The only place that bounds a message of a run: as it comes, and after decompression.

Whoever may write to the broker's lists could fill a worker's memory with one item: 145 KB that decompress to
700 MB, or JSON that is 25 times as large once it is parsed. Other queues than those of runs are their app's.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import Any

from kombu.transport import virtual

from openagents_worker.errors import RequestInvalid, RequestTooLarge
from openagents_worker.models import DEFAULT_MAX_PAYLOAD_BYTES

__all__ = ["BoundedMessage", "largest_message_bytes"]

PAYLOADS_A_MESSAGE = 8
"""A message has its request as JSON inside of JSON, perhaps in base64, and what Celery adds to it."""


def largest_message_bytes(max_payload_bytes: int) -> int:
    """The limit of a message whose request may have `max_payload_bytes`; one of a few megabytes is always
    read, so that whoever sent it is told that its request is too large."""
    return PAYLOADS_A_MESSAGE * max(max_payload_bytes, DEFAULT_MAX_PAYLOAD_BYTES)


class BoundedMessage(virtual.Message):
    """A message that kombu does not decompress before its size is known.

    Its channel says with `limit_of(queue)` how many bytes it may have; None: kombu decides. One that is too
    large, or compressed in another way, cannot be decoded: whoever sent it finds a failed run.
    """

    def __init__(self, payload: Any, channel: Any = None, **fields: Any) -> None:
        headers = payload.get("headers")
        compression = headers.get("compression") if isinstance(headers, dict) else None
        where = payload["properties"].get("delivery_info")
        limit = channel.limit_of(where.get("routing_key")) if isinstance(where, dict) else None
        if not compression or limit is None:
            super().__init__(payload, channel=channel, **fields)  # type: ignore[no-untyped-call]  # kombu's
            return
        plain = {name: value for name, value in headers.items() if name != "compression"}
        super().__init__({**payload, "headers": plain}, channel=channel, **fields)  # type: ignore[no-untyped-call]
        self._raw, self.headers = payload, headers
        try:
            self.body = _decompressed(self.body, compression, limit)
        except Exception:  # noqa: BLE001 - kombu raises it where the message is decoded
            self.errors.append(sys.exc_info())


def _decompressed(body: Any, compression: object, limit: int) -> bytes:
    """Raises `RequestTooLarge` or `RequestInvalid`."""
    decompress = _BOUNDED.get(compression) if isinstance(compression, str) else None
    if decompress is None:
        raise RequestInvalid(
            f"the message is compressed as {str(compression)[:40]!r}, which no worker of runs reads",
            hint=f"one of {', '.join(sorted(_BOUNDED))}, or no compression",
        )
    try:
        found = decompress(body if isinstance(body, bytes) else str(body).encode(), limit + 1)
    except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise RequestInvalid(f"the message cannot be decompressed: {error}") from error
    if len(found) > limit:
        raise RequestTooLarge(
            f"the message has more than {limit:,} bytes once it is decompressed",
            hint="send a reference (a URL, a key) to the content, or raise OPENAGENTS_MAX_PAYLOAD_BYTES",
        )
    return found


def _zlib(data: bytes, most: int) -> bytes:
    return zlib.decompressobj().decompress(data, most)


def _bzip2(data: bytes, most: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, most)


def _lzma(data: bytes, most: int) -> bytes:
    return lzma.LZMADecompressor(memlimit=LZMA_MEMORY_BYTES).decompress(data, most)


LZMA_MEMORY_BYTES = 64 * 1024 * 1024  # its header may ask for a dictionary of 4 GB

_BOUNDED: dict[str, Callable[[bytes, int], bytes]] = {
    **dict.fromkeys(("application/x-gzip", "gzip", "zlib"), _zlib),
    **dict.fromkeys(("application/x-bz2", "bzip2", "bzip"), _bzip2),
    **dict.fromkeys(("application/x-lzma", "lzma", "xz"), _lzma),
}
"""kombu's names of what the standard library can decompress in part."""
