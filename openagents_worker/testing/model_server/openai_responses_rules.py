"""The rules of OpenAI's responses API, with its error messages: the only place that checks such a request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from openagents_worker.testing.model_server.openai_rules import check_image_url, check_root
from openagents_worker.testing.model_server.wire_format import InvalidRequest, seal

__all__ = ["check_response_request", "items_of"]

FIELDS = frozenset(
    {
        *(
            "background",
            "include",
            "input",
            "instructions",
            "max_output_tokens",
            "max_tool_calls",
            "metadata",
        ),
        *("model", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "reasoning"),
        *("safety_identifier", "service_tier", "store", "stream", "stream_options", "temperature", "text"),
        *("tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user"),
        *("access_programs", "background_options", "context_management", "image", "moderation"),
        "prompt_cache_options",
    }
)
NOT_HERE = ("conversation", "previous_response_id", "prompt")
"""Fields of the real API that refer to what it has stored. This server has not."""

OWN_TOOLS = frozenset(
    {
        *("apply_patch", "code_interpreter", "computer_use_preview", "custom", "file_search"),
        *("image_generation", "local_shell", "mcp", "shell", "web_search", "web_search_preview"),
    }
)
"""The types of the provider's own tools. Their fields are not checked."""

ITEM_FIELDS = {
    "message": {"id", "type", "role", "content", "status", "phase"},
    "function_call": {
        *("id", "type", "call_id", "name", "arguments", "status"),
        *("async", "caller", "namespace"),
    },
    "function_call_output": {"id", "type", "call_id", "output", "status", "caller"},
    "reasoning": {"id", "type", "summary", "content", "encrypted_content", "status"},
}
ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fc", "reasoning": "rs"}
USER_PARTS = {
    "input_text": ("text",),
    "input_image": ("image_url", "file_id"),
    "input_file": ("file_data", "file_id", "file_url"),
}
"""The types of parts in a message to the model. A part must have at least one of the named fields."""
OPEN_XML = "application/vnd.openxmlformats-officedocument"
FILE_TYPES = frozenset(
    {
        *("application/pdf", "application/json", "application/rtf", "application/msword"),
        *("application/vnd.ms-excel", "application/vnd.ms-powerpoint"),
        "application/vnd.oasis.opendocument.text",
    }
)
"""The types of files beside texts and Office's: https://platform.openai.com/docs/guides/file-inputs"""
ASSISTANT_PARTS = {"output_text": ("text",), "refusal": ("refusal",)}

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MIN_OUTPUT_TOKENS = 16


def items_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The input as a list of items, each with its type."""
    value = body["input"]
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return [{**item, "type": item.get("type") or "message"} for item in value]


def check_response_request(body: Any) -> None:
    """Raises `InvalidRequest` that names the invalid parameter, as the API does."""
    if not isinstance(body, Mapping):
        raise InvalidRequest("The request body must be a JSON object.")
    for name in body:
        if name in NOT_HERE and body[name] is not None:
            raise InvalidRequest(
                f"Unsupported parameter: '{name}' refers to what this server does not store."
            )
        if name not in FIELDS and name not in NOT_HERE:
            raise InvalidRequest(f"Unknown parameter: '{name}'.")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise InvalidRequest("Missing required parameter: 'model'.")
    _check_settings(body)
    _check_tools(body)
    _check_format(body)
    _check_input(body.get("input"))
    items = items_of(body)
    _check_pairs(items)
    _check_reasoning(items)


def _check_settings(body: Mapping[str, Any]) -> None:
    limit = body.get("max_output_tokens")
    if limit is not None and (not isinstance(limit, int) or limit < MIN_OUTPUT_TOKENS):
        raise InvalidRequest(
            "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, but got"
            f" {limit} instead."
        )
    temperature = body.get("temperature")
    if temperature is not None and (not isinstance(temperature, int | float) or not 0 <= temperature <= 2):
        raise InvalidRequest("Invalid 'temperature': expected a number between 0 and 2.")
    if body.get("background") and body.get("store") is False:
        raise InvalidRequest("Background mode requires store to be true.")
    for name in ("instructions", "prompt_cache_key", "user"):
        if body.get(name) is not None and not isinstance(body[name], str):
            raise InvalidRequest(f"Invalid type for '{name}': expected a string.")


# --- tools and the format of the text --------------------------------------------------------------------


def _check_tools(body: Mapping[str, Any]) -> None:
    tools = body.get("tools") or ()
    names: set[str] = set()
    others = [tool["type"] for tool in tools if isinstance(tool, Mapping) and tool.get("type") in OWN_TOOLS]
    for at, tool in enumerate(tools):
        if isinstance(tool, Mapping) and tool.get("type") in OWN_TOOLS:
            continue
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise InvalidRequest(f"Invalid value for 'tools[{at}].type': expected 'function'.")
        if "function" in tool:
            raise InvalidRequest(f"Unknown parameter: 'tools[{at}].function'.")
        _check_name(f"tools[{at}].name", tool.get("name"))
        if tool["name"] in names:
            raise InvalidRequest(f"Invalid 'tools[{at}].name': names of tools must be unique.")
        names.add(tool["name"])
        for name in ("parameters", "strict"):
            if name not in tool:
                raise InvalidRequest(f"Missing required parameter: 'tools[{at}].{name}'.")
        _check_schema(f"function '{tool['name']}'", tool["parameters"], strict=bool(tool["strict"]))
    choice = body.get("tool_choice")
    if choice is None or choice in ("none", "auto"):
        return
    if choice == "required" and (names or others):
        return
    if isinstance(choice, Mapping) and choice.get("type") in others:
        return
    if isinstance(choice, Mapping) and choice.get("type") == "function" and choice.get("name") in names:
        return
    raise InvalidRequest(f"Invalid value for 'tool_choice': {json.dumps(choice)} is not among the tools.")


def _check_schema(where: str, schema: Any, *, strict: bool) -> None:
    check_root(where, schema)
    if strict:
        for path, part in _objects(schema, ()):
            if part.get("additionalProperties") is not False:
                raise InvalidRequest(
                    f"Invalid schema for {where}: In context={path}, 'additionalProperties' is required to be"
                    " supplied and to be false."
                )
            if set(part.get("required", ())) != set(part.get("properties", {})):
                raise InvalidRequest(
                    f"Invalid schema for {where}: In context={path}, 'required' is required to be supplied"
                    " and to be an array including every key in properties."
                )


def _objects(schema: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The objects of a schema and their places."""
    if not isinstance(schema, Mapping):
        return
    if schema.get("type") == "object" or "properties" in schema:
        yield path, schema
    for name, part in (schema.get("properties") or {}).items():
        yield from _objects(part, (*path, "properties", name))
    for name, part in (schema.get("$defs") or {}).items():
        yield from _objects(part, (*path, "$defs", name))
    yield from _objects(schema.get("items"), (*path, "items"))
    for at, part in enumerate(schema.get("anyOf") or ()):
        yield from _objects(part, (*path, "anyOf", str(at)))


def _check_format(body: Mapping[str, Any]) -> None:
    text = body.get("text") or {}
    form = text.get("format") if isinstance(text, Mapping) else None
    if form is None:
        return
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise InvalidRequest("Invalid value for 'text.format.type': expected 'text' or 'json_schema'.")
    if kind == "json_schema":
        if not isinstance(form.get("name"), str):
            raise InvalidRequest("Missing required parameter: 'text.format.name'.")
        _check_name("text.format.name", form["name"])
        strict = bool(form.get("strict"))
        _check_schema(f"response_format '{form['name']}'", form.get("schema"), strict=strict)


def _check_name(where: str, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"Invalid '{where}': string does not match pattern. "
            "Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'."
        )


# --- items -----------------------------------------------------------------------------------------------


def _check_input(value: Any) -> None:
    if isinstance(value, str) and value:
        return
    if not isinstance(value, list) or not value:
        raise InvalidRequest("Missing required parameter: 'input'.")
    for at, item in enumerate(value):
        _check_item(f"input[{at}]", item)


def _check_item(where: str, item: Any) -> None:
    if not isinstance(item, Mapping):
        raise InvalidRequest(f"Invalid type for '{where}': expected an object.")
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind not in ITEM_FIELDS:
        supported = ", ".join(f"'{name}'" for name in ITEM_FIELDS)
        raise InvalidRequest(f"Invalid value: {kind!r}. Supported values are: {supported}. ('{where}')")
    for name in item:
        if name not in ITEM_FIELDS[kind]:
            raise InvalidRequest(f"Unknown parameter: '{where}.{name}'.")
    item_id = item.get("id")
    if item_id is not None and not str(item_id).startswith(ID_PREFIXES[kind]):
        raise InvalidRequest(
            f"Invalid '{where}.id': '{item_id}'. Expected an ID that begins with '{ID_PREFIXES[kind]}'."
        )
    match kind:
        case "message":
            _check_message(where, item)
        case "function_call":
            _check_call(where, item)
        case "function_call_output":
            _check_text(f"{where}.call_id", item.get("call_id"))
            if not isinstance(item.get("output"), str):
                _check_parts(f"{where}.output", item.get("output"), USER_PARTS)
        case "reasoning":
            if not isinstance(item.get("summary"), list):
                raise InvalidRequest(f"Missing required parameter: '{where}.summary'.")


def _check_message(where: str, message: Mapping[str, Any]) -> None:
    role = message.get("role")
    if role not in ("assistant", "system", "developer", "user"):
        raise InvalidRequest(
            f"Invalid value: {role!r}. Supported values are: 'assistant', 'system', 'developer', and 'user'."
        )
    content = message.get("content")
    if isinstance(content, str):
        if not content.strip():
            raise InvalidRequest(f"Invalid value for '{where}.content': it must not be empty.")
        return
    _check_parts(f"{where}.content", content, ASSISTANT_PARTS if role == "assistant" else USER_PARTS)


def _check_parts(where: str, parts: Any, known: Mapping[str, Sequence[str]]) -> None:
    if not isinstance(parts, list) or not parts:
        raise InvalidRequest(f"Invalid type for '{where}': expected a string or an array of parts.")
    for at, part in enumerate(parts):
        kind = str(part.get("type")) if isinstance(part, Mapping) else ""
        if kind not in known:
            supported = ", ".join(f"'{name}'" for name in known)
            raise InvalidRequest(
                f"Invalid value: {kind!r}. Supported values are: {supported}. ('{where}[{at}]')"
            )
        if not any(isinstance(part.get(name), str) for name in known[kind]):
            raise InvalidRequest(f"Missing required parameter: '{where}[{at}].{known[kind][0]}'.")
        if kind == "input_image" and "file_id" not in part:
            check_image_url(f"{where}[{at}].image_url", part["image_url"])
        if kind == "input_file" and "file_data" in part:
            _check_file_data(f"{where}[{at}]", part)


def _check_file_data(where: str, part: Mapping[str, Any]) -> None:
    if not part.get("filename"):
        raise InvalidRequest(f"Missing required parameter: '{where}.filename'.")
    media_type = str(part["file_data"]).removeprefix("data:").partition(";base64,")[0]
    if media_type not in FILE_TYPES and not media_type.startswith(("text/", f"{OPEN_XML}.")):
        raise InvalidRequest(
            f"Invalid file data: '{where}.file_data'. The MIME type '{media_type}' is not supported."
        )


def _check_call(where: str, call: Mapping[str, Any]) -> None:
    _check_text(f"{where}.call_id", call.get("call_id"))
    _check_name(f"{where}.name", call.get("name"))
    if not isinstance(call.get("arguments"), str):
        raise InvalidRequest(f"Invalid type for '{where}.arguments': expected a string.")


def _check_text(where: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest(f"Missing required parameter: '{where}'.")


# --- calls and their results -----------------------------------------------------------------------------


def _check_pairs(items: Sequence[Mapping[str, Any]]) -> None:
    """Check that each call has one output after it, and each output a call before it."""
    open_calls: list[str] = []
    seen: set[str] = set()
    for item in items:
        if item["type"] == "function_call":
            if item["call_id"] in seen:
                raise InvalidRequest(f"Duplicate item found with call_id {item['call_id']}.")
            seen.add(item["call_id"])
            open_calls.append(item["call_id"])
        elif item["type"] == "function_call_output":
            if item["call_id"] not in open_calls:
                raise InvalidRequest(
                    f"No tool call found for function call output with call_id {item['call_id']}."
                )
            open_calls.remove(item["call_id"])
    if open_calls:
        raise InvalidRequest(f"No tool output found for function call {open_calls[0]}.")


def _check_reasoning(items: Sequence[Mapping[str, Any]]) -> None:
    """Check that each reasoning item is one that this server has sent, and is followed by its reply."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        if item["type"] != "reasoning":
            continue
        name = item.get("id", "")
        if not item.get("encrypted_content"):
            raise InvalidRequest(
                f"Item with id '{name}' not found. Items are not persisted when `store` is set to false. Try"
                " again with `store` set to true, or remove this item from your input."
            )
        text = "".join(part.get("text", "") for part in item["summary"])
        if item["encrypted_content"] != seal(text):
            raise InvalidRequest(f"The encrypted content for item {name} could not be verified.")
        is_reply = following is not None and (
            following["type"] in ("function_call", "reasoning") or following.get("role") == "assistant"
        )
        if not is_reply:
            raise InvalidRequest(
                f"Item '{name}' of type 'reasoning' was provided without its required following item."
            )
