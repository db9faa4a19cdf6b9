"""Intents and decisions: the scripts, one test for each answer."""

from __future__ import annotations

import json
from collections.abc import Generator

import pytest

from openagents_worker.errors import RedisRefused
from openagents_worker.store.scripts import DecideAnswer, WriteAnswer
from tests.store.test_scripts import Bench

CALL = "pay:aa:1"
SKIP = '{"action":"skip"}'


@pytest.fixture
def bench(redis_url: str) -> Generator[Bench]:
    with Bench(redis_url) as bench:
        bench.do("submit")
        yield bench


def facts(bench: Bench) -> dict[str, str]:
    found: dict[str, str] = bench.redis.hgetall(bench.store.keys("facts", "r1"))
    return found


def begun(bench: Bench) -> str:
    """The fence under which the call was begun, by a worker that has given the run up since then."""
    fence: str = bench.do("claim").fence
    bench.do("intent", fence=fence)
    bench.do("suspend", fence=fence, kind="handover", batch_no=2)
    return fence


def test_an_intent_is_written_together_with_the_events_before_it(bench: Bench) -> None:
    fence = bench.do("claim").fence
    assert bench.do("intent", fence=fence).answer is WriteAnswer.OK
    assert facts(bench) == {f"intent:{CALL}": f'{{"call":"{CALL}"}}', f"fence:{CALL}": fence}
    assert bench.events("r1")[-1] == "tool.called"


def test_an_intent_whose_answer_was_lost_is_not_written_again(bench: Bench) -> None:
    fence = bench.do("claim").fence
    bench.do("intent", fence=fence)
    assert bench.do("intent", fence=fence).answer is WriteAnswer.SAME
    assert bench.events("r1").count("tool.called") == 1


def test_only_the_owner_writes_an_intent(bench: Bench) -> None:
    fence = begun(bench)
    before = facts(bench)
    assert bench.do("intent", fence=fence, batch_no=9).answer is WriteAnswer.FENCED
    assert facts(bench) == before


def test_a_decision_that_the_owner_does_not_know_is_its_answer(bench: Bench) -> None:
    """The events are written; the intent is not. The owner that follows the decision replaces it."""
    begun(bench)
    fence = bench.do("claim").fence
    bench.do("decide", value=SKIP)
    told = bench.do("intent", fence=fence, value="{}")
    assert (told.answer, told.decision) == (WriteAnswer.OK, SKIP)
    assert bench.do("intent", fence=fence, value="{}").decision == SKIP, "and again, if the answer was lost"
    assert facts(bench)[f"intent:{CALL}"] != "{}"
    assert bench.events("r1")[-1] == "tool.called"
    assert bench.do("intent", fence=fence, value="{}", knows_decision=True, batch_no=2).decision == ""
    assert facts(bench) == {f"intent:{CALL}": "{}", f"fence:{CALL}": fence}


def test_an_intent_may_replace_one_with_other_arguments(bench: Bench) -> None:
    begun(bench)
    fence = bench.do("claim").fence
    bench.do("intent", fence=fence, call="pay:bb:1", taken=[f"intent:{CALL}", f"fence:{CALL}"])
    assert sorted(facts(bench)) == ["fence:pay:bb:1", "intent:pay:bb:1"]


def test_the_first_decision_counts_and_is_kept(bench: Bench) -> None:
    begun(bench)
    assert bench.do("decide", value=SKIP).answer is DecideAnswer.OK
    second = bench.do("decide", value='{"action":"rerun"}')
    assert (second.answer, second.decision) == (DecideAnswer.ALREADY, SKIP)
    assert bench.events("r1").count("tool.outcome_resolved") == 1
    fence = bench.do("claim").fence
    bench.do("commit", fence=fence, taken=[f"{kind}:{CALL}" for kind in ("intent", "fence", "resolution")])
    third = bench.do("decide")
    assert (third.answer, third.decision) == (DecideAnswer.NOT_PENDING, SKIP)
    bench.do("cancel", force=True)
    last = bench.do("decide")
    assert (last.answer, last.decision) == (DecideAnswer.GONE, SKIP)


def test_a_run_that_has_given_up_its_questions_is_not_listed(bench: Bench) -> None:
    """As long as another call of it waits for an approval, it is. Records and events take questions."""
    fence = bench.do("claim").fence
    for number, call in enumerate((CALL, "pay:bb:1", "pay:cc:1"), start=1):
        bench.do("ask", fence=fence, call=call, batch_no=number)
    bench.do("decide", kind="approval", call="pay:cc:1")
    index = bench.store.keys("index", "approvals")

    bench.do("commit", fence=fence, batch_no=4, taken=[f"ask:{CALL}"])
    assert bench.redis.zrange(index, 0, -1) == ["r1"]
    bench.do("emit", fence=fence, batch_no=5, taken=["ask:pay:bb:1"])
    assert bench.redis.zrange(index, 0, -1) == []
    assert list(facts(bench)) == ["ask:pay:cc:1", "approval:pay:cc:1"]


def test_a_call_that_was_not_begun_cannot_be_decided(bench: Bench) -> None:
    assert bench.do("decide").answer is DecideAnswer.NOT_PENDING
    assert bench.do("decide", kind="approval").answer is DecideAnswer.NOT_PENDING
    assert bench.do("decide", run_id="r2").answer is DecideAnswer.UNKNOWN
    with pytest.raises(RedisRefused, match="kind"):
        bench.do("decide", kind="wish")


def test_a_call_that_is_being_made_is_not_decided(bench: Bench) -> None:
    fence = bench.do("claim").fence
    bench.do("intent", fence=fence)
    assert bench.do("decide").answer is DecideAnswer.NOT_PENDING
    bench.do("suspend", fence=fence, kind="handover", batch_no=2)
    assert bench.do("decide").answer is DecideAnswer.OK


def test_a_worker_that_gives_a_call_up_reports_it_before_the_run_has_changed_hands(bench: Bench) -> None:
    """Its lease is over for itself first. A report that came too early would be lost."""
    fence = bench.do("claim").fence
    bench.do("intent", fence=fence)
    assert bench.do("decide", fence=fence, value=SKIP).answer is DecideAnswer.OK
    assert facts(bench)[f"resolution:{CALL}"] == SKIP


def test_a_worker_reports_only_the_call_that_it_made(bench: Bench) -> None:
    """Once another worker has made the call again, the outcome of the first one is not that of the call."""
    first = begun(bench)
    second = bench.do("claim").fence
    bench.do("intent", fence=second, value="{}")
    bench.do("suspend", fence=second, kind="handover", batch_no=2)
    assert bench.do("decide", fence=first).answer is DecideAnswer.NOT_PENDING
    assert bench.do("decide", fence=second).answer is DecideAnswer.OK


def test_a_decision_is_read_by_the_next_attempt(bench: Bench) -> None:
    begun(bench)
    bench.do("decide", value=SKIP)
    assert json.loads(bench.do("claim").facts[f"resolution:{CALL}"]) == {"action": "skip"}
