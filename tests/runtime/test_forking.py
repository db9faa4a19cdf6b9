"""Forks: the calls up to the checkpoint are answered from the copied records, and the rest is made anew."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openagents_worker.models import RunRecord, RunState
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.settings import load_settings
from openagents_worker.submission.submit import forking
from openagents_worker.testing.model_server import ModelServer
from tests.runtime import plugins, talking
from tests.runtime.talking import Script, talker
from tests.support.runner import Process, agent, calls, process
from tests.support.waiting import await_for

ANSWER = {"text": "Here you are."}
OTHER = {"text": "Something else."}


async def fork(p: Process, redis_url: str, checkpoint_id: str, **options: Any) -> str:
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url})
    accepted = await p.store.execute(forking(p.store.keys, settings, checkpoint_id, **options))
    return accepted.run_id


@pytest.fixture(autouse=True)
def _no_call_waits() -> None:
    talking.BEGUN.clear()
    talking.LET_GO.clear()


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("asks_anew", [False, True], ids=["same question", "other question"])
async def test_a_fork_executes_only_what_is_after_its_checkpoint(
    redis_url: str, steps: int, asks_anew: bool
) -> None:
    """From each step of a run: model calls and tool calls before it are not made again, whatever is asked.

    The fork sees the session as it was when the run began.
    """
    script = Script()
    async with ModelServer(script) as server, process(redis_url, talker(server.url)) as p:
        script.by_run = {
            "r0": [{"text": "Hello."}],
            "r1": [calls(("add", {"x": 1})), calls(("add", {"x": 2}), ("shout", {"text": "a"})), ANSWER],
            "r2": [{"text": "Later."}],
        }
        for run_id in ("r0", "r1", "r2"):
            await p.run(run_id, input_text=f"Question of {run_id}.")
        journal = await p.journal("r1")
        assert [record["kind"] for record in journal] == [
            "prepare",
            "model",
            "tool",
            "model",
            "tool",
            "tool",
            "model",
        ]
        script.by_run["f"] = [OTHER]
        question = "Or rather this?" if asks_anew else None
        assert await fork(p, redis_url, f"r1:step:{steps}", run_id="f", input_text=question) == "f"
        await p.execute("f")
        record = await p.record("f")
        forked = await p.journal("f")
        [asked] = script.asked["f"]
        transcript = await p.transcript(record.session_id)

    assert record.state is RunState.COMPLETED
    assert record.result is not None
    assert record.result.final_output == "Something else."
    assert forked[: steps + 1] == journal[: steps + 1]
    made = [each["kind"] for each in forked[steps + 1 :]]
    missing_tools = {1: 1, 3: 2, 4: 1}.get(steps, 0)
    assert made == ["tool"] * missing_tools + ["model"]
    shown = [message["content"] for message in asked.body["messages"] if message["role"] == "user"]
    assert shown == ["Question of r0.", question or "Question of r1."]
    assert [entry["run_id"] for entry in transcript] == ["r0", "r0", "f", "f"]
    keys = {asked.headers["idempotency-key"] for asked in script.asked["r1"]}
    assert asked.headers["idempotency-key"] not in keys


async def test_a_fork_in_its_own_session_adds_its_turn_at_the_end(redis_url: str) -> None:
    """It sees the messages from before its source, and the session keeps all turns."""
    script = Script()
    async with ModelServer(script) as server, process(redis_url, talker(server.url)) as p:
        script.by_run = {run_id: [ANSWER] for run_id in ("r0", "r1", "f")}
        for run_id in ("r0", "r1"):
            await p.run(run_id, input_text=f"Question of {run_id}.")
        await fork(p, redis_url, "r1:step:0", run_id="f", session_id="s1", input_text="Again?")
        await p.execute("f")
        transcript = await p.transcript()
        [asked] = script.asked["f"]

    assert [entry["run_id"] for entry in transcript] == ["r0", "r0", "r1", "r1", "f", "f"]
    shown = [message["content"] for message in asked.body["messages"] if message["role"] == "user"]
    assert shown == ["Question of r0.", "Again?"]


async def test_a_fork_of_a_failed_run_goes_another_way(redis_url: str) -> None:
    """From the step before the one that failed; the failed run can still be resumed."""
    script = Script()
    async with ModelServer(script) as server, process(redis_url, talker(server.url)) as p:
        script.by_run["r1"] = [calls(("add", {"x": 1})), {"error": "response"}]
        assert (await p.run("r1")).state is RunState.FAILED
        script.by_run["f"] = [ANSWER]
        await fork(p, redis_url, "r1:step:2", run_id="f")
        await p.execute("f")

        assert (await p.record("f")).state is RunState.COMPLETED
        assert (await p.record("r1")).state is RunState.FAILED
        assert len(script.asked["f"]) == 1


async def test_a_fork_can_be_resumed_and_forked(redis_url: str) -> None:
    """It is a run like any other."""
    script = Script()
    async with ModelServer(script) as server, process(redis_url, talker(server.url)) as p:
        script.by_run["r1"] = [calls(("add", {"x": 1})), ANSWER]
        await p.run("r1")
        script.by_run["f"] = [ANSWER, calls(("shout", {"text": "a"})), OTHER]
        await fork(p, redis_url, "r1:step:2", run_id="f")
        await p.execute("f")
        script.by_run["g"] = [ANSWER]
        await fork(p, redis_url, "f:step:4", run_id="g")
        await p.execute("g")
        journal = await p.journal("g")

        assert (await p.record("g")).state is RunState.COMPLETED
        assert [record["kind"] for record in journal] == [
            "prepare",
            "model",
            "tool",
            "model",
            "tool",
            "model",
        ]
        assert (await p.record("g")).forked_from == "f:step:4"


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
async def test_a_fork_draws_the_values_of_its_source_up_to_the_checkpoint(redis_url: str, steps: int) -> None:
    """Else the calls before it would have other arguments than their records. Afterwards it draws values of
    its own, the same in every attempt."""
    definition = agent(
        pattern={"impl": "tests.runtime.waiting.DrawsIds"},
        tools=[{"id": "charge", "impl": "tests.runtime.plugins.Charge"}],
    )
    async with process(redis_url, definition) as p:
        plugins.GATES["charge"].set()
        source = output_of(await p.run("r1"))
        await fork(p, redis_url, f"r1:step:{steps}", run_id="f")
        plugins.GATES["charge"].clear()
        executing = asyncio.create_task(p.execute("f"))
        if steps < 4:
            await await_for(lambda: len(begun()) > 4, "a call after the checkpoint")
            p.runner.latch("f", LatchReason.HANDOVER)
        plugins.GATES["charge"].set()
        await executing
        await p.execute("f")
        forked = output_of(await p.record("f"))
        await fork(p, redis_url, "f:step:4", run_id="g")
        await p.execute("g")
        again = output_of(await p.record("g"))

    assert forked[:steps] == source[:steps]
    assert not set(forked[steps:]) & set(source)
    assert begun() == [*source, *forked[steps:]]
    assert again == forked


def begun() -> list[str]:
    return [entry[2] for entry in plugins.LOG if entry[0] == "begin"]


def output_of(record: RunRecord) -> list[str]:
    assert record.result is not None, record
    assert record.state is RunState.COMPLETED, record.result
    output: list[str] = record.result.final_output
    return output
