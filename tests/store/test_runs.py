"""Reading runs and sessions: values that the scripts wrote are read back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator

import pytest

from openagents_worker.errors import LLMResponseError, RunNotFound, SessionNotFound
from openagents_worker.models import RunArtifact, RunState, StopReason
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.records import aread_record, aread_states, read_record, read_states
from openagents_worker.store.sessions import MAX_PAGE_ITEMS, SessionStore, aread_session, read_session
from tests.support.scripts import Hand


@pytest.fixture
def hand(redis_url: str) -> Generator[Hand]:
    with Hand(redis_url) as hand:
        yield hand


@pytest.fixture
async def store(hand: Hand) -> AsyncGenerator[AsyncStore]:
    store = AsyncStore(hand.store.cell)
    yield store
    await store.close()


def test_a_record_has_the_current_values_of_a_run(hand: Hand) -> None:
    """State, owner, counters and times are current; the result exists from the end of the run on."""
    hand.submit("r1")
    queued = read_record(hand.store, "r1")
    hand.claim("r1")
    running = read_record(hand.store, "r1")
    hand.finish("r1", "391")
    ended = read_record(hand.store, "r1")

    assert (queued.state, queued.worker, queued.attempt, queued.started_ms) == (
        RunState.QUEUED,
        None,
        0,
        None,
    )
    assert (running.state, running.worker, running.attempt) == (RunState.RUNNING, "hand:1", 1)
    assert (ended.state, ended.worker, ended.usage.llm_calls) == (RunState.COMPLETED, None, 1)
    assert ended.request is not None
    assert ended.request.input_text == "hi"
    assert ended.result is not None
    assert ended.result.final_output == "391"
    assert ended.created_ms is not None
    assert ended.started_ms is not None
    assert ended.ended_ms is not None
    assert ended.created_ms <= ended.started_ms <= ended.ended_ms


def test_a_retrying_run_has_its_due_time(hand: Hand) -> None:
    """`due_ms` is set while the run waits for a time. The error for which it waits is not its result."""
    hand.submit("r1")
    hand.claim("r1")
    hand.retry("r1", delay_ms=60_000)

    record = read_record(hand.store, "r1")

    assert (record.state, record.retries, record.result) == (RunState.RETRYING, 1, None)
    assert record.due_ms is not None
    assert record.started_ms is not None
    assert record.due_ms >= record.started_ms + 60_000


def test_retries_are_counted_over_the_whole_run(hand: Hand) -> None:
    """Also those before a step that finally succeeded. The last error is kept."""
    hand.submit("r1")
    for _ in range(3):
        hand.claim("r1")
        hand.retry("r1", delay_ms=0)
    hand.claim("r1")
    hand.commit("r1", steps=1)
    hand.finish("r1")

    record = read_record(hand.store, "r1")

    assert (record.state, record.retries, record.attempt) == (RunState.COMPLETED, 3, 4)
    assert record.last_error is not None
    assert (record.last_error.code, record.last_error.message) == ("llm.rate_limit", "slow down")


def test_a_record_of_the_previous_version_has_only_the_error_code(hand: Hand) -> None:
    """That version stored neither the number of all retries nor the message."""
    hand.submit("r1")
    hand.claim("r1")
    hand.retry("r1")
    hand.store.ask(lambda r: r.hdel(hand.store.keys("run", "r1"), "retries_in_all", "last_error_details"))

    record = read_record(hand.store, "r1")

    assert record.retries == 1
    assert record.last_error is not None
    assert (record.last_error.code, record.last_error.message) == ("llm.rate_limit", "")


def test_a_failed_run_keeps_its_error(hand: Hand) -> None:
    """The stored result has the code, the message and the stop reason."""
    hand.submit("r1")
    hand.claim("r1")
    hand.finish("r1", error=LLMResponseError("no choices", hint="look at the model"))

    result = read_record(hand.store, "r1").result

    assert result is not None
    assert result.stop_reason is StopReason.FAILED
    assert result.error_details is not None
    assert (result.error_details.code, result.error_details.hint) == ("llm.response", "look at the model")


async def test_the_async_reader_gives_the_same_record(hand: Hand, store: AsyncStore) -> None:
    """Both readers share one parser."""
    hand.submit("r:1/*")

    assert await aread_record(store, "r:1/*") == read_record(hand.store, "r:1/*")


async def test_an_unknown_run_is_not_found(hand: Hand, store: AsyncStore) -> None:
    """No record means `run.not_found`, with the id as a field."""
    with pytest.raises(RunNotFound) as sync_error:
        read_record(hand.store, "r9")
    with pytest.raises(RunNotFound) as async_error:
        await aread_record(store, "r9")

    assert sync_error.value.run_id == async_error.value.run_id == "r9"


async def test_states_of_many_runs_are_read_together(hand: Hand, store: AsyncStore) -> None:
    """More than fit into one pipeline, including unknown runs."""
    hand.submit("r1")
    ids = ["r1", *(f"nobody-{i}" for i in range(1200))]

    states = read_states(hand.store, ids)

    assert states["r1"] is RunState.QUEUED
    assert len(states) == 1201
    assert set(states.values()) == {RunState.QUEUED, None}
    assert await aread_states(store, ids) == states


async def test_a_session_has_its_holder_its_queue_and_its_contents(hand: Hand, store: AsyncStore) -> None:
    """Holder, queue in order, transcript, artifacts and state of one moment."""
    for run_id in ("r1", "r2", "r3"):
        hand.submit(run_id)
    hand.claim("r1")
    hand.finish(
        "r1",
        transcript=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "391"}],
        artifacts=[RunArtifact(name="report", payload={"rows": 3})],
        state={"visits": 1, "names": ["a"]},
    )
    hand.claim("r2")

    view = read_session(hand.store, "s1")

    assert (view.holder, view.waiting) == ("r2", ("r3",))
    assert [message["content"] for message in view.transcript] == ["hi", "391"]
    assert view.artifacts == (RunArtifact(name="report", payload={"rows": 3}),)
    assert view.state == {"visits": 1, "names": ["a"]}
    assert await aread_session(store, "s1") == view
    hand.finish("r2")
    hand.claim("r3")


async def test_a_session_without_keys_is_not_found(hand: Hand, store: AsyncStore) -> None:
    """Its first run creates a session."""
    with pytest.raises(SessionNotFound):
        read_session(hand.store, "s9")
    with pytest.raises(SessionNotFound):
        await aread_session(store, "s9")


async def test_a_transcript_is_read_in_pages_up_to_a_given_length(hand: Hand, store: AsyncStore) -> None:
    """A replay with the length of step 0 reads the same items, whatever was appended since then."""
    reader, size = SessionStore(store), 2 * MAX_PAGE_ITEMS + 7
    hand.submit("r1")
    hand.claim("r1")
    hand.finish("r1", transcript=[{"role": "user", "content": str(i)} for i in range(size)])
    noted = await reader.count_messages("s1")
    hand.submit("r2")
    hand.claim("r2")
    hand.finish("r2", transcript=[{"role": "user", "content": "later"}])

    def contents(messages: list[dict[str, str]]) -> list[str]:
        return [message["content"] for message in messages]

    assert noted == size
    assert contents(await reader.load_messages("s1", upto=noted)) == [str(i) for i in range(size)]
    assert contents(await reader.load_messages("s1", last=3, upto=noted)) == ["404", "405", "406"]
    assert contents(await reader.load_messages("s1", last=2)) == ["406", "later"]
    assert await reader.load_messages("s1", last=0) == []
    assert await reader.load_messages("s9") == []


async def test_artifacts_and_state_of_a_session_come_back_as_written(hand: Hand, store: AsyncStore) -> None:
    """Artifacts keep their order; state values are JSON."""
    reader = SessionStore(store)
    hand.submit("r1")
    hand.claim("r1")
    hand.finish("r1", artifacts=[RunArtifact(name="a"), RunArtifact(name="b")], state={"n": None})

    assert [artifact.name for artifact in await reader.list_artifacts("s1")] == ["a", "b"]
    assert [artifact.name for artifact in await reader.list_artifacts("s1", last=1)] == ["b"]
    assert [artifact.name for artifact in await reader.list_artifacts("s1", upto=1)] == ["a"]
    assert await reader.load_state_texts("s1") == {"n": "null"}
