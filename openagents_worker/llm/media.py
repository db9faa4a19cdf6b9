"""Images and files in requests: the only place that decides which of them a model is sent as they are.

Providers refuse a whole request with a type of file that they do not take, and the file would be a part of
every later request of the conversation. So a file with a text is sent as this text, and in place of any other
file that the provider does not take, the model reads a line that says what it was.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.llm.base import Message
from openagents_worker.llm.messages import Block

__all__ = [
    "AUDIO_FORMATS",
    "ENDINGS",
    "IMAGES",
    "PDF",
    "Readable",
    "file_text",
    "media_type_of",
    "with_readable_media",
]

IMAGES = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
"""The types of images that all providers take."""
PDF = "application/pdf"
AUDIO_FORMATS = {
    "audio/wav": "wav",
    "audio/wave": "wav",
    "audio/x-wav": "wav",
    "audio/vnd.wave": "wav",
    "audio/mpeg": "mp3",
    "audio/mp3": "mp3",
}
"""OpenAI's names of the formats of audio."""
_OPEN_XML = "application/vnd.openxmlformats-officedocument"
ENDINGS = {
    PDF: "pdf",
    "text/plain": "txt",
    "text/csv": "csv",
    "text/html": "html",
    "text/markdown": "md",
    "application/json": "json",
    "application/msword": "doc",
    "application/vnd.ms-excel": "xls",
    "application/vnd.ms-powerpoint": "ppt",
    "application/vnd.oasis.opendocument.text": "odt",
    "application/rtf": "rtf",
    f"{_OPEN_XML}.wordprocessingml.document": "docx",
    f"{_OPEN_XML}.spreadsheetml.sheet": "xlsx",
    f"{_OPEN_XML}.presentationml.presentation": "pptx",
}
"""The types of documents that OpenAI's responses and Bedrock take, with the endings of their names."""

_SAME = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "application/x-pdf": PDF}
_TEXT = re.compile(
    r"text/.+|.+\+(?:json|xml|yaml)|application/(?:x-)?(?:json|jsonl|ndjson|xml|yaml|toml|sql|graphql|sh)"
    r"|application/(?:x-)?(?:java|ecma)script"
)
_NOT_NEUTRAL = ("source", "file", "image_url")
"""Fields of blocks in the format of one provider, which are sent unchanged."""


@dataclass(frozen=True, slots=True)
class Readable:
    """What a provider takes as it is, besides images of the usual types."""

    files: frozenset[str] = frozenset({PDF})
    """The types of files."""
    texts_as_files: bool = False
    """Whether a file with a text may stay a file."""
    audio: bool = False
    file_urls: bool = True
    """Whether a file may be named by its URL."""


def with_readable_media(messages: Sequence[Message], readable: Readable) -> list[Message]:
    """The messages, with text in place of images and files that the provider does not take."""
    return [_readable_message(message, readable) for message in messages]


def media_type_of(block: Block) -> str:
    """The media type of an image or a file, without parameters; "" if it is not known."""
    media_type = str(block.get("media_type") or "").partition(";")[0].strip().lower()
    return _SAME.get(media_type, media_type)


def file_text(block: Block) -> str | None:
    """The text of a file with a text; None if its data is not base64."""
    try:
        return base64.b64decode(block.get("data") or "", validate=True).decode("utf-8", "replace")
    except ValueError:
        return None


def _readable_message(message: Message, readable: Readable) -> Message:
    content = message.get("content")
    if not isinstance(content, list | tuple) or not any(map(_is_media, content)):
        return message
    blocks = [_readable_block(block, readable) if _is_media(block) else block for block in content]
    if len(blocks) > 1:  # some formats join texts
        blocks = [
            new if new is old or new["type"] != "text" else {**new, "text": f"\n{new['text']}\n"}
            for new, old in zip(blocks, content, strict=True)
        ]
    return {**message, "content": blocks}


def _is_media(block: Any) -> bool:
    is_media = isinstance(block, Mapping) and block.get("type") in ("image", "file")
    return is_media and not any(name in block for name in _NOT_NEUTRAL)


def _readable_block(block: Block, readable: Readable) -> Block:
    """The block as it is sent: as an image or a file, or as text."""
    media_type = media_type_of(block)
    if block.get("file_id"):
        return block
    if block.get("url"):
        is_image = block["type"] == "image" or media_type in IMAGES
        if is_image and (not media_type or media_type in IMAGES):
            return {**block, "type": "image"}
        is_taken = readable.file_urls and (not media_type or media_type in readable.files)
        return (
            {**block, "type": "file"}
            if is_taken and not is_image
            else _text_block(block, _unread_line(block))
        )
    if media_type in IMAGES:
        return {**block, "type": "image", "media_type": media_type}
    if media_type in readable.files or (readable.audio and media_type in AUDIO_FORMATS):
        return {**block, "type": "file", "media_type": media_type}
    text = file_text(block) if _TEXT.fullmatch(media_type) else None
    if text is None or not text.strip():
        return _text_block(block, _unread_line(block))
    if readable.texts_as_files:
        return {**block, "type": "file", "media_type": "text/plain"}
    return _text_block(block, f"[{_described(block)}]\n{text}")


def _text_block(block: Block, text: str) -> Block:
    cached = {"cache_control": block["cache_control"]} if block.get("cache_control") else {}
    return {"type": "text", "text": text, **cached}


def _unread_line(block: Block) -> str:
    """What the model reads in place of a file: `[file r.zip, application/zip, 12 KB: …]`."""
    return f"[{_described(block)}: this model cannot read it]"


def _described(block: Block) -> str:
    named = " ".join(str(text) for text in (block["type"], block.get("name")) if text)
    where = block.get("url") or _size(len(str(block.get("data") or "").rstrip("=")) * 3 // 4)
    return ", ".join(text for text in (named, media_type_of(block), where) if text)


def _size(number: int) -> str:
    return f"{number:,} bytes" if number < 1_024 else f"{round(number / 1_024):,} KB"
