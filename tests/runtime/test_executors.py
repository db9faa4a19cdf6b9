"""Executors of the agents file: time limits, retries, policies, and how many calls are made at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openagents_worker import Agent, RunContext, ToolContext, tool
from openagents_worker.agents.executors import EXECUTORS
from openagents_worker.errors import OpenAgentsError, RetryableToolError, ToolRateLimitError
from openagents_worker.models import RunState
from openagents_worker.tools import ToolExecutionSpec
from tests.support.runner import Process, agent, process, scripted
from tests.support.waiting import await_for
from tests.unit.tools.test_http import Server, reply, running

MADE: list[Any] = []
GATES: dict[str, asyncio.Event] = {}
ONE_TRY_LESS = {"initial_delay_ms": 1, "jitter": "none"}


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    MADE.clear()
    GATES["open"] = asyncio.Event()


@tool
async def flaky(fails: int, context: ToolContext, retry_after_ms: int = 0) -> str:
    """Fail so many times, then succeed."""
    MADE.append(context.idempotency_key)
    context.state["tries"] = [*context.state.get("tries", []), len(MADE)]
    if len(MADE) <= fails:
        if retry_after_ms:
            raise ToolRateLimitError("slow down", "flaky", retry_after_ms=retry_after_ms)
        raise RetryableToolError("not yet", "flaky")
    return f"try {len(MADE)}"


@tool(durable_idempotent=False)
async def pay(context: ToolContext) -> str:
    """Pay, and lose the answer."""
    MADE.append(context.idempotency_key)
    raise RetryableToolError("the answer is lost", "pay")


@tool
async def broken(context: ToolContext) -> str:
    """Fail for good."""
    MADE.append("broken")
    raise ValueError("disk is on fire")


@tool(concurrency_safe=True)
async def wait(number: int, context: ToolContext) -> int:
    """Wait for the gate."""
    MADE.append(number)
    await GATES["open"].wait()
    return number


@tool(concurrency_safe=True)
async def outer(context: ToolContext) -> Any:
    """Call another tool."""
    return await context.call_tool("wait", {"number": 7})


@tool
async def start(command: str) -> str:
    """Start a program."""
    MADE.append(command)
    return "started"


@tool
async def touch(path: str) -> str:
    """Do something with a file."""
    MADE.append(path)
    return "touched"


def caller(executor: Any, *calls: tuple[str, Any], tools: Any = None) -> Agent:
    """An agent with this executor that makes the calls as a batch; errors are shown by class and code."""

    async def batch(context: RunContext) -> Any:
        results = await context.call_tool_batch(list(calls))
        return [str(each.code) if isinstance(each, OpenAgentsError) else each for each in results]

    tools = tools or [flaky, pay, broken, wait, outer, start, touch]
    return Agent("a", pattern=batch, tools=tools, tool_executor=executor, llm=scripted({"text": "hello"}))


def retrying(**config: Any) -> dict[str, Any]:
    return {"type": "retry", "config": {**ONE_TRY_LESS, **config}}


async def output(p: Process) -> Any:
    result = (await p.record()).result
    assert result is not None
    return result.final_output if result.error_details is None else result.error_details.code


@pytest.mark.parametrize("type_", sorted(EXECUTORS))
@pytest.mark.defect("P05")
async def test_every_executor_makes_calls_and_keeps_the_cause_of_an_error(redis_url: str, type_: str) -> None:
    """P05: the message of the exception reaches the run, and its class and code are those of a tool error."""
    agent = caller({"type": type_}, ("flaky", {"fails": 0}), ("broken", {}))
    async with process(redis_url, agent) as p:
        await p.run()
        assert await output(p) == ["try 1", "tool.error"]
        (failed,) = [event["payload"] for event in await p.events() if event["name"] == "tool.failed"]
        assert "disk is on fire" in failed["error"]
        assert failed["type"] == "ValueError"


async def test_a_retryable_error_is_tried_again_in_the_same_call(redis_url: str) -> None:
    """One record and one key; the changes of failed tries are dropped; the event says what was done."""
    async with process(redis_url, caller(retrying(), ("flaky", {"fails": 2}))) as p:
        await p.run()
        assert await output(p) == ["try 3"]
        assert len(set(MADE)) == 1
        record = await p.record()
        assert (record.attempt, record.usage.tool_calls) == (1, 1)
        (ended,) = [event["payload"] for event in await p.events() if event["name"] == "tool.succeeded"]
        reasons = ["tool.retryable"] * 2
        metadata = {"retry_attempts": 3, "retry_delays_ms": [1, 2], "retry_reasons": reasons}
        assert ended["executor_metadata"] == metadata
        state = await p.store.redis.hgetall(p.store.keys("session_state", "s1"))
        assert state["tries"] == "[3]"


async def test_a_call_with_effects_is_not_tried_again(redis_url: str) -> None:
    async with process(redis_url, caller(retrying(), ("pay", {}), ("broken", {}))) as p:
        await p.run()
        assert await output(p) == ["tool.retryable", "tool.error"]
        assert len(MADE) == 2


@pytest.mark.defect("A05")
async def test_a_long_pause_parks_the_run_in_place_of_a_retry(redis_url: str) -> None:
    """The error asks for a longer pause than the executor may make: it holds no slot meanwhile (A05)."""
    calls = ("flaky", {"fails": 1, "retry_after_ms": 60_000})
    async with process(redis_url, caller(retrying(max_delay_ms=100), calls)) as p:
        await p.run()
        assert (await p.record()).state is RunState.RETRYING
        assert len(MADE) == 1


@pytest.mark.defect("P15")
async def test_a_pause_is_never_shorter_than_the_error_asks_for(redis_url: str) -> None:
    """P15: also with jitter."""
    calls = ("flaky", {"fails": 1, "retry_after_ms": 7})
    async with process(redis_url, caller(retrying(jitter="full"), calls)) as p:
        await p.run()
        (ended,) = [event["payload"] for event in await p.events() if event["name"] == "tool.succeeded"]
        assert ended["executor_metadata"]["retry_delays_ms"] == [7]


async def test_a_run_makes_at_most_so_many_calls_at_once(redis_url: str) -> None:
    """A call inside another one does not wait for it."""
    executor = {"type": "concurrent_batch", "config": {"max_concurrency": 2}}
    calls = [("outer", {}), *(("wait", {"number": number}) for number in range(3))]
    async with process(redis_url, caller(executor, *calls)) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: len(MADE) == 2, "two calls are made")
        await p.event_names()  # time for more, if there was room
        assert sorted(MADE) == [0, 7]
        GATES["open"].set()
        await executing
        assert await output(p) == [7, 0, 1, 2]


@pytest.mark.defect("A06")
async def test_only_allowed_programs_are_started(redis_url: str) -> None:
    """A06: by the parameter `command` of a tool, whatever its name is."""
    executor = {
        "type": "retry",
        "config": {"inner": {"type": "safe", "config": {"command_allowlist": ["ls"]}}},
    }
    calls = [("start", {"command": line}) for line in ("ls -l", "rm -rf /", "'ls", "")]
    async with process(redis_url, caller(executor, *calls)) as p:
        await p.run()
        assert await output(p) == ["started", *["tool.permanent"] * 3]
        assert MADE == ["ls -l"]


async def test_an_allowed_program_is_not_followed_by_others(redis_url: str, tmp_path: Path) -> None:
    """A shell executes the line, so it must be one program and its words."""
    executor = {"type": "safe", "config": {"command_allowlist": ["echo"]}}
    made = tmp_path / "made"
    shell = {"id": "shell", "type": "execute_command", "config": {"root": str(tmp_path)}}
    others = (
        "echo a; echo b > made",
        "echo a\necho b > made",
        "echo a && echo b > made",
        'echo "$(echo b > made)"',
        "echo `echo b > made`",
        "echo a # it's\necho b > made\n#'",
        """echo "${x#'"'}"; echo b > made #'""",
    )
    lines = ("echo 'a; b' \\; \"c > d\" $HOME", *others)
    async with process(
        redis_url, caller(executor, *[("shell", {"command": line}) for line in lines], tools=[shell])
    ) as p:
        await p.run()
        printed, *denied = await output(p)
    assert printed["stdout"] == "a; b ; c > d\n"
    assert denied == ["tool.permanent"] * len(others)
    assert not made.exists()


async def test_tools_use_files_below_the_roots_only(redis_url: str, tmp_path: Path) -> None:
    """By what a tool declares; a tool that declares nothing may neither read nor write elsewhere."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "file").write_text("text")
    (inside / "link").symlink_to(outside)
    config = {"read_roots": [str(inside)], "write_roots": [str(inside)], "deny_tools": ["flaky"]}
    files = {"root": str(tmp_path)}
    tools = [
        touch,
        flaky,
        {"id": "read", "type": "read_file", "config": files},
        {"id": "list", "type": "list_files", "config": files},
    ]
    calls = [
        ("touch", {"path": str(inside / "file")}),
        ("touch", {"path": str(inside / ".." / "out" / "file")}),
        ("touch", {"path": str(inside / "link" / "file")}),
        ("read", {"path": "in/file"}),
        ("read", {"path": "out/file"}),
        ("list", {}),  # the folder is that of the tool
        ("flaky", {"fails": 0}),
    ]
    executor = {"type": "filesystem_aware", "config": config}
    async with process(redis_url, caller(executor, *calls, tools=tools)) as p:
        await p.run()
        found = await output(p)
        denied = "tool.permanent"
        assert [found[at] == denied for at in range(7)] == [False, True, True, False, True, True, True]
        assert [str(inside / "file")] == MADE


@pytest.mark.defect("C02")
async def test_the_default_of_the_file_is_for_agents_without_an_executor(redis_url: str) -> None:
    """C02: one registry for both levels."""
    definition = agent(tools=[{"id": "flaky", "impl": f"{__name__}.flaky"}])
    definition["llm"] = scripted(
        {"tool_calls": [{"name": "flaky", "arguments": {"fails": 1}}]}, {"text": "done"}
    )
    runtime = {"type": "default", "config": {"tool_executor": retrying()}}
    async with process(redis_url, definition, runtime=runtime) as p:
        await p.run()
        assert await output(p) == "done"
        assert len(MADE) == 2


class OwnExecutor:
    """An executor of a deployment, with the interface of the original SDK."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    async def execute(self, request: Any) -> Any:
        MADE.append((request.tool_id, self.config, request.execution_spec.side_effects))
        if request.params.get("fails") == 9:
            return SimpleNamespace(success=False, data=None, error="refused here", exception=None)
        if request.params.get("fails") == 8:
            return "no result"
        data = await request.tool.invoke(request.params, request.context)
        return SimpleNamespace(success=True, data=data, error=None, metadata={"by": "own"})


OWN = {"impl": f"{__name__}.OwnExecutor", "config": {"x": 1}}


@pytest.mark.parametrize(
    "executor", [OWN, {"type": "retry", "config": {**ONE_TRY_LESS, "inner": OWN}}], ids=["alone", "inside"]
)
async def test_an_executor_of_the_deployment_makes_the_calls(redis_url: str, executor: Any) -> None:
    """Its result is that of the call, with the cause of an error. The guards come before it."""
    calls = [("flaky", {"fails": fails}) for fails in (0, 9, 8)] + [("flaky", {"fails": "many"})]
    async with process(redis_url, caller(executor, *calls)) as p:
        await p.run()
        assert await output(p) == ["try 2", "tool.error", "tool.error", "tool.validation"]
        assert [each for each in MADE if isinstance(each, tuple)] == [("flaky", {"x": 1}, "unknown")] * 3
        events = [event for event in await p.events() if event["name"] in ("tool.succeeded", "tool.failed")]
        assert events[0]["payload"]["executor_metadata"] == {"by": "own"}
        assert "refused here" in events[1]["payload"]["error"]


async def test_a_tool_may_have_an_executor_of_its_own(redis_url: str) -> None:
    """In place of that of the agent, also for how many calls are made at once."""
    one_at_once = {"type": "concurrent_batch", "config": {"max_concurrency": 1}}
    tools = [
        {"id": "wait", "impl": f"{__name__}.wait", "tool_executor": one_at_once},
        {"id": "flaky", "impl": f"{__name__}.flaky", "tool_executor": {"type": "default"}},
    ]
    calls = [("wait", {"number": 1}), ("wait", {"number": 2}), ("flaky", {"fails": 0})]
    executor = {"type": "filesystem_aware", "config": {"deny_tools": ["wait", "flaky"]}}
    async with process(redis_url, caller(executor, *calls, tools=tools)) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: MADE, "one call is made")
        await p.event_names()
        assert MADE == [1]
        GATES["open"].set()
        await executing
        assert await output(p) == [1, 2, "try 3"]


@tool
async def fetch(url: str) -> str:
    """Get a page."""
    MADE.append(url)
    return "fetched"


class Fixed:
    """A tool that reaches the network, with a host of its own."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(side_effects="network")

    async def invoke(self, params: dict[str, Any], context: Any) -> str:
        return "reached"


FIXED = {"id": "fixed", "impl": f"{__name__}.Fixed"}
NETWORK = {"allow_hosts": ["*.example.com", "127.0.0.1"], "allow_tools": ["own"]}


@pytest.mark.defect("A06")
async def test_tools_reach_allowed_hosts_only(redis_url: str) -> None:
    """A06: by what a tool can do and by its arguments, whatever its name is. An address in a private network
    is denied also if it is allowed by name."""
    urls = {
        "https://www.example.com/a": True,
        "https://www.example.com.evil.org/": False,
        "https://evil.org\\@www.example.com/": False,
        "ftp://www.example.com/": False,
        "www.example.com": False,
        "http://127.0.0.1/": False,
        "http://[::1]/": False,
        "": False,
    }
    tools = [fetch, FIXED, {**FIXED, "id": "own"}, {"id": "parse", "type": "url_parse"}]
    calls = [*(("fetch", {"url": url}) for url in urls), ("fixed", {}), ("own", {})]
    calls.append(("parse", {"url": "http://evil.org/"}))
    executor = {"type": "network_aware", "config": NETWORK}
    async with process(redis_url, caller(executor, *calls, tools=tools)) as p:
        await p.run()
        found = await output(p)
        denied = [each == "tool.permanent" for each in found]
        assert denied == [*(not allowed for allowed in urls.values()), True, False, False]
        assert MADE == ["https://www.example.com/a"]


async def test_a_redirect_must_be_allowed_as_well(redis_url: str) -> None:
    """The built-in `http_request` asks the policies of its call again."""
    server = Server()
    async with running(server):
        server.answer = reply("302 Found", Location=f"http://localhost:{server.port}/x")
        tool_ = {"id": "http", "type": "http_request", "config": {"deny_private_networks": False}}
        config = {"allow_hosts": ["127.0.0.1"], "deny_private_networks": False}
        calls = ("http", {"url": server.url})
        executor = {"type": "network_aware", "config": config}
        async with process(redis_url, caller(executor, calls, tools=[tool_])) as p:
            await p.run()
            assert await output(p) == ["tool.permanent"]
            assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("mode", "children", "allowed"),
    [
        ("all", [], [True, True]),
        ("all", ["here", "not_touch"], [False, True]),
        ("any", ["here", "not_touch"], [True, True]),
        ("any", ["not_touch"], [False, True]),
    ],
)
async def test_executors_are_combined(
    redis_url: str, tmp_path: Path, mode: str, children: list[str], allowed: list[bool]
) -> None:
    """All of them must allow a call, or any of them; without one, everything is allowed."""
    of_name = {
        "here": {"type": "filesystem_aware", "config": {"read_roots": [str(tmp_path)]}},
        "not_touch": {"type": "filesystem_aware", "config": {"deny_tools": ["touch"]}},
    }
    config = {"mode": mode, "children": [of_name[name] for name in children]}
    calls = [("touch", {"path": str(tmp_path / "file")}), ("flaky", {"fails": 0})]
    async with process(redis_url, caller({"type": "composite", "config": config}, *calls)) as p:
        await p.run()
        assert [each != "tool.permanent" for each in await output(p)] == allowed
