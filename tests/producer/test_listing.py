"""Lists of runs and sessions: by every filter, in pages, and what has expired goes out of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from openagents_worker.errors import LLMRateLimitError, RequestInvalid, ToolError
from openagents_worker.models import RunState
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.store import index_pages, listing, scripts
from openagents_worker.store.list_states import CompareBy
from openagents_worker.store.listing import MAX_LIMIT, RunFilter, list_runs
from tests.support.command_counts import calls_of
from tests.support.scripts import Hand
from tests.support.waiting import wait_for


def submit(client: Client, run_id: str, **fields: Any) -> None:
    client.submit({"agent_id": "clerk", "session_id": "s1", "input_text": "hi", "run_id": run_id, **fields})


def ids(client: Client, **filters: Any) -> list[str]:
    return [record.run_id for record in client.runs(**filters)]


def now(client: Client) -> datetime:
    """Redis's clock; what comes before is a millisecond away from what comes after."""
    now_ms = next_ms(client, redis_ms(client))
    next_ms(client, now_ms)
    return datetime.fromtimestamp(now_ms / 1000, UTC)


def redis_ms(client: Client) -> int:
    seconds, micros = client.store.redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


def next_ms(client: Client, after_ms: int) -> int:
    """What Redis's clock shows once it is past this."""

    def past() -> int | None:
        shown_ms = redis_ms(client)
        return shown_ms if shown_ms > after_ms else None

    return wait_for(past, "Redis's clock goes on") or 0


def end_all(client: Client, *run_ids: str) -> None:
    for run_id in run_ids:
        client.cancel(run_id)


def test_a_run_is_found_by_everything_that_its_request_says(client: Client) -> None:
    """Newest first; a run must match all given filters."""
    submit(client, "r1", tenant="acme", labels={"env": "prod", "tier": "gold"})
    between = now(client)
    submit(client, "r2", agent_id="other", session_id="s2", tenant="acme", labels={"env": "test"})
    submit(client, "r3", session_id="s2", labels={"env": "prod"})

    assert ids(client) == ["r3", "r2", "r1"]
    assert ids(client, agent_id="clerk") == ["r3", "r1"]
    assert ids(client, session_id="s2") == ["r3", "r2"]
    assert ids(client, tenant="acme") == ["r2", "r1"]
    assert ids(client, labels={"env": "prod"}) == ["r3", "r1"]
    assert ids(client, labels={"env": "prod", "tier": "gold"}) == ["r1"]
    assert ids(client, tenant="acme", labels={"env": "prod"}, agent_id="clerk") == ["r1"]
    assert ids(client, tenant="nobody") == []
    assert ids(client, since=between) == ["r3", "r2"]
    assert ids(client, until=between) == ["r1"]
    assert ids(client, state="queued") == ["r2", "r1"]
    assert ids(client, state=[RunState.WAITING_SESSION, "completed"]) == ["r3"]
    [record] = client.runs(labels={"tier": "gold"})
    assert record.request is not None
    assert (record.request.tenant, record.request.labels) == ("acme", {"env": "prod", "tier": "gold"})
    end_all(client, "r3", "r2", "r1")
    assert ids(client, state="cancelled", tenant="acme") == ["r2", "r1"]


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
def test_pages_give_every_run_once(client: Client, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where more runs than a chunk were accepted in one millisecond, and while new ones come in."""
    monkeypatch.setattr(listing, "CHUNK", 4)
    known = [f"r{number:02}" for number in range(20)]
    for run_id in known:
        submit(client, run_id, session_id=run_id)
    index = client.store.keys("index", "all")
    client.store.redis.zadd(index, {run_id: 1000 + int(run_id[1:]) // 9 for run_id in known})
    for run_id in known:
        client.store.redis.hset(client.store.keys("run", run_id), "created", 1)

    found: list[str] = []
    cursor = None
    while page := client.runs(limit=limit, cursor=cursor):
        assert len(page) <= limit
        found += [record.run_id for record in page]
        submit(client, f"new{len(found)}", session_id=f"new{len(found)}")
        cursor = page.next_cursor
        if cursor is None:
            break

    assert found == sorted(known, reverse=True)
    everything = [f"new{n}" for n in range(limit, 21, limit)] + known
    end_all(client, *(run_id for run_id in everything if run_id in ids(client, limit=1000)))


def test_a_page_with_few_hits_ends_and_goes_on(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call never scans a million runs: the page is empty, and its cursor continues."""
    monkeypatch.setattr(listing, "CHUNK", 2)
    monkeypatch.setattr(index_pages, "MAX_SCANNED", 4)
    submit(client, "wanted", session_id="wanted")
    end_all(client, "wanted")
    now(client)
    for number in range(6):
        submit(client, f"r{number}", session_id=f"s{number}")

    pages = [client.runs(state="cancelled")]
    while (cursor := pages[-1].next_cursor) is not None:
        pages.append(client.runs(state="cancelled", cursor=cursor))

    assert len(pages[0]) == 0
    assert len(pages) > 1
    assert [record.run_id for page in pages for record in page] == ["wanted"]
    end_all(client, *(f"r{number}" for number in range(6)))


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({"state": "failed"}, ["unstated", "again", "failed"]),
        ({"state": ["failed", "retrying"], "code": "llm.*"}, ["unstated", "retrying", "again"]),
        ({"code": "tool.*"}, ["failed"]),
        ({"code": "run.cancelled"}, ["cancelled"]),
        ({"state": "queued"}, []),
        ({"state": "queued", "code": "*"}, []),
    ],
)
def test_a_filter_by_state_or_code_finds_the_same_however_runs_are_compared(
    client: Client, hand: Hand, filters: dict[str, Any], found: list[str]
) -> None:
    """A code of an earlier life does not count. The code of `unstated` is only in its result, as that of a
    run which an earlier version has ended. One record has another type: it is named, and hides nothing."""
    keys, redis = client.store.keys, client.store.redis
    hand.end("failed", steps=1, error=ToolError("no"))
    hand.end("again", steps=1, error=ToolError("no"))
    client.resume("again")
    hand.claim("again")
    hand.finish("again", error=LLMRateLimitError("slow down"))
    hand.submit("retrying", "s2")
    hand.claim("retrying")
    hand.retry("retrying")
    submit(client, "cancelled", session_id="s3")
    end_all(client, "cancelled")
    hand.end("unstated", steps=1, error=LLMRateLimitError("slow down"))
    redis.hdel(keys("run", "unstated"), "end_code")
    submit(client, "broken", session_id="s4")
    end_all(client, "broken")
    redis.set(keys("run", "broken"), "text", ex=60)

    for compare_by in CompareBy:
        page = client.store.execute(
            list_runs(keys, RunFilter.of(filters), limit=10, cursor=None, compare_by=compare_by)
        )
        assert {record.run_id for record in page} == set(found), compare_by
        assert {problem.key for problem in page.problems} <= {keys("run", "broken")}, compare_by


def test_a_filter_by_state_reads_only_the_records_that_match(client: Client) -> None:
    """The others may be large: each contains a request and a result."""
    size = 20_000
    names = [f"r{number}" for number in range(100)]
    for name in names:
        submit(client, name, session_id=name, input_text="x" * size)
    end_all(client, "r50")

    def sent() -> int:
        return int(client.store.ask(lambda r: r.info("stats"))["total_net_output_bytes"])

    before = sent()
    assert ids(client, state="cancelled") == ["r50"]
    read = sent() - before
    end_all(client, *names)

    assert size < read < 5 * size


async def test_asyncio_lists_the_same(client: Client) -> None:
    """One implementation serves both clients."""
    submit(client, "r1", tenant="acme")
    async with AsyncClient(settings=client.settings) as same:
        page = await same.runs(tenant="acme")
        assert [record.run_id for record in page] == ["r1"]
        assert page == client.runs(tenant="acme")
        assert await same.sessions() == client.sessions()
    end_all(client, "r1")


def test_sessions_are_listed_with_what_is_in_them(client: Client, hand: Hand) -> None:
    """The one with the newest run first; a delayed run has not reached its session yet."""
    hand.end("old", steps=1)
    now(client)
    for run_id in ("r1", "r2", "r3"):
        submit(client, run_id, session_id="s2")
    client.submit({"agent_id": "clerk", "session_id": "later", "input_text": "hi"}, delay_ms=60_000)

    busy, idle = client.sessions()

    assert (busy.session_id, busy.holder, busy.waiting) == ("s2", "r1", 2)
    assert (idle.session_id, idle.holder, idle.waiting, idle.messages) == ("s1", None, 0, 0)
    assert busy.last_run_ms > idle.last_run_ms
    assert [one.session_id for one in client.sessions(limit=1)] == ["s2"]
    cursor = client.sessions(limit=1).next_cursor
    assert [one.session_id for one in client.sessions(limit=1, cursor=cursor)] == ["s1"]
    assert client.session("s1").bytes > 50
    [delayed] = client.runs(state="scheduled")
    end_all(client, "r3", "r2", "r1", delayed.run_id)


def test_a_page_of_sessions_reads_the_sessions_that_it_shows(client: Client) -> None:
    """And no others, however many there are."""
    names = [f"r{number}" for number in range(60)]
    for name in names:
        submit(client, name, session_id=name)
    before = calls_of(client, "llen")

    assert len(client.sessions(limit=25)) == 25

    assert calls_of(client, "llen") - before == 2 * 25, "the transcript and the artifacts of each"
    end_all(client, *names)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"limit": 0}, f"1 to {MAX_LIMIT:,}"),
        ({"limit": MAX_LIMIT + 1}, f"1 to {MAX_LIMIT:,}"),
        ({"cursor": "here"}, "'here' is not a valid cursor"),
        ({"code": "[a-z" * 1_000}, "the glob in code has 4,000 characters"),
        ({"state": "done"}, "'done' is not a valid RunState"),
        ({"state": ""}, "'' is not a valid RunState"),
        *(({"state": nothing}, "state contains no states") for nothing in ([], (), set(), iter(()))),
    ],
)
def test_what_cannot_be_asked_is_refused(client: Client, asked: dict[str, Any], says: str) -> None:
    """With the code of a bad request."""
    with pytest.raises(RequestInvalid, match=says):
        client.runs(**asked)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"labels": {"a=b": "c"}}, "the name of a label must not contain '='"),
        ({"labels": {"": "c"}}, "1 to 256 printable characters"),
        ({"labels": {"a": "two words"}}, "1 to 256 printable characters"),
        ({"labels": {str(n): "x" for n in range(33)}}, "at most 32 items"),
        ({"tenant": "two words"}, "1 to 256 printable characters"),
    ],
)
def test_labels_that_cannot_be_listed_are_refused(client: Client, fields: dict[str, Any], says: str) -> None:
    """At the producer, before anything is written."""
    with pytest.raises(RequestInvalid, match=says):
        submit(client, "r1", **fields)
    assert client.store.redis.dbsize() == 0


def test_a_request_without_labels_is_the_same_as_ever(client: Client) -> None:
    """A field of a newer version is stored and compared only if it is not the default."""
    submit(client, "r1")
    stored = client.store.redis.hget(client.store.keys("run", "r1"), "request")
    assert "labels" not in stored
    assert "tenant" not in stored
    submit(client, "r1", labels={})
    assert ids(client) == ["r1"]
    end_all(client, "r1")


# --- what has expired ------------------------------------------------------------------------------------


def prune(hand: Hand, **asked: Any) -> int:
    removed, name, kept = 0, "", 0
    while True:
        look = hand.store.run(scripts.prune(limit=asked.get("limit", 2), name=name, kept=kept))
        removed, name, kept = removed + look.removed, look.name, look.kept
        if not look.looked:
            return removed


def test_what_has_expired_goes_out_of_the_lists(redis_url: str, client: Client) -> None:
    """Expired entries are removed from every list. Existing runs stay listed, however old they are."""
    ended = ("r1", "r2", "r3", "r4", "r5")
    with Hand(redis_url) as hand:
        for run_id in ended:
            hand.end(run_id, steps=0)
        hand.submit("live", "s2")
        assert prune(hand) == 0
    with Hand(redis_url, run_ttl_ms=300, session_ttl_ms=300) as hand:
        redis, keys = hand.store.redis, hand.store.keys
        for name in redis.zrange(keys("indexes"), 0, -1):
            redis.zadd(keys("indexes"), {name: 1})  # due, as after the TTL of their first entry
        for key in (*(keys("run", id_) for id_ in ended), keys("session", "s1")):
            redis.pexpire(key, 1)
        wait_for(lambda: not redis.exists(keys("run", "r5"), keys("session", "s1")), "they expire")
        assert ids(client, limit=10) == ["live"]
        assert [one.session_id for one in client.sessions()] == ["s2"]
        accepted_ms = int(redis.zscore(keys("index", "all"), "live"))
        next_ms(client, accepted_ms + 300)  # the live one is as old by now

        # five runs in the lists of all, of their agent and of their session, and the session itself
        assert prune(hand) == 16

        assert redis.zrange(keys("index", "all"), 0, -1) == ["live"]
        assert not redis.exists(keys("index", "session=s1"))
        assert "session=s1" not in redis.zrange(keys("indexes"), 0, -1)
        assert prune(hand) == 0
        assert ids(client) == ["live"]
    end_all(client, "live")
