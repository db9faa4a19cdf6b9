"""The scripts: one test for each answer that a script can give."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Generator
from contextlib import closing
from enum import StrEnum
from importlib import resources
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openagents_worker.errors import RedisRefused, RedisUnreachable
from openagents_worker.store.codec import PLAIN, PayloadCodec
from openagents_worker.store.keys import encode_id, spec_of
from openagents_worker.store.redis_errors import is_wrong_type
from openagents_worker.store.scripts import (
    UNKNOWN_CODE,
    CancelAnswer,
    ClaimAnswer,
    DecideAnswer,
    DeleteAnswer,
    ResumeAnswer,
    SubmitAnswer,
    Wake,
    WriteAnswer,
)
from openagents_worker.store.watch import watch
from tests.properties.lab import Lab, View
from tests.support.script_calls import PAGE_BYTES, call
from tests.support.waiting import PATIENCE_S

HOUR_MS = 3_600_000


class Bench:
    """A cell with the worker w1, and functions to inspect it."""

    def __init__(self, url: str, prefix: str = "oa", codec: PayloadCodec = PLAIN) -> None:
        self.lab = Lab(url, prefix=prefix, codec=codec)
        self.store = self.lab.store
        self.redis = self.lab.redis

    def __enter__(self) -> Bench:
        self.do("register")
        return self

    def __exit__(self, *_: object) -> None:
        """End all runs and workers, so that no key without a TTL is left."""
        for run_id in list(self.runs()):
            self.do("cancel", run_id=run_id, force=True)
        for incarnation in self.redis.zrange(self.store.keys("workers"), 0, -1):
            self.do("retire", incarnation=incarnation)
        self.lab.close()

    def do(self, script: str, **changed: Any) -> Any:
        return self.lab.run(call(script, **changed))

    def claimed(self, run_id: str = "r1", **submitted: Any) -> str:
        """Submit the run and let w1 claim it. Returns the fence."""
        self.do("submit", run_id=run_id, **submitted)
        return self.claim(run_id)

    def claim(self, run_id: str = "r1", incarnation: str = "w1") -> str:
        claimed = self.do("claim", run_id=run_id, incarnation=incarnation)
        assert claimed.answer == "CLAIMED"
        fence: str = claimed.fence
        return fence

    def runs(self) -> set[str]:
        found = (spec_of(key, self.store.cell.prefix) for key in self.redis.scan_iter("*"))
        keys = {known[1] for known in found if known and known[0].name == "run"}
        return {
            run_id for run_id in (*(f"r{number}" for number in range(10)), *WILD) if encode_id(run_id) in keys
        }

    def field(self, name: str, run_id: str = "r1") -> str | None:
        value: str | None = self.redis.hget(self.store.keys("run", run_id), name)
        return value

    def events(self, run_id: str = "r1") -> list[str]:
        entries = self.redis.xrange(self.store.keys("events", run_id))
        return [fields["name"] for _, fields in entries]

    def holder(self, session_id: str = "s1") -> str | None:
        value: str | None = self.redis.hget(self.store.keys("session", session_id), "holder")
        return value

    def score(self, name: str, member: str, *ids: str) -> float | None:
        value: float | None = self.redis.zscore(self.store.keys(name, *ids), member)
        return value

    def now_ms(self) -> int:
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000


WILD = ("{r}*?[1]:%", "r:1:events", "läuft 漢字", "../r")


@pytest.fixture
def bench(redis_url: str) -> Generator[Bench]:
    with Bench(redis_url) as bench:
        yield bench


def woken(wakes: tuple[Wake, ...]) -> list[str]:
    return [wake.run_id for wake in wakes]


# --- submit ----------------------------------------------------------------------------------------------


def test_a_run_in_an_idle_session_is_queued_and_its_message_must_be_sent(bench: Bench) -> None:
    """NEW: the run holds its session and is in `sent`, with the time of its message."""
    submitted = bench.do("submit")

    assert (submitted.answer, submitted.state, submitted.queue) == ("NEW", "queued", "q")
    assert bench.score("sent", "r1", "q") == submitted.sent_us
    assert bench.holder() == "r1"
    assert bench.events() == ["run.queued"]


def test_a_run_in_a_busy_session_waits_and_has_no_message(bench: Bench) -> None:
    """NEW: the second run of a session enters its queue."""
    bench.do("submit")

    submitted = bench.do("submit", run_id="r2")

    assert (submitted.answer, submitted.state, submitted.sent_us) == ("NEW", "waiting_session", None)
    assert bench.events("r2") == ["run.waiting_session"]


def test_a_delayed_run_does_not_enter_its_session_yet(bench: Bench) -> None:
    """NEW: a run with a delay is scheduled; the session stays free for others until it is due."""
    before_ms = bench.now_ms()

    submitted = bench.do("submit", delay_ms=HOUR_MS)

    assert (submitted.answer, submitted.state, submitted.sent_us) == ("NEW", "scheduled", None)
    due = bench.score("due", "r1")
    assert due is not None
    assert before_ms + HOUR_MS <= due <= bench.now_ms() + HOUR_MS
    assert bench.holder() is None
    assert bench.events() == ["run.scheduled"]


def test_the_same_request_again_is_the_same_run(bench: Bench) -> None:
    """SAME: with its state, its queue and the time of the message, which may have been lost."""
    first = bench.do("submit")

    again = bench.do("submit", uid="another")

    assert (again.answer, again.state, again.queue, again.sent_us) == ("SAME", "queued", "q", first.sent_us)
    assert bench.field("uid") == "u"
    assert bench.events() == ["run.queued"]


def test_another_request_under_the_same_id_is_refused(bench: Bench) -> None:
    """CONFLICT: the existing run is not changed."""
    bench.do("submit")

    assert bench.do("submit", digest="other", request='{"x":1}').answer == "CONFLICT"
    assert bench.field("request") == "{}"


def test_a_busy_session_can_be_refused(bench: Bench) -> None:
    """BUSY: with the run that holds the session; nothing is accepted."""
    bench.do("submit")

    refused = bench.do("submit", run_id="r2", reject_if_busy=True)

    assert (refused.answer, refused.holder) == ("BUSY", "r1")
    assert bench.runs() == {"r1"}


def test_an_agent_that_no_worker_knows_is_refused(bench: Bench) -> None:
    """UNKNOWN_AGENT: with the known agents. Before any worker has announced agents, every agent is
    accepted."""
    assert bench.do("submit", agent_id="anything").answer == "NEW"
    bench.do("register", agents=["b", '{"queue":null}', "c", '{"queue":"own"}'])

    refused = bench.do("submit", run_id="r2", agent_id="a")

    assert (refused.answer, refused.known_agents) == ("UNKNOWN_AGENT", ("b", "c"))
    assert bench.do("submit", run_id="r3", agent_id="b", session_id="s3").queue == "q"
    assert bench.do("submit", run_id="r4", agent_id="c", session_id="s4").queue == "own"
    assert bench.do("submit", run_id="r5", agent_id="c", session_id="s5", queue="mine").queue == "mine"


def test_submit_repairs_a_session_whose_holder_is_deleted(bench: Bench) -> None:
    """The run that has waited longest gets the session and must be woken."""
    bench.do("submit")
    bench.do("submit", run_id="r2")
    bench.redis.delete(bench.store.keys("run", "r1"), bench.store.keys("events", "r1"))
    bench.redis.zrem(bench.store.keys("sent", "q"), "r1")

    submitted = bench.do("submit", run_id="r3")

    [also] = submitted.also
    assert (submitted.state, also.run_id, bench.holder()) == ("waiting_session", "r2", "r2")


# --- leases ----------------------------------------------------------------------------------------------


def test_a_heartbeat_returns_owned_runs_and_cancel_requests(bench: Bench) -> None:
    """OK: the lease is extended; both sets are in the same answer."""
    bench.claimed("r1")
    bench.claimed("r2", session_id="s2")
    bench.do("cancel", run_id="r2")

    renewal = bench.do("renew", lease_ms=HOUR_MS)

    assert (renewal.lost, renewal.owned, renewal.notices) == (False, {"r1", "r2"}, {"r2"})
    deadline = bench.score("workers", "w1")
    assert deadline is not None
    assert deadline > bench.now_ms() + HOUR_MS / 2


def test_a_heartbeat_stores_the_parts_that_have_a_problem(bench: Bench) -> None:
    """With the time of Redis. They expire with the lease, and leave with the worker or the problem."""
    key = bench.store.keys("worker_parts", "w1")
    begin_ms = bench.now_ms()
    bench.do("renew", lease_ms=HOUR_MS, parts='[{"part":"outbox"}]')

    stored = json.loads(bench.store.redis.get(key) or "")
    assert stored["parts"] == [{"part": "outbox"}]
    assert begin_ms <= stored["at"] <= bench.now_ms()
    assert HOUR_MS / 2 < bench.store.redis.pttl(key) <= HOUR_MS

    bench.do("renew", lease_ms=HOUR_MS)
    assert not bench.store.redis.exists(key)
    bench.do("renew", lease_ms=HOUR_MS, parts="[]")
    bench.do("retire")
    assert not bench.store.redis.exists(key)


def test_the_end_of_a_lease_is_final(bench: Bench) -> None:
    """LOST: a heartbeat that is late, or of an unknown worker, does not create a lease."""
    bench.lab.end_lease("w1")

    assert bench.do("renew").lost
    assert bench.do("renew", incarnation="nobody").lost
    assert bench.score("workers", "w1") == 1
    assert bench.score("workers", "nobody") is None


def test_a_worker_without_runs_retires_and_leaves_no_keys(bench: Bench) -> None:
    """GONE: also if it is repeated."""
    assert bench.do("retire") == "GONE"
    assert bench.do("retire") == "GONE"
    assert bench.score("workers", "w1") is None


def test_a_worker_that_retires_with_runs_leaves_them_to_reclaim(bench: Bench) -> None:
    """OVER: its lease ends now; a late heartbeat does not renew it."""
    bench.claimed()

    assert bench.do("retire") == "OVER"
    assert bench.do("renew").lost
    assert woken(bench.do("reclaim").wakes) == ["r1"]


# --- claim -----------------------------------------------------------------------------------------------


def test_a_claim_returns_everything_that_an_attempt_needs(bench: Bench) -> None:
    """CLAIMED: a new fence, the request, and the journal; no more wake-up is needed."""
    bench.do("submit", request='{"input_text":"hi"}', uid="u7", canvas='{"link":1}')

    claimed = bench.do("claim", nonce="n1")

    assert (claimed.answer, claimed.fence, claimed.attempt) == ("CLAIMED", "1:n1", 1)
    assert (claimed.request, claimed.uid, claimed.canvas) == ('{"input_text":"hi"}', "u7", '{"link":1}')
    assert (claimed.journal_length, claimed.journal, claimed.facts) == (0, (), {})
    assert bench.score("sent", "r1", "q") is None
    assert bench.events() == ["run.queued", "run.attempt_started"]


def test_a_claim_whose_answer_was_lost_is_answered_again(bench: Bench) -> None:
    """CLAIMED: the same worker with the same nonce gets the same fence; this is not a second attempt."""
    bench.do("submit")
    first = bench.do("claim", nonce="n1")

    again = bench.do("claim", nonce="n1")

    assert (again.answer, again.fence, again.attempt) == ("CLAIMED", first.fence, 1)
    assert bench.events().count("run.attempt_started") == 1


@pytest.mark.parametrize("incarnation", ["w1", "w2"])
def test_a_claim_of_an_owned_run_is_busy(bench: Bench, incarnation: str) -> None:
    """BUSY: for other workers, for the owner with a duplicate message, and also after the lease of the owner
    is over."""
    bench.claimed()
    bench.do("register", incarnation="w2")

    assert bench.do("claim", incarnation=incarnation).answer == "BUSY"
    if incarnation == "w2":
        bench.lab.end_lease("w1")
        assert bench.do("claim", incarnation="w2").answer == "BUSY"


def test_an_unknown_run_cannot_be_claimed(bench: Bench) -> None:
    """UNKNOWN: the run never existed or has expired."""
    assert bench.do("claim").answer == "UNKNOWN"


def test_a_run_that_has_ended_is_not_claimed(bench: Bench) -> None:
    """DONE: with the state in which it ended."""
    bench.do("finish", fence=bench.claimed())

    claimed = bench.do("claim")

    assert (claimed.answer, claimed.state) == ("DONE", "completed")


def test_a_worker_without_a_lease_cannot_claim(bench: Bench) -> None:
    """NOT_ALIVE: for an incarnation that never registered and for one whose lease is over."""
    bench.do("submit")
    bench.lab.end_lease("w1")

    assert bench.do("claim", incarnation="nobody").answer == "NOT_ALIVE"
    assert bench.do("claim").answer == "NOT_ALIVE"
    assert bench.field("state") == "queued"


def test_a_run_waits_for_its_session(bench: Bench) -> None:
    """WAITING: a message of a run that does not hold the session changes nothing."""
    bench.do("submit")
    bench.do("submit", run_id="r2")

    assert bench.do("claim", run_id="r2").answer == "WAITING"
    assert bench.field("state", "r2") == "waiting_session"


@pytest.mark.parametrize("late", [False, True])
def test_a_message_does_not_start_a_run_before_it_is_due(bench: Bench, late: bool) -> None:
    """NOT_DUE: for a delayed run and for a retry. When the time has come, any message starts it."""
    bench.do("submit", delay_ms=HOUR_MS)
    bench.do("suspend", run_id="r2", fence=bench.claimed("r2", session_id="s2"), delay_ms=HOUR_MS)
    if late:
        bench.lab.let_pass(2 * HOUR_MS)
        bench.do("register")

    answers = [bench.do("claim", run_id=run_id).answer for run_id in ("r1", "r2")]

    assert answers == (["CLAIMED", "CLAIMED"] if late else ["NOT_DUE", "NOT_DUE"])
    assert bench.redis.zcard(bench.store.keys("due")) == (0 if late else 2)


def test_a_claim_ends_a_run_with_a_cancel_request(bench: Bench) -> None:
    """CANCELLED: its owner gave it back before it got the request; the next run of the session is woken."""
    fence = bench.claimed()
    bench.do("submit", run_id="r2")
    bench.do("cancel")
    bench.do("release", fence=fence)

    claimed = bench.do("claim")

    assert (claimed.answer, woken(claimed.wakes)) == ("CANCELLED", ["r2"])
    assert bench.events()[-2:] == ["run.cancelled", "session.run.completed"]


def test_a_worker_executes_suspects_of_one_group_at_a_time(bench: Bench) -> None:
    """SUSPECT_BUSY: the two halves of the runs of a dead worker are separated; one is due a second later."""
    bench.do("register", incarnation="w2")
    for run_id in ("r1", "r2"):
        bench.do("submit", run_id=run_id, session_id=run_id)
        bench.claim(run_id, "w2")
    bench.lab.end_lease("w2")
    bench.do("reclaim")
    fence = bench.claim("r1")

    assert bench.do("claim", run_id="r2").answer == "SUSPECT_BUSY"
    assert bench.field("state", "r2") == "retrying"
    assert bench.do("claim", run_id="r2").answer == "NOT_DUE"

    bench.do("commit", fence=fence)
    bench.lab.let_pass(2_000)
    assert woken(bench.do("wake")[0]) == ["r2"]
    assert bench.do("claim", run_id="r2").answer == "CLAIMED"


def test_claim_repairs_a_session_whose_holder_is_deleted(bench: Bench) -> None:
    """A run whose session has no holder becomes the holder."""
    bench.do("submit")
    bench.redis.hdel(bench.store.keys("session", "s1"), "holder")

    bench.claim()

    assert bench.holder() == "r1"


@pytest.fixture
def orphaned(bench: Bench) -> Bench:
    """r2 and r3 wait for r1, whose record is deleted."""
    for run_id in ("r1", "r2", "r3"):
        bench.do("submit", run_id=run_id)
    bench.lab.forget("r1")
    return bench


def test_a_session_whose_holder_has_no_record_goes_to_the_head_of_its_queue(orphaned: Bench) -> None:
    """Not to the run that is claimed first: the order is kept, and the head must be woken."""
    claimed = orphaned.do("claim", run_id="r3")

    assert (claimed.answer, woken(claimed.wakes), orphaned.holder()) == ("WAITING", ["r2"], "r2")
    assert orphaned.field("state", "r2") == "queued"
    orphaned.claim("r2")


def test_the_head_of_such_a_queue_gets_the_session_with_its_own_claim(orphaned: Bench) -> None:
    """Without another script."""
    orphaned.claim("r2")

    assert orphaned.holder() == "r2"
    assert orphaned.score("session_queue", "r2", "s1") is None


def test_an_end_in_such_a_session_wakes_its_head(orphaned: Bench) -> None:
    """Every script that handles the session repairs it."""
    assert woken(orphaned.do("cancel", run_id="r3").wakes) == ["r2"]
    assert orphaned.holder() == "r2"


def test_the_last_end_in_such_a_session_lets_it_expire(orphaned: Bench) -> None:
    """A holder without a record does not keep the session for ever."""
    orphaned.do("cancel", run_id="r2")
    orphaned.do("cancel", run_id="r3")

    assert orphaned.holder() is None
    assert orphaned.redis.pttl(orphaned.store.keys("session", "s1")) > 0


def test_a_holder_that_is_submitted_again_holds_its_session(orphaned: Bench) -> None:
    """It is still the holder although its record was lost; it does not wait for itself."""
    assert orphaned.do("submit", run_id="r1").state == "queued"
    assert orphaned.holder() == "r1"
    orphaned.claim("r1")


# --- the first page of a journal -------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 400), max_size=60), page_bytes=st.integers(1, 2000))
def test_the_first_page_is_limited_by_its_size(bench: Bench, sizes: list[int], page_bytes: int) -> None:
    """A claim returns the first records up to a size, and the number of all records."""
    bench.do("submit")
    key = bench.store.keys("journal", "r1")
    bench.redis.delete(key)
    records = [chr(ord("a") + number % 26) * size for number, size in enumerate(sizes)]
    if records:
        bench.redis.rpush(key, *records)

    claimed = bench.do("claim", page_bytes=page_bytes)

    count = len(claimed.journal)
    assert list(claimed.journal) == records[:count]
    assert claimed.journal_length == len(records)
    assert sum(sizes[:count]) <= page_bytes
    assert count == len(records) or sum(sizes[: count + 1]) >= page_bytes
    bench.do("release", fence=claimed.fence)


def test_a_large_journal_is_not_returned_in_one_reply(bench: Bench) -> None:
    """Of 2,000 records of 5 KB, a claim returns what fits into 256 KB. A larger record is read later."""
    bench.do("submit")
    bench.do("submit", run_id="r2", session_id="s2")
    bench.redis.rpush(bench.store.keys("journal", "r1"), *["x" * 5_000] * 2_000)
    bench.redis.rpush(bench.store.keys("journal", "r2"), "x" * 1_000_000, "y")

    many, large = bench.do("claim"), bench.do("claim", run_id="r2")

    assert (many.journal_length, len(many.journal)) == (2_000, PAGE_BYTES // 5_000)
    assert (large.journal_length, large.journal) == (2, ())


def test_the_rest_of_a_journal_is_read_in_pages(bench: Bench) -> None:
    """Each page has the records that fit, at least one. Together they are the journal."""
    bench.do("submit")
    records = [f"{n}:" + "x" * (40_000 if n % 7 == 3 else 900) for n in range(100)] + ["y" * 300_000]
    bench.redis.rpush(bench.store.keys("journal", "r1"), *records)
    found: list[str] = []
    while len(found) < len(records):
        page = bench.do("page", position=len(found), page_bytes=100_000)
        assert len(page) == 1 or sum(map(len, page)) <= 100_000
        found += page

    assert found == records
    assert bench.do("page", position=len(records)) == ()


# --- writes of the owner of a run ------------------------------------------------------------------------


def test_a_run_that_is_given_back_is_queued_again(bench: Bench) -> None:
    """OK: with a new fence, without an owner, with a wake-up to send."""
    fence = bench.claimed()

    released = bench.do("release", fence=fence)

    assert (released.answer, woken(released.wakes)) == ("OK", ["r1"])
    assert (bench.field("state"), bench.field("owner"), bench.field("fence")) == ("queued", "", "2:")
    assert bench.do("release", fence=fence).answer == "FENCED"


def test_a_run_that_is_given_back_without_a_new_record_counts_as_recovered(bench: Bench) -> None:
    """After too many of these recoveries it is poisoned."""
    bench.do("submit")
    for count in (1, 2, 3):
        released = bench.do("release", fence=bench.claim(), kind="lost", max_recoveries=2)
        assert (bench.field("stuck"), bench.field("recoveries")) == (str(count), str(count))

    assert (released.answer, released.wakes) == ("OK", ())
    assert bench.field("state") == "failed"
    assert '"run.poisoned"' in str(bench.field("result"))
    assert bench.events()[-3:] == ["run.poisoned", "run.failed", "session.run.completed"]


def test_a_run_that_is_given_back_with_a_new_record_does_not_count(bench: Bench) -> None:
    """A record was committed since the claim."""
    fence = bench.claimed()
    bench.do("commit", fence=fence)

    bench.do("release", fence=fence, kind="lost")

    assert (bench.field("stuck"), bench.field("recoveries") or "0") == ("0", "0")
    assert bench.events()[-1] == "run.recovered"


def test_a_hand_over_never_counts_as_a_recovery(bench: Bench) -> None:
    """However often it happens; each has its event."""
    bench.do("submit")
    for _ in range(3):
        bench.do("release", fence=bench.claim(), kind="handover", max_recoveries=1)

    assert bench.events().count("run.handed_over") == 3
    assert (bench.field("state"), bench.field("stuck") or "0") == ("queued", "0")


def test_a_run_that_is_not_durable_ends_when_its_worker_loses_it(bench: Bench) -> None:
    """It must not be executed a second time."""
    bench.do("release", fence=bench.claimed(durable=False), kind="lost")

    assert '"worker.lost"' in str(bench.field("result"))


@pytest.mark.parametrize("script", ["release", "suspend"])
def test_an_unknown_kind_is_refused(bench: Bench, script: str) -> None:
    """And nothing is written: no kind is treated as another one."""
    fence = bench.claimed()
    before = bench.lab.read()

    with pytest.raises(RedisRefused, match="has no kind"):
        bench.do(script, fence=fence, kind="otherwise")

    assert without_ttl(bench.lab.read()) == without_ttl(before)


def test_only_a_queued_run_is_executed(bench: Bench) -> None:
    """PARKED: a run in another state is not executed, whatever message arrives."""
    bench.do("submit")
    for state in ("awaiting_approval", "waiting_child", "paused", "a state to come"):
        bench.redis.hset(bench.store.keys("run", "r1"), "state", state)

        claimed = bench.do("claim")

        assert (claimed.answer, claimed.state) == ("PARKED", state)
        assert bench.field("state") == state


def test_a_session_whose_holder_is_deleted_goes_to_the_head_of_its_queue(bench: Bench) -> None:
    """Not to the run that is claimed first."""
    for run_id in ("r1", "r2", "r3"):
        bench.do("submit", run_id=run_id)
    bench.lab.forget("r1")

    asked = bench.do("claim", run_id="r3")

    assert (asked.answer, woken(asked.wakes)) == ("WAITING", ["r2"])
    assert bench.holder() == "r2"
    assert bench.do("claim", run_id="r2").answer == "CLAIMED"


@pytest.mark.parametrize(("first_ms", "given"), [(5_000, 0), (2_000, 2_000)])
def test_a_run_is_left_to_others_for_increasing_but_limited_times(
    bench: Bench, first_ms: int, given: int
) -> None:
    """OVERDUE: nothing is written, and its owner must end it. A record starts the count again."""
    bench.do("submit")
    left = {"kind": "left_to_others", "left_max_ms": HOUR_MS, "delay_ms": given}
    delays = []
    for _ in range(6):
        delays.append(bench.do("suspend", fence=bench.claim(), **left).delay_ms)
        bench.redis.hset(bench.store.keys("run", "r1"), "due", 0)
    assert delays == sorted(delays)
    assert first_ms <= delays[0] <= first_ms * 1.25
    assert delays[-1] == 60_000

    bench.redis.hset(bench.store.keys("run", "r1"), "left_since", 1)
    fence = bench.claim()
    assert bench.do("suspend", fence=fence, **left).answer is WriteAnswer.OVERDUE
    assert bench.field("state") == "running"

    bench.do("commit", fence=fence)
    assert bench.do("suspend", fence=fence, **left).delay_ms <= first_ms * 1.25
    assert bench.events().count("run.left_to_others") == 2


OPTIONS = {"NX", "XX", "PX", "LIMIT", "WITHSCORES", "MAXLEN", "REV"}


@pytest.mark.parametrize(
    ("answers", "files"),
    [
        (SubmitAnswer, ["submit"]),
        (ClaimAnswer, ["claim"]),
        (WriteAnswer, ["ask", "emit", "intent", "commit", "suspend", "finish", "release"]),
        (CancelAnswer, ["cancel"]),
        (DecideAnswer, ["decide"]),
        (ResumeAnswer, ["resume"]),
        (DeleteAnswer, ["delete_session"]),
    ],
)
def test_python_knows_exactly_the_answers_of_each_script(answers: type[StrEnum], files: list[str]) -> None:
    """An unknown answer would fail in a worker; an answer that no script gives would never arrive."""
    lua = resources.files("openagents_worker.store").joinpath("lua")
    found: set[str] = set()
    for name in files:
        code = re.sub(r"--.*", "", lua.joinpath(f"{name}.lua").read_text())
        code = re.sub(r"redis\.p?call\('[A-Z]+'", "", code)
        found |= set(re.findall(r"'([A-Z][A-Z_]+)'", code)) - OPTIONS

    assert found == {answer.value for answer in answers}


def test_only_the_owner_gives_a_run_back(bench: Bench) -> None:
    """FENCED: another worker, or another fence."""
    fence = bench.claimed()

    assert bench.do("release", fence=fence, incarnation="w2").answer == "FENCED"
    assert bench.do("release", fence="1:other").answer == "FENCED"
    assert bench.do("release", run_id="r9", fence=fence).answer == "FENCED"
    assert bench.field("state") == "running"


def test_a_batch_of_events_is_stored_once(bench: Bench) -> None:
    """OK, then SAME: the answer was lost and the batch is sent again."""
    fence = bench.claimed()

    assert bench.do("emit", fence=fence, batch_no=3) is WriteAnswer.OK
    assert bench.do("emit", fence=fence, batch_no=3) is WriteAnswer.SAME
    assert bench.events().count("llm.called") == 1


def test_a_piece_of_a_reply_is_published_but_not_stored(bench: Bench) -> None:
    """OK: watchers get it; it has no number, and the stream does not grow."""
    fence = bench.claimed()
    before = bench.events()
    with bench.redis.pubsub(ignore_subscribe_messages=True) as ear:
        ear.subscribe(bench.store.keys.channel("a", "s1", "r1"))
        ear.get_message(timeout=PATIENCE_S)

        piece = ["llm.delta", '{"call":"0.1","offset":0,"text":"4"}']
        assert bench.do("emit", fence=fence, events=piece) is WriteAnswer.OK

        heard = json.loads(ear.get_message(timeout=PATIENCE_S)["data"])
    assert (heard["name"], heard["seq"], heard["payload"]["text"]) == ("llm.delta", None, "4")
    assert bench.events() == before


def test_a_streaming_reply_is_kept_for_new_watchers_until_its_event(bench: Bench) -> None:
    """Consecutive pieces are joined; other pieces are not; the event of the reply deletes the text."""
    fence = bench.claimed()
    key = bench.store.keys("reply", "r1")

    for number, (offset, text) in enumerate(((0, "vie"), (3, "r über"), (99, "lost"), (9, " 20")), 1):
        payload = json.dumps({"call": "0.1", "offset": offset, "text": text})
        bench.do("emit", fence=fence, batch_no=number, events=["llm.delta", payload])

    assert bench.redis.hget(key, "text") == "vier über 20"
    assert 0 < bench.redis.pttl(key) <= 60_000
    bench.do("emit", fence=fence, batch_no=5, events=["llm.succeeded", '{"model":"m","call":"0.1"}'])
    assert bench.redis.exists(key) == 0


def test_a_piece_is_kept_only_if_its_reply_goes_on(bench: Bench) -> None:
    """A reply that ends in the same batch is not kept; another try of it, after its end, is."""
    fence = bench.claimed()
    key = bench.store.keys("reply", "r1")
    first, again = (["llm.delta", json.dumps({"call": "0.1", "offset": 0, "text": text})] for text in "ab")
    other = ["llm.delta", '{"call":"0.2","offset":0,"text":"c"}']
    end = ["llm.failed", '{"model":"m","call":"0.1"}']

    bench.do("emit", fence=fence, batch_no=1, events=[*first, *end, *again])
    assert bench.redis.hget(key, "text") == "b"

    bench.do("emit", fence=fence, batch_no=2, events=[*other, *first, *end])
    assert bench.redis.hmget(key, "call", "text") == ["0.2", "c"]


def test_a_piece_of_a_long_reply_is_added_without_reading_what_is_kept(bench: Bench) -> None:
    """The text is kept in parts, so that the last piece costs as much as the first: at most 64 KB."""
    fence = bench.claimed()
    pieces = ["ü" * 700] * 60
    for number, text in enumerate(pieces):
        payload = json.dumps({"call": "0.1", "offset": number * 700, "text": text})
        bench.do("emit", fence=fence, batch_no=number + 1, events=["llm.delta", payload])

    kept = bench.redis.hgetall(bench.store.keys("reply", "r1"))
    parts = [kept[name] for name in ("text", *(f"text{n}" for n in range(1, int(kept["parts"]) + 1)))]
    assert max(len(part.encode()) for part in parts) < 8_192 + len("".join(pieces[:1]).encode())
    assert "".join(parts) == "".join(pieces[:46])
    assert int(kept["chars"]) == 46 * 700
    with closing(watch(bench.store, "r1")) as events:
        (delta,) = [next(events) for _ in range(3)][2:]
    assert delta.payload["text"] == "".join(pieces[:46])


@pytest.mark.parametrize("field", ["attempt", "call", "chars", "text", "at", "parts", "bytes"])
@pytest.mark.parametrize("value", [None, "", "x", "2030-01-01"])
def test_a_damaged_reply_does_not_hide_the_events(bench: Bench, field: str, value: str | None) -> None:
    """Its text so far may be missing; the event of the whole reply has all of it."""
    fence = bench.claimed()
    for number, text in enumerate(("four", " score")):
        payload = json.dumps({"call": "0.1", "offset": 4 * number, "text": text})
        bench.do("emit", fence=fence, batch_no=number + 1, events=["llm.delta", payload])
    key = bench.store.keys("reply", "r1")
    if value is None:
        bench.redis.hdel(key, field)
    else:
        bench.redis.hset(key, field, value)

    bench.do("emit", fence=fence, batch_no=3, events=["llm.delta", '{"call":"0.1","offset":10,"text":"!"}'])
    with closing(watch(bench.store, "r1")) as events:
        names = [next(events).name for _ in range(2)]
        bench.do("emit", fence=fence, batch_no=4, events=["note", "{}"])
        names.append(next(event.name for event in events if event.name != "llm.delta"))

    assert names[-1] == "note"


@pytest.mark.parametrize("has_old_parts", [False, True])
def test_a_reply_that_the_previous_version_keeps_is_read_as_it_wrote_it(
    bench: Bench, has_old_parts: bool
) -> None:
    """It has one text, and leaves the parts of an earlier reply, of another attempt, as they are."""
    bench.claimed()
    key = bench.store.keys("reply", "r1")
    if has_old_parts:
        bench.redis.hset(key, mapping={"bytes": "9", "parts": "1", "text1": "stale"})
    fields = {"attempt": "1", "call": "0.1", "chars": "5", "text": "hello", "at": "2030-01-01T00:00:00.000Z"}
    bench.redis.hset(key, mapping=fields)
    bench.redis.pexpire(key, 60_000)

    with closing(watch(bench.store, "r1")) as events:
        (delta,) = [next(events) for _ in range(3)][2:]

    assert delta.payload["text"] == "hello"


def test_a_commit_stores_a_record_its_usage_and_its_events(bench: Bench) -> None:
    """OK: the checkpoint. The same commit again is OK and stores nothing twice."""
    fence = bench.claimed()

    for _ in range(2):
        assert bench.do("commit", fence=fence, records=["one"]) is WriteAnswer.OK
    for _ in range(2):
        assert bench.do("commit", fence=fence, position=1, records=["two"], usage="{}") is WriteAnswer.OK
    assert bench.do("commit", fence=fence, records=["one"]) is WriteAnswer.OK

    assert bench.redis.lrange(bench.store.keys("journal", "r1"), 0, -1) == ["one", "two"]
    assert (bench.field("steps"), bench.field("usage")) == ("1", "{}")
    assert bench.events().count("run.checkpoint_saved") == 2


def test_a_start_is_stored_with_the_first_call(bench: Bench) -> None:
    """Records that are stored together are stored once; a different one is another record."""
    fence = bench.claimed()
    both = ["start", "call"]

    for _ in range(2):
        assert bench.do("commit", fence=fence, records=both) is WriteAnswer.OK
    for other in (["start", "other"], ["other", "call"], [*both, "more"]):
        assert bench.do("commit", fence=fence, records=other) is WriteAnswer.MISPLACED

    assert bench.redis.lrange(bench.store.keys("journal", "r1"), 0, -1) == both
    assert bench.field("steps") == "1"


@pytest.mark.parametrize("position", [0, 2])
def test_a_record_has_one_position(bench: Bench, position: int) -> None:
    """MISPLACED: the journal has another record at this position, or there is a gap before it."""
    fence = bench.claimed()
    bench.do("commit", fence=fence, records=["one"])

    assert bench.do("commit", fence=fence, records=["other"], position=position) is WriteAnswer.MISPLACED
    assert bench.redis.lrange(bench.store.keys("journal", "r1"), 0, -1) == ["one"]


def test_a_commit_of_a_run_with_a_cancel_request_is_stored_and_stops_it(bench: Bench) -> None:
    """CANCEL: the call has happened, so its outcome is kept; repeated, the answer is the same."""
    fence = bench.claimed()
    bench.do("cancel")

    assert bench.do("commit", fence=fence) is WriteAnswer.CANCEL
    assert bench.do("commit", fence=fence) is WriteAnswer.CANCEL
    assert bench.redis.llen(bench.store.keys("journal", "r1")) == 1


def test_a_retry_is_suspended_until_it_is_due(bench: Bench) -> None:
    """OK: no owner, no slot; the run keeps its session, and the tries of the call are counted."""
    fence = bench.claimed()

    suspended = bench.do("suspend", fence=fence, delay_ms=HOUR_MS)

    assert (suspended.answer, suspended.wakes) == ("OK", ())
    assert (bench.field("state"), bench.field("owner"), bench.field("retries")) == ("retrying", "", "1")
    assert bench.field("last_error") == "llm.rate_limit"
    assert bench.redis.hgetall(bench.store.keys("facts", "r1")) == {"tries:0.1": "1"}
    assert bench.holder() == "r1"
    assert bench.events()[-1] == "run.retry_scheduled"
    assert bench.do("commit", fence=fence) is WriteAnswer.FENCED


def test_a_handed_over_run_is_woken_immediately(bench: Bench) -> None:
    """OK: the worker stops and another one continues the run; this is not a retry."""
    suspended = bench.do("suspend", fence=bench.claimed(), kind="handover", delay_ms=0)

    assert (suspended.answer, woken(suspended.wakes)) == ("OK", ["r1"])
    assert (bench.field("state"), bench.field("retries")) == ("queued", "0")
    assert bench.events()[-1] == "run.handed_over"


@pytest.mark.parametrize("kind", ["retry", "handover"])
def test_a_run_with_a_cancel_request_is_not_suspended(bench: Bench, kind: str) -> None:
    """CANCEL: the owner ends it instead."""
    fence = bench.claimed()
    bench.do("cancel")

    assert bench.do("suspend", fence=fence, kind=kind).answer == "CANCEL"
    assert bench.field("state") == "running"


def test_finish_writes_the_run_and_its_session_atomically(bench: Bench) -> None:
    """OK: result, transcript, artifacts, state, both last events; the session goes to the next run."""
    fence = bench.claimed()
    bench.do("submit", run_id="r2")
    bench.redis.hset(bench.store.keys("session_state", "s1"), mapping={"old": "1", "kept": "2"})

    finished = bench.do(
        "finish", fence=fence, artifacts=['{"name":"a"}'], state=["new", "3"], state_removed=["old"]
    )

    assert (finished.answer, woken(finished.wakes)) == ("OK", ["r2"])
    assert (bench.field("state"), bench.field("result")) == ("completed", '{"run_id":"r1"}')
    keys = bench.store.keys
    assert bench.redis.lrange(keys("transcript", "s1"), 0, -1) == ['{"role":"user"}', '{"role":"assistant"}']
    assert bench.redis.lrange(keys("artifacts", "s1"), 0, -1) == ['{"name":"a"}']
    assert bench.redis.hgetall(keys("session_state", "s1")) == {"kept": "2", "new": "3"}
    assert bench.events()[-2:] == ["run.completed", "session.run.completed"]
    assert (bench.holder(), bench.field("state", "r2")) == ("r2", "queued")


def test_a_finish_whose_answer_was_lost_is_answered_again(bench: Bench) -> None:
    """OK: nothing is written twice. The rescue loop resends a wake-up that was lost with the answer."""
    fence = bench.claimed()
    bench.do("finish", fence=fence)
    before = bench.lab.read()

    again = bench.do("finish", fence=fence)

    assert (again.answer, again.wakes) == ("OK", ())
    assert without_ttl(bench.lab.read()) == without_ttl(before)


WRITES = ("ask", "emit", "intent", "commit", "suspend", "finish")


@pytest.mark.parametrize("script", WRITES)
@pytest.mark.parametrize("loss", ["another fence", "reclaimed", "cancelled by force", "no holder", "unknown"])
def test_a_former_owner_writes_nothing(bench: Bench, script: str, loss: str) -> None:
    """FENCED: however the run was lost and whatever is written, not one byte changes."""
    fence = bench.claimed()
    match loss:
        case "another fence":
            bench.do("release", fence=fence)
            bench.claim()
        case "reclaimed":
            bench.lab.end_lease("w1")
            bench.do("reclaim")
        case "cancelled by force":
            bench.do("cancel", force=True)
        case "no holder":
            bench.redis.hset(bench.store.keys("session", "s1"), "holder", "r2")
        case _:
            bench.do("release", fence=fence)
            bench.do("cancel")
            bench.lab.forget("r1")
    before = bench.lab.read()

    got = bench.do(script, fence=fence)

    assert (got if isinstance(got, WriteAnswer) else got.answer) is WriteAnswer.FENCED
    assert without_ttl(bench.lab.read()) == without_ttl(before)
    if loss == "no holder":
        bench.redis.hset(bench.store.keys("session", "s1"), "holder", "r1")


def without_ttl(view: View) -> dict[str, tuple[str, Any]]:
    return {key: (entry.kind, entry.value) for key, entry in view.items()}


# --- cancel ----------------------------------------------------------------------------------------------


def test_a_run_without_an_owner_is_cancelled_immediately(bench: Bench) -> None:
    """CANCELLED: queued, waiting, scheduled or retrying; the next run of the session is woken."""
    bench.do("submit")
    bench.do("submit", run_id="r2")
    bench.do("submit", run_id="r3", delay_ms=HOUR_MS)
    bench.do("suspend", run_id="r4", fence=bench.claimed("r4", session_id="s4"))

    answers = {run_id: bench.do("cancel", run_id=run_id) for run_id in ("r3", "r4", "r1", "r2")}

    assert {cancelled.answer for cancelled in answers.values()} == {"CANCELLED"}
    assert [woken(cancelled.wakes) for cancelled in answers.values()] == [[], [], ["r2"], []]
    result = json.loads(bench.field("result") or "")
    assert (result["stop_reason"], result["error_details"]["code"]) == ("cancelled", "run.cancelled")


def test_a_cancel_request_is_sent_to_the_owner_of_a_run(bench: Bench) -> None:
    """REQUESTED: on its channel immediately, and with its next heartbeat. Two requests are one event."""
    bench.claimed()
    with bench.redis.pubsub(ignore_subscribe_messages=True) as ear:
        ear.subscribe(bench.store.keys.notices("w1"))
        ear.get_message(timeout=PATIENCE_S)

        assert [bench.do("cancel").answer for _ in range(2)] == ["REQUESTED", "REQUESTED"]

        assert ear.get_message(timeout=PATIENCE_S)["data"] == "r1"
    assert bench.do("renew").notices == {"r1"}
    assert bench.events().count("run.cancel_requested") == 1


def test_force_ends_a_run_that_has_an_owner(bench: Bench) -> None:
    """CANCELLED: its worker is fenced, and learns it with its next write."""
    fence = bench.claimed()

    assert bench.do("cancel", force=True).answer == "CANCELLED"
    assert bench.do("commit", fence=fence) is WriteAnswer.FENCED
    assert bench.do("renew").owned == frozenset()


def test_a_run_that_has_ended_cannot_be_cancelled(bench: Bench) -> None:
    """ALREADY: with the state in which it ended. UNKNOWN: there is no such run."""
    bench.do("finish", fence=bench.claimed())

    cancelled = bench.do("cancel")

    assert (cancelled.answer, cancelled.state) == ("ALREADY", "completed")
    assert bench.do("cancel", run_id="r9").answer == "UNKNOWN"


# --- rescue ----------------------------------------------------------------------------------------------


def test_the_runs_of_a_dead_worker_are_queued_again(bench: Bench) -> None:
    """Reclaim counts the recovery, changes the fence, returns the incarnation, and deletes its keys."""
    bench.claimed()
    bench.lab.end_lease("w1")

    reclaimed = bench.do("reclaim")

    assert (reclaimed.incarnation, woken(reclaimed.wakes), reclaimed.left) == ("w1", ["r1"], 0)
    assert (bench.field("state"), bench.field("recoveries"), bench.field("fence")) == ("queued", "1", "2:")
    assert bench.events()[-1] == "run.recovered"
    assert bench.score("workers", "w1") is None


def test_nothing_is_reclaimed_while_all_leases_are_valid(bench: Bench) -> None:
    """Reclaim returns '' if no lease is over."""
    bench.claimed()

    reclaimed = bench.do("reclaim")

    assert (reclaimed.wakes, reclaimed.incarnation) == ((), "")
    assert bench.field("state") == "running"


def test_a_dead_worker_is_kept_until_its_last_run_is_reclaimed(bench: Bench) -> None:
    """A limited reclaim returns how many runs are left; the next call takes them."""
    for number in range(3):
        bench.claimed(f"r{number + 1}", session_id=f"s{number}")
    bench.lab.end_lease("w1")

    left = [bench.do("reclaim", limit=2).left for _ in range(2)]

    assert left == [1, 0]
    assert bench.score("workers", "w1") is None
    assert {bench.field("state", run_id) for run_id in ("r1", "r2", "r3")} == {"queued"}


@pytest.mark.parametrize("what", ["cancelled", "not durable", "poison"])
def test_reclaim_ends_runs_that_must_not_continue(bench: Bench, what: str) -> None:
    """A run with a cancel request is cancelled; one that is not durable, or that kills every worker,
    fails."""
    bench.claimed(durable=what != "not durable")
    bench.do("submit", run_id="r2")
    if what == "cancelled":
        bench.do("cancel")
    bench.lab.end_lease("w1")

    reclaimed = bench.do("reclaim", max_recoveries=0 if what == "poison" else 5)

    code = {"cancelled": "run.cancelled", "not durable": "worker.lost", "poison": "run.poisoned"}[what]
    assert json.loads(bench.field("result") or "")["error_details"]["code"] == code
    assert bench.field("state") == ("cancelled" if what == "cancelled" else "failed")
    assert woken(reclaimed.wakes) == ["r2"]


def test_only_due_runs_are_woken(bench: Bench) -> None:
    """Retries are queued again; delayed runs enter their sessions in the order in which they became due."""
    bench.do("submit", run_id="r1", delay_ms=2 * HOUR_MS)
    bench.do("submit", run_id="r2", delay_ms=HOUR_MS)
    bench.do("submit", run_id="r3", delay_ms=9 * HOUR_MS)
    bench.do("suspend", run_id="r4", fence=bench.claimed("r4", session_id="s4"), delay_ms=HOUR_MS)
    assert bench.do("wake") == ((), 0, ())

    bench.lab.let_pass(3 * HOUR_MS)
    wakes, seen, _ = bench.do("wake")

    assert (set(woken(wakes)), seen) == ({"r2", "r4"}, 3)
    assert (bench.holder(), bench.field("state", "r1")) == ("r2", "waiting_session")
    assert bench.field("state", "r3") == "scheduled"


def test_wake_examines_at_most_its_limit(bench: Bench) -> None:
    """The next call finds the rest."""
    for number in range(3):
        bench.do("submit", run_id=f"r{number + 1}", session_id=f"s{number}", delay_ms=HOUR_MS)
    bench.lab.let_pass(2 * HOUR_MS)

    assert [bench.do("wake", limit=2)[1] for _ in range(2)] == [2, 1]


def test_a_lost_message_is_sent_again_once(bench: Bench) -> None:
    """Resend takes messages that are older than the grace, and sets a new send time."""
    sent_us = bench.do("submit").sent_us
    assert bench.do("resend", grace_ms=HOUR_MS) == ()
    bench.lab.let_pass(2 * HOUR_MS)

    wakes = bench.do("resend", grace_ms=HOUR_MS)

    assert woken(wakes) == ["r1"]
    assert wakes[0].sent_us > sent_us
    assert bench.do("resend", grace_ms=HOUR_MS) == ()


def test_a_message_that_may_still_be_in_the_queue_is_not_sent_again(bench: Bench) -> None:
    """The oldest message of the queue was sent before this one, so this one may still be in the queue."""
    sent_us = bench.do("submit").sent_us

    assert bench.do("resend", oldest_us=sent_us) == ()
    assert woken(bench.do("resend", oldest_us=sent_us + 1)) == ["r1"]


def test_resend_removes_entries_of_runs_that_are_not_queued(bench: Bench) -> None:
    """The run has moved to another state."""
    bench.claimed()
    bench.redis.zadd(bench.store.keys("sent", "q"), {"r1": 1, "r9": 1})

    assert bench.do("resend") == ()
    assert bench.redis.exists(bench.store.keys("sent", "q")) == 0


# --- a queue that cannot be inspected --------------------------------------------------------------------


def sent_at(bench: Bench, ticks: int, submitted: dict[int, str]) -> dict[str, list[int]]:
    """The half seconds in which each run is sent again, with a grace of one second.

    `runs` maps runs to their first tick.
    """
    seen: defaultdict[str, list[int]] = defaultdict(list)
    for tick in range(ticks):
        wakes, _ = bench.do("resend_unread", grace_ms=1_000, max_grace_ms=4_000)
        for wake in wakes:
            seen[wake.run_id].append(tick)
        if tick in submitted:
            bench.do("submit", run_id=submitted[tick], session_id=submitted[tick])
        bench.lab.let_pass(500)
    return seen


def test_in_an_unreadable_queue_each_run_has_its_own_grace(bench: Bench) -> None:
    """It doubles with each resend of this run, up to a limit; a newer run starts with the first grace."""
    seen = sent_at(bench, 40, {0: "r1", 17: "r2"})

    assert seen == {"r1": [2, 6, 14, 22, 30, 38], "r2": [19, 23, 31, 39]}


def test_a_new_wake_up_starts_with_the_first_grace(bench: Bench) -> None:
    """The run was claimed and queued again: only its newest wake-up counts."""
    assert sent_at(bench, 7, {0: "r1"}) == {"r1": [2, 6]}
    bench.do("suspend", fence=bench.claim(), delay_ms=0)
    bench.do("wake")

    assert sent_at(bench, 7, {}) == {"r1": [2, 6]}


def test_in_an_unreadable_queue_no_run_is_examined_twice(bench: Bench) -> None:
    """However long the queue is: each run is examined once after the first grace, and once when it is
    sent."""
    for number in range(25):
        bench.do("submit", run_id=f"r{number}", session_id=f"s{number}")
    bench.lab.let_pass(1_500)
    passes = [bench.do("resend_unread", grace_ms=1_000, limit=10) for _ in range(4)]
    sent = sorted(run_id for wakes, _ in passes for run_id in woken(wakes))

    assert sent == sorted(f"r{number}" for number in range(25))
    assert [looked for _, looked in passes] == [10, 10, 5, 0]
    bench.lab.let_pass(1_500)
    assert [bench.do("resend_unread", grace_ms=1_000) for _ in range(2)] == [((), 25), ((), 0)]


def test_runs_with_the_same_send_time_are_all_examined(bench: Bench) -> None:
    """Whatever the limit is, none of them is skipped."""
    for number in range(5):
        bench.do("submit", run_id=f"r{number}", session_id=f"s{number}")
    sent = bench.store.keys("sent", "q")
    bench.redis.zadd(sent, dict.fromkeys(bench.redis.zrange(sent, 0, -1), bench.score("sent", "r0", "q")))
    bench.lab.let_pass(1_500)

    passes = [bench.do("resend_unread", grace_ms=1_000, limit=2)[0] for _ in range(3)]

    assert sorted(run_id for wakes in passes for run_id in woken(wakes)) == [f"r{n}" for n in range(5)]


def test_a_clock_that_goes_back_does_not_hide_a_run(bench: Bench) -> None:
    """Runs that were examined up to a time in the future are examined again."""
    bench.do("submit")
    bench.lab.let_pass(1_500)
    seconds, _ = bench.redis.time()
    bench.redis.set(bench.store.keys("resend_seen", "q"), (seconds + 60) * 10**6, px=HOUR_MS)

    assert woken(bench.do("resend_unread", grace_ms=1_000)[0]) == ["r1"]


def test_a_claimed_run_is_not_resent_from_an_unreadable_queue(bench: Bench) -> None:
    """It was claimed between the first check and the time at which its message counts as lost."""
    assert sent_at(bench, 4, {0: "r1"}) == {"r1": [2]}
    bench.claim()

    assert sent_at(bench, 20, {}) == {}


def test_an_invalid_message_creates_a_failed_run(bench: Bench) -> None:
    """NEW, once; an existing run with this id is not changed."""
    assert bench.do("reject", run_id="r2", message='"quoted"\n', hint="look") is True
    assert bench.do("reject", run_id="r2", message="other") is False
    bench.do("submit")
    assert bench.do("reject") is False

    result = json.loads(bench.field("result", "r2") or "")
    assert (result["error_details"]["message"], result["error_details"]["hint"]) == ('"quoted"\n', "look")
    assert bench.events("r2") == ["run.queued", "run.failed", "session.run.completed"]
    assert bench.field("state") == "queued"


def test_every_run_is_created_by_one_function(bench: Bench) -> None:
    """No other Lua code writes the first fields of a record, so all records begin with the same ones."""
    lua = resources.files("openagents_worker.store").joinpath("lua")
    files = [file for folder in (lua, lua / "lib") for file in folder.iterdir() if file.name.endswith(".lua")]
    births = [file.name for file in files if "'fence', '0:'" in file.read_text("utf-8")]
    bench.do("submit", expires_ms=HOUR_MS, lists=["label=a"])
    bench.do("reject", run_id="r2")
    accepted, rejected = (set(bench.redis.hgetall(bench.store.keys("run", id_))) for id_ in ("r1", "r2"))

    assert births == ["new_run.lua"]
    assert accepted - rejected == {"parent", "tell", "expires", "lists", "input_digest"}
    assert rejected - accepted == {"result", "ended", "end_code"}


# --- notification of Celery, expiry, resume --------------------------------------------------------------


def test_an_end_is_resent_until_celery_was_notified(bench: Bench) -> None:
    """DONE has the result until the notification is confirmed; resend sends it in increasing intervals."""
    bench.do("finish", fence=bench.claimed(tell=True))
    assert bench.do("claim").unnotified_result == '{"run_id":"r1"}'
    seen = []
    for _ in range(3):
        bench.lab.let_pass(2_000)
        seen.append(woken(bench.do("resend", grace_ms=1_000)))

    assert seen == [["r1"], ["r1"], []]
    assert bench.do("confirm_completion", runs=["r1", "2"]) == (False,)
    assert bench.do("confirm_completion", runs=["nobody", "1", "r1", "1"]) == (False, True)
    assert bench.do("claim").unnotified_result == ""
    assert bench.score("sent", "r1", "q") is None


def test_an_end_without_a_worker_has_its_own_notification_message(bench: Bench) -> None:
    """A run that is cancelled while it waits is sent once more, to notify Celery."""
    bench.do("submit", tell=True)
    bench.do("submit", run_id="r2")

    assert woken(bench.do("cancel").wakes) == ["r1", "r2"]


@pytest.mark.parametrize("where", ["queued", "waiting", "scheduled"])
def test_a_run_that_was_not_started_in_time_is_cancelled(bench: Bench, where: str) -> None:
    """Expired: the rescue loop ends it when its time is over, in whatever state it waits."""
    if where == "waiting":
        bench.do("submit", run_id="r2")
    bench.do("submit", expires_ms=HOUR_MS, delay_ms=2 * HOUR_MS if where == "scheduled" else 0)
    assert bench.do("wake")[1] == 0

    bench.lab.let_pass(HOUR_MS)
    bench.do("wake")

    assert bench.field("state") == "cancelled"
    assert bench.events()[-2:] == ["run.cancelled", "session.run.completed"]


def test_a_claim_of_an_expired_run_cancels_it(bench: Bench) -> None:
    """CANCELLED: before the rescue loop has noticed. A run that was started in time does not expire."""
    bench.do("submit", expires_ms=HOUR_MS)
    fence = bench.claimed("r2", session_id="s2", expires_ms=HOUR_MS)
    bench.lab.let_pass(2 * HOUR_MS)
    bench.do("register")

    assert bench.do("claim").answer == "CANCELLED"
    assert bench.do("release", run_id="r2", fence=fence).answer == "OK"
    assert bench.do("claim", run_id="r2").answer == "CLAIMED"


def failed(bench: Bench, **submitted: Any) -> str:
    """r1 with one record, and failed. Returns the fence that ended it."""
    fence = bench.claimed(**submitted)
    bench.do("suspend", fence=fence)
    bench.lab.let_pass(2 * 60_000)
    bench.do("register")
    fence = bench.claim()
    bench.do("commit", fence=fence)
    bench.do("finish", fence=fence, end_state="failed", event="run.failed")
    return fence


def test_a_failed_run_is_resumed_at_the_end_of_its_session_queue(bench: Bench) -> None:
    """OK: from its last checkpoint, with a new fence. Its tries and its cancel request are deleted."""
    old = failed(bench)
    bench.do("submit", run_id="r2")

    resumed = bench.do("resume")

    assert (resumed.answer, resumed.state, resumed.sent_us) == ("OK", "waiting_session", None)
    assert (bench.field("life"), bench.field("retries"), bench.field("result")) == ("2", "0", None)
    assert bench.redis.hgetall(bench.store.keys("facts", "r1")) == {}
    assert bench.redis.ttl(bench.store.keys("journal", "r1")) == -1
    assert bench.do("finish", fence=old).answer == "FENCED"
    bench.do("cancel", run_id="r2")
    assert bench.do("claim").life == 2


@pytest.mark.parametrize(
    ("changed", "answer", "detail"),
    [
        ({"run_id": "r9"}, "UNKNOWN", ""),
        ({"agent_id": "b"}, "OTHER_AGENT", "a"),
        ({"session_id": "s9"}, "OTHER_SESSION", "s1"),
        ({"input_text": "other"}, "OTHER_INPUT", ""),
        ({"checkpoint_id": "r1:step:7"}, "OTHER_CHECKPOINT", "r1:step:0"),
    ],
)
@pytest.mark.defect("D06")
def test_resume_must_match_the_run(bench: Bench, changed: Any, answer: str, detail: str) -> None:
    """OTHER_…: with the real value of the run; nothing is changed."""
    failed(bench, request='{"input_text":"hi"}')
    before = without_ttl(bench.lab.read())

    resumed = bench.do("resume", **changed)

    assert (resumed.answer, resumed.detail) == (answer, detail)
    assert without_ttl(bench.lab.read()) == before


def test_only_failed_and_cancelled_runs_are_resumed(bench: Bench) -> None:
    """LIVE if it has not ended, COMPLETED if it was successful."""
    fence = bench.claimed()
    assert bench.do("resume").answer == "LIVE"
    bench.do("commit", fence=fence)
    assert (bench.do("resume").answer, bench.do("resume").state) == ("LIVE", "running")
    bench.do("finish", fence=fence)
    assert bench.do("resume").answer == "COMPLETED"


@pytest.mark.parametrize("durable", [True, False])
def test_a_run_that_ended_before_its_first_attempt_is_resumed_from_its_start(
    bench: Bench, durable: bool
) -> None:
    """Cancelled while it waited, or expired: nothing of it was executed."""
    bench.do("submit", durable=durable, expires_ms=HOUR_MS)
    bench.lab.let_pass(2 * HOUR_MS)
    bench.do("register")
    assert bench.do("claim").answer == "CANCELLED"

    resumed = bench.do("resume")
    claimed = bench.do("claim")

    assert (resumed.answer, resumed.state) == ("OK", "queued")
    assert (claimed.answer, claimed.life, claimed.attempt) == ("CLAIMED", 2, 1)
    assert (bench.events().count("run.resumed"), bench.field("expires")) == (1, None)


def test_a_run_with_unrecorded_effects_is_not_started_again(bench: Bench) -> None:
    """NO_CHECKPOINT: not durable and executed; its records are deleted; it has no request."""
    fence = bench.claimed(durable=False)
    bench.do("finish", fence=fence, end_state="failed", event="run.failed")
    assert bench.do("resume").answer == "NO_CHECKPOINT"

    fence = bench.claimed("r2", session_id="s2")
    bench.do("commit", run_id="r2", fence=fence)
    bench.do("commit", run_id="r2", fence=fence, position=1, batch_no=2)
    bench.do("finish", run_id="r2", fence=fence, batch_no=3, end_state="failed", event="run.failed")
    bench.redis.delete(bench.store.keys("journal", "r2"))
    assert bench.do("resume", run_id="r2", session_id="s2").answer == "NO_CHECKPOINT"

    bench.do("reject", run_id="r3")
    assert bench.do("resume", run_id="r3", agent_id="-", session_id="-").answer == "NO_CHECKPOINT"


# --- a full Redis ----------------------------------------------------------------------------------------


def everything(bench: Bench) -> dict[str, str]:
    """A cell in which every script has something to do. Returns the fences by run."""
    fences = {"r1": bench.claimed("r1")}
    bench.do("submit", run_id="r2")
    bench.do("suspend", run_id="r3", fence=bench.claimed("r3", session_id="s3"), delay_ms=HOUR_MS)
    bench.do("submit", run_id="r4", session_id="s4", delay_ms=HOUR_MS)
    bench.do("submit", run_id="r6", session_id="s6")
    bench.do("register", incarnation="w2")
    bench.do("submit", run_id="r5", session_id="s5")
    bench.claim("r5", "w2")
    fence = bench.claimed("r7", session_id="s7", tell=True)
    bench.do("commit", run_id="r7", fence=fence)
    bench.do("finish", run_id="r7", fence=fence, end_state="failed", event="run.failed")
    bench.do("submit", run_id="r8", session_id="s6", expires_ms=1)
    bench.lab.let_pass(2 * HOUR_MS)
    bench.do("register", lease_ms=5 * HOUR_MS)  # the lease of the other worker is over
    return fences


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "submit": ("submit", {"run_id": "new"}),
    "submit delayed": ("submit", {"run_id": "new", "delay_ms": HOUR_MS}),
    "reject": ("reject", {"run_id": "new"}),
    "register": ("register", {"incarnation": "w3", "agents": ["a", "{}"]}),
    "register again": ("register", {"incarnation": "w3", "previous": "w2"}),
    "accuse": ("accuse", {}),
    "renew": ("renew", {"lease_ms": 9 * HOUR_MS}),
    "retire": ("retire", {}),
    "claim": ("claim", {"run_id": "r6"}),
    "claim a retry": ("claim", {"run_id": "r3"}),
    "claim a delayed run": ("claim", {"run_id": "r4"}),
    "ask": ("ask", {}),
    "emit": ("emit", {}),
    "intent": ("intent", {}),
    "commit": ("commit", {}),
    "suspend": ("suspend", {}),
    "hand over": ("suspend", {"kind": "handover"}),
    "finish": ("finish", {"artifacts": ["{}"], "state": ["x", "1"], "events": ["tool.called", "{}"]}),
    "release": ("release", {}),
    "cancel": ("cancel", {}),
    "cancel at once": ("cancel", {"run_id": "r6"}),
    "cancel by force": ("cancel", {"force": True}),
    "reclaim": ("reclaim", {}),
    "reclaim several": ("reclaim", {"heartbeat_ms": HOUR_MS}),
    "reclaim poison": ("reclaim", {"max_recoveries": 0}),
    "wake": ("wake", {}),
    "resend": ("resend", {"grace_ms": 1000}),
    "resend unread": ("resend_unread", {"grace_ms": 1000}),
    "wake an expired run": ("wake", {"limit": 1}),
    "resume": ("resume", {"run_id": "r7", "session_id": "s7"}),
    "confirm_completion": ("confirm_completion", {"runs": ["r7", "1"]}),
}
FENCED = ("ask", "emit", "intent", "commit", "suspend", "finish", "release")


@pytest.mark.parametrize("name", CALLS)
def test_a_full_redis_executes_a_script_completely_or_not_at_all(bench: Bench, name: str) -> None:
    """A script that is refused because the memory is full has changed nothing, and may be repeated."""
    fences = everything(bench)
    script, changed = CALLS[name]
    one = call(script, **({"fence": fences["r1"]} if script in FENCED else {}), **changed)
    saved, before = bench.lab.snapshot(), shape(bench)
    bench.lab.run(one)
    after = shape(bench)
    bench.lab.restore(saved)

    bench.redis.config_set("maxmemory", 1)
    try:
        bench.lab.run(one)
        refused = False
    except RedisUnreachable:
        refused = True
    finally:
        bench.redis.config_set("maxmemory", 0)

    assert after != before, "the call has nothing to do, so it shows nothing"
    assert shape(bench) == (before if refused else after)
    if refused:
        bench.lab.run(one)
        assert shape(bench) == after


def test_a_full_redis_accepts_heartbeats(bench: Bench) -> None:
    """Workers keep their runs, and repeat refused writes until there is memory again."""
    bench.claimed()
    bench.redis.config_set("maxmemory", 1)
    try:
        renewal = bench.do("renew", lease_ms=HOUR_MS)
    finally:
        bench.redis.config_set("maxmemory", 0)

    assert (renewal.lost, renewal.owned) == (False, {"r1"})
    assert (bench.score("workers", "w1") or 0) > bench.now_ms() + HOUR_MS / 2


def shape(bench: Bench) -> dict[str, Any]:
    """The contents of a cell. Times in sorted sets are hours from now, other times are left out."""
    now_ms = bench.now_ms()
    times = re.compile(r"\d{13,16}|\d{4}-\d\d-\d\dT[\d:.]+Z|\"age_ms\":\d+")

    def timeless(value: Any) -> Any:
        match value:
            case dict():
                return {name: timeless(item) for name, item in value.items() if name != "active_ms"}
            case list() | tuple():
                return [timeless(item) for item in value]
            case str():
                return times.sub("<time>", value)
            case float() if value > 1e12:
                return round(((value / 1000 if value > 1e15 else value) - now_ms) / HOUR_MS)
        return value

    return {
        key: (entry.kind, entry.ttl_ms > 0, timeless(entry.value)) for key, entry in bench.lab.read().items()
    }


# --- keys of a cell --------------------------------------------------------------------------------------


def test_every_key_of_every_script_is_in_the_cell(redis_url: str) -> None:
    """All keys and channels that scripts use begin with the prefix: on a cluster, this is one slot."""
    prefix = "cell:{c1}"
    with Bench(redis_url, prefix) as bench, bench.redis.monitor() as monitor:
        fences = everything(bench)
        saved = bench.lab.snapshot()
        for script, changed in CALLS.values():
            fence = {"fence": fences["r1"]} if script in FENCED else {}
            bench.do(script, **fence, **changed)
            bench.lab.restore(saved)
        bench.redis.echo("the end")
        seen = [seen["command"] for seen in until_the_end(monitor) if seen["client_type"] == "lua"]
        assert all(key.startswith(prefix) for key in bench.redis.keys("*"))

    named = [word for command in seen for word in keys_of(command)]
    assert len(seen) > 500
    assert [word for word in named if not word.startswith(f"{prefix}:")] == []


def until_the_end(monitor: Any) -> Generator[dict[str, Any]]:
    for seen in monitor.listen():
        if seen["command"] == "ECHO the end":
            return
        yield seen


def keys_of(command: str) -> list[str]:
    """The keys or the channel of a command. Ids are encoded in them, so they contain no space."""
    name, *words = command.split()
    if name.upper() == "TIME":
        return []
    return words if name.upper() == "DEL" else words[:1]


@pytest.mark.parametrize("run_id", WILD)
def test_an_id_may_have_any_character(bench: Bench, run_id: str) -> None:
    """Ids of runs, sessions, agents, queues and workers are returned unchanged, and keys are not confused."""
    wild = {"run_id": run_id, "session_id": f"s{run_id}", "agent_id": f"a{run_id}", "queue": f"q{run_id}"}
    worker = f"w{run_id}"
    bench.do("register", incarnation=worker, agents=[f"a{run_id}", "{}"])
    bench.do("submit", **wild, delay_ms=HOUR_MS)
    bench.lab.let_pass(2 * HOUR_MS)
    bench.do("register", incarnation=worker)

    [wake] = bench.do("wake").wakes
    assert (wake.run_id, wake.session_id, wake.agent_id, wake.queue) == tuple(wild.values())
    fence = bench.claim(run_id, worker)
    assert bench.do("renew", incarnation=worker).owned == {run_id}
    assert bench.do("commit", run_id=run_id, fence=fence) is WriteAnswer.OK
    [event] = itertools.islice(watch(bench.store, run_id), 1)
    assert (event.run_id, event.session_id, event.agent_id) == tuple(wild.values())[:3]
    assert bench.do("finish", run_id=run_id, fence=fence).answer == "OK"

    assert all(spec_of(key, "oa") for key in bench.redis.keys("*"))


# --- the states of many runs -----------------------------------------------------------------------------


def test_the_states_of_many_runs_are_compared_at_once(bench: Bench) -> None:
    """A run that does not exist is in no state. A record of another type is reported, so that it is seen."""
    bench.do("submit")
    bench.do("submit", run_id="r2", session_id="s1")
    bench.redis.set("oa:run:broken", "text")
    ids = ["r2", "nobody", "r1", "broken"]

    assert bench.do("in_states", ids=ids, states=["queued"]).ids == ("r1", "broken")
    assert bench.do("in_states", ids=ids, states=["queued", "waiting_session"]).ids == ("r2", "r1", "broken")
    assert bench.do("in_states", ids=ids, states=[]).ids == ("broken",)
    bench.redis.delete("oa:run:broken")


def test_the_error_codes_of_many_runs_are_read_at_once(bench: Bench) -> None:
    """Of ended runs, of those that are retried, and of those that no worker ended."""
    failed = {"end_state": "failed", "event": "run.failed", "stop_reason": "failed"}
    bench.do("finish", fence=bench.claimed("r1", session_id="s1"), code="tool.error", **failed)
    fence = bench.claimed("r2", session_id="s2")
    bench.do("suspend", run_id="r2", fence=fence, kind="retry", error_code="llm.rate_limit")
    bench.do("submit", run_id="r3", session_id="s3")
    bench.do("cancel", run_id="r3")
    asked = {"ids": ["r1", "r2", "r3"], "states": ["failed", "retrying", "cancelled"], "with_codes": True}

    assert bench.do("in_states", **asked).codes == ("tool.error", "llm.rate_limit", "run.cancelled")


def test_the_error_code_of_another_life_is_not_the_code_of_a_run(bench: Bench) -> None:
    """The previous version ends runs without it. Their records have to be read."""
    failed = {"end_state": "failed", "event": "run.failed", "stop_reason": "failed"}
    bench.do("finish", fence=bench.claimed(), code="tool.error", **failed)
    bench.do("resume")
    bench.do("finish", fence=bench.claim(), **failed)

    found = bench.do("in_states", ids=["r1"], states=["failed"], with_codes=True)

    assert (found.ids, found.codes) == (("r1",), (UNKNOWN_CODE,))


def test_the_rows_of_a_list_are_read_at_once(bench: Bench) -> None:
    """A row for each id, with the answers that commands get, also for a key that is missing or wrong."""
    bench.do("submit", run_id="r1", session_id="s1")
    bench.do("submit", run_id="r2", session_id="s1")
    bench.redis.set("oa:sess:s1:artifacts", "text")

    (exists, at_ms, holder, waiting, messages, wrong), nobody = bench.do("read_rows", ids=["s1", "nobody"])
    states = bench.do("read_rows", kind="run", ids=["r1", "nobody"], words=["state", "nothing"])

    assert (exists, holder, waiting, messages) == (1, "r1", 1, 0)
    assert float(at_ms) > 0
    assert is_wrong_type(wrong)
    assert nobody == (0, None, None, 0, 0, 0)
    assert [list(fields) for (fields,) in states] == [["queued", None], [None, None]]
    bench.redis.delete("oa:sess:s1:artifacts")
