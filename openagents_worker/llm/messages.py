"""Messages: the only place that defines the neutral message model, which every wire format is converted to.

Messages are plain JSON, because journals and transcripts store them.

| role | fields |
|---|---|
| `system`, `developer`, `user` | `content` |
| `assistant` | `content`; `tool_calls`: `[{"id", "name", "arguments": {}}]`; `provider_fields` |
| `tool` | `tool_call_id`, `name`, `content`; `is_error` if the call failed |

`content` is a text, or a list of blocks:

| block | fields | where |
|---|---|---|
| `text` | `text`; `citations`: a list of objects, as the provider wrote them | everywhere |
| `image` | `url`, or `data` (base64) with `media_type`; `detail`: `low`, `high` or `auto` | user, tool |
| `file` | `url`, or `data` (base64) with `media_type`, or `file_id`; `name` | user, tool |
| `reasoning` | `text`; `signature`, `encrypted`, `id`: opaque; `format`: their wire format | assistant |
| `refusal` | `text` | assistant |

`provider_fields` of an assistant message or of a tool call is `{wire format: {field: value}}`: opaque values
that a provider put on a turn and wants back with the next request, for example `reasoning_content`. Only the
wire format that wrote them sends them back; the others leave them out. The same holds for the opaque fields
of `reasoning` blocks. Wire formats are `chat_completions`, `responses` and `anthropic_messages`.

A block of another type is not neutral: it is sent unchanged, for patterns that write one provider's format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from openagents_worker.jsontext import dumps
from openagents_worker.models.media import is_media

__all__ = [
    "BLOCK_TYPES",
    "MAX_BLOCKS",
    "MAX_NAME_CHARS",
    "MAX_URL_CHARS",
    "READABLE_REASONING",
    "Block",
    "Message",
    "block_problem",
    "content_blocks",
    "content_problem",
    "content_text",
    "data_url",
    "fields_of_format",
    "has_content",
    "joined_content",
    "readable_text",
    "is_blank_text",
    "reasoning_text",
    "result_content",
    "split_data_url",
    "tagged_instructions",
    "without_empty",
]

Message = Mapping[str, Any]
Block = Mapping[str, Any]

MAX_BLOCKS = 1_000
"""The most blocks in one message. The bytes of a message have the limit of what a run may store."""
MAX_URL_CHARS = 8_192
MAX_NAME_CHARS = 256
"""Of a file's name or id, and of a media type."""

_SOURCES = {"image": ("url", "data"), "file": ("url", "data", "file_id")}
_TEXT_FIELDS = {
    "text": ("text",),
    "image": ("url", "data", "media_type", "detail"),
    "file": ("url", "data", "media_type", "file_id", "name"),
    "reasoning": ("text", "signature", "encrypted", "id", "format"),
    "refusal": ("text",),
}
BLOCK_TYPES = frozenset(_TEXT_FIELDS)
_DETAILS = ("low", "high", "auto")
_LIMITS = dict.fromkeys(("media_type", "file_id", "name"), MAX_NAME_CHARS) | {"url": MAX_URL_CHARS}
_URL = re.compile(r"(?:https?|gs|s3|file)://\S+")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_MEDIA_TYPE = re.compile(r"[a-z0-9.+-]+/[a-z0-9.+-]+", re.IGNORECASE)
_DATA_URL = re.compile(r"data:([a-z0-9.+/-]+);base64,", re.IGNORECASE)
READABLE_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Opaque fields that hold readable text."""


def content_blocks(content: Any) -> list[Block]:
    """The content of a message as blocks. An empty text has none.

    >>> content_blocks("hello")
    [{'type': 'text', 'text': 'hello'}]
    """
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list | tuple):
        texts = ({"type": "text", "text": block} if isinstance(block, str) else block for block in content)
        return [block for block in texts if isinstance(block, Mapping)]
    return [{"type": "text", "text": dumps(content)}]


def content_text(content: Any) -> str:
    """The text of a message's content: its text and refusal blocks, joined. Reasoning is left out."""
    if isinstance(content, str):
        return content
    blocks = content_blocks(content)
    shown = (block.get("text") for block in blocks if block.get("type") in ("text", "refusal"))
    return "".join(text for text in shown if isinstance(text, str))


def readable_text(content: Any) -> str:
    """The content of a message for people, and for a model that summarizes it. Images and files are named,
    reasoning is left out.

    >>> readable_text([{"type": "image", "url": "https://example.com/a.png"}, {"type": "text", "text": "Hi"}])
    '[image]\\nHi'
    """
    return "\n".join(text for block in content_blocks(content) if (text := _readable_block(block)))


def _readable_block(block: Block) -> str:
    kind, name = block.get("type"), block.get("name")
    if is_media(block):
        return f"[{kind} {name}]" if isinstance(name, str) and name else f"[{kind}]"
    if kind in ("text", "refusal"):
        return content_text([block])
    return "" if kind == "reasoning" else dumps(block)


def tagged_instructions(content: Any) -> Any:
    """The content of a system message as a part of a user message, marked as such.

    >>> tagged_instructions("Be brief.")
    '<system>\\nBe brief.\\n</system>'
    """
    if isinstance(content, str):
        return f"<system>\n{content}\n</system>"
    begin, end = content_blocks("<system>"), content_blocks("</system>")
    return [*begin, *content_blocks(content), *end]


def joined_content(first: Any, second: Any) -> Any:
    """The contents of two messages as that of one: a text, or blocks if one of them has blocks."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*content_blocks(first), *content_blocks(second)]


def has_content(content: Any) -> bool:
    """Whether a model can be sent this content: it has a block other than blank text and reasoning.

    >>> has_content(" "), has_content([{"type": "image", "url": "https://example.com/a.png"}])
    (False, True)
    """
    if isinstance(content, str):
        return not content.isspace() and content != ""
    return any(_has_content(block) for block in content_blocks(content))


def _has_content(block: Block) -> bool:
    kind, text = block.get("type"), block.get("text")
    if kind in ("text", "refusal"):
        return isinstance(text, str) and text.strip() != ""
    return kind != "reasoning"


def without_empty(content: Any) -> Any:
    """The content without blank text blocks, which providers reject; the same object if there are none."""
    if isinstance(content, str) or not isinstance(content, list | tuple):
        return content
    kept = [block for block in content if not is_blank_text(block)]
    return content if len(kept) == len(content) else kept


def is_blank_text(block: Any) -> bool:
    """Whether a block is blank text, which no request contains. A reasoning block may have no text."""
    is_text = isinstance(block, Mapping) and block.get("type") in ("text", "refusal")
    return is_text and not _has_content(block)


def reasoning_text(content: Sequence[Block], provider_fields: Mapping[str, Any] | None = None) -> str:
    """The reasoning that a model showed: of its reasoning blocks, or else of its opaque fields."""
    shown = [block.get("text") for block in content_blocks(content) if block.get("type") == "reasoning"]
    if text := "\n\n".join(text for text in shown if isinstance(text, str) and text):
        return text
    for fields in (provider_fields or {}).values():
        for name in READABLE_REASONING:
            if isinstance(fields, Mapping) and isinstance(fields.get(name), str) and fields[name]:
                return str(fields[name])
    return ""


def fields_of_format(holder: Mapping[str, Any], wire_format: str) -> dict[str, Any]:
    """The opaque fields that this wire format put on a message or a tool call."""
    every = holder.get("provider_fields")
    fields = every.get(wire_format) if isinstance(every, Mapping) else None
    return dict(fields) if isinstance(fields, Mapping) else {}


def result_content(result: Any) -> Any:
    """The content of a message with a tool's result. None: it is the result as text, or as JSON.

    A result with images or files is a block of the type `image` or `file`, or a list of such blocks and of
    `text` blocks. Each one must be valid and have no other fields: other JSON is not taken for an image.

    >>> result_content({"type": "image", "url": "https://example.com/a.png"})
    [{'type': 'image', 'url': 'https://example.com/a.png'}]
    >>> result_content({"type": "image", "caption": "a sunset"}) is None
    True
    """
    blocks = [result] if isinstance(result, Mapping) else result
    if not isinstance(blocks, list | tuple) or not 0 < len(blocks) <= MAX_BLOCKS:
        return None
    kinds = {block.get("type") if isinstance(block, Mapping) else None for block in blocks}
    if not all(isinstance(kind, str) for kind in kinds) or not kinds & _SOURCES.keys():
        return None
    return list(blocks) if all(map(_is_result_block, blocks)) else None


def _is_result_block(block: Block) -> bool:
    kind = block["type"]
    if kind != "text" and kind not in _SOURCES:
        return False
    return set(block) <= {"type", *_TEXT_FIELDS[kind]} and block_problem(block) is None


def data_url(block: Block) -> str:
    """The bytes of an image or file block as a `data:` URL."""
    return f"data:{block.get('media_type') or 'application/octet-stream'};base64,{block.get('data') or ''}"


def split_data_url(url: str) -> tuple[str, str] | None:
    """Media type and base64 of a `data:` URL; None if it is another URL.

    >>> split_data_url("data:image/png;base64,AAAA")
    ('image/png', 'AAAA')
    """
    match = _DATA_URL.match(url)
    return (match.group(1), url[match.end() :]) if match else None


# --- checks ----------------------------------------------------------------------------------------------


def content_problem(content: Any) -> str | None:
    """Why a value is not the content of a message; None if it is. Blocks of other types are not checked."""
    if isinstance(content, str):
        return None
    if not isinstance(content, list | tuple):
        return "the content must be a text or a list of blocks"
    if len(content) > MAX_BLOCKS:
        return f"the content has {len(content):,} blocks, {MAX_BLOCKS:,} are allowed"
    problems = (
        (place, block_problem(block)) for place, block in enumerate(content) if not isinstance(block, str)
    )
    return next((f"content[{place}]: {problem}" for place, problem in problems if problem), None)


def block_problem(block: Any) -> str | None:
    """Why a value is not a valid block; None if it is valid, or has a type that is not neutral.

    >>> block_problem({"type": "image", "data": "AAAA"})
    'an image with data needs a media_type, for example image/png'
    """
    if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
        return "a block must be an object with a type"
    kind = block["type"]
    if kind not in BLOCK_TYPES:
        return None
    return _field_problem(kind, block) or _source_problem(kind, block)


def _field_problem(kind: str, block: Block) -> str | None:
    for name in _TEXT_FIELDS[kind]:
        value = block.get(name)
        if value is not None and not isinstance(value, str):
            return f"{name} must be a text"
        if value is not None and len(value) > _LIMITS.get(name, len(value)):
            return f"{name} has {len(value):,} characters, {_LIMITS[name]:,} are allowed"
    if kind in ("text", "refusal") and block.get("text") is None:
        return f"a {kind} block needs a text"
    if block.get("detail") not in (None, *_DETAILS):
        return f"detail must be one of {', '.join(_DETAILS)}"
    citations = block.get("citations")
    if citations is not None and not _are_objects(citations):
        return "citations must be a list of objects"
    return None


def _are_objects(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, Mapping) for value in values)


def _source_problem(kind: str, block: Block) -> str | None:
    """Why an image or a file has no usable source. It has exactly one."""
    sources = _SOURCES.get(kind)
    if sources is None:
        return None
    article = "an image" if kind == "image" else "a file"
    given = [name for name in sources if block.get(name)]
    if len(given) != 1:
        return f"{article} needs exactly one of {', '.join(sources)}"
    if given == ["url"] and not _URL.fullmatch(block["url"]):
        return "url is not a URL; send bytes as data with a media_type"
    if given == ["data"]:
        media_type = block.get("media_type")
        if not media_type:
            return f"{article} with data needs a media_type, for example {_example_media_type(kind)}"
        if not _MEDIA_TYPE.fullmatch(media_type):
            return "media_type is not a media type"
        if not _BASE64.fullmatch(block["data"]) or len(block["data"]) % 4:
            return "data is not base64"
    return None


def _example_media_type(kind: str) -> str:
    """A media type for the error text of a block of this kind."""
    return "image/png" if kind == "image" else "application/pdf"
