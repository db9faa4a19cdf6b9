"""What the agents file may say about MCP servers, and how a mistake in it is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.agents import read_agents_file
from openagents_worker.redaction import safe_message
from openagents_worker.runtime.start_checks import find_problems
from openagents_worker.tools.mcp import options
from openagents_worker.tools.mcp.options import ServerOptions
from tests.support.runner import agent


def problems(config: dict[str, Any], **file: Any) -> list[str]:
    """The problems of an agents file with this MCP server, as `validate` shows them."""
    definition = agent(tools=[{"id": "srv", "type": "mcp", "config": config}])
    text = json.dumps({**file, "agents": [definition]}, indent=1)
    return [str(problem) for problem in find_problems(read_agents_file(text, env={}), {})]


HERE = {"server": {"command": "sh"}}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "server: field required"),
        ({"server": {}}, "server: set exactly one of 'command' (stdio) and 'url' (HTTP); none is set"),
        ({"server": {"command": "sh", "url": "http://a"}}, "both are set"),
        ({"server": {"comand": "sh"}}, "server.comand: unknown key; did you mean 'command'?"),
        ({"server": {"command": "no-such-program"}}, "server.command: there is no program 'no-such-program'"),
        ({"server": {"url": "mcp.example.com"}}, "server.url: must be an address such as https://"),
        ({"server": {"url": "http://a", "env": {"A": "1"}}}, "server.env: a server with a url does not have"),
        ({"server": {"command": "sh", "headers": {"a": "b"}}}, "server.headers: a server with a command"),
        ({"server": {"url": "http://a", "headers": {"a b": "c"}}}, "server.headers.a b: is not a valid HTTP"),
        ({"server": {"command": "sh", "env": {"A=B": "c"}}}, "server.env.A=B: is not a valid environment"),
        (
            {"server": {"url": "http://a", "bearer_token_env": "A", "bearer_token_service": "b"}},
            "set only one of 'bearer_token_env' and 'bearer_token_service'",
        ),
        ({**HERE, "prelaunch": "eager"}, "prelaunch: eager needs connection_mode 'pooled'"),
        ({**HERE, "pool_scope": "worker"}, "pool_scope: worker needs connection_mode 'pooled'"),
        ({**HERE, "as_one_tool": True, "overrides": {"a": {}}}, "overrides: has no effect on the one tool"),
        ({**HERE, "as_one_tool": True, "prefix": "a_"}, "prefix: has no effect on the one tool"),
        ({**HERE, "as_one_tool": True, "resources": True}, "resources: has no effect on the one tool"),
        ({**HERE, "as_one_tool": True, "prompts": True}, "prompts: has no effect on the one tool"),
        ({**HERE, "connection_mode": "shared"}, "connection_mode: input should be 'per_call' or 'pooled'"),
        ({**HERE, "tools": ["a"], "overrides": {"b": {}}}, "overrides.b: the tool is not in 'tools'"),
        ({**HERE, "overrides": {"b": {"readonly": True}}}, "did you mean 'read_only'?"),
        (
            {**HERE, "overrides": {"a": {"name": "x"}, "b": {"name": "x"}}},
            "overrides.b.name: another tool has the same name",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_path(config: dict[str, Any], says: str) -> None:
    [problem] = problems(config)
    assert says in problem
    assert problem.startswith("line ")
    assert ": agents[0].tools[0].config" in problem


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_pooled_sessions": 0}, "runtime.config.mcp.max_pooled_sessions"),
        ({"max_idle_seconds": -1}, "runtime.config.mcp.max_idle_seconds"),
        ({"max_pooled": 1}, "did you mean 'max_pooled_sessions'?"),
    ],
)
def test_limits_are_checked(limits: dict[str, Any], says: str) -> None:
    [problem] = problems(HERE, runtime={"config": {"mcp": limits}})
    assert says in problem


def test_the_config_of_the_original_is_valid() -> None:
    """All of its options, with the values that it has by default."""
    server = {"command": "sh", "args": [], "env": {}, "cwd": None, "env_passthrough": ["PATH"]}
    server |= {"init_timeout_ms": None, "url": None, "headers": {}}
    config: dict[str, Any] = {"server": server, "tools": [], "connection_mode": "pooled"}
    config |= {"probe_on_preflight": False, "dedup_inflight": True, "prelaunch": "eager"}
    limits = {
        "max_pooled_sessions": None,
        "max_idle_seconds": None,
        "preflight_cache_success_ttl": None,
    }
    assert problems(config, runtime={"type": "default", "config": {"mcp": limits}}) == []


def test_without_the_sdk_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_is_installed", lambda: False)
    [problem] = problems(HERE)
    assert "needs the package mcp" in problem
    assert "pip install 'openagents-worker[mcp]'" in problem


def test_the_identity_of_a_server_is_its_whole_definition() -> None:
    """Any difference makes it another server. It shows nothing of the definition."""
    every: list[dict[str, Any]] = [
        {"command": "sh"},
        {"command": "sh", "args": ["a"]},
        {"command": "sh", "env": {"TENANT": "a"}},
        {"command": "sh", "env": {"TENANT": "b"}},
        {"command": "sh", "cwd": "/"},
        {"command": "sh", "env_passthrough": ["PATH"]},
        {"url": "http://a"},
        {"url": "http://a", "headers": {"x-api-key": "secret"}},
        {"url": "http://a", "transport": "sse"},
    ]
    identities = [ServerOptions.model_validate(each).identity() for each in every]
    assert len(set(identities)) == len(every)
    assert identities[0] == ServerOptions.model_validate({**every[0], "init_timeout_ms": 7}).identity()


def test_the_address_is_shown_without_what_may_be_secret() -> None:
    url = "https://user:secret@mcp.example.com/mcp?key=secret"
    assert "secret" not in ServerOptions.model_validate({"url": url}).shown
    assert ServerOptions(command=str(Path("/usr/bin/uvx"))).shown == "uvx"


@pytest.mark.parametrize(
    ("server", "secret"),
    [
        ({"url": "http://a", "headers": {"authorization": "Basic Wm9lOmhlcnNlY3JldA"}}, "Wm9lOmhlcnNlY3JldA"),
        ({"url": "http://a", "headers": {"x-api-key": "aB3dE5gH7jK9"}}, "aB3dE5gH7jK9"),
        ({"url": "http://zoe:aC4eF6hI8kL0@a/mcp"}, "aC4eF6hI8kL0"),
        ({"url": "http://a/mcp?api_key=aD5fG7iJ9lM1"}, "aD5fG7iJ9lM1"),
        ({"command": "sh", "env": {"API_KEY": "aE6gH8jK0mN2"}}, "aE6gH8jK0mN2"),
        ({"command": "sh", "env": {"DATABASE_URL": "postgres://zoe:aF7hI9kL1nO3@db"}}, "aF7hI9kL1nO3"),
    ],
)
def test_a_secret_of_the_agents_file_is_masked_wherever_a_server_repeats_it(
    server: dict[str, Any], secret: str
) -> None:
    """Alone, without the scheme or the URL around it."""
    assert safe_message(f"I got {secret} today") != "I got *** today"
    ServerOptions.model_validate(server).remember_secrets()
    assert safe_message(f"I got {secret} today") == "I got *** today"
