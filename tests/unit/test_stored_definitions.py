"""Stored definitions: what is stored of an agent, and which of its parts a worker takes from Redis."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from openagents_worker.agents import read_agents_file
from openagents_worker.agents.code import Agent
from openagents_worker.agents.sources import AgentSource, literal_secret, read_source, sources_of
from openagents_worker.agents.stored_definition import MAX_BYTES, StoredDefinition
from openagents_worker.agents.trust import TrustedParts
from openagents_worker.jsontext import dumps
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.redaction import DEFAULT_REDACT_KEYS

KEY = "k" * 32
ENV = {"MODEL_URL": "http://127.0.0.1:9/v1", "MODEL_KEY": "sk-0123456789abcdef", "COMPANY": "Shop"}
AGENT: dict[str, Any] = {
    "id": "a",
    "name": "A",
    "memory": {"type": "buffer"},
    "pattern": {"type": "react", "config": {"system_prompt": "You work for ${COMPANY}."}},
    "llm": {
        "provider": "openai_compatible",
        "model": "m",
        "api_base": "${MODEL_URL}",
        "api_key_env": "MODEL_KEY",
        "extra_headers": {"X-Api-Key": "${MODEL_KEY}"},
        "temperature": 0.5,
    },
    "tools": [{"id": "calc", "type": "calc"}],
    "tool_executor": {"type": "safe", "config": {"command_allowlist": ["ls"]}},
}


def source(agent: Mapping[str, Any] | None = None, **sections: Any) -> AgentSource:
    """The source of an agent of a file with these further sections."""
    document = {"agents": [agent or AGENT], **sections}
    file = read_agents_file(json.dumps(document), env=ENV)
    assert not file.problems, file.problems
    return sources_of(file)["a"]


def changed(**fields: Any) -> dict[str, Any]:
    """The agent with other fields; a mapping changes only the fields that it has."""
    merged = dict(AGENT)
    for name, value in fields.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if both else value
    return merged


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in AGENT.items() if key != name}


def look_up(name: str) -> str:
    """Look up a name."""
    return name


# --- what is stored --------------------------------------------------------------------------------------


def test_a_source_has_the_names_of_variables_and_never_their_values() -> None:
    text = StoredDefinition(source()).to_json()

    assert "${MODEL_KEY}" in text
    assert all(value not in text for value in ENV.values())


def test_a_source_has_the_defaults_of_the_file_and_its_skills() -> None:
    """They are a part of the definition, and the file may change them as well."""
    defaults = {"tool_executor": {"type": "retry"}, "context_assembler": {"type": "truncating"}}
    sections = {
        "runtime": {"config": defaults},
        "skills": {"config": {"search_paths": ["${COMPANY}"]}},
    }

    found = source(without("tool_executor"), **sections)

    assert found.data["tool_executor"] == {"type": "retry"}
    assert found.data["context_assembler"] == {"type": "truncating"}
    assert found.data["tools"][-1]["id"] == "skills"
    assert found.data["tools"][-1]["config"] == {"search_paths": ["${COMPANY}"], "enabled": []}


def test_an_agent_that_is_read_from_its_source_has_the_same_hash() -> None:
    """So all that is hashed is stored, also what comes from the sections for all agents."""
    sections = {
        "runtime": {"config": {"context_assembler": {"type": "truncating"}}},
        "skills": {"config": {"search_paths": ["skills"]}},
    }
    file = read_agents_file(json.dumps({"agents": [AGENT], **sections}), env=ENV)
    assert file.config is not None

    again = read_source(sources_of(file)["a"], ENV, ())

    assert again.problems == ()
    assert again.config is not None
    assert again.config.agents[0].definition_hash == file.config.agent("a").definition_hash


def test_an_agent_in_python_gets_the_functions_of_the_process() -> None:
    """Its source is stored as a text. Functions are found by their paths, and `${VAR}` is ordinary text."""
    given = Agent("a", llm="mock", tools=[look_up], system_prompt="Write ${NAME}.")
    own = sources_of(read_agents_file('{"agents": []}', in_code=[given]))
    stored = StoredDefinition.of(StoredDefinition(own["a"]).to_json(), own["a"].content_hash)

    again = read_source(stored.source, {}, own.values())

    assert again.config is not None
    [tool] = again.config.agents[0].tools
    assert getattr(tool.impl, "code", None) is look_up
    assert again.config.agents[0].pattern.config["system_prompt"] == "Write ${NAME}."


SECRETS = {
    "a key in a header": changed(llm={"extra_headers": {"Authorization": "Bearer abcdefgh12345678"}}),
    "a key beside a variable": changed(llm={"extra_headers": {"X-Api-Key": "abc-${COMPANY}"}}),
    "a default of a variable": changed(llm={"extra_headers": {"X-Api-Key": "${OTHER:-hunter2-hunter2}"}}),
    "a password in a URL": changed(llm={"api_base": "https://me:hunter22@host/v1"}),
    "a key in a prompt": changed(pattern={"config": {"system_prompt": "Use sk-abcdef0123456789abcd."}}),
    "a field of a tool": changed(tools=[{"id": "t", "impl": "a.b", "config": {"password": "hunter2"}}]),
}
NO_SECRETS = {
    "the agent": AGENT,
    "a scheme and a variable": changed(llm={"extra_headers": {"Authorization": "Bearer ${MODEL_KEY}"}}),
    "a variable in a URL": changed(llm={"api_base": "https://me:${MODEL_KEY}@host/v1"}),
    "the path of a key": changed(llm={"api_key_file": "/run/secrets/key"}),
    "a number of tokens": changed(llm={"max_tokens": 100}),
}


@pytest.mark.parametrize("agent", SECRETS.values(), ids=SECRETS)
def test_a_secret_in_the_file_prevents_storing(agent: dict[str, Any]) -> None:
    assert literal_secret(AgentSource(agent), DEFAULT_REDACT_KEYS)


@pytest.mark.parametrize("agent", NO_SECRETS.values(), ids=NO_SECRETS)
def test_the_names_of_secrets_do_not_prevent_storing(agent: dict[str, Any]) -> None:
    assert not literal_secret(AgentSource(agent), DEFAULT_REDACT_KEYS)


# --- what is taken from Redis without a key --------------------------------------------------------------

PLAIN = {
    "nothing": {},
    "the name": {"name": "B"},
    "the prompt": {"pattern": {"type": "react", "config": {"system_prompt": "Be brief."}}},
    "the limits": {"limits": {"max_cost_usd": 1.0}, "runtime": {"max_steps": 3}},
    "the model": {"llm": {"model": "other", "temperature": 1.0, "timeout_ms": 1}},
    "a tool less": {"tools": []},
}
FOREIGN = {
    "another address": ({"llm": {"api_base": "http://evil/v1"}}, "llm"),
    "another variable as the key": ({"llm": {"api_key_env": "COMPANY"}}, "llm"),
    "another header": ({"llm": {"extra_headers": {"X": "${MODEL_KEY}"}}}, "llm"),
    "a proxy": ({"llm": {"proxy": "http://evil"}}, "llm"),
    "a fallback": ({"llm": {"fallbacks": [{"provider": "mock"}]}}, "llm"),
    "an unknown option of the model": ({"llm": {"later": 1}}, "llm"),
    "code as a tool": ({"tools": [{"id": "calc", "impl": "os.system"}]}, "tool calc"),
    "a command": ({"tools": [{"id": "m", "type": "mcp", "config": {"command": "sh"}}]}, "tool m"),
    "a tool with another limit": (
        {"tools": [{"id": "calc", "type": "calc", "timeout_ms": 5}]},
        "tool calc",
    ),
    "a tool without its executor": ({"tool_executor": None}, "tool calc"),
    "another executor": ({"tool_executor": {"type": "default", "config": {}}, "tools": []}, "tool_executor"),
    "code as the memory": ({"memory": {"type": None, "impl": "os.system"}}, "memory"),
    "code as the assembler": ({"context_assembler": {"impl": "os.system"}}, "context_assembler"),
    "code as the pattern": ({"pattern": {"type": None, "impl": "os.system"}}, "pattern"),
    "another pattern": ({"pattern": {"type": "reflexion"}}, "pattern"),
    "a secret in the prompt": (
        {"pattern": {"config": {"system_prompt": "${MODEL_KEY}"}}},
        "pattern.config.system_prompt",
    ),
    "a secret in the name": ({"name": "${MODEL_KEY}"}, "name"),
    "a field of a later version": ({"hooks": ["os.system"]}, "hooks"),
    "a list as the pattern": ({"pattern": ["os.system"]}, "pattern"),
    "an object as the tools": ({"tools": {"impl": "os.system"}}, "tools"),
}


def trusted(*others: AgentSource) -> TrustedParts:
    return TrustedParts([source(), *others], BUILTIN_PATTERNS)


@pytest.mark.parametrize("fields", PLAIN.values(), ids=PLAIN)
def test_plain_data_is_taken(fields: dict[str, Any]) -> None:
    assert trusted().foreign_part(AgentSource(changed(**fields))) is None


@pytest.mark.parametrize(("fields", "part"), FOREIGN.values(), ids=FOREIGN)
def test_what_names_code_an_address_or_a_secret_is_not_taken(fields: dict[str, Any], part: str) -> None:
    """The part that prevents it is named."""
    assert trusted().foreign_part(AgentSource(changed(**fields))) == part


LITELLM = {"provider": "litellm", "model": "azure/gpt-4o"}
BY_MODEL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another service": (LITELLM, {**LITELLM, "model": "deepseek/deepseek-chat"}),
    "a name that LiteLLM sends to another service": (LITELLM, {**LITELLM, "model": "azure/command-r-plus"}),
    "another region": (
        {"provider": "litellm", "model": "bedrock/eu-central-1/amazon.nova-pro-v1:0"},
        {"provider": "litellm", "model": "bedrock/us-east-1/amazon.nova-pro-v1:0"},
    ),
    "no model": (LITELLM, {"provider": "litellm"}),
    "a fallback": (
        {"provider": "openai_compatible", "model": "m", "fallbacks": [LITELLM]},
        {"provider": "openai_compatible", "model": "m", "fallbacks": [{**LITELLM, "model": "xai/grok-3"}]},
    ),
    "a fallback with the provider of the agent": (
        {**LITELLM, "fallbacks": [{"model": "azure/gpt-4o-mini"}]},
        {**LITELLM, "fallbacks": [{"model": "xai/grok-3"}]},
    ),
    "a provider in a variable": (
        {"provider": "${COMPANY}", "model": "azure/gpt-4o"},
        {"provider": "${COMPANY}", "model": "xai/grok-3"},
    ),
}


@pytest.mark.parametrize(("own", "planted"), BY_MODEL.values(), ids=BY_MODEL)
def test_a_model_that_says_where_prompts_are_sent_is_not_plain_data(
    own: dict[str, Any], planted: dict[str, Any]
) -> None:
    """LiteLLM chooses service, region and key by the name of the model. The options of sampling are plain."""
    mine = TrustedParts([AgentSource({**AGENT, "llm": own})], BUILTIN_PATTERNS)

    assert mine.foreign_part(AgentSource({**AGENT, "llm": planted})) == "llm"
    assert mine.foreign_part(AgentSource({**AGENT, "llm": {**own, "temperature": 1.0}})) is None


def test_a_fallback_does_not_get_the_key_of_the_agent_by_a_definition() -> None:
    """Only the agents file says that the key goes to another address."""

    def agent_with(share_key: bool) -> AgentSource:
        entry = {"api_base": "http://other/v1", "share_key": share_key}
        return AgentSource(changed(llm={"fallbacks": [entry]}))

    assert TrustedParts([agent_with(False)], BUILTIN_PATTERNS).foreign_part(agent_with(True)) == "llm"


def test_a_fallback_beside_litellm_may_have_another_model() -> None:
    """Its own provider has one address for all models."""
    at = {"provider": "openai_compatible", "api_base": "${MODEL_URL}"}

    def agent_with(model: str) -> AgentSource:
        return AgentSource({**AGENT, "llm": {**LITELLM, "fallbacks": [{**at, "model": model}]}})

    assert TrustedParts([agent_with("m")], BUILTIN_PATTERNS).foreign_part(agent_with("other")) is None


def test_parts_may_be_those_of_another_agent() -> None:
    """A definition may use what this process uses itself, in any of its agents."""
    other = AgentSource({**changed(memory={"type": "chain", "config": {}}), "id": "b"})

    assert trusted(other).foreign_part(AgentSource({**other.data, "id": "a"})) is None


def test_the_address_of_one_agent_does_not_go_with_the_key_of_another() -> None:
    other = AgentSource({**changed(llm={"api_base": "http://other/v1", "api_key_env": "COMPANY"}), "id": "b"})
    mixed = AgentSource(changed(llm={"api_base": "http://other/v1"}))

    assert trusted(other).foreign_part(mixed) == "llm"


def test_variables_of_an_agent_in_python_are_not_those_of_the_file() -> None:
    """In Python they are ordinary text: such a text must not become the value of a variable."""
    tool = {"id": "t", "type": "http_request", "config": {"headers": {"X": "${MODEL_KEY}"}}}
    in_python = AgentSource({**AGENT, "id": "b", "tools": [tool]}, in_code=True)

    assert trusted(in_python).foreign_part(AgentSource(changed(tools=[tool]))) == "tool t"


def test_the_config_of_a_custom_pattern_is_taken_only_as_far_as_it_is_known() -> None:
    """It may name an address; only its prompt and its limits are plain data."""
    own = {"impl": "shop.Pattern", "config": {"url": "http://own", "system_prompt": "A"}}
    mine = TrustedParts([AgentSource(changed(pattern=None) | {"pattern": own})], BUILTIN_PATTERNS)

    def foreign(**config: Any) -> str | None:
        pattern = {**own, "config": {**own["config"], **config}}  # type: ignore[dict-item]
        return mine.foreign_part(AgentSource({**AGENT, "pattern": pattern}))

    assert foreign(system_prompt="B", max_steps=2) is None
    assert foreign(url="http://evil") == "pattern"


# --- what is read ----------------------------------------------------------------------------------------


def test_a_signature_is_that_of_the_content_and_of_the_key() -> None:
    stored = StoredDefinition.signed(source(), KEY)
    other = StoredDefinition(source(changed(name="B")), stored.signature)

    assert StoredDefinition.of(stored.to_json(), stored.source.content_hash).is_signed_with(KEY)
    assert not stored.is_signed_with("x" * 32)
    assert not stored.is_signed_with("")
    assert not other.is_signed_with(KEY)
    assert not StoredDefinition.signed(source(), "").is_signed_with("")


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"x": value}
    return value


BROKEN = {
    "not JSON": ("{", "Expecting property name"),
    "a list": ("[]", "not an object with a definition"),
    "a text": ('"oa:zstd:x"', "not an object with a definition"),
    "no definition": ('{"v": 1}', "not an object with a definition"),
    "another version": (dumps({"v": 2, "agent": AGENT}), "another version of this library"),
    "too large": (
        dumps({"v": 1, "agent": {**AGENT, "name": "x" * MAX_BYTES}}),
        f"more than {MAX_BYTES:,} bytes",
    ),
    "300 levels": (dumps({"v": 1, "agent": {**AGENT, "limits": nested(300)}}), "levels"),
    "50,000 levels": ('{"v":1,"agent":' + '{"x":' * 50_000 + "1" + "}" * 50_001, "too many levels"),
    "an integer beyond 64 bits": (dumps({"v": 1, "agent": {**AGENT, "limits": 2**70}}), "beyond 64 bits"),
    "another content": (dumps({"v": 1, "agent": changed(name="B")}), "does not have the hash"),
    "in Python": (dumps({"v": 1, "in_code": True, "agent": AGENT}), "does not have the hash"),
}
"""A text, and why it is refused."""


@pytest.mark.parametrize(("text", "why"), BROKEN.values(), ids=BROKEN)
def test_a_text_that_is_not_this_definition_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        StoredDefinition.of(text, source().content_hash)
