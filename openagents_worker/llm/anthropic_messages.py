"""Anthropic's Messages API: the only place that makes its client, and the bodies of its requests.

The reference is https://docs.anthropic.com/en/api/messages. Gateways and other providers implement this API
too; `api_base` says which one is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.llm.anthropic_replies import (
    StreamedMessage,
    container_id,
    joined_parts,
    message_from_wire,
    paused_content,
)
from openagents_worker.llm.anthropic_requests import (
    add_breakpoints,
    container_to_wire,
    in_container,
    messages_to_wire,
    tool_choice_to_wire,
    tools_to_wire,
)
from openagents_worker.llm.api_keys import ApiKeys
from openagents_worker.llm.base import LLMResponse, ModelRequest, current_call
from openagents_worker.llm.endpoints import as_api_keys, endpoint_for, endpoint_problems
from openagents_worker.llm.http import HttpModelClient
from openagents_worker.llm.options import ProviderOptions, raise_for_problems, read_extras
from openagents_worker.llm.reading import Exchange
from openagents_worker.llm.structured import (
    OUTPUT_TOOL,
    OutputSchema,
    StructuredOutput,
    can_be_closed,
    closed_schema,
    output_schema,
    output_tool,
)
from openagents_worker.llm.usage import stated_cost

__all__ = ["AnthropicClient", "AnthropicExtras", "AnthropicMessages"]

PROVIDER = "anthropic"
PATH = "/messages"
KEY_ENV = "ANTHROPIC_API_KEY"
DEFAULT_MODEL = "claude-sonnet-4-5"
OLDEST_VERSION = "2023-06-01"
DEFAULT_MAX_TOKENS = 8_192
"""The API requires `max_tokens`. Every model since Claude 3.5 may write so many; thinking is added to it."""
MIN_THINKING_TOKENS = 1_024
MAX_PAUSES = 10
"""How often a reply is continued that the provider pauses (`pause_turn`): each time, its own tools ran."""

_UNCHANGED = (
    "diagnostics",
    "inference_geo",
    "metadata",
    "service_tier",
    "speed",
    "stop_sequences",
    "user_profile_id",
)
"""The options that are sent under their own names."""
_CANNOT_FORCE = re.compile(r"claude-(?:(?:opus|sonnet)-5-[5-9]|(?:fable|mythos)-5-[1-9])")
"""Models that reject a `tool_choice` that forces a call. All later ones think always."""
_CANNOT_SAMPLE = re.compile(r"claude-(?:opus-4[-.][7-9](?!\d)|[a-z]+-[5-9])")
"""Models that reject `temperature`, `top_p` and `top_k`: Opus since 4.7, and all later families."""
_HAS_JSON_SCHEMA = re.compile(r"claude-(?:(?:opus|sonnet|haiku)-4-[5-9]|opus-4-1|[a-z]+-[5-9])")
"""Models with structured outputs: https://docs.anthropic.com/en/docs/build-with-claude/structured-outputs"""


class AnthropicExtras(ProviderOptions):
    """The options that only this provider has."""

    anthropic_version: Literal["2023-06-01", "2026-10-21"] = Field(
        default="2023-06-01",
        description="The version of the API. 2026-10-21 has no temperature, top_p and top_k.",
    )
    betas: list[str] = Field(default=[], description="Values of the header anthropic-beta.")
    container: str | dict[str, Any] | None = Field(
        default=None, description="The container in which the provider's own tools run. null: a new one."
    )
    diagnostics: dict[str, Any] | None = Field(
        default=None, description="Which diagnostics the reply has. null: none."
    )
    inference_geo: str | None = Field(
        default=None, description="The region in which the model runs. null: that of the workspace."
    )
    tool_choice: str | dict[str, Any] | None = Field(
        default=None,
        description="Whether the model must call a tool, and which one. null: the provider's default.",
    )
    user_profile_id: str | None = Field(
        default=None, description="The profile of another party that the request is made for. null: none."
    )
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="How much the model thinks and writes. null: the provider's default."
    )
    metadata: dict[str, Any] | None = Field(
        default=None, description="Metadata of the request, for example user_id. null: none."
    )
    parallel_tool_calls: bool | None = Field(
        default=None,
        description="Whether a reply may ask for several tools. null: the provider's default.",
    )
    prompt_caching: bool = Field(
        default=True, description="Whether the provider's prompt cache is used, with breakpoints set by us."
    )
    cache_ttl: Literal["5m", "1h"] = Field(
        default="5m", description="How long the prompt cache keeps what it was written."
    )
    service_tier: Literal["auto", "standard_only"] | None = Field(
        default=None, description="Which capacity is used. null: the provider's default."
    )
    speed: Literal["standard", "fast"] | None = Field(
        default=None,
        description="The inference speed, if the model has several. null: the provider's default.",
    )
    stop_sequences: list[str] | None = Field(
        default=None, description="Texts at which the reply ends. null: none."
    )
    structured_output: StructuredOutput = Field(
        default="auto",
        description="How the schema of the output is sent: json_schema, tool, text, or auto.",
    )
    thinking: dict[str, Any] | None = Field(
        default=None,
        description='Extended thinking, for example {"type": "enabled", "budget_tokens": 4096}. null: none.',
    )
    top_k: int | None = Field(
        default=None,
        ge=0,
        description="Number of tokens that are sampled from. null: the provider's default.",
    )
    top_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the probability that is sampled from. null: the provider's default.",
    )


class AnthropicClient(HttpModelClient):
    """A model behind `POST {api_base}/messages`: Anthropic itself, or a server with the same API."""

    def __init__(self, options: LLMOptions, *, api_key: ApiKeys | str | None, **more: Any) -> None:
        """Raises `PluginConfigError` for invalid options. `more`: the arguments of `HttpModelClient`."""
        found, problems = read_extras(options, AnthropicExtras)
        assert isinstance(found, AnthropicExtras)
        keys = as_api_keys(api_key, options, variable=KEY_ENV)
        problems += [*endpoint_problems(options, keys, path=PATH), *_conflicts(options, found)]
        raise_for_problems(problems)
        headers: dict[str, str] = {"anthropic-version": found.anthropic_version}
        headers |= {"anthropic-beta": ",".join(found.betas)} if found.betas else {}
        endpoint = endpoint_for(
            options,
            provider=PROVIDER,
            path=PATH,
            versioned=True,
            headers=headers,
            keys=keys,
            key_headers=lambda key: {"x-api-key": key},
        )
        codec = self._messages = AnthropicMessages(options, found)
        super().__init__(options.model or DEFAULT_MODEL, options, endpoint=endpoint, codec=codec, **more)
        self.keeps_format = found.structured_output != "auto"

    def largest_cost_usd(self, request: ModelRequest) -> float | None:
        """With the `max_tokens` that are sent: the API requires them."""
        most = self._messages.max_tokens(request.max_tokens)
        return super().largest_cost_usd(replace(request, max_tokens=most))

    async def _send_within_limits(self, exchange: Exchange) -> LLMResponse:
        """One try. A reply that the provider has paused is continued, also by the next try: each part is a
        request of its own for the limits of the fleet."""
        while True:
            with _stays_at_work(is_needed=bool(exchange.parts)):
                reply = await super()._send_within_limits(exchange)
            if not exchange.is_paused:
                break
        if not exchange.parts:
            return reply
        whole = joined_parts([*exchange.parts, exchange.last_part])
        return self._codec.reply(whole, provider=self.provider_name)

    async def _reply_body(self, exchange: Exchange) -> Any:
        """The body of one part. After a paused one, the next request asks for the rest."""
        body = await super()._reply_body(exchange)
        content = paused_content(body) if len(exchange.parts) < MAX_PAUSES else None
        exchange.is_paused = content is not None
        if content is None:
            exchange.last_part = body
            return body
        exchange.parts.append(body)
        exchange.part_costs.append(stated_cost(exchange.headers))
        messages = [*exchange.body["messages"], {"role": "assistant", "content": content}]
        exchange.body = {**exchange.body, "messages": messages}
        if (container := in_container(exchange.body.get("container"), container_id(body))) is not None:
            exchange.body["container"] = container
        return body


@contextmanager
def _stays_at_work(*, is_needed: bool) -> Iterator[None]:
    """Inside, the run is not parked for a limit, but waits in its call: the parts before are paid for."""
    call = current_call.get()
    if call is None or not is_needed:
        yield
        return
    token = current_call.set(replace(call, may_suspend=False))
    try:
        yield
    finally:
        current_call.reset(token)


def _conflicts(options: LLMOptions, extras: AnthropicExtras) -> list[ConfigProblem]:
    """Options that the API does not accept together."""
    problems = []
    sampling = {"temperature": options.temperature, "top_p": extras.top_p, "top_k": extras.top_k}
    given = [name for name, value in sampling.items() if value is not None]
    if given and extras.anthropic_version != OLDEST_VERSION:
        text = f"version {extras.anthropic_version} of the API has no {given[0]}"
        problems.append(ConfigProblem((given[0],), text, f"remove it, or use {OLDEST_VERSION}"))
    if options.temperature is not None and options.temperature > 1:
        problems.append(ConfigProblem(("temperature",), "this provider accepts 0 to 1"))
    thinking = extras.thinking
    if thinking is not None:
        if thinking.get("type") not in ("enabled", "adaptive", "disabled", "between_tools"):
            text = "its type is not enabled, adaptive, between_tools or disabled"
            problems.append(ConfigProblem(("thinking",), text))
        budget = thinking.get("budget_tokens")
        if thinking.get("type") == "enabled" and not (
            isinstance(budget, int) and budget >= MIN_THINKING_TOKENS
        ):
            text = f"budget_tokens must be a number from {MIN_THINKING_TOKENS}"
            problems.append(ConfigProblem(("thinking",), text))
        elif _is_thinking_enabled(thinking) and options.temperature not in (None, 1):
            text = "with thinking, the API accepts only 1"
            problems.append(ConfigProblem(("temperature",), text, "remove it"))
        elif isinstance(budget, int) and options.max_tokens is not None and options.max_tokens <= budget:
            text = f"it must be greater than thinking.budget_tokens ({budget})"
            problems.append(ConfigProblem(("max_tokens",), text))
    if extras.structured_output == "json_object":
        text = "this provider has no JSON mode"
        problems.append(ConfigProblem(("structured_output",), text, "use json_schema, tool or text"))
    return problems


def _is_thinking_enabled(thinking: Mapping[str, Any] | None) -> bool:
    return thinking is not None and thinking.get("type") in ("enabled", "adaptive")


class AnthropicMessages:
    """The codec of the Messages API; see `openagents_worker.llm.http.Codec`."""

    end_of_stream = "[DONE]"
    """Sent by some gateways only; the API itself ends the body."""

    def __init__(self, options: LLMOptions, extras: AnthropicExtras) -> None:
        self._options = options
        self._extras = extras

    def body(self, request: ModelRequest, model: str) -> dict[str, Any]:
        """The body of the request, for this model."""
        extras = self._extras
        system, messages = messages_to_wire(request.messages)
        tools = tools_to_wire(request.tools or (), messages)
        choice = tool_choice_to_wire(
            request.tool_choice or extras.tool_choice if request.tools else "none" if tools else None,
            parallel=extras.parallel_tool_calls,
            has_tools=bool(tools),
        )
        output_config: dict[str, Any] = {"effort": extras.effort} if extras.effort else {}
        schema = output_schema(request.response_format)
        if schema is not None:
            way = self._way_of_output(model, schema)
            if way == "json_schema":
                output_config["format"] = {"type": "json_schema", "schema": closed_schema(schema.schema)}
            elif way == "tool":
                forces = not _is_thinking_enabled(extras.thinking) and not _CANNOT_FORCE.search(model)
                own = tools if request.tools else []
                tools, choice = self._with_output_tool(own, choice, schema, forces=forces)
        if extras.prompt_caching:
            ttl = {"ttl": extras.cache_ttl} if extras.cache_ttl != "5m" else {}
            add_breakpoints(system, tools, messages, {"type": "ephemeral", **ttl})
        body = {
            "model": model,
            "max_tokens": self.max_tokens(request.max_tokens),
            "messages": messages,
            "system": system or None,
            "tools": tools or None,
            "tool_choice": choice,
            "thinking": extras.thinking,
            "output_config": output_config or None,
            "container": container_to_wire(extras.container, request.messages),
            **self._sampling(model, request.temperature),
            **{name: getattr(extras, name) for name in _UNCHANGED},
            "stream": True if request.is_streamed else None,
        }
        return {name: value for name, value in body.items() if value is not None}

    def max_tokens(self, wanted: int | None) -> int:
        """The tokens that the reply to a request may have, with the thinking."""
        limit = self._options.max_tokens if wanted is None else wanted
        budget = (self._extras.thinking or {}).get("budget_tokens")
        thinking = budget if isinstance(budget, int) else 0
        if limit is None:
            return DEFAULT_MAX_TOKENS + thinking
        return limit if limit > thinking else limit + thinking

    def _sampling(self, model: str, temperature: float | None) -> dict[str, Any]:
        """The sampling parameters; none for a model or a version of the API, or with thinking, that rejects
        them."""
        extras = self._extras
        if extras.anthropic_version != OLDEST_VERSION or _CANNOT_SAMPLE.search(model):
            return {}
        temperature = self._options.temperature if temperature is None else temperature
        if _is_thinking_enabled(extras.thinking):
            temperature = None
        elif temperature is not None:
            temperature = min(temperature, 1.0)
        return {"temperature": temperature, "top_p": extras.top_p, "top_k": extras.top_k}

    # --- structured output -------------------------------------------------------------------------------

    def _way_of_output(self, model: str, schema: OutputSchema) -> str:
        way = self._extras.structured_output
        if way != "auto":
            return way
        return "json_schema" if _HAS_JSON_SCHEMA.search(model) and can_be_closed(schema.schema) else "tool"

    def _with_output_tool(
        self,
        tools: list[dict[str, Any]],
        choice: dict[str, Any] | None,
        schema: OutputSchema,
        *,
        forces: bool,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The tools and the choice with a tool for the output. `forces`: the model must call a tool. With
        thinking, the API does not allow that."""
        (tool,) = tools_to_wire([output_tool(schema)], ())
        if not forces:
            return [*tools, tool], choice if choice and choice["type"] != "none" else {"type": "auto"}
        parallel = {name: value for name, value in (choice or {}).items() if name.startswith("disable_")}
        if not tools:
            return [tool], {"type": "tool", "name": OUTPUT_TOOL, **parallel}
        return [*tools, tool], {"type": "any", **parallel}

    # --- replies -----------------------------------------------------------------------------------------

    def is_reply(self, body: Mapping[str, Any]) -> bool:
        """Whether a body has the shape of a message."""
        is_message = body.get("type") == "message" or isinstance(body.get("content"), list)
        return is_message and not body.get("error")

    def reply(self, body: Any, *, provider: str) -> LLMResponse:
        """Parse a complete body. Raises `LLMResponseError` if it is not a message."""
        return message_from_wire(body, provider=provider)

    def stream(self, *, max_chars: int) -> StreamedMessage:
        """A reader that assembles the events of one stream; see `StreamedMessage`."""
        return StreamedMessage(max_chars=max_chars)
