"""The agents file: the original's format is read, everything in it is used or rejected, and errors point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.agents import AppConfig, load_agents, options_without_effect
from openagents_worker.errors import AgentNotFoundError, ConfigLoadError, ConfigValidationError

ROOT = Path(__file__).parents[2]
SHIPPED = [ROOT / "config" / "agents.json", *ROOT.glob("examples/*/agents.json")]
FILE_TOOLS = {"read_file", "write_file", "list_files", "delete_file", "grep_files", "ripgrep"}


def agent(**changes: Any) -> dict[str, Any]:
    minimal = {
        "id": "a",
        "name": "A",
        "llm": {"provider": "mock"},
        "pattern": {"type": "react"},
        "memory": {"type": "buffer"},
    }
    return {name: value for name, value in (minimal | changes).items() if value is not ...}


def load(*agents: dict[str, Any], env: dict[str, str] | None = None, **sections: Any) -> AppConfig:
    return load_agents(json.dumps({"agents": agents or [agent()], **sections}), env=env or {})


def refusal(*agents: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(ConfigValidationError) as caught:
        load(*agents, **sections)
    return str(caught.value)


def test_the_shipped_file_loads_without_any_variable() -> None:
    """`config/agents.json` has one agent on a real model and one that needs none."""
    config = load_agents(ROOT / "config" / "agents.json", env={})
    assistant = config.agent("assistant")
    assert assistant.llm.api_base == "https://api.openai.com/v1"
    assert {tool.id for tool in assistant.tools} >= {"calc", "read_file", "save_artifact"}
    assert config.agent("echo").llm.provider == "mock"
    assert options_without_effect(config) == []


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in SHIPPED))
def test_shipped_agents_work_in_a_folder_of_their_own(path: str) -> None:
    """Not where a deployment's code and its keys are."""
    config = load_agents(ROOT / path, env={})
    tools = [tool for one in config.agents for tool in config.agent(one.id).tools]
    roots = {Path(str(tool.config["root"])) for tool in tools if tool.type in FILE_TOOLS}

    assert all((ROOT / root).resolve() != ROOT and (ROOT / root).is_relative_to(ROOT) for root in roots)
    assert not any(tool.config.get("allow_hidden") for tool in tools)
    assert roots or path not in ("config/agents.json", "examples/demo/agents.json")


def test_defaults_are_the_originals_but_for_the_time_limits() -> None:
    """A file that says little means what it meant there; slow models have more time."""
    a = load().agent("a")
    assert (a.runtime.max_steps, a.llm.retry.max_attempts, a.llm.retry.backoff_multiplier) == (16, 6, 2.0)
    assert (a.llm.connect_timeout_ms, a.llm.timeout_ms, a.llm.whole_call_ms) == (5_000, 120_000, 600_000)
    assert a.runtime.step_timeout_ms is None
    assert a.memory.on_error == "continue"
    assert (a.tools, a.queue, a.context_assembler, a.tool_executor) == ([], None, None, None)


def test_variables_are_filled_in_and_cannot_break_the_json() -> None:
    """`${VAR}` and `${VAR:-default}`, inside of texts only; numbers are put in quotes."""
    a = agent(name="${NAME}", llm={"model": "${M:-gpt}-x"}, runtime={"max_steps": "${STEPS:-4}"})
    config = load(a, env={"NAME": 'Say "hi", "id": "b"', "M": ""})
    assert config.agents[0].name == 'Say "hi", "id": "b"'
    assert config.agents[0].llm.model == "gpt-x"
    assert config.agents[0].runtime.max_steps == 4


def test_every_missing_variable_is_named_with_its_place() -> None:
    """All of them at once, not one a start."""
    text = refusal(agent(name="${N1}", tools=[{"id": "t", "type": "calc", "config": {"x": ["${N2}"]}}]))
    assert "agents[0].name: the environment variable N1 is not set" in text
    assert "agents[0].tools[0].config.x[0]: the environment variable N2 is not set" in text


def test_an_error_shows_what_is_written_and_never_a_variables_value() -> None:
    """A key in the wrong place must not end up in a log."""
    with pytest.raises(ConfigValidationError) as caught:
        load(agent(llm={"max_tokens": "${KEY}"}), env={"KEY": "hunter2"})
    assert "agents[0].llm.max_tokens: input should be a valid integer" in str(caught.value)
    assert 'found "${KEY}"' in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"llm": None}, "agents[0].llm: an agent needs a model"),
        ({"llm": ...}, "agents[0].llm: an agent needs a model"),
        ({"memory": ...}, "agents[0].memory: field required"),
        ({"patern": {}}, "agents[0].patern: unknown key; did you mean 'pattern'?"),
        ({"llm": {"temperature": 3}}, "agents[0].llm.temperature: input should be less than or equal to 2"),
        ({"llm": {"retry": {"attempts": 1}}}, "retry.attempts: unknown key; did you mean 'max_attempts'"),
        ({"runtime": {"max_steps": 0}}, "agents[0].runtime.max_steps: input should be greater than or"),
        ({"memory": {"type": "buffer", "on_error": "panic"}}, "agents[0].memory.on_error: input should be"),
        ({"pattern": {}}, "agents[0].pattern: set exactly one of 'type'"),
        ({"pattern": {"type": "react", "impl": "a.B"}}, "both are set"),
        ({"pattern": {"impl": "rm -rf"}}, "agents[0].pattern.impl: must have the form package.module.Class"),
        ({"tools": [{"id": "my tool", "type": "calc"}]}, "agents[0].tools[0].id: a tool's id is"),
        ({"tools": [{"id": "t", "type": "calc"}, {"id": "t", "type": "uuid"}]}, "tools[0] already has"),
        ({"tool_executor": {"type": "retri"}}, "agents[0].tool_executor: there is no tool_executor of the"),
        (
            {"tools": [{"id": "t", "type": "calc", "tool_executor": {"type": "retri"}}]},
            "agents[0].tools[0].tool_executor: there is no tool_executor of the type 'retri'; did",
        ),
        (
            {"tool_executor": {"type": "composite", "config": {"children": [{"type": "retry"}]}}},
            "tool_executor.config.children[0]: only filesystem_aware",
        ),
        (
            {
                "tool_executor": {
                    "type": "composite",
                    "config": {"children": [{"type": "network_aware", "config": {"x": 1}}]},
                }
            },
            "tool_executor.config.children[0].config.x: unknown key",
        ),
        (
            {"tool_executor": {"type": "retry", "config": {"inner": {"type": "safe", "impl": "a.B"}}}},
            "tool_executor.config.inner: needs either type or impl",
        ),
        ({"tool_executor": {"type": "safe", "config": {"x": 1}}}, "agents[0].tool_executor.config.x"),
        ({"tool_executor": {"type": "retry", "config": {"max_attempts": 0}}}, "tool_executor.config.max_att"),
        ({"tool_executor": {"type": "retry", "config": {"inner": {"type": "x"}}}}, "of the type 'x'"),
        ({"queue": "two words"}, "agents[0].queue"),
        ({"id": ""}, "agents[0].id"),
    ],
)  # fmt: skip
def test_a_wrong_agent_is_refused_and_the_place_is_named(changes: dict[str, Any], says: str) -> None:
    """File, JSON path, what is wrong, what would be right."""
    text = refusal(agent(**changes))
    assert says in text
    assert text.startswith("agents file:")


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"agnts": []}, "agnts: unknown key; did you mean 'agents'?"),
        ({"multi_agent": {"max_delegation_depth": 0}}, "multi_agent.max_delegation_depth: "),
        ({"multi_agent": {"default_child_budget": {"max_stps": 1}}}, "did you mean 'max_steps'"),
        (
            {"diagnostics": {"type": "langfuse", "impl": "my.Exporter"}},
            "diagnostics: set 'type' (a registered name) or 'impl' (package.module.Class), not both",
        ),
        (
            {"skills": {"config": {"search_path": ["s"]}}},
            "skills.config.search_path: unknown key; did you mean 'search_paths'?",
        ),
        ({"session": {"type": "sqlit"}}, "session.type: did you mean 'sqlite'?"),
        ({"events": {"type": "kafka"}}, "events.type: known: async, "),
        ({"logging": {"level": "LOUD"}}, "logging.level: must be one of DEBUG"),
        (
            {"logging": {"loguru_sinks": [{"target": "stderr"}]}},
            "logging.loguru_sinks: loguru is not supported",
        ),
    ],
)
def test_what_does_not_work_is_refused_and_never_ignored(sections: dict[str, Any], says: str) -> None:
    """An option that is read and then forgotten is worse than an error."""
    assert says in refusal(**sections)


def test_two_agents_cannot_share_an_id() -> None:
    """The second would never be reached."""
    assert "agents[1].id: agents[0] already has the id 'a'" in refusal(agent(), agent(name="B"))


def test_selectors_that_mean_redis_here_are_accepted_with_one_notice_each() -> None:
    """An original file runs unchanged; what is different is said."""
    config = load(
        agent(runtime={"session_queue_size": 5}),
        session={"type": "sqlite", "config": {"db_path": "x"}},
        events={"type": "async"},
        runtime={"type": "default"},
        diagnostics={"type": "null"},
        skills={"type": "local"},
        multi_agent={"enabled": False},
        version="1.1",
    )
    assert options_without_effect(config) == [
        "version '1.1' is read as '1.0'",
        "session.type 'sqlite': sessions are kept in Redis",
        "events.type 'async': events are kept in Redis; handle.events() reads them",
        "agent 'a': runtime.session_queue_size has no effect: queues are in Redis and bounded by its memory",
    ]


def test_the_originals_classes_for_sessions_and_events_are_accepted_and_not_loaded() -> None:
    """With one notice each: Redis has their place, so nothing of them is imported."""
    config = load(
        agent(),
        session={"impl": "no.such.Session", "config": {"dsn": "x"}},
        events={"impl": "no.such.Bus", "config": {"inner": {"type": "async"}}},
    )
    assert options_without_effect(config) == [
        "session.impl 'no.such.Session': sessions are kept in Redis",
        "events.impl 'no.such.Bus': events are kept in Redis; handle.events() reads them",
    ]


def test_runtime_defaults_reach_the_agents_that_choose_nothing() -> None:
    """One registry for both places: what an agent may name, the runtime section may name."""
    chosen = agent(id="b", context_assembler={"type": "truncating"})
    config = load(agent(), chosen, runtime={"config": {"context_assembler": {"type": "head_tail"}}})
    types = [ref.type for id_ in "ab" if (ref := config.agent(id_).context_assembler)]
    assert types == ["head_tail", "truncating"]


@pytest.mark.defect("L03")
def test_a_pattern_of_ones_own_may_do_without_a_model() -> None:
    """A class that never asks a model need not name one; built-in patterns must."""
    config = load(agent(pattern={"impl": "my.patterns.Rules"}, llm=...))
    assert config.agent("a").llm.provider == "mock"


def test_a_providers_own_options_are_passed_on() -> None:
    """The model section is open: the provider knows its options, this file does not."""
    assert load(agent(llm={"seed": 7})).agent("a").llm.model_extra == {"seed": 7}


def test_an_unknown_agent_is_answered_with_the_one_that_was_meant() -> None:
    """Did you mean; the others are nobody's business who asks for one."""
    with pytest.raises(AgentNotFoundError) as caught:
        load(agent(id="assistant"), agent(id="echo")).agent("asistant")
    assert "did you mean 'assistant'?" in str(caught.value)
    assert "echo" not in str(caught.value)


def test_the_definition_hash_changes_with_the_definition_and_not_with_a_secret() -> None:
    """A rotated key makes no run's journal unusable; another step limit is another definition."""
    base = agent(llm={"provider": "x", "extra_headers": {"Authorization": "${KEY}"}})
    hashes = [load(base, env={"KEY": key}).agent("a").definition_hash for key in ("k1", "k2")]
    other = load(base | {"runtime": {"max_steps": 3}}, env={"KEY": "k1"}).agent("a").definition_hash
    assert hashes[0] == hashes[1] != other
    assert len(other) == 64


def test_redact_keys_of_the_file_are_added_to_ours() -> None:
    """A file can hide more, never less."""
    keys = load(logging={"redact_keys": ["pin"]}, diagnostics={"redact_keys": ["iban"]}).redact_keys
    assert {"pin", "iban", "api_key", "password"} <= set(keys)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{\n  "agents": [,]}', "not JSON at line 2, column 14"),
        ('{"agents": 1, "agents": 2}', "has the key 'agents' twice"),
        ('{"agents": NaN}', "NaN is not JSON"),
        ('{"agents": ${N}}', "put a variable in quotes"),
    ],
)
def test_a_text_that_is_not_json_is_refused_with_line_and_column(text: str, says: str) -> None:
    """The editor can jump there."""
    with pytest.raises(ConfigLoadError) as caught:
        load_agents(text, env={})
    assert says in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    """The path is in the error, and the variable that chooses it in the hint."""
    with pytest.raises(ConfigLoadError, match="OPENAGENTS_CONFIG") as caught:
        load_agents(tmp_path / "none.json")
    assert str(tmp_path / "none.json") in str(caught.value)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigLoadError, match="not UTF-8"):
        load_agents(str(tmp_path / "binary.json"))
    with pytest.raises(ConfigLoadError, match="cannot be read"):
        load_agents(tmp_path)


def test_a_file_of_another_shape_is_refused() -> None:
    """An object, an empty list, or no agents at all."""
    assert "agents.id: the environment variable X is not set" in refusal_of('{"agents": {"id": "${X}"}}')
    assert "agents: list should have at least 1 item" in refusal_of('{"agents": []}')
    assert "agents: field required" in refusal_of("{}")


def refusal_of(text: str) -> str:
    with pytest.raises(ConfigValidationError) as caught:
        load_agents(text, env={})
    return str(caught.value)
