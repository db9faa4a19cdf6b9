"""Facts: what is decided about a run outside of its journal."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from openagents_worker.errors import RecordUnreadable
from openagents_worker.models import WaitKind
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.facts import FACTS, Fact, FactKind, Facts, facts_in_lua
from openagents_worker.store.formats import PARKS
from openagents_worker.store.parking import Park, Wait
from openagents_worker.store.states import PARKED_STATES, STATES, parked_state
from tests.store.test_codec import Reversing
from tests.store.test_scripts import Bench
from tests.support.script_calls import call


@pytest.fixture
def bench(redis_url: str) -> Generator[Bench]:
    with Bench(redis_url) as bench:
        yield bench


def store(bench: Bench, *facts: Fact) -> None:
    for fact in facts:
        bench.redis.hset(bench.store.keys("facts", "r1"), fact.name, fact.text)


def claimed_facts(bench: Bench) -> Facts:
    return Facts(bench.do("claim", run_id="r1", incarnation="w1", nonce="n").facts)


def test_each_kind_says_what_its_facts_hold() -> None:
    assert set(FACTS) == set(FactKind)


def test_facts_are_found_by_kind_and_id_and_numbered_ones_are_in_order() -> None:
    facts = [Fact.of(FactKind.SIGNAL, f"paid:{n}", n) for n in (10, 2, 1)]
    found = Facts({fact.name: fact.text for fact in [*facts, Fact.of(FactKind.SIGNAL, "sent:1", 0)]})
    assert [fact.value() for fact in found.of(FactKind.SIGNAL, "paid:")] == [1, 2, 10]
    assert found.get(FactKind.SIGNAL, "paid:2") == facts[1]
    assert found.get(FactKind.APPROVAL, "paid:2") is None


def test_a_kind_of_a_newer_version_and_a_broken_count_are_ignored() -> None:
    """A run whose execution needs a newer kind has a newer format, so this worker does not claim it."""
    found = Facts({"omen:x": "1", "tries:a": "2", "tries:b": "two", "tries:c": "9" * 30, "tries": "1"})
    assert found.counts(FactKind.TRIES) == {"a": 2}
    assert len(found) == 3


def test_a_fact_that_is_not_json_is_an_unreadable_record() -> None:
    with pytest.raises(RecordUnreadable):
        Fact(FactKind.APPROVAL, "pay:1", "{").value(run_id="r1")


def test_lua_uses_the_names_of_this_table() -> None:
    assert facts_in_lua("if ENDS_WITH_LIFE[x] then return FACT.intent end") == (
        "local ENDS_WITH_LIFE = {tries = true, resolution = true, ask = true, called = true}\n"
        "if ENDS_WITH_LIFE[x] then return 'intent:' end"
    )
    with pytest.raises(ValueError, match="omen"):
        facts_in_lua("FACT.omen")


def test_a_record_takes_the_facts_that_it_replaces_in_the_same_commit(bench: Bench) -> None:
    """Also when the commit is repeated because its reply was lost. Other facts stay."""
    fence = bench.claimed()
    taken, kept = Fact.of(FactKind.SIGNAL, "paid:1", 7), Fact.of(FactKind.SIGNAL, "paid:2", 8)
    store(bench, taken, kept)
    commit = call("commit", fence=fence, records=['{"call":"receive:1"}'], taken=[taken.name])

    assert [bench.lab.run(commit) for _ in range(2)] == ["OK", "OK"]

    assert bench.redis.hgetall(bench.store.keys("facts", "r1")) == {kept.name: kept.text}


def test_a_commit_that_is_refused_takes_no_fact(bench: Bench) -> None:
    bench.claimed()
    fact = Fact.of(FactKind.APPROVAL, "pay:1", {"action": "allow"})
    store(bench, fact)
    assert bench.do("commit", fence="0:", taken=[fact.name]) == "FENCED"
    assert bench.redis.hgetall(bench.store.keys("facts", "r1")) == {fact.name: fact.text}


def test_a_new_life_keeps_decisions_and_counts_retries_from_0(bench: Bench) -> None:
    fence = bench.claimed()
    bench.do("commit", fence=fence)
    bench.do("suspend", fence=fence, call="pay:1")
    decision = Fact.of(FactKind.APPROVAL, "pay:1", {"action": "allow"})
    store(bench, decision)
    assert bench.redis.hget(bench.store.keys("facts", "r1"), "tries:pay:1") == "1"
    bench.do("cancel")

    bench.do("resume")

    found = claimed_facts(bench)
    assert found.get(FactKind.APPROVAL, "pay:1") == decision
    assert found.counts(FactKind.TRIES) == {}


def test_a_fact_is_written_ahead_with_a_batch_of_events_once(bench: Bench) -> None:
    """Also when the write is repeated because its reply was lost; the record takes it later."""
    fence = bench.claimed()
    first, second = (Fact.of(FactKind.RESPONSE, "model:1", {"response_id": f"resp_{n}"}) for n in (1, 2))
    write = call("emit", fence=fence, batch_no=1, events=[], facts=[first.name, first.text])
    repeated = call("emit", fence=fence, batch_no=1, events=[], facts=[second.name, second.text])

    assert [bench.lab.run(each) for each in (write, repeated)] == ["OK", "SAME"]

    assert bench.redis.hgetall(bench.store.keys("facts", "r1")) == {first.name: first.text}
    assert claimed_facts_of(bench, FactKind.RESPONSE) == [{"response_id": "resp_1"}]


def test_a_worker_that_lost_the_run_writes_no_fact(bench: Bench) -> None:
    bench.claimed()
    fact = Fact.of(FactKind.RESPONSE, "model:1", {"response_id": "resp_1"})

    assert bench.do("emit", fence="0:", batch_no=1, facts=[fact.name, fact.text]) == "FENCED"

    assert bench.redis.hgetall(bench.store.keys("facts", "r1")) == {}


def claimed_facts_of(bench: Bench, kind: FactKind) -> list[object]:
    """The facts of a kind that the next attempt gets."""
    fields = bench.redis.hgetall(bench.store.keys("facts", "r1"))
    return [fact.value() for fact in Facts(fields).of(kind)]


# --- facts from outside ----------------------------------------------------------------------------------


def parked(bench: Bench, *waits: Wait, seen: int = 0) -> None:
    """A run that waits for these."""
    park = Park(waits, seen)
    fence = bench.claimed()
    suspended = bench.do(
        "suspend",
        fence=fence,
        kind="park",
        park_state=park.state,
        waits=park.waits_text,
        waiting_payload=park.event_payload,
        due_ms=park.due_ms,
        facts_seen=park.facts_seen,
        format=PARKS,
    )
    assert suspended.answer == "OK"


def test_a_run_has_a_limited_number_of_facts(bench: Bench) -> None:
    """And of bytes, of each kind. A decision is always stored."""
    bench.do("submit")
    store(bench, *(Fact.of(FactKind.WAIT, f"sleep:{n}", "x" * 100) for n in range(5)))
    for number in range(3):
        assert bench.do("fact", value=str(number), max_facts=3).answer == "OK"
    assert bench.do("fact", max_facts=3).answer == "FULL"
    assert bench.do("fact", max_bytes=10, value='"0123456"').answer == "FULL"
    assert bench.do("fact", max_bytes=10, value='"01234"').answer == "OK"
    assert bench.do("fact", name="approval:pay:1", max_facts=1, max_bytes=1).answer == "OK"


def test_the_first_decision_is_returned_with_the_codec_of_the_cell(redis_url: str) -> None:
    """Values are payloads: they are stored as the cell encodes them."""
    with Bench(redis_url, codec=PayloadCodec(Reversing())) as bench:
        bench.do("submit")
        assert bench.do("fact", name="approval:pay:1", value='{"by":"ann"}').answer == "OK"
        second = bench.do("fact", name="approval:pay:1", value='{"by":"bob"}')
        assert (second.answer, second.value) == ("ALREADY", '{"by":"ann"}')
        stored = bench.redis.hget(bench.store.keys("facts", "r1"), "approval:pay:1")
        assert "ann" not in stored
        assert bench.do("claim").facts == {"approval:pay:1": '{"by":"ann"}'}


@pytest.mark.parametrize(
    ("fact", "wakes"),
    [
        ("signal:paid:", ["r1"]),
        ("signal:paid:again:", []),  # another name, which begins in the same way
        ("signal:pai:", []),
        ("approval:paid:", []),
        ("signal:x:y:", ["r1"]),
        ("signal:x:", []),
    ],
)
def test_a_parked_run_is_woken_by_the_facts_that_it_waits_for(
    bench: Bench, fact: str, wakes: list[str]
) -> None:
    parked(
        bench,
        Wait(WaitKind.SIGNAL, "paid", "paid:1", fact="signal:paid:"),
        Wait(WaitKind.SIGNAL, "x:y", "x:1", fact="signal:x:y:"),
    )
    assert [wake.run_id for wake in bench.do("fact", name=fact).wakes] == wakes


def test_the_event_says_which_wait_has_ended(bench: Bench) -> None:
    parked(bench, Wait(WaitKind.SIGNAL, "paid", "paid:1", until_ms=1, fact="signal:paid:"))
    assert bench.events()[-1] == "run.waiting"
    [wake] = bench.do("wake").wakes
    assert wake.run_id == "r1"
    [_, fields] = bench.redis.xrevrange(bench.store.keys("events", "r1"), count=1)[0]
    assert (fields["name"], fields["payload"]) == (
        "run.woken",
        '{"kind":"signal","name":"paid","call_id":"paid:1"}',
    )


def test_a_run_that_is_executed_is_told_of_a_fact(bench: Bench) -> None:
    bench.claimed()
    bench.do("fact")
    assert bench.do("renew").notices == {' {"kind":"fact","number":1,"run":"r1"}'}


def test_the_states_of_parked_runs_are_those_of_their_waits() -> None:
    """What a person must decide comes first."""
    assert {kind: parked_state([kind]) for kind in WaitKind} == PARKED_STATES
    assert parked_state([WaitKind.TIMER, WaitKind.APPROVAL]) == "awaiting_approval"
    assert parked_state([WaitKind.APPROVAL, WaitKind.OUTCOME]) == "paused"
    assert all(STATES[state].is_parked for state in PARKED_STATES.values())


def test_facts_that_are_too_large_for_the_answer_of_a_claim_are_left_out(bench: Bench) -> None:
    """The results of many children may be. The worker reads them in pages."""
    store_large = Fact.of(FactKind.CHILD, "helper:aa:1", "x" * 1000)
    bench.do("submit")
    store(bench, store_large)
    claimed = bench.do("claim", nonce="n", page_bytes=2000)
    assert Facts(claimed.facts).get(FactKind.CHILD, "helper:aa:1") == store_large
    assert bench.do("claim", nonce="n", page_bytes=999).facts is None


def test_facts_change_by_name() -> None:
    """Those that are not stored any more are gone, and new ones are there."""
    one, two = Fact.of(FactKind.CHILD, "a", 1), Fact.of(FactKind.CHILD, "b", 2)
    facts = Facts({one.name: one.text}).changed(frozenset({two.name}), {two.name: two.text})
    assert list(facts.of(FactKind.CHILD)) == [two]
