"""Every guard of delegation is needed: without any one of them, some story breaks a promise."""

from __future__ import annotations

import pytest

from tests.properties.children import ChildrenStories, tell
from tests.properties.lab import Lab
from tests.properties.machine import protocol_in
from tests.properties.test_guards import Guard, broken, guard, lab, texts_missing

__all__ = ["broken", "guard", "lab"]  # fixtures

GUARDS = (
    Guard(
        "the end of a child is a fact of its parent",
        ("return (store_fact(parent, FACT.child .. call, ending.result))", "return {}"),
        story="a_parent_waits_for_its_child",
    ),
    Guard(
        "a child that ended before its parent parked is not waited for",
        ("whole(field_of(run_id, 'facts_no')) ~= facts_seen", "false"),
        story="a_child_ends_before_its_parent_parks",
    ),
    Guard(
        "a call finds only its own child",
        ("if parent ~= run_id or parent_call ~= call then return reply{answer = 'CONFLICT'} end", ""),
        story="a_child_has_the_id_of_another_run",
    ),
    Guard(
        "a child that has ended is not begun again",
        ("if child.state ~= STATE.cancelled or parent_ended ~= '1' then return true end", ""),
        story="the_same_call_finds_its_child",
    ),
    Guard(
        "a cancelled run does not delegate",
        ("if run.cancel == '1' then return reply{answer = 'CANCEL'} end\nif not child", "if not child"),
        story="a_cancelled_run_delegates_no_more",
    ),
    Guard(
        "children end with their parent",
        (
            "  add(wakes, end_children(run, ending.state == STATE.cancelled))\n",
            "",
        ),
        story="a_parent_ends_without_its_child",
    ),
    Guard(
        "a child is cancelled although its worker executes it",
        (
            "  if run.owner == '' then return cancelled(run, reason) end\n  if run.cancel ~= '1' then",
            "  if run.owner == '' then return cancelled(run, reason) end\n  if false then",
        ),
        story="a_parent_is_cancelled_while_it_waits",
    ),
    Guard(
        "a child in the background outlives its parent",
        ("if background == '1' and all == '0' then", "if false then"),
        story="a_child_in_the_background_goes_on",
    ),
    Guard(
        "a cancelled run ends its children in the background, too",
        ("end_children(run, ending.state == STATE.cancelled)", "end_children(run, false)"),
        story="a_parent_is_cancelled_while_it_waits",
    ),
    Guard(
        "a child that is being cancelled is not taken for one that works",
        (
            "if not TERMINAL[child.state] and parent_ended == '1' then return reply{answer = 'STOPPING'} end",
            "",
        ),
        story="the_next_life_continues_the_child",
    ),
    Guard(
        "a child that was given up may be asked for again",
        ("then redis.call('HSET', k.run(run_id), 'parent_ended', '1') end --", "then run.x = 1 end --"),
        story="a_child_that_was_given_up_is_asked_for_again",
    ),
    Guard(
        "a child that continues has no result yet",
        ("  redis.call('HDEL', k.facts(run_id), FACT.child .. call) --", "  --"),
        story="a_child_that_was_given_up_is_asked_for_again",
    ),
    Guard(
        "a child that somebody else has cancelled is not asked for again",
        (
            "if run.cancel ~= '1' then redis.call('HSET', k.run(run_id), 'parent_ended'",
            "if true then redis.call('HSET', k.run(run_id), 'parent_ended'",
        ),
        story="a_child_that_was_given_up_is_asked_for_again",
    ),
    Guard(
        "a child that a later life has asked for is not given up by an earlier one",
        ("if field_of(run_id, 'parent_life') ~= digits(given_up_in) then", "if false then"),
        story="a_child_is_given_up_by_an_earlier_life",
    ),
    Guard(
        "a result belongs to one life of the parent",
        (" or life ~= digits(parent.life) then return {} end", " then return {} end"),
        story="the_next_life_continues_the_child",
    ),
    Guard(
        "a child that somebody else has resumed does not report to its parent",
        ("'force_at', 'on_busy', 'parent_life', 'parent_ended')", "'force_at', 'on_busy', 'parent_ended')"),
        story="a_child_is_resumed_by_somebody_else",
    ),
    Guard(
        "an ended child is not one of the live children",
        ("  redis.call('SREM', k.children(id), run.id)\n", ""),
        story="a_parent_waits_for_its_child",
    ),
    Guard(
        "a parent lends its session only while it is parked",
        (
            "if not PARKED[run.state] or redis.call('HGET', k.session(S), 'holder') ~= run.id",
            "if redis.call('HGET', k.session(S), 'holder') ~= run.id",
        ),
        story="a_session_is_lent_to_one_child_after_the_other",
    ),
    Guard(
        "a parked parent lends its session",
        ("  wakes = {begin_shared(run)}\n", ""),
        story="a_session_is_lent_to_one_child_after_the_other",
    ),
    Guard(
        "the next shared child begins when one has ended",
        ("  if lender then add(wakes, {begin_shared(lender)}) end\n", ""),
        story="two_lent_sessions_without_a_wake",
    ),
    Guard(
        "shared children are in front of all others",
        ("if is_lent_to(run.id) then return SHARED", "if false then return SHARED"),
        story="a_run_waits_behind_a_shared_child",
    ),
    Guard(
        "a lent session goes back to the parent",
        ("    if below then lender, next_run = given_back(S) end\n", ""),
        story="a_parent_is_woken_while_its_session_is_lent",
    ),
    Guard(
        "no message is sent again of a parent that has lent its session",
        ("if has_lent_to(held_by, run) then", "if false then"),
        story="a_parent_is_woken_while_its_session_is_lent",
    ),
    Guard(
        "a parent that was woken meanwhile gets a wake-up with its session",
        ("return run, run.state == STATE.queued and wake_of(run) or nil", "return run, nil"),
        story="a_parent_is_woken_while_its_session_is_lent",
    ),
    Guard(
        "who interrupts a lent session interrupts its parent",
        ("lowest(run.session, held)", "held"),
        story="a_lent_session_is_interrupted",
    ),
    Guard(
        "who interrupts a lent session ends the child",
        ("add(wakes, end_children(other, false))", ""),
        story="a_session_that_was_lent_twice_is_interrupted",
    ),
    Guard(
        "an interrupted parent ends when it has its session again",
        ("if PARKED[run.state] and run.cancel == '1' then", "if false then"),
        story="a_lent_session_is_interrupted",
    ),
    Guard(
        "runs that delegate, and their children, have the format that says so",
        ("'format', math.max(run.format, format), 'emit_no', batch_no)", "'emit_no', batch_no)"),
        story="a_parent_waits_for_its_child",
    ),
    Guard(
        "a run lends its session to its own children only",
        ("local child = field_of(id, 'parent') == run.id and ", "local child = "),
        story="a_shared_child_lends_the_session_to_its_own_child",
    ),
    Guard(
        "a run that has ended since it lent its session does not get it back",
        ("    if lends(run) then\n", "    if run and not TERMINAL[run.state] then\n"),
        story="a_parent_is_resumed_before_its_shared_child_has_ended",
    ),
    Guard(
        "a shared child that somebody else has resumed waits for its turn",
        ("and field_of(R, 'parent_life') ~= nil end", "end"),
        story="a_shared_child_is_resumed_by_somebody_else",
    ),
    Guard(
        "a shared child that its parent asks for again is lent the session",
        ("  if not was_awaited and child.state", "  if false and child.state"),
        story="a_parent_asks_again_for_a_shared_child_that_was_resumed",
    ),
    Guard(
        "who interrupts a lent session does not wait for the child for ever",
        ("add(wakes, interrupted(top, 'rollback', run.id))", ""),
        story="a_lent_session_is_interrupted_while_the_child_works",
    ),
    Guard(
        "children that are left alone stay children of their parent",
        ("  redis.call('SADD', k.children(parent), id)\n", ""),
        story="an_interrupted_parent_ends_its_children_in_the_background",
    ),
    Guard(
        "an approval does not wait for children",
        (" and text_in(wait, 'kind') == text_in(ended, 'kind')", ""),
        story="a_decision_does_not_wait_for_children",
    ),
    Guard(
        "a shared child writes nothing to the session",
        (
            "local is_lent = run.format >= DELEGATES and is_lent_to(run_id)",
            "local is_lent = false",
        ),
        story="a_parent_is_rolled_back_with_the_turns_of_its_children",
    ),
    Guard(
        "a parent writes the turns of its shared children",
        ("  if holds then write_held(run_id, S) end\n", ""),
        story="a_shared_child_leaves_its_turn_with_its_parent",
    ),
    Guard(
        "the turns of a parent are written once",
        ("if holds then held_is_written(run_id) end\n", ""),
        story="an_interrupted_parent_writes_the_turns_of_its_children_once",
    ),
    Guard(
        "who ends an interrupted parent by force writes the turns of its children",
        ("    write_held(run_id, run.session)\n", ""),
        story="an_interrupted_parent_is_ended_by_force",
    ),
    Guard(
        "who ends an interrupted parent by force writes these turns once",
        ("    held_is_written(run_id)\n", ""),
        story="an_interrupted_parent_is_ended_by_force",
    ),
    Guard(
        "a shared child hands on what it holds",
        ("    if kind == 'm' or kind == 'a' then redis.call('RPUSH', k.held(id), item) end\n", ""),
        story="a_shared_child_hands_on_what_it_holds",
    ),
    Guard(
        "a child gets the turns that the runs above it hold",
        ("ipairs(stack_of(run)) do\n    local from", "ipairs({run.id}) do\n    local from"),
        story="a_shared_child_leaves_its_turn_with_its_parent",
    ),
    Guard(
        "a copy of a session has the turns that are held",
        ("      write_held(id, session_id)\n", ""),
        story="a_copy_of_the_session_has_the_turns_that_the_run_holds",
    ),
    Guard(
        "a run that holds turns has the format that says so",
        (
            "  if parent.format < HOLDS_TURNS then "
            "redis.call('HSET', k.run(id), 'format', HOLDS_TURNS) end\n",
            "",
        ),
        story="the_version_before_has_begun_the_children",
    ),
    Guard(
        "a child that sees held turns has the format that says so",
        ("'format', math.max(child.format, run.format)", "'format', child.format"),
        story="the_version_before_has_begun_the_children",
    ),
    Guard(
        "a fork holds the turns that its source has got",
        ("  keep_first(k.held(from_run_id), k.held(run_id), held_to)\n", ""),
        story="a_fork_holds_the_turns_that_its_source_has_got",
    ),
    Guard(
        "a fork does not hold turns that its source has got after the checkpoint",
        (
            "keep_first(k.held(from_run_id), k.held(run_id), held_to)",
            "keep_first(k.held(from_run_id), k.held(run_id), redis.call('LLEN', k.held(from_run_id)))",
        ),
        story="a_fork_holds_the_turns_that_its_source_has_got",
    ),
    Guard(
        "what a fork holds does not expire with its source",
        ("  redis.call('PERSIST', k.held(run_id))\n", ""),
        story="a_fork_of_a_run_that_has_ended_holds_turns",
    ),
    Guard(
        "a fork holds only turns of the call that its record names",
        (" and redis.call('LINDEX', k.held(from_run_id), held_to - 1) == 't' .. held_call", ""),
        story="a_fork_holds_no_turns_that_its_source_does_not_hold",
    ),
    Guard(
        "a fork of a shared child sees the turns that the child saw",
        ("    write_held(id, session_id, tonumber(above[i + 1]), to)\n", ""),
        story="a_fork_of_a_shared_child_sees_what_the_child_saw",
    ),
    Guard(
        "a fork of a shared child does not see later turns",
        (
            "write_held(id, session_id, tonumber(above[i + 1]), to)",
            "write_held(id, session_id, tonumber(above[i + 1]))",
        ),
        story="a_fork_of_a_shared_child_sees_what_the_child_saw",
    ),
    Guard(
        "a fork of a shared child does not get written turns twice",
        (
            "write_held(id, session_id, tonumber(above[i + 1]), to)",
            "write_held(id, session_id, 0, to)",
        ),
        story="a_fork_of_a_shared_child_that_saw_written_turns",
    ),
    Guard(
        "a fork of a shared child has the state that the child saw",
        ("then change_held_state(id, session_id, to) end", "then to = to end"),
        story="a_fork_of_a_shared_child_sees_what_the_child_saw",
    ),
    Guard(
        "a fork of a shared child does not have changes of the state by later turns",
        ("then change_held_state(id, session_id, to) end", "then change_held_state(id, session_id) end"),
        story="a_fork_of_a_shared_child_sees_what_the_child_saw",
    ),
    Guard(
        "a fork of a shared child does not undo later changes of the state",
        ("if to > (held_range(id)) then change_held_state", "if true then change_held_state"),
        story="a_fork_of_a_shared_child_comes_after_the_end_of_the_run_above",
    ),
    Guard(
        "a fork of a shared child needs the turns that the child saw",
        ("if redis.call('LLEN', k.held(above[i])) < tonumber(above[i + 2]) then", "if false then"),
        story="a_fork_of_a_shared_child_needs_the_turns_of_the_run_above",
    ),
    Guard(
        "what a run holds expires with it",
        ("  if TERMINAL[parent.state] then redis.call('PEXPIRE', k.held(id), RUN_TTL_MS) end", ""),
        story="a_shared_child_ends_after_its_parent",
    ),
)
STORIES = [name for name in vars(ChildrenStories) if not name.startswith("_")]


@pytest.mark.share(of=2)
@pytest.mark.parametrize("name", STORIES)
def test_with_every_guard_the_story_ends_well(lab: Lab, name: str) -> None:
    tell(protocol_in(lab)(), name)


@pytest.mark.slow
@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name, indirect=True)
def test_without_it_a_promise_is_broken(broken: Lab, guard: Guard) -> None:
    with pytest.raises(AssertionError):
        tell(protocol_in(broken)(), guard.story)


def test_every_guard_stands_in_a_script() -> None:
    assert texts_missing(GUARDS) == []
