"""Formats: a worker leaves what it cannot read to others, and does not damage it.

A worker of tomorrow is one that declares that it reads one more format. All scripts are those of today.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from openagents_worker.errors import OtherFormat, RecordUnreadable
from openagents_worker.runtime.journal import Record
from openagents_worker.store import formats
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.records import aread_record, read_record
from openagents_worker.store.sessions import read_session
from openagents_worker.store.watch import awatch, watch
from tests.store.test_scripts import Bench, woken

NEW = formats.NEWEST_READ + 1
TOMORROW: dict[str, Any] = {"incarnation": "w2", "oldest": 0, "newest": NEW, "message_format": NEW}


@pytest.fixture
def bench(redis_url: str) -> Generator[Bench]:
    with Bench(redis_url) as bench:
        bench.do("register", incarnation="w2")
        yield bench


def submitted_tomorrow(bench: Bench, run_id: str = "r1", **fields: Any) -> None:
    bench.do("submit", run_id=run_id, format=NEW, **fields)


def left(bench: Bench, run_id: str = "r1") -> int:
    return bench.events(run_id).count("run.left_to_others")


def wake_everything(bench: Bench) -> list[str]:
    """Make every suspended run due now, however long it was to wait. Returns the runs that are woken."""
    for run_id in bench.redis.zrange(bench.store.keys("due"), 0, -1):
        bench.redis.hset(bench.store.keys("run", run_id), "due", 0)
        bench.redis.zadd(bench.store.keys("due"), {run_id: 0})
    return woken(bench.do("wake")[0])


# --- the format of a run ---------------------------------------------------------------------------------


def test_a_run_has_the_newest_format_that_was_written_into_it(bench: Bench) -> None:
    """A commit raises the format, and nothing lowers it."""
    bench.do("submit")
    fence = bench.do("claim", **TOMORROW).fence
    assert bench.field("format") == str(formats.WRITTEN)

    bench.do("commit", fence=fence, position=0, records=["{}"], format=NEW)
    bench.do("commit", fence=fence, position=1, records=["{}"], batch_no=2, format=1)

    assert bench.field("format") == str(NEW)


def test_a_refused_commit_does_not_raise_the_format(bench: Bench) -> None:
    """A worker that has lost its run cannot exclude other workers from it."""
    bench.claimed()

    assert bench.do("commit", fence="9:gone", position=0, format=NEW) == "FENCED"
    assert bench.field("format") == "1"


def test_a_session_has_the_newest_format_that_was_written_into_it(bench: Bench) -> None:
    """The next run of the session needs a worker that reads it, whoever has submitted the run."""
    bench.do("submit")
    bench.do("submit", run_id="r2")
    bench.do("finish", fence=bench.do("claim", **TOMORROW).fence, format=NEW)

    assert bench.do("claim", run_id="r2").answer == "OTHER_FORMAT"
    assert wake_everything(bench) == ["r2"]
    assert bench.do("claim", run_id="r2", **TOMORROW).answer == "CLAIMED"


# --- runs that are left to others ------------------------------------------------------------------------


def test_a_run_of_a_newer_format_is_left_to_others(bench: Bench) -> None:
    """It is due again in five seconds plus jitter. A worker that reads it then claims it as usual."""
    submitted_tomorrow(bench)
    before_ms = bench.now_ms()

    assert bench.do("claim").answer == "OTHER_FORMAT"

    due_ms = bench.score("due", "r1")
    assert due_ms is not None
    assert before_ms + 5_000 <= due_ms <= bench.now_ms() + 6_250
    assert bench.score("sent", "r1", "q") is None
    assert (bench.field("state"), bench.field("attempt"), bench.field("fence")) == ("retrying", "0", "0:")
    assert bench.holder() == "r1"
    assert wake_everything(bench) == ["r1"]
    assert bench.do("claim", **TOMORROW).answer == "CLAIMED"


def test_there_is_one_event_however_often_the_run_is_claimed(bench: Bench) -> None:
    """One event for all workers of a version, and one for those of another version."""
    submitted_tomorrow(bench)
    bench.do("commit", fence=bench.do("claim", **TOMORROW).fence, position=0, format=NEW + 1)
    bench.do("suspend", fence=bench.field("fence"), kind="handover")

    for _ in range(3):
        for worker in ({}, {"incarnation": "w2"}, TOMORROW):
            assert bench.do("claim", **worker).answer == "OTHER_FORMAT"
            assert wake_everything(bench) == ["r1"]

    assert left(bench) == 2


def test_the_two_formats_before_are_read(bench: Bench) -> None:
    """A run that began two upgrades ago continues; an earlier one needs an older worker."""
    for run_id in ("r1", "r2", "r3"):
        bench.do("submit", run_id=run_id, session_id=run_id)

    assert bench.do("claim", run_id="r1", oldest=0, newest=2).answer == "CLAIMED"
    assert bench.do("claim", run_id="r2", oldest=1, newest=3).answer == "CLAIMED"
    assert bench.do("claim", run_id="r3", oldest=2, newest=4).answer == "OTHER_FORMAT"


def test_a_run_that_is_left_to_others_still_expires(bench: Bench) -> None:
    """It is due when it expires, if this is sooner."""
    submitted_tomorrow(bench, expires_ms=2_000)
    assert bench.do("claim").answer == "OTHER_FORMAT"

    bench.lab.let_pass(2_500)
    bench.do("wake")

    assert bench.field("state") == "cancelled"


def test_a_message_of_a_newer_format_is_not_executed(bench: Bench) -> None:
    """Its meaning is unknown here; its run waits for a worker that knows it."""
    bench.do("submit")

    assert bench.do("claim", message_format=NEW).answer == "OTHER_FORMAT"
    assert wake_everything(bench) == ["r1"]
    assert left(bench) == 1


def test_a_run_that_waits_is_not_left_to_others(bench: Bench) -> None:
    """A state that only its own version knows is not overwritten: the run is woken later."""
    submitted_tomorrow(bench)
    bench.redis.hset(bench.store.keys("run", "r1"), "state", "awaiting_approval")

    assert bench.do("claim").answer == "OTHER_FORMAT"

    assert (bench.field("state"), left(bench)) == ("awaiting_approval", 0)
    assert bench.score("due", "r1") is None


def test_before_its_turn_a_run_of_any_format_waits(bench: Bench) -> None:
    """Order, time and ends are the same in all formats."""
    bench.do("submit")
    submitted_tomorrow(bench, "r2")
    submitted_tomorrow(bench, "r3", session_id="s3", delay_ms=60_000)
    submitted_tomorrow(bench, "r4", session_id="s4")

    assert bench.do("claim", run_id="r2").answer == "WAITING"
    assert bench.do("claim", run_id="r3").answer == "NOT_DUE"
    assert bench.do("cancel", run_id="r4").answer == "CANCELLED"
    assert bench.do("claim", run_id="r4").answer == "DONE"
    assert left(bench, "r2") == left(bench, "r3") == 0


def test_celery_is_notified_by_a_worker_that_reads_the_result(bench: Bench) -> None:
    """A result of tomorrow may contain what a worker of today refuses."""
    submitted_tomorrow(bench, tell=True)
    bench.do("finish", fence=bench.do("claim", **TOMORROW).fence, format=NEW)

    assert bench.do("claim").answer == "OTHER_FORMAT"
    claimed = bench.do("claim", **TOMORROW)
    assert (claimed.answer, bool(claimed.unnotified_result)) == ("DONE", True)
    bench.do("confirm_completion")
    assert bench.do("claim").answer == "DONE"


# --- reading ---------------------------------------------------------------------------------------------


def test_a_record_of_another_format_is_read_as_far_as_possible(bench: Bench) -> None:
    """Callers can wait for a run of tomorrow. Only its request may be unreadable."""
    request = '{"agent_id":"a","session_id":"s1","input_text":"hi"}'
    submitted_tomorrow(bench, request=request)
    submitted_tomorrow(bench, "r2", request=f'{request[:-1]},"mood":"good"}}')

    record, riddle = read_record(bench.store, "r1"), read_record(bench.store, "r2")

    assert (record.state, record.request and record.request.input_text) == ("queued", "hi")
    assert (riddle.state, riddle.agent_id, riddle.request) == ("waiting_session", "a", None)
    events = watch(bench.store, "r1")
    assert next(events).name == "run.queued"
    events.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("state", "dreaming"),
        ("usage", '{"llm_calls":"dreams"}'),
    ],
)
async def test_an_unreadable_format_has_an_error_code(bench: Bench, field: str, value: str) -> None:
    """`run.other_format`, not a validation error about an unknown field."""
    submitted_tomorrow(bench)
    bench.redis.hset(bench.store.keys("run", "r1"), field, value)
    store = AsyncStore(bench.store.cell)

    with pytest.raises(OtherFormat, match=rf"format {NEW}.*reads the formats 1 to {NEW - 1}") as caught:
        read_record(bench.store, "r1")
    with pytest.raises(OtherFormat):
        await aread_record(store, "r1")

    assert (caught.value.code, caught.value.run_id) == ("run.other_format", "r1")
    if field == "state":
        with pytest.raises(OtherFormat):
            next(watch(bench.store, "r1"))
        with pytest.raises(OtherFormat):
            await anext(awatch(store, "r1"))
    await store.close()


def test_a_broken_record_of_a_known_format_is_unreadable(bench: Bench) -> None:
    """`OtherFormat` is only for other formats."""
    bench.do("submit", request='{"agent_id":"a"}')

    with pytest.raises(RecordUnreadable, match="session_id"):
        read_record(bench.store, "r1")


def test_a_session_of_another_format_has_an_error_code(bench: Bench) -> None:
    """Its transcript is JSON in every format; its artifacts are models."""
    bench.do("submit")
    fence = bench.do("claim", **TOMORROW).fence
    bench.do("finish", fence=fence, artifacts=['{"name":["a","b"]}'], format=NEW)

    with pytest.raises(OtherFormat, match=f"format {NEW}") as caught:
        read_session(bench.store, "s1")
    assert caught.value.session_id == "s1"


def test_the_written_format_is_readable() -> None:
    """A format is read before all runs begin in it, and the two formats before it stay readable.

    A run that does what older versions do not know has a later format, from then on.
    """
    assert formats.can_read(formats.WRITTEN)
    assert formats.can_read(formats.BY_CONTENT)
    written = (formats.PARKS, formats.DELEGATES, formats.SUMMARIES, formats.HAS_JOB, formats.HOLDS_TURNS)
    assert max(written) == formats.NEWEST_READ
    assert formats.WRITTEN - formats.OLDEST_READ == 2


def test_a_journal_entry_of_another_format_is_refused() -> None:
    """Its fields may have the same names and another meaning."""
    entry = Record("m:0123456789abcdef:1", "model", "m", {"ok": 1}).to_json()
    assert f'"v":{formats.BY_CONTENT}' in entry

    with pytest.raises(OtherFormat, match=f"format {NEW}"):
        Record.from_json(entry.replace(f'"v":{formats.BY_CONTENT}', f'"v":{NEW}'))
