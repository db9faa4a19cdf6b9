"""Agents in Python: their fields and checks are those of the agents file, and both stand side by side."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openagents_worker import Agent, RunBudget, agent, register_agent, tool
from openagents_worker.agents import AgentDefinition, load_agents
from openagents_worker.agents.code import read_agents, registered_agents, unregister_agents
from openagents_worker.errors import ConfigLoadError, ConfigValidationError
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.settings import load_settings
from openagents_worker.tools import ToolPlugin
from tests.support.runner import agent as in_file

HERE = "tests.unit.test_agents_in_python"


@pytest.fixture(autouse=True)
def _nothing_registered() -> Iterator[None]:
    unregister_agents()
    yield
    unregister_agents()


@tool
async def refund(order_id: str) -> str:
    """Pays an order back."""
    return order_id


def look_up(order_id: str) -> str:
    """Finds an order."""
    return order_id


def undocumented(order_id: str) -> str:
    return order_id


async def researcher(context: Any) -> str:
    return str(context.input_text)


class Pattern(PatternPlugin):
    async def execute(self) -> str:
        return "done"


class Pay(ToolPlugin):
    name = "pay"


class NamedByTheRun(ToolPlugin):
    """A class whose name is known only for an instance."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "later"


class Duck:
    """A tool of the original SDK's contract, without a base class."""

    tool_name = "quack"


class Unnamed(ToolPlugin): ...


def problems(**options: Any) -> list[tuple[str, str]]:
    """Path and message of each problem of an agent with these options."""
    with pytest.raises(ConfigValidationError) as caught:
        Agent("a", **{"llm": "mock", **options})
    assert all(problem["place"].startswith("the agent 'a' at " + HERE) for problem in caught.value.problems)
    return [(problem["path"], problem["message"]) for problem in caught.value.problems]


# --- the same fields -------------------------------------------------------------------------------------


def test_an_agent_has_the_fields_of_the_agents_file() -> None:
    """The file's model is the only place that defines fields."""
    parameters = set(inspect.signature(Agent).parameters) - {"system_prompt"}
    assert parameters == set(AgentDefinition.model_fields)


def test_an_agent_in_python_equals_the_same_agent_in_the_file() -> None:
    """Also its hash, so it can be moved from one to the other while runs wait."""
    written = {
        "id": "support",
        "name": "support",
        "memory": {"type": "buffer"},
        "pattern": {"type": "react", "config": {"system_prompt": "Be brief."}},
        "llm": {"provider": "openai_compatible", "model": "gpt-5:mini"},
        "tools": [
            {"id": "calc", "type": "calc"},
            {"id": "refund", "impl": f"{HERE}.refund"},
            {"id": "pay_back", "impl": f"{HERE}.refund", "timeout_ms": 500},
        ],
        "runtime": {"max_steps": 3},
        "limits": {"max_tool_calls": 5},
        "queue": "support",
    }
    in_python = Agent(
        "support",
        llm="openai_compatible:gpt-5:mini",
        system_prompt="Be brief.",
        tools=["calc", refund, {"id": "pay_back", "impl": refund, "timeout_ms": 500}],
        runtime={"max_steps": 3},
        limits=RunBudget(max_tool_calls=5),
        queue="support",
    )
    [from_file] = load_agents(json.dumps({"agents": [written]})).agents
    assert in_python.definition == from_file
    assert in_python.definition.definition_hash == from_file.definition_hash


def test_patterns_tools_and_memories_are_named_or_given_themselves() -> None:
    """A name without a dot is a built-in, a path with dots is imported, code needs no import."""

    async def nested(context: Any) -> None: ...

    def ref(**options: Any) -> AgentDefinition:
        return Agent("a", **{"llm": "mock", **options}).definition

    assert ref(pattern="react").pattern.type == "react"
    assert ref(pattern=f"{HERE}.Pattern").pattern.impl == f"{HERE}.Pattern"
    assert ref(pattern=Pattern).pattern.impl == f"{HERE}.Pattern"
    assert ref(pattern={"impl": Pattern, "config": {"max_steps": 2}}).pattern.config == {"max_steps": 2}
    closure = f"{HERE}.test_patterns_tools_and_memories_are_named_or_given_themselves.nested"
    assert ref(pattern=nested).pattern.impl == closure
    tools = ref(tools=[look_up, f"{HERE}.refund", "calc"]).tools
    assert [tool.id for tool in tools] == ["look_up", "refund", "calc"]
    assert ref(memory="window_buffer").memory.type == "window_buffer"
    assert ref(memory={"type": "buffer", "on_error": "fail"}).memory.on_error == "fail"
    assert ref(context_assembler="truncating").context_assembler.type == "truncating"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("code", "id_"),
    [(Pay, "pay"), (NamedByTheRun, "NamedByTheRun"), (Duck, "quack"), (Unnamed, "Unnamed")],
)
def test_the_id_of_a_class_tool_is_its_name(code: type, id_: str) -> None:
    """The model sees a tool under its id. A class without a name has that of the class."""
    for entry in (code, {"impl": code}):
        (ref,) = Agent("a", llm="mock", tools=[entry]).definition.tools
        assert ref.id == id_


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"llm": None}, "llm", "an agent needs a model"),
        ({"runtime": {"max_step": 3}}, "runtime.max_step", "unknown key"),
        ({"runtime": {"max_steps": "many"}}, "runtime.max_steps", 'found "many"'),
        ({"tools": ["two words"]}, "tools[0].id", "function name"),
        ({"tools": [refund, refund]}, "tools[1].id", "already has the id 'refund'"),
        ({"tools": [5]}, "tools[0]", "a int is not a tool"),
        ({"tools": "calc"}, "tools", "must be a list"),
        ({"pattern": look_up}, "pattern", "a function is not a pattern"),
        ({"pattern": 5}, "pattern", "a int is not a pattern"),
        ({"pattern": {"type": "react", "impl": Pattern}}, "pattern", "both are set"),
        ({"limits": {"max_stepz": 3}}, "limits.max_stepz", "unknown key"),
        ({"queue": "a b"}, "queue", "should match"),
        ({"llm": {"provider": "mock", "seed": object()}}, "llm.seed", "must be a JSON value; found a object"),
        ({"llm": {"provider": "mock", "temperature": float("nan")}}, "", "NaN"),
        (
            {"system_prompt": "x", "pattern": {"type": "react", "config": {"system_prompt": "y"}}},
            "pattern.config.system_prompt",
            "also set",
        ),
    ],
)
def test_a_mistake_is_an_error_where_the_agent_is_written(
    options: dict[str, Any], path: str, message: str
) -> None:
    """With the module, the line, the field, and what is right."""
    found = problems(**options)
    assert [at for at, _ in found] == [path]
    assert message in found[0][1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(look_up),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["id", "type", "impl", "config", "provider", "max_steps", "on_error", "timeout_ms"])
OPTIONS = st.dictionaries(
    st.sampled_from(sorted(set(inspect.signature(Agent).parameters) - {"id"})),
    JSON | st.dictionaries(KEYS, JSON, max_size=3) | st.lists(st.dictionaries(KEYS, JSON, max_size=3)),
)


@settings(max_examples=60, deadline=None)
@given(id=st.text(max_size=5) | JSON, options=OPTIONS)
def test_any_arguments_are_an_agent_or_one_error(id: Any, options: dict[str, Any]) -> None:
    """Whatever is given."""
    with suppress(ConfigValidationError):
        assert Agent(id, **options).definition.definition_hash


def test_all_mistakes_are_told_at_once() -> None:
    """As for a file."""
    assert [path for path, _ in problems(llm=None, queue="a b", tools=["two words"])] == [
        "llm",
        "queue",
        "tools[0].id",
    ]


# --- the registry ----------------------------------------------------------------------------------------


def test_the_decorator_registers_an_agent_and_keeps_the_function() -> None:
    """It can be called in a unit test."""
    decorated = agent("researcher", llm="mock")(researcher)
    assert decorated is researcher
    [registered] = registered_agents()
    assert registered.definition.pattern.impl == f"{HERE}.researcher"
    with pytest.raises(TypeError, match="takes no pattern"):
        agent("x", pattern="react")
    with pytest.raises(ConfigValidationError, match="a function is not a pattern"):
        agent("x", llm="mock")(look_up)  # type: ignore[type-var]


def test_an_id_is_registered_once() -> None:
    """The error names both places."""
    first = register_agent(Agent("a", llm="mock"))
    assert register_agent(first) is first
    with pytest.raises(ConfigValidationError) as caught:
        register_agent(Agent("a", llm="mock"))
    text = str(caught.value)
    assert caught.value.code == "config.validation"
    assert text.count(f"the agent 'a' at {HERE}:") == 2
    with pytest.raises(TypeError, match="takes an Agent"):
        register_agent({"id": "b"})  # type: ignore[arg-type]


# --- beside the file -------------------------------------------------------------------------------------


def file_with(tmp_path: Path, *agents: dict[str, Any], **sections: Any) -> Path:
    path = tmp_path / "agents.json"
    path.write_text(json.dumps({"agents": list(agents), **sections}, indent=1))
    return path


def assembly_of(path: Path | None, **env: str) -> Assembly:
    settings = {} if path is None else {"OPENAGENTS_CONFIG": str(path)}
    return Assembly.from_settings(load_settings({**settings, **env}), env={})


def test_a_worker_serves_agents_of_both(tmp_path: Path) -> None:
    """It announces them, and defaults of the file hold for both."""
    register_agent(Agent("researcher", llm="mock", pattern=researcher, tools=[look_up, refund]))
    path = file_with(
        tmp_path, in_file("a"), runtime={"config": {"context_assembler": {"type": "truncating"}}}
    )
    assembly = assembly_of(path)
    assert assembly.announcements()[::2] == ["a", "researcher"]
    parts = assembly.parts("researcher")
    assert parts.definition.context_assembler is not None
    assert parts.definition.context_assembler.type == "truncating"
    assert [tool.tool_name for tool in parts.single_tools().values()] == ["look_up", "refund"]


def test_without_a_file_there_are_the_agents_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the settings name must exist."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigLoadError):
        assembly_of(None)
    register_agent(Agent("researcher", llm="mock", pattern=researcher))
    assert assembly_of(None).announcements()[::2] == ["researcher"]
    with pytest.raises(ConfigLoadError):
        assembly_of(tmp_path / "other.json")


def test_an_id_in_both_is_one_error_that_names_both_places(tmp_path: Path) -> None:
    """Nobody can know which of them is meant, so neither is served."""
    register_agent(Agent("a", llm="mock", pattern=researcher))
    path = file_with(tmp_path, in_file("a"), in_file("b"))
    file = read_agents(path, env={})
    assert file.config is not None
    assert [agent.id for agent in file.config.agents] == ["b"]
    [in_the_file, in_python] = [problem.text for problem in file.problems]
    assert in_the_file.startswith("line 4: agents[0].id: the agent 'a' at " + HERE)
    assert in_the_file.endswith("has the same id")
    assert in_python.startswith(f"the agent 'a' at {HERE}")
    assert in_python.endswith(f": id: agents[0] of {path} already has the id 'a'")

    assembly = assembly_of(path)
    assert list(assembly.unavailable) == ["a"]
    assert assembly.unavailable["a"].code == "config.validation"
    assert HERE in assembly.unavailable["a"].reason
    assert "agents[0]" in assembly.unavailable["a"].reason


def test_a_plugin_of_an_agent_in_python_is_checked_at_start(tmp_path: Path) -> None:
    """The agent is not served, and its problem names the place. The others are served."""
    register_agent(Agent("bad", llm="mock", tools=[undocumented]))
    register_agent(Agent("worse", llm={"provider": "mok"}))
    assembly = assembly_of(file_with(tmp_path, in_file("a")))
    assert set(assembly.unavailable) == {"bad", "worse"}
    assert f"the agent 'bad' at {HERE}" in assembly.unavailable["bad"].reason
    assert "tools[0].config: the tool 'undocumented' has no description" in assembly.unavailable["bad"].reason
    assert "llm.provider" in assembly.unavailable["worse"].reason


def test_a_module_with_a_mistake_tells_the_mistake_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only that it cannot be imported."""
    (tmp_path / "shop_agents.py").write_text(
        "from openagents_worker import Agent, register_agent\nregister_agent(Agent('a', queue='a b'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigValidationError, match=r"the agent 'a' at shop_agents:2: queue"):
        assembly_of(None, OPENAGENTS_IMPORTS="shop_agents")
    sys.modules.pop("shop_agents", None)


def test_a_module_imported_under_two_names_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A usual mistake with src layouts."""
    for name in ("first", "second"):
        (tmp_path / f"shop_{name}.py").write_text(
            "from openagents_worker import Agent, register_agent\n\nregister_agent(Agent('a', llm='mock'))\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("shop_first")
    with pytest.raises(ConfigValidationError, match=r"(?s)shop_second:3.*shop_first:3") as caught:
        importlib.import_module("shop_second")
    assert "imported under two names" in str(caught.value)
