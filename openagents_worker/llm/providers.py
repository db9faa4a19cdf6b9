"""Providers by name: the only place that creates model clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
from pydantic import ValidationError

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem, problems_of
from openagents_worker.errors import PluginConfigError, PluginLoadError
from openagents_worker.llm.anthropic_messages import AnthropicClient, AnthropicExtras
from openagents_worker.llm.api_keys import ApiKeys, EnvironmentKey, KeyFile, key_resolver
from openagents_worker.llm.base import LLMClient
from openagents_worker.llm.connection_options import ConnectionOptions
from openagents_worker.llm.fallbacks import FallbackClient, fallback_options
from openagents_worker.llm.http import HttpModelClient
from openagents_worker.llm.limits import LimitedClient, Limiter
from openagents_worker.llm.litellm_client import NO_KEY, UNUSED_URL, LiteLLMClient, LiteLLMExtras
from openagents_worker.llm.mock import MockClient
from openagents_worker.llm.openai_chat import OpenAICompatibleClient
from openagents_worker.llm.openai_options import OpenAIExtras
from openagents_worker.llm.openai_responses import OpenAIResponsesClient, ResponsesExtras
from openagents_worker.llm.options import ProviderOptions, raise_for_problems, reject_extras
from openagents_worker.llm.scripted import ScriptedClient
from openagents_worker.suggest import did_you_mean

__all__ = ["EXTRAS", "PROVIDERS", "make_client"]

OPENAI_BASE_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
ANTHROPIC_BASE_URL = "https://api.anthropic.com/v1"
ANTHROPIC_KEY = "ANTHROPIC_API_KEY"

MakeHttpClient = Callable[..., LLMClient]
"""Creates a client from the options, `api_key` and `connections`."""


def make_client(options: LLMOptions, *, env: Mapping[str, str]) -> LLMClient:
    """Create the client of an agent's model. Keys are read from `env`. No connection is opened.

    Raises `PluginLoadError` for an unknown provider. Raises `PluginConfigError` that lists every invalid
    option, a missing key and an unusable proxy.
    """
    client = _make_one(options, env)
    if not options.fallbacks:
        return client
    clients, problems = [client], []
    for position, fields in enumerate(fallback_options(options)):
        try:
            clients.append(_make_one(_checked_fallback(fields), env))
        except PluginConfigError as error:
            problems += [problem.under("fallbacks", position) for problem in error.problems]
    raise_for_problems(problems)
    return FallbackClient(clients, max_attempts=options.retry.max_attempts)


def _make_one(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    make = PROVIDERS.get(options.provider)
    if make is None:
        hint = did_you_mean(options.provider, sorted(PROVIDERS), "known providers")
        raise PluginLoadError(f"unknown model provider {options.provider!r}", hint=hint)
    client = make(options, env)
    if options.limits is None or isinstance(client, HttpModelClient):  # it limits each try of a call
        return client
    return LimitedClient(client, Limiter(options, options.limits))


def _checked_fallback(fields: Mapping[str, Any]) -> LLMOptions:
    """The options of a fallback. Raises `PluginConfigError` that lists every problem."""
    if "fallbacks" in fields:
        raise_for_problems([ConfigProblem(("fallbacks",), "a fallback has no fallbacks of its own")])
    try:
        return LLMOptions.model_validate(fields)
    except ValidationError as error:
        problems = problems_of(error)
        raise_for_problems(problems)
        raise


def _mock(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    reject_extras(options)
    return MockClient(options)


def _scripted(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    reject_extras(options)
    return ScriptedClient(options)


def _openai_compatible(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    base = env.get("OPENAI_BASE_URL") or OPENAI_BASE_URL
    return _over_http(OpenAICompatibleClient, options, env, base=base, key=OPENAI_KEY, owner=OPENAI_BASE_URL)


def _openai_responses(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    base = env.get("OPENAI_BASE_URL") or OPENAI_BASE_URL
    return _over_http(OpenAIResponsesClient, options, env, base=base, key=OPENAI_KEY, owner=OPENAI_BASE_URL)


def _anthropic(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    base = env.get("ANTHROPIC_BASE_URL") or ANTHROPIC_BASE_URL
    return _over_http(AnthropicClient, options, env, base=base, key=ANTHROPIC_KEY, owner=ANTHROPIC_BASE_URL)


def _litellm(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    """LiteLLM finds the key in a variable of its provider, unless the agent or a function has one."""
    connections = ConnectionOptions.of(options, env)
    keys, problems = _keys(options, env, NO_KEY, owner=UNUSED_URL)
    try:
        client = LiteLLMClient(options, api_key=keys, connections=connections)
    except PluginConfigError as error:
        raise_for_problems([*problems, *error.problems])
        raise
    raise_for_problems(problems)
    return client


def _over_http(
    make: MakeHttpClient, options: LLMOptions, env: Mapping[str, str], *, base: str, key: str, owner: str
) -> LLMClient:
    """A client with `base` as its URL, unless the agent has its own. `key`: the variable with the key, unless
    the agent names one. `owner`: the URL of the provider that requires a key."""
    options = options.model_copy(update={"api_base": options.api_base or base})
    connections = ConnectionOptions.of(options, env)
    keys, environment_problems = _keys(options, env, key, owner)
    environment_problems += connections.problems(options)
    try:
        client = make(options, api_key=keys, connections=connections)
    except PluginConfigError as error:
        raise_for_problems([*environment_problems, *error.problems])
        raise
    raise_for_problems(environment_problems)
    return client


def _keys(
    options: LLMOptions, env: Mapping[str, str], default: str, owner: str
) -> tuple[ApiKeys, list[ConfigProblem]]:
    """Where the key of an agent comes from, and what is wrong with it at start."""
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


PROVIDERS: dict[str, Callable[[LLMOptions, Mapping[str, str]], LLMClient]] = {
    "anthropic": _anthropic,
    "litellm": _litellm,
    "mock": _mock,
    "openai_compatible": _openai_compatible,
    "openai_responses": _openai_responses,
    "scripted": _scripted,
}
EXTRAS: dict[str, type[ProviderOptions]] = {
    "anthropic": AnthropicExtras,
    "litellm": LiteLLMExtras,
    "mock": ProviderOptions,
    "openai_compatible": OpenAIExtras,
    "openai_responses": ResponsesExtras,
    "scripted": ProviderOptions,
}
"""The options under `llm` that only one provider has, by provider."""
