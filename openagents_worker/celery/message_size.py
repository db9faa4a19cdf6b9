"""Message sizes. The only place that limits the size of a message of a run, before and after decompression.

Without a limit, anyone who can write to the broker could fill the memory of a worker with one item: 145 KB
can decompress to 700 MB, and parsed JSON can be 25 times as large as its text. Only queues of runs are
limited.
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
"""A message contains the request as JSON in JSON, sometimes in base64, and the data that Celery adds."""


def largest_message_bytes(max_payload_bytes: int) -> int:
    """The limit in bytes of a message whose request may have `max_payload_bytes`.

    It is at least a few megabytes: such a message is read, so that the sender gets the error that the request
    is too large.
    """
    return PAYLOADS_A_MESSAGE * max(max_payload_bytes, DEFAULT_MAX_PAYLOAD_BYTES)


class BoundedMessage(virtual.Message):
    """A message that is decompressed only up to a limit.

    The channel gives the limit in bytes with `max_message_bytes(queue)`; None: no limit. A message that is
    too large or has another compression cannot be decoded, and its run fails.
    """

    def __init__(self, payload: Any, channel: Any = None, **fields: Any) -> None:
        headers = payload.get("headers")
        compression = headers.get("compression") if isinstance(headers, dict) else None
        limit = _limit_of(payload, channel) if compression else None
        if limit is None:
            super().__init__(payload, channel=channel, **fields)  # type: ignore[no-untyped-call]  # kombu's
            return
        uncompressed = {name: value for name, value in headers.items() if name != "compression"}
        super().__init__({**payload, "headers": uncompressed}, channel=channel, **fields)  # type: ignore[no-untyped-call]
        self._raw, self.headers = payload, headers
        try:
            self.body = _decompressed(self.body, compression, limit)
        except Exception:  # noqa: BLE001 - kombu raises it when the message is decoded
            self.errors.append(sys.exc_info())


def _limit_of(payload: Any, channel: Any) -> int | None:
    delivery = payload["properties"].get("delivery_info")
    return channel.max_message_bytes(delivery.get("routing_key")) if isinstance(delivery, dict) else None


def _decompressed(body: Any, compression: object, limit: int) -> bytes:
    """The decompressed body. Raises `RequestTooLarge` or `RequestInvalid`."""
    decompress = _BOUNDED.get(compression) if isinstance(compression, str) else None
    if decompress is None:
        raise RequestInvalid(
            f"the compression {str(compression)[:40]!r} of the message is not supported",
            hint=f"use one of {', '.join(sorted(_BOUNDED))}, or no compression",
        )
    try:
        content = decompress(body if isinstance(body, bytes) else str(body).encode(), limit + 1)
    except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise RequestInvalid(f"the message cannot be decompressed: {error}") from error
    if len(content) > limit:
        raise RequestTooLarge(
            f"the decompressed message has more than {limit:,} bytes",
            hint="send a reference (a URL, a key) to the content, or raise OPENAGENTS_MAX_PAYLOAD_BYTES",
        )
    return content


def _zlib(data: bytes, most: int) -> bytes:
    return zlib.decompressobj().decompress(data, most)


def _bzip2(data: bytes, most: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, most)


def _lzma(data: bytes, most: int) -> bytes:
    return lzma.LZMADecompressor(memlimit=LZMA_MEMORY_BYTES).decompress(data, most)


LZMA_MEMORY_BYTES = 64 * 1024 * 1024  # the header of the data may request a dictionary of 4 GB

_BOUNDED: dict[str, Callable[[bytes, int], bytes]] = {
    **dict.fromkeys(("application/x-gzip", "gzip", "zlib"), _zlib),
    **dict.fromkeys(("application/x-bz2", "bzip2", "bzip"), _bzip2),
    **dict.fromkeys(("application/x-lzma", "lzma", "xz"), _lzma),
}
"""kombu's names of the compressions that the standard library can decompress up to a limit."""
