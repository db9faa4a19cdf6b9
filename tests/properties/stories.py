"""Stories: the only place with hand-written histories that random ones rarely produce.

Each shows a guard at work.

The acts are those of the machine. Where an act chooses, 0 means the first of the possibilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from openagents_worker.errors import OpenAgentsError, RedisRefused, RedisWrongType
from tests.properties.machine import Protocol, Way
from tests.properties.truth import MAX_RECOVERIES, Run

__all__ = ["Stories", "tell"]


def tell(machine: Protocol, name: str) -> None:
    """Play this story, check the invariants, and bring all runs to their end."""
    machine.holds()
    getattr(Stories(machine), name)()
    machine.holds()
    machine.teardown()


class _Words:
    """Steps that stories have in common."""

    def __init__(self, machine: Protocol) -> None:
        self.m = machine

    def submit(
        self,
        session: str = "s",
        *,
        durable: bool = True,
        tell: bool = False,
        expires: float = 0,
        busy: str = "",
    ) -> None:
        self.m.submit(session, 0, durable, expires, tell, busy, lost=False)

    def three_in_a_session(self) -> None:
        for _ in range(3):
            self.submit()

    def deliver(self, worker: int, way: Way = "answered", *, doubled: bool = False) -> None:
        self.m.deliver(worker, 0, doubled, way)
        self.m.holds()

    def work(self, kind: str) -> None:
        self.m.work(0, 0, kind, "answered")
        self.m.holds()

    def die(self) -> None:
        self.m.die_at_work(0, lost=False, blameless=False)
        self.m.holds()

    def cancel(self, *, force: bool = False) -> None:
        self.m.cancel(0, force, lost=False)
        self.m.holds()

    def resend(self) -> None:
        self.m.resend(None, lost=False)
        self.m.holds()

    def give_up(self, worker: int) -> None:
        """Its connection has been closed for long enough, and a worker checks."""
        self.m.beat(worker)
        self.m.cut(worker)
        self.m.look()
        self.m.let_pass(2)
        self.m.look()
        self.m.holds()

    def reclaim(self) -> None:
        self.m.reclaim(100, blameless=False, lost=False)
        self.m.holds()

    def die_as(self, worker: int) -> None:
        """This worker dies, instead of the first one that executes runs."""
        self.m.die_at_work([w.listens for w in self.m.at_work].index(worker != 1), False, False)
        self.m.holds()

    @property
    def only_run(self) -> str:
        [run_id] = self.m.truth.runs
        return run_id


@contextmanager
def stopped_by_nothing() -> Iterator[None]:
    """No script fails in this block."""
    try:
        yield
    except RedisRefused as error:
        raise AssertionError(f"a script was stopped: {error.message}") from error


NEW = 2  # the one worker that has been upgraded


class Stories(_Words):
    # --- Redis forgets a second ---

    def two_workers_get_the_same_number(self) -> None:
        self.submit()
        self.m.write_to_disk()
        self.deliver(0, doubled=True)
        self.m.lose_what_is_not_on_disk()
        self.deliver(1)
        self.work("commit")  # of the first one, who knows nothing

    def a_message_is_older_than_the_memory_of_redis(self) -> None:
        self.submit()
        self.submit()
        self.m.write_to_disk()
        self.deliver(0)
        self.work("finish")
        self.m.lose_what_is_not_on_disk()
        self.deliver(1)  # the second run, which waits again

    def a_record_is_forgotten(self) -> None:
        self.submit()
        self.deliver(0)
        self.m.write_to_disk()
        self.work("commit")
        self.m.lose_what_is_not_on_disk()
        self.work("commit")

    def _forgets_a_record_before(self, kind: str) -> None:
        self.submit()
        self.deliver(NEW)
        self.m.write_to_disk()
        self.work("commit")
        self.m.lose_what_is_not_on_disk()
        self.work(kind)

    def a_record_is_forgotten_before_a_payment(self) -> None:
        """Nothing may be paid because of a record that Redis has lost."""
        self._forgets_a_record_before("pay")

    def a_record_is_forgotten_before_a_question(self) -> None:
        self._forgets_a_record_before("question")

    def a_question_is_forgotten_before_the_run_waits_for_its_answer(self) -> None:
        """Nobody would ever be asked."""
        self.submit()
        self.deliver(NEW)
        self.work("commit")
        self.m.write_to_disk()
        self.work("question")
        self.m.lose_what_is_not_on_disk()
        self.work("ask")

    # --- deaths ---

    def a_run_kills_three_workers(self) -> None:
        self.submit()
        for _ in range(3):
            self.deliver(0)
            self.die()

    def two_suspects_meet(self) -> None:
        self.submit("s")
        self.submit("t")
        self.deliver(0)
        self.deliver(0)
        self.die()
        self.deliver(0)
        self.deliver(0)  # of the other group
        self.work("commit")
        self.m.wake(100, lost=False)
        self.deliver(0)

    def two_of_a_group_die_too_often_together(self) -> None:
        for session in "stuv":
            self.submit(session)
        for _ in range(4):
            self.deliver(0)
        self.die()
        for attempt_result in (2, 1):
            for _ in range(4):
                self.m.messages.sort(key=lambda run_id: self.m.truth.runs[run_id].suspicion.group)
                if self.m.messages:
                    self.deliver(0)
            assert len(self.m.workers[0].carries) == attempt_result
            self.die()

    def new_suspects_die_with_an_old_one(self) -> None:
        self.submit("s")
        self.submit("t")
        self.deliver(0)
        self.deliver(0)
        self.die()
        self.deliver(0)
        for session in "uvw":
            self.submit(session)
            self.m.messages.insert(0, self.m.messages.pop())
            self.deliver(0)
        self.die()

    def _claim(self, worker: int, run_id: str) -> None:
        self.m.claim(self.m.workers[worker], run_id)
        self.m.holds()

    def _dies_beside_a_run_with_a_record(self, times: int) -> tuple[str, str]:
        """Returns the run without a record, which is the only suspect each time, and its neighbour."""
        others = set(self.m.truth.runs)
        self.submit("s")
        self.submit("t")
        suspect, neighbour = sorted(set(self.m.truth.runs) - others)
        for number in range(times):
            self._claim(0, neighbour)
            if number > MAX_RECOVERIES:  # the worker was kept free for the suspect
                self.m.let_pass(2)
                self.m.wake(100, lost=False)
                self.m.beat(0)
                self._claim(0, neighbour)
            self.m.step(self.m.workers[0], self.m.workers[0].carries[neighbour], "commit")
            self._claim(0, suspect)
            self.die()
        return suspect, neighbour

    def a_run_dies_too_often_beside_a_run_with_a_record(self) -> None:
        """It is not poisoned yet, but executed once more, alone."""
        self.submit("r")
        self._claim(1, self.only_run)
        suspect, neighbour = self._dies_beside_a_run_with_a_record(3)
        self._claim(1, suspect)  # not beside another run
        self._claim(0, neighbour)  # it comes first, but the worker is kept free
        self.m.wake(100, lost=False)
        self._claim(0, suspect)
        self.m.wake(100, lost=False)
        self._claim(0, neighbour)  # not beside the suspect
        self.die_as(0)

    def no_worker_is_empty(self) -> None:
        """A run that kills ends although other runs are beside it each time."""
        self._dies_beside_a_run_with_a_record(6)

    def a_run_is_executed_alone_for_long(self) -> None:
        """After some time, its worker takes other runs again."""
        suspect, neighbour = self._dies_beside_a_run_with_a_record(3)
        self._claim(0, suspect)
        for _ in range(3):
            self.m.let_pass(1)
            self.m.beat(0)
        self._claim(0, neighbour)

    def a_run_dies_after_a_record(self) -> None:
        self.submit("s")
        self.submit("t")
        self.deliver(0)
        self.work("commit")
        self.deliver(0)
        self.die()

    def a_worker_answers_after_its_lease(self) -> None:
        self.submit("s")
        self.submit("t")
        self.deliver(0)
        self.deliver(0)
        self.m.let_pass(1)
        self.m.beat(1)
        self.m.beat(2)
        self.m.let_pass(3)
        self.m.beat(0)  # the only one whose lease is over
        self.m.reclaim(100, blameless=False, lost=False)

    def a_worker_answers_after_its_runs_were_reclaimed(self) -> None:
        self.submit("s")
        self.submit("t")
        self.m.let_pass(1)
        self.m.beat(0)
        self.deliver(0)
        self.deliver(0)
        self.m.let_pass(3)
        self.m.beat(1)
        self.m.beat(2)
        self.m.let_pass(1)
        while self.m.reclaim_some(100, blameless=False, lost=False):
            self.m.holds()
        self.deliver(1)
        self.m.beat(0)
        self.m.holds()
        self.deliver(1)

    def a_worker_answers_too_often(self) -> None:
        self.submit("s")
        for _ in range(5):
            self.deliver(0)
            self.m.let_pass(4)
            self.m.beat(0)
            while self.m.reclaim_some(100, blameless=False, lost=False):
                self.m.holds()

    def several_workers_lose_their_leases_while_redis_is_silent(self) -> None:
        self.submit("s")
        self.submit("t")
        self.deliver(0)
        self.deliver(1)
        self.m.kill(2)
        self.m.let_pass(4)
        while self.m.reclaim_some(100, blameless=False, lost=False):
            self.m.holds()

    def the_second_of_two_leases_is_lost_a_moment_later(self) -> None:
        self.submit("s")
        self.submit("t")
        self.deliver(0)
        self.m.kill(1)
        self.m.kill(2)
        self.deliver(1)
        for worker in self.m.workers[:2]:  # nobody else loses a lease then
            self.m.lab.end_lease(worker.incarnation, 1000)
            self.m.truth.leases[worker.incarnation] = self.m.truth.now - 1000
            self.m.holds()
            self.m.reclaim_some(1, blameless=False, lost=False)
            self.m.holds()

    def the_watchdog_names_a_run_twice(self) -> None:
        self.submit("s")
        self.submit("t")
        for _ in range(2):
            self.deliver(0)
            self.deliver(0)
            self.m.end_by_watchdog(0, 0, lost=False)
            self.m.holds()
            self.m.messages.sort()

    def a_lease_is_lost_when_a_watchdog_ends_another_process(self) -> None:
        self.submit("s")
        self.submit("t")
        self.deliver(0)
        self.deliver(1)
        other = self.m.workers[1].incarnation
        self.m.lab.end_lease(other, 0)
        self.m.truth.leases[other] = self.m.truth.now
        self.m.end_by_watchdog(0, 0, lost=False)
        self.m.holds()
        while self.m.reclaim_some(100, blameless=False, lost=False):
            self.m.holds()

    def the_watchdog_of_a_worker_that_has_lost_its_run_names_it(self) -> None:
        self.submit("s")
        self.deliver(0)
        self.m.let_pass(1)
        self.cancel(force=True)
        self.m.end_by_watchdog(0, 0, lost=False)

    def a_worker_dies_with_a_run_that_is_not_durable(self) -> None:
        self.submit(durable=False)
        self.deliver(0)
        self.die()

    def two_runs_of_a_dead_worker_are_reclaimed_one_by_one(self) -> None:
        self.submit("s")
        self.submit("t")
        self.deliver(0)
        self.deliver(0)
        self.m.kill(0)
        self.m.let_pass(4)
        for _ in range(4):
            self.m.reclaim(1, blameless=True, lost=False)
            self.m.holds()

    def a_former_owner_releases_its_run(self) -> None:
        self.submit()
        self.deliver(0)
        self.die()
        self.deliver(1)
        self.m.write_late(0, "lost")

    def a_worker_with_runs_retires(self) -> None:
        self.submit()
        self.deliver(0)
        self.m.retire(0)

    def two_programs_share_a_fence(self) -> None:
        self.submit()
        self.deliver(0)
        self.m.zombies.append(replace(next(iter(self.m.workers[0].carries.values()))))
        self.work("commit")
        self.m.write_late(0, "commit")

    # --- leases that end early ---

    def the_lease_of_a_live_worker_is_ended(self) -> None:
        self.submit()
        self.deliver(0)
        self.give_up(0)
        self.reclaim()
        self.m.beat(0)

    def a_worker_reports_that_it_is_alive_before_its_runs_are_reclaimed(self) -> None:
        self.submit()
        self.deliver(0)
        self.give_up(0)
        self.m.beat(0)
        self.reclaim()

    def a_worker_lives_whose_run_has_killed_another(self) -> None:
        self.submit()
        self.deliver(0)
        self.give_up(0)
        self.reclaim()
        self.deliver(1)
        self.m.work(1, 0, "commit", "answered")
        self.die_as(1)
        self.m.beat(0)

    def a_worker_lives_whose_run_has_another_life(self) -> None:
        self.submit()
        self.deliver(0)
        self.work("commit")
        self.give_up(0)
        self.reclaim()
        self.cancel(force=True)
        self.m.resume(0, lost=False)
        self.m.messages.reverse()
        self.deliver(1)
        self.die_as(1)
        self.m.beat(0)

    def a_server_has_never_seen_the_connection(self) -> None:
        self.submit()
        self.deliver(0)
        self.m.beat(0)
        self.m.write_to_disk()
        self.m.lose_what_is_not_on_disk()
        self.m.look()
        self.m.let_pass(2)
        self.m.look()

    def a_connection_cannot_be_seen(self) -> None:
        self.m.beat(1)
        self.m.look()
        self.m.let_pass(2)
        self.m.look()

    def a_connection_is_lost_and_opened_again(self) -> None:
        self.m.beat(0)
        self.m.cut(0)
        self.m.look()
        self.m.connect_again(0)
        self.m.let_pass(2)
        self.m.look()
        self.m.cut(0)
        self.m.look()

    def a_worker_renews_and_is_late_the_next_time(self) -> None:
        self.m.beat(0)
        self.m.cut(0)
        self.m.look()
        self.m.let_pass(1)
        self.m.beat(0)
        self.m.let_pass(2)
        self.m.cut(0)
        self.m.look()

    def a_connection_is_cut_long_before_the_next_beat(self) -> None:
        self.m.beat(0)
        self.m.cut(0)
        self.m.look()
        self.m.let_pass(1)
        self.m.look()

    def a_connection_is_cut_when_a_beat_is_late(self) -> None:
        self.m.beat(0)
        self.m.let_pass(2)
        self.m.cut(0)
        self.m.look()

    def a_worker_without_a_connection_has_a_run_that_is_not_durable(self) -> None:
        self.submit(durable=False)
        self.deliver(0)
        self.give_up(0)

    def a_worker_of_the_host_sees_another_process_die(self) -> None:
        self.submit()
        self.deliver(0)
        self.m.see_another_process_dead(0)

    def a_worker_of_the_host_sees_a_death(self) -> None:
        self.submit()
        self.deliver(0)
        self.m.kill(0)
        self.m.see_dead(0)
        self.m.holds()
        self.reclaim()
        self.deliver(1)

    def the_leases_of_three_live_workers_are_ended(self) -> None:
        for _ in range(4):
            self.give_up(0)
            self.m.beat(0)
            self.m.holds()

    def three_processes_are_seen_dead_and_live(self) -> None:
        for _ in range(4):
            self.m.end_lease(self.m.workers[0].incarnation)
            self.m.beat(0)
            self.m.holds()

    # --- parked runs ---

    def _parks(self, kind: str) -> None:
        self.submit()
        self.deliver(NEW)
        self.work(kind)

    def _send(self, name: str, message_id: str = "") -> None:
        self.m.send_fact(0, name, message_id, lost=False)
        self.m.holds()

    def a_value_wakes_a_parked_run(self) -> None:
        self._parks("receive")
        self._send("signal:b:")
        self._send("signal:a:")
        self.deliver(NEW)
        self._send("signal:a:")
        self.work("commit")

    def a_value_comes_while_the_run_parks(self) -> None:
        """The worker has not read it: the script that parks the run must find it."""
        self.submit()
        self.deliver(NEW)
        self._send("signal:a:")
        self.work("receive")
        self.deliver(NEW)
        self.work("commit")

    def a_value_is_sent_twice(self) -> None:
        self.submit()
        self._send("signal:a:", "m1")
        self._send("signal:a:", "m1")
        self._send("signal:a:", "m2")

    def a_value_is_sent_to_a_full_redis(self) -> None:
        """Nobody has accepted it, so it takes the place of no other value."""
        self.submit()
        self._send("signal:a:")
        self.m.lab.redis.config_set("maxmemory", 1)
        try:
            with suppress(OpenAgentsError):
                self.m.send_fact(0, "signal:a:", "", lost=False)
        finally:
            self.m.lab.redis.config_set("maxmemory", 0)
        self.m.holds()
        self._send("signal:a:")

    def an_id_of_a_run_is_used_again(self) -> None:
        """The messages of the earlier run do not count for the new one."""
        self.submit()
        self._send("signal:a:", "m1")
        self.cancel()
        self.m.forget(0)
        self.m.submit_again(0, "same", lost=False)
        self._send("signal:a:", "m1")

    def an_id_of_a_run_is_used_again_in_another_session(self) -> None:
        """The list of the first session still has it; the run does not belong to that session."""
        self.submit()
        self.cancel()
        first = self.m.requests[self.only_run]
        self.m.forget(0)
        self.m.requests[first.id] = replace(first, session="t")
        self.m.submit_again(0, "other", lost=False)
        self.m.delete_session("s", False)
        self.cancel()
        self.m.delete_session("s", False)

    def two_decisions_are_made(self) -> None:
        self._parks("ask")
        self._send("approval:x")
        self._send("approval:x")
        self._send("approval:y")
        self.deliver(NEW)

    def a_message_comes_to_a_parked_run(self) -> None:
        self.submit()
        self.deliver(NEW, doubled=True)
        self.work("receive")
        self.deliver(NEW)

    def a_parked_run_times_out(self) -> None:
        self._parks("receive_in_time")
        self.m.wake(100, lost=False)
        self.m.let_pass(2)
        self.m.wake(100, lost=False)
        self.deliver(NEW)

    def a_parked_run_is_cancelled_before_its_time(self) -> None:
        self._parks("sleep")
        self.cancel()
        self.m.let_pass(4)
        self.m.wake(100, lost=False)
        self._send("signal:a:")

    # --- payments ---

    def _decide(self, action: str) -> None:
        self.m.decide_of(self.m.truth_ids[0], action, "", lost=False)
        self.m.holds()

    def _pays_and_dies(self) -> None:
        self.submit()
        self.deliver(NEW)
        self.work("pay")
        self.die()

    def a_payment_is_interrupted(self) -> None:
        """The next worker finds the intent, waits, and pays when somebody has decided that it may."""
        self._pays_and_dies()
        self.deliver(NEW)
        self.work("pay")
        self._decide("rerun")
        self._decide("skip")
        self.deliver(NEW)
        self.work("pay")
        self.work("pay")

    def a_payment_is_decided_while_the_next_worker_prepares(self) -> None:
        """It has not read the decision: the script that stores the intent must tell it."""
        self._pays_and_dies()
        self.deliver(NEW)
        self.m.workers[NEW].carries[self.m.truth_ids[0]].is_interrupted = False  # it may pay unasked
        self.m.payments.may_happen_again(next(iter(self.m.truth.runs.values())))
        self._decide("skip")
        self.work("pay")
        self.work("pay")

    def a_payment_is_decided_while_it_is_made(self) -> None:
        self.submit()
        self.deliver(NEW)
        self.work("pay")
        self._decide("rerun")
        self.die()
        self._decide("rerun")
        self.deliver(NEW)
        self.work("pay")

    def a_worker_reports_what_became_of_its_payment(self) -> None:
        """But not once another worker has paid again."""
        self._pays_and_dies()
        self.m.report(0, lost=False)
        self.deliver(NEW)
        self.work("pay")
        self._pays_and_dies_again()

    def a_worker_reports_its_payment_before_its_run_is_reclaimed(self) -> None:
        """It has stopped the run itself. The next worker pays nothing."""
        self.submit()
        self.deliver(NEW)
        self.work("pay")
        self.m.stop_itself(NEW)
        self.m.report(0, lost=False)
        self.m.holds()

    def _pays_and_dies_again(self) -> None:
        self.work("pay")
        self.die()
        self._decide("rerun")
        self.deliver(NEW)
        self.work("pay")
        self.die()
        for which in range(3):
            self.m.report(which, lost=False)
        self.m.holds()

    def an_approval_is_decided_once(self) -> None:
        self.submit()
        self.deliver(NEW)
        self._decide("approve")
        self.work("question")
        self._decide("approve")
        self._decide("deny")
        self.cancel(force=True)
        self._decide("deny")

    def a_question_is_given_up(self) -> None:
        """The pattern has cancelled the call that waits for an approval, and the run goes on."""
        self.submit()
        self.deliver(NEW)
        self.work("question")
        self.m.workers[NEW].carries[self.only_run].facts = ("ask:z",)
        self.work("commit")
        self._decide("approve")

    def a_run_with_an_open_question_is_cancelled(self) -> None:
        self.submit()
        self.deliver(NEW)
        self.work("question")
        self.cancel(force=True)
        self._decide("approve")
        self.m.resume(0, lost=False)
        self._decide("approve")

    def an_old_worker_gets_a_run_that_was_parked(self) -> None:
        self._parks("receive")
        self._send("signal:a:")
        self.deliver(0)
        self.m.wake(1, lost=False)
        self.deliver(NEW)

    # --- an upgrade ---

    def a_run_of_the_new_format_comes_to_old_workers(self) -> None:
        self.submit()
        self.deliver(NEW)
        self.work("commit")
        self.work("handover")
        for _ in range(2):
            self.deliver(0)
            self.m.wake(1, lost=False)
        self.deliver(NEW)

    def a_run_with_a_job_comes_to_old_workers(self) -> None:
        self.submit()
        self.deliver(NEW)
        self.work("note")
        self.work("handover")
        for _ in range(2):
            self.deliver(0)
            self.m.wake(1, lost=False)
        self.deliver(NEW)

    def a_session_of_the_new_format_comes_to_old_workers(self) -> None:
        self.submit()
        self.submit()
        self.deliver(NEW)
        self.work("finish")
        self.deliver(0)

    def a_session_with_a_summary_comes_to_old_workers(self) -> None:
        self.submit()
        self.submit()
        self.deliver(NEW)
        self.work("summarize")
        self.deliver(0)

    def a_resumed_run_has_an_older_summary(self) -> None:
        self.submit()
        self.submit()
        self.deliver(NEW)
        self.work("obey")
        self.deliver(NEW)
        self.work("summarize")
        self.m.resume(0, lost=False)
        self.m.holds()
        self.m.messages.reverse()
        self.deliver(NEW)
        self.work("summarize")

    def a_fork_begins_before_a_summary(self) -> None:
        self.submit()
        self.deliver(NEW)
        self.work("commit")
        self.work("finish")
        self.submit()
        self.deliver(NEW)
        self.work("summarize")
        self._fork(0, "new", messages=1)

    def a_run_that_is_left_expires_in_time(self) -> None:
        self.submit()
        self.submit(expires=4.25)
        self.deliver(NEW)
        self.work("finish")
        self.deliver(0)
        self.m.wake(1, lost=True)
        self.m.holds()
        self.m.let_pass(8)
        self.m.wake(100, lost=False)

    def an_old_worker_cannot_notify_celery_of_an_end_of_the_new_format(self) -> None:
        self.submit(tell=True)
        self.deliver(NEW)
        self.work("finish")
        self.m.let_pass(1)
        self.resend()
        self.deliver(0)

    # --- cancelling ---

    def a_run_is_cancelled_while_its_owner_is_unknown(self) -> None:
        self.submit()
        self.deliver(0, "lost")
        self.cancel()
        self.m.beat(0)

    def a_run_is_cancelled_while_its_worker_hands_it_back(self) -> None:
        self.submit()
        self.deliver(0)
        self.cancel()
        self.work("hand_back")
        self.deliver(1)

    def a_run_is_given_back_again_and_again(self) -> None:
        self.submit()
        for _ in range(3):
            self.deliver(0)
            self.work("lost")

    def a_run_is_left_to_others(self) -> None:
        self.submit()
        self.deliver(0)
        self.work("left_to_others")
        self.m.wake(limit=5, lost=False)
        self.deliver(1)
        self.work("commit")

    def a_run_is_cancelled_while_it_executes(self) -> None:
        self.submit()
        self.deliver(0)
        self.cancel()
        self.work("commit")
        self.m.beat(0)

    def a_run_with_a_cancel_request_is_suspended(self) -> None:
        self.submit()
        self.deliver(0)
        self.cancel()
        self.work("handover")

    def the_worker_of_a_run_with_a_cancel_request_dies(self) -> None:
        self.submit()
        self.deliver(0)
        self.cancel()
        self.die()

    def a_run_is_cancelled_by_force(self) -> None:
        self.submit()
        self.deliver(0)
        self.cancel(force=True)
        self.work("finish")

    # --- runs that interrupt others ---

    def a_run_is_interrupted_while_it_executes(self) -> None:
        self.submit()
        self.deliver(0)
        self.submit(busy="interrupt")
        self.m.beat(0)
        self.work("obey")
        self.deliver(1)

    def a_run_that_waits_is_not_passed_by_those_that_came_before_it(self) -> None:
        self.submit()
        self.deliver(0)
        self.submit()
        self.submit(busy="rollback")
        self.submit(busy="interrupt")
        self.work("obey")
        self.deliver(0)

    def a_run_is_interrupted_while_it_is_suspended(self) -> None:
        self.submit()
        self.deliver(0)
        self.work("commit")
        self.work("retry")
        self.submit(busy="interrupt")
        self.deliver(1)
        self.m.work(0, 0, "obey", "answered")

    def a_run_is_interrupted_while_it_waits_for_a_signal(self) -> None:
        self.submit()
        self.deliver(NEW)
        self.work("commit")
        self.work("sleep")
        self.submit(busy="interrupt")
        self.deliver(NEW)
        self.m.work(0, 0, "obey", "answered")

    def a_run_is_rolled_back_while_it_is_suspended(self) -> None:
        self.submit(tell=True)
        self.deliver(0)
        self.work("commit")
        self.work("retry")
        self.submit(busy="rollback")

    def a_run_that_is_rolled_back_completes(self) -> None:
        self.submit()
        self.deliver(0)
        self.submit(busy="rollback")
        self.work("finish")
        self.work("obey")

    def the_worker_of_an_interrupted_run_dies(self) -> None:
        self.submit()
        self.deliver(0)
        self.work("commit")
        self.submit(busy="interrupt")
        self.die()
        self.deliver(1)
        self.m.work(0, 0, "obey", "answered")

    def an_interrupted_run_is_given_back(self) -> None:
        self.submit()
        self.deliver(0)
        self.submit(busy="interrupt")
        self.work("lost")
        self.deliver(1)

    def an_interrupted_run_does_not_end(self) -> None:
        self.submit()
        self.submit()
        self.deliver(0)
        self.submit(busy="interrupt")
        self.m.let_pass(1)
        self.m.beat(0)
        self.m.wake(100, lost=False)
        self.m.holds()
        self.m.let_pass(1)
        self.m.beat(0)
        self.m.wake(100, lost=True)  # the worker that wakes it dies
        self.m.holds()
        self.m.let_pass(1)
        self.m.wake(100, lost=False)
        self.m.holds()
        self.work("finish")

    def an_overdue_run_ends_and_begins_another_life(self) -> None:
        """The worker that has found it overdue is slow."""
        self.submit()
        self.deliver(0)
        self.work("commit")
        self.submit(busy="interrupt")
        self.m.let_pass(1)
        self.m.beat(0)
        self.m.let_pass(1)
        self.m.beat(0)
        self.m.wake(100, lost=True)
        self.work("obey")
        self.m.resume(0, lost=False)
        self.m.holds()
        self.m.end_overdue(min(self.m.truth.runs))
        self.m.holds()

    def a_run_that_is_rolled_back_does_not_end(self) -> None:
        self.submit()
        self.deliver(0)
        self.submit(busy="rollback")
        self.m.let_pass(2)
        self.m.wake(100, lost=False)
        self.m.holds()
        self.work("finish")

    def an_interrupted_run_is_claimed_late(self) -> None:
        self.submit()
        self.submit(busy="interrupt")
        self.deliver(0)
        self.m.let_pass(2)
        self.m.wake(100, lost=False)

    def an_interrupting_run_is_interrupted(self) -> None:
        self.submit()
        self.deliver(0)
        self.submit(busy="interrupt")
        self.submit(busy="interrupt")
        self.submit(busy="rollback")
        self.work("obey")
        self.deliver(0)
        self.m.work(0, 0, "obey", "answered")

    def an_interrupted_run_is_cancelled(self) -> None:
        self.submit()
        self.submit(busy="interrupt")
        self.cancel()

    def a_cancelled_run_is_interrupted_and_does_not_end(self) -> None:
        self.submit()
        self.deliver(0)
        self.cancel()
        self.submit(busy="interrupt")
        self.m.let_pass(2)
        self.m.wake(100, lost=False)

    def an_interrupting_run_is_delayed(self) -> None:
        self.submit()
        self.m.submit("s", 1.5, True, 0, False, "rollback", lost=False)
        self.deliver(0)
        self.m.let_pass(2)
        self.m.beat(0)
        self.m.wake(100, lost=False)
        self.m.holds()
        self.work("obey")

    def an_interrupting_run_is_resumed(self) -> None:
        self.submit()
        self.submit(busy="interrupt")
        self.submit()
        self.m.cancel(1, force=True, lost=False)
        self.m.holds()
        self.m.resume(1, lost=False)
        self.m.holds()

    def a_run_interrupts_one_without_a_record(self) -> None:
        self.three_in_a_session()
        lost = self.m.holders[0]
        del self.m.truth.runs[lost]
        self.m.lab.forget(lost)
        self.submit(busy="interrupt")

    # --- forks ---

    def _fork(self, steps: int, session: str, *, messages: int = 100) -> None:
        source = next(iter(self.m.truth.runs.values()))
        asked = Run("forked", session, "fork", source.durable, True)
        self.m.fork_to(source, asked, steps, messages, lost=False)
        self.m.holds()

    def a_run_is_forked_at_each_of_its_steps(self) -> None:
        self.submit()
        self.deliver(0)
        self.work("finish")
        self.submit()
        self.deliver(0)
        self.work("commit")
        self.work("commit")
        source = list(self.m.truth.runs.values())[1]
        for steps in range(4):
            asked = Run(f"forked {steps}", f"session {steps}", "fork", True, True)
            self.m.fork_to(source, asked, steps, 1, lost=False)
            self.m.holds()

    def a_fork_goes_on(self) -> None:
        self.submit()
        self.deliver(0)
        self.work("commit")
        self.work("commit")
        self.work("finish")
        self._fork(1, "new", messages=0)
        self.m.messages.reverse()
        self.deliver(0)
        self.work("commit")
        self.work("finish")

    def a_fork_waits_for_its_own_session(self) -> None:
        self.submit()
        self.deliver(0)
        self.work("commit")
        self._fork(1, "s")

    def a_run_without_records_is_forked(self) -> None:
        self.submit()
        self._fork(0, "new")

    def a_fork_survives_its_source(self) -> None:
        self.submit()
        self.deliver(0)
        self.work("commit")
        self.cancel(force=True)
        self._fork(0, "new")
        self.m.forget(0)
        self.m.holds()
        self.deliver(1)

    def a_parked_run_is_forked(self) -> None:
        self.submit()
        self.deliver(NEW)
        self.work("commit")
        self.work("sleep")
        self._fork(1, "new")
        self.deliver(0)

    def a_fork_is_forked(self) -> None:
        """It draws the random values of both runs whose records it has."""
        self.submit()
        self.deliver(0)
        self.work("commit")
        self._fork(1, "new")
        asked = Run("forked again", "newer", "fork", True, True)
        self.m.fork_to(self.m.truth.runs["forked"], asked, 0, 100, lost=False)
        seeds = self.m.lab.redis.hget(self.m.lab.keys("run", asked.id), "seeds")
        sources = [line.split()[2] for line in seeds.splitlines()]
        assert sources == [next(iter(self.m.truth.runs)), "forked"]

    # --- a holder whose record is gone ---

    def the_last_run_of_a_queue_is_claimed(self) -> None:
        self.three_in_a_session()
        self.m.forget_holder(0, 1, 0, "claim")

    def the_last_run_of_a_queue_is_cancelled(self) -> None:
        self.three_in_a_session()
        self.m.forget_holder(0, 1, 0, "cancel")

    def a_holder_without_a_record_is_submitted_again(self) -> None:
        self.three_in_a_session()
        self.m.forget_holder(0, 0, 0, "again")

    def a_holder_that_has_asked_is_submitted_again(self) -> None:
        """The record of a run whose call waits for an approval is lost. The new run has asked nothing."""
        self.submit()
        self.deliver(NEW)
        self.work("question")
        self.die()
        self.submit()
        self.m.forget_holder(0, 0, 0, "again")

    # --- messages ---

    def a_message_waits_in_a_long_queue(self) -> None:
        self.submit()
        self.m.let_pass(1)
        self.m.resend(1, lost=False)

    def a_message_is_lost_twice(self) -> None:
        self.submit()
        self.m.let_pass(2)
        self.resend()
        self.resend()

    def a_run_is_claimed_after_its_time(self) -> None:
        self.submit(expires=1.25)
        self.m.let_pass(2)
        self.m.beat(0)
        self.deliver(0)

    # --- keys that another program has written ---

    def the_key_of_due_runs_has_a_wrong_type(self) -> None:
        self.submit()
        self.deliver(0)
        self.m.lab.becomes_foreign("due")
        with stopped_by_nothing():
            self.work("retry")

    def the_journal_of_a_run_has_a_wrong_type(self) -> None:
        self.three_in_a_session()
        run_id = self.m.messages[0]
        self.m.lab.becomes_foreign("journal", run_id)
        self.m.truth.lost_journals.add(run_id)
        with stopped_by_nothing():
            self.deliver(0)
            self.deliver(1)

    def the_transcript_of_a_session_has_a_wrong_type(self) -> None:
        self.submit()
        self.deliver(0)
        key = self.m.lab.becomes_foreign("transcript", "s")
        attempt = self.m.at_work[0].carries[self.only_run]
        for _ in range(2):  # the same write, which is refused, and then taken
            try:
                self.m.continue_attempt(attempt, "finish", "lost")
            except RedisWrongType:
                self.m.holds()
                self.m.lab.redis.delete(key)
        self.m.holds()

    # --- ends that Celery hears of, and further lives ---

    def celery_is_not_notified(self) -> None:
        self.submit(tell=True)
        self.cancel()
        for _ in range(3):
            self.m.let_pass(1)
            self.resend()

    def a_run_is_resumed(self) -> None:
        self.submit(tell=True)
        self.deliver(0)
        self.work("commit")
        self.cancel()
        self.die()
        self.m.resume(0, lost=False)
        self.m.holds()
        self.m.resume(0, lost=False)
        self.m.messages.reverse()  # the wake-up of its second life before the one for its first end
        self.deliver(1)
        self.cancel(force=True)
        self.m.tell(0, behind=1)

    def a_session_is_deleted_while_a_job_goes_on(self) -> None:
        """A worker needs what the run has left, to cancel the job. Another recipient does not."""
        for recipient in ("open_jobs", "open_responses"):
            self.m.serve(recipient)
        self.submit()
        self.m.leave_behind(self.only_run, "job:x")
        self.cancel()
        self.m.delete_session("s", False)
        self.m.deliver_ends("open_jobs")
        self.m.delete_session("s", False)

    def a_session_is_deleted_while_a_response_goes_on(self) -> None:
        """A resumed run keeps it."""
        self.m.serve("open_responses")
        self.submit()
        self.m.leave_behind(self.only_run, "response:x")
        self.cancel()
        self.m.resume(0, lost=False)
        self.m.deliver_ends("open_responses")
        self.m.holds()
        self.cancel()
        self.m.delete_session("s", False)
        self.m.delete_session("s", True)

    def a_run_that_left_no_record_is_resumed(self) -> None:
        self.submit(durable=False)
        self.deliver(0)
        self.cancel(force=True)
        self.m.resume(0, lost=False)

    def a_completed_run_is_resumed(self) -> None:
        self.submit()
        self.deliver(0)
        self.work("commit")
        self.work("finish")
        self.m.resume(0, lost=False)
