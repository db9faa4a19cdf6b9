"""Calls of every script with default arguments: a test passes only the arguments that it is about."""

from __future__ import annotations

import itertools
from typing import Any

from openagents_worker.store import scripts
from openagents_worker.store.scripts import ScriptCall

__all__ = ["PAGE_BYTES", "call"]

PAGE_BYTES = 256 * 1024

_nonces = itertools.count(1)

_DEFAULTS: dict[str, dict[str, Any]] = {
    "submit": {
        "run_id": "r1",
        "agent_id": "a",
        "session_id": "s1",
        "queue": "",
        "default_queue": "q",
        "digest": "d",
        "uid": "u",
        "request": "{}",
        "canvas": "",
        "durable": True,
        "delay_ms": 0,
        "reject_if_busy": False,
        "parent_run_id": "",
        "lists": [],
        "expires_ms": 0,
        "tell": False,
    },
    "delete_session": {"session_id": "s1", "limit": 100, "even_if_not_notified": False},
    "prune": {"limit": 100},
    "put_aside": {"key": "agents", "code": "message.unreadable", "what": "not JSON", "item": "{"},
    "aside_news": {"limit": 100},
    "mend_key": {"key": "oa:due", "kind": "zset"},
    "register": {"incarnation": "w1", "lease_ms": 60_000, "agents": [], "previous": ""},
    "end_lease": {"incarnation": "w1", "host": "h1", "process": "1 1"},
    "look": {"server": "s1", "silence_ms": 2_000},
    "alarm": {"incarnation": "w1"},
    "retire": {"incarnation": "w1"},
    "renew": {"incarnation": "w1", "lease_ms": 60_000},
    "claim": {"run_id": "r1", "incarnation": "w1", "page_bytes": PAGE_BYTES},
    "in_states": {"ids": ["r1"], "states": ["queued"]},
    "page": {"run_id": "r1", "position": 0, "page_bytes": PAGE_BYTES},
    "read_rows": {"kind": "session", "ids": ["s1"]},
    "release": {"run_id": "r1", "incarnation": "w1", "kind": "handover"},
    "ask": {"run_id": "r1", "call": "pay:aa:1", "value": "{}", "batch_no": 1, "events": []},
    "emit": {"run_id": "r1", "batch_no": 1, "events": ["llm.called", '{"model":"m","call":"0.1"}']},
    "commit": {
        "run_id": "r1",
        "position": 0,
        "records": ['{"call":"0.1"}'],
        "usage": '{"llm_calls":1}',
        "batch_no": 1,
        "events": ["run.checkpoint_saved", "{}"],
    },
    "intent": {
        "run_id": "r1",
        "call": "pay:aa:1",
        "value": '{"call":"pay:aa:1"}',
        "knows_decision": False,
        "batch_no": 1,
        "events": ["tool.called", "{}"],
    },
    "decide": {
        "run_id": "r1",
        "kind": "resolution",
        "call": "pay:aa:1",
        "value": '{"action":"skip"}',
        "event": "tool.outcome_resolved",
        "payload": "{}",
    },
    "suspend": {
        "run_id": "r1",
        "kind": "retry",
        "delay_ms": 60_000,
        "call": "0.1",
        "error_code": "llm.rate_limit",
        "batch_no": 1,
        "events": [],
    },
    "finish": {
        "run_id": "r1",
        "end_state": "completed",
        "result": '{"run_id":"r1"}',
        "event": "run.completed",
        "payload": "{}",
        "completed": "{}",
        "transcript": ['{"role":"user"}', '{"role":"assistant"}'],
        "artifacts": [],
        "state": [],
        "state_removed": [],
        "usage": '{"llm_calls":1}',
        "batch_no": 1,
        "events": [],
    },
    "limit_take": {
        "name": "k",
        "run_id": "r1",
        "call": "c1",
        "tokens": 100,
        "wait_ms": 1_000,
        "may_park": True,
        "requests_per_minute": 0,
        "tokens_per_minute": 0,
        "max_concurrency": 0,
    },
    "limit_settle": {
        "name": "k",
        "run_id": "r1",
        "call": "c1",
        "tokens": 100,
        "used": -1,
        "was_sent": True,
        "blocked_ms": 0,
    },
    "limit_serve": {"most": 10},
    "fact": {
        "run_id": "r1",
        "name": "signal:paid:",
        "value": "1",
        "message_id": "",
        "max_facts": 1000,
        "max_bytes": 100_000,
    },
    "cancel": {"run_id": "r1", "reason": "enough", "force": False},
    "reclaim": {"limit": 100, "max_recoveries": 5, "blameless": False, "heartbeat_ms": 0},
    "accuse": {"run_id": "r1", "incarnation": "w1"},
    "wake": {"limit": 100},
    "first_due": {},
    "replaced": {"messages": ["q", "r1", "1", ""]},
    "resend": {"queue": "q", "oldest_us": 2**53 - 1, "grace_ms": 0, "limit": 100},
    "resend_unread": {"queue": "q", "grace_ms": 0, "max_grace_ms": 600_000, "limit": 100},
    "resume": {
        "run_id": "r1",
        "agent_id": "a",
        "session_id": "s1",
        "input_text": "",
        "checkpoint_id": "",
        "canvas": "",
    },
    "fork": {
        "run_id": "r2",
        "from_run_id": "r1",
        "steps": 0,
        "session_id": "s2",
        "digest": "f",
        "uid": "u",
        "request": "{}",
        "messages": 0,
        "artifacts": 0,
    },
    "delegate": {
        "run_id": "r1",
        "call": "helper:aa:1",
        "child_id": "c1",
        "agent_id": "helper",
        "session_id": "child:c1",
        "queue": "",
        "mode": "isolated",
        "background": False,
        "digest": "d",
        "uid": "u",
        "request": "{}",
        "input_text": "sum up",
        "delegated": '{"run_id":"c1","life":1}',
        "batch_no": 1,
    },
    "fork_session": {"session_id": "s1", "new_session_id": "s2"},
    "confirm_completion": {"runs": ["r1", "1"]},
    "outbox_take": {"recipient": "billing", "limit": 10, "retry_ms": 1_000, "max_retry_ms": 60_000},
    "outbox_done": {"recipient": "billing", "ends": ["r1", "1"]},
    "notify": {"incarnation": "w1", "notice": ' {"kind":"steer","run":"r1"}'},
    "confirm_notices": {"incarnation": "w1", "notices": [' {"kind":"steer","run":"r1"}']},
    "reject": {"run_id": "r1", "queue": "q", "code": "request.invalid", "message": "no", "hint": ""},
}


def call(script: str, **changed: Any) -> ScriptCall[Any]:
    """The call of this script; a claim without a nonce gets a new one."""
    arguments = {**_DEFAULTS[script], **changed}
    if script == "claim":
        arguments.setdefault("nonce", f"n{next(_nonces)}")
    script_function: Any = getattr(scripts, script)
    script_call: ScriptCall[Any] = script_function(**arguments)
    return script_call
