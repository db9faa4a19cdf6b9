"""OpenAI's responses API: the only place that makes its client and its requests, and reads its streams.

The reference is https://platform.openai.com/docs/api-reference/responses. `previous_response_id` is not used:
the conversation is ours, so that any worker can continue it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.jsontext import dumps, replaced, whole_text
from openagents_worker.llm.api_keys import ApiKeys
from openagents_worker.llm.base import Delta, DeltaKind, LLMResponse, ModelRequest
from openagents_worker.llm.codec import TextJoiner
from openagents_worker.llm.endpoints import as_api_keys, bearer_headers, endpoint_for, endpoint_problems
from openagents_worker.llm.openai_background import BackgroundModelClient
from openagents_worker.llm.openai_responses_items import (
    items_to_wire,
    response_from_wire,
    tool_choice_to_wire,
    tool_to_wire,
)
from openagents_worker.llm.options import ProviderOptions, raise_for_problems, read_extras
from openagents_worker.llm.stream_reader import CHARS_PER_PIECE, BaseStreamReader
from openagents_worker.llm.structured import StructuredOutput, output_schema

__all__ = ["OpenAIResponses", "OpenAIResponsesClient", "ResponsesExtras", "StreamedResponse"]

PROVIDER = "openai_responses"
PATH = "/responses"
KEY_ENV = "OPENAI_API_KEY"
DEFAULT_MODEL = "gpt-4o-mini"
MIN_OUTPUT_TOKENS = 16
"""The API rejects a smaller limit."""
ENCRYPTED = "reasoning.encrypted_content"

_REASONING = re.compile(r"(?:.*/)?(o[1-9]|gpt-[5-9](?!-chat))")
"""Models that think. They accept no temperature; their reasoning can be encrypted. gpt-5-chat does not think
and rejects the request for encrypted reasoning."""

_UNCHANGED = (
    "access_programs",
    "context_management",
    "image",
    "metadata",
    "moderation",
    "prompt",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "top_logprobs",
    "truncation",
    "user",
)
"""The options that are sent under their own names."""

CHARS_PER_ITEM = 200  # counts beside the text, so that many empty items reach the limit too


class ResponsesExtras(ProviderOptions):
    """The options that only this provider has."""

    background: bool = Field(
        default=False,
        description="Whether a call goes on at the provider if its worker dies, so that it is not paid for "
        "twice. The provider stores the response.",
    )
    background_poll_ms: int = Field(
        default=2_000,
        ge=50,
        le=60_000,
        description="Milliseconds between two requests for the state of a response in the background.",
    )
    background_options: dict[str, Any] | None = Field(
        default=None, description="Options of a response in the background. null: the provider's default."
    )
    access_programs: dict[str, Any] | None = Field(
        default=None, description="The provider's access programs that are used. null: none."
    )
    context_management: list[dict[str, Any]] | None = Field(
        default=None, description="How the provider shortens a long conversation. null: not."
    )
    image: dict[str, Any] | None = Field(
        default=None, description="How images in requests are read. null: the provider's default."
    )
    include_obfuscation: bool | None = Field(
        default=None,
        description="Whether the events of a stream are filled up to hide their length. null: the provider's "
        "default.",
    )
    moderation: dict[str, Any] | None = Field(
        default=None, description="The moderation of the request and the reply. null: none."
    )
    prompt: dict[str, Any] | None = Field(
        default=None, description="A prompt template that is stored at the provider. null: none."
    )
    prompt_cache_options: dict[str, Any] | None = Field(
        default=None, description="Mode and lifetime of the prompt cache. null: the provider's default."
    )
    tool_choice: str | dict[str, Any] | None = Field(
        default=None,
        description="Whether the model must call a tool, and which one. null: the provider's default.",
    )
    top_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Number of likely tokens with their probabilities at each place. null: none.",
    )
    include: list[str] = Field(
        default=[], description="Further parts of the reply, by OpenAI's names for `include`."
    )
    max_tool_calls: int | None = Field(
        default=None, ge=1, description="Largest number of calls of the provider's own tools. null: no limit."
    )
    metadata: dict[str, str] | None = Field(default=None, description="Metadata of the response. null: none.")
    parallel_tool_calls: bool | None = Field(
        default=None,
        description="Whether a reply may ask for several tools. null: the provider's default.",
    )
    prompt_cache_key: str | None = Field(
        default=None, description="Requests with the same key share a prompt cache. null: none."
    )
    prompt_cache_retention: Literal["in_memory", "24h"] | None = Field(
        default=None, description="How long the prompt cache is kept. null: the provider's default."
    )
    reasoning_effort: str | None = Field(
        default=None,
        description="How much the model thinks: low, medium, high … null: the provider's default.",
    )
    reasoning_summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="The summary of the reasoning that is shown. null: none."
    )
    safety_identifier: str | None = Field(default=None, description="A hash of the end user. null: none.")
    service_tier: str | None = Field(
        default=None, description="Which capacity is used. null: the provider's default."
    )
    store: bool = Field(default=False, description="Whether the provider stores the response.")
    structured_output: StructuredOutput = Field(
        default="auto",
        description="How the schema of the output is sent: json_schema, json_object, text, or auto.",
    )
    top_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the probability that is sampled from. null: the provider's default.",
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="Whether the provider may drop items that do not fit. null: its default."
    )
    user: str | None = Field(default=None, description="An id of the end user. null: none.")
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="How long the answers are. null: the provider's default."
    )


class OpenAIResponsesClient(BackgroundModelClient):
    """A model behind `POST {api_base}/responses`: OpenAI itself, or a server with the same API."""

    def __init__(self, options: LLMOptions, *, api_key: ApiKeys | str | None, **more: Any) -> None:
        """Raises `PluginConfigError` for invalid options. `more`: the arguments of `HttpModelClient`."""
        found, problems = read_extras(options, ResponsesExtras)
        assert isinstance(found, ResponsesExtras)
        keys = as_api_keys(api_key, options, variable=KEY_ENV)
        problems += [*endpoint_problems(options, keys, path=PATH), *_problems_with_options(found)]
        raise_for_problems(problems)
        endpoint = endpoint_for(
            options,
            provider=PROVIDER,
            path=PATH,
            keys=keys,
            key_headers=bearer_headers(options),
        )
        codec = OpenAIResponses(options, found)
        super().__init__(options.model or DEFAULT_MODEL, options, endpoint=endpoint, codec=codec, **more)
        self.keeps_format = found.structured_output != "auto"
        self.poll_ms = found.background_poll_ms if found.background else None


def _problems_with_options(extras: ResponsesExtras) -> list[ConfigProblem]:
    if extras.structured_output == "tool":
        text = "this provider needs no tool for the output"
        return [ConfigProblem(("structured_output",), text, "use json_schema, json_object or text")]
    return []


class OpenAIResponses:
    """The codec of the responses API; see `openagents_worker.llm.http.Codec`."""

    end_of_stream = "[DONE]"
    """Sent by some servers only; the API itself ends the body."""

    def __init__(self, options: LLMOptions, extras: ResponsesExtras) -> None:
        self._options = options
        self._extras = extras

    def body(self, request: ModelRequest, model: str) -> dict[str, Any]:
        """The body of the request, for this model."""
        extras, options = self._extras, self._options
        thinks = self._is_reasoning_model(model)
        limit = options.max_tokens if request.max_tokens is None else request.max_tokens
        temperature = options.temperature if request.temperature is None else request.temperature
        tools = [tool_to_wire(tool) for tool in request.tools or ()]
        include = [*extras.include, *([ENCRYPTED] if thinks and ENCRYPTED not in extras.include else [])]
        reasoning = {"effort": extras.reasoning_effort, "summary": extras.reasoning_summary}
        body = {
            "model": model,
            "input": items_to_wire(request.messages),
            "store": extras.store or extras.background,
            "include": include or None,
            "max_output_tokens": None if limit is None else max(limit, MIN_OUTPUT_TOKENS),
            "temperature": None if thinks else temperature,
            "top_p": None if thinks else extras.top_p,
            "text": self._text(request),
            "reasoning": _without_none(reasoning) or None,
            "tools": tools or None,
            "tool_choice": tool_choice_to_wire(request.tool_choice or extras.tool_choice) if tools else None,
            "parallel_tool_calls": extras.parallel_tool_calls if tools else None,
            "max_tool_calls": extras.max_tool_calls,
            **{name: getattr(extras, name) for name in _UNCHANGED},
            "background": True if extras.background else None,
            "background_options": extras.background_options if extras.background else None,
            **(self._stream_fields() if request.is_streamed else {}),
        }
        return _without_none(body)

    def _stream_fields(self) -> dict[str, Any]:
        obfuscation = self._extras.include_obfuscation
        options = None if obfuscation is None else {"include_obfuscation": obfuscation}
        return {"stream": True, "stream_options": options}

    def _is_reasoning_model(self, model: str) -> bool:
        own = self._options.reasoning_model
        return _REASONING.match(model) is not None if own is None else own

    def _text(self, request: ModelRequest) -> dict[str, Any] | None:
        """The format and the verbosity of the text; None if both are the provider's defaults."""
        way = self._extras.structured_output
        schema = output_schema(request.response_format)
        form: dict[str, Any] | None = None
        if schema is not None and way in ("auto", "json_schema"):
            form = {"type": "json_schema", **schema._asdict()}
        elif schema is not None and way == "json_object":
            form = {"type": "json_object"}
        elif schema is None and request.response_format is not None:
            form = dict(request.response_format)
        return _without_none({"format": form, "verbosity": self._extras.verbosity}) or None

    def is_reply(self, body: Mapping[str, Any]) -> bool:
        """Whether a body has the shape of a response. One that has failed has an error in it."""
        if body.get("object") == "response" and body.get("status"):
            return True
        return isinstance(body.get("output"), list) and not body.get("error")

    def reply(self, body: Any, *, provider: str) -> LLMResponse:
        """Parse a complete body. Raises `LLMError` if it is not a response, or one that has failed."""
        return response_from_wire(body, provider=provider)

    def stream(self, *, max_chars: int) -> StreamedResponse:
        """A reader for the events of one stream; see `StreamedResponse`."""
        return StreamedResponse(max_chars=max_chars)


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _text(value: Any) -> str:
    return whole_text(value) if isinstance(value, str) else ""


class StreamedResponse(BaseStreamReader):
    """Reads the events of a streamed response. Its last event has the whole response."""

    chunk_name = "an event"

    def __init__(self, *, max_chars: int | None = None) -> None:
        super().__init__(max_chars=max_chars)
        self._response: dict[str, Any] = {}
        self._items: list[Any] = []
        self._calls: dict[Any, tuple[int, str]] = {}
        self._joiners: dict[tuple[DeltaKind, Any], TextJoiner] = {}
        self._items_chars = 0  # counted apart: the same text has arrived in pieces before
        self.begun = False
        """Whether any text, reasoning or tool call has arrived."""
        self.finished = False
        """Whether the last event has arrived. A stream that ends before it is incomplete."""
        self.response_id: str | None = None
        self.sequence_number = -1
        """The number of the last event: from there, a stream in the background can be continued."""
        self._resumed_after = -1

    def resume(self) -> None:
        """Another stream continues the response after the last event. Events up to that one are skipped."""
        self._resumed_after = self.sequence_number

    def _add(self, chunk: Mapping[str, Any]) -> list[Delta]:
        number = chunk.get("sequence_number")
        if isinstance(number, int):
            if number <= self._resumed_after:
                return []
            self.sequence_number = number
        match chunk.get("type"):
            case "response.output_text.delta" | "response.refusal.delta":
                return self._piece(DeltaKind.TEXT, chunk)
            case "response.reasoning_summary_text.delta" | "response.reasoning_text.delta":
                return self._piece(DeltaKind.REASONING, chunk)
            case "response.function_call_arguments.delta":
                return self._piece(DeltaKind.ARGUMENTS, chunk)
            case "response.created" | "response.queued" | "response.in_progress":
                self._response = dict(chunk["response"])
                self.response_id = whole_text(str(self._response["id"]))
            case "response.output_item.added":
                self._add_size(CHARS_PER_ITEM)
                if chunk["item"]["type"] == "function_call":
                    self.begun = True
                    self._begin_call(chunk["output_index"], _text(chunk["item"].get("name")))
            case "response.output_item.done":
                self._items_chars += CHARS_PER_ITEM + len(dumps(replaced(chunk["item"])))
                self._check_size(self._items_chars)
                self._items.append(chunk["item"])
            case "response.completed" | "response.incomplete" | "response.failed" | "response.cancelled":
                self._response = dict(chunk["response"])
                self.finished = True
            case _:
                pass
        return []

    def _piece(self, kind: DeltaKind, event: Mapping[str, Any]) -> list[Delta]:
        self.begun = True
        piece, place = event["delta"], event.get("output_index")
        self._add_size(len(piece) + CHARS_PER_PIECE)
        joiner = self._joiners.get((kind, place))
        if joiner is None:
            self._add_size(CHARS_PER_ITEM)
            joiner = self._joiners[kind, place] = TextJoiner()
        text = joiner.add(piece)
        if not text:
            return []
        if kind is not DeltaKind.ARGUMENTS:
            return [Delta(kind, text)]
        return [Delta(kind, text, *self._begin_call(place))]

    def _begin_call(self, place: Any, name: str = "") -> tuple[int, str]:
        """The number and the name of the call at this place. Some servers send only its arguments."""
        return self._calls.setdefault(place, (len(self._calls), name))

    def body(self) -> dict[str, Any]:
        """The response so far. If the last event of the server has no output, the earlier items are used."""
        return {**self._response, "output": self._response.get("output") or self._items}
