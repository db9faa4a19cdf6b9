"""Results of MCP servers: the only place that converts them to results of tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from mimetypes import guess_type
from typing import Any

from openagents_worker.errors import PermanentToolError, ToolError
from openagents_worker.jsontext import dumps, replaced
from openagents_worker.redaction import safe_message

__all__ = ["original_result", "prompt_result", "resource_result", "text_of_error", "tool_result"]

MAX_ERROR_CHARS = 4_000
MAX_BLOCKS = 1_000


def tool_result(result: Mapping[str, Any], tool_id: str) -> Any:
    """The result of a call: the structured content, one text, or a list of blocks.

    Raises `ToolError` with the text of the server if it reports an error, as the model should see it.
    """
    if result.get("resultType") == "input_required":
        raise PermanentToolError("the MCP server asks for input, which is not supported", tool_id)
    content = _blocks(result.get("content"))
    if result.get("isError"):
        raise ToolError(text_of_error(result), tool_id)
    structured = result.get("structuredContent")
    if structured is not None and all(block["type"] == "text" for block in content):
        return structured  # the text repeats it
    if not content:
        return structured if structured is not None else ""
    if all(block["type"] == "text" for block in content):
        return "\n".join(block["text"] for block in content)
    return content


def original_result(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result as the original SDK has it."""
    texts = [
        block["text"] if block["type"] == "text" else _json_of({**block, "data": "…"})
        for block in _blocks(result.get("content"))
    ]
    return {"content": texts, "isError": bool(result.get("isError"))}


def text_of_error(result: Mapping[str, Any]) -> str:
    texts = [block["text"] for block in _blocks(result.get("content")) if block["type"] == "text"]
    return safe_message("\n".join(texts) or "the tool of the MCP server has failed", MAX_ERROR_CHARS)


def resource_result(result: Mapping[str, Any]) -> Any:
    """The contents of a resource: one text, or a list of blocks."""
    contents = result.get("contents")
    blocks = [
        block
        for each in (contents if isinstance(contents, list) else [])[:MAX_BLOCKS]
        if isinstance(each, dict) and (block := _of_resource(each)) is not None
    ]
    if all(block["type"] == "text" for block in blocks):
        return "\n".join(block["text"] for block in blocks)
    return blocks


def prompt_result(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a prompt: role and text, or blocks."""
    messages = result.get("messages")
    found = []
    for message in (messages if isinstance(messages, list) else [])[:MAX_BLOCKS]:
        if isinstance(message, dict):
            blocks = _blocks([message.get("content")])
            is_text = len(blocks) == 1 and blocks[0]["type"] == "text"
            found.append(
                {"role": str(message.get("role")), "content": blocks[0]["text"] if is_text else blocks}
            )
    return found


def _blocks(content: Any) -> list[dict[str, Any]]:
    """The blocks of a result, as messages to models have them."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return []
    return [block for each in content[:MAX_BLOCKS] if isinstance(each, dict) and (block := _block(each))]


def _block(found: Mapping[str, Any]) -> dict[str, Any] | None:
    match found.get("type"):
        case "text":
            if not isinstance(text := found.get("text"), str):
                raise ToolError("the answer of the MCP server is not valid: a block without its text")
            return {"type": "text", "text": text}
        case "image" | "audio" if not isinstance(found.get("data"), str):
            raise ToolError("the answer of the MCP server is not valid: a block without its data")
        case "image":
            return {"type": "image", "data": found.get("data"), "media_type": _media_type(found)}
        case "audio":
            return {"type": "file", "data": found.get("data"), "media_type": _media_type(found)}
        case "resource" if isinstance(resource := found.get("resource"), dict):
            return _of_resource(resource)
        case "resource_link":
            shown = {
                key: found[key] for key in ("uri", "name", "title", "description", "mimeType") if key in found
            }
            return {"type": "text", "text": _json_of(shown)}
        case _:  # of a later version of the protocol
            return {"type": "text", "text": _json_of(found)}


def _json_of(value: Mapping[str, Any]) -> str:
    """A value of the server as JSON, with replacements for NaN and for integers that are too large."""
    return dumps(replaced(dict(value)))


def _of_resource(resource: Mapping[str, Any]) -> dict[str, Any] | None:
    if isinstance(text := resource.get("text"), str):
        return {"type": "text", "text": text}
    if isinstance(blob := resource.get("blob"), str):
        media_type = _media_type(resource)
        kind = "image" if media_type.startswith("image/") else "file"
        block = {"type": kind, "data": blob, "media_type": media_type}
        if kind == "file" and isinstance(uri := resource.get("uri"), str):
            block["name"] = uri.rpartition("/")[2][:256] or uri[:256]
        return block
    return None


def _media_type(found: Mapping[str, Any]) -> str:
    """The media type that the server names, without parameters; or else that of the name of a resource."""
    named = found.get("mimeType")
    if isinstance(named, str) and (media_type := named.partition(";")[0].strip()):
        return media_type
    uri = found.get("uri")
    guessed = guess_type(uri)[0] if isinstance(uri, str) else None
    return guessed or "application/octet-stream"
