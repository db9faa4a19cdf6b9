"""The rules of chat completion APIs: the only place that checks a request in OpenAI's format.

They are OpenAI's rules plus those of stricter servers with the same API (no blank text, unique ids). So a
request that passes here is accepted by every such server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from openagents_worker.testing.model_server.wire_format import InvalidRequest

__all__ = ["check_image_url", "check_request", "check_root"]

FIELDS = {
    "system": {"content", "name"},
    "developer": {"content", "name"},
    "user": {"content", "name"},
    "assistant": {"content", "name", "tool_calls", "function_call", "refusal", "audio", "reasoning_content"},
    "tool": {"content", "tool_call_id", "name"},
}
"""The fields of a message besides its role."""

IMAGE_DATA = tuple(f"data:image/{name};base64," for name in ("png", "jpeg", "gif", "webp"))
NOT_AT_ROOT = frozenset({"anyOf", "oneOf", "allOf", "enum", "not"})
"""Keywords that a schema cannot have at its root."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def check_request(body: Any) -> None:
    """Raises `InvalidRequest` that names the invalid field, as the API does."""
    if not isinstance(body, Mapping):
        raise InvalidRequest("The request body must be a JSON object.")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("Invalid 'messages': expected an array of at least one message.")
    for at, message in enumerate(messages):
        _check_message(f"messages[{at}]", message)
    _check_pairs(messages)
    _check_tools(body)


# --- one message -----------------------------------------------------------------------------------------


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"Invalid type for '{where}': expected an object.")
    role = message.get("role")
    if role not in FIELDS:
        raise InvalidRequest(
            f"Invalid value for '{where}.role': {role!r}. Supported values: {', '.join(FIELDS)}."
        )
    unknown = message.keys() - FIELDS[role] - {"role"}
    if unknown:
        raise InvalidRequest(f"Unknown parameter: '{where}.{min(unknown)}'.")
    _check_content(where, role, message)
    if message.get("function_call") is not None:
        raise InvalidRequest(f"Invalid value for '{where}.function_call': it was replaced by 'tool_calls'.")
    if "tool_calls" in message:
        _check_calls(f"{where}.tool_calls", message["tool_calls"])
    if role == "tool" and not _is_text(message.get("tool_call_id")):
        raise InvalidRequest(f"Missing required parameter: '{where}.tool_call_id'.")


def _check_content(where: str, role: str, message: Mapping[str, Any]) -> None:
    content = message.get("content")
    if content is None:
        if role == "assistant" and (message.get("tool_calls") or message.get("refusal")):
            return
        raise InvalidRequest(f"Invalid value for '{where}.content': expected a string, got null.")
    if isinstance(content, str):
        may_be_blank = role == "tool" or message.get("tool_calls")
        if not may_be_blank and not content.strip():
            raise InvalidRequest(f"Invalid value for '{where}.content': it must not be empty.")
    elif not isinstance(content, list) or not content or not all(map(_is_part, content)):
        raise InvalidRequest(f"Invalid type for '{where}.content': expected a string or an array of parts.")
    else:
        for at, part in enumerate(content):
            _check_media(f"{where}.content[{at}]", part)


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping) or not _is_text(part.get("type")):
        return False
    return part["type"] != "text" or _is_text(part.get("text"))


def _check_media(where: str, part: Mapping[str, Any]) -> None:
    """Check a part with an image, a file or audio."""
    found = part.get(part["type"])
    fields = found if isinstance(found, Mapping) else {}
    match part["type"]:
        case "image_url":
            check_image_url(f"{where}.image_url", fields.get("url"))
        case "file" if not fields.get("file_id"):
            if not fields.get("file_data") or not fields.get("filename"):
                raise InvalidRequest(f"Missing required parameter: '{where}.file.file_id'.")
            if not str(fields["file_data"]).startswith("data:application/pdf;base64,"):
                raise InvalidRequest(
                    f"Invalid file data: '{where}.file.file_data'. Expected a base64-encoded data URL with an"
                    " application/pdf MIME type."
                )
        case "input_audio" if fields.get("format") not in ("wav", "mp3") or not fields.get("data"):
            raise InvalidRequest(
                f"Invalid value for '{where}.input_audio.format'. Supported values are: 'wav' and 'mp3'."
            )


def check_image_url(where: str, url: Any) -> None:
    """Check the URL of an image, which may have its bytes."""
    if not _is_text(url):
        raise InvalidRequest(f"Missing required parameter: '{where}'.")
    if url.startswith("data:") and not url.startswith(IMAGE_DATA):
        raise InvalidRequest(
            "You uploaded an unsupported image. Please make sure your image has of one the following formats:"
            " ['png', 'jpeg', 'gif', 'webp']."
        )


def _check_calls(where: str, calls: Any) -> None:
    if not isinstance(calls, list) or not calls:
        raise InvalidRequest(f"Invalid '{where}': expected an array with a minimum length of 1.")
    for at, call in enumerate(calls):
        place = f"{where}[{at}]"
        if not isinstance(call, Mapping) or call.get("type") != "function":
            raise InvalidRequest(f"Invalid value for '{place}.type': expected 'function'.")
        if not _is_text(call.get("id")):
            raise InvalidRequest(f"Missing required parameter: '{place}.id'.")
        function = call.get("function")
        if not isinstance(function, Mapping):
            raise InvalidRequest(f"Missing required parameter: '{place}.function'.")
        _check_name(f"{place}.function.name", function.get("name"))
        if not _is_object(function.get("arguments")):
            raise InvalidRequest(
                f"Invalid value for '{place}.function.arguments': expected the JSON of an object."
            )


def _check_name(where: str, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"Invalid '{where}': string does not match pattern. "
            "Expected a string that matches the pattern '^[a-zA-Z0-9_-]{1,64}$'."
        )


def _is_object(text: Any) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


# --- calls and their results -----------------------------------------------------------------------------


def _check_pairs(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check that the results of a message's calls follow it, one for each call."""
    ids: set[str] = set()
    open_calls: list[str] = []
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            call_id = message["tool_call_id"]
            if call_id not in open_calls:
                raise InvalidRequest(
                    f"Invalid parameter: messages[{at}] with role 'tool' must be a response to a preceding "
                    f"message with 'tool_calls', which has no open call {call_id!r}."
                )
            open_calls.remove(call_id)
            continue
        _check_none_is_open(open_calls)
        open_calls = [call["id"] for call in message.get("tool_calls") or ()]
        if len(set(open_calls)) < len(open_calls) or ids & set(open_calls):
            raise InvalidRequest(f"Invalid 'messages[{at}].tool_calls': ids of tool calls must be unique.")
        ids.update(open_calls)
    _check_none_is_open(open_calls)


def _check_none_is_open(open_calls: Sequence[str]) -> None:
    if open_calls:
        raise InvalidRequest(
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            "'tool_call_id'. The following tool_call_ids did not have response messages: "
            + ", ".join(open_calls)
        )


# --- tools -----------------------------------------------------------------------------------------------


def _check_tools(body: Mapping[str, Any]) -> None:
    tools = body.get("tools")
    if tools is None:
        for name in ("tool_choice", "parallel_tool_calls"):
            if body.get(name) is not None:
                raise InvalidRequest(
                    f"Invalid value for '{name}': it is only allowed when 'tools' are specified."
                )
        return
    if not isinstance(tools, list) or not tools:
        raise InvalidRequest("Invalid 'tools': expected an array with a minimum length of 1.")
    names: set[str] = set()
    for at, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise InvalidRequest(f"Missing required parameter: 'tools[{at}].function'.")
        _check_name(f"tools[{at}].function.name", function.get("name"))
        if function["name"] in names:
            raise InvalidRequest(f"Invalid 'tools[{at}].function.name': names of tools must be unique.")
        names.add(function["name"])
        check_root(f"function '{function['name']}'", function.get("parameters", {"type": "object"}))


def check_root(where: str, schema: Any) -> None:
    """Check the root of the schema of a tool, or of the output. `where` says which one it is."""
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        raise InvalidRequest(
            f"Invalid schema for {where}: schema must be a JSON Schema of 'type: \"object\"'."
        )
    if not NOT_AT_ROOT.isdisjoint(schema):
        raise InvalidRequest(
            f"Invalid schema for {where}: schema must have type 'object' and not have"
            " 'oneOf'/'anyOf'/'allOf'/'enum'/'not' at the top level."
        )
