"""Providers over HTTP: the only place that joins a client with its key, its URL and its connections.

This module is loaded for the first agent with such a provider, and the module of a client for the first agent
that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import httpx

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.errors import PluginConfigError
from openagents_worker.llm.api_keys import ApiKeys, EnvironmentKey, KeyFile, NoKey, key_resolver
from openagents_worker.llm.base import LLMClient
from openagents_worker.llm.connection_options import ConnectionOptions
from openagents_worker.llm.options import raise_for_problems
from openagents_worker.loaded_at_use import LoadedAtUse

__all__ = ["anthropic", "base_of", "litellm", "named_key_of", "openai_compatible", "openai_responses"]

OPENAI_BASE_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
ANTHROPIC_BASE_URL = "https://api.anthropic.com/v1"
ANTHROPIC_KEY = "ANTHROPIC_API_KEY"

MakeHttpClient = Callable[..., LLMClient]
"""Creates a client from the options, `api_key` and `connections`."""

_CLIENTS: Mapping[str, MakeHttpClient] = LoadedAtUse(
    "openagents_worker.llm",
    {
        "anthropic": "anthropic_messages:AnthropicClient",
        "openai_compatible": "openai_chat:OpenAICompatibleClient",
        "openai_responses": "openai_responses:OpenAIResponsesClient",
    },
)


class _Vendor(NamedTuple):
    """What a provider has if the agent does not say otherwise."""

    base: str
    """The URL of the vendor, who requires a key."""
    base_env: str
    """The variable with another URL."""
    key_env: str
    """The variable with the key."""


_OPENAI = _Vendor(OPENAI_BASE_URL, "OPENAI_BASE_URL", OPENAI_KEY)
_VENDORS: Mapping[str, _Vendor] = {
    "anthropic": _Vendor(ANTHROPIC_BASE_URL, "ANTHROPIC_BASE_URL", ANTHROPIC_KEY),
    "openai_compatible": _OPENAI,
    "openai_responses": _OPENAI,
}


def base_of(options: LLMOptions, env: Mapping[str, str]) -> str | None:
    """The URL of an agent's model. None: only LiteLLM knows it, or the provider sends no requests."""
    vendor = _VENDORS.get(options.provider)
    if vendor is None:
        return options.api_base if options.provider == "litellm" else None
    return options.api_base or env.get(vendor.base_env) or vendor.base


def named_key_of(options: LLMOptions, env: Mapping[str, str]) -> str | None:
    """The file, the variable or the function with an agent's key; None if nothing names one."""
    vendor = _VENDORS.get(options.provider)
    if vendor is None and options.provider != "litellm":
        return None
    if named := options.api_key_file or options.api_key_env:
        return named
    if key_resolver() is not None:
        return "the function of register_api_keys"
    return vendor.key_env if vendor is not None and env.get(vendor.key_env) else None


def openai_compatible(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    return _over_http(options, env)


def openai_responses(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    return _over_http(options, env)


def anthropic(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    return _over_http(options, env)


def litellm(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    """The client for LiteLLM. Without a key of the agent or a function, LiteLLM reads its own variables."""
    from openagents_worker.llm.litellm_client import NO_KEY, UNUSED_URL, LiteLLMClient

    keys, problems = _keys(options, env, NO_KEY, owner=UNUSED_URL)
    return _made(LiteLLMClient, options, keys, ConnectionOptions.of(options, env), problems)


def _over_http(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    """A client with the URL and the key of its vendor, unless the agent has its own."""
    vendor = _VENDORS[options.provider]
    options = options.model_copy(update={"api_base": base_of(options, env)})
    connections = ConnectionOptions.of(options, env)
    keys, problems = _keys(options, env, vendor.key_env, vendor.base)
    problems += connections.problems(options)
    return _made(_CLIENTS[options.provider], options, keys, connections, problems)


def _made(
    make: MakeHttpClient,
    options: LLMOptions,
    keys: ApiKeys,
    connections: ConnectionOptions,
    problems: list[ConfigProblem],
) -> LLMClient:
    """The client. `problems` are those of the environment; they and those of the options are one error."""
    try:
        client = make(options, api_key=keys, connections=connections)
    except PluginConfigError as error:
        raise_for_problems([*problems, *error.problems])
        raise
    raise_for_problems(problems)
    return client


def _keys(
    options: LLMOptions, env: Mapping[str, str], default: str, owner: str
) -> tuple[ApiKeys, list[ConfigProblem]]:
    """Where the key of an agent comes from, and what is wrong with it at start. `owner`: the URL of the
    provider that requires a key."""
    if options.share_key is False and options.api_key_env is None and options.api_key_file is None:
        return NoKey(), []
    variable = options.api_key_env or default
    named = EnvironmentKey(variable, env.get(variable), is_named=options.api_key_env is not None)
    if options.api_key_file is None:
        return named, list(_key_problems(options, named, owner))
    if options.api_key_env is not None:
        both = ConfigProblem(("api_key_file",), "api_key_env is set too", "remove one of them")
        return named, [both]
    try:
        return KeyFile(options.api_key_file), []
    except ValueError as error:
        return named, [ConfigProblem(("api_key_file",), str(error))]


def _key_problems(options: LLMOptions, key: EnvironmentKey, owner: str) -> Iterator[ConfigProblem]:
    """A missing key. It is required if `api_key_env` is set, and for the provider itself unless a header with
    a key is configured, or a function returns the keys. Other servers may need no key."""
    name = key.variable
    has_own_header = any(header.lower() in ("authorization", "x-api-key") for header in options.extra_headers)
    has_other = has_own_header or key_resolver() is not None
    is_required = key.is_named or (_is_at(options.api_base or "", owner) and not has_other)
    if is_required and not key.value:
        hint = f"set {name} in the worker's environment and restart the worker"
        yield ConfigProblem(("api_key_env",), f"the environment variable {name} is not set", hint)


def _is_at(base: str, owner: str) -> bool:
    try:
        return httpx.URL(base).host == httpx.URL(owner).host
    except httpx.InvalidURL:
        return False
