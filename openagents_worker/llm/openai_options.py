"""Options of `openai_compatible`: the only place that builds its URLs and headers from the agents file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import httpx
from pydantic import Field

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.llm.options import ProviderOptions, raise_for_problems, read_extras
from openagents_worker.llm.structured import StructuredOutput
from openagents_worker.secret_forms import remember_secret, remember_secrets_of_url
from openagents_worker.secret_names import is_secrets_name

__all__ = ["OpenAIExtras", "OpenAIRequestOptions"]

SHORTEST_SECRET = 8  # characters; a shorter word in a header is not a key

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_EXAMPLE = "the URL before /chat/completions, for example https://api.openai.com/v1"


class OpenAIExtras(ProviderOptions):
    """The options that only this provider has. They are sent in the request body unchanged, except for
    `structured_output`."""

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


@dataclass(frozen=True, slots=True)
class OpenAIRequestOptions:
    """URLs, headers and body fields that all requests of a client share."""

    url: str
    stream_url: str
    headers: dict[str, str]
    extras: dict[str, Any]
    secrets: list[str]
    """Strings that no error message may contain: the key, and each word in the extra headers with at least
    `SHORTEST_SECRET` characters."""

    @classmethod
    def checked(cls, options: LLMOptions, api_key: str | None) -> Self:
        """Check the options of an agent. Raises `PluginConfigError` that lists every problem."""
        extras, problems = read_extras(options, OpenAIExtras)
        problems += [*_url_problems(options), *_header_problems(options, api_key)]
        raise_for_problems(problems)
        url, stream_url = _endpoints(options)
        headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
        headers |= {"authorization": f"Bearer {api_key}"} if api_key else {}
        headers |= {name.lower(): value for name, value in options.extra_headers.items()}
        remember_secret(api_key)
        remember_secrets_of_url(options.api_base or "")
        for name, value in options.extra_headers.items():
            if is_secrets_name(name):
                for word in value.split():
                    remember_secret(word)
        words = [word for value in options.extra_headers.values() for word in value.split()]
        secrets = [*([api_key] if api_key else []), *(word for word in words if len(word) >= SHORTEST_SECRET)]
        return cls(url, stream_url, headers, extras.model_dump(exclude_none=True), secrets)


def _endpoints(options: LLMOptions) -> tuple[str, str]:
    """The URLs for complete and for streamed replies."""
    base = (options.api_base or "").rstrip("/")
    plain = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
    streamed = options.stream_endpoint or plain
    return plain, streamed if "://" in streamed else f"{base}/{streamed.lstrip('/')}"


def _url_problems(options: LLMOptions) -> Iterator[ConfigProblem]:
    base = (options.api_base or "").rstrip("/")
    responses = "openai_compatible uses the chat completions API, not the responses API"
    if options.openai_api_style == "responses":
        yield ConfigProblem(("openai_api_style",), responses, 'use the provider "openai_responses"')
    if not base:
        yield ConfigProblem(("api_base",), "missing", _EXAMPLE)
    elif not _is_http_url(base):
        yield ConfigProblem(("api_base",), "not an http(s) URL", _EXAMPLE)
    elif base.endswith("/responses"):
        yield ConfigProblem(("api_base",), responses, _EXAMPLE)
    elif not _is_http_url(_endpoints(options)[1]):
        yield ConfigProblem(
            ("stream_endpoint",), "not an http(s) URL", "a full URL, or a path below api_base"
        )


def _is_http_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host)


def _header_problems(options: LLMOptions, api_key: str | None) -> Iterator[ConfigProblem]:
    """Invalid headers. httpx would report them only at the first request, and would show their values."""
    if api_key and not _HEADER_VALUE.fullmatch(api_key):
        hint = "the usual reason is a newline at its end"
        problem = "the key has characters that are not allowed in an HTTP header"
        yield ConfigProblem(("api_key_env",), problem, hint)
    for name, value in options.extra_headers.items():
        if not _HEADER_NAME.fullmatch(name):
            yield ConfigProblem(("extra_headers", name), "not a valid name of an HTTP header")
        elif not _HEADER_VALUE.fullmatch(value):
            problem = "the value has characters that are not allowed in an HTTP header"
            yield ConfigProblem(("extra_headers", name), problem)
