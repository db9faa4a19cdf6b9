"""Trust in definitions: the only place that decides whether a definition from Redis may be used.

Who can write to Redis must not make a worker import code, start a command, send a request to another address
or give away a secret. Therefore, all parts of a definition that can do this must be those of an agent that
this process has itself. The other parts are plain data: prompts, limits, the model and how it samples. With
LiteLLM, the name of the model is not plain data, because it says where prompts are sent.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from openagents_worker.agents.sources import AgentSource, has_variable
from openagents_worker.jsontext import canonical_json

__all__ = ["TrustedParts", "signature_of"]

PLAIN_FIELDS = frozenset({"id", "name", "runtime", "limits", "queue"})
"""The fields of an agent that are plain data."""
PLAIN_LLM_OPTIONS = frozenset(
    {
        "model", "temperature", "max_tokens", "top_p", "top_k", "seed", "stop", "stop_sequences",
        "presence_penalty", "frequency_penalty", "logit_bias", "reasoning_effort", "effort", "thinking",
        "verbosity", "reasoning_model", "parallel_tool_calls", "max_tool_calls", "structured_output",
        "connect_timeout_ms", "timeout_ms", "total_timeout_ms", "max_reply_bytes", "stream", "retry",
        "pricing", "limits", "script", "latency_ms",
    }
)  # fmt: skip
"""The options of `llm` that say neither where the model is nor with which credentials. With one of
`PROVIDERS_BY_MODEL`, `model` is not one of them."""
PROVIDERS_BY_MODEL = frozenset({"litellm"})
"""The providers for which the model's name says where the request goes: LiteLLM takes the service, the region
and the variable with the key from it. The prefix alone does not decide: it sends some models of `azure/` to
another service, and `huggingface/` to whoever serves the model."""
PLAIN_PATTERN_OPTIONS = frozenset({"system_prompt", "max_steps", "step_timeout_ms"})
"""The options that are plain data in the config of every pattern, also of one of the deployment."""
_OWN_PARTS = ("memory", "tool_executor", "context_assembler")
MAX_SHOWN_CHARS = 80  # of the name of a part in a log line
_SIGNED = b"openagents-worker definition 1\n"

_Part = tuple[str, str]
"""A part of a definition for people, and the canonical JSON of its kind and content."""


def signature_of(source: AgentSource, key: str) -> str:
    """The HMAC-SHA256 with which workers that share the key recognise what one of them has stored."""
    return hmac.digest(key.encode(), _SIGNED + source.content_hash.encode(), "sha256").hex()


class TrustedParts:
    """The parts of the agents of this process that a definition from Redis may have, too.

    `plain_patterns` are the types of patterns whose whole config is plain data.
    """

    def __init__(self, sources: Iterable[AgentSource], plain_patterns: Collection[str]) -> None:
        self._plain_patterns = frozenset(plain_patterns)
        self._known = {content for source in sources for _, content in self._parts(source)}

    def foreign_part(self, source: AgentSource) -> str | None:
        """The first part of a definition that no agent of this process has; None if there is none."""
        return next((name for name, content in self._parts(source) if content not in self._known), None)

    def _parts(self, source: AgentSource) -> Iterator[_Part]:
        """The parts of a definition that must be known, and the texts with variables in the others."""
        agent, plain = source.data, dict[str, Any]()
        for name, value in agent.items():
            if name in PLAIN_FIELDS:
                plain[name] = value
            elif name == "llm" and isinstance(value, Mapping):
                plain[name] = {key: item for key, item in value.items() if key in PLAIN_LLM_OPTIONS}
                yield _part("llm", _place_of_model(value), source)
            elif name == "pattern" and isinstance(value, Mapping):
                fixed, config = self._divided_pattern(value)
                plain[name] = {"config": config}
                yield _part("pattern", fixed, source)
            elif name == "tools" and isinstance(value, list):
                yield from _tools(value, source)
            elif value is not None or name not in _OWN_PARTS:
                yield _part(name[:MAX_SHOWN_CHARS], value, source)
        if not source.in_code:
            yield from _texts_with_variables(plain, ())

    def _divided_pattern(self, pattern: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What must be known of a pattern, and the config that is plain data."""
        config = pattern.get("config")
        if not isinstance(config, Mapping):
            return dict(pattern), {}
        is_plain = pattern.get("type") in self._plain_patterns and not pattern.get("impl")
        plain = {key: item for key, item in config.items() if is_plain or key in PLAIN_PATTERN_OPTIONS}
        rest = {key: item for key, item in config.items() if key not in plain}
        fixed = {key: item for key, item in pattern.items() if key != "config"}
        return ({**fixed, "config": rest} if rest else fixed), plain


def _part(name: str, content: Any, source: AgentSource) -> _Part:
    """In Python, `${VAR}` is ordinary text, so a part with it is not the same as one of the file."""
    kind = f"{name} in Python" if source.in_code and has_variable(content) else name
    return name, canonical_json([kind, content])


def _tools(tools: list[Any], source: AgentSource) -> Iterator[_Part]:
    """Each tool, together with the executor of the agent, which may restrict what the tool does."""
    executor = source.data.get("tool_executor")
    for index, tool in enumerate(tools):
        id_ = tool.get("id") if isinstance(tool, Mapping) else index
        yield f"tool {id_}"[:MAX_SHOWN_CHARS], _part("tool", [tool, executor], source)[1]


def _place_of_model(llm: Mapping[str, Any], inherited: Any = "") -> dict[str, Any]:
    """Where the model is and how it is reached: all of `llm` but the plain options, also of the fallbacks.

    `inherited` is the provider of a fallback that does not name one.
    """
    provider = llm.get("provider", inherited)
    is_plain = isinstance(provider, str) and provider not in PROVIDERS_BY_MODEL and not has_variable(provider)
    plain = PLAIN_LLM_OPTIONS if is_plain else PLAIN_LLM_OPTIONS - {"model"}
    place = {key: item for key, item in llm.items() if key not in plain}
    fallbacks = place.get("fallbacks")
    if isinstance(fallbacks, list):
        place["fallbacks"] = [
            _place_of_model(each, provider) if isinstance(each, Mapping) else each for each in fallbacks
        ]
    return place


def _texts_with_variables(value: Any, path: tuple[str, ...]) -> Iterator[_Part]:
    """The texts in plain data in which a variable is replaced: each must be known at the same place."""
    if isinstance(value, str):
        if has_variable(value):
            yield ".".join(path)[:MAX_SHOWN_CHARS], canonical_json(["text", *path, value])
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts_with_variables(item, (*path, str(key)))
    elif isinstance(value, list):
        for item in value:
            yield from _texts_with_variables(item, path)
