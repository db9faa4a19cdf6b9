"""Every executor, at each place where it may stand: calls that it allows are made, and others are denied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from openagents_worker import Agent, RunContext, tool
from openagents_worker.agents.executors import EXECUTORS
from openagents_worker.errors import OpenAgentsError
from tests.support.runner import process, scripted

FILES = {"read_roots": ["/srv"], "write_roots": ["/srv"]}
HOSTS = {"allow_hosts": ["example.com"], "deny_private_networks": False}
ALLOWED = {"path": "/srv/a", "url": "https://example.com/", "command": "ls"}

DECISIONS: Mapping[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "default": ({}, None),
    "safe": ({"command_allowlist": ["ls"]}, {"command": "rm"}),
    "retry": ({"inner": {"type": "safe", "config": {"command_allowlist": ["ls"]}}}, {"command": "rm"}),
    "concurrent_batch": ({"inner": {"type": "filesystem_aware", "config": FILES}}, {"path": "/etc/a"}),
    "filesystem_aware": (FILES, {"path": "/etc/a"}),
    "network_aware": (HOSTS, {"url": "https://example.org/"}),
    "composite": ({"children": [{"type": "network_aware", "config": HOSTS}]}, {"url": "https://a.org/"}),
}
"""The config of each executor, and arguments of a call that it denies; None: it denies nothing."""


@tool
async def act(path: str, url: str, command: str) -> str:
    """May do anything."""
    return "done"


async def both(context: RunContext) -> list[Any]:
    denied = DECISIONS[context.input_text][1]
    results = await context.call_tool_batch([("act", ALLOWED), ("act", {**ALLOWED, **(denied or {})})])
    return [str(each.code) if isinstance(each, OpenAgentsError) else each for each in results]


@pytest.mark.parametrize("place", ["agent", "tool"])
@pytest.mark.parametrize("type_", sorted(EXECUTORS))
async def test_an_executor_decides_alike_at_both_places(redis_url: str, type_: str, place: str) -> None:
    config, denied = DECISIONS[type_]
    executor = {"type": type_, "config": config}
    tool_ = {"id": "act", "impl": f"{__name__}.act"}
    of_tool = {"tool_executor": executor} if place == "tool" else {}
    of_agent = executor if place == "agent" else None
    definition = Agent(
        "a", pattern=both, tools=[{**tool_, **of_tool}], tool_executor=of_agent, llm=scripted()
    )
    async with process(redis_url, definition) as p:
        record = await p.run(input_text=type_)
        assert record.result is not None
        assert record.result.final_output == ["done", "done" if denied is None else "tool.permanent"]
