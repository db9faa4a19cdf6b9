"""Options of `openai_compatible`: the only place that builds its URLs and headers from the agents file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.llm.api_keys import ApiKeys
from openagents_worker.llm.endpoints import (
    as_api_keys,
    header_problems,
    headers_of,
    is_http_url,
    secrets_of,
)
from openagents_worker.llm.options import ProviderOptions, raise_for_problems, read_extras
from openagents_worker.llm.structured import StructuredOutput

__all__ = ["OpenAIExtras", "OpenAIRequestOptions"]

_EXAMPLE = "the URL before /chat/completions, for example https://api.openai.com/v1"


class OpenAIExtras(ProviderOptions):
    """The options that only this provider has. They are sent in the request body unchanged, except for
    `structured_output` and `stream_options`."""

    structured_output: StructuredOutput = Field(
        default="auto",
        description="How the schema of the output is sent: json_schema, json_object, tool, text, or auto.",
    )

    seed: int | None = Field(default=None, description="Seed of the sampling. null: none.")
    top_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the probability that is sampled from. null: the provider's default.",
    )
    parallel_tool_calls: bool | None = Field(
        default=None,
        description="Whether a reply may ask for several tools. null: the provider's default.",
    )
    tool_choice: str | dict[str, Any] | None = Field(
        default=None,
        description="Whether the model must call a tool, and which one. null: the provider's default.",
    )
    stop: str | list[str] | None = Field(
        default=None, description="Texts at which the reply ends. null: none."
    )
    presence_penalty: float | None = Field(
        default=None,
        ge=-2,
        le=2,
        description="Penalty for tokens that occurred already, from -2 to 2. null: the provider's default.",
    )
    frequency_penalty: float | None = Field(
        default=None,
        ge=-2,
        le=2,
        description="Penalty for tokens by how often they occurred, from -2 to 2. null: the provider's "
        "default.",
    )
    logit_bias: dict[str, float] | None = Field(
        default=None, description="Bias of single tokens, by their number: -100 to 100. null: none."
    )
    reasoning_effort: str | None = Field(
        default=None,
        description="How much the model thinks: low, medium, high … null: the provider's default.",
    )
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="How long the answers are. null: the provider's default."
    )
    service_tier: str | None = Field(
        default=None, description="Which capacity is used. null: the provider's default."
    )
    prompt_cache_key: str | None = Field(
        default=None, description="Requests with the same key share a prompt cache. null: none."
    )
    prompt_cache_retention: Literal["in_memory", "24h"] | None = Field(
        default=None, description="How long the prompt cache is kept. null: the provider's default."
    )
    user: str | None = Field(default=None, description="An id of the end user. null: none.")
    safety_identifier: str | None = Field(default=None, description="A hash of the end user. null: none.")
    metadata: dict[str, str] | None = Field(default=None, description="Metadata of the request. null: none.")
    store: bool | None = Field(
        default=None, description="Whether the provider stores the reply. null: the provider's default."
    )
    audio: dict[str, Any] | None = Field(
        default=None, description="Voice and format of spoken output. null: none."
    )
    logprobs: bool | None = Field(
        default=None, description="Whether the reply has the probabilities of its tokens. null: no."
    )
    top_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Number of likely tokens with their probabilities at each place; with logprobs. null: 0.",
    )
    moderation: dict[str, Any] | None = Field(
        default=None, description="The moderation of the request and the reply. null: none."
    )
    prompt_cache_options: dict[str, Any] | None = Field(
        default=None, description="Mode and lifetime of the prompt cache. null: the provider's default."
    )
    modalities: list[str] | None = Field(
        default=None, description="Kinds of output, for example text. null: the provider's default."
    )
    prediction: dict[str, Any] | None = Field(
        default=None, description="The expected reply, which makes it faster. null: none."
    )
    web_search_options: dict[str, Any] | None = Field(
        default=None, description="Options of the provider's own web search. null: none."
    )
    stream_options: bool = Field(
        default=True,
        description="Whether a streamed request asks for token counts. false: for a server that rejects "
        "stream_options; the counts are then estimated.",
    )


@dataclass(frozen=True, slots=True)
class OpenAIRequestOptions:
    """URLs, headers and body fields that all requests of a client share."""

    url: str
    stream_url: str
    headers: dict[str, str]
    extras: dict[str, Any]
    keys: ApiKeys
    secrets: list[str]
    """Strings that no error message may contain."""

    @classmethod
    def checked(cls, options: LLMOptions, api_key: ApiKeys | str | None) -> Self:
        """Check the options of an agent. Raises `PluginConfigError` that lists every problem."""
        extras, problems = read_extras(options, OpenAIExtras)
        keys = as_api_keys(api_key, options, variable="OPENAI_API_KEY")
        problems += [*_url_problems(options), *header_problems(options, keys)]
        raise_for_problems(problems)
        url, stream_url = _endpoints(options)
        headers, secrets = headers_of(options, {}), secrets_of(options, keys)
        return cls(url, stream_url, headers, extras.model_dump(exclude_none=True), keys, secrets)


def _endpoints(options: LLMOptions) -> tuple[str, str]:
    """The URLs for complete and for streamed replies. A query in `api_base`, as Azure's, is kept."""
    base, mark, query = (options.api_base or "").partition("?")
    base = base.rstrip("/")
    plain = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
    streamed = options.stream_endpoint
    if streamed is None:
        return plain + mark + query, plain + mark + query
    return (
        plain + mark + query,
        streamed if "://" in streamed else f"{base}/{streamed.lstrip('/')}{mark}{query}",
    )


def _url_problems(options: LLMOptions) -> Iterator[ConfigProblem]:
    base = (options.api_base or "").partition("?")[0].rstrip("/")
    responses = "openai_compatible uses the chat completions API, not the responses API"
    if options.openai_api_style == "responses":
        yield ConfigProblem(("openai_api_style",), responses, 'use the provider "openai_responses"')
    if not base:
        yield ConfigProblem(("api_base",), "missing", _EXAMPLE)
    elif not is_http_url(base):
        yield ConfigProblem(("api_base",), "not an http(s) URL", _EXAMPLE)
    elif base.endswith("/responses"):
        yield ConfigProblem(("api_base",), responses, _EXAMPLE)
    elif not is_http_url(_endpoints(options)[1]):
        yield ConfigProblem(
            ("stream_endpoint",), "not an http(s) URL", "a full URL, or a path below api_base"
        )
