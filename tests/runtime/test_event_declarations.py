"""Every ending of a run: its events are declared, have the declared keys and no others, and are in order.

`tests/worker/test_end_to_end.py` checks the other way: every declared event occurs.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from openagents_worker import Agent
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.events import EVENT_SCHEMAS, TERMINAL_EVENTS, check_event
from openagents_worker.models import StopReason
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.runtime.assembly import UnavailableAgent
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.tools import tool
from tests.runtime.delegating import execute_all
from tests.support.runner import Process, agent, calls, due, process, scripted
from tests.support.waiting import await_for

IDS = frozenset({"agent_id", "session_id", "run_id"})
"""Keys that the payloads of the original SDK have beside those of the event. The envelope has them, too."""
RUNNING: list[str] = []
LUA = Path(scripts.__file__).parents[1] / "lua"


class Broken(PatternPlugin):
    async def execute(self) -> Any:
        raise KeyError("price")


class Stuck(PatternPlugin):
    async def execute(self) -> Any:
        RUNNING.append("r1")
        await asyncio.Event().wait()


@tool
async def hang(context: Any) -> str:
    """Waits for ever."""
    RUNNING.append(context.run_id)
    await asyncio.Event().wait()
    return ""


@tool
async def fail() -> str:
    """Fails."""
    raise ValueError("no such item")


CALC = {"id": "calc", "type": "calc"}
HANG = {"id": "hang", "impl": f"{__name__}.hang"}
FAIL = {"id": "fail", "impl": f"{__name__}.fail"}
SUM = calls(("calc", {"expression": "1+1"}))
PRICED = {"pricing": {"input": 1.0, "output": 1.0}}
IMPOSSIBLE = {"type": "object", "required": ["price"]}


def react(*replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return agent(llm=scripted(*replies), tools=[CALC, HANG, FAIL], **fields)


async def run(p: Process, **fields: Any) -> None:
    await p.run(**fields)


async def cancel_before(p: Process) -> None:
    await p.submit()
    await p.store.run(scripts.cancel(run_id="r1", reason="no need", force=True))


async def cancel_while_it_works(p: Process) -> None:
    await p.submit()
    executing = asyncio.create_task(p.execute())
    await await_for(lambda: "r1" in RUNNING, "the tool works")
    await p.store.run(scripts.cancel(run_id="r1", reason="too late", force=False))
    p.runner.latch("r1", LatchReason.CANCELLED)
    await executing


async def cancel_while_it_is_paused(p: Process) -> None:
    await p.run(budget={"max_tool_calls": 0, "on_breach": "pause"})
    await p.store.run(scripts.cancel(run_id="r1", reason="", force=True))


async def retry_in_vain(p: Process) -> None:
    await p.run(budget={"max_resume_attempts": 1})
    await due(p)
    await p.execute()


async def fail_and_be_resumed(p: Process) -> None:
    await p.run(budget={"max_tool_calls": 0})
    await p.store.run(
        scripts.resume(run_id="r1", agent_id="a", session_id="s1", input_text="", checkpoint_id="", by="ada")
    )
    await p.execute()


async def be_left_by_every_worker(p: Process) -> None:
    problem = ConfigProblem(("llm",), "its key is missing", code="config.validation")
    p.runner._services.assembly.unavailable["a"] = UnavailableAgent("a", (problem,))
    await p.submit()
    await p.execute()
    await due(p)
    await p.execute()


# --- ends of runs that no worker executes, or whose worker has died ---------------------------------------


async def be_in_an_invalid_message(p: Process) -> None:
    message = "args must be a list"
    await p.store.run(
        scripts.reject(run_id="r1", queue="agents", code="request.invalid", message=message, hint="")
    )


async def set_field(p: Process, name: str, value: Any) -> None:
    await p.store.redis.hset(p.store.keys("run", "r1"), name, value)


async def expire_in_the_queue(p: Process) -> None:
    await p.submit()
    await set_field(p, "expires", 1)
    await p.execute()


async def expire_while_it_is_delayed(p: Process) -> None:
    await p.submit(delay_ms=60_000)
    await set_field(p, "expires", 1)
    await p.store.redis.zadd(p.store.keys("due"), {"r1": 0})
    await p.store.run(scripts.wake(limit=10))


async def be_of_a_version_that_is_gone(p: Process) -> None:
    await p.submit()
    await set_field(p, "format", 99)
    await p.execute()
    await set_field(p, "due", 0)
    await p.execute()


async def lose_its_journal(p: Process) -> None:
    await p.submit()
    await p.store.redis.set(p.store.keys("journal", "r1"), "of another program")
    await p.execute()


async def lose_its_worker(p: Process, *, max_recoveries: int = 0, cancelled: bool = False) -> None:
    """The worker dies while the tool works."""
    executing = asyncio.create_task(p.execute())
    await await_for(lambda: "r1" in RUNNING, "the tool works")
    if cancelled:
        await p.store.run(scripts.cancel(run_id="r1", reason="too late", force=False))
    p.lease.left_s = 0.0
    await p.store.redis.zadd(p.store.keys("workers"), {p.lease.incarnation: 1})
    await p.store.run(scripts.reclaim(limit=9, max_recoveries=max_recoveries, blameless=False))
    executing.cancel()
    await asyncio.wait([executing])


async def lose_its_worker_and_its_work(p: Process) -> None:
    await p.submit(durable=False)
    await lose_its_worker(p)


async def kill_its_worker(p: Process) -> None:
    await p.submit(durable=True)
    await lose_its_worker(p)


async def lose_its_worker_while_it_is_cancelled(p: Process) -> None:
    await p.submit()
    await lose_its_worker(p, cancelled=True)


async def be_given_back(p: Process, *, durable: bool = True, cancelled: bool = False) -> None:
    """No task of its worker executes it."""
    await p.submit(durable=durable)
    claimed = await p.store.run(
        scripts.claim(run_id="r1", incarnation=p.lease.incarnation, nonce="n", page_bytes=1_000)
    )
    if cancelled:
        await p.store.run(scripts.cancel(run_id="r1", reason="", force=False))
    given = scripts.release(
        run_id="r1", incarnation=p.lease.incarnation, fence=claimed.fence, max_recoveries=0
    )
    await p.store.run(given)


async def be_given_back_without_its_work(p: Process) -> None:
    await be_given_back(p, durable=False)


async def be_given_back_while_it_is_cancelled(p: Process) -> None:
    await be_given_back(p, cancelled=True)


async def be_rolled_back(p: Process) -> None:
    await p.submit()
    await p.submit("r2", on_busy="rollback")


async def be_interrupted(p: Process) -> None:
    await p.submit()
    await p.submit("r2", on_busy="interrupt")
    await p.execute()


async def be_the_child_of_a_run_that_ends(p: Process) -> None:
    await p.run("parent", agent_id="delegates")
    [child] = [wake.run_id for wake in p.wakes]
    await p.store.run(scripts.cancel(run_id="parent", reason="enough", force=False))
    assert (await p.record(child)).state == "cancelled"
    await p.store.redis.rename(p.store.keys("events", child), p.store.keys("events", "r1"))


# --- ends that a run decides ------------------------------------------------------------------------------


async def wait_for_a_child_that_ends(p: Process) -> None:
    await p.run(agent_id="hands-over")
    await execute_all(p)


async def delegates(context: Any) -> Any:
    return (await context.delegate("other", "go")).output


async def hands_over(context: Any) -> Any:
    await context.transfer("other", "go")


Ending = tuple[dict[str, Any], Callable[[Process], Awaitable[None]], StopReason]


def ends(definition: dict[str, Any], reason: StopReason, **fields: Any) -> Ending:
    return definition, lambda p: run(p, **fields), reason


def react_with(**config: Any) -> dict[str, Any]:
    return {"type": "react", "config": config}


LOST = {"error": "connection", "times": 9}
STUCK = react(calls(("hang", {})))
OFTEN = react(*[SUM] * 9)
PAID = agent(llm={**scripted(*[SUM] * 9), **PRICED}, tools=[CALC])
UNDECIDED = agent(
    llm=scripted(SUM),
    tools=[{**CALC, "approval": "always", "approval_timeout_ms": 1, "approval_default": "fail"}],
)
OTHERS = (
    agent("other", llm={"provider": "mock"}),
    Agent("delegates", pattern=delegates, llm={"provider": "mock"}),
    Agent("hands-over", pattern=hands_over, llm={"provider": "mock"}),
)
"""Agents beside that of an ending."""
ENDINGS: dict[str, Ending] = {
    "completed": ends(react(SUM, {"text": "2"}), StopReason.COMPLETED),
    "completed after corrections": ends(
        react({"text": "no"}, {"text": '{"price": 1}'}), StopReason.COMPLETED, output_type=IMPOSSIBLE
    ),
    "the pattern is broken": ends(agent(pattern={"impl": f"{__name__}.Broken"}), StopReason.FAILED),
    "the model refuses": ends(react({"error": "response"}), StopReason.FAILED),
    "the tools fail": ends(
        react(
            *[calls(("fail", {}))] * 9, pattern={"type": "react", "config": {"max_tool_errors_in_a_row": 1}}
        ),
        StopReason.FAILED,
    ),
    "the answer does not fit": ends(react(*[{"text": "no"}] * 4), StopReason.FAILED, output_type=IMPOSSIBLE),
    "retries in vain": (
        react({"error": "connection", "times": 9}, {"text": "2"}),
        retry_in_vain,
        StopReason.FAILED,
    ),
    "a step takes too long": ends(
        react(calls(("hang", {})), pattern=react_with(step_timeout_ms=50)),
        StopReason.TIMEOUT,
        budget={"max_resume_attempts": 0},
    ),
    "too many steps": ends(OFTEN, StopReason.MAX_STEPS, budget={"max_steps": 1}),
    "too many tool calls": ends(OFTEN, StopReason.MAX_STEPS, budget={"max_tool_calls": 1}),
    "too many tokens": ends(OFTEN, StopReason.BUDGET_EXHAUSTED, budget={"max_total_tokens": 1}),
    "too expensive": ends(PAID, StopReason.BUDGET_EXHAUSTED, budget={"max_cost_usd": 1e-9}),
    "no time": ends(STUCK, StopReason.BUDGET_EXHAUSTED, budget={"max_duration_ms": 50}),
    "cancelled before": (react(), cancel_before, StopReason.CANCELLED),
    "cancelled while it works": (STUCK, cancel_while_it_works, StopReason.CANCELLED),
    "cancelled while it is paused": (OFTEN, cancel_while_it_is_paused, StopReason.CANCELLED),
    "resumed": (OFTEN, fail_and_be_resumed, StopReason.MAX_STEPS),
    "left by every worker": (react(), be_left_by_every_worker, StopReason.FAILED),
    "nobody decides in time": ends(UNDECIDED, StopReason.FAILED),
    "another agent ends it": (react(), wait_for_a_child_that_ends, StopReason.COMPLETED),
    "interrupted": (react(), be_interrupted, StopReason.CANCELLED),
    "invalid message": (react(), be_in_an_invalid_message, StopReason.FAILED),
    "expired in the queue": (react(), expire_in_the_queue, StopReason.CANCELLED),
    "expired while it is delayed": (react(), expire_while_it_is_delayed, StopReason.CANCELLED),
    "of a version that is gone": (react(), be_of_a_version_that_is_gone, StopReason.FAILED),
    "its journal is lost": (react(), lose_its_journal, StopReason.FAILED),
    "its worker dies with its work": (STUCK, lose_its_worker_and_its_work, StopReason.FAILED),
    "it kills its workers": (
        agent(pattern={"impl": f"{__name__}.Stuck"}), kill_its_worker, StopReason.FAILED
    ),
    "its worker dies while it is cancelled": (
        STUCK, lose_its_worker_while_it_is_cancelled, StopReason.CANCELLED
    ),
    "given back too often": (react(), be_given_back, StopReason.FAILED),
    "given back without its work": (react(), be_given_back_without_its_work, StopReason.FAILED),
    "given back while it is cancelled": (react(), be_given_back_while_it_is_cancelled, StopReason.CANCELLED),
    "rolled back": (react(), be_rolled_back, StopReason.CANCELLED),
    "its parent ends": (react(), be_the_child_of_a_run_that_ends, StopReason.CANCELLED),
}  # fmt: skip
ENDED_BY = {
    "cancel": "cancelled before",
    "claim": "of a version that is gone",
    "finish": "completed",
    "reclaim": "it kills its workers",
    "reject": "invalid message",
    "release": "given back too often",
    "submit": "rolled back",
    "wake": "expired while it is delayed",
}
"""The scripts that may end a run, and an ending by each."""


@pytest.mark.parametrize("name", ENDINGS)
async def test_every_ending_has_declared_events_in_order(redis_url: str, name: str) -> None:
    """One terminal event a life, then the final one with the stop reason. No key is missing or unknown."""
    definition, end, reason = ENDINGS[name]
    RUNNING.clear()
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_LEFT_TO_OTHERS_MAX_S": "0.001"})
    async with process(redis_url, definition, *OTHERS, settings=settings) as p:
        await end(p)
        events = await p.events()

    lives = {event["life"] for event in events}
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    for life in lives:
        names = [event["name"] for event in events if event["life"] == life]
        assert sum(each in TERMINAL_EVENTS for each in names) == 1
        assert names[-2] in TERMINAL_EVENTS
        assert names[-1] == "session.run.completed"
    last = events[-1]
    assert (last["payload"]["stop_reason"], last["final"]) == (reason, True)
    problems = [text for event in events for text in _problems(event["name"], event["payload"])]
    assert not problems, "\n".join(sorted(set(problems)))


def _problems(name: str, payload: dict[str, Any]) -> list[str]:
    schema = EVENT_SCHEMAS[name]
    unknown = payload.keys() - {*schema.required, *schema.optional, *IDS}
    return [*check_event(name, payload), *(f"{name}: {key!r} is not declared" for key in sorted(unknown))]


def test_there_is_an_ending_for_every_stop_reason() -> None:
    assert {reason for _, _, reason in ENDINGS.values()} == set(StopReason)


def test_there_is_an_ending_by_every_script_that_ends_runs() -> None:
    """Only `end_run` writes a terminal event (`lib/end_run.lua`)."""
    ends_runs = re.compile(r"^[^-\n]*\b(end_run|cancelled|enter)\(", re.MULTILINE)
    names = {path.stem for path in LUA.glob("*.lua") if ends_runs.search(path.read_text())}
    assert names == set(ENDED_BY)
    assert set(ENDED_BY.values()) <= set(ENDINGS)
