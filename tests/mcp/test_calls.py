"""What a run gets from the tools of an MCP server: their descriptions, results and errors."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any
from unittest.mock import ANY

import pytest

from openagents_worker.models import RunRecord
from tests.mcp.conftest import FaultyServer
from tests.support.mcp_server import PIXEL
from tests.support.runner import process


def output_of(record: RunRecord) -> Any:
    assert record.result is not None
    assert record.result.error_details is None, record.result.error_details
    return record.result.final_output


async def results(redis_url: str, agent: dict[str, Any], **file: Any) -> list[Any]:
    async with process(redis_url, agent, **file) as p:
        found: list[Any] = output_of(await p.run())["results"]
        return found


async def test_the_model_gets_each_tool_of_a_server(redis_url: str, server: FaultyServer) -> None:
    """With its own schema, under a name that every provider accepts. One with a bad schema is left out."""
    async with process(redis_url, server.agent(("add", {"a": 1, "b": 2}))) as p:
        output = output_of(await p.run())

    tools = output["tools"]
    assert "take_note" in tools
    assert "bad_schema" not in tools
    assert tools["add"]["description"] == "Does add."
    assert tools["add"]["parameters"]["required"] == ["a", "b"]
    assert output["results"] == [{"sum": 3}]


async def test_the_name_on_the_server_is_used_for_the_call(redis_url: str, server: FaultyServer) -> None:
    agent = server.agent(("notes_take_note", {"text": "a"}), prefix="notes_")
    assert await results(redis_url, agent) == ["take.note is done"]
    assert server.called() == ["take.note"]


async def test_two_servers_with_the_same_tools_need_a_prefix(redis_url: str, server: FaultyServer) -> None:
    tools = [server.tool(), {**server.tool(), "id": "other"}]
    async with process(redis_url, server.agent(tools=tools)) as p:
        record = await p.run()
    assert record.result is not None
    assert record.result.error_details is not None
    assert record.result.error_details.code == "plugin.config"
    assert "set prefix" in (record.result.error_details.hint or "")


async def test_the_options_of_the_agents_file_replace_what_the_server_says(
    redis_url: str, server: FaultyServer
) -> None:
    agent = server.agent(
        ("plus", {"a": 1, "b": 1}),
        tools=None,
        overrides={"add": {"name": "plus", "description": "Adds."}},
    )
    async with process(redis_url, agent) as p:
        output = output_of(await p.run())
    assert output["tools"]["plus"]["description"] == "Adds."
    assert output["results"] == [{"sum": 2}]


async def test_only_the_named_tools_are_offered(redis_url: str, server: FaultyServer) -> None:
    async with process(redis_url, server.agent(("add", {"a": 1, "b": 1}), tools=None)) as p:
        assert len(output_of(await p.run())["tools"]) > 10
    only = server.tool(tools=["add"])
    async with process(redis_url, server.agent(("add", {"a": 1, "b": 1}), tools=[only]), name="x") as p:
        assert list(output_of(await p.run("r2"))["tools"]) == ["add"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("garbage", "after garbage"),
        ("invalid", {"code": "tool.error", "message": ANY}),
        ("fail", {"code": "tool.error", "message": "the disk is full, token sk-***"}),
    ],
)
async def test_what_a_call_returns(redis_url: str, server: FaultyServer, name: str, expected: Any) -> None:
    """Lines that are not messages are skipped. An error of the tool is an error for the model, masked."""
    [found] = await results(redis_url, server.agent((name, {})))
    assert found == expected


async def test_images_and_resources_are_blocks(redis_url: str, server: FaultyServer) -> None:
    [found] = await results(redis_url, server.agent(("blocks", {})))
    assert found == [
        {"type": "text", "text": "a pixel"},
        {"type": "image", "data": PIXEL, "media_type": "image/png"},
        {"type": "text", "text": "one"},
        {"type": "text", "text": '{"uri":"note://2","name":"two"}'},
    ]


async def test_a_result_that_is_too_large_ends_the_connection_and_not_the_worker(
    redis_url: str, server: FaultyServer
) -> None:
    [huge, then] = await results(redis_url, server.agent(("huge", {}), ("add", {"a": 1, "b": 1})))
    assert huge["code"] == "tool.permanent"
    assert "more than 8,388,608 bytes" in huge["message"]
    assert then == {"sum": 2}


async def test_a_server_sees_no_variable_that_its_options_do_not_name(
    redis_url: str, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APP_MODE", "test")
    monkeypatch.setenv("APP_TOKEN", "abcdefgh12345")
    options = {"env": {"OWN": "1"}, "env_passthrough": ["APP_*"]}
    [found] = await results(redis_url, server.agent(("env", {}), server=options))
    seen = json.loads(found)
    seen.pop("LC_CTYPE", None)  # Python sets it itself
    assert seen == {"OWN": "1", "APP_MODE": "test"}


async def test_the_log_has_what_a_server_writes_to_stderr(
    redis_url: str, server: FaultyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Without secrets, and not more than a few lines of each connection."""
    caplog.set_level("INFO", logger="openagents_worker.tools.mcp")
    assert await results(redis_url, server.agent(("noisy", {}))) == ["quiet again"]

    lines = [record.getMessage() for record in caplog.records if "mcp.server_stderr" in record.getMessage()]
    assert any("a line on stderr with sk-***" in line for line in lines)
    assert not any("sk-abcdefgh12345678" in line for line in lines)
    assert any("line 100" in line for line in lines)
    assert not any("line 499" in line for line in lines)
    assert len([line for line in lines if "dropped" in line]) == 1


async def test_a_call_that_hangs_ends_at_its_timeout(redis_url: str, server: FaultyServer) -> None:
    """And the server is told that nobody waits for it."""
    agent = server.agent(("hang", {}), overrides={"hang": {"timeout_ms": 300}}, connection_mode="pooled")
    async with process(redis_url, agent) as p:
        record = await p.run(durable=False)
        [found] = output_of(record)["results"]
    assert found["code"] == "tool.timeout"
    assert "notifications/cancelled" in [entry["method"] for entry in server.happened("notification")]


async def test_resources_and_prompts_are_tools(redis_url: str, server: FaultyServer) -> None:
    found = await results(
        redis_url,
        server.agent(
            ("srv_list_resources", {}),
            ("srv_read_resource", {"uri": "note://1"}),
            ("srv_list_prompts", {}),
            ("srv_get_prompt", {"name": "greet", "arguments": {"who": "Ada"}}),
            resources=True,
            prompts=True,
        ),
    )
    assert found == [
        [{"uri": "note://1", "name": "one"}],
        "content of note://1",
        [{"name": "greet", "arguments": [{"name": "who"}]}],
        [{"role": "user", "content": "Greet Ada."}],
    ]


async def test_a_server_as_one_tool_is_that_of_the_original(redis_url: str, server: FaultyServer) -> None:
    """Its parameters and its result are those of the original SDK."""
    call = {"tool": "add", "arguments": {"a": 2, "b": 2}}
    async with process(
        redis_url,
        server.agent(
            ("srv", call), ("srv", {"tool": "fail"}), tools=None, as_one_tool=True, approval="never"
        ),
    ) as p:
        output = output_of(await p.run())
    assert list(output["tools"]) == ["srv"]
    assert output["results"][0] == {"content": ["4"], "isError": False}
    assert output["results"][1]["isError"] is True


@pytest.mark.parametrize("tools", [[], ["add", "wipe"]])
async def test_the_one_tool_of_a_server_that_may_destroy_something_needs_approvals(
    redis_url: str, server: FaultyServer, tools: list[str]
) -> None:
    """If one of the tools that can be called with it has the hint."""
    agent = server.agent(tools=[server.tool(as_one_tool=True, tools=tools)])
    agent["pattern"]["config"]["calls"] = [["srv", {"tool": "wipe"}]]
    async with process(redis_url, agent) as p:
        await p.submit()
        await p.execute()
        assert "tool.approval_needed" in await p.event_names()
    assert server.called() == []


@pytest.mark.parametrize("option", [{"approval": "always"}, {"read_only": False}, {"idempotent": False}])
async def test_a_restriction_of_a_tool_that_the_server_does_not_have_ends_the_run(
    redis_url: str, server: FaultyServer, option: dict[str, Any]
) -> None:
    """Otherwise the tool that was meant would be called without it."""
    agent = server.agent(("add", {"a": 1, "b": 2}), overrides={"ad": option})
    async with process(redis_url, agent) as p:
        record = await p.run()
    assert record.result is not None
    assert record.result.error_details is not None
    assert record.result.error_details.code == "plugin.config"
    assert "does not list a tool 'ad'" in record.result.error_details.message
    assert record.result.error_details.hint == "did you mean 'add'?"
    assert server.called() == []


@pytest.mark.parametrize("options", [{"tools": ["ad"]}, {"overrides": {"ad": {"description": "Adds."}}}])
async def test_the_log_names_a_tool_that_the_server_does_not_have(
    redis_url: str, server: FaultyServer, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    async with process(redis_url, server.agent(tools=[server.tool(**options)])) as p:
        output_of(await p.run())
    (line,) = [line for line in caplog.messages if line.startswith("mcp.tool_unknown")]
    assert "tool=ad did_you_mean=add" in line


async def test_calls_over_http_have_the_token_of_the_environment(
    redis_url: str, http_server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in no event and no record."""
    monkeypatch.setenv("MCP_TOKEN", "secret-token-of-a-tenant")
    agent = http_server.agent(("add", {"a": 1, "b": 2}), server={"bearer_token_env": "MCP_TOKEN"})
    async with process(redis_url, agent) as p:
        assert output_of(await p.run())["results"] == [{"sum": 3}]
        stored = json.dumps([await p.events(), await p.journal()])
    assert "secret-token" not in stored
    assert {post["token"] for post in http_server.happened("post")} == {"Bearer secret-token-of-a-tenant"}


@pytest.mark.skipif(version("mcp").startswith("1."), reason="version 1 of the SDK does not speak it")
async def test_a_server_that_knows_only_the_newest_protocol_is_used(
    redis_url: str, server: FaultyServer
) -> None:
    """It has no handshake, so it is asked what it can do."""
    agent = server.agent(("add", {"a": 1, "b": 2}), server={"env": {"MODERN": "1"}})
    assert await results(redis_url, agent) == [{"sum": 3}]
