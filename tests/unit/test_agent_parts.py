"""The parts of an agent: which of them attempts share, and which are created for each of them."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from openagents_worker.agents import read_agents_file
from openagents_worker.agents.plugin import Plugin
from openagents_worker.memory.base import MemoryPlugin
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.patterns.react import ReActPattern
from openagents_worker.runtime.assembly import Assembly
from tests.support.runner import agent

HERE = __name__


class OwnPattern(PatternPlugin):
    """A pattern of the deployment."""


class OwnMemory(MemoryPlugin):
    """A memory of the deployment."""

    async def inject(self, context: Any) -> None: ...

    async def writeback(self, context: Any) -> None: ...


class OwnExecutor(Plugin):
    """An executor of the deployment."""

    class Config(Plugin.Config): ...

    async def execute(self, request: Any) -> None: ...


def assembly_of(**fields: Any) -> Assembly:
    read = read_agents_file(json.dumps({"agents": [agent(**fields)]}), env={})
    assert read.config is not None, read.problems
    return Assembly(read.config, env={})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [{"id": "calc", "type": "calc"}]},
        {"memory": {"type": "chain", "config": {"memories": [{"type": "buffer"}]}}},
        {"tool_executor": {"type": "retry"}},
    ],
)
def test_attempts_share_the_parts_of_an_agent_without_code_of_its_own(fields: dict[str, Any]) -> None:
    """They keep no state of a run, so they are made once."""
    assembly = assembly_of(**fields)
    assert assembly.parts("a") is assembly.parts("a")


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": {"impl": f"{HERE}.OwnPattern"}},
        {"memory": {"impl": f"{HERE}.OwnMemory"}},
        {"memory": {"type": "chain", "config": {"memories": [{"impl": f"{HERE}.OwnMemory"}]}}},
        {"tool_executor": {"impl": f"{HERE}.OwnExecutor"}},
        {"tools": [{"id": "calc", "type": "calc", "tool_executor": {"impl": f"{HERE}.OwnExecutor"}}]},
        {"tools": [{"id": "shop", "type": "mcp", "config": {"server": {"command": "sh"}}}]},
    ],
)
def test_each_attempt_has_its_own_parts_if_one_of_them_may_keep_state(fields: dict[str, Any]) -> None:
    """Code of the deployment, and toolsets, belong to one attempt, which closes them."""
    assembly = assembly_of(**fields)
    assert assembly.parts("a") is not assembly.parts("a")


def test_each_attempt_has_its_own_pattern() -> None:
    """It holds the conversation of the run."""
    parts = assembly_of(pattern={"type": "react", "config": {"max_steps": 3}}).parts("a")
    first, second = parts.new_pattern(), parts.new_pattern()
    first.context = "of the first"
    assert type(first) is type(second) is ReActPattern
    assert (first.config, first.cfg.max_steps) == (second.config, second.cfg.max_steps)
    assert not hasattr(second, "context")
    assert not hasattr(parts.new_pattern(), "context")


def test_a_copy_of_a_plugin_has_the_same_config() -> None:
    """And attributes of its own."""
    plugin = ReActPattern({"max_steps": 3})
    other = copy.copy(plugin)
    other.turn_messages = [{}]
    assert type(other) is ReActPattern
    assert other.cfg is plugin.cfg
    assert plugin.turn_messages == ()


@pytest.mark.parametrize("name", BUILTIN_PATTERNS)
def test_a_built_in_pattern_has_nothing_but_its_config_before_it_is_executed(name: str) -> None:
    """So copies of one share nothing that a run changes."""
    pattern = assembly_of(pattern={"type": name}).parts("a").new_pattern()
    assert set(vars(pattern)) == {"config", "cfg"}
