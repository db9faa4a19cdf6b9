"""Endpoints: the only place that checks the headers of an agent, and collects the secrets in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.llm.reading import Endpoint
from openagents_worker.secret_forms import remember_secret, remember_secrets_of_url
from openagents_worker.secret_names import is_secrets_name

__all__ = [
    "AZURE_HOSTS",
    "endpoint_for",
    "endpoint_problems",
    "header_problems",
    "headers_of",
    "is_http_url",
    "secrets_of",
    "with_query",
]

AZURE_HOSTS = (".openai.azure.com", ".cognitiveservices.azure.com", ".azure-api.net")
"""Hosts of Azure, which takes a key in the header `api-key`."""

SHORTEST_SECRET = 8  # characters; a shorter word in a header is not a key

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_VERSION = re.compile(r"/v\d+(?:beta\d*)?$")
_JSON = {"content-type": "application/json", "accept": "application/json, text/event-stream"}


def endpoint_problems(options: LLMOptions, api_key: str | None, *, path: str) -> Iterator[ConfigProblem]:
    """What is wrong with the URL, the key and the headers of an agent. `path`: below `api_base`."""
    base = options.api_base or ""
    if not is_http_url(base):
        hint = f"the URL before {path}, for example https://api.example.com/v1"
        yield ConfigProblem(("api_base",), "not an http(s) URL" if base else "missing", hint)
    if options.stream_endpoint is not None:
        problem = "this provider has one URL for all requests"
        yield ConfigProblem(("stream_endpoint",), problem, "remove it")
    yield from header_problems(options, api_key)


def header_problems(options: LLMOptions, api_key: str | None) -> Iterator[ConfigProblem]:
    """Invalid headers. httpx would report them only at the first request, and would show their values."""
    if api_key and not _HEADER_VALUE.fullmatch(api_key):
        problem = "the key has characters that are not allowed in an HTTP header"
        yield ConfigProblem(("api_key_env",), problem, "the usual reason is a newline at its end")
    for name, value in options.extra_headers.items():
        if not _HEADER_NAME.fullmatch(name):
            yield ConfigProblem(("extra_headers", name), "not a valid name of an HTTP header")
        elif not _HEADER_VALUE.fullmatch(value):
            problem = "the value has characters that are not allowed in an HTTP header"
            yield ConfigProblem(("extra_headers", name), problem)


def headers_of(options: LLMOptions, own: Mapping[str, str]) -> dict[str, str]:
    """The headers of every request: those of the provider, with the key, and those of the agent."""
    return {**_JSON, **own, **{name.lower(): value for name, value in options.extra_headers.items()}}


def secrets_of(options: LLMOptions, api_key: str | None) -> list[str]:
    """Strings that no error message may contain: the key, and each word in the agent's headers with at least
    `SHORTEST_SECRET` characters. Logs and events mask them from now on."""
    remember_secret(api_key)
    remember_secrets_of_url(options.api_base or "")
    for name, value in options.extra_headers.items():
        if is_secrets_name(name):
            for word in value.split():
                remember_secret(word)
    words = [word for value in options.extra_headers.values() for word in value.split()]
    return [*([api_key] if api_key else []), *(word for word in words if len(word) >= SHORTEST_SECRET)]


def endpoint_for(
    options: LLMOptions,
    *,
    provider: str,
    path: str,
    key_env: str,
    headers: Mapping[str, str],
    api_key: str | None,
    query: Mapping[str, Any] | None = None,
    versioned: bool = False,
) -> Endpoint:
    """The endpoint of a provider. `headers`: those of the provider, with the key.

    The path is `{api_base}{path}`. A base URL that ends in `path` is used as it is. `versioned`: `/v1` is
    added to a base URL without a version, because the provider's own packages do so. A query is kept.
    """
    url = httpx.URL(options.api_base or "")
    base = url.path.rstrip("/")
    if not base.endswith(path):
        version = "/v1" if versioned and not _VERSION.search(base) else ""
        url = url.copy_with(path=f"{base}{version}{path}")
    address = with_query(str(url), query or {})
    return Endpoint(
        provider=provider,
        url=address,
        stream_url=address,
        headers=headers_of(options, headers),
        secrets=secrets_of(options, api_key),
        key_env=key_env,
    )


def with_query(url: str, query: Mapping[str, Any]) -> str:
    """The URL with further query parameters."""
    return str(httpx.URL(url).copy_merge_params(dict(query))) if query else url


def is_http_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host)
