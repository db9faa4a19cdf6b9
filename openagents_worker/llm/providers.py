"""Providers by name: the only place that knows every model client."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import PluginConfigError, PluginLoadError
from openagents_worker.llm.base import LLMClient
from openagents_worker.llm.mock import MockClient
from openagents_worker.llm.openai_compatible import OpenAICompatibleClient
from openagents_worker.llm.scripted import ScriptedClient

__all__ = ["PROVIDERS", "make_client"]

OPENAI_BASE_URL = "https://api.openai.com/v1"


def make_client(options: LLMOptions, *, env: Mapping[str, str]) -> LLMClient:
    """The client of an agent's model; `env` is where keys are found.

    Raises `PluginLoadError` for an unknown provider, `PluginConfigError` for options it cannot use.
    """
    make = PROVIDERS.get(options.provider)
    if make is None:
        near = difflib.get_close_matches(options.provider, PROVIDERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known providers: {', '.join(sorted(PROVIDERS))}"
        raise PluginLoadError(f"no model provider is named {options.provider!r}", hint=hint)
    return make(options, env)


def _mock(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    return MockClient(options)


def _scripted(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    return ScriptedClient(options)


def _openai_compatible(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    base = options.api_base or env.get("OPENAI_BASE_URL") or OPENAI_BASE_URL
    key = env.get(options.api_key_env or "OPENAI_API_KEY")
    if options.api_key_env and not key:
        raise PluginConfigError(
            f"llm.api_key_env names {options.api_key_env}, which is not set",
            hint=f"set {options.api_key_env} in the worker's environment",
        )
    return OpenAICompatibleClient(options.model_copy(update={"api_base": base}), api_key=key)


PROVIDERS: dict[str, Callable[[LLMOptions, Mapping[str, str]], LLMClient]] = {
    "mock": _mock,
    "openai_compatible": _openai_compatible,
    "scripted": _scripted,
}
