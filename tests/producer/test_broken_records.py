"""A field of a record may be missing, empty or invalid: whoever reads or waits gets an answer at once.

Another program may have changed the field, or another version may not have written it. A waiter that misses
the end of its run would look at the record only after 15 s: the deadlines here are shorter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from openagents_worker.errors import OpenAgentsError
from openagents_worker.events import RunEvent
from openagents_worker.producer.client import Client
from openagents_worker.producer.handle import CELERY_STATES, RunHandle
from openagents_worker.store.event_cursor import HEAD_FIELDS
from openagents_worker.store.published import PublishedMessage
from openagents_worker.store.records import RECORD_FIELDS
from openagents_worker.store.watch import SILENCE_S, _LiveEvents, watch
from openagents_worker.worker.thread_stack import frames_of
from tests.support.scripts import Hand
from tests.support.waiting import wait_for

DAMAGES = (None, "", "x", "0", "-1")  # None: the field is missing
PATIENCE_S = 10.0
NEEDED_TO_END = ("state", "session", "owner")
"""Without them no worker can end the run: another worker takes it."""
CODES = {"run.not_found", "record.unreadable"}

assert PATIENCE_S < SILENCE_S


def claimed(client: Client, hand: Hand, run_id: str = "r1") -> RunHandle[Any]:
    fields = {"agent_id": "assistant", "session_id": f"s-{run_id}", "input_text": "hi", "run_id": run_id}
    handle = client.submit(fields)
    hand.claim(run_id)
    return handle


def damage(client: Client, handle: RunHandle[Any], field: str, value: str | None) -> None:
    key = client.store.keys("run", handle.id)
    if value is None:
        client.store.redis.hdel(key, field)
    else:
        client.store.redis.hset(key, field, value)


def readers(client: Client, handle: RunHandle[Any]) -> dict[str, Callable[[], object]]:
    """The ways in which a producer learns of the end of a run."""

    def events(after: int | None) -> object:
        return list(watch(client.store, handle.id, after, deadline=time.monotonic() + PATIENCE_S))

    return {
        "wait": lambda: handle.wait(timeout=PATIENCE_S),
        "get": lambda: handle.get(timeout=PATIENCE_S),
        "events": lambda: events(0),
        "later events": lambda: events(None),
    }


@pytest.fixture(autouse=True)
def no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher that has heard nothing for too long would look at the record: then it is too late here."""
    events_of = _LiveEvents.events_of

    def heard(step: _LiveEvents, message: PublishedMessage | None) -> Sequence[RunEvent]:
        assert message is not None, "the watcher missed the end of the run"
        return events_of(step, message)

    monkeypatch.setattr(_LiveEvents, "events_of", heard)


def outcome(read: Callable[[], object]) -> str:
    """`ok`, or the code of the error. Raises every other error, and `TimeoutError`."""
    try:
        read()
    except TimeoutError:
        raise
    except OpenAgentsError as error:
        return error.code
    return "ok"


@pytest.mark.share(of=3)
@pytest.mark.parametrize("field", [*RECORD_FIELDS, "seq"])
def test_every_reader_of_an_ended_run_answers_at_once(client: Client, hand: Hand, field: str) -> None:
    """With the result, or with a code that says that the record cannot be read."""
    for number, value in enumerate(DAMAGES):
        handle = claimed(client, hand, f"r{number}")
        hand.finish(handle.id)
        stored = client.store.redis.hget(client.store.keys("run", handle.id), field)
        damage(client, handle, field, value)

        found = {name: outcome(read) for name, read in readers(client, handle).items()}
        found["record"] = outcome(handle.record)

        assert set(found.values()) <= {"ok", *CODES}, (value, found)
        damage(client, handle, field, value=stored)


@pytest.mark.share(of=3)
@pytest.mark.parametrize("field", [name for name in HEAD_FIELDS if name not in NEEDED_TO_END])
@pytest.mark.parametrize("value", DAMAGES)
def test_every_waiter_is_told_of_the_end_of_a_run_at_once(
    client: Client, hand: Hand, field: str, value: str | None
) -> None:
    """The field is damaged before somebody waits, and the run ends while all of them listen."""
    handle = claimed(client, hand)
    damage(client, handle, field, value)
    waits = {name: _Waiter(read) for name, read in readers(client, handle).items()}
    wait_for(lambda: all(each.listens_or_has_ended() for each in waits.values()), "all listen")

    hand.finish(handle.id)

    found = {name: each.outcome() for name, each in waits.items()}
    assert set(found.values()) <= {"ok", *CODES}, found


def test_a_waiter_is_told_although_the_life_in_the_record_is_lost(client: Client, hand: Hand) -> None:
    """The events then name the first life, and the waiter joined in the seventh: the record decides."""
    handle = claimed(client, hand)
    damage(client, handle, "life", "7")
    waits = {name: _Waiter(read) for name, read in readers(client, handle).items()}
    wait_for(lambda: all(each.listens_or_has_ended() for each in waits.values()), "all listen")

    damage(client, handle, "life", None)
    hand.finish(handle.id)

    assert {name: each.outcome() for name, each in waits.items()} == dict.fromkeys(waits, "ok")


class _Waiter:
    """A thread that reads until the run ends."""

    def __init__(self, read: Callable[[], object]) -> None:
        self._outcome: list[str | BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(read,))
        self._thread.start()

    def _run(self, read: Callable[[], object]) -> None:
        try:
            self._outcome.append(outcome(read))
        except BaseException as error:
            self._outcome.append(error)

    def listens_or_has_ended(self) -> bool:
        """Whether it waits for a message, or has an answer: then it has read everything that is stored."""
        if self._outcome:
            return True
        return any(frame.f_code.co_name == "next_message" for frame in frames_of(self._thread.ident or 0))

    def outcome(self) -> str | BaseException:
        self._thread.join()
        return self._outcome[0]


def test_an_empty_state_is_a_broken_record(client: Client, hand: Hand) -> None:
    """All readers say so. A record without a state does not exist, as for the scripts."""
    handle = claimed(client, hand)
    damage(client, handle, "state", "")

    found = {name: outcome(read) for name, read in readers(client, handle).items()}
    found["record"] = outcome(handle.record)

    assert set(found.values()) == {"record.unreadable"}, found
    damage(client, handle, "state", "running")


def test_a_run_that_has_ended_without_a_result_is_unreadable(client: Client, hand: Hand) -> None:
    """The hint says that its events may still be there."""
    handle = claimed(client, hand)
    hand.finish(handle.id)
    damage(client, handle, "result", None)

    assert outcome(lambda: handle.wait(timeout=PATIENCE_S)) == "record.unreadable"
    assert outcome(lambda: handle.get(timeout=PATIENCE_S)) == "record.unreadable"
    assert outcome(lambda: handle.result) == "record.unreadable"
    assert CELERY_STATES[handle.record().state] == "SUCCESS"
