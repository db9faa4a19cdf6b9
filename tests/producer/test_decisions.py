"""A producer decides about a call: through a client, a handle, and both for asyncio. Real Redis."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from openagents_worker import ApprovalNotPending, AsyncClient, Client, RequestInvalid, RunNotFound
from openagents_worker.errors import RequestTooLarge
from openagents_worker.settings import load_settings
from openagents_worker.store.scripts import ScriptCall
from tests.support.script_calls import call

PAY, REFUND = "pay:aa:1", "refund:bb:1"


@pytest.fixture
def client(redis_url: str) -> Generator[Client]:
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_PAYLOAD_BYTES": "2000"})
    with Client(settings=settings) as client:
        yield client
        client.store.run(call("cancel", force=True))
        client.store.run(call("retire"))


@pytest.fixture
def interrupted(client: Client) -> Client:
    """The run r1 was interrupted in two calls."""
    run(client, call("register"))
    run(client, call("submit"))
    fence = run(client, call("claim")).fence
    run(client, call("intent", fence=fence, call=PAY))
    run(client, call("intent", fence=fence, call=REFUND, batch_no=2))
    run(client, call("suspend", fence=fence, kind="handover", batch_no=3))
    return client


def run(client: Client, script: ScriptCall[Any]) -> Any:
    return client.store.run(script)


def test_a_decision_is_stored_with_who_made_it_and_when(interrupted: Client) -> None:
    decision = interrupted.resolve("r1", PAY, "skip", by="anna", result={"receipt": 17}, note="by phone")
    assert (decision.call_id, decision.action, decision.by) == (PAY, "skip", "anna")
    assert (decision.result, decision.note) == ({"receipt": 17}, "by phone")
    assert decision.at.tzinfo is not None
    facts = run(interrupted, call("claim")).facts
    assert '"receipt":17' in facts[f"resolution:{PAY}"]


def test_the_beginning_of_a_call_id_is_enough(interrupted: Client) -> None:
    assert interrupted.handle("r1").resolve("ref", "rerun", by="anna").call_id == REFUND


def test_a_beginning_of_several_calls_is_refused(interrupted: Client) -> None:
    with pytest.raises(RequestInvalid, match=f"2 calls: {PAY}, {REFUND}"):
        interrupted.resolve("r1", "", "rerun", by="anna")


def test_the_beginning_of_the_call_that_is_left_is_enough(interrupted: Client) -> None:
    """Others with the same beginning may be decided already: a run goes on when all of a turn are."""
    assert interrupted.resolve("r1", "p", "rerun", by="anna").call_id == PAY
    assert interrupted.resolve("r1", "", "rerun", by="anna").call_id == REFUND


def test_the_second_decision_gets_the_first_one(interrupted: Client) -> None:
    interrupted.resolve("r1", PAY, "skip", by="anna", result=1)
    with pytest.raises(ApprovalNotPending, match="anna has already decided: skip") as caught:
        interrupted.resolve("r1", "pay", "rerun", by="bert")
    assert caught.value.decision.by == "anna"
    assert (caught.value.call_id, caught.value.run_id) == (PAY, "r1")


def test_a_call_that_waits_for_nothing_cannot_be_decided(interrupted: Client) -> None:
    with pytest.raises(ApprovalNotPending, match="no call of the run with this id"):
        interrupted.resolve("r1", "look:cc:1", "rerun", by="anna")
    run(interrupted, call("cancel"))
    with pytest.raises(ApprovalNotPending, match="the run has ended") as caught:
        interrupted.resolve("r1", PAY, "rerun", by="anna")
    assert caught.value.decision is None
    with pytest.raises(RunNotFound):
        interrupted.resolve("r2", PAY, "rerun", by="anna")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"action": "again"}, "the actions are rerun, skip, fail"),
        ({"action": "rerun", "result": 1}, "only be given with skip"),
        ({"by": " "}, "by is empty"),
        ({"by": None}, "by must be text"),
        ({"by": "a" * 300}, "by has 300 characters"),
        ({"result": {"x": float("nan")}}, "result"),
        ({"result": "\ud800"}, "result"),
        ({"note": 7}, "note must be text"),
    ],
)
def test_a_decision_that_is_not_valid_is_refused(
    interrupted: Client, wrong: dict[str, Any], said: str
) -> None:
    arguments = {"action": "skip", "by": "anna", **wrong}
    with pytest.raises(RequestInvalid) as caught:
        interrupted.resolve("r1", PAY, **arguments)
    assert said in str(caught.value)


def test_a_result_is_not_larger_than_a_payload(interrupted: Client) -> None:
    with pytest.raises(RequestTooLarge):
        interrupted.resolve("r1", PAY, "skip", by="anna", result="x" * 2000)


async def test_the_client_and_the_handle_for_asyncio_decide_too(interrupted: Client, redis_url: str) -> None:
    async with AsyncClient(redis_url) as client:
        assert (await client.resolve("r1", PAY, "fail", by="anna")).action == "fail"
        assert (await client.handle("r1").resolve(REFUND, "rerun", by="anna")).action == "rerun"
