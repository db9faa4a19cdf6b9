"""Endpoints: the only place that checks the headers of an agent, and collects the secrets in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.llm.api_keys import ApiKeys, EnvironmentKey, is_header_value
from openagents_worker.llm.reading import Endpoint
from openagents_worker.secret_forms import remember_secret, remember_secrets_of_url
from openagents_worker.secret_names import is_secrets_name

__all__ = [
    "AZURE_HOSTS",
    "as_api_keys",
    "bearer_headers",
    "endpoint_for",
    "endpoint_problems",
    "header_problems",
    "headers_of",
    "is_http_url",
    "secrets_of",
    "with_query",
]

AZURE_HOSTS = (
    ".openai.azure.com",
    ".openai.azure.us",
    ".openai.azure.cn",
    ".cognitiveservices.azure.com",
    ".cognitiveservices.azure.us",
    ".cognitiveservices.azure.cn",
    ".azure-api.net",
    ".azure-api.us",
    ".azure-api.cn",
)
"""Hosts of Azure, also of its clouds for the US government and China. It takes a key in the header
`api-key`."""

SHORTEST_SECRET = 8  # characters; a shorter word in a header is not a key

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VERSION = re.compile(r"/v\d+(?:beta\d*)?$")
_JSON = {"content-type": "application/json", "accept": "application/json, text/event-stream"}


def as_api_keys(api_key: ApiKeys | str | None, options: LLMOptions, *, variable: str) -> ApiKeys:
    """Where the key comes from. A text is the value of a variable: of `variable`, unless the agent names
    another one."""
    if api_key is None or isinstance(api_key, str):
        named = options.api_key_env
        return EnvironmentKey(named or variable, api_key or None, is_named=named is not None)
    return api_key


def bearer_headers(options: LLMOptions) -> Callable[[str], dict[str, str]]:
    """The headers with a key for OpenAI's API; Azure takes it in a header of its own."""

    def headers(key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}

    def headers_for_azure(key: str) -> dict[str, str]:
        return {**headers(key), "api-key": key}

    host = httpx.URL(options.api_base or "").host
    return headers_for_azure if host.endswith(AZURE_HOSTS) else headers


def endpoint_problems(options: LLMOptions, keys: ApiKeys, *, path: str) -> Iterator[ConfigProblem]:
    """What is wrong with the URL, the key and the headers of an agent. `path`: below `api_base`."""
    base = options.api_base or ""
    if not is_http_url(base):
        hint = f"the URL before {path}, for example https://api.example.com/v1"
        yield ConfigProblem(("api_base",), "not an http(s) URL" if base else "missing", hint)
    if options.stream_endpoint is not None:
        problem = "this provider has one URL for all requests"
        yield ConfigProblem(("stream_endpoint",), problem, "remove it")
    yield from header_problems(options, keys)


def header_problems(options: LLMOptions, keys: ApiKeys) -> Iterator[ConfigProblem]:
    """Invalid headers. httpx would report them only at the first request, and would show their values."""
    if keys.value and not is_header_value(keys.value):
        problem = "the key has characters that are not allowed in an HTTP header"
        yield ConfigProblem(("api_key_env",), problem, "the usual reason is a newline at its end")
    for name, value in options.extra_headers.items():
        if not _HEADER_NAME.fullmatch(name):
            yield ConfigProblem(("extra_headers", name), "not a valid name of an HTTP header")
        elif not is_header_value(value):
            problem = "the value has characters that are not allowed in an HTTP header"
            yield ConfigProblem(("extra_headers", name), problem)


def headers_of(options: LLMOptions, own: Mapping[str, str]) -> dict[str, str]:
    """The headers of every request: those of the provider, without the key, and those of the agent."""
    return {**_JSON, **own, **{name.lower(): value for name, value in options.extra_headers.items()}}


def secrets_of(options: LLMOptions, keys: ApiKeys) -> list[str]:
    """Strings that no error message may contain: the key, as it is at start, and each word in the agent's
    headers with at least `SHORTEST_SECRET` characters. Logs and events mask them from now on."""
    remember_secret(keys.value)
    remember_secrets_of_url(options.api_base or "")
    for name, value in options.extra_headers.items():
        if is_secrets_name(name):
            for word in value.split():
                remember_secret(word)
    words = [word for value in options.extra_headers.values() for word in value.split()]
    return [*([keys.value] if keys.value else []), *(word for word in words if len(word) >= SHORTEST_SECRET)]


def endpoint_for(
    options: LLMOptions,
    *,
    provider: str,
    path: str,
    keys: ApiKeys,
    key_headers: Callable[[str], Mapping[str, str]],
    headers: Mapping[str, str] | None = None,
    versioned: bool = False,
) -> Endpoint:
    """The endpoint of a provider. `headers`: those of the provider; `key_headers`: those with the key.

    The path is `{api_base}{path}`. A base URL that ends in `path` is used as it is. `versioned`: `/v1` is
    added to a base URL without a version, because the provider's own packages do so. A query is kept.
    """
    url = httpx.URL(options.api_base or "")
    base = url.path.rstrip("/")
    if not base.endswith(path):
        version = "/v1" if versioned and not _VERSION.search(base) else ""
        url = url.copy_with(path=f"{base}{version}{path}")
    address = str(url)
    return Endpoint(
        provider=provider,
        url=address,
        stream_url=address,
        headers=headers_of(options, headers or {}),
        secrets=secrets_of(options, keys),
        keys=keys,
        key_headers=key_headers,
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
