"""Every guard of the scripts is needed: with any one switched off, some history breaks a promise.

So the machine can fail, and a guard that is lost in an edit is found. A guard that only backs up another one
stands here together with the other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import pytest

from openagents_worker.store import scripts
from openagents_worker.store.scripts import Script
from tests.properties.lab import Lab
from tests.properties.machine import play

SEEDS = 60

ASSIGNS_FENCE = "'state', 'queued', 'fence', fence, 'owner', ''"
LIVE = "if not run or run.fence ~= F or run.state ~= 'running' then return nil end"
HOLDS = "if redis.call('HGET', k.session(run.session), 'holder') ~= R then return nil end"

Texts = tuple[tuple[str, str], ...]

# what is off -> texts of the scripts, and what stands in their place
GUARDS: dict[str, Texts] = {
    "a write compares the fence": ((LIVE, LIVE.replace("run.fence ~= F or ", "")),),
    "a fence holds a nonce, not only a number": (
        (LIVE, LIVE.replace("run.fence ~= F", "string.match(run.fence, '^%d+') ~= string.match(F, '^%d+')")),
    ),
    "a write needs a run that is running": (
        (LIVE, LIVE.replace(" or run.state ~= 'running'", "")),
        (HOLDS, ""),
    ),
    "claim looks at the claimant's lease": (
        ("if not deadline or deadline <= NOW_MS then return {'NOT_ALIVE'} end", ""),
    ),
    "the end of a lease is final": (("if not deadline or deadline <= NOW_MS then return {'LOST'} end", ""),),
    "only reclaim takes a run from its owner": (("  return {'BUSY'}\nend", "end"),),
    "the same nonce gets the same answer": (
        (
            "if run.owner == incarnation and string.match(run.fence, ':(.*)$') == nonce then return claimed(run) end",
            "",
        ),
    ),
    "claim ends a run that is to be cancelled": (
        ("if run.cancel == '1' then return {'CANCELLED', cancelled(run, run.cancel_reason)} end", ""),
    ),
    "a retry does not start before it is due": (
        ("if run.due > NOW_MS then return {'NOT_DUE'", "if false then return {'NOT_DUE'"),
    ),
    "only the holder of a session works": (
        ("  if held_by then return {'WAITING'} end", "  if held_by then held_by = nil end"),
    ),
    "a worker carries one suspect at most": (("if other and other ~= run_id then", "if false then"),),
    "a run that was claimed needs no message": (
        (
            "redis.call('SADD', k.worker_runs(incarnation), run_id)\nredis.call('ZREM', k.sent(run.queue), run_id)",
            "redis.call('SADD', k.worker_runs(incarnation), run_id)",
        ),
    ),
    "a claim notes whose the run is": (("redis.call('SADD', k.worker_runs(incarnation), run_id)", ""),),
    "a commit that is repeated is stored once": (("if length > position then", "if false then"),),
    "a record is never put behind a gap": (("if length < position then return 'MISPLACED' end", ""),),
    "another record at a place is refused": (
        ("  return 'MISPLACED'\nend\nif length", "  return answer\nend\nif length"),
    ),
    "a commit shows that a run is no poison": (("'stuck', 0, 'retries', 0, 'usage'", "'usage'"),),
    "a commit tells of a request to cancel": (("run.cancel == '1' and 'CANCEL' or 'OK'", "'OK'"),),
    "a batch of events is stored once": (("if batch_no <= run.emit_no then return 'SAME' end", ""),),
    "a run to be cancelled is not put aside": (("if run.cancel == '1' then return {'CANCEL'} end", ""),),
    "a finish that is repeated is answered": (
        ("if run and run.fence == fence and TERMINAL[run.state] then return {'OK', {}} end", ""),
    ),
    "who finishes keeps the fence, who is ended loses it": (
        ("ending.keep_fence and run.fence or next_fence(run)", "run.fence"),
        (
            "if run and run.fence == fence and TERMINAL[run.state] then return {'OK', {}} end",
            "if run and run.fence == fence and run.state == 'cancelled' then return {'OK', {}} end",
        ),
    ),
    "a release is by fence and owner": (("run.fence ~= fence or run.owner ~= incarnation or ", ""),),
    "reclaim looks at the lease": (("k.workers(), '-inf', digits(NOW_MS)", "k.workers(), '-inf', '+inf'"),),
    "a worker is gone once nothing is left of it": (("if left == 0 then", "if true then"),),
    "reclaim ends a run that is to be cancelled": (
        (
            "    if run.cancel == '1' then\n      more = cancelled",
            "    if false then\n      more = cancelled",
        ),
    ),
    "what is not durable is lost with its worker": (("elseif run.durable == '0' then", "elseif false then"),),
    "poison has an end": (("elseif stuck > max_recoveries then", "elseif false then"),),
    "a blameless recovery is not counted": (("(blameless == 1 and 0 or 1)", "1"),),
    "reclaim puts the run in the list of sent wake-ups": (("more = {wake_of(run)}", "more = {}"),),
    "wake looks at the time": (("k.due(), '-inf', digits(NOW_MS)", "k.due(), '-inf', '+inf'"),),
    "resend is for queued runs that were sent long ago": (
        ("math.min(oldest_us, NOW_US - grace_ms * 1000)", "NOW_US + 1"),
    ),
    "a message that waits in the queue is not sent again": (
        ("math.min(oldest_us, NOW_US - grace_ms * 1000)", "NOW_US - grace_ms * 1000"),
    ),
    "a wake-up has a new time of sending": (
        (
            "redis.call('ZADD', k.sent(run.queue), digits(NOW_US), run.id)",
            "redis.call('ZADD', k.sent(run.queue), 'NX', digits(NOW_US), run.id)",
        ),
    ),
    "the same id is one run": (("if known_digest ~= digest then return {'CONFLICT'} end", ""),),
    "a busy session can be refused": (("if reject_if_busy == 1 and", "if false and"),),
    "places are given at submit": (
        ("if not held and redis.call('ZCARD', k.session_queue(S)) == 0 then", "if not held then"),
    ),
    "a session with work in it does not expire": (
        ("redis.call('PERSIST', key)", "redis.call('EXISTS', key)"),
    ),
    "a run that has ended expires": (
        ("redis.call('PEXPIRE', name, RUN_TTL_MS)", "redis.call('EXISTS', name)"),
    ),
    "a session that rests expires": (
        ("redis.call('PEXPIRE', name, SESSION_TTL_MS)", "redis.call('EXISTS', name)"),
    ),
    "an end hands the session on": (("local next_run = promote(S)", "local next_run = nil"),),
    "an end leaves the queue": (
        ("  else\n    redis.call('ZREM', k.session_queue(S), run.id)\n  end", "  end"),
    ),
    "an end leaves the due list": (("  redis.call('ZREM', k.due(), run.id)\n", ""),),
    "an end leaves the list of sent wake-ups": (("  redis.call('ZREM', k.sent(run.queue), run.id)\n", ""),),
    "an end leaves its owner": (
        ("  leave(run)\n  redis.call('ZREM', k.due()", "  redis.call('ZREM', k.due()"),
    ),
    "who waits longest comes next": (("k.session_queue(S), 0, 0)[1]", "k.session_queue(S), -1, -1)[1]"),),
    "a request to cancel waits in the worker's box": (
        ("redis.call('SADD', k.worker_box(run.owner), run_id)", ""),
    ),
    "what has ended is not cancelled again": (
        ("if TERMINAL[run.state] then return {'ALREADY', run.state} end", ""),
    ),
    "what has ended is not claimed": (("if TERMINAL[run.state] then return {'DONE', run.state} end", ""),),
    "a worker that leaves runs behind keeps its lease until they are taken": (
        ("if redis.call('SCARD', k.worker_runs(incarnation)) == 0 then", "if true then"),
    ),
    "every event has the next number": (
        ("'seq', count) - count", "'seq', count) - count + (final and 1 or 0)"),
    ),
}


@pytest.fixture
def broken(redis_url: str, request: pytest.FixtureRequest) -> Generator[Lab]:
    lab = Lab(redis_url, request.param)
    yield lab
    lab.clear()
    lab.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("broken", GUARDS.values(), ids=GUARDS.keys(), indirect=True)
def test_without_it_a_promise_is_broken(broken: Lab) -> None:
    """Chance finds a history that shows what the guard is for."""
    with pytest.raises(AssertionError):
        for seed in range(SEEDS):
            play(broken, seed)
