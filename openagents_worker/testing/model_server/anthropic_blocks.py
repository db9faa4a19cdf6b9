"""The blocks of Anthropic's messages: the only place that defines which fields they have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

__all__ = ["Block", "Message", "StrictModel", "Text", "Thinking", "ToolResult", "ToolUse", "as_blocks"]

_CallId = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$")]


def as_blocks(content: Any) -> Any:
    """A text as a list of one text block; an empty text as an empty list."""
    if not isinstance(content, str):
        return content
    return [{"type": "text", "text": content}] if content else []


class StrictModel(BaseModel):
    """Rejects unknown fields and converted types, as the API does."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Text(StrictModel):
    type: Literal["text"]
    text: str
    cache_control: JsonValue = None
    citations: JsonValue = None


class _Opaque(BaseModel):
    """A content block that scripts do not use. Its fields are not checked."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["redacted_thinking", "search_result"]


class _ImageData(StrictModel):
    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str = Field(min_length=1)


class _PdfData(StrictModel):
    type: Literal["base64"]
    media_type: Literal["application/pdf"]
    data: str = Field(min_length=1)


class _PlainText(StrictModel):
    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: str = Field(min_length=1)


class _Url(StrictModel):
    type: Literal["url"]
    url: str = Field(pattern=r"^https?://")


class _UploadedFile(StrictModel):
    type: Literal["file"]
    file_id: str


class _Blocks(StrictModel):
    type: Literal["content"]
    content: JsonValue


class _ImageBlock(StrictModel):
    type: Literal["image"]
    source: Annotated[_ImageData | _Url | _UploadedFile, Field(discriminator="type")]
    cache_control: JsonValue = None


class _DocumentBlock(StrictModel):
    type: Literal["document"]
    source: Annotated[_PdfData | _PlainText | _Url | _UploadedFile | _Blocks, Field(discriminator="type")]
    title: str | None = None
    context: str | None = None
    citations: JsonValue = None
    cache_control: JsonValue = None


class _OfProvidersTools(BaseModel):
    """A block of the provider's own tools: a call, its result, or a file. Its fields are not checked."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal[
        "bash_code_execution_tool_result",
        "code_execution_tool_result",
        "container_upload",
        "mcp_tool_result",
        "mcp_tool_use",
        "server_tool_use",
        "text_editor_code_execution_tool_result",
        "tool_search_tool_result",
        "web_fetch_tool_result",
        "web_search_tool_result",
    ]
    input: dict[str, JsonValue] = Field(default_factory=dict)


class Thinking(StrictModel):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUse(StrictModel):
    type: Literal["tool_use"]
    id: _CallId
    name: str
    input: dict[str, JsonValue]
    cache_control: JsonValue = None
    caller: JsonValue = None


_ResultBlock = Annotated[Text | _ImageBlock | _DocumentBlock | _Opaque, Field(discriminator="type")]


class ToolResult(StrictModel):
    type: Literal["tool_result"]
    tool_use_id: _CallId
    content: Annotated[list[_ResultBlock], BeforeValidator(as_blocks)] = Field(default_factory=list)
    is_error: bool = False
    cache_control: JsonValue = None


Block = Text | _ImageBlock | _DocumentBlock | ToolUse | ToolResult | Thinking | _Opaque | _OfProvidersTools
_MessageBlock = Annotated[Block, Field(discriminator="type")]


class Message(StrictModel):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[_MessageBlock], BeforeValidator(as_blocks)]
