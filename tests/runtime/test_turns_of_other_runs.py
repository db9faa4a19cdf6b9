"""Held turns in runs to which nobody lends the session: forks, and shared children that somebody resumes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from openagents_worker import Agent
from openagents_worker.errors import HeldTurnsExpired
from openagents_worker.models import RunRecord, RunState
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.settings import load_settings
from openagents_worker.store.sessions import SessionStore
from openagents_worker.store.ttl import ttl_violations
from openagents_worker.submission.fork import fork_of
from tests.runtime import delegating
from tests.runtime.delegating import charge, execute_all
from tests.runtime.test_children import begin, cancel, children_of, finish, resume
from tests.runtime.test_compaction import LONG, Model, compacting, model, summary_of  # noqa: F401 - a fixture
from tests.runtime.test_held_turns import contents, family, first_child_ends, shared, state_of
from tests.support.runner import Process, process


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    delegating.CALLS.clear()
    yield
    delegating.CALLS.clear()


async def forked(p: Process, from_run_id: str, steps: int, run_id: str, **options: Any) -> RunRecord:
    """The fork of a run behind a step, after it has ended."""
    checkpoint_id = f"{from_run_id}:step:{steps}"
    fork = await p.store.execute(
        fork_of(p.store.keys, load_settings({}), checkpoint_id, run_id=run_id, **options)
    )
    fork.accepted(await p.store.run(fork.call()))
    lives = await p.store.redis.pttl(p.store.keys("held", run_id))
    assert lives < 0, "the copies do not expire with those of the source"
    await p.execute(run_id)
    return await finish(p, run_id)


async def delegations(p: Process, run_id: str = "r1") -> list[int]:
    """The numbers of the steps that delegate."""
    return [at for at, record in enumerate(await p.journal(run_id)) if record["kind"] == "delegate"]


async def questions(p: Process, session_id: str) -> list[str]:
    return (await contents(p, session_id))[::2]


async def undoes(context: Any) -> Any:
    """Takes back what its shared child has changed in the state."""
    await context.delegate("writes", context.input_text, session_isolation="shared")
    await context.step("charge", charge, "undoing")
    context.state.pop("n")
    await context.step("charge", charge, "undone")
    return context.state.get("n")


UNDOES = Agent("undoes", pattern=undoes, llm={"provider": "mock"})


# --- forks -----------------------------------------------------------------------------------------------


async def test_a_fork_has_the_turns_of_the_shared_children_before_it(redis_url: str) -> None:
    """It creates new children for the calls behind its checkpoint. A fork of it has them all."""
    changes = ('{"n": 1, "m": 1}', '{"n": null}', '{"o": 3}')
    async with process(redis_url, *family()) as p:
        await begin(p, "parent", [shared(text, "writes") for text in changes])
        source = await finish(p)
        assert source.state is RunState.COMPLETED, source.result
        first, second, third = await delegations(p)
        own = json.dumps([shared(text, "writes") for text in changes])

        for run_id, steps, made in (("f0", 0, 3), ("f1", first, 2), ("f2", second, 1), ("f3", third, 0)):
            record = await forked(p, "r1", steps, run_id)
            assert record.state is RunState.COMPLETED, record.result
            assert len(await children_of(p, run_id)) == made
            assert await questions(p, record.session_id) == [*changes, own]
            assert await state_of(p, record.session_id) == {"m": 1, "o": 3}
            artifacts = await SessionStore(p.store).list_artifacts(record.session_id)
            assert [artifact.payload for artifact in artifacts] == list(changes)

        of_fork = await forked(p, "f1", (await delegations(p, "f1"))[1], "f11")
        assert await questions(p, of_fork.session_id) == [*changes, own]
        assert await state_of(p, of_fork.session_id) == {"m": 1, "o": 3}
        assert await questions(p, "s1") == [*changes, own]
    assert ttl_violations(redis_url) == []


async def test_a_fork_does_not_take_the_changes_of_its_children_twice(redis_url: str) -> None:
    """The records have them. What the run has undone since then stays undone."""
    async with process(redis_url, *family(), UNDOES) as p:
        await begin(p, "undoes", '{"n": 1, "m": 1}')
        await finish(p)
        [delegated] = await delegations(p)

        record = await forked(p, "r1", delegated, "f1")

        assert record.state is RunState.COMPLETED, record.result
        assert await state_of(p, record.session_id) == await state_of(p) == {"m": 1}


async def test_a_fork_in_the_session_of_its_source_writes_their_turns_again(redis_url: str) -> None:
    """As it writes its own turn: once more, at the end."""
    async with process(redis_url, *family()) as p:
        await begin(p, "parent", [shared('{"n": 1}', "writes")])
        await finish(p)
        [delegated] = await delegations(p)
        await forked(p, "r1", delegated, "f1", session_id="s1")
        assert (await questions(p, "s1"))[::2] == ['{"n": 1}'] * 2


@pytest.mark.parametrize("has_ended", [True, False], ids=["ended", "live"])
async def test_the_session_of_a_fork_of_a_shared_child_has_what_the_child_saw(
    redis_url: str, has_ended: bool
) -> None:
    """The turns of the children before it, also if their parent has not written them yet."""
    async with process(redis_url, *family()) as p:
        await begin(p, "depends", [shared('{"n": 1}', "writes"), shared('{"m": 2}', "writes")])
        await first_child_ends(p)
        await p.execute()
        second = (await children_of(p))[1].run_id
        await p.execute(second)
        if has_ended:
            await finish(p)
        p.wakes.clear()

        record = await forked(p, second, 0, "f1")

        assert record.result is not None, record
        state = "('m', 2), ('n', 1)" if has_ended else "('n', 1)"
        assert record.result.final_output == f"""['{{"n": 1}}'] [{state}] 1"""
        assert await questions(p, record.session_id) == ['{"n": 1}', '{"m": 2}']
        assert await state_of(p, record.session_id) == {"n": 1, "m": 2}
        artifacts = await SessionStore(p.store).list_artifacts(record.session_id)
        assert len(artifacts) == 2


# --- children that somebody resumes ----------------------------------------------------------------------


async def failed_child(p: Process, *behind: dict[str, Any]) -> str:
    """A shared child that saw the turn of another one when it began, and has failed."""
    await begin(p, "parent", [shared('{"n": 1}', "writes"), shared("fail", "worker"), *behind])
    await finish(p)
    child = (await children_of(p))[1]
    assert child.state is RunState.FAILED
    return child.run_id


async def test_a_child_needs_the_turns_that_it_saw_when_it_began(redis_url: str) -> None:
    """They have expired with its parent: the error says so, for the child and for a fork of it."""
    async with process(redis_url, *family()) as p:
        child = await failed_child(p)
        await p.store.redis.delete(p.store.keys("run", "r1"), p.store.keys("held", "r1"))

        await resume(p, child)
        record = await p.record(child)
        assert record.result is not None
        details = record.result.error_details
        assert details is not None
        assert (details.code, "'r1'" in details.message) == ("run.held_turns_expired", True)
        assert "as a new run" in str(details.hint)
        with pytest.raises(HeldTurnsExpired, match="'r1'"):
            await forked(p, child, 0, "f1")
        assert await p.store.redis.exists(p.store.keys("run", "f1")) == 0


async def test_a_summary_of_turns_that_are_not_in_the_session_is_not_stored(
    redis_url: str,
    model: Model,  # noqa: F811 - the fixture
) -> None:
    """They were those of children of a run that has failed. Messages of others have their positions now."""
    async with process(redis_url, *family(), compacting()) as p:
        model.held = 5  # the answer of the last child, behind its summary
        await begin(p, "parent", [shared(f"q{n} {LONG}", "a") for n in range(4)])
        executing = asyncio.create_task(execute_all(p))
        await model.is_asked(5)
        last = (await children_of(p))[3].run_id
        await cancel(p)
        p.runner.latch(last, LatchReason.CANCELLED)
        await executing
        assert [(await p.record(id_)).state for id_ in ("r1", last)] == [RunState.CANCELLED] * 2
        await p.run("r2", agent_id="worker", input_text="next")

        await resume(p, last)
        record = await p.record(last)
        assert record.result is not None, record
        assert record.result.final_output == "second"
        assert "compact" in [entry["name"] for entry in await p.journal(last)]
        assert len(await contents(p)) == 4
        assert await summary_of(p) is None
