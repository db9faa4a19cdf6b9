"""Keys of fallbacks: the only place that decides whether a fallback gets the key of its agent.

A fallback without a provider takes the options of its agent. At the address of the agent's model (scheme,
host and port), that includes the key. At another one, the entry must say which key it gets: one of its own
(`api_key_env`, `api_key_file`), that of the agent (`"share_key": true`), or none (`"share_key": false`). What
`extra_headers`, `extra_query` and `extra_body` of the agent hold under the name of a secret counts like its
key.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.secret_names import is_secrets_name

__all__ = ["KEYS", "key_problems", "share_key_of", "without_secrets"]

KEYS = frozenset({"api_key_env", "api_key_file"})
"""Where the key is. A fallback with one of these takes neither of them from the agent."""
WITH_SECRETS = ("extra_headers", "extra_query", "extra_body")
"""Options that may hold secrets beside the key."""

_HINT = (
    'give it a key of its own with api_key_env or api_key_file, or write "share_key": true to send what '
    'the agent\'s model gets, or "share_key": false to send none of it'
)
_KEY = re.compile(r"(?:^|[-_])(?:key|auth)$", re.IGNORECASE)
"""Other names of headers and query parameters with a key: `Ocp-Apim-Subscription-Key`, `Helicone-Auth`."""
_FAMILY = re.compile("[a-z]*")


def share_key_of(entry: Mapping[str, Any]) -> bool | None:
    """The option `share_key` of an entry, which may be a text from a variable. None: unset, or not valid."""
    try:
        return LLMOptions.model_validate({"share_key": entry.get("share_key")}).share_key
    except ValidationError:  # it is reported with the other options of the entry
        return None


def without_secrets(own: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an agent without its key and its other secrets."""
    kept = {name: value for name, value in own.items() if name not in KEYS}
    for name in WITH_SECRETS:
        if name in kept:
            kept[name] = {key: item for key, item in kept[name].items() if not _is_secret(name, key)}
    return kept


def key_problems(
    agent: LLMOptions, entry: Mapping[str, Any], fallback: LLMOptions, env: Mapping[str, str]
) -> Iterator[ConfigProblem]:
    """A fallback that would send a secret of the agent to another address, and does not say so. `fallback`:
    the complete options of `entry`."""
    if "provider" in entry:
        if fallback.share_key is not None:
            text = "an entry with a provider takes no key from the agent"
            yield ConfigProblem(("share_key",), text, "remove it")
        return
    if fallback.share_key is not None or _is_where_the_agent_is(agent, fallback, env):
        return
    if secrets := list(_taken(agent, entry, fallback, env)):
        field = next((name for name in ("api_base", "stream_endpoint") if name in entry), "model")
        text = f"another address than that of the agent's model would get {' and '.join(secrets)}"
        yield ConfigProblem((field,), text, _HINT)


def _taken(
    agent: LLMOptions, entry: Mapping[str, Any], fallback: LLMOptions, env: Mapping[str, str]
) -> Iterator[str]:
    """The names of the secrets that an entry sends and does not name."""
    from openagents_worker.llm.http_providers import named_key_of

    names_key = any(entry.get(name) is not None for name in KEYS)
    if not names_key and (key := named_key_of(fallback, env)):
        yield f"the agent's key ({key})"
    for option in WITH_SECRETS:
        if option not in entry:
            yield from (f"{option}.{name}" for name in getattr(agent, option) if _is_secret(option, name))


def _is_secret(option: str, name: str) -> bool:
    """Whether an item of one of `WITH_SECRETS` is a secret, as its name says."""
    return is_secrets_name(name) or (option != "extra_body" and _KEY.search(name) is not None)


# --- where a model is ------------------------------------------------------------------------------------


def _is_where_the_agent_is(agent: LLMOptions, fallback: LLMOptions, env: Mapping[str, str]) -> bool:
    return _places(fallback, env) <= _places(agent, env)


def _places(options: LLMOptions, env: Mapping[str, str]) -> set[Hashable]:
    """Where the requests of these options go: the scheme, the host and the port of each URL. Empty for a
    provider without requests, and for an invalid URL, which is reported elsewhere."""
    from openagents_worker.llm.http_providers import base_of

    streamed = options.stream_endpoint
    urls = [base_of(options, env), streamed if streamed is not None and "://" in streamed else None]
    places: set[Hashable] = {place for url in urls if url and (place := _origin(url)) is not None}
    if options.provider == "litellm":
        places.add(_service(options))
    return places


def _origin(url: str) -> tuple[str, str, int | None] | None:
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return None
    return parsed.scheme, parsed.host, parsed.port


def _service(options: LLMOptions) -> str:
    """What says to LiteLLM which service is asked: the beginning of the model's name."""
    model = (options.model or "").lower()
    named = (options.model_extra or {}).get("custom_llm_provider")
    if isinstance(named, str):
        return named
    begin = _FAMILY.match(model)
    return model.partition("/")[0] if "/" in model else begin[0] if begin else ""
