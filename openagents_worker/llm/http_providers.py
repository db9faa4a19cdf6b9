"""Providers over HTTP: the only place that joins a client with its key, its URL and its connections.

This module is loaded for the first agent with such a provider, and the module of a client for the first agent
that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import httpx

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.errors import PluginConfigError
from openagents_worker.llm.api_keys import ApiKeys, EnvironmentKey, KeyFile, key_resolver
from openagents_worker.llm.base import LLMClient
from openagents_worker.llm.connection_options import ConnectionOptions
from openagents_worker.llm.options import raise_for_problems
from openagents_worker.loaded_at_use import LoadedAtUse

__all__ = ["anthropic", "litellm", "openai_compatible", "openai_responses"]

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


def openai_compatible(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    return _over_http(options, env, base=_openai_base(env), key=OPENAI_KEY, owner=OPENAI_BASE_URL)


def openai_responses(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    return _over_http(options, env, base=_openai_base(env), key=OPENAI_KEY, owner=OPENAI_BASE_URL)


def _openai_base(env: Mapping[str, str]) -> str:
    return env.get("OPENAI_BASE_URL") or OPENAI_BASE_URL


def anthropic(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    base = env.get("ANTHROPIC_BASE_URL") or ANTHROPIC_BASE_URL
    return _over_http(options, env, base=base, key=ANTHROPIC_KEY, owner=ANTHROPIC_BASE_URL)


def litellm(options: LLMOptions, env: Mapping[str, str]) -> LLMClient:
    """The client for LiteLLM. Without a key of the agent or a function, LiteLLM reads its own variables."""
    from openagents_worker.llm.litellm_client import NO_KEY, UNUSED_URL, LiteLLMClient

    keys, problems = _keys(options, env, NO_KEY, owner=UNUSED_URL)
    return _made(LiteLLMClient, options, keys, ConnectionOptions.of(options, env), problems)


def _over_http(options: LLMOptions, env: Mapping[str, str], *, base: str, key: str, owner: str) -> LLMClient:
    """A client with `base` as its URL, unless the agent has its own. `key`: the variable with the key, unless
    the agent names one. `owner`: the URL of the provider that requires a key."""
    options = options.model_copy(update={"api_base": options.api_base or base})
    connections = ConnectionOptions.of(options, env)
    keys, problems = _keys(options, env, key, owner)
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
