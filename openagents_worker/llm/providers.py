"""Providers by name: the only place that creates model clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import httpx

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.errors import PluginConfigError, PluginLoadError
from openagents_worker.llm.base import LLMClient
from openagents_worker.llm.connection_pool import proxy_problem
from openagents_worker.llm.mock import MockClient
from openagents_worker.llm.openai_chat import OpenAICompatibleClient
from openagents_worker.llm.openai_options import OpenAIExtras
from openagents_worker.llm.options import ProviderOptions, raise_for_problems, reject_extras
from openagents_worker.llm.scripted import ScriptedClient
from openagents_worker.suggest import did_you_mean

__all__ = ["EXTRAS", "PROVIDERS", "make_client"]

OPENAI_BASE_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"


def make_client(options: LLMOptions, *, env: Mapping[str, str]) -> LLMClient:
    """Create the client of an agent's model. Keys are read from `env`. No connection is opened.

    Raises `PluginLoadError` for an unknown provider. Raises `PluginConfigError` that lists every invalid
    option, a missing key and an unusable proxy.
    """
    make = PROVIDERS.get(options.provider)
    if make is None:
        hint = did_you_mean(options.provider, sorted(PROVIDERS), "known providers")
        raise PluginLoadError(f"unknown model provider {options.provider!r}", hint=hint)
    return make(options, env)


def _mock(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    reject_extras(options)
    return MockClient(options)


def _scripted(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    reject_extras(options)
    return ScriptedClient(options)


def _openai_compatible(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    base = options.api_base or env.get("OPENAI_BASE_URL") or OPENAI_BASE_URL
    options = options.model_copy(update={"api_base": base})
    key = env.get(options.api_key_env or OPENAI_KEY)
    environment_problems = [*_key_problems(options, key), *_proxy_problems(base)]
    try:
        client = OpenAICompatibleClient(options, api_key=key)
    except PluginConfigError as error:
        raise_for_problems([*environment_problems, *error.problems])
        raise
    raise_for_problems(environment_problems)
    return client


def _key_problems(options: LLMOptions, key: str | None) -> Iterator[ConfigProblem]:
    """A missing key. It is required if `api_key_env` is set, and for OpenAI unless an Authorization header is
    configured. Other servers may need no key."""
    name = options.api_key_env or OPENAI_KEY
    has_own_header = any(header.lower() == "authorization" for header in options.extra_headers)
    is_required = options.api_key_env or (_is_openai(options.api_base or "") and not has_own_header)
    if is_required and not key:
        hint = f"set {name} in the worker's environment and restart the worker"
        yield ConfigProblem(("api_key_env",), f"the environment variable {name} is not set", hint)


def _is_openai(base: str) -> bool:
    try:
        return httpx.URL(base).host == httpx.URL(OPENAI_BASE_URL).host
    except httpx.InvalidURL:
        return False


def _proxy_problems(base: str) -> Iterator[ConfigProblem]:
    try:
        found = proxy_problem(base)
    except httpx.InvalidURL:  # `openai_options` reports the invalid URL
        return
    if found is not None:
        yield ConfigProblem(("api_base",), f"it cannot be reached: {found[0]}", found[1])


PROVIDERS: dict[str, Callable[[LLMOptions, Mapping[str, str]], LLMClient]] = {
    "mock": _mock,
    "openai_compatible": _openai_compatible,
    "scripted": _scripted,
}
EXTRAS: dict[str, type[ProviderOptions]] = {
    "mock": ProviderOptions,
    "openai_compatible": OpenAIExtras,
    "scripted": ProviderOptions,
}
"""The options under `llm` that only one provider has, by provider."""
