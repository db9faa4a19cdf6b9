"""Every guard of the scripts is needed: without any one of them, some history breaks a promise.

So the machine can fail, and a guard that is lost in an edit is noticed. A guard that only backs up another
one is listed together with it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from importlib import resources

import pytest

from tests.properties.lab import Lab
from tests.properties.machine import play, protocol_in
from tests.properties.stories import Stories, tell

SEEDS = 10  # chance finds the guards without a story in the histories of the first few

LIVE = "if not run or run.fence ~= F or run.state ~= STATE.running then return false end"
HOLDS = "return redis.call('HGET', k.session(run.session), 'holder') == run.id"


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
        (HOLDS, "return true"),
    ),
    Guard(
        "claim checks the lease of the worker",
        ("if not deadline or deadline <= NOW_MS then return reply{answer = 'NOT_ALIVE'} end", ""),
    ),
    Guard(
        "the end of a lease is final",
        ("if not deadline or deadline <= NOW_MS then return reply{lost = true} end", ""),
    ),
    Guard(
        "only reclaim takes a run from its owner",
        ("  return reply{answer = 'BUSY'}\nend", "end"),
    ),
    Guard(
        "the same nonce gets the same answer",
        ("string.match(run.fence, ':(.*)$') == nonce", "false"),
    ),
    Guard(
        "claim ends a run with a cancel request",
        (
            "if run.cancel == '1' and not says_so_itself(run) then return",
            "if false then return",
        ),
        story="a_run_is_cancelled_while_its_worker_hands_it_back",
    ),
    Guard(
        "a run that is repeatedly given back without a record ends",
        ("if length <= (length_before or length) then counts = 1 end", ""),
        story="a_run_is_given_back_again_and_again",
    ),
    Guard(
        "a retry does not start before it is due",
        (
            "if run.due > NOW_MS then return reply{answer = 'NOT_DUE'",
            "if false then return reply{answer = 'NOT_DUE'",
        ),
    ),
    Guard(
        "only the holder of a session is executed",
        ("if held_by ~= run_id then return reply{answer = 'WAITING', wakes = wakes} end", ""),
        story="a_message_is_older_than_the_memory_of_redis",
    ),
    Guard(
        "a session whose holder has no record goes to the head of its queue",
        (
            "if is_stack or redis.call('ZSCORE', k.session_queue(run.session), run_id) then",
            "if is_stack then",
        ),
        story="the_last_run_of_a_queue_is_claimed",
    ),
    Guard(
        "an end repairs a session whose holder has no record",
        ("next_run = repaired(S)", "next_run = nil"),
        story="the_last_run_of_a_queue_is_cancelled",
    ),
    Guard(
        "a holder that is submitted again does not wait for itself",
        ("if held == run.id or not held", "if not held"),
        story="a_holder_without_a_record_is_submitted_again",
    ),
    Guard(
        "a worker executes suspects of at most one group",
        ("if held.group ~= '' and held.group ~= of_other.group then return BUSY_MS end", ""),
        story="two_suspects_meet",
    ),
    Guard(
        "a suspect with a record does not block other groups",
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
        "suspects and new suspects are kept in separate groups",
        ("local kind = held.group == '' and 'n' or 's'", "local kind = 'n'"),
        story="new_suspects_die_with_an_old_one",
    ),
    Guard(
        "only a run that was the single suspect is poisoned",
        ("(is_single and run.deaths > max_recoveries)", "run.deaths > max_recoveries - 1"),
        story="two_of_a_group_die_too_often_together",
    ),
    Guard(
        "a run is not poisoned if another run of the process may have killed it",
        ("and not ended.is_only_run and", "and false and"),
        story="a_run_dies_too_often_beside_a_run_with_a_record",
    ),
    Guard(
        "a run whose deaths are in doubt is executed by an empty worker",
        (
            "if held.doubted > 0 then return not is_empty(incarnation) and",
            "if held.doubted > 0 then return false and",
        ),
        story="a_run_dies_too_often_beside_a_run_with_a_record",
    ),
    Guard(
        "an empty worker is kept free for a run that must be executed alone",
        ("is_kept_free(run.queue) and BUSY_MS or nil", "false and BUSY_MS or nil"),
        story="a_run_dies_too_often_beside_a_run_with_a_record",
    ),
    Guard(
        "a worker takes no other run beside one that is executed alone",
        ("if of_other.doubted > 0 and", "if false and"),
        story="a_run_dies_too_often_beside_a_run_with_a_record",
    ),
    Guard(
        "a run waits for an empty worker only for a limited time",
        ("  return until_ms > NOW_MS\n", "  return true\n"),
        story="no_worker_is_empty",
    ),
    Guard(
        "a run that kills is poisoned although it is never alone",
        (" and held.doubted < MOST_DOUBTED then", " then"),
        story="no_worker_is_empty",
    ),
    Guard(
        "a run has a worker to itself only for a limited time",
        ("since_ms < MOST_ALONE_MS and ", ""),
        story="a_run_is_executed_alone_for_long",
    ),
    Guard(
        "a run with a record since its claim is not suspected",
        ("  if recorded and not is_named then\n", "  if false then\n"),
        story="a_run_dies_after_a_record",
    ),
    Guard(
        "a process that answers has not died",
        ("  redis.call('HSET', k.lease_end(incarnation), 'answered', '1')\n", ""),
        story="a_worker_answers_after_its_lease",
    ),
    Guard(
        "the suspicion of runs of a process that answers is removed",
        ("KEPT_AFTER_LEASE_MS)\n  spare_all(incarnation)\n", "KEPT_AFTER_LEASE_MS)\n"),
        story="a_worker_answers_after_its_runs_were_reclaimed",
    ),
    Guard(
        "a run is spared only a limited number of times",
        ("and held.spared < MOST_SPARED then\n    held", "then\n    held"),
        story="a_worker_answers_too_often",
    ),
    Guard(
        "leases that end together make no suspects",
        ("or were_lost_together(incarnation, at)", "or false"),
        story="several_workers_lose_their_leases_while_redis_is_silent",
    ),
    Guard(
        "the runs of the first of several lost leases are spared, too",
        ("        spare_all(other)\n", ""),
        story="the_second_of_two_leases_is_lost_a_moment_later",
    ),
    Guard(
        "a process that is known to be dead does not count as a lost lease",
        (
            "other ~= incarnation and redis.call('HEXISTS', k.lease_end(other), 'died') == 0",
            "other ~= incarnation",
        ),
        story="a_lease_is_lost_when_a_watchdog_ends_another_process",
    ),
    Guard(
        "the runs of a process that is known to be dead are not spared with others",
        ("answered or (not died and (", "answered or (true and ("),
        story="a_lease_is_lost_when_a_watchdog_ends_another_process",
    ),
    Guard(
        "a run that was named twice is poisoned",
        ("held.named >= 2 or ", ""),
        story="the_watchdog_names_a_run_twice",
    ),
    Guard(
        "if the watchdog names a run, the other runs are not suspected",
        ("(ended.named and not is_named)", "false"),
        story="the_watchdog_names_a_run_twice",
    ),
    Guard(
        "a run is named only by its owner",
        (
            "run.owner ~= incarnation or run.state ~= STATE.running then return 0 end\nlocal",
            "false then end\nlocal",
        ),
        story="the_watchdog_of_a_worker_that_has_lost_its_run_names_it",
    ),
    Guard(
        "a run is left to workers that read its format",
        ("if not (is_read(run.format) and is_read(format)) then", "if false then"),
        story="a_run_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "a commit stores the format of its record",
        (
            "redis.call('RPUSH', key, unpack(records))\nif format > run.format",
            "redis.call('RPUSH', key, unpack(records))\nif false",
        ),
        story="a_run_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "a note about a job stores the format that it needs",
        (
            "if format > run.format then redis.call('HSET', k.run(run_id), 'format', format) end\n"
            "redis.call('HSET', k.run(run_id), 'emit_no'",
            "redis.call('HSET', k.run(run_id), 'emit_no'",
        ),
        story="a_run_with_a_job_comes_to_old_workers",
    ),
    Guard(
        "leaving a run to others is one event",
        ("'left:' .. format .. ':' .. newest, incarnation) == 1", "'left:' .. NOW_US, incarnation) == 1"),
        story="a_run_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "a run that was left to others is due again",
        ("  redis.call('ZADD', k.due(), digits(due), run_id)\n", ""),
        story="a_run_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "a run that was left to others still expires",
        ("      look_in_time(run)\n", ""),
        story="a_run_that_is_left_expires_in_time",
    ),
    Guard(
        "a session is left to workers that read its format",
        (
            "math.max(run.format, session_format(run.session), message_format)",
            "math.max(run.format, message_format)",
        ),
        story="a_session_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "a finish stores the format of its session",
        ("if format > session_format(S) then", "if false then"),
        story="a_session_of_the_new_format_comes_to_old_workers",
    ),
    Guard(
        "a session with a summary is left to workers that know summaries",
        ("  format = math.max(format, compacted_format)\n", ""),
        story="a_session_with_a_summary_comes_to_old_workers",
    ),
    Guard(
        "a summary replaces no other one that was written since",
        ("if epoch > 0 and epoch_of(S) == epoch - 1 then", "if epoch > 0 then"),
        story="a_resumed_run_has_an_older_summary",
    ),
    Guard(
        "a fork has no summary of later messages",
        (" or count_of(found[1]) > messages then return end", " then return end"),
        story="a_fork_begins_before_a_summary",
    ),
    Guard(
        "Celery is notified by a worker that reads the format",
        ("if at[1] and not is_read(run.format) then return reply{answer = 'OTHER_FORMAT'} end", ""),
        story="an_old_worker_cannot_notify_celery_of_an_end_of_the_new_format",
    ),
    Guard(
        "a run that was claimed needs no message",
        (
            "redis.call('ZREM', k.sent(run.queue), run_id)\nif run.force_at == 0",
            "if run.force_at == 0",
        ),
    ),
    Guard(
        "a claim stores the owner of the run",
        ("redis.call('SADD', k.worker_runs(incarnation), run_id)", ""),
    ),
    Guard(
        "a commit that is repeated is stored once",
        ("if length > position then", "if false then"),
    ),
    Guard(
        "a record is never stored after a gap",
        ("if length < position then return 'MISPLACED' end", ""),
        story="a_record_is_forgotten",
    ),
    Guard(
        "nothing is paid on a record that is lost",
        ("< stored then return reply{answer = 'MISPLACED', decision = ''} end", "< 0 then return '' end"),
        story="a_record_is_forgotten_before_a_payment",
    ),
    Guard(
        "nobody is asked on a record that is lost",
        ("< stored then return 'MISPLACED' end", "< 0 then return '' end"),
        story="a_record_is_forgotten_before_a_question",
    ),
    Guard(
        "a run is not parked after Redis has lost what it waits for",
        ("if kind == 'park' and run.emit_no < acknowledged then return reply{answer = 'MISPLACED'} end", ""),
        story="a_question_is_forgotten_before_the_run_waits_for_its_answer",
    ),
    Guard(
        "another record at a position is refused",
        ("~= record then return 'MISPLACED' end", "~= record then return answer end"),
        story="two_programs_share_a_fence",
    ),
    Guard(
        "a commit removes suspicion",
        ("'stuck', 0, 'retries', 0, 'usage'", "'usage'"),
    ),
    Guard(
        "a commit returns a cancel request",
        ("run.cancel == '1' and 'CANCEL' or 'OK'", "'OK'"),
        story="a_run_is_cancelled_while_it_executes",
    ),
    Guard(
        "a batch of events is stored once",
        ("if batch_no <= run.emit_no then return 'SAME' end", ""),
    ),
    Guard(
        "a run with a cancel request is not suspended",
        ("if run.cancel == '1' then return reply{answer = 'CANCEL'} end", ""),
        story="a_run_with_a_cancel_request_is_suspended",
    ),
    Guard(
        "a finish that is repeated is answered",
        ("if run and run.fence == fence and TERMINAL[run.state] then return reply{answer = 'OK'} end", ""),
    ),
    Guard(
        "an owner whose run is ended by another process loses the fence",
        ("ending.keep_fence and run.fence or next_fence(run)", "run.fence"),
        story="a_run_is_cancelled_by_force",
    ),
    Guard(
        "an owner that finishes its run keeps the fence",
        ("ending.keep_fence and run.fence or next_fence(run)", "next_fence(run)"),
    ),
    Guard(
        "an expired run is not started",
        (
            "if expired(run) then return reply",
            "if false then return reply",
        ),
        story="a_run_is_claimed_after_its_time",
    ),
    Guard(
        "a notification is resent until it is confirmed",
        ("redis.call('HEXISTS', k.run(id), 'untold') == 1", "false"),
        story="celery_is_not_notified",
    ),
    Guard(
        "a notification is resent in increasing intervals",
        ("redis.call('ZINCRBY', k.sent(queue), digits(pause_ms * 1000), id)", ""),
        story="celery_is_not_notified",
    ),
    Guard(
        "a confirmation names the life that has ended",
        ("if run and run.life == tonumber(runs[i + 1]) and TERMINAL[run.state]", "if run"),
        story="a_run_is_resumed",
    ),
    Guard(
        "a new life has no cancel request",
        ("redis.call('HDEL', key, 'cancel',", "redis.call('HDEL', key, "),
        story="a_run_is_resumed",
    ),
    Guard(
        "a resumed run does not expire",
        ("do redis.call('PERSIST', name) end\n  append", "do redis.call('EXISTS', name) end\n  append"),
        story="a_run_is_resumed",
    ),
    Guard(
        "a run that is rolled back does not complete",
        ("if run.interrupted == 'rollback' and end_state == STATE.completed then", "if false then"),
        story="a_run_that_is_rolled_back_completes",
    ),
    Guard(
        "an interrupting run waits in front of the others",
        ("if run.on_busy ~= '' then return FRONT", "if false then return FRONT"),
        story="a_run_that_waits_is_not_passed_by_those_that_came_before_it",
    ),
    Guard(
        "interrupting runs keep their order",
        ("return FRONT + count_up(k.session(S), 'front')", "return FRONT - count_up(k.session(S), 'front')"),
        story="an_interrupting_run_is_interrupted",
    ),
    Guard(
        "an interrupting run that waits is interrupted",
        ("ipairs({before or '', bottom})", "ipairs({bottom})"),
        story="an_interrupting_run_is_interrupted",
    ),
    Guard(
        "a run that is interrupted while it is suspended is woken",
        ("  return {wake_of(run)}\nend\n\n-- enter(run)", "  return {}\nend\n\n-- enter(run)"),
        story="a_run_is_interrupted_while_it_is_suspended",
    ),
    Guard(
        "a worker writes the turn of an interrupted run",
        ("run.cancel == '1' and run.interrupted == 'interrupt' end", "false end"),
        story="a_run_is_interrupted_while_it_is_suspended",
    ),
    Guard(
        "an interrupted run is ended by force",
        ("    redis.call('ZADD', k.due(), force_at, run.id)\n", ""),
        story="an_interrupted_run_does_not_end",
    ),
    Guard(
        "an interrupted run that is claimed is still ended by force",
        (
            "if run.force_at == 0 then redis.call('ZREM', k.due(), run_id) end",
            "redis.call('ZREM', k.due(), run_id)",
        ),
        story="an_interrupted_run_is_claimed_late",
    ),
    Guard(
        "a worker that dies before it ends an interrupted run by force is replaced",
        ("digits(math.max(run.force_at, NOW_MS + OVERDUE_AGAIN_MS))", "digits(NOW_MS + 2 ^ 40)"),
        story="an_interrupted_run_does_not_end",
    ),
    Guard(
        "a run that is overdue is ended by force in this life only",
        ("if overdue == 1 and (run.force_at == 0 or run.force_at > NOW_MS) then", "if false then"),
        story="an_overdue_run_ends_and_begins_another_life",
    ),
    Guard(
        "an interrupted run whose worker dies still gets its turn",
        (
            "    if says_so_itself(run) then\n      more = {wake_of(run)}",
            "    if false then\n      more = {}",
        ),
        story="the_worker_of_an_interrupted_run_dies",
    ),
    Guard(
        "an interrupted run that is given back still gets its turn",
        ("if kind == 'handover' or says_so_itself(run) then return", "if kind == 'handover' then return"),
        story="an_interrupted_run_is_given_back",
    ),
    Guard(
        "a request to cancel an interrupted run does not take its turn",
        ("if says_so_itself(run) and run.owner == '' and force == 0 then", "if false then"),
        story="an_interrupted_run_is_cancelled",
    ),
    Guard(
        "a new life of an interrupting run waits",
        ("run.life + 1, 0, ''\n", "run.life + 1, 0, run.on_busy\n"),
        story="an_interrupting_run_is_resumed",
    ),
    Guard(
        "a fork has no records after its checkpoint",
        ("redis.call('LTRIM', k.journal(run_id), 0, steps)", ""),
        story="a_fork_goes_on",
    ),
    Guard(
        "a fork has the records up to its checkpoint",
        ("redis.call('COPY', k.journal(from_run_id), k.journal(run_id), 'REPLACE')", ""),
        story="a_fork_goes_on",
    ),
    Guard(
        "the journal of a fork does not expire with that of its source",
        ("redis.call('PERSIST', k.journal(run_id))\nif is_new_session", "if is_new_session"),
        story="a_fork_survives_its_source",
    ),
    Guard(
        "a fork needs a record that exists",
        ("if steps >= length then", "if false then"),
        story="a_run_is_forked_at_each_of_its_steps",
    ),
    Guard(
        "a run without records is not forked",
        ("if length == 0 then return reply{answer = 'NO_CHECKPOINT'} end", ""),
        story="a_run_without_records_is_forked",
    ),
    Guard(
        "the session of a fork ends where the run began",
        ("redis.call('LTRIM', to, 0, count - 1)", ""),
        story="a_run_is_forked_at_each_of_its_steps",
    ),
    Guard(
        "the same fork again is the same run",
        ("if known_digest then\n  if known_digest ~= digest", "if false then\n  if known_digest ~= digest"),
        story="a_fork_goes_on",
    ),
    Guard(
        "a fork is left to workers that read its format",
        ("new_run(run_id, {format = source.format, state", "new_run(run_id, {format = 1, state"),
        story="a_parked_run_is_forked",
    ),
    Guard(
        "a fork of a fork knows from which runs its records are",
        ("seeds = (field_of(from_run_id, 'seeds') or '') .. digits(steps)", "seeds = digits(steps)"),
        story="a_fork_is_forked",
    ),
    Guard(
        "a completed run is not resumed",
        ("if run.state == STATE.completed then return reply{answer = 'COMPLETED'} end", ""),
        story="a_completed_run_is_resumed",
    ),
    Guard(
        "a run with unrecorded effects is not started again",
        ("if begins and not may_begin_again(run) then return reply{answer = 'NO_CHECKPOINT'} end", ""),
        story="a_run_that_left_no_record_is_resumed",
    ),
    Guard(
        "a live run is not resumed",
        (
            "if not TERMINAL[run.state] then return reply{answer = 'LIVE'",
            "if false then return reply{answer = 'LIVE'",
        ),
        story="a_run_is_resumed",
    ),
    Guard(
        "a release checks the fence and the owner",
        ("run.fence ~= fence or run.owner ~= incarnation or ", ""),
        story="a_former_owner_releases_its_run",
    ),
    Guard(
        "reclaim checks the lease",
        ("k.workers(), '-inf', digits(NOW_MS)", "k.workers(), '-inf', '+inf'"),
    ),
    Guard(
        "a dead worker is removed when it has no runs left",
        ("if left == 0 then", "if true then"),
        story="two_runs_of_a_dead_worker_are_reclaimed_one_by_one",
    ),
    Guard(
        "reclaim ends a run with a cancel request",
        (
            "    elseif run.cancel == '1' then\n      more = cancelled",
            "    elseif false then\n      more = cancelled",
        ),
        story="the_worker_of_a_run_with_a_cancel_request_dies",
    ),
    Guard(
        "a lease is ended only if this server has seen the connection",
        ("if seen_by ~= server then return nil end", "if not seen_by then return nil end"),
        story="a_server_has_never_seen_the_connection",
    ),
    Guard(
        "only a connection that was seen can be lost",
        ("if server ~= '' and (listeners(incarnation) or 0) > 0 then", "if server ~= '' then"),
        story="a_connection_cannot_be_seen",
    ),
    Guard(
        "a worker that subscribes again is not silent",
        (
            "    if heard_by > 0 then\n      redis.call('ZREM', k.silent(), incarnation)",
            "    if heard_by > 0 then",
        ),
        story="a_connection_is_lost_and_opened_again",
    ),
    Guard(
        "a worker that renews is not silent",
        (
            "  redis.call('ZREM', k.silent(), incarnation)\n  redis.call('HSET', k.watched()",
            "  redis.call('HSET', k.watched()",
        ),
        story="a_worker_renews_and_is_late_the_next_time",
    ),
    Guard(
        "a lease is not ended before the next renewal is due",
        (
            "math.max(redis.call('ZSCORE', k.silent(), incarnation) + silence_ms, tonumber(renewed_by))",
            "redis.call('ZSCORE', k.silent(), incarnation) + silence_ms",
        ),
        story="a_connection_is_cut_long_before_the_next_beat",
    ),
    Guard(
        "a lease is not ended before a minimum silence",
        (
            "math.max(redis.call('ZSCORE', k.silent(), incarnation) + silence_ms, tonumber(renewed_by))",
            "tonumber(renewed_by)",
        ),
        story="a_connection_is_cut_when_a_beat_is_late",
    ),
    Guard(
        "a run that is not durable is never ended by a wrong check",
        ("elseif at and all_durable(incarnation) then", "elseif at then"),
        story="a_worker_without_a_connection_has_a_run_that_is_not_durable",
    ),
    Guard(
        "only the lease of the checked process is ended",
        ("if redis.call('HGET', k.host(host), incarnation) ~= process then return 'OVER' end\n", ""),
        story="a_worker_of_the_host_sees_another_process_die",
    ),
    Guard(
        "a false alarm counts once",
        ("if not by or by == FALSE_ALARM then return false end", "if not by then return false end"),
        story="the_lease_of_a_live_worker_is_ended",
    ),
    Guard(
        "a false alarm does not count as a death",
        ("'recoveries', digits(math.max(run.recoveries - 1, 0))", "'recoveries', run.recoveries"),
        story="the_lease_of_a_live_worker_is_ended",
    ),
    Guard(
        "a false alarm before reclaim does not count as a death",
        ("local counted = seen_by == FALSE_ALARM and 0 or 1", "local counted = 1"),
        story="a_worker_reports_that_it_is_alive_before_its_runs_are_reclaimed",
    ),
    Guard(
        "a false alarm does not remove a later death",
        ("held.by == incarnation and ", ""),
        story="a_worker_lives_whose_run_has_killed_another",
    ),
    Guard(
        "a false alarm applies to one life",
        ("if run and run.life == tonumber(taken[i + 1]) then", "if run then"),
        story="a_worker_lives_whose_run_has_another_life",
    ),
    Guard(
        "after three false alarms connections are not checked",
        ("not is_off('connection')", "true"),
        story="the_leases_of_three_live_workers_are_ended",
    ),
    Guard(
        "after three false alarms processes are not checked",
        (" or is_off('process') then return 'OVER' end", " then return 'OVER' end"),
        story="three_processes_are_seen_dead_and_live",
    ),
    Guard(
        "a run that is not durable fails with its worker",
        ("elseif run.durable == '0' then", "elseif false then"),
        story="a_worker_dies_with_a_run_that_is_not_durable",
    ),
    Guard(
        "a poisoned run ends",
        ("elseif is_poison then", "elseif false then"),
        story="a_run_kills_three_workers",
    ),
    Guard(
        "a recovery without a death is not counted",
        ("(blameless == 1 or were_lost_together(incarnation, at))", "were_lost_together(incarnation, at)"),
    ),
    Guard(
        "reclaim adds the run to the sent wake-ups",
        ("more = {wake_of(run)}", "more = {}"),
    ),
    Guard(
        "wake checks the due time",
        ("k.due(), '-inf', digits(NOW_MS)", "k.due(), '-inf', '+inf'"),
    ),
    Guard(
        "resend sends only queued runs whose message is old",
        ("math.min(oldest_us, NOW_US - grace_ms * 1000)", "NOW_US + 1"),
    ),
    Guard(
        "a message that is still in the queue is not sent again",
        ("math.min(oldest_us, NOW_US - grace_ms * 1000)", "NOW_US - grace_ms * 1000"),
        story="a_message_waits_in_a_long_queue",
    ),
    Guard(
        "a wake-up gets a new send time",
        (
            "redis.call('ZADD', k.sent(run.queue), digits(NOW_US), run.id)",
            "redis.call('ZADD', k.sent(run.queue), 'NX', digits(NOW_US), run.id)",
        ),
        story="a_message_is_lost_twice",
    ),
    Guard(
        "the same id is one run",
        ("if known_digest ~= digest then return reply{answer = 'CONFLICT'} end", ""),
    ),
    Guard(
        "a busy session can be refused",
        ("if reject_if_busy == 1 and", "if false and"),
    ),
    Guard(
        "a session with live runs does not expire",
        ("redis.call('PERSIST', key)", "redis.call('EXISTS', key)"),
    ),
    Guard(
        "a run that has ended expires",
        ("redis.call('PEXPIRE', name, RUN_TTL_MS)", "redis.call('EXISTS', name)"),
    ),
    Guard(
        "a session without live runs expires",
        ("redis.call('PEXPIRE', name, ttl_ms)", "redis.call('EXISTS', name)"),
    ),
    Guard(
        "an end passes the session to the next run",
        ("if not lender then next_run = promote(S) end", ""),
    ),
    Guard(
        "an end removes the run from the queue",
        ("    redis.call('ZREM', k.session_queue(S), run.id)\n    next_run = ", "    next_run = "),
    ),
    Guard(
        "an end removes the run from the due runs",
        ("  redis.call('ZREM', k.due(), run.id)\n", ""),
    ),
    Guard(
        "an end removes the run from the sent wake-ups",
        ("  redis.call('ZREM', k.sent(run.queue), run.id)\n", ""),
    ),
    Guard(
        "an end removes the run from its owner",
        ("  leave(run)\n  redis.call('ZREM', k.due()", "  redis.call('ZREM', k.due()"),
    ),
    Guard(
        "the run that has waited longest is next",
        ("k.session_queue(S), 0, 0)[1]", "k.session_queue(S), -1, -1)[1]"),
    ),
    Guard(
        "a cancel request is kept for the next heartbeat",
        (
            "'cancel_reason', reason)\n    redis.call('SADD', k.worker_box(run.owner), run.id)",
            "'cancel_reason', reason)",
        ),
        story="a_run_is_cancelled_while_it_executes",
    ),
    Guard(
        "a run that has ended is not cancelled again",
        ("if TERMINAL[run.state] then return reply{answer = 'ALREADY', state = run.state} end", ""),
    ),
    Guard(
        "a run that has ended is not claimed",
        ("if TERMINAL[run.state] then\n  local at", "if false then\n  local at"),
    ),
    Guard(
        "the lease of a worker that stops is kept until its runs are reclaimed",
        ("if redis.call('SCARD', k.worker_runs(incarnation)) == 0 then", "if true then"),
        story="a_worker_with_runs_retires",
    ),
    Guard(
        "a key of a wrong type is renamed",
        ("    if A.type_of(key) ~= 'none' then A.move(key) end\n", ""),
        story="the_key_of_due_runs_has_a_wrong_type",
    ),
    Guard(
        "a run whose journal is not a list ends",
        ("if is_wrong_type(answer) then return nil, keys[name]", "if false then return nil, keys[name]"),
        story="the_journal_of_a_run_has_a_wrong_type",
    ),
    Guard(
        "a run writes its session completely or not at all",
        ("if holds or #transcript > 0 then needs(k.transcript(S), 'list') end\n", ""),
        story="the_transcript_of_a_session_has_a_wrong_type",
    ),
    Guard(
        "a run does not park while there is a fact that it has not read",
        ("whole(field_of(run_id, 'facts_no')) ~= facts_seen", "false"),
        story="a_value_comes_while_the_run_parks",
    ),
    Guard(
        "a fact wakes the run that waits for it",
        ("  return {unpark(run, ended)}\n", "  return {}\n"),
        story="a_value_wakes_a_parked_run",
    ),
    Guard(
        "a fact wakes no run that waits for another one",
        ("if is_ended_by(wait, fact) then ended", "if true then ended"),
        story="a_value_wakes_a_parked_run",
    ),
    Guard(
        "a fact wakes only a parked run",
        ("  if not PARKED[run.state] then return {} end\n", ""),
        ("'waits', 'due')\n", "'due')\n"),
        story="a_value_wakes_a_parked_run",
    ),
    Guard(
        "a run continues when all decisions are made",
        ("if ended.needs_all == true then", "if false then"),
        story="two_decisions_are_made",
    ),
    Guard(
        "the first decision counts",
        (
            "  if first then return reply{answer = 'ALREADY'",
            "  if false then return reply{answer = 'ALREADY'",
        ),
        story="two_decisions_are_made",
    ),
    Guard(
        "a message counts once",
        ("if message_id ~= '' and redis.call('ZSCORE'", "if false and redis.call('ZSCORE'"),
        story="a_value_is_sent_twice",
    ),
    Guard(
        "a counter does not begin again in a full Redis",
        (
            "if type(value) == 'string' and (#value > 15 or not string.find(value, '^-?%d+$')) then",
            "if value then",
        ),
        story="a_value_is_sent_to_a_full_redis",
    ),
    Guard(
        "a run does not know the messages of an earlier run with its id",
        ("  redis.call('DEL', k.message_ids(R))", "  -- "),
        story="an_id_of_a_run_is_used_again",
    ),
    Guard(
        "a session is deleted without the runs of other sessions",
        ("if state and session and session ~= session_id then", "if false then"),
        story="an_id_of_a_run_is_used_again_in_another_session",
    ),
    Guard(
        "a run is not listed as one that asks because an earlier run with its id has asked",
        ("  redis.call('ZREM', k.index(APPROVALS), R)", "  -- "),
        story="a_holder_that_has_asked_is_submitted_again",
    ),
    Guard(
        "a run that has ended gets no facts",
        (
            "if TERMINAL[run.state] then return reply{answer = 'ENDED'",
            "if false then return reply{answer = 'ENDED'",
        ),
        story="a_parked_run_is_cancelled_before_its_time",
    ),
    Guard(
        "a parked run is not executed",
        (
            "if run.state ~= STATE.queued then return reply{answer = 'PARKED'",
            "if false then return reply{answer = 'PARKED'",
        ),
        story="a_message_comes_to_a_parked_run",
    ),
    Guard(
        "a time-out ends with its wait",
        ("  redis.call('ZREM', k.timeouts(), run.id)\n", ""),
        story="a_parked_run_is_cancelled_before_its_time",
    ),
    Guard(
        "a time-out wakes the run",
        ("then wakes[#wakes + 1] = unpark(run, timed_out(id)) end", "then end"),
        story="a_parked_run_times_out",
    ),
    Guard(
        "a record takes its facts",
        ("take_facts(run_id, taken)\n", ""),
        story="a_value_wakes_a_parked_run",
    ),
    Guard(
        "a run that was parked has the format that says so",
        ("'format', math.max(run.format, format), unpack(at)", "unpack(at)"),
        story="an_old_worker_gets_a_run_that_was_parked",
    ),
    Guard(
        "every event has the next number",
        ("'seq', left) - left", "'seq', left) - left + (final and 1 or 0)"),
    ),
)
GUARDS += (
    Guard(
        "an intent replaces no decision that its worker does not know",
        ("knows_decision == 0 and redis.call('HGET'", "false and redis.call('HGET'"),
        story="a_payment_is_decided_while_the_next_worker_prepares",
    ),
    Guard(
        "an intent is stored before the call",
        ("redis.call('HSET', facts, FACT.intent .. call, value, FACT.fence .. call, fence)", ""),
        story="a_payment_is_interrupted",
    ),
    Guard(
        "the first decision about a call counts",
        ("if decision then return reply{answer = 'ALREADY', decision = decision} end", ""),
        story="a_payment_is_interrupted",
    ),
    Guard(
        "a call that is being made is not decided",
        ("return not (run.state == STATE.running and begun_by == run.fence)", "return true"),
        story="a_payment_is_decided_while_it_is_made",
    ),
    Guard(
        "a worker reports only the call that it made last",
        (" or (fence ~= '' and begun_by ~= fence) then return false end", " then return false end"),
        story="a_worker_reports_what_became_of_its_payment",
    ),
    Guard(
        "a worker may report its call before another one has the run",
        ("  if fence ~= '' then return true end -- also before another worker has the run\n", ""),
        story="a_worker_reports_its_payment_before_its_run_is_reclaimed",
    ),
    Guard(
        "only a call that was asked about is approved",
        ("return redis.call('HEXISTS', facts, FACT.ask .. call) == 1 end", "return true end"),
        story="an_approval_is_decided_once",
    ),
    Guard(
        "a run that has ended is not decided about",
        (
            "if TERMINAL[run.state] then return reply{answer = 'GONE'",
            "if false then return reply{answer = 'GONE'",
        ),
        story="a_run_with_an_open_question_is_cancelled",
    ),
    Guard(
        "a decided approval is not listed",
        ("if kind == 'approval' and not waits_for_approval(run_id) then", "if false then"),
        story="an_approval_is_decided_once",
    ),
    Guard(
        "a run whose question is given up is not listed",
        ("if has_taken_question and not waits_for_approval(R) then", "if false then"),
        story="a_question_is_given_up",
    ),
    Guard(
        "a run that has ended is not listed",
        ("  redis.call('ZREM', k.index(APPROVALS), run.id)\n", ""),
        story="a_run_with_an_open_question_is_cancelled",
    ),
    Guard(
        "a session is not deleted while a worker must cancel what a run has left behind",
        ("or state and has_left_behind(id, life)", ""),
        story="a_session_is_deleted_while_a_job_goes_on",
    ),
    Guard(
        "a response that an earlier life has left behind does not count as cancelled",
        ("  local entry, names = digits(math.max(count_of(life), 1))", "  local entry, names = digits(1)"),
        story="a_session_is_deleted_while_a_response_goes_on",
    ),
    Guard(
        "a question ends with its life",
        ("if ENDS_WITH_LIFE[string.match(fact, '^(%w+):')] then", "if false then"),
        story="a_run_with_an_open_question_is_cancelled",
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
    assert texts_missing(GUARDS) == []


def texts_missing(guards: Iterable[Guard]) -> list[str]:
    """The texts of guards that are in no script."""
    lua = resources.files("openagents_worker.store").joinpath("lua")
    files = [file for folder in (lua, lua / "lib") for file in folder.iterdir() if file.name.endswith(".lua")]
    everything = "\n".join(file.read_text("utf-8") for file in files)
    return [old for guard in guards for old, _ in guard.off if old not in everything]
