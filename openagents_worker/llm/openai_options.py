"""Options of `openai_compatible`. The only place that makes addresses and headers of what the file says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import httpx
from pydantic import Field

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.llm.options import ProviderOptions, extras_of, refuse
from openagents_worker.secret_forms import remember_secret, remember_secrets_of_url
from openagents_worker.secret_names import is_secrets_name

__all__ = ["OpenAIExtras", "OpenAIRequestOptions"]

SHORTEST_SECRET = 8  # characters; a shorter word of a header is no key

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_EXAMPLE = "the address before /chat/completions, for example https://api.openai.com/v1"


class OpenAIExtras(ProviderOptions):
    """The options that only this provider knows; they go into the request as they are."""

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
    """What every request of a client has in common."""

    url: str
    stream_url: str
    headers: dict[str, str]
    extras: dict[str, Any]
    secrets: list[str]
    """What no message may show: the key, and every word of the extra headers that is long enough for one."""

    @classmethod
    def checked(cls, options: LLMOptions, api_key: str | None) -> Self:
        """Raises `PluginConfigError` that tells of everything that cannot work."""
        extras, problems = extras_of(options, OpenAIExtras)
        problems += [*_problems_of_address(options), *_problems_of_headers(options, api_key)]
        refuse(problems)
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
    """The addresses for plain and for streamed replies."""
    base = (options.api_base or "").rstrip("/")
    plain = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
    streamed = options.stream_endpoint or plain
    return plain, streamed if "://" in streamed else f"{base}/{streamed.lstrip('/')}"


def _problems_of_address(options: LLMOptions) -> Iterator[ConfigProblem]:
    base = (options.api_base or "").rstrip("/")
    responses = "openai_compatible speaks chat completions, not the responses API"
    if options.openai_api_style == "responses":
        yield ConfigProblem(("openai_api_style",), responses, 'set it to "chat_completions"')
    if not base:
        yield ConfigProblem(("api_base",), "missing", _EXAMPLE)
    elif not _is_http(base):
        yield ConfigProblem(("api_base",), "not an http(s) address", _EXAMPLE)
    elif base.endswith("/responses"):
        yield ConfigProblem(("api_base",), responses, _EXAMPLE)
    elif not _is_http(_endpoints(options)[1]):
        yield ConfigProblem(
            ("stream_endpoint",), "not an http(s) address", "a whole one, or a path below api_base"
        )


def _is_http(address: str) -> bool:
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host)


def _problems_of_headers(options: LLMOptions, api_key: str | None) -> Iterator[ConfigProblem]:
    """httpx would find them with the first request, and quote the value in its error."""
    if api_key and not _HEADER_VALUE.fullmatch(api_key):
        hint = "a line end at its end is the usual reason"
        yield ConfigProblem(("api_key_env",), "the key has characters that an HTTP header cannot carry", hint)
    for name, value in options.extra_headers.items():
        if not _HEADER_NAME.fullmatch(name):
            yield ConfigProblem(("extra_headers", name), "not a name of an HTTP header")
        elif not _HEADER_VALUE.fullmatch(value):
            yield ConfigProblem(("extra_headers", name), "has characters that an HTTP header cannot carry")
