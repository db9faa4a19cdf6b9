"""Media in messages: the only place that says which blocks are images, files or sound, and counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["MEDIA_TOKENS", "is_media", "without_media"]

MEDIA_TOKENS = 1_500
"""Tokens of an image or a file in a message: its bytes say nothing about them."""
_MEDIA = frozenset(
    {
        "audio",
        "document",
        "file",
        "image",
        "image_url",
        "input_audio",
        "input_file",
        "input_image",
        "video_url",
    }
)
"""The types of these blocks, in the neutral format and in those of the providers."""


def is_media(block: Any) -> bool:
    """Whether a block of a message is an image, a file or sound."""
    return isinstance(block, Mapping) and block.get("type") in _MEDIA


def without_media(content: Any) -> tuple[Any, int]:
    """The content of a message without such blocks, and how many they are.

    >>> without_media([{"type": "image", "url": "https://example.com/a.png"}, {"type": "text", "text": "Hi"}])
    ([{'type': 'text', 'text': 'Hi'}], 1)
    """
    if isinstance(content, str) or not isinstance(content, Sequence):
        return content, 0
    kept = [block for block in content if not is_media(block)]
    return (kept, len(content) - len(kept)) if len(kept) < len(content) else (content, 0)
