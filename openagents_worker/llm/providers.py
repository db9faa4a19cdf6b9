"""Providers by name: the only place that knows every model client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import httpx

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem, did_you_mean
from openagents_worker.errors import PluginConfigError, PluginLoadError
from openagents_worker.llm.base import LLMClient
from openagents_worker.llm.connection_pool import proxy_problem
from openagents_worker.llm.mock import MockClient
from openagents_worker.llm.openai_chat import OpenAICompatibleClient
from openagents_worker.llm.openai_options import OpenAIExtras
from openagents_worker.llm.options import ProviderOptions, refuse, refuse_extras
from openagents_worker.llm.scripted import ScriptedClient

__all__ = ["EXTRAS", "PROVIDERS", "make_client"]

OPENAI_BASE_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"


def make_client(options: LLMOptions, *, env: Mapping[str, str]) -> LLMClient:
    """The client of an agent's model; `env` is where keys are found. It opens no connection.

    Raises `PluginLoadError` for an unknown provider, and `PluginConfigError` that tells of all options it
    cannot use, a key that is not there and a proxy that cannot be used.
    """
    make = PROVIDERS.get(options.provider)
    if make is None:
        hint = did_you_mean(options.provider, sorted(PROVIDERS), "known providers")
        raise PluginLoadError(f"no model provider is named {options.provider!r}", hint=hint)
    return make(options, env)


def _mock(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    refuse_extras(options)
    return MockClient(options)


def _scripted(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    refuse_extras(options)
    return ScriptedClient(options)


def _openai_compatible(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    base = options.api_base or env.get("OPENAI_BASE_URL") or OPENAI_BASE_URL
    options = options.model_copy(update={"api_base": base})
    key = env.get(options.api_key_env or OPENAI_KEY)
    around = [*_problems_of_key(options, key), *_problems_of_proxy(base)]
    try:
        client = OpenAICompatibleClient(options, api_key=key)
    except PluginConfigError as error:
        refuse([*around, *error.problems])
        raise
    refuse(around)
    return client


def _problems_of_key(options: LLMOptions, key: str | None) -> Iterator[ConfigProblem]:
    """A server of one's own may need no key; OpenAI does, unless a header of one's own carries it."""
    name = options.api_key_env or OPENAI_KEY
    has_own = any(header.lower() == "authorization" for header in options.extra_headers)
    is_needed = options.api_key_env or (_is_openai(options.api_base or "") and not has_own)
    if is_needed and not key:
        hint = f"set {name} in the worker's environment and restart the worker"
        yield ConfigProblem(("api_key_env",), f"the environment variable {name} is not set", hint)


def _is_openai(base: str) -> bool:
    try:
        return httpx.URL(base).host == httpx.URL(OPENAI_BASE_URL).host
    except httpx.InvalidURL:
        return False


def _problems_of_proxy(base: str) -> Iterator[ConfigProblem]:
    try:
        found = proxy_problem(base)
    except httpx.InvalidURL:  # the address itself is a problem of its own
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
"""The options under `llm` that only one provider knows."""
