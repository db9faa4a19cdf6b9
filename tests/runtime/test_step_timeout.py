"""A step that takes too long is retried like a failed call, and no finished call is repeated."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from openagents_worker.errors import StepTimeoutError
from openagents_worker.models import RunState, StopReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.tools.base import ToolPlugin
from tests.support.runner import Process, agent, calls, due, process, scripted
from tests.support.waiting import until_cancelled

HERE = "tests.runtime.test_step_timeout"
STEP = {"max_steps": 5, "step_timeout_ms": 400}


class Hangs(ToolPlugin):
    """Hangs the first `times` times; `made` counts its calls."""

    class Config(ToolPlugin.Config):
        times: int = 1

    made: ClassVar[int] = 0
    ended: ClassVar[int] = 0

    async def invoke(self, params: dict[str, Any], context: Any) -> str:
        Hangs.made += 1
        if Hangs.made <= self.cfg.times:
            try:
                await until_cancelled()
            finally:
                Hangs.ended += 1
        return "done"


class HangsOnce(Hangs):
    durable_idempotent = False


class Counts(ToolPlugin):
    made: ClassVar[int] = 0

    async def invoke(self, params: dict[str, Any], context: Any) -> int:
        Counts.made += 1
        return Counts.made


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    Hangs.made = Hangs.ended = Counts.made = 0


def slow(impl: str = "Hangs", times: int = 1, **fields: Any) -> dict[str, Any]:
    return agent(
        tools=[
            {"id": "hang", "impl": f"{HERE}.{impl}", "config": {"times": times}},
            {"id": "count", "impl": f"{HERE}.Counts"},
        ],
        llm=scripted(calls(("count", {})), calls(("hang", {})), {"text": "answer"}),
        **{"runtime": STEP, **fields},
    )


async def goes_on(p: Process) -> None:
    await due(p)
    await p.execute()


async def test_a_step_that_takes_too_long_is_retried(redis_url: str) -> None:
    """The run is suspended and its tool stopped. The retry continues after the last recorded call."""
    async with process(redis_url, slow()) as p:
        await p.submit()
        attempt_result = await p.execute()

        assert (attempt_result.kind, attempt_result.reason) == (
            AttemptOutcome.SUSPENDED,
            "pattern.step_timeout",
        )
        assert (await p.record()).state is RunState.RETRYING
        assert (Hangs.made, Hangs.ended) == (1, 1)
        assert [record["kind"] for record in await p.journal()] == ["prepare", "model", "tool", "model"]

        await goes_on(p)
        record = await p.record()
        assert record.result is not None
        assert (record.state, record.result.final_output) == (RunState.COMPLETED, "answer")
        assert (Hangs.made, Counts.made) == (2, 1)
        names = await p.event_names()
        assert names.count("run.retry_scheduled") == 1
        assert names.count("pattern.step_started") == 3


async def test_a_step_is_retried_as_often_as_a_call(redis_url: str) -> None:
    """After `max_resume_attempts` retries the run fails with the error of the step."""
    async with process(redis_url, slow(times=9)) as p:
        await p.submit(budget={"max_resume_attempts": 2})
        await p.execute()
        await goes_on(p)
        await goes_on(p)

        result = (await p.record()).result
        assert result is not None
        assert result.error_details is not None
        assert (result.stop_reason, result.error_details.code) == (
            StopReason.TIMEOUT,
            StepTimeoutError.code,
        )
        assert result.error_details.retryable
        assert (Hangs.made, Hangs.ended) == (3, 3)
        assert "run.resume_exhausted" in await p.event_names()


@pytest.mark.parametrize(
    ("definition", "fields"),
    [(slow("HangsOnce"), {}), (slow(), {"durable": False})],
    ids=["a tool with effects", "a run that is not durable"],
)
async def test_a_step_that_must_not_be_repeated_is_not_retried(
    redis_url: str, definition: dict[str, Any], fields: dict[str, Any]
) -> None:
    """A tool that must not be called twice was in progress, or the run has no journal: the run fails."""
    async with process(redis_url, definition) as p:
        record = await p.run(**fields)

        assert record.result is not None
        assert record.result.error_details is not None
        assert record.result.error_details.code == StepTimeoutError.code
        assert Hangs.made == 1


async def test_there_is_no_limit_by_default(redis_url: str) -> None:
    """A pattern gets `step_timeout_ms` only if the agents file sets one."""
    async with process(redis_url, slow(runtime={}, pattern={"impl": f"{HERE}.Shows"})) as p:
        record = await p.run()

    assert record.result is not None
    assert record.result.final_output == {"max_steps": 16}


class Shows:
    """A pattern with the interface of the original SDK. It has default limits of its own."""

    context: Any

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    async def execute(self) -> dict[str, Any]:
        return self.config
