"""Pages: large entries are read in small pages, small entries in large pages, with the same result."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import pytest

from openagents_worker.store import scripts, sessions, stored_events
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.paging import IDS_PER_PAGE, PAGE_BYTES, PageSize
from openagents_worker.store.scripts import DeleteAnswer
from openagents_worker.store.sessions import SessionStore, read_session, session_plan
from openagents_worker.store.stored_events import history, newest_events
from openagents_worker.store.watch import watch
from tests.support.script_calls import call
from tests.support.scripts import Hand


@pytest.fixture
def hand(redis_url: str) -> Generator[Hand]:
    with Hand(redis_url) as hand:
        yield hand


@pytest.mark.parametrize(
    ("size", "count"), [(0, 500), (100, 500), (3_000, 349), (PAGE_BYTES // 2, 2), (50 * PAGE_BYTES, 1)]
)
def test_a_page_has_as_many_entries_as_fit(size: int, count: int) -> None:
    """At least one, at most `max_count`."""
    page = PageSize(first=100, max_count=500)
    page.learn(10, 10 * size)
    assert page.count == count


async def test_a_transcript_of_large_messages_is_read_in_small_pages(redis_url: str) -> None:
    """A megabyte at a time, but for the first page."""
    store = AsyncStore(Cell(redis_url))
    texts = [json.dumps({"role": "user", "content": str(n) + "x" * 100_000}) for n in range(100)]
    await store.redis.rpush(store.keys("transcript", "s1"), *texts)
    asked: list[int] = []
    reader = SessionStore(store)
    page = reader._page

    async def counted(key: str, at: int, to: int) -> list[str]:
        asked.append(to - at)
        return await page(key, at, to)

    reader._page = counted  # type: ignore[method-assign]
    messages = await reader.load_messages("s1")
    await store.redis.delete(store.keys("transcript", "s1"))
    await store.close()

    assert [message["content"][:2].rstrip("x") for message in messages] == [str(n) for n in range(100)]
    assert (asked[0], max(asked[1:])) == (20, 10)


def test_a_part_of_the_history_is_read_without_the_rest(hand: Hand) -> None:
    """From a number on, and only so many events."""
    hand.submit("r1")
    hand.claim("r1")
    for batch in range(1, 7):
        events = [word for n in range(200) for word in ("said", json.dumps({"n": batch * 1_000 + n}))]
        hand.store.run(scripts.emit(run_id="r1", fence=_fence(hand), batch_no=batch, events=events))
    keys = hand.store.keys
    whole = [event.seq for event in hand.store.execute(history(keys, "r1"))]
    begin = hand.store.redis.xinfo_stream(keys("events", "r1"))

    def seqs(**part: Any) -> list[int | None]:
        return [event.seq for event in hand.store.execute(history(keys, "r1", **part))]

    assert begin["length"] == len(whole) > 1_200
    assert seqs(after=700, most=100) == list(range(701, 801))
    assert seqs(after=len(whole) - 10) == whole[-10:]
    assert seqs(after=2**63 - 1, most=3) == []
    assert seqs(most=3) == whole[:3]


@pytest.mark.parametrize("trimmed", [0, 900])
def test_the_last_events_of_a_run_are_read_without_the_others(hand: Hand, trimmed: int) -> None:
    """However many they are, and whatever their number: also those that were trimmed."""
    _with_events(hand, 1_200)
    keys = hand.store.keys
    hand.store.redis.xtrim(keys("events", "r1"), minid=f"{trimmed}-0", approximate=False)
    whole = [event.seq for event in hand.store.execute(history(keys, "r1"))]

    for newest in (1, 49, 50, 51, 1_000, 5_000):
        found = hand.store.execute(newest_events(keys, "r1", newest))
        assert [event.seq for event in found] == whole[-newest:]


def test_large_last_events_are_not_all_read(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is made again several times a second."""
    monkeypatch.setattr(stored_events, "NEWEST_BYTES", 100_000)
    _with_events(hand, 1_200, "x" * 1_000)

    found = hand.store.execute(newest_events(hand.store.keys, "r1", 1_200))

    seqs = [event.seq or 0 for event in found]
    assert 100 <= len(seqs) < 1_200
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
    assert seqs[-1] == hand.store.execute(history(hand.store.keys, "r1"))[-1].seq


def _with_events(hand: Hand, count: int, text: str = "") -> None:
    """A run that has emitted so many events."""
    hand.submit("r1")
    hand.claim("r1")
    for batch in range(1, count // 200 + 1):
        events = [word for n in range(200) for word in ("said", json.dumps({"n": n, "x": text}))]
        hand.store.run(scripts.emit(run_id="r1", fence=_fence(hand), batch_no=batch, events=events))


def test_the_last_messages_of_a_session_are_read_without_the_others(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most so many, and no more than a few megabytes, for a page. A client gets them all."""
    store, keys = hand.store, hand.store.keys
    hand.submit("r1")
    hand.claim("r1")
    texts = [json.dumps({"role": "user", "content": f"{n} {'x' * 1_000}"}) for n in range(300)]
    store.redis.rpush(keys("transcript", "s1"), *texts)

    def shown(newest: int | None) -> list[int]:
        session = store.execute(session_plan(keys, "s1", newest))
        return [int(message["content"].split()[0]) for message in session.transcript]

    assert shown(None) == list(range(300))
    assert shown(250) == list(range(50, 300))
    assert shown(1_000) == list(range(300))
    monkeypatch.setattr(sessions, "NEWEST_BYTES", 1)
    assert shown(250) == list(range(280, 300))
    store.redis.delete(keys("transcript", "s1"))


def test_large_events_are_read_in_small_pages(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a watcher and by a reader of the history: all of them, in order."""
    hand.submit("r1")
    hand.claim("r1")
    for batch in range(1, 31):
        events = [
            word for n in range(10) for word in ("said", json.dumps({"n": batch * 10 + n, "x": "x" * 50_000}))
        ]
        hand.store.run(scripts.emit(run_id="r1", fence=_fence(hand), batch_no=batch, events=events))
    counts: list[int] = []
    xrange = type(hand.store.redis).xrange

    def counted(self: Any, name: str, start: str, end: str, count: int) -> Any:
        counts.append(count)
        return xrange(self, name, start, end, count)

    monkeypatch.setattr(type(hand.store.redis), "xrange", counted)
    told = hand.store.execute(history(hand.store.keys, "r1"))
    hand.finish("r1")
    watched = list(watch(hand.store, "r1"))

    said = [event.payload["n"] for event in told if event.name == "said"]
    assert said == list(range(10, 310))
    assert [event.payload["n"] for event in watched if event.name == "said"] == said
    assert min(counts) < 30


def _fence(hand: Hand) -> str:
    return str(hand.store.redis.hget(hand.store.keys("run", "r1"), "fence"))


@pytest.mark.parametrize("count", [1, 4_000, 5_000])
def test_a_worker_of_many_agents_registers(hand: Hand, count: int) -> None:
    """Lua passes at most a few thousand values to a command; a file may have five thousand agents."""
    agents = [word for n in range(count) for word in (f"agent-{n}", '{"queue":null,"def_hash":"h"}')]

    hand.store.run(scripts.register(incarnation="w9:1", lease_ms=60_000, agents=agents))
    unknown = hand.store.run(call("submit", run_id="r9", agent_id="nobody"))

    assert hand.store.redis.hlen(hand.store.keys("agents")) >= count
    assert unknown.answer == "UNKNOWN_AGENT"
    assert len(unknown.known_agents) >= count
    hand.store.redis.delete(hand.store.keys("agents"))
    hand.store.run(scripts.retire(incarnation="w9:1"))


def test_a_session_with_a_long_past_and_a_long_queue_is_read_in_pages(hand: Hand) -> None:
    """The result is complete and in order."""
    redis, keys = hand.store.redis, hand.store.keys
    hand.submit("r1", session_id="long")
    waiting = [f"w{number:04}" for number in range(2 * IDS_PER_PAGE + 300)]
    messages = [{"role": "user", "content": str(number)} for number in range(450)]
    redis.zadd(keys("session_queue", "long"), {run_id: number for number, run_id in enumerate(waiting)})
    redis.rpush(keys("transcript", "long"), *map(json.dumps, messages))

    view = read_session(hand.store, "long")

    assert view.waiting == tuple(waiting)
    assert list(view.transcript) == messages
    redis.delete(keys("session_queue", "long"), keys("transcript", "long"))


def test_a_session_with_a_queue_of_deleted_runs_is_deleted(hand: Hand) -> None:
    """A page of the queue per call; runs that do not exist are removed from it."""
    keys = hand.store.keys
    hand.submit("r1", session_id="old")
    hand.store.run(scripts.cancel(run_id="r1", reason="", force=True))
    gone = {f"gone{number}": number for number in range(250)}
    hand.store.redis.zadd(keys("session_queue", "old"), gone)

    answers = []
    while not answers or answers[-1].answer is DeleteAnswer.MORE:
        answers.append(
            hand.store.run(scripts.delete_session(session_id="old", limit=100, even_if_not_notified=True))
        )

    assert [each.answer for each in answers] == [DeleteAnswer.MORE, DeleteAnswer.MORE, DeleteAnswer.DELETED]
    assert not hand.store.redis.exists(keys("session_queue", "old"))


def test_a_full_page_of_runs_with_the_same_send_time_is_examined(hand: Hand) -> None:
    """In a queue that cannot be inspected. Later runs are examined when the check starts again."""
    redis, keys = hand.store.redis, hand.store.keys
    redis.zadd(keys("sent", "q"), {f"r{number}": 1_000_000 for number in range(1_500)})

    hand.store.run(call("resend_unread", queue="q", limit=100))

    assert redis.zcard(keys("sent", "q")) <= 1_400
    assert redis.zcard(keys("resend", "q")) <= 1_000
    redis.delete(keys("sent", "q"))
