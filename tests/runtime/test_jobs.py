"""Tools whose calls start a job of a service: the run is parked until the job ends, and starts it once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from openagents_worker import Agent, AsyncClient, RunContext
from openagents_worker.agents import read_agents_file
from openagents_worker.errors import OpenAgentsError
from openagents_worker.jsontext import dumps
from openagents_worker.models import RunState, WaitKind
from openagents_worker.runtime.calls import jobs
from openagents_worker.runtime.start_checks import find_problems
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.facts import Fact, FactKind
from openagents_worker.store.formats import HAS_JOB
from openagents_worker.store.scripts import RunEnd
from openagents_worker.tools import JobHandle, ToolExecutionSpec
from openagents_worker.worker.open_jobs import OpenJobs
from tests.runtime.test_waiting import time_out
from tests.support.job_server import JobServer, job_server
from tests.support.job_tools import Found, Render
from tests.support.runner import Process, agent, calls, crash, process, scripted
from tests.support.waiting import await_for

TOOLS = "tests.support.job_tools"
ASK_LATER = {"poll_after_ms": 60_000}


@pytest.fixture
def service() -> Iterator[JobServer]:
    with job_server() as server:
        yield server


def rendering(service: JobServer, tool: str = "Render", config: Any = None, **options: Any) -> dict[str, Any]:
    """An agent whose model calls the tool `render` once."""
    config = {"url": service.url, **(config or ASK_LATER)}
    return agent(
        tools=[{"id": "render", "impl": f"{TOOLS}.{tool}", "config": config, **options}],
        llm=scripted(calls(("render", {})), {"text": "done"}),
    )


async def output(p: Process) -> Any:
    result = (await p.record()).result
    assert result is not None
    return result.final_output if result.error_details is None else result.error_details.code


async def events(p: Process, end: str) -> list[dict[str, Any]]:
    return [event["payload"] for event in await p.events() if event["name"] == f"tool.background.{end}"]


async def failed(p: Process) -> dict[str, Any]:
    (payload,) = [event["payload"] for event in await p.events() if event["name"] == "tool.failed"]
    return payload


async def job_facts(p: Process) -> list[str]:
    return [name for name in await p.store.redis.hkeys(p.store.keys("facts", "r1")) if name[:4] == "job:"]


async def test_a_job_parks_its_run_and_is_started_once(redis_url: str, service: JobServer) -> None:
    """Each question is a timer: between two of them the run holds no slot. The result is that of the call."""
    async with process(redis_url, rendering(service)) as p:
        await p.submit()
        result = await p.execute()
        assert result.reason.startswith("waiting for job render until")
        record = await p.record()
        assert (record.state, record.worker) == (RunState.WAITING, None)
        assert [(wait.kind, wait.name) for wait in record.waiting] == [(WaitKind.JOB, "render")]
        for _ in range(2):
            await time_out(p)
            await p.execute()
        assert service.asked == 3
        service.end(result={"film": "a.mp4"})
        await time_out(p)
        await p.execute()
        assert await output(p) == "done"
        (call,) = [entry for entry in await p.journal() if entry["kind"] == "tool"]
        assert call["outcome"]["ok"] == {"film": "a.mp4"}
        assert len(service.started) == 1
        assert await p.store.redis.hgetall(p.store.keys("facts", "r1")) == {}
        assert len(await events(p, "submitted")) == 1
        assert [event["status"] for event in await events(p, "polled")] == ["running"] * 3
        assert [event["status"] for event in await events(p, "completed")] == ["succeeded"]
        assert (await p.record()).usage.tool_calls == 1
        names = await p.event_names()
        assert (names.count("tool.called"), names.count("tool.succeeded")) == (1, 1)


async def test_a_worker_that_is_woken_early_goes_on_waiting(redis_url: str, service: JobServer) -> None:
    """The time of the next question is stored with the wait: a claim in between asks nothing."""
    async with process(redis_url, rendering(service)) as p:
        await p.submit()
        await p.execute()
        await p.store.redis.hset(p.store.keys("run", "r1"), "state", "queued")
        await p.execute()
        assert service.asked == 1
        assert (await p.record()).state is RunState.WAITING
        service.end()
        await time_out(p)
        await p.execute()


@asynccontextmanager
async def dead_while_waiting(redis_url: str, definition: Any) -> AsyncIterator[Process]:
    """A worker that has died after it stored the handle; the one that is returned takes the run over."""
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        await one.submit()
        dying = asyncio.create_task(one.execute())

        async def is_noted() -> bool:
            return bool(await job_facts(one))

        while not await is_noted():
            await asyncio.sleep(0)
        await crash(one, "r1", dying)
        yield two


async def test_a_dead_worker_leaves_the_handle_and_no_job_is_started_again(
    redis_url: str, service: JobServer
) -> None:
    """The call has an intent, but nobody is asked: its job is known. From then on, the run is left to workers
    that know about jobs."""
    async with dead_while_waiting(redis_url, rendering(service, config={"poll_after_ms": 900})) as two:
        assert await two.store.redis.hget(two.store.keys("run", "r1"), "format") == str(HAS_JOB)
        service.end(result=1)
        await two.execute()
        assert await output(two) == "done"
        assert len(service.started) == 1
        assert await two.store.redis.hgetall(two.store.keys("facts", "r1")) == {}


@pytest.mark.parametrize(("tool", "asked"), [("Render", True), ("Found", False)])
async def test_a_worker_that_dies_before_it_knows_the_handle(
    redis_url: str, service: JobServer, monkeypatch: pytest.MonkeyPatch, tool: str, asked: bool
) -> None:
    """The start is the effect of the call. A tool that finds the job by its key gives its handle; otherwise a
    person decides."""
    started = asyncio.Event()

    async def hang(self: Any, method: str, path: str, *, key: str = "") -> Any:
        monkeypatch.undo()
        await self.ask(method, path, key=key)
        started.set()
        await asyncio.Event().wait()

    definition = rendering(service, tool)
    async with process(redis_url, definition, name="one") as one, process(redis_url, definition) as two:
        monkeypatch.setattr(Render, "ask", hang)
        await one.submit()
        dying = asyncio.create_task(one.execute())
        await started.wait()
        await crash(one, "r1", dying)
        service.end(result=1)
        await two.execute()
        assert len(service.started) == 1
        state = (await two.record()).state
        assert state is (RunState.PAUSED if asked else RunState.COMPLETED)


@pytest.mark.parametrize(
    ("status", "fields", "code"),
    [
        ("failed", {"error": "no space left"}, "tool.permanent"),
        ("cancelled", {}, "tool.cancelled"),
        ("lost", {}, "tool.error"),
    ],
)
async def test_a_job_that_does_not_succeed_is_an_error_for_the_model(
    redis_url: str, service: JobServer, status: str, fields: Any, code: str
) -> None:
    """Also a state that does not exist."""
    async with process(redis_url, rendering(service)) as p:
        await p.submit()
        await p.execute()
        service.end(status, **fields)
        await time_out(p)
        await p.execute()
        error = await failed(p)
        assert error["code"] == code
        assert fields.get("error", "job") in error["error"]
        assert await output(p) == "done"


async def test_a_service_that_is_down_is_asked_again(
    redis_url: str, service: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retryable error says nothing about the job: the run goes on waiting, and fails no try of the call."""
    monkeypatch.setattr(jobs, "FIRST_POLL_MS", 5_000)
    service.refuses = [503, 429]
    async with process(redis_url, rendering(service)) as p:
        await p.submit()
        await p.execute()
        assert (await p.record()).state is RunState.WAITING
        await time_out(p)
        await p.execute()
        service.end()
        await time_out(p)
        await p.execute()
        assert await output(p) == "done"
        assert [event["status"] for event in await events(p, "polled")].count("unknown") == 2
        assert len(service.started) == 1


async def test_a_permanent_error_of_a_question_ends_the_call_and_the_job(
    redis_url: str, service: JobServer
) -> None:
    service.refuses = [400]
    async with process(redis_url, rendering(service)) as p:
        await p.run()
        assert (await failed(p))["code"] == "tool.permanent"
        assert service.cancelled == ["job-1"]
        assert await job_facts(p) == []


async def test_a_job_has_a_time_limit_over_all_attempts(
    redis_url: str, service: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeout_ms` counts from the start of the job. It is cancelled, and no other one is started."""
    async with process(redis_url, rendering(service, timeout_ms=3_600_000)) as p:
        await p.submit()
        await p.execute()
        monkeypatch.setattr(jobs, "_limit_ms", lambda _: 0)  # an hour later
        await time_out(p)
        await p.execute()
        assert (await failed(p))["code"] == "tool.timeout"
        assert await output(p) == "done"
        assert (len(service.started), service.cancelled) == (1, ["job-1"])


async def test_a_pattern_that_gives_a_call_up_cancels_its_job(redis_url: str, service: JobServer) -> None:
    async def impatient(context: RunContext) -> str:
        calling = asyncio.create_task(context.call_tool("render"))
        await await_for(lambda: service.asked, "the job was asked about: its handle is stored")
        calling.cancel()
        await asyncio.wait([calling])
        return "gave up"

    tool = {"id": "render", "impl": f"{TOOLS}.Render", "config": {"url": service.url, "poll_after_ms": 50}}
    async with process(redis_url, Agent("a", pattern=impatient, tools=[tool], llm=scripted())) as p:
        await p.run()
        assert await output(p) == "gave up"
        assert service.cancelled == ["job-1"]
        assert await job_facts(p) == []


async def test_a_job_that_was_just_started_is_cancelled_with_its_call(
    redis_url: str, service: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pattern gives the call up while its handle is being stored."""
    is_storing, may_store, write = asyncio.Event(), asyncio.Event(), RunWriter.write_fact

    async def slowly(self: RunWriter, fact: Fact, format_: int = 0) -> None:
        if fact.kind is FactKind.JOB:
            is_storing.set()
            await may_store.wait()
        await write(self, fact, format_)

    monkeypatch.setattr(RunWriter, "write_fact", slowly)

    async def impatient(context: RunContext) -> str:
        calling = asyncio.create_task(context.call_tool("render"))
        await is_storing.wait()
        calling.cancel()
        asyncio.get_running_loop().call_later(0.05, may_store.set)
        await asyncio.wait([calling])
        return "gave up"

    tool = {"id": "render", "impl": f"{TOOLS}.Render", "config": {"url": service.url, **ASK_LATER}}
    async with process(redis_url, Agent("a", pattern=impatient, tools=[tool], llm=scripted())) as p:
        await p.run()
        assert await output(p) == "gave up"
        assert (len(service.started), service.cancelled) == (1, ["job-1"])
        assert await job_facts(p) == []


async def cancel(p: Process) -> None:
    await p.store.run(scripts.cancel(run_id="r1", reason="", force=False))


async def test_cancelling_a_parked_run_cancels_its_job(redis_url: str, service: JobServer) -> None:
    """The run ends at once. A worker cancels the job afterwards, until its service has accepted that."""
    service.refuses_to_cancel = 1
    async with process(redis_url, rendering(service)) as p:
        await p.submit()
        await p.execute()
        await cancel(p)
        assert (await p.record()).state is RunState.CANCELLED
        names = await p.event_names()
        assert names[-3:] == ["tool.background.abandoned", "run.cancelled", "session.run.completed"]
        recipient = OpenJobs(p.store, p.runner._services.assembly)
        with pytest.raises(OpenAgentsError):
            await recipient.deliver(RunEnd("r1", 1))
        await recipient.deliver(RunEnd("r1", 2))
        assert service.cancelled == [], "the end of another life"
        await recipient.deliver(RunEnd("r1", 1))
        assert service.cancelled == ["job-1"]


class Together(Render):
    """A cancellation ends when both jobs are being cancelled."""

    both = asyncio.Barrier(2)

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(background=True, concurrency_safe=True)

    async def cancel_job(self, handle: JobHandle, context: Any) -> bool:
        await self.both.wait()
        return await super().cancel_job(handle, context)


async def test_a_job_that_is_cancelled_slowly_does_not_delay_the_others(
    redis_url: str, service: JobServer
) -> None:
    """The end of a run is delivered with a time limit, which holds for all of its jobs together."""
    agents = agent(
        tools=[{"id": "render", "impl": f"{__name__}.Together", "config": {"url": service.url, **ASK_LATER}}],
        llm=scripted(calls(("render", {}), ("render", {})), {"text": "done"}),
    )
    async with process(redis_url, agents) as p:
        await p.submit()
        await p.execute()
        await cancel(p)
        await OpenJobs(p.store, p.runner._services.assembly).deliver(RunEnd("r1", 1))
        assert sorted(service.cancelled) == ["job-1", "job-2"]


@pytest.mark.parametrize("key", ["0123456789abcdef" * 2, ""])
async def test_the_job_of_a_run_with_an_older_definition_is_cancelled_by_that_definition(
    redis_url: str, service: JobServer, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    """The agents file of the worker does not have the tool any more. Without the key of the deployment, the
    worker does not trust the stored definition, and the log says that nobody cancels the job."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_DEFINITIONS_KEY": key})
    options: dict[str, Any] = {"settings": settings, "keeps_definitions": True}
    after = agent(llm=scripted({"text": "done"}))
    async with (
        process(redis_url, rendering(service), name="one", **options) as one,
        process(redis_url, after, name="two", **options) as two,
    ):
        await one.submit()
        await one.execute()
        await cancel(one)
        await OpenJobs(two.store, two.runner._services.assembly).deliver(RunEnd("r1", 1))
        assert service.cancelled == (["job-1"] if key else [])
        assert ("tool.job_of_removed_tool" in caplog.text) == (not key)


async def test_a_resumed_run_starts_a_job_that_was_cancelled_again(
    redis_url: str, service: JobServer
) -> None:
    """If the job was not cancelled in time, the run waits for it again."""
    async with process(redis_url, rendering(service)) as p:
        await p.submit()
        await p.execute()
        await cancel(p)
        await resume(p)
        await p.execute()
        assert len(service.started) == 1
        await cancel(p)
        await OpenJobs(p.store, p.runner._services.assembly).deliver(RunEnd("r1", 2))
        await resume(p)
        await p.execute()
        assert len(service.started) == 2
        service.end(result=1)
        await time_out(p)
        await p.execute()
        assert await output(p) == "done"


async def resume(p: Process) -> None:
    resumed = await p.store.run(
        scripts.resume(run_id="r1", agent_id="a", session_id="s1", checkpoint_id="", input_text="", canvas="")
    )
    assert resumed.answer == "OK", resumed


def test_only_workers_with_such_tools_look_at_ends(service: JobServer) -> None:
    from tests.runtime.test_open_responses import assembly_of

    tool = {"id": "render", "impl": f"{TOOLS}.Render"}
    for tools, expected in (
        ([tool], True),
        ([{**tool, "enabled": False}], False),
        ([{**tool, "background": False}], False),
        ([{"id": "c", "type": "calc"}], False),
    ):
        assert assembly_of(agent(tools=tools)).has_jobs() is expected


def test_a_class_decides_and_the_agents_file_may_overrule_it() -> None:
    assert ToolExecutionSpec().background is False
    assert Found().execution_spec().background is True


async def test_a_job_that_was_started_is_waited_for_whatever_the_file_says_now(
    redis_url: str, service: JobServer
) -> None:
    """A worker whose agents file has no job for this tool any more must not call it in another way."""
    before, after = rendering(service), rendering(service, background=False)
    async with process(redis_url, before, name="one") as one, process(redis_url, after, name="two") as two:
        await one.submit()
        await one.execute()
        service.end(result=1)
        await time_out(one)
        await two.execute()
        assert await output(two) == "done"
        assert len(service.started) == 1


async def test_a_job_that_needs_an_approval_is_approved_once(redis_url: str, service: JobServer) -> None:
    """It passes the guards of any call; a later attempt finds the decision."""
    definition = rendering(service, approval="always")
    async with process(redis_url, definition) as p, AsyncClient(redis_url) as client:
        await p.submit()
        await p.execute()
        assert service.started == []
        (asked,) = await client.handle("r1").approvals()
        await client.approve("r1", asked.call_id, by="anna")
        await p.execute()
        assert (await p.record()).state is RunState.WAITING
        service.end(result=1)
        await time_out(p)
        await p.execute()
        assert await output(p) == "done"
        assert (await p.event_names()).count("tool.approval_needed") == 1
        assert await p.store.redis.hgetall(p.store.keys("facts", "r1")) == {}


# --- toolsets --------------------------------------------------------------------------------------------


def studio(service: JobServer, toolset: str = "Studio", **options: Any) -> dict[str, Any]:
    """An agent whose model calls the tool `render` of a toolset once."""
    return {**rendering(service), "tools": [of_studio(service, toolset, **options)]}


def of_studio(service: JobServer, toolset: str = "Studio", **options: Any) -> dict[str, Any]:
    return {
        "id": "films",
        "impl": f"{TOOLS}.{toolset}",
        "config": {"url": service.url, **ASK_LATER},
        **options,
    }


async def test_a_tool_of_a_toolset_may_start_a_job(redis_url: str, service: JobServer) -> None:
    """Another worker asks for it, also if it has never listed the tools."""
    async with process(redis_url, studio(service)) as one, process(redis_url, studio(service)) as two:
        await one.submit()
        await one.execute()
        assert (await one.record()).state is RunState.WAITING
        service.end(result={"film": "a.mp4"})
        await time_out(one)
        await two.execute()
        assert await output(two) == "done"
        (call,) = [entry for entry in await two.journal() if entry["kind"] == "tool"]
        assert call["outcome"]["ok"] == {"film": "a.mp4"}
        assert len(service.started) == 1
        assert await two.store.redis.hgetall(two.store.keys("facts", "r1")) == {}


async def test_a_job_of_a_toolset_is_cancelled_with_its_run(redis_url: str, service: JobServer) -> None:
    async with process(redis_url, studio(service)) as p:
        assert p.runner._services.assembly.has_jobs()
        await p.submit()
        await p.execute()
        await cancel(p)
        await OpenJobs(p.store, p.runner._services.assembly).deliver(RunEnd("r1", 1))
        assert service.cancelled == ["job-1"]


async def test_a_job_of_a_toolset_that_was_removed_fails_its_call(redis_url: str, service: JobServer) -> None:
    """The model gets this error. Nobody is left who could cancel the job."""
    after = {**studio(service), "tools": []}
    async with process(redis_url, studio(service)) as one, process(redis_url, after) as two:
        await one.submit()
        await one.execute()
        await time_out(one)
        await two.execute()
        assert (await failed(two))["code"] == "tool.not_found"
        await OpenJobs(two.store, two.runner._services.assembly).deliver(RunEnd("r1", 1))
        assert service.cancelled == []


async def test_a_toolset_without_jobs_cannot_list_a_tool_that_starts_one(
    redis_url: str, service: JobServer
) -> None:
    """Nor does a worker start with `"background": true` for it."""
    async with process(redis_url, studio(service, "Announces")) as p:
        result = (await p.run()).result
    assert result is not None
    assert result.error_details is not None
    assert (result.error_details.code, result.error_details.message) == (
        "plugin.config",
        "the tool 'render' cannot work in the background: the class of its toolset 'films' does not "
        "implement invoke_background and poll_job and cancel_job",
    )
    tools = [{**of_studio(service, name, background=True), "id": name} for name in ("Announces", "Studio")]
    file = read_agents_file(dumps({"agents": [agent(tools=tools)]}), env={})
    assert [problem.to_dict()["path"] for problem in find_problems(file, {})] == ["agents[0].tools[0].config"]
