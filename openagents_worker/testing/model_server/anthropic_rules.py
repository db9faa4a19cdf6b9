"""The rules of Anthropic's API, with its error messages: the only place that checks a Messages request.

Anthropic's API is checked with pydantic too, so its messages consist of the field's path and pydantic's text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from openagents_worker.testing.model_server.anthropic_blocks import (
    Block,
    Message,
    StrictModel,
    Text,
    Thinking,
    ToolResult,
    ToolUse,
    as_blocks,
)
from openagents_worker.testing.model_server.connection import ReceivedRequest
from openagents_worker.testing.model_server.wire_format import InvalidRequest, seal

__all__ = ["Message", "MessagesRequest", "Text", "Tool", "ToolResult", "ToolUse", "checked_request"]


class _ObjectSchema(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["object"]


class Tool(StrictModel):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")
    input_schema: _ObjectSchema
    description: str | None = None
    type: Literal["custom"] | None = None
    allowed_callers: JsonValue = None
    cache_control: JsonValue = None
    defer_loading: bool = False
    eager_input_streaming: bool | None = None
    input_examples: JsonValue = None
    strict: bool = False


class _AnyChoice(StrictModel):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool = False


class _NamedChoice(StrictModel):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool = False


class MessagesRequest(StrictModel):
    model: str
    messages: list[Message]
    max_tokens: int = Field(ge=1)
    system: Annotated[list[Text], BeforeValidator(as_blocks)] = Field(default_factory=list)
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Annotated[_AnyChoice | _NamedChoice, Field(discriminator="type")] | None = None
    stream: bool = False
    stop_sequences: list[str] = Field(default_factory=list)
    cache_control: JsonValue = None
    container: JsonValue = None
    diagnostics: JsonValue = None
    inference_geo: JsonValue = None
    metadata: JsonValue = None
    output_config: JsonValue = None
    service_tier: JsonValue = None
    speed: JsonValue = None
    thinking: JsonValue = None
    user_profile_id: JsonValue = None


class _SampledRequest(MessagesRequest):
    temperature: float = Field(default=1, ge=0, le=1)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1, ge=0, le=1)


VERSIONS: Mapping[str, type[MessagesRequest]] = {
    "2023-06-01": _SampledRequest,
    "2026-10-21": MessagesRequest,  # https://platform.claude.com/docs/en/api/migration-2026-10-21
}


OLDEST = "2023-06-01"
CANNOT_SAMPLE = re.compile(r"claude-(?:opus-4-[7-9](?!\d)|[a-z]+-[5-9])")
"""Models without sampling parameters: https://platform.claude.com/docs/en/about-claude/models/migration-guide"""
_DATED = re.compile(r"[a-z_]+_20[0-9]{6}")
MAX_BREAKPOINTS = 4
MIN_THINKING_TOKENS = 1024
NOT_AT_ROOT = frozenset({"anyOf", "oneOf", "allOf"})
"""Keywords that the schema of a tool cannot have at its root."""


def checked_request(request: ReceivedRequest) -> tuple[MessagesRequest, Mapping[str, Any]]:
    """Parse and check a request; also returns its original body. Raises `InvalidRequest`. Needs no key."""
    version = request.headers.get("anthropic-version")
    if version is None:
        raise InvalidRequest("anthropic-version: header is required")
    if version not in VERSIONS:
        raise InvalidRequest(f'anthropic-version: "{version}" is not a valid version')
    try:
        body = json.loads(request.body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}") from error
    own, others = _split_tools(body)
    try:
        parsed = VERSIONS[version].model_validate(own)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InvalidRequest(": ".join([*_path(problem["loc"]), problem["msg"]])) from error
    if any(not block.text for block in parsed.system):
        raise InvalidRequest("system: text content blocks must be non-empty")
    _check_tools(parsed, others)
    _check_messages(parsed.messages)
    _check_blocks(parsed.messages, version)
    _check_pairs(parsed.messages)
    _check_thinking(parsed)
    _check_sampling(parsed)
    _check_breakpoints(body)
    return parsed, body


def _check_sampling(request: MessagesRequest) -> None:
    given = [name for name in ("temperature", "top_p", "top_k") if name in request.model_fields_set]
    if given and CANNOT_SAMPLE.search(request.model):
        raise InvalidRequest(f"`{given[0]}` is deprecated for this model.")


def _path(places: Sequence[str | int]) -> list[str]:
    return [".".join(map(str, places))] if places else []


def _split_tools(body: Any) -> tuple[Any, list[str]]:
    """The body without the provider's own tools, whose fields are not checked, and their names."""
    tools = body.get("tools") if isinstance(body, Mapping) else None
    if not isinstance(tools, list):
        return body, []
    others = [tool for tool in tools if _is_of_provider(tool)]
    return {**body, "tools": [tool for tool in tools if tool not in others]}, [
        tool["name"] for tool in others
    ]


def _is_of_provider(tool: Any) -> bool:
    """Whether a tool has a type of the provider with a date, for example `web_search_20250305`."""
    if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str):
        return False
    return isinstance(kind := tool.get("type"), str) and _DATED.fullmatch(kind) is not None


def _check_tools(request: MessagesRequest, others: Sequence[str]) -> None:
    for index, tool in enumerate(request.tools):
        if not NOT_AT_ROOT.isdisjoint(tool.input_schema.model_extra or {}):
            raise InvalidRequest(
                f"tools.{index}.custom.input_schema: input_schema does not support oneOf, allOf, or anyOf at"
                " the top level"
            )
    names = [*(tool.name for tool in request.tools), *others]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools: Tool names must be unique.")
    if request.tool_choice is not None and not names:
        raise InvalidRequest("tool_choice may only be specified while providing tools.")
    if isinstance(request.tool_choice, _NamedChoice) and request.tool_choice.name not in names:
        raise InvalidRequest(f"Tool '{request.tool_choice.name}' not found in provided tools")


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidRequest("messages: at least one message is required")
    before = ""
    for index, message in enumerate(messages):
        if message.role == "system" and before != "user":  # newer models accept it after a user message
            raise InvalidRequest(
                'messages: Unexpected role "system". The Messages API accepts a top-level `system` parameter,'
                ' not "system" as an input message role.'
            )
        is_prefill = message.role == "assistant" and index == len(messages) - 1
        if not message.content and not is_prefill:
            raise InvalidRequest(
                f"messages.{index}: all messages must have non-empty content"
                " except for the optional final assistant message"
            )
        if any(isinstance(block, Text) and not block.text for block in message.content):
            raise InvalidRequest("messages: text content blocks must be non-empty")
        before = message.role
    _check_end(messages[-1])


def _check_end(last: Message) -> None:
    """Check a reply that the model continues."""
    end = last.content[-1] if last.content else None
    if last.role == "assistant" and isinstance(end, Text) and end.text != end.text.rstrip():
        raise InvalidRequest("messages: final assistant content cannot end with trailing whitespace")


def _check_blocks(messages: Sequence[Message], version: str) -> None:
    """Check the places of blocks, and that each thinking block is unchanged."""
    newer = version != OLDEST
    for index, message in enumerate(messages):
        for number, block in enumerate(message.content):
            place = f"messages.{index}.content.{number}"
            if isinstance(block, Thinking):
                if message.role != "assistant":
                    raise InvalidRequest(f"{place}: `thinking` blocks can only be in `assistant` messages")
                if block.signature != seal(block.thinking):
                    raise InvalidRequest(f"{place}: Invalid `signature` in `thinking` block")
            if newer and message.role == "assistant" and block.type == "document":
                raise InvalidRequest(f"{place}: `document` blocks can only be in `user` messages")
            if newer and message.role == "user" and isinstance(block, Text) and block.citations:
                raise InvalidRequest(f"{place}.text.citations: Extra inputs are not permitted")


def _check_thinking(request: MessagesRequest) -> None:
    """The rules of extended thinking: its budget, and a last reply that begins with its thinking block."""
    thinking = request.thinking
    if not isinstance(thinking, Mapping) or thinking.get("type") not in ("enabled", "adaptive"):
        return
    if thinking["type"] == "enabled":
        budget = thinking.get("budget_tokens")
        if not isinstance(budget, int) or budget < MIN_THINKING_TOKENS:
            raise InvalidRequest(
                "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024"
            )
        if budget >= request.max_tokens:
            raise InvalidRequest("`max_tokens` must be greater than `thinking.budget_tokens`.")
        _check_last_reply(request.messages)
    choice = request.tool_choice
    if choice is not None and choice.type in ("any", "tool"):
        raise InvalidRequest("Thinking may not be enabled when tool_choice forces tool use.")


def _check_last_reply(messages: Sequence[Message]) -> None:
    """Check that the reply whose calls are being answered begins with its thinking."""
    if len(messages) < 2 or not any(isinstance(block, ToolResult) for block in messages[-1].content):
        return
    at = max(index for index, message in enumerate(messages) if message.role == "assistant")
    while at > 0 and messages[at - 1].role == "assistant":
        at -= 1
    first = messages[at].content[0].type
    if first not in ("thinking", "redacted_thinking"):
        raise InvalidRequest(
            f"messages.{at}.content.0.type: Expected `thinking` or `redacted_thinking`, but found `{first}`."
            " When `thinking` is enabled, a final `assistant` message must start with a thinking block"
            " (preceeding the lastmost set of `tool_use` and `tool_result` blocks)."
        )


def _check_breakpoints(body: Any) -> None:
    found = sum(1 for _ in _breakpoints(body))
    if found > MAX_BREAKPOINTS:
        raise InvalidRequest(f"A maximum of 4 blocks with cache_control may be provided. Found {found}.")


def _breakpoints(value: Any) -> Iterator[Any]:
    """Every `cache_control` of the request, except inside schemas and arguments."""
    if isinstance(value, list):
        for each in value:
            yield from _breakpoints(each)
    elif isinstance(value, Mapping):
        if value.get("cache_control") is not None:
            yield value["cache_control"]
        for name in ("system", "tools", "messages", "content"):
            yield from _breakpoints(value.get(name))


# --- calls and their results -----------------------------------------------------------------------------


SIDES = {"tool_use": "assistant", "tool_result": "user", "server_tool_use": "assistant"}


class _Placed(NamedTuple):
    place: str
    block: Block


class _Turn(NamedTuple):
    """Consecutive messages of one role, which the API treats as one message."""

    place: str
    role: str
    blocks: Sequence[_Placed]

    def results(self) -> Iterator[tuple[str, str]]:
        return ((place, b.tool_use_id) for place, b in self.blocks if isinstance(b, ToolResult))

    def calls(self) -> Iterator[tuple[str, str]]:
        return ((place, b.id) for place, b in self.blocks if isinstance(b, ToolUse))

    def answered(self) -> set[str]:
        """The ids of the calls whose results are at the beginning of the turn, before any other block."""
        found: set[str] = set()
        for _, block in self.blocks:
            if not isinstance(block, ToolResult):
                break
            found.add(block.tool_use_id)
        return found


def _turns(messages: Sequence[Message]) -> Iterator[_Turn]:
    for role, group in groupby(enumerate(messages), lambda pair: pair[1].role):
        same_role = list(group)
        blocks = [
            _Placed(f"messages.{index}.content.{number}", block)
            for index, message in same_role
            for number, block in enumerate(message.content)
        ]
        yield _Turn(f"messages.{same_role[0][0]}", role, blocks)


def _check_pairs(messages: Sequence[Message]) -> None:
    """Check that the results of a turn's calls are at the beginning of the next turn, one for each call."""
    turns = list(_turns(messages))
    open_calls: list[str] = []
    ids: set[str] = set()
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        _check_sides(turn)
        _check_results(turn, open_calls)
        for place, call_id in turn.calls():
            if call_id in ids:
                raise InvalidRequest(f"{place}: `tool_use` ids must be unique")
            ids.add(call_id)
        open_calls = [call_id for _, call_id in turn.calls()]
        answered = set() if following is None else following.answered()
        if missing := [call_id for call_id in open_calls if call_id not in answered]:
            raise InvalidRequest(
                f"{turn.place}: `tool_use` ids were found without `tool_result` blocks immediately after:"
                f" {', '.join(missing)}. Each `tool_use` block must have a corresponding `tool_result` block"
                " in the next message."
            )


def _check_sides(turn: _Turn) -> None:
    for place, block in turn.blocks:
        side = SIDES.get(block.type, turn.role)
        if side != turn.role:
            raise InvalidRequest(f"{place}: `{block.type}` blocks can only be in `{side}` messages")


def _check_results(turn: _Turn, open_calls: Sequence[str]) -> None:
    seen: set[str] = set()
    for place, call_id in turn.results():
        if call_id not in open_calls:
            raise InvalidRequest(
                f"{place}: unexpected `tool_use_id` found in `tool_result` blocks: {call_id}. Each"
                " `tool_result` block must have a corresponding `tool_use` block in the previous message."
            )
        if call_id in seen:
            raise InvalidRequest(
                f"{place}: each tool_use must have a single result. Found multiple `tool_result` blocks"
                f" with id: {call_id}"
            )
        seen.add(call_id)
