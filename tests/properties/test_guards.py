"""Every guard of the scripts is needed: without any one of them, some history breaks a promise.

So the machine can fail, and a guard that is lost in an edit is noticed. A guard that only backs up another
one is listed together with it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from importlib import resources

import pytest

from tests.properties.lab import Lab
from tests.properties.machine import play, protocol_in
from tests.properties.stories import Stories, tell

SEEDS = 10  # chance finds the guards without a story in the histories of the first few

LIVE = "if not run or run.fence ~= F or run.state ~= STATE.running then return nil end"
HOLDS = "if redis.call('HGET', k.session(run.session), 'holder') ~= R then return nil end"


@dataclass(frozen=True, init=False)
class Guard:
    """A promise, the script text without its guard, and the story that breaks then."""

    name: str
    off: tuple[tuple[str, str], ...]
    story: str

    def __init__(self, name: str, *off: tuple[str, str], story: str = "") -> None:
        for field, value in (("name", name), ("off", off), ("story", story)):
            object.__setattr__(self, field, value)


GUARDS = (
    Guard(
        "a write compares the fence",
        (LIVE, LIVE.replace("run.fence ~= F or ", "")),
    ),
    Guard(
        "a fence holds a nonce, not only a number",
        (
            LIVE,
            LIVE.replace("run.fence", "string.match(run.fence, '^%d+')").replace(
                "= F", "= string.match(F, '^%d+')"
            ),
        ),
        story="two_workers_get_the_same_number",
    ),
    Guard(
        "a write needs a run that is running",
        (LIVE, LIVE.replace(" or run.state ~= STATE.running", "")),
        (HOLDS, ""),
    ),
    Guard(
        "claim looks at the claimant's lease",
        ("if not deadline or deadline <= NOW_MS then return {'NOT_ALIVE'} end", ""),
    ),
    Guard(
        "the end of a lease is final",
        ("if not deadline or deadline <= NOW_MS then return {'LOST'} end", ""),
    ),
    Guard(
        "only reclaim takes a run from its owner",
        ("  return {'BUSY'}\nend", "end"),
    ),
    Guard(
        "the same nonce gets the same answer",
        ("string.match(run.fence, ':(.*)$') == nonce", "false"),
    ),
    Guard(
        "claim ends a run that is to be cancelled",
        ("if run.cancel == '1' then return {'CANCELLED'", "if false then return {'CANCELLED'"),
        story="a_run_is_cancelled_while_its_worker_hands_it_back",
    ),
    Guard(
        "a run that is given back without a record has an end",
        ("if length <= (length_before or length) then counts = 1 end", ""),
        story="a_run_is_given_back_again_and_again",
    ),
    Guard(
        "a retry does not start before it is due",
        ("if run.due > NOW_MS then return {'NOT_DUE'", "if false then return {'NOT_DUE'"),
    ),
    Guard(
        "only the holder of a session works",
        ("if held_by ~= run_id then return {'WAITING', wakes} end", ""),
        story="a_message_is_older_than_the_memory_of_redis",
    ),
    Guard(
        "a session whose holder has no record goes to the head of its queue",
        ("if redis.call('ZSCORE', k.session_queue(run.session), run_id) then", "if false then"),
        story="the_last_of_a_queue_comes_by",
    ),
    Guard(
        "an end repairs a session whose holder has no record",
        ("local head = repaired(S)", "local head = nil"),
        story="the_last_of_a_queue_is_cancelled",
    ),
    Guard(
        "a holder that is submitted again does not wait for itself",
        ("if held == run.id or not held", "if not held"),
        story="it_is_submitted_again",
    ),
    Guard(
        "a worker carries suspects of one group at most",
        ("if other ~= '' and other ~= group then", "if false then"),
        story="two_suspects_meet",
    ),
    Guard(
        "a suspect that has a record makes room for others",
        ("  if held.at == at then return held end", "  if run.suspicion ~= '' then return held end"),
        ("  redis.call('HDEL', k.run(run_id), 'suspicion')\n", ""),
        ("  redis.call('SREM', k.suspects(run.owner), run_id)\n", ""),
        story="two_suspects_meet",
    ),
    Guard(
        "a group of suspects is halved",
        ("    ended.half[kind] = 1 - ended.half[kind]\n", ""),
        story="two_suspects_meet",
    ),
    Guard(
        "suspects and their new neighbours are kept apart",
        ("local kind = held.group == '' and 'n' or 's'", "local kind = 'n'"),
        story="new_neighbours_of_a_suspect_die_with_it",
    ),
    Guard(
        "only a run that was alone is poisoned",
        ("(is_alone and run.deaths > max_recoveries)", "run.deaths > max_recoveries - 1"),
        story="two_of_a_group_die_too_often_together",
    ),
    Guard(
        "a run with a record since its claim is not blamed",
        ("  if recorded and not is_named then\n", "  if false then\n"),
        story="a_run_dies_after_a_record",
    ),
    Guard(
        "a process that answers has not died",
        ("  redis.call('HSET', k.lease_end(incarnation), 'answered', '1')\n", ""),
        story="a_worker_answers_after_its_lease",
    ),
    Guard(
        "what was held against runs of a process that answers is taken back",
        ("KEPT_AFTER_LEASE_MS)\n  spare_all(incarnation)\n", "KEPT_AFTER_LEASE_MS)\n"),
        story="a_worker_answers_after_its_runs_were_taken",
    ),
    Guard(
        "nobody is spared for ever",
        ("and held.spared < MOST_SPARED then\n    held", "then\n    held"),
        story="a_worker_answers_too_often",
    ),
    Guard(
        "leases that are lost together blame nobody",
        ("or were_lost_together(incarnation, at)", "or false"),
        story="several_workers_lose_their_leases_to_a_silence",
    ),
    Guard(
        "the first of several lost leases is spared, too",
        ("        spare_all(other)\n", ""),
        story="the_second_of_two_leases_is_lost_a_moment_later",
    ),
    Guard(
        "a process that is known to have died does not make a silence of another death",
        (
            "other ~= incarnation and redis.call('HEXISTS', k.lease_end(other), 'died') == 0",
            "other ~= incarnation",
        ),
        story="a_lease_is_lost_when_a_watchdog_ends_another_process",
    ),
    Guard(
        "a process that is known to have died is not spared with others",
        ("answered or (not died and (", "answered or (true and ("),
        story="a_lease_is_lost_when_a_watchdog_ends_another_process",
    ),
    Guard(
        "a run that was named twice is poison",
        ("held.named >= 2 or ", ""),
        story="the_watchdog_names_a_run_twice",
    ),
    Guard(
        "the watchdog's word clears the others",
        ("(ended.named and not is_named)", "false"),
        story="the_watchdog_names_a_run_twice",
    ),
    Guard(
        "a run is named by the worker that has it",
        (
            "run.owner ~= incarnation or run.state ~= STATE.running then return 'FENCED' end\nlocal",
            "false then end\nlocal",
        ),
        story="the_watchdog_of_a_worker_that_has_lost_its_run_names_it",
    ),
    Guard(
        "a run is left to those who read its format",
        ("if not (is_read(run.format) and is_read(format)) then", "if false then"),
        story="a_run_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "a commit tells which format it takes to read it",
        (
            "redis.call('RPUSH', key, unpack(records))\nif format > run.format",
            "redis.call('RPUSH', key, unpack(records))\nif false",
        ),
        story="a_run_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "leaving it is told once",
        ("'left:' .. format .. ':' .. newest, incarnation) == 1", "'left:' .. NOW_US, incarnation) == 1"),
        story="a_run_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "what was left is due again",
        ("  redis.call('ZADD', k.due(), digits(due), run_id)\n", ""),
        story="a_run_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "what was left and woken is still to be started in time",
        ("      look_in_time(run)\n", ""),
        story="a_run_that_is_left_expires_in_time",
    ),
    Guard(
        "a session is left to those who read its format",
        (
            "math.max(run.format, session_format(run.session), message_format)",
            "math.max(run.format, message_format)",
        ),
        story="a_session_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "a finish tells which format it takes to read its session",
        ("if format > session_format(S) then", "if false then"),
        story="a_session_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "an end is told by those who read its format",
        ("if at[1] and not is_read(run.format) then return {'OTHER_FORMAT'} end", ""),
        story="an_end_of_the_new_format_is_not_told_by_old_workers",
    ),
    Guard(
        "a run that was claimed needs no message",
        (
            "redis.call('ZREM', k.sent(run.queue), run_id)\nredis.call('ZREM', k.due(), run_id)\nappend",
            "redis.call('ZREM', k.due(), run_id)\nappend",
        ),
    ),
    Guard(
        "a claim notes whose the run is",
        ("redis.call('SADD', k.worker_runs(incarnation), run_id)", ""),
    ),
    Guard(
        "a commit that is repeated is stored once",
        ("if length > position then", "if false then"),
    ),
    Guard(
        "a record is never put behind a gap",
        ("if length < position then return 'MISPLACED' end", ""),
        story="a_record_is_forgotten",
    ),
    Guard(
        "another record at a place is refused",
        ("~= record then return 'MISPLACED' end", "~= record then return answer end"),
        story="two_programs_share_a_fence",
    ),
    Guard(
        "a commit shows that a run is no poison",
        ("'stuck', 0, 'retries', 0, 'usage'", "'usage'"),
    ),
    Guard(
        "a commit tells of a request to cancel",
        ("run.cancel == '1' and 'CANCEL' or 'OK'", "'OK'"),
        story="a_run_is_cancelled_at_work",
    ),
    Guard(
        "a batch of events is stored once",
        ("if batch_no <= run.emit_no then return 'SAME' end", ""),
    ),
    Guard(
        "a run to be cancelled is not put aside",
        ("if run.cancel == '1' then return {'CANCEL'} end", ""),
        story="a_run_is_to_be_cancelled_and_put_aside",
    ),
    Guard(
        "a finish that is repeated is answered",
        ("if run and run.fence == fence and TERMINAL[run.state] then return {'OK', {}} end", ""),
    ),
    Guard(
        "who is ended by another loses the fence",
        ("ending.keep_fence and run.fence or next_fence(run)", "run.fence"),
        story="a_run_is_cancelled_by_force",
    ),
    Guard(
        "who finishes keeps the fence",
        ("ending.keep_fence and run.fence or next_fence(run)", "next_fence(run)"),
    ),
    Guard(
        "what was to be started by now is not started later",
        ("if expired(run) then return {'CANCELLED', cancelled(run, 'expired', true), run.life} end", ""),
        story="a_run_is_claimed_after_its_time",
    ),
    Guard(
        "an end is told until somebody has",
        ("redis.call('HEXISTS', k.run(id), 'untold') == 1", "false"),
        story="nobody_tells_celery",
    ),
    Guard(
        "an end is told ever less often",
        ("redis.call('ZINCRBY', k.sent(queue), digits(pause_ms * 1000), id)", ""),
        story="nobody_tells_celery",
    ),
    Guard(
        "who tells names the life that has ended",
        ("if run and run.life == tonumber(runs[i + 1]) and TERMINAL[run.state]", "if run"),
        story="a_run_lives_twice",
    ),
    Guard(
        "a new life has no request to cancel",
        ("redis.call('HDEL', k.run(run_id), 'cancel',", "redis.call('HDEL', k.run(run_id), "),
        story="a_run_lives_twice",
    ),
    Guard(
        "a run that lives again does not expire",
        ("do redis.call('PERSIST', key) end\nappend", "do redis.call('EXISTS', key) end\nappend"),
        story="a_run_lives_twice",
    ),
    Guard(
        "what is completed stays completed",
        ("if run.state == STATE.completed then return {'COMPLETED'} end", ""),
        story="a_completed_run_is_resumed",
    ),
    Guard(
        "what may have had an effect does not begin again",
        ("if begins and not may_begin then return {'NO_CHECKPOINT'} end", ""),
        story="a_run_that_left_no_record_is_resumed",
    ),
    Guard(
        "what lives is not started once more",
        ("if not TERMINAL[run.state] then return {'LIVE', run.state, run.queue} end", ""),
        story="a_run_lives_twice",
    ),
    Guard(
        "a release is by fence and owner",
        ("run.fence ~= fence or run.owner ~= incarnation or ", ""),
        story="a_worker_comes_back_to_give_away_what_it_lost",
    ),
    Guard(
        "reclaim looks at the lease",
        ("k.workers(), '-inf', digits(NOW_MS)", "k.workers(), '-inf', '+inf'"),
    ),
    Guard(
        "a worker is gone once nothing is left of it",
        ("if left == 0 then", "if true then"),
        story="two_runs_of_a_dead_worker_are_taken_one_by_one",
    ),
    Guard(
        "reclaim ends a run that is to be cancelled",
        (
            "    if run.cancel == '1' then\n      more = cancelled",
            "    if false then\n      more = cancelled",
        ),
        story="a_run_is_to_be_cancelled_and_its_worker_dies",
    ),
    Guard(
        "who is given up was seen by this server",
        ("if seen_by ~= server then return nil end", "if not seen_by then return nil end"),
        story="a_server_has_never_seen_the_connection",
    ),
    Guard(
        "only a connection that was seen is missed",
        ("if server ~= '' and (listeners(incarnation) or 0) > 0 then", "if server ~= '' then"),
        story="a_connection_cannot_be_seen",
    ),
    Guard(
        "who listens again is not silent",
        (
            "    if heard_by > 0 then\n      redis.call('ZREM', k.silent(), incarnation)",
            "    if heard_by > 0 then",
        ),
        story="a_connection_is_cut_and_made_anew",
    ),
    Guard(
        "who renews is not silent",
        (
            "  redis.call('ZREM', k.silent(), incarnation)\n  redis.call('HSET', k.watched()",
            "  redis.call('HSET', k.watched()",
        ),
        story="a_worker_renews_and_is_late_the_next_time",
    ),
    Guard(
        "nobody is given up before they must have renewed",
        (
            "math.max(redis.call('ZSCORE', k.silent(), incarnation) + silence_ms, tonumber(renewed_by))",
            "redis.call('ZSCORE', k.silent(), incarnation) + silence_ms",
        ),
        story="a_connection_is_cut_long_before_the_next_beat",
    ),
    Guard(
        "nobody is given up before they were silent for a while",
        (
            "math.max(redis.call('ZSCORE', k.silent(), incarnation) + silence_ms, tonumber(renewed_by))",
            "tonumber(renewed_by)",
        ),
        story="a_connection_is_cut_when_a_beat_is_late",
    ),
    Guard(
        "a run that is not durable is never lost by a mistake",
        ("elseif at and all_durable(incarnation) then", "elseif at then"),
        story="a_worker_without_a_connection_has_a_run_that_is_not_durable",
    ),
    Guard(
        "a neighbour ends the lease of the process that it saw",
        ("if redis.call('HGET', k.host(host), incarnation) ~= process then return 'OVER' end\n", ""),
        story="a_neighbour_has_seen_another_process_die",
    ),
    Guard(
        "a false alarm counts once",
        ("if not by or by == FALSE_ALARM then return {'NONE'} end", "if not by then return {'NONE'} end"),
        story="a_worker_is_given_up_and_lives",
    ),
    Guard(
        "a false alarm is no death",
        ("'recoveries', digits(math.max(run.recoveries - 1, 0))", "'recoveries', run.recoveries"),
        story="a_worker_is_given_up_and_lives",
    ),
    Guard(
        "a false alarm that comes before reclaim is no death",
        ("local counted = seen_by == FALSE_ALARM and 0 or 1", "local counted = 1"),
        story="a_worker_says_that_it_lives_before_its_runs_are_taken",
    ),
    Guard(
        "a false alarm takes back no death that came later",
        ("held.by == incarnation and ", ""),
        story="a_worker_lives_whose_run_has_killed_another",
    ),
    Guard(
        "a false alarm is of one life",
        ("if run and run.life == tonumber(taken[i + 1]) then", "if run then"),
        story="a_worker_lives_whose_run_has_another_life",
    ),
    Guard(
        "after three false alarms connections are not looked at",
        ("not is_off('connection')", "true"),
        story="three_workers_are_given_up_and_live",
    ),
    Guard(
        "after three false alarms processes are not looked at",
        (" or is_off('process') then return 'OVER' end", " then return 'OVER' end"),
        story="three_processes_are_seen_dead_and_live",
    ),
    Guard(
        "what is not durable is lost with its worker",
        ("elseif run.durable == '0' then", "elseif false then"),
        story="a_worker_dies_with_a_run_that_is_not_durable",
    ),
    Guard(
        "poison has an end",
        ("elseif is_poison then", "elseif false then"),
        story="a_run_kills_three_workers",
    ),
    Guard(
        "a blameless recovery is not counted",
        ("(blameless == 1 or were_lost_together(incarnation, at))", "were_lost_together(incarnation, at)"),
    ),
    Guard(
        "reclaim puts the run in the list of sent wake-ups",
        ("more = {wake_of(run)}", "more = {}"),
    ),
    Guard(
        "wake looks at the time",
        ("k.due(), '-inf', digits(NOW_MS)", "k.due(), '-inf', '+inf'"),
    ),
    Guard(
        "resend is for queued runs that were sent long ago",
        ("math.min(oldest_us, NOW_US - grace_ms * 1000)", "NOW_US + 1"),
    ),
    Guard(
        "a message that waits in the queue is not sent again",
        ("math.min(oldest_us, NOW_US - grace_ms * 1000)", "NOW_US - grace_ms * 1000"),
        story="a_message_waits_in_a_long_queue",
    ),
    Guard(
        "a wake-up has a new time of sending",
        (
            "redis.call('ZADD', k.sent(run.queue), digits(NOW_US), run.id)",
            "redis.call('ZADD', k.sent(run.queue), 'NX', digits(NOW_US), run.id)",
        ),
        story="a_lost_message_is_missed_twice",
    ),
    Guard(
        "the same id is one run",
        ("if known_digest ~= digest then return {'CONFLICT'} end", ""),
    ),
    Guard(
        "a busy session can be refused",
        ("if reject_if_busy == 1 and", "if false and"),
    ),
    Guard(
        "a session with work in it does not expire",
        ("redis.call('PERSIST', key)", "redis.call('EXISTS', key)"),
    ),
    Guard(
        "a run that has ended expires",
        ("redis.call('PEXPIRE', name, RUN_TTL_MS)", "redis.call('EXISTS', name)"),
    ),
    Guard(
        "a session that rests expires",
        ("redis.call('PEXPIRE', name, SESSION_TTL_MS)", "redis.call('EXISTS', name)"),
    ),
    Guard(
        "an end hands the session on",
        ("local next_run = promote(S)", "local next_run = nil"),
    ),
    Guard(
        "an end leaves the queue",
        ("  else\n    redis.call('ZREM', k.session_queue(S), run.id)\n  end", "  end"),
    ),
    Guard(
        "an end leaves the due list",
        ("  redis.call('ZREM', k.due(), run.id)\n", ""),
    ),
    Guard(
        "an end leaves the list of sent wake-ups",
        ("  redis.call('ZREM', k.sent(run.queue), run.id)\n", ""),
    ),
    Guard(
        "an end leaves its owner",
        ("  leave(run)\n  redis.call('ZREM', k.due()", "  redis.call('ZREM', k.due()"),
    ),
    Guard(
        "who waits longest comes next",
        ("k.session_queue(S), 0, 0)[1]", "k.session_queue(S), -1, -1)[1]"),
    ),
    Guard(
        "a request to cancel waits in the worker's box",
        ("redis.call('SADD', k.worker_box(run.owner), run_id)", ""),
        story="a_run_is_cancelled_at_work",
    ),
    Guard(
        "what has ended is not cancelled again",
        ("if TERMINAL[run.state] then return {'ALREADY', run.state} end", ""),
    ),
    Guard(
        "what has ended is not claimed",
        ("if TERMINAL[run.state] then\n  local at", "if false then\n  local at"),
    ),
    Guard(
        "a worker that leaves runs behind keeps its lease until they are taken",
        ("if redis.call('SCARD', k.worker_runs(incarnation)) == 0 then", "if true then"),
        story="a_worker_retires_at_work",
    ),
    Guard(
        "a key of another type is moved out of the way",
        ("    if A.type_of(key) ~= 'none' then A.move(key) end\n", ""),
        story="the_list_of_due_runs_is_something_else",
    ),
    Guard(
        "a run ends whose journal is not a list",
        ("if is_wrong_type(answer) then return nil, keys[name]", "if false then return nil, keys[name]"),
        story="the_journal_of_a_run_is_something_else",
    ),
    Guard(
        "a run writes its session whole or not at all",
        ("if #transcript > 0 then needs(k.transcript(S), 'list') end\n", ""),
        story="the_past_of_a_session_is_something_else",
    ),
    Guard(
        "every event has the next number",
        ("'seq', count) - count", "'seq', count) - count + (final and 1 or 0)"),
    ),
)
STORIES = [name for name in vars(Stories) if not name.startswith("_")]


@pytest.fixture
def lab(redis_url: str) -> Generator[Lab]:
    lab = Lab(redis_url)
    yield lab
    lab.close()


@pytest.fixture
def guard(request: pytest.FixtureRequest) -> Guard:
    given: Guard = request.param
    return given


@pytest.fixture
def broken(redis_url: str, guard: Guard) -> Generator[Lab]:
    lab = Lab(redis_url, guard.off)
    yield lab
    lab.clear()
    lab.close()


@pytest.mark.parametrize("name", STORIES)
def test_with_every_guard_the_story_ends_well(lab: Lab, name: str) -> None:
    """Stories are histories that random ones rarely produce."""
    tell(protocol_in(lab)(), name)


@pytest.mark.slow
@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name, indirect=True)
def test_without_it_a_promise_is_broken(broken: Lab, guard: Guard) -> None:
    """Its story, or else one of many random histories, shows the purpose of the guard."""
    with pytest.raises(AssertionError):
        show(broken, guard)


def show(lab: Lab, guard: Guard) -> None:
    if guard.story:
        tell(protocol_in(lab)(), guard.story)
    else:
        for seed in range(SEEDS):
            play(lab, seed)


def test_every_guard_stands_in_a_script() -> None:
    """The texts above are those of the scripts: if a line is changed there, it must be changed here."""
    lua = resources.files("openagents_worker.store").joinpath("lua")
    files = [file for folder in (lua, lua / "lib") for file in folder.iterdir() if file.name.endswith(".lua")]
    everything = "\n".join(file.read_text("utf-8") for file in files)

    missing = [old for guard in GUARDS for old, _ in guard.off if old not in everything]

    assert missing == []
