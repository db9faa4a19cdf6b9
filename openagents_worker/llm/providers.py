"""Providers by name: the only place that creates model clients. A client's module is loaded at first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem, problems_of
from openagents_worker.errors import PluginConfigError, PluginLoadError
from openagents_worker.llm.base import LLMClient, ModelClient
from openagents_worker.llm.fallback_keys import key_problems
from openagents_worker.llm.fallbacks import FallbackClient, fallback_options
from openagents_worker.llm.limits import LimitedClient, Limiter
from openagents_worker.llm.options import ProviderOptions, raise_for_problems
from openagents_worker.loaded_at_use import LoadedAtUse
from openagents_worker.suggest import did_you_mean

__all__ = ["EXTRAS", "PROVIDERS", "make_client"]

MakeClient = Callable[[LLMOptions, Mapping[str, str]], LLMClient]
"""Creates a client from the options and the environment."""


def make_client(options: LLMOptions, *, env: Mapping[str, str]) -> LLMClient:
    """Create the client of an agent's model. Keys are read from `env`. No connection is opened.

    Raises `PluginLoadError` for an unknown provider. Raises `PluginConfigError` that lists every invalid
    option, a missing key and an unusable proxy.
    """
    if options.share_key is not None:
        raise_for_problems([ConfigProblem(("share_key",), "only a fallback has this option", "remove it")])
    client = _make_one(options, env)
    if not options.fallbacks:
        return client
    clients, problems = [client], []
    for position, fields in enumerate(fallback_options(options)):
        found: list[ConfigProblem] = []
        try:
            fallback = _checked_fallback(fields)
            found += key_problems(options, options.fallbacks[position], fallback, env)
            clients.append(_make_one(fallback, env))
        except PluginConfigError as error:
            found += error.problems
        problems += [problem.under("fallbacks", position) for problem in found]
    raise_for_problems(problems)
    return FallbackClient(clients, max_attempts=options.retry.max_attempts, agent=options)


def _make_one(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    make = PROVIDERS.get(options.provider)
    if make is None:
        hint = did_you_mean(options.provider, sorted(PROVIDERS), "known providers")
        raise PluginLoadError(f"unknown model provider {options.provider!r}", hint=hint)
    client = make(options, env)
    if options.limits is None or (isinstance(client, ModelClient) and client.limits_each_try):
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


PROVIDERS: Mapping[str, MakeClient] = LoadedAtUse(
    "openagents_worker.llm",
    {
        "anthropic": "http_providers:anthropic",
        "litellm": "http_providers:litellm",
        "mock": "mock:mock_client",
        "openai_compatible": "http_providers:openai_compatible",
        "openai_responses": "http_providers:openai_responses",
        "scripted": "scripted:scripted_client",
    },
)
EXTRAS: Mapping[str, type[ProviderOptions]] = LoadedAtUse(
    "openagents_worker.llm",
    {
        "anthropic": "anthropic_messages:AnthropicExtras",
        "litellm": "litellm_client:LiteLLMExtras",
        "mock": "options:ProviderOptions",
        "openai_compatible": "openai_options:OpenAIExtras",
        "openai_responses": "openai_responses:ResponsesExtras",
        "scripted": "options:ProviderOptions",
    },
)
"""The options under `llm` that only one provider has, by provider."""
