"""Stories of children: the only place with hand-written histories of runs that delegate.

A story chooses what is delegated by a number, as the machine does: 4 is an isolated child of `call0`, 1 and 2
are shared children of `call1` and `call0`, 3 a forked one of `call1`, 20 one of `call0` in the background.
"""

from __future__ import annotations

from openagents_worker.store import scripts
from tests.properties.machine import Attempt, Protocol, Worker
from tests.properties.truth import DELEGATES, HOLDS, Parking, Run, TurnsOfFork, Wait

__all__ = ["ChildrenStories", "tell"]

ISOLATED, SHARED, SHARED_TOO, FORKED, BACKGROUND = 4, 1, 2, 3, 20


def tell(machine: Protocol, name: str) -> None:
    """Play this story, check the invariants, and bring all runs to their end."""
    machine.holds()
    getattr(ChildrenStories(machine), name)()
    machine.holds()
    machine.teardown()


class _Words:
    def __init__(self, machine: Protocol) -> None:
        self.m = machine

    def submit(self, session: str = "s", busy: str = "", *, durable: bool = True) -> str:
        self.m.submit(session, 0, durable, 0, False, busy, lost=False)
        return max(self.m.truth.runs, key=lambda run_id: self.m.truth.runs[run_id].born)

    def claim(self, run_id: str) -> None:
        """The one worker that has been upgraded gets its message."""
        self.m.messages.remove(run_id)
        self.m.claim(self.worker, run_id)
        assert run_id in self.worker.carries, f"{run_id} was not claimed"
        self.m.holds()

    @property
    def worker(self) -> Worker:
        return self.m.workers[-1]

    def attempt(self, run_id: str) -> Attempt:
        return self.worker.carries[run_id]

    def delegates(self, run_id: str, number: int) -> str:
        """The answer of the script."""
        attempt = self.attempt(run_id)
        attempt.batch_no += 1
        self.m.execute(self.m.delegate(attempt, number, attempt.batch_no), run_id)
        self.m.holds()
        return str(self.m.last_reply.answer)

    def works(self, run_id: str, kind: str) -> None:
        self.m.step(self.worker, self.attempt(run_id), kind)
        self.m.holds()

    def waits(self, run_id: str) -> None:
        self.works(run_id, "wait_child")
        assert self.m.truth.runs[run_id].state == "waiting_child"

    def parks(self, run_id: str, parking: Parking) -> None:
        attempt = self.attempt(run_id)
        attempt.batch_no += 1
        self.m.execute(self.m.park(attempt, parking, attempt.batch_no), run_id)
        del self.worker.carries[run_id]
        self.m.holds()

    def cancel(self, run_id: str) -> None:
        self.m.cancel(sorted(self.m.requests).index(run_id), force=False, lost=False)
        self.m.holds()

    def gives_up(self, child: str, life: int) -> None:
        """The parent does not wait any more for a child, in this life."""
        call = scripts.cancel(run_id=child, reason="enough", force=False, given_up_in=life)
        run, wakes = self.m.truth.runs[child], set[str]()
        expected = "ALREADY"
        if not run.over and run.parent_life == life:
            run.parent_ended = run.parent_ended or not run.cancel
            expected, wakes = self.m.truth.cancel(child, force=False)
        cancelled = self.m.lab.run(call)
        assert cancelled.answer == expected
        self.m.send(cancelled.wakes, wakes, lost=False)
        self.m.holds()

    def resume(self, run_id: str) -> None:
        self.m.resume(sorted(self.m.truth.runs).index(run_id), lost=False)
        self.m.holds()

    def state(self, run_id: str) -> str:
        return self.m.truth.runs[run_id].state

    def turns(self, run_id: str) -> list[str]:
        """The turns that a run holds, by the calls of their children."""
        return [item for item in self.m.truth.runs[run_id].turns if item.startswith("t")]

    @property
    def transcript(self) -> list[str]:
        return self.m.truth.transcript.get("s", [])

    def forks(
        self,
        source: str,
        fork: str,
        steps: int,
        *,
        above: tuple[tuple[str, int, int], ...] = (),
        held_to: int = 0,
        held_call: str = "",
        messages: int = 0,
    ) -> None:
        """A fork in a session of its own, which has the same name."""
        run = self.m.truth.runs[source]
        asked = Run(fork, fork, "fork", run.durable, True)
        turns = TurnsOfFork(above, held_to, held_call)
        self.m.fork_to(run, asked, steps, messages, lost=False, turns=turns)
        self.m.holds()

    def last_in_state(self, session: str) -> str | None:
        """The number of the run that has written the state of the session last."""
        found: str | None = self.m.lab.redis.hget(self.m.lab.keys("session_state", session), "last")
        return found

    def number_of(self, turn: str) -> str:
        """The number that the turn of this child leaves in the state of the session."""
        parent, _, call = turn.rpartition(".")
        items = self.m.truth.runs[parent].turns
        return items[items.index(f"t{call}") - 1].removeprefix("v")

    def parent(self, *numbers: int) -> str:
        """A run that delegates and waits."""
        run_id = self.submit()
        self.claim(run_id)
        for number in numbers:
            assert self.delegates(run_id, number) == "NEW"
        self.waits(run_id)
        return run_id


class ChildrenStories(_Words):
    def a_parent_waits_for_its_child(self) -> None:
        run = self.parent(ISOLATED)
        self.claim(f"{run}.call0")
        self.works(f"{run}.call0", "finish")
        self.claim(run)
        self.works(run, "commit")
        self.works(run, "finish")

    def a_child_ends_before_its_parent_parks(self) -> None:
        run = self.submit()
        self.claim(run)
        self.delegates(run, ISOLATED)
        self.claim(f"{run}.call0")
        self.works(f"{run}.call0", "finish")
        self.works(run, "wait_child")
        assert self.state(run) == "queued"

    def the_same_call_finds_its_child(self) -> None:
        """Also when the child has ended; but no child of another call."""
        run = self.submit()
        self.claim(run)
        assert self.delegates(run, ISOLATED) == "NEW"
        assert self.delegates(run, ISOLATED) == "SAME"
        self.claim(f"{run}.call0")
        self.works(f"{run}.call0", "finish")
        assert self.delegates(run, ISOLATED) == "ENDED"

    def a_child_has_the_id_of_another_run(self) -> None:
        run = self.submit()
        stranger = Run(f"{run}.call0", "t", "same")
        self.m.requests[stranger.id] = stranger
        self.m.offer(stranger, 0, 0, False, lost=False)
        self.claim(run)
        assert self.delegates(run, ISOLATED) == "CONFLICT"

    def a_cancelled_run_delegates_no_more(self) -> None:
        run = self.submit()
        self.claim(run)
        self.cancel(run)
        assert self.delegates(run, ISOLATED) == "CANCEL"

    def a_parent_is_cancelled_while_it_waits(self) -> None:
        """One child is being executed, one is not; one of them works in the background."""
        run = self.parent(BACKGROUND, FORKED)
        self.claim(f"{run}.call1")
        self.cancel(run)
        assert self.state(f"{run}.call0") == "cancelled"
        self.works(f"{run}.call1", "obey")

    def a_child_in_the_background_goes_on(self) -> None:
        run = self.submit()
        self.claim(run)
        self.delegates(run, BACKGROUND)
        self.works(run, "finish")
        self.claim(f"{run}.call0")
        self.works(f"{run}.call0", "finish")

    def a_parent_ends_without_its_child(self) -> None:
        run = self.submit()
        self.claim(run)
        self.delegates(run, ISOLATED)
        self.works(run, "finish")
        assert self.state(f"{run}.call0") == "cancelled"

    def the_next_life_continues_the_child(self) -> None:
        run = self.parent(ISOLATED)
        child = f"{run}.call0"
        self.claim(child)
        self.works(child, "commit")
        self.cancel(run)
        self.resume(run)
        self.claim(run)
        assert self.delegates(run, ISOLATED) == "STOPPING"
        self.works(child, "obey")
        assert "child:call0" not in self.m.truth.runs[run].facts
        assert self.delegates(run, ISOLATED) == "NEW"
        self.waits(run)
        self.claim(child)
        self.works(child, "finish")
        assert self.state(run) == "queued"

    def a_child_that_was_given_up_is_asked_for_again(self) -> None:
        """It continues, in another life. One that somebody else has cancelled stays cancelled."""
        run = self.submit()
        self.claim(run)
        self.delegates(run, ISOLATED)
        child = f"{run}.call0"
        self.claim(child)
        self.works(child, "commit")
        self.gives_up(child, 1)
        assert self.delegates(run, ISOLATED) == "STOPPING"
        self.works(child, "obey")
        assert self.delegates(run, ISOLATED) == "NEW"
        self.claim(child)
        self.cancel(child)
        self.gives_up(child, 1)
        self.works(child, "obey")
        assert self.delegates(run, ISOLATED) == "ENDED"

    def a_child_is_given_up_by_an_earlier_life(self) -> None:
        """The worker of that life was slow. The child is that of the new life."""
        run = self.parent(ISOLATED)
        self.cancel(run)
        self.resume(run)
        self.claim(run)
        assert self.delegates(run, ISOLATED) == "NEW"
        self.gives_up(f"{run}.call0", 1)
        assert self.state(f"{run}.call0") == "queued"

    def a_child_is_resumed_by_somebody_else(self) -> None:
        """In that life it does not report to its parent."""
        run = self.parent(ISOLATED)
        child = f"{run}.call0"
        self.cancel(child)
        self.claim(run)
        self.works(run, "commit")
        self.resume(child)
        self.claim(child)
        self.works(child, "finish")

    def a_session_is_lent_to_one_child_after_the_other(self) -> None:
        run = self.parent(SHARED, SHARED_TOO)
        other = self.submit()
        first, second = f"{run}.call1", f"{run}.call0"
        assert (self.state(first), self.state(second)) == ("queued", "waiting_session")
        self.m.send_fact(sorted(self.m.requests).index(run), "signal:a:", "", lost=False)
        self.claim(first)
        self.works(first, "finish")
        self.m.holds()
        if run in self.m.messages:
            self.claim(run)
            self.works(run, "commit")
            self.waits(run)
        self.claim(second)
        self.works(second, "finish")
        self.claim(run)
        self.works(run, "finish")
        assert self.state(other) == "queued"

    def two_lent_sessions_without_a_wake(self) -> None:
        """The parent waits until both shared children have ended."""
        run = self.submit()
        self.claim(run)
        self.delegates(run, SHARED)
        self.delegates(run, SHARED_TOO)
        attempt = self.attempt(run)
        self.parks(run, self.m.waits_for_children(attempt, number=1))  # for all of them
        for child in (f"{run}.call1", f"{run}.call0"):
            self.claim(child)
            self.works(child, "finish")
        self.claim(run)

    def a_shared_child_is_cancelled_before_its_parent_parks(self) -> None:
        """The parent keeps its session."""
        run = self.submit()
        self.claim(run)
        self.delegates(run, SHARED)
        self.delegates(run, SHARED_TOO)
        self.cancel(f"{run}.call1")
        assert self.state(f"{run}.call0") == "waiting_session"
        self.works(run, "emit")

    def a_run_waits_behind_a_shared_child(self) -> None:
        run = self.submit()
        self.claim(run)
        other = self.submit()
        self.delegates(run, SHARED)
        self.waits(run)
        assert (self.state(f"{run}.call1"), self.state(other)) == ("queued", "waiting_session")

    def a_parent_is_woken_while_its_session_is_lent(self) -> None:
        """It continues when it has its session again."""
        run = self.parent(ISOLATED, SHARED)
        isolated, shared = f"{run}.call0", f"{run}.call1"
        self.claim(isolated)
        self.works(isolated, "finish")
        self.m.messages.remove(run)
        self.m.claim(self.worker, run)
        assert (run in self.worker.carries, self.state(run)) == (False, "queued")
        self.m.holds()
        self.m.let_pass(2)
        self.m.resend(None, lost=False)
        assert run not in self.m.messages
        self.m.messages.remove(shared)  # which was sent again
        self.m.beat(-1)
        self.claim(shared)
        self.works(shared, "finish")
        self.claim(run)

    def a_lent_session_is_interrupted(self) -> None:
        for busy in ("interrupt", "rollback"):
            run = self.parent(SHARED)
            self.submit(busy=busy)
            child = f"{run}.call1"
            assert self.state(child) == "cancelled"
            self.m.holds()
            self.m.end_fairly()

    def a_session_that_was_lent_twice_is_interrupted(self) -> None:
        """All who have lent it end, not only the one who has it."""
        run = self.parent(SHARED)
        child = f"{run}.call1"
        self.claim(child)
        self.delegates(child, SHARED)
        self.waits(child)
        self.submit(busy="interrupt")
        assert (self.state(child), self.state(f"{child}.call1")) == ("cancelled", "cancelled")

    def the_run_that_holds_a_lent_session_is_lost(self) -> None:
        run = self.parent(SHARED)
        self.submit()
        child = f"{run}.call1"
        del self.m.truth.runs[child]
        self.m.lab.forget(child)
        self.submit()
        assert self.m.truth.holder("s") == run
        self.cancel(run)

    def a_shared_child_lends_the_session_to_its_own_child(self) -> None:
        """Also if another child of its parent waits in front of it."""
        run = self.parent(SHARED, SHARED_TOO)
        first, second = f"{run}.call1", f"{run}.call0"
        self.claim(first)
        self.delegates(first, SHARED)
        self.waits(first)
        assert (self.state(f"{first}.call1"), self.state(second)) == ("queued", "waiting_session")
        self.claim(f"{first}.call1")
        self.works(f"{first}.call1", "finish")
        self.claim(first)
        self.works(first, "commit")
        self.works(first, "finish")

    def a_parent_is_resumed_before_its_shared_child_has_ended(self) -> None:
        """It has a place in the queue, like any run that is resumed."""
        run = self.parent(SHARED)
        child = f"{run}.call1"
        self.claim(child)
        self.cancel(run)
        self.resume(run)
        assert self.state(run) == "waiting_session"
        self.works(child, "obey")
        assert self.state(run) == "queued"
        self.claim(run)

    def a_shared_child_is_resumed_by_somebody_else(self) -> None:
        """It waits for its turn, and its parent lends the session to the others only."""
        run = self.submit()
        self.claim(run)
        self.delegates(run, SHARED)
        self.cancel(f"{run}.call1")
        self.resume(f"{run}.call1")
        self.delegates(run, SHARED_TOO)
        parking = Parking("waiting_child", (Wait("child:call0"),))
        self.parks(run, parking)
        assert self.state(run) == "queued", "the first child has ended meanwhile"
        self.claim(run)
        self.parks(run, parking)
        assert (self.state(f"{run}.call0"), self.state(f"{run}.call1")) == ("queued", "waiting_session")
        self.claim(f"{run}.call0")
        self.works(f"{run}.call0", "finish")
        self.claim(run)
        self.works(run, "finish")
        assert self.state(f"{run}.call1") == "queued"

    def a_parent_asks_again_for_a_shared_child_that_was_resumed(self) -> None:
        """From then on the child works in the lent session."""
        run = self.parent(SHARED)
        other, child = self.submit(), f"{run}.call1"
        self.cancel(run)
        self.resume(run)
        self.resume(child)
        self.claim(other)
        self.works(other, "finish")
        self.claim(run)
        assert self.delegates(run, SHARED) == "SAME"
        self.waits(run)
        assert self.state(child) == "queued"

    def a_lent_session_is_interrupted_while_the_child_works(self) -> None:
        """A child that does not end in time is ended by force, as any interrupted run is."""
        run = self.parent(SHARED)
        child = f"{run}.call1"
        self.claim(child)
        self.submit(busy="rollback")
        assert (self.state(run), self.state(child)) == ("cancelled", "running")
        self.m.let_pass(2)
        self.m.beat(len(self.m.workers) - 1)
        self.m.wake(100, lost=False)
        assert self.state(child) == "cancelled"

    def an_interrupted_parent_ends_its_children_in_the_background(self) -> None:
        """They end with it, as those of any cancelled run do."""
        run = self.parent(BACKGROUND, SHARED)
        self.submit(busy="interrupt")
        assert (self.state(f"{run}.call1"), self.state(f"{run}.call0")) == ("cancelled", "queued")
        self.claim(run)
        self.works(run, "obey")
        assert self.state(f"{run}.call0") == "cancelled"

    def a_shared_child_leaves_its_turn_with_its_parent(self) -> None:
        """The next child and the parent are told of it, and the end of the parent writes it."""
        run = self.parent(SHARED, SHARED_TOO)
        first, second = f"{run}.call1", f"{run}.call0"
        self.claim(first)
        self.works(first, "finish")
        assert (len(self.turns(run)), self.transcript) == (1, [])
        if run in self.m.messages:
            self.claim(run)
            self.works(run, "commit")
            self.waits(run)
        self.claim(second)
        self.works(second, "finish")
        assert (len(self.turns(run)), self.transcript) == (2, [])
        self.claim(run)
        self.works(run, "finish")
        assert len(self.transcript) == 6

    def a_parent_is_rolled_back_with_the_turns_of_its_children(self) -> None:
        run = self.parent(SHARED)
        self.claim(f"{run}.call1")
        self.works(f"{run}.call1", "finish")
        self.submit(busy="rollback")
        assert (self.state(run), self.transcript) == ("cancelled", [])

    def a_shared_child_hands_on_what_it_holds(self) -> None:
        run = self.parent(SHARED)
        middle = f"{run}.call1"
        self.claim(middle)
        self.delegates(middle, SHARED)
        self.waits(middle)
        self.claim(f"{middle}.call1")
        self.works(f"{middle}.call1", "finish")
        self.claim(middle)
        self.works(middle, "commit")
        self.works(middle, "finish")
        assert (len(self.turns(run)), self.transcript) == (1, [])
        self.claim(run)
        self.works(run, "finish")
        assert len(self.transcript) == 6

    def an_interrupted_parent_writes_the_turns_of_its_children_once(self) -> None:
        """Also if it is continued in another life."""
        run = self.parent(SHARED)
        self.claim(f"{run}.call1")
        self.works(f"{run}.call1", "finish")
        self.claim(run)
        self.submit(busy="interrupt")
        self.works(run, "obey")
        assert len(self.transcript) == 4
        self.resume(run)

    def an_interrupted_parent_is_ended_by_force(self) -> None:
        """Whoever writes its turn writes those of its children before it."""
        run = self.parent(SHARED)
        self.claim(f"{run}.call1")
        self.works(f"{run}.call1", "finish")
        self.claim(run)
        self.submit(busy="interrupt")
        self.m.let_pass(2)
        self.m.beat(len(self.m.workers) - 1)
        self.m.wake(100, lost=False)
        assert (self.state(run), len(self.transcript)) == ("cancelled", 4)

    def a_copy_of_the_session_has_the_turns_that_the_run_holds(self) -> None:
        run = self.parent(SHARED_TOO)
        child = f"{run}.call0"
        self.claim(child)
        self.works(child, "finish")
        self.claim(run)
        self.works(run, "commit")
        assert self.delegates(run, FORKED) == "NEW"
        assert len(self.m.truth.transcript[f"forked session of {run}.call1"]) == 2

    def _two_shared_children(self) -> tuple[str, str, str, int]:
        """A run with the turns of two shared children, of which the second one has seen the first. Returns
        the run, both children, and the number of the items of the first turn."""
        run = self.parent(SHARED, SHARED_TOO)
        first, second = f"{run}.call1", f"{run}.call0"
        self.claim(first)
        self.works(first, "finish")
        items = len(self.m.truth.runs[run].turns)
        if run in self.m.messages:
            self.claim(run)
            self.works(run, "commit")
            self.waits(run)
        self.claim(second)
        self.works(second, "commit")
        self.works(second, "finish")
        return run, first, second, items

    def a_fork_holds_the_turns_that_its_source_has_got(self) -> None:
        """Not those that it has got after the checkpoint. The end of the fork writes them."""
        run, _, _, items = self._two_shared_children()
        self.claim(run)
        self.works(run, "commit")
        self.forks(run, "fork", 1, held_to=items, held_call="call1")
        assert (self.turns("fork"), len(self.turns(run))) == (["tcall1"], 2)
        self.claim("fork")
        self.works("fork", "finish")
        assert len(self.m.truth.transcript["fork"]) == 4

    def a_fork_of_a_run_that_has_ended_holds_turns(self) -> None:
        """They do not expire with those of its source."""
        run, _, _, items = self._two_shared_children()
        self.claim(run)
        self.works(run, "commit")
        self.works(run, "finish")
        self.forks(run, "fork", 1, held_to=items, held_call="call1")
        assert self.turns("fork") == ["tcall1"]

    def a_fork_holds_no_turns_that_its_source_does_not_hold(self) -> None:
        """The record of the call is a copy, too: that of a run of which the source is a fork."""
        run, _, _, items = self._two_shared_children()
        self.claim(run)
        self.works(run, "commit")
        self.forks(run, "fork", 1, held_to=items, held_call="another")
        assert self.turns("fork") == []

    def a_fork_of_a_shared_child_sees_what_the_child_saw(self) -> None:
        """And not the turns that the run above has got after the child had begun."""
        run, _, second, items = self._two_shared_children()
        self.forks(second, "fork", 0, above=((run, 0, items),))
        assert len(self.m.truth.transcript["fork"]) == 2
        assert self.last_in_state("fork") == self.number_of(f"{run}.call1")

    def a_fork_of_a_shared_child_comes_after_the_end_of_the_run_above(self) -> None:
        """The session has the turns, and later changes of its state. What it had when the child began is not
        known any more, so the fork gets the newest state, as every fork does."""
        run, _, second, items = self._two_shared_children()
        self.claim(run)
        self.works(run, "commit")
        self.works(run, "finish")
        self.forks(second, "fork", 0, above=((run, 0, items),))
        assert len(self.m.truth.transcript["fork"]) == 2
        assert self.last_in_state("fork") == self.last_in_state("s")
        assert self.last_in_state("s") != self.number_of(f"{run}.call1")

    def a_fork_of_a_shared_child_that_saw_written_turns(self) -> None:
        """They are in the first messages of the session, and do not come twice."""
        run, _, second, items = self._two_shared_children()
        self.forks(second, "fork", 0, above=((run, items, items),))
        assert self.m.truth.transcript["fork"] == []

    def a_fork_of_a_shared_child_needs_the_turns_of_the_run_above(self) -> None:
        """They have expired with that run."""
        run, _, second, items = self._two_shared_children()
        self.cancel(run)
        del self.m.truth.runs[run]
        self.m.lab.forget(run)
        self.forks(second, "fork", 0, above=((run, 0, items),))
        assert "fork" not in self.m.truth.runs

    def a_shared_child_ends_after_its_parent(self) -> None:
        """Its parent holds its turn nevertheless: its next life may want it."""
        run = self.parent(SHARED)
        child = f"{run}.call1"
        self.claim(child)
        self.cancel(run)
        self.works(child, "finish")
        assert (self.state(run), self.state(child), len(self.turns(run))) == ("cancelled", "completed", 1)

    def the_version_before_has_begun_the_children(self) -> None:
        """Its workers must not execute the next child, which sees the turn of the first one."""
        run = self.parent(SHARED, SHARED_TOO)
        first, second = f"{run}.call1", f"{run}.call0"
        for run_id in (run, first, second):
            self.m.truth.runs[run_id].format = DELEGATES
            self.m.lab.redis.hset(self.m.lab.keys("run", run_id), "format", DELEGATES)
        self.claim(first)
        self.works(first, "finish")
        if run in self.m.messages:
            self.claim(run)
            self.waits(run)
        assert {self.m.truth.runs[run_id].format for run_id in (run, second)} == {HOLDS}

    def a_decision_does_not_wait_for_children(self) -> None:
        """Those who are waited for together are the approvals, or the children."""
        run = self.submit()
        self.claim(run)
        self.delegates(run, ISOLATED)
        waits = (Wait("approval:x", needs_all=True), Wait("child:call0", needs_all=True))
        self.parks(run, Parking("awaiting_approval", waits))
        self.m.send_fact(sorted(self.m.requests).index(run), "approval:x", "", lost=False)
        assert self.state(run) == "queued"
