"""`show`, `runs` and `watch`: the history of a run, why it waits, and the escaping of control characters."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openagents_worker.errors import LLMRateLimitError, LLMResponseError
from openagents_worker.models import WaitKind
from openagents_worker.producer.client import Client
from openagents_worker.store.parking import Wait
from tests.cli.conftest import Command, register, retire
from tests.support.scripts import Hand

CALL = "calc:0123456789abcd:1"
NASTY = "\x1b]52;c;eA==\x07\x9b2J\u202eevil\rgone"


def calls_a_tool(hand: Hand, run_id: str, call: str = CALL, *, answers: bool = True) -> None:
    hand.emit(
        run_id, "tool.called", payload=json.dumps({"tool_id": "calc", "params": {"a": 1}, "call_id": call})
    )
    if answers:
        payload = {"tool_id": "calc", "result": {"sum": 391}, "call_id": call}
        hand.emit(run_id, "tool.succeeded", payload=json.dumps(payload))


def asks_a_model(hand: Hand, run_id: str, call: str, *, error: str = "") -> None:
    hand.emit(run_id, "llm.called", payload=json.dumps({"model": "m", "call": call}))
    if error:
        details = {"code": "llm.rate_limit", "message": error}
        payload = {"model": "m", "call": call, "error": error, "error_details": details}
        hand.emit(run_id, "llm.failed", payload=json.dumps(payload))
    else:
        metrics = {"input_tokens": 12, "output_tokens": 3, "cost_usd": 0.5}
        payload = {"model": "m", "call": call, "output_text": "391", "_metrics": metrics}
        hand.emit(run_id, "llm.succeeded", payload=json.dumps(payload))


def calls_a_function(hand: Hand, run_id: str) -> None:
    """A recorded function that fails, and one that returns."""
    for name, call in (("price", "price:0123456789ab:1"), ("pay", "pay:0123456789ab:1")):
        started = {"name": name, "params": {"order": "A17"}, "call_id": call}
        hand.emit(run_id, "step.started", payload=json.dumps(started))
        ended: dict[str, Any] = {"name": name, "call_id": call}
        if name == "price":
            hand.emit(run_id, "step.succeeded", payload=json.dumps({**ended, "result": 500}))
        else:
            details = {"code": "step.failed", "message": "no money"}
            failed = {**ended, "error": "no money", "error_details": details}
            hand.emit(run_id, "step.failed", payload=json.dumps(failed))


def row(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_show_prints_the_whole_history_of_a_run(command: Command, hand: Hand) -> None:
    """Input, times, attempts with worker and ending, steps with their tries, and the error."""
    hand.submit("r1")
    hand.claim("r1")
    calls_a_tool(hand, "r1")
    calls_a_function(hand, "r1")
    for _ in range(3):
        asks_a_model(hand, "r1", "m:aaaaaaaabbbb:1", error="slow down")
        hand.retry("r1", delay_ms=0)
        hand.claim("r1")
    asks_a_model(hand, "r1", "m:aaaaaaaabbbb:1")
    hand.commit("r1", steps=1)
    hand.finish("r1", error=LLMResponseError("wrong key", hint="look at it"))

    shown = command("show", "r1")

    assert shown.code == 0
    assert row(shown.out, "state") == "state     failed (llm.response)"
    assert row(shown.out, "input") == "input     hi"
    assert row(shown.out, "attempts") == "attempts  4 (3 retries, 0 recoveries)"
    assert "submitted" in row(shown.out, "times")
    assert "ended" in row(shown.out, "times")
    assert row(shown.out, "1 ").endswith("hand:1  retry in 0.0 s: llm.rate_limit")
    assert row(shown.out, "4 ").endswith("failed")
    assert '{"a": 1} → {"sum": 391}' in row(shown.out, "calc:01234567:1")
    assert '{"order": "A17"} → 500' in row(shown.out, "price:01234567:1")
    assert "failed: step.failed: no money" in row(shown.out, "pay:01234567:1")
    assert "x4" in row(shown.out, "m:aaaaaaaa:1")
    assert "12+3 $0.500000" in row(shown.out, "m:aaaaaaaa:1")
    assert "failed: llm.response: wrong key\n  hint: look at it" in shown.out


def test_show_prints_the_traceback_of_an_error(command: Command, hand: Hand, client: Client) -> None:
    """The traceback is part of the context of the error."""
    hand.submit("r1")
    hand.claim("r1")
    hand.finish("r1", error=LLMResponseError("wrong key"))
    key = client.store.keys("run", "r1")
    result = json.loads(client.store.redis.hget(key, "result") or "")
    result["error_details"]["context"]["traceback"] = "Traceback:\n  File shop.py\nKeyError: 'x'\n"
    client.store.redis.hset(key, "result", json.dumps(result))

    assert "Traceback:\n  File shop.py\nKeyError: 'x'\n" in command("show", "r1").out


def test_show_as_json(command: Command, hand: Hand) -> None:
    """The fields of the record, and attempts, calls and the reason for waiting."""
    hand.submit("r1")
    hand.claim("r1")
    calls_a_tool(hand, "r1", answers=False)
    hand.retry("r1")

    shown = command("show", "r1", "--json").json

    assert (shown["run_id"], shown["state"], shown["retries"]) == ("r1", "retrying", 1)
    assert shown["last_error"]["code"] == "llm.rate_limit"
    assert shown["waiting_for"]["kind"] == "retry"
    assert shown["waiting_for"]["until_ms"] == shown["due_ms"]
    assert [(one["number"], one["worker"], one["code"]) for one in shown["attempts"]] == [
        (1, "hand:1", "llm.rate_limit")
    ]
    assert [(one["call_id"], one["outcome"]) for one in shown["calls"]] == [(CALL, "interrupted")]
    assert shown["queue_wait_ms"] >= 0


def test_a_call_that_waits_for_its_approval_was_not_made(command: Command, hand: Hand) -> None:
    """It waits, and counts as a try when it is made. A call around a timer waits, too, but was begun."""
    hand.submit("r1")
    hand.claim("r1")
    calls_a_tool(hand, "r1", answers=False)
    calls_a_tool(hand, "r1", "calc:ffffffffabcd:1", answers=False)
    hand.park("r1", Wait(WaitKind.APPROVAL, "calc", CALL), Wait(WaitKind.TIMER, call_id="sleep:1"))

    waiting = command("show", "r1", "--json").json["calls"]
    assert [(one["outcome"], one["tries"]) for one in waiting] == [("waiting", 0), ("waiting", 1)]
    assert '{"a": 1} waits' in row(command("show", "r1").out, "calc:01234567:1")

    command("cancel", "r1")
    ended = command("show", "r1", "--json").json["calls"]
    assert [one["outcome"] for one in ended] == ["interrupted", "interrupted"]


def test_a_call_that_goes_on_after_its_approval_counts_as_one_try(command: Command, hand: Hand) -> None:
    """It is not announced again: it is running as soon as the next attempt is."""
    hand.submit("r1")
    hand.claim("r1")
    calls_a_tool(hand, "r1", answers=False)
    hand.park("r1", Wait(WaitKind.APPROVAL, "calc", CALL))
    hand.store.redis.hset(hand.store.keys("run", "r1"), "state", "queued")
    hand.claim("r1")

    (goes_on,) = command("show", "r1", "--json").json["calls"]
    assert (goes_on["outcome"], goes_on["ended_at"]) == ("running", None)

    payload = {"tool_id": "calc", "result": {"sum": 391}, "call_id": CALL}
    hand.emit("r1", "tool.succeeded", payload=json.dumps(payload))
    (ended,) = command("show", "r1", "--json").json["calls"]
    assert (ended["outcome"], ended["tries"]) == ("ok", 1)
    command("cancel", "r1")


# --- waiting ---------------------------------------------------------------------------------------------


def test_show_explains_why_a_run_waits(command: Command, hand: Hand, client: Client) -> None:
    """For a retry with its time, for its session with the other run, or for its start."""
    hand.submit("first", "s1")
    hand.submit("second", "s1")
    hand.submit("third", "s1")
    hand.claim("first")
    hand.retry("first", delay_ms=3_600_000)
    later = {"agent_id": "assistant", "session_id": "s2", "input_text": "hi", "run_id": "later"}
    client.submit(later, delay_ms=3_600_000)

    waits = {
        run_id: row(command("show", run_id).out, "waits") for run_id in ("first", "second", "third", "later")
    }

    assert "retry after llm.rate_limit at " in waits["first"]
    assert waits["first"].endswith("(in 59m): slow down")
    assert waits["second"] == "waits     session s1 is busy with run first"
    assert waits["third"].endswith("busy with run first, and 1 more before it")
    assert "its start is due at " in waits["later"]
    for run_id in ("later", "third", "second", "first"):
        client.cancel(run_id)


def test_show_explains_that_no_worker_serves_a_run(command: Command, client: Client) -> None:
    """There is no worker, or none for its queue, or none with its agent, or none has started the run yet."""
    request = {"agent_id": "clerk", "input_text": "hi"}

    def waits(run_id: str) -> str:
        return row(command("show", run_id).out, "waits")

    client.submit({**request, "session_id": "s1", "run_id": "r1"})
    client.submit({**request, "session_id": "s2", "run_id": "r2"}, queue="slow")
    assert "no worker serves queue agents: no worker is alive" in waits("r1")

    register(client, agents=("porter",))
    assert "no worker serves queue slow: 1 worker is alive, with the queues agents" in waits("r2")
    assert "--queues slow" in waits("r2")
    assert "no worker of queue agents has the agent clerk: their agents are porter" in waits("r1")

    register(client, agents=("porter", "clerk"))
    assert "no worker of queue agents has started it yet" in waits("r1")
    retire(client)
    for run_id in ("r1", "r2"):
        client.cancel(run_id)


def test_a_worker_of_the_previous_version_may_serve_any_queue(
    command: Command, hand: Hand, client: Client
) -> None:
    """It does not publish its queues, so `show` does not claim that no worker serves the queue."""
    hand.submit("r1")

    assert "has started it yet" in command("show", "r1").out
    client.cancel("r1")


# --- one step --------------------------------------------------------------------------------------------


def test_a_step_is_found_by_the_beginning_of_its_id(command: Command, hand: Hand, client: Client) -> None:
    """The displayed, short id works, too. An ambiguous beginning is a usage error that lists the steps."""
    hand.submit("r1")
    hand.claim("r1")
    calls_a_tool(hand, "r1")
    calls_a_tool(hand, "r1", "calc:0199999999abcd:1")

    by_prefix = command("show", "r1", "--step", "calc:012")
    by_what_is_shown = command("show", "r1", "--step", "calc:01234567:1", "--json")
    of_two = command("show", "r1", "--step", "calc:01")
    of_none = command("show", "r1", "--step", "weather")

    assert f"step      {CALL}" in by_prefix.out
    assert '"a": 1' in by_prefix.out
    assert by_what_is_shown.json["call_id"] == CALL
    assert (of_two.code, "calc:01234567:1, calc:01999999:1" in of_two.err) == (1, True)
    assert (of_none.code, "no step 'weather'" in of_none.err) == (1, True)
    client.cancel("r1")


# --- lists -----------------------------------------------------------------------------------------------


def test_show_says_how_fast_the_model_calls_were(command: Command, hand: Hand) -> None:
    """When the run has ended. Before that, it is not known."""
    hand.submit("r1")
    hand.claim("r1")
    assert "latency" not in command("show", "r1").out
    hand.finish("r1")
    usage = {
        "llm_latency_p50_ms": 1200.0,
        "llm_latency_p95_ms": 3400.0,
        "ttft_ms": 250.0,
        "llm_retry_count": 2,
    }
    hand.store.redis.hset(hand.store.keys("run", "r1"), "usage", json.dumps(usage))

    shown = row(command("show", "r1").out, "latency")

    assert shown == "latency   median 1.2 s, 95 % 3.4 s, first token 250 ms, 2 repeated requests"


def test_a_list_of_runs_shows_state_reason_age_and_tokens(command: Command, hand: Hand) -> None:
    """It can be filtered by time and by error code."""
    hand.end("old", steps=0)
    hand.end("bad", steps=0, error=LLMRateLimitError("slow down"))

    everything = command("runs")
    failed = command("runs", "--code", "llm.*", "--since", "1h", "--json")
    none = command("runs", "--until", "1h")
    wrong = command("runs", "--since", "yesterday")

    assert everything.out.splitlines()[0].split() == [
        *("AGE", "STATE", "REASON", "RUN", "AGENT", "SESSION", "TOKENS"),
    ]
    assert row(everything.out, "0s").split()[1:6] == ["failed", "llm.rate_limit", "bad", "assistant", "s1"]
    assert [one["run_id"] for one in failed.json["items"]] == ["bad"]
    assert (none.out, none.err.strip()) == ("", "none")
    assert (wrong.code, "'yesterday' is not a time" in wrong.err) == (1, True)


def test_a_list_names_the_records_that_cannot_be_read(command: Command, hand: Hand, client: Client) -> None:
    """A bad record does not hide the others. `show` fails for it with an error code."""
    hand.end("good", steps=0)
    hand.end("broken", steps=0)
    key = client.store.keys("run", "broken")
    client.store.redis.hset(key, "usage", "not JSON")

    listed = command("runs")
    as_json = command("runs", "--json")
    asked_for = command("show", "broken")

    assert "good" in listed.out
    assert f"left out: {key}: record.unreadable" in listed.err
    assert as_json.json["problems"] == [{"key": key, "code": "record.unreadable"}]
    assert asked_for.code == 3
    assert "record.unreadable" in asked_for.err


# --- the terminal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_no_control_character_of_a_run_reaches_the_terminal(
    command: Command, hand: Hand, client: Client, as_json: bool
) -> None:
    """Whether it comes from a model, a tool, a user or an error, and for every command."""
    option = ["--json"] if as_json else []
    hand.submit("r1")
    hand.claim("r1")
    nasty_events = [
        ("tool.called", {"tool_id": NASTY, "params": {NASTY: NASTY}, "call_id": NASTY}),
        ("tool.succeeded", {"tool_id": NASTY, "result": NASTY, "call_id": NASTY}),
        ("llm.called", {"model": NASTY, "call": "m:1"}),
        ("llm.failed", {"model": NASTY, "call": "m:1", "error": NASTY}),
        (f"shop.{NASTY}", {NASTY: NASTY}),
    ]
    for name, payload in nasty_events:
        hand.emit("r1", name, payload=json.dumps(payload))
    message = {"role": "user", "content": NASTY}
    hand.finish("r1", NASTY, transcript=[message], state={"k": NASTY})
    hand.submit("r2", "s2")
    hand.claim("r2")
    hand.finish("r2", error=LLMResponseError(NASTY, hint=NASTY))
    client.submit({"agent_id": "a", "session_id": "s3", "run_id": "r3", "input_text": NASTY})

    printed = [
        command(*arguments, *option)
        for arguments in (
            *(("show", run_id) for run_id in ("r1", "r2", "r3")),
            *(("watch", run_id) for run_id in ("r1", "r2")),
            ("show", "r1", "--step", "m:1"),
            ("session", "s1"),
            ("runs",),
            ("sessions",),
            ("show", NASTY),
            ("cancel", "r3", "--reason", NASTY),
        )
    ]

    for one in printed:
        for text in (one.out, one.err):
            bad = {c for c in text if not c.isprintable()} - {"\n", "\t"}
            assert not bad, ascii(text)
    assert printed[3].out, "the answer is still shown"


def test_a_session_with_foreign_messages_is_shown(command: Command, client: Client, hand: Hand) -> None:
    """Another program has added them to the transcript."""
    hand.submit("r1")
    hand.claim("r1")
    hand.commit("r1", steps=0)
    hand.finish("r1", transcript=[{"role": "user", "content": "hello", "run_id": "r1"}])
    client.store.redis.rpush(client.store.keys("transcript", "s1"), "7", '{"role": "user", "run_id": [1]}')

    done = command("session", "s1")

    assert (done.code, "user: hello" in done.out) == (0, True), done.err
    assert [message.get("run_id") for message in client.session("s1").transcript] == ["r1", [1]]
