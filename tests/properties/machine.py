"""The state machine: the only place that plays the protocol with producers, workers, lost messages and
deaths.

Each act calls the real scripts and the model, and compares their answers. Workers act on what they believe,
which may be wrong: an answer was lost, they were paused, or Redis lost its last second.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import hypothesis
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from openagents_worker.store import scripts
from openagents_worker.store.scripts import DelegateAnswer, ScriptCall, Wake, WriteAnswer
from openagents_worker.store.ttl import ttl_violations
from tests.properties.invariants import check
from tests.properties.lab import TICK_MS, Lab, Snapshot
from tests.properties.payments import (
    CALL,
    FACTS_OF_CALL,
    RESOLUTION,
    Payments,
    ask_call,
    decide_call,
    intent_call,
)
from tests.properties.truth import (
    DELEGATES,
    HEARTBEAT,
    HOLDS,
    LEASE,
    MAX_RECOVERIES,
    NO_TURNS,
    PARKS,
    RENEWED_WITHIN,
    SILENCE,
    Parking,
    Run,
    Truth,
    TurnsOfFork,
    Wait,
)

__all__ = ["ACTS", "BATCH", "Act", "Protocol", "play", "protocol_in"]

BATCH = 10  # histories per seed: Hypothesis varies earlier ones, which finds less than new random ones
STEPS = 40
MAX_RUNS = 5
FAIR_ROUNDS = 40  # a fair end needs about one per run, and the length of a lease
TENANT = "tenant=x"
HOST = "h"
EMPTY = 2**53 - 1  # send time of the oldest message of an empty queue

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., None])
Way = Literal["answered", "lost", "repeated"]


@dataclass(frozen=True)
class Write:
    """A fenced write, and its effect on the model."""

    kind: str
    call: ScriptCall[Any]
    on: Callable[[Any], Any]
    """Gets the model of the machine: a `Truth`, or one of its subclasses."""
    records: int = 0
    ends_payment: bool = False


@dataclass
class Attempt:
    """What a worker believes about a run that it executes."""

    run_id: str
    incarnation: str
    fence: str
    length: int
    usage: int
    format: int
    facts_seen: int = 0
    facts: tuple[str, ...] = ()  # names of facts that it has read and not taken
    children: set[str] = field(default_factory=set)  # calls that have created a child and are not recorded
    is_interrupted: bool = False  # an earlier attempt has begun the payment
    decision: str = ""  # about that payment, as far as it is known
    is_paying: bool = False
    batch_no: int = 0
    acknowledged: int = 0  # the last batch that Redis has stored
    unanswered: Write | None = None


@dataclass
class Worker:
    incarnation: str = ""
    carries: dict[str, Attempt] = field(default_factory=dict)
    abandoned: bool = False  # it could not renew: this incarnation never acts again
    format: int = 1  # the newest format that it reads, and the one that it writes
    listens: bool = True  # if not, Redis cannot see its connection


@dataclass(frozen=True)
class Act:
    """A method of the machine, its precondition, and the choices for its arguments."""

    name: str
    possible: Callable[[Any], object]
    options: dict[str, Sequence[Any]]

    def arguments(self, choices: Sequence[int]) -> dict[str, Any]:
        return {
            name: pick(among, choice)
            for (name, among), choice in zip(self.options.items(), choices, strict=False)
        }


ACTS: list[Act] = []


def act(
    weight: int = 1,
    *,
    when: Callable[[Any], object] = bool,
    among: list[Act] = ACTS,
    **options: Sequence[Any],
) -> Callable[[F], F]:
    """Make an act of a method, for the machine with the acts `among`. Acts with more weight are chosen more
    often."""

    def known(method: F) -> F:
        among.extend([Act(method.__name__, when, options)] * weight)
        return method

    return known


def pick(among: Sequence[T], choice: int) -> T:
    return among[choice % len(among)]


SIGNALS = ("signal:a:", "signal:b:")
DECISIONS = ("approval:x", "approval:y")
PARKING = {
    "receive": Parking("waiting", (Wait(SIGNALS[0]),)),
    "receive_in_time": Parking("waiting", (Wait(SIGNALS[1]),), 1.5),
    "sleep": Parking("waiting", (), 2.5),
    "outcome": Parking("paused", (Wait(RESOLUTION),)),
    "ask": Parking("awaiting_approval", tuple(Wait(name, needs_all=True) for name in DECISIONS)),
}


def _signals(facts: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the signals and of the results of children among the facts of a run."""
    return tuple(sorted(name for name in facts if name.startswith(("signal:", "child:"))))


def _awaited(facts: Mapping[str, str]) -> set[str]:
    """The calls that have created a child for which the run waits."""
    known = {name: json.loads(text) for name, text in facts.items() if name.startswith("delegated:")}
    return {name.partition(":")[2] for name, value in known.items() if not value["background"]}


ANY = range(120)  # an index into what exists at that moment
LOST = (False, False, False, True)
WAYS = ("answered", "answered", "lost", "repeated")
LIMITS = (1, 100)
choices = st.integers(0, 119)  # divisible by most counts; up to 127 Hypothesis draws evenly


def process_of(incarnation: str) -> str:
    return f"process of {incarnation}"


class Protocol(RuleBasedStateMachine):
    lab: ClassVar[Lab]
    acts: ClassVar[Sequence[Act]] = ACTS

    def __init__(self) -> None:
        super().__init__()
        self.lab.clear()
        self.truth = self.new_truth()
        self.saved: tuple[Snapshot, Truth] | None = None
        self.requests: dict[str, Run] = {}  # every run that was ever submitted
        self.fences: set[tuple[str, str]] = set()
        self.messages: list[str] = []
        self.begun: dict[str, tuple[int, int]] = {}  # what each run began with: summaries and messages
        self.zombies: list[Attempt] = []  # attempts of former owners, which may still write
        self.numbers = itertools.count(1)
        self.payments = Payments()
        self.last_reply: Any = None
        self.expected_decision = ""
        self.workers = [
            Worker(),
            Worker(listens=False),
            Worker(format=HOLDS),
        ]  # in the middle of an upgrade
        for worker in self.workers:
            self.register(worker)

    def new_truth(self) -> Truth:
        return Truth()

    @initialize(details=st.tuples(choices, choices, choices))
    def begin(self, details: tuple[int, ...]) -> None:
        """Three runs, so that every history has something to lose."""
        for session in (pick("sst", choice) for choice in details):
            self.submit(session, 0, durable=True, expires=0, tell=False, busy="", lost=False)

    # Hypothesis switches a random half of its rules off in each example, and most histories would be void: so
    # there is one rule. It draws the same numbers wherever it stands: a history that is cut means the same.
    @rule(which=choices, details=st.tuples(*[choices] * 7))
    def do(self, which: int, details: tuple[int, ...]) -> None:
        act = pick([act for act in self.acts if act.possible(self)], which)
        arguments = act.arguments(details)
        note(f"{act.name}({', '.join(f'{name}={value}' for name, value in arguments.items())})")
        getattr(self, act.name)(**arguments)

    # --- producers ---

    @act(
        2,
        when=lambda self: len(self.truth.runs) < MAX_RUNS,
        session=("s", "t"),
        delay=(0, 0, 0, 1.5, 2.5),
        durable=(True, True, True, False),
        expires=(0, 0, 0, 1.25, 2.25),
        tell=(False, True),
        busy=("", "", "reject", "interrupt", "rollback"),
        lost=LOST,
    )
    def submit(
        self, session: str, delay: float, durable: bool, expires: float, tell: bool, busy: str, lost: bool
    ) -> None:
        on_busy = busy if busy in ("interrupt", "rollback") else ""
        asked = Run(f"r{next(self.numbers)}", session, "same", durable, tell, on_busy=on_busy)
        self.requests[asked.id] = asked
        self.offer(asked, delay, expires, busy == "reject", lost)

    @act(
        when=lambda self: self.requests,
        i=ANY,
        digest=("same", "other"),
        lost=LOST,
    )
    def submit_again(self, i: int, digest: str, lost: bool) -> None:
        asked = self.requests[pick(sorted(self.requests), i)]
        self.offer(replace(asked, digest=digest), 0, 0, False, lost)

    def offer(self, asked: Run, delay: float, expires: float, reject: bool, lost: bool) -> None:
        run_id = asked.id
        submitted = self.lab.run(
            scripts.submit(
                run_id=run_id,
                agent_id="a",
                session_id=asked.session,
                queue="",
                default_queue="q",
                digest=asked.digest,
                uid="u",
                request="{}",
                canvas="",
                durable=asked.durable,
                delay_ms=int(delay * TICK_MS),
                reject_if_busy=reject,
                lists=[TENANT],
                parent_run_id="",
                expires_ms=int(expires * TICK_MS),
                tell=asked.tell,
                interrupts=asked.on_busy,
            )
        )
        expected = self.truth.submit(asked, delay, expires, reject)
        assert submitted.answer == expected, f"submit {run_id}: {submitted.answer}, but it is {expected}"
        if expected == "NEW" and not delay:
            also = {wake.run_id for wake in submitted.also}
            assert also == self.truth.woken - {run_id}, f"{self.truth.woken} must be woken: {also}"
        if expected in ("NEW", "SAME"):
            run = self.truth.runs[run_id]
            assert submitted.state == run.state
            is_sent = run.state == "queued" or run.untold
            assert (submitted.sent_us is not None) == is_sent, f"message of {run_id}"
            if is_sent and not lost:
                self.messages.append(run_id)
        self.messages += [wake.run_id for wake in submitted.also]

    @act(when=lambda self: self.requests, i=ANY, force=(False, False, True), lost=LOST)
    def cancel(self, i: int, force: bool, lost: bool) -> None:
        run_id = pick(sorted(self.requests), i)
        cancelled = self.lab.run(scripts.cancel(run_id=run_id, reason="enough", force=force))
        expected, wakes = self.truth.cancel(run_id, force)
        assert cancelled.answer == expected, f"cancel {run_id}: {cancelled.answer}, but it is {expected}"
        self.send(cancelled.wakes, wakes, lost)

    @act(2, when=lambda self: self.truth.runs, i=ANY, lost=LOST)
    def resume(self, i: int, lost: bool) -> None:
        """A producer resumes a run in another life."""
        run_id = pick(sorted(self.truth.runs), i)
        call = scripts.resume(
            run_id=run_id,
            agent_id="a",
            session_id=self.requests[run_id].session,
            input_text="",
            checkpoint_id="",
        )
        resumed, expected = self.lab.run(call), self.truth.resume(run_id)
        assert resumed.answer == expected, f"resume {run_id}: {resumed.answer}, but it is {expected}"
        if expected == "OK":
            run = self.truth.runs[run_id]
            assert (resumed.state, resumed.sent_us is not None) == (run.state, run.state == "queued")
            if run.state == "queued" and not lost:
                self.messages.append(run_id)
        self.messages += [wake.run_id for wake in resumed.also]

    @act(
        when=lambda self: self.truth.runs and len(self.truth.runs) < MAX_RUNS,
        i=ANY,
        steps=(0, 1, 2, 5),
        is_own_session=(False, True),
        messages=(0, 2, 4),
        lost=LOST,
    )
    def fork(self, i: int, steps: int, is_own_session: bool, messages: int, lost: bool) -> None:
        """A producer starts a run from a checkpoint of another one. The same fork again is the same run."""
        source = self.truth.runs[pick(sorted(self.truth.runs), i)]
        run_id = f"r{next(self.numbers)}"
        session = source.session if is_own_session else f"fork of {run_id}"
        self.fork_to(source, Run(run_id, session, "fork", source.durable, True), steps, messages, lost)

    def fork_to(
        self,
        source: Run,
        asked: Run,
        steps: int,
        messages: int,
        lost: bool,
        turns: TurnsOfFork = NO_TURNS,
    ) -> None:
        call = scripts.fork(
            run_id=asked.id,
            from_run_id=source.id,
            steps=steps,
            session_id=asked.session,
            digest=asked.digest,
            uid="u",
            request="{}",
            messages=messages,
            artifacts=0,
            lists=[TENANT],
            tell=True,
            above=[str(part) for held in turns.above for part in held],
            held_to=turns.held_to,
            held_call=turns.held_call,
        )
        expected = self.truth.fork(source.id, asked, steps, messages, turns)
        for answer_of in ("first", "again"):
            forked = self.lab.run(call)
            assert forked.answer == expected, f"fork of {source.id}: {forked.answer}, but it is {expected}"
            if answer_of == "first":
                self.messages += [wake.run_id for wake in forked.also]
            if expected not in ("NEW", "SAME"):
                return
            expected = "SAME"
        run = self.truth.runs[asked.id]
        self.requests[asked.id] = asked
        assert (forked.state, forked.sent_us is not None) == (run.state, run.state == "queued")
        if run.state == "queued" and not lost:
            self.messages.append(asked.id)

    @act(
        4,
        when=lambda self: self.requests,
        i=ANY,
        name=(*SIGNALS, *DECISIONS),
        message_id=("", "", "m1", "m2"),
        lost=LOST,
    )
    def send_fact(self, i: int, name: str, message_id: str, lost: bool) -> None:
        """Somebody sends a value to a run, or decides something."""
        run_id, value = pick(sorted(self.requests), i), str(next(self.numbers))
        message_id = message_id if name in SIGNALS else ""
        call = scripts.fact(
            run_id=run_id,
            name=name,
            value=value,
            message_id=message_id,
            max_facts=1000,
            max_bytes=100_000,
        )
        run = self.truth.runs.get(run_id)
        first = run.facts.get(name, "") if run else ""
        result, (expected, wakes) = self.lab.run(call), self.truth.fact(run_id, name, value, message_id)
        assert result.answer == expected, f"{name} of {run_id}: {result.answer}, but it is {expected}"
        assert result.value == (first if expected == "ALREADY" else ""), f"first decision about {name}"
        self.send(result.wakes, wakes, lost)

    @act(session=("s", "t"), even_if_not_notified=(False, True))
    def delete_session(self, session: str, even_if_not_notified: bool) -> None:
        call = scripts.delete_session(
            session_id=session, limit=100, even_if_not_notified=even_if_not_notified
        )
        answer, expected = self.lab.run(call).answer, self.truth.delete_session(session, even_if_not_notified)
        assert answer == expected, f"delete {session}: {answer}, but it is {expected}"

    def serve(self, recipient: str) -> None:
        """A worker is notified of ends from now on."""
        self.lab.run(scripts.outbox_take(recipient=recipient, limit=0, retry_ms=0, max_retry_ms=0))
        self.truth.recipients.add(recipient)

    def leave_behind(self, run_id: str, name: str) -> None:
        """Something goes on at a service, and only this fact of the run tells what it is."""
        self.lab.redis.hset(self.lab.keys("facts", run_id), name, "{}")
        self.truth.runs[run_id].facts[name] = "{}"

    def deliver_ends(self, recipient: str) -> None:
        for entry in [each for each in self.truth.undelivered if each[0] == recipient]:
            self.lab.run(scripts.outbox_done(recipient=recipient, ends=[entry[2], str(entry[1])]))
            self.truth.undelivered.remove(entry)

    @property
    def ended(self) -> list[str]:
        return sorted(run.id for run in self.truth.runs.values() if run.over)

    @act(when=lambda self: self.ended, i=ANY, behind=(0, 0, 1))
    def tell(self, i: int, behind: int) -> None:
        """Celery was notified of the end of a run, or, too late, of one of its earlier lives."""
        run = self.truth.runs[pick(self.ended, i)]
        self.tell_of(run.id, run.life - behind)

    def tell_of(self, run_id: str, life: int) -> None:
        call = scripts.confirm_completion(runs=[run_id, str(life)])
        [told], expected = self.lab.run(call), self.truth.told(run_id, life)
        assert told is expected, f"told of life {life} of {run_id}: {told}"

    # --- workers ---

    @act(14, when=lambda self: self.messages, w=ANY, i=ANY, doubled=(False, False, True), way=WAYS)
    def deliver(self, w: int, i: int, doubled: bool, way: Way) -> None:
        """A worker gets a message and claims. The answer may be lost, or requested again."""
        run_id = pick(self.messages, i)
        if not doubled:
            self.messages.remove(run_id)
        self.claim(pick(self.workers, w), run_id, way)

    def claim(self, worker: Worker, run_id: str, way: Way = "answered") -> None:
        call = scripts.claim(
            run_id=run_id,
            incarnation=worker.incarnation,
            nonce=(nonce := f"n{next(self.numbers)}"),
            page_bytes=1000,
            newest=worker.format,
        )
        for _ in range(2 if way == "repeated" else 1):
            claimed = self.lab.run(call)
            expected, wakes = self.truth.claim(run_id, worker.incarnation, nonce, worker.format)
            assert claimed.answer == expected, f"claim {run_id}: {claimed.answer}, but it is {expected}"
            self.send(claimed.wakes, wakes, lost=False)
            if expected == "SUSPECT_BUSY":
                self.lab.let_pass(6_000)
            if expected == "OTHER_FORMAT":
                self.lab.make_due(run_id)
        run = self.truth.runs.get(run_id)
        if run and expected == "DONE":
            assert (bool(claimed.unnotified_result), claimed.life) == (run.untold, run.life), (
                f"end of {run_id}"
            )
        if not run or expected != "CLAIMED":
            return
        if run.fence != claimed.fence:
            assert not run.fence, f"{run_id} was claimed twice"
            assert (run_id, claimed.fence) not in self.fences, f"the fence {claimed.fence} is not new"
            run.fence = claimed.fence
            self.fences.add((run_id, claimed.fence))
        assert (claimed.attempt, claimed.retries, claimed.recoveries) == (
            run.attempts,
            run.retries,
            run.recoveries,
        )
        assert claimed.is_interrupted is run.is_told, f"{run_id} is interrupted: {claimed.is_interrupted}"
        assert claimed.journal_length == len(run.journal)
        assert list(claimed.journal) == run.journal[: len(claimed.journal)]
        held = self.truth.held_at_start(run) if run.format >= HOLDS else []
        assert list(claimed.held) == held, f"{run_id} gets the turns {claimed.held}, but {held} are held"
        assert claimed.epoch == len(self.truth.summaries.get(run.session, []))
        self.begun.setdefault(run_id, (claimed.epoch, claimed.messages))
        if way != "lost":
            attempt = worker.carries[run_id] = Attempt(
                run_id, worker.incarnation, claimed.fence, len(run.journal), self.used_by(run), worker.format
            )
            attempt.facts_seen, attempt.facts = claimed.facts_no, _signals(claimed.facts or {})
            attempt.children = _awaited(claimed.facts or {})
            attempt.is_interrupted = f"intent:{CALL}" in (claimed.facts or {})
            attempt.decision = (claimed.facts or {}).get(RESOLUTION, "")
            assert (attempt.facts_seen, claimed.facts is not None) == (run.facts_no, True)

    def summary_of(self, attempt: Attempt) -> tuple[int, int] | None:
        """A summary that the attempt has written: its number, and how many messages it stands for."""
        summaries, messages = self.begun[attempt.run_id]
        return (summaries + 1, messages) if attempt.format >= PARKS else None

    def used_by(self, run: Run) -> int:
        """The usage of a run, as an attempt counts it: a fork counts the records that it has copied."""
        return run.usage or sum(json.loads(text)["usage"] for text in run.journal[: run.copied])

    @act(
        28,
        when=lambda self: self.at_work,
        w=ANY,
        i=ANY,
        kind=(
            "commit",
            "commit",
            "emit",
            "retry",
            "handover",
            "left_to_others",
            "finish",
            "obey",
            "lost",
            "hand_back",
            *(kind for kind in PARKING if kind != "outcome"),  # which is a part of `pay`
            "pay",
            "pay",
            "pay",
            "question",
            "delegate",
            "delegate",
            "delegate",
            "wait_child",
            "wait_child",
            "wait_child",
        ),
        way=WAYS,
    )
    def work(self, w: int, i: int, kind: str, way: Way) -> None:
        """A worker writes. First it repeats a write whose answer was lost, unchanged."""
        worker = pick(self.at_work, w)
        self.step(worker, worker.carries[pick(sorted(worker.carries), i)], kind, way)

    def step(self, worker: Worker, attempt: Attempt, kind: str, way: Way = "answered") -> None:
        if not self.continue_attempt(attempt, kind, way):
            self.zombies.append(worker.carries.pop(attempt.run_id))

    @property
    def truth_ids(self) -> list[str]:
        return sorted(self.truth.runs)

    @property
    def at_work(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.carries]

    def continue_attempt(self, attempt: Attempt, kind: str, way: Way) -> bool:
        """Returns whether the attempt believes afterwards that it still owns the run."""
        write = attempt.unanswered or self.write(attempt, kind)
        attempt.unanswered = write if way == "lost" else None
        for _ in range(2 if way == "repeated" else 1):
            answer = self.execute(write, attempt.run_id)
        if way == "lost":
            return True
        done = answer in (WriteAnswer.OK, WriteAnswer.SAME, WriteAnswer.CANCEL)
        if write.kind == "commit" and done:
            attempt.length += write.records
            attempt.usage += 1
            if write.ends_payment:
                attempt.is_paying, attempt.is_interrupted, attempt.decision = False, False, ""
        if write.kind == "pay" and done:
            self.pays(attempt)
        if write.kind in ("commit", "emit", "pay") and done:
            attempt.acknowledged = attempt.batch_no
        if write.kind == "delegate":
            if self.last_reply.answer in (DelegateAnswer.NEW, DelegateAnswer.SAME):
                attempt.acknowledged = attempt.batch_no
            return self.last_reply.answer not in (DelegateAnswer.FENCED, DelegateAnswer.MISPLACED)
        return done and (write.kind in ("commit", "emit", "pay") or answer is WriteAnswer.CANCEL)

    @act(2, when=lambda self: self.at_work, w=ANY, i=ANY)
    def read_facts(self, w: int, i: int) -> None:
        """A worker was told of a fact, and reads the facts of the run."""
        worker = pick(self.at_work, w)
        attempt = worker.carries[pick(sorted(worker.carries), i)]
        if attempt.unanswered is None:
            keys, run_id = self.lab.keys, attempt.run_id
            attempt.facts_seen = int(self.lab.redis.hget(keys("run", run_id), "facts_no") or 0)
            attempt.facts = _signals(self.lab.redis.hgetall(keys("facts", run_id)))

    @act(
        3,
        when=lambda self: self.zombies,
        i=ANY,
        kind=(
            "commit",
            "emit",
            "retry",
            "handover",
            "left_to_others",
            "finish",
            "lost",
            "hand_back",
            "receive",
            "delegate",
        ),
    )
    def write_late(self, i: int, kind: str) -> None:
        """A former owner writes: it lost the run, was paused, or died while a command was on its way."""
        self.continue_attempt(pick(self.zombies, i), kind, "answered")

    def execute(self, write: Write, run_id: str) -> WriteAnswer:
        got = self.lab.run(write.call)
        expected = write.on(self.truth)
        self.last_reply = got
        answer, wakes = (got, ()) if isinstance(got, WriteAnswer) else (got.answer, getattr(got, "wakes", ()))
        wanted, to_wake = expected if isinstance(expected, tuple) else (expected, set())
        assert answer == wanted, f"{write.kind} of {run_id}: {answer}, but it is {wanted}"
        self.send(wakes, to_wake, lost=False)
        if write.kind == "left_to_others" and answer is WriteAnswer.OK:
            self.lab.make_due(run_id)
        return answer

    def write(self, attempt: Attempt, kind: str) -> Write:
        number = next(self.numbers)
        run_id, fence = attempt.run_id, attempt.fence
        ids: dict[str, str] = {"run_id": run_id, "fence": fence}
        events = ["told", json.dumps({"number": number})]
        if kind in ("lost", "hand_back"):
            why = "lost" if kind == "lost" else "handover"
            call: ScriptCall[Any] = scripts.release(
                **ids, incarnation=attempt.incarnation, kind=why, max_recoveries=MAX_RECOVERIES
            )
            return Write(kind, call, lambda truth: truth.release(run_id, attempt.incarnation, fence, why))
        if kind == "pay":
            kind = self.next_of_payment(attempt)
        if kind in PARKING and attempt.format < PARKS:
            kind = "handover"  # a worker of the version before
        if kind in ("delegate", "wait_child"):
            kind = self.next_of_children(attempt, kind)
        is_end_of_payment, kind = kind == "end_payment", "commit" if kind == "end_payment" else kind
        attempt.batch_no += 1
        batch_no, position, total = attempt.batch_no, attempt.length, attempt.usage + 1
        if kind in ("emit", "note"):  # a note about a job needs a format that not every worker reads
            needs = attempt.format if kind == "note" else 0
            call = scripts.emit(**ids, batch_no=batch_no, events=events, format=needs)
            return Write("emit", call, lambda truth: truth.emit(run_id, fence, batch_no, number, needs))
        if kind == "commit":
            record = json.dumps({"by": fence, "number": number, "usage": 1})
            start = json.dumps({"by": fence, "number": number, "usage": 0})
            records = [record] if position else [start, record]
            taken, attempt.facts = attempt.facts[:1], attempt.facts[1:]
            if is_end_of_payment:
                taken = (*taken, *FACTS_OF_CALL)
            if taken and taken[0].startswith("child:"):
                ended = taken[0].removeprefix("child:")
                attempt.children.discard(ended)
                taken = (*taken, f"delegated:{ended}")
            call = scripts.commit(
                **ids,
                position=position,
                records=records,
                usage=json.dumps({"llm_calls": total}),
                batch_no=batch_no,
                events=events,
                format=attempt.format,
                taken=list(taken),
            )
            form = attempt.format

            def on(truth: Truth) -> str:
                answer = truth.commit(run_id, fence, position, records, total, batch_no, number, form, taken)
                if is_end_of_payment and answer in ("OK", "CANCEL"):
                    self.payments.is_recorded(truth.runs[run_id])
                return answer

            return Write(kind, call, on, len(records), is_end_of_payment)
        if kind in ("finish", "obey", "summarize"):
            only_reads, kind = kind == "summarize", "finish" if kind == "summarize" else kind
            writes_one = only_reads or (kind == "finish" and number % 3 == 0)
            summary = self.summary_of(attempt) if writes_one else None
            state = "completed" if kind == "finish" else "cancelled"
            messages = [f"question {number}", f"answer {number}"]
            call = scripts.finish(
                **ids,
                end_state=state,
                result="{}",
                event=f"run.{state}",
                payload="{}",
                completed="{}",
                transcript=messages,
                artifacts=[],
                state=["last", str(number)],
                state_removed=[],
                usage=json.dumps({"llm_calls": attempt.usage}),
                batch_no=batch_no,
                events=events,
                format=(form := 1 if only_reads else attempt.format),
                epoch=summary[0] if summary else 0,
                compacted=summary[1] if summary else 0,
                compaction="{}" if summary else "",
                compacted_format=PARKS,
            )
            used = attempt.usage
            return Write(
                kind,
                call,
                lambda truth: truth.finish(
                    run_id, fence, messages, used, number, form, batch_no, state, summary
                ),
            )
        if kind == "begin_payment":
            return self.begin_payment(attempt, ids, batch_no, number)
        if kind == "question":
            stored = attempt.length
            asking = ask_call(ids, number, batch_no, stored)
            return Write(
                "emit", asking, lambda truth: truth.ask(run_id, fence, str(number), batch_no, number, stored)
            )
        if kind == "delegate":
            return self.delegate(attempt, number, batch_no)
        if kind == "wait_child":
            return self.park(attempt, self.waits_for_children(attempt, number), batch_no)
        if kind in PARKING:
            return self.park(attempt, PARKING[kind], batch_no)
        call = scripts.suspend(
            **ids,
            kind=kind,
            delay_ms=int(1.5 * TICK_MS),
            call="0.1",
            error_code="llm.rate_limit",
            batch_no=batch_no,
            events=[],
        )
        return Write(kind, call, lambda truth: truth.suspend(run_id, fence, kind, 1.5))

    # --- children ---

    def next_of_children(self, attempt: Attempt, kind: str) -> str:
        """What a worker does that has to delegate, or to wait: nothing, if there is nothing to wait for."""
        if attempt.format < DELEGATES:
            return "emit"  # a worker of the version before
        if kind == "delegate":
            return kind if len(self.truth.runs) < MAX_RUNS + 2 else "emit"
        return kind if self.waits_for_children(attempt, 0).waits else "commit"

    def waits_for_children(self, attempt: Attempt, number: int) -> Parking:
        needs_all = bool(number % 2)
        awaited = [f"child:{call}" for call in sorted(attempt.children)]
        waits = tuple(Wait(name, needs_all) for name in awaited if name not in attempt.facts)
        return Parking("waiting_child", waits)

    def delegate(self, attempt: Attempt, number: int, batch_no: int) -> Write:
        run_id, fence, stored = attempt.run_id, attempt.fence, attempt.length
        call, mode = f"call{number % 2}", pick(("isolated", "shared", "shared", "forked"), number)
        background = mode != "shared" and not number % 5
        child_id = f"{run_id}.{call}"
        session = self.requests[run_id].session if mode == "shared" else f"{mode} session of {child_id}"
        delegated = json.dumps({"background": background})
        asked = Run(child_id, session, "child", tell=True)
        asked.parent, asked.parent_call, asked.mode, asked.background = run_id, call, mode, background

        def on(truth: Truth) -> Any:
            answer, wakes = truth.delegate(run_id, fence, asked, delegated, stored, batch_no)
            if answer in ("NEW", "SAME"):
                self.requests.setdefault(child_id, Run(child_id, session, "child", tell=True))
                if not background:
                    attempt.children.add(call)
            return answer, wakes

        return Write(
            "delegate",
            scripts.delegate(
                run_id=run_id,
                fence=fence,
                call=call,
                child_id=child_id,
                agent_id="a",
                session_id=session,
                queue="",
                mode=mode,
                background=background,
                digest="child",
                uid="u",
                request="{}",
                input_text="",
                delegated=delegated,
                batch_no=batch_no,
                lists=[TENANT],
                stored=stored,
                format=HOLDS if mode == "shared" else DELEGATES,
            ),
            on,
        )

    def is_worked_on(self, run: Run, call: str) -> bool:
        """Whether a child will end and tell the run."""
        child = self.truth.runs.get(f"{run.id}.{call}")
        return bool(
            child
            and not child.over
            and not child.background
            and (child.parent, child.parent_call, child.parent_life) == (run.id, call, run.life)
        )

    # --- payments ---

    def next_of_payment(self, attempt: Attempt) -> str:
        """What a worker does that has to pay: begin, record the outcome, or wait for a decision."""
        if attempt.format < PARKS:
            return "emit"  # a worker of the version before knows no intents
        if attempt.is_paying or attempt.decision.startswith("skip"):
            return "end_payment"
        return "outcome" if attempt.is_interrupted and not attempt.decision else "begin_payment"

    def begin_payment(self, attempt: Attempt, ids: dict[str, str], batch_no: int, number: int) -> Write:
        knows = bool(attempt.decision)
        stored = attempt.length
        call = intent_call(ids, number, knows, batch_no, stored)

        def on(truth: Truth) -> Any:
            answer, self.expected_decision = truth.intent(
                ids["run_id"], ids["fence"], str(number), knows, batch_no, number, stored
            )
            return answer

        return Write("pay", call, on)

    def pays(self, attempt: Attempt) -> None:
        """The worker knows that its intent is stored, or it knows a decision about an earlier one."""
        assert self.last_reply.decision == self.expected_decision
        if self.last_reply.decision:
            attempt.is_interrupted, attempt.decision = True, self.last_reply.decision
            return
        attempt.is_paying, attempt.is_interrupted, attempt.decision = True, False, ""
        if run := self.truth.runs.get(attempt.run_id):
            self.payments.happens(run, self.truth.lost_a_second)

    @act(
        3,
        when=lambda self: self.requests,
        i=ANY,
        action=("rerun", "skip", "approve", "deny"),
        lost=LOST,
    )
    def decide(self, i: int, action: str, lost: bool) -> None:
        """A person decides about a payment, or about an approval."""
        self.decide_of(pick(sorted(self.requests), i), action, "", lost)

    @act(2, when=lambda self: any(zombie.is_paying for zombie in self.zombies), i=ANY, lost=LOST)
    def report(self, i: int, lost: bool) -> None:
        """A worker that has lost the run reports what became of its payment."""
        zombie = pick([zombie for zombie in self.zombies if zombie.is_paying], i)
        self.decide_of(zombie.run_id, "skip", zombie.fence, lost)

    def decide_of(self, run_id: str, action: str, fence: str, lost: bool) -> None:
        kind = "resolution" if action in ("rerun", "skip") else "approval"
        value = f"{action} {next(self.numbers)}"
        result = self.lab.run(decide_call(run_id, kind, value, fence))
        expected, wakes = self.truth.decide(run_id, kind, value, fence)
        assert result.answer == expected, f"{action} of {run_id}: {result.answer}, but it is {expected}"
        if expected == "OK" and action == "rerun":
            self.payments.may_happen_again(self.truth.runs[run_id])
        self.send(result.wakes, wakes, lost)

    def park(self, attempt: Attempt, parking: Parking, batch_no: int) -> Write:
        run_id, fence, seen = attempt.run_id, attempt.fence, attempt.facts_seen
        stored = attempt.acknowledged
        until_ms = self.lab.now_ms() + int(parking.delay * TICK_MS) if parking.delay else 0
        waits: list[dict[str, Any]] = [{**asdict(wait), "kind": wait.kind} for wait in parking.waits]
        if until_ms:
            waits.append({"kind": "timer", "until_ms": until_ms})
        call = scripts.suspend(
            run_id=run_id,
            fence=fence,
            kind="park",
            delay_ms=0,
            call="",
            error_code="",
            batch_no=batch_no,
            events=[],
            park_state=parking.state,
            waits=json.dumps(waits),
            waiting_payload="{}",
            due_ms=until_ms,
            facts_seen=seen,
            acknowledged=stored,
            format=PARKS,
        )
        return Write("park", call, lambda truth: truth.park(run_id, fence, parking, seen, stored))

    # --- leases ---

    @act(4, w=ANY)
    def beat(self, w: int) -> None:
        """Renew, then compare: release runs that no task executes, stop runs that this worker does not
        own."""
        worker = pick(self.workers, w)
        if worker.abandoned:
            self.register(worker, previous=worker.incarnation)
            return
        self.connect(worker)
        renewal = self.lab.run(
            scripts.renew(
                incarnation=worker.incarnation,
                lease_ms=int(LEASE * TICK_MS),
                server=self.truth.server,
                renewed_within_ms=int(RENEWED_WITHIN * TICK_MS),
            )
        )
        assert renewal.lost is not self.truth.renew(worker.incarnation), f"lease of {worker.incarnation}"
        if renewal.lost:
            self.say_alive(worker.incarnation)
            self.register(worker, previous=worker.incarnation)
            return
        assert renewal.owned == self.truth.owned(worker.incarnation)
        announced = self.truth.announcements(worker.incarnation)
        assert renewal.notices == self.truth.cancel_requested(worker.incarnation) | announced
        self.lab.run(scripts.confirm_notices(incarnation=worker.incarnation, notices=sorted(announced)))
        self.truth.announced.pop(worker.incarnation, None)
        for run_id in sorted(renewal.owned - set(worker.carries)):
            fence = self.lab.redis.hget(self.lab.keys("run", run_id), "fence")
            stray = Attempt(run_id, worker.incarnation, fence, 0, 0, worker.format)
            assert self.execute(self.write(stray, "lost"), run_id) is WriteAnswer.OK
        for run_id in sorted(set(worker.carries) - renewal.owned):
            self.zombies.append(worker.carries.pop(run_id))

    @act(w=ANY)
    def stop_itself(self, w: int) -> None:
        """It could not renew in time: it stops all runs, and this incarnation never sends a heartbeat
        again."""
        worker = pick(self.workers, w)
        worker.abandoned = True
        self.let_go(worker)

    @act()
    def be_silent(self) -> None:
        """Redis answers nothing for longer than a lease. Then every worker learns that its lease was lost."""
        self.let_pass(4)
        for w in range(len(self.workers)):
            self.beat(w)

    @act(w=ANY)
    def kill(self, w: int) -> None:
        worker = pick(self.workers, w)
        self.truth.dead.add(worker.incarnation)
        self.register(worker)

    @act(
        2,
        when=lambda self: self.at_work,
        w=ANY,
        lost=LOST,
        blameless=(False, False, False, True),
    )
    def die_at_work(self, w: int, lost: bool, blameless: bool) -> None:
        """A worker is killed, its lease ends and its runs are reclaimed in one act.

        A poisonous run does this repeatedly.
        """
        worker = pick(self.at_work, w)
        if worker.incarnation in self.truth.leases:
            ticks_ago = 1000 + next(self.numbers)  # never two at the same time
            self.lab.end_lease(worker.incarnation, ticks_ago)
            self.truth.leases[worker.incarnation] = self.truth.now - ticks_ago
            self.reclaim_some(100, blameless, lost)
        self.truth.dead.add(worker.incarnation)
        self.register(worker)

    @act(
        when=lambda self: self.at_work,
        w=ANY,
        i=ANY,
        lost=LOST,
    )
    def end_by_watchdog(self, w: int, i: int, lost: bool) -> None:
        """A run blocks the event loop for good: the watchdog names it, and ends the process."""
        worker = pick(self.at_work, w)
        run_id = pick(sorted(worker.carries), i)
        accused = self.lab.run(scripts.accuse(run_id=run_id, incarnation=worker.incarnation))
        assert accused is self.truth.accuse(run_id, worker.incarnation), f"{run_id} was named: {accused}"
        self.reclaim_some(100, False, lost)
        self.register(worker)

    @act(w=ANY)
    def retire(self, w: int) -> None:
        worker = pick(self.workers, w)
        answer = self.lab.run(scripts.retire(incarnation=worker.incarnation, host=HOST))
        assert answer == self.truth.retire(worker.incarnation)
        self.register(worker)

    def register(self, worker: Worker, previous: str = "") -> None:
        """With `previous`, the process is alive and reports this."""
        self.let_go(worker)
        self.disconnect(worker)
        worker.incarnation, worker.abandoned = f"w{next(self.numbers)}", False
        self.connect(worker)
        self.truth.register(worker.incarnation, previous)
        call = scripts.register(
            incarnation=worker.incarnation,
            lease_ms=int(LEASE * TICK_MS),
            agents=[],
            previous=previous,
            host=HOST,
            process=process_of(worker.incarnation),
        )
        assert set(self.lab.run(call).neighbours) == self.truth.neighbours()

    def let_go(self, worker: Worker) -> None:
        self.zombies += worker.carries.values()
        worker.carries = {}

    # --- leases that end early ---

    @act(w=ANY)
    def cut(self, w: int) -> None:
        """Its connection is closed, but it does not know yet."""
        self.disconnect(pick(self.workers, w))

    @act(w=ANY)
    def connect_again(self, w: int) -> None:
        """It opens a connection, but has not renewed yet."""
        self.connect(pick(self.workers, w))

    def connect(self, worker: Worker) -> None:
        if worker.listens:
            self.lab.listen(worker.incarnation)
            self.truth.listening.add(worker.incarnation)

    def disconnect(self, worker: Worker) -> None:
        self.lab.cut(worker.incarnation)
        self.truth.listening.discard(worker.incarnation)

    @act(4)
    def look(self) -> None:
        self.lab.redis.delete(self.lab.keys("looked"))  # the last check was a second ago
        call = scripts.look(server=self.truth.server, silence_ms=int(SILENCE * TICK_MS), host=HOST)
        looked, expected = self.lab.run(call), self.truth.look()
        given_up = set(looked.given_up)
        assert set(looked.neighbours or {}) == self.truth.neighbours()
        assert given_up == expected, f"{given_up} are given up, and must be {expected}"

    @act(when=lambda self: self.truth.dead, i=ANY)
    def see_dead(self, i: int) -> None:
        """Another worker of the host has noticed that the process is dead."""
        self.end_lease(pick(sorted(self.truth.dead), i))

    @act(w=ANY)
    def see_another_process_dead(self, w: int) -> None:
        """A process with the same process id and another start time."""
        self.end_lease(pick(self.workers, w).incarnation, "another process")

    def end_lease(self, incarnation: str, process: str = "") -> None:
        process = process or process_of(incarnation)
        answer = self.lab.run(scripts.end_lease(incarnation=incarnation, host=HOST, process=process))
        expected = self.truth.end_lease(incarnation, process == process_of(incarnation))
        assert answer == expected, f"the lease of {incarnation}: {answer}, but it is {expected}"

    def say_alive(self, incarnation: str) -> None:
        """Its lease is over, but it is alive. The answer may be lost, so it reports this twice."""
        for _ in range(2):
            said, expected = (
                self.lab.run(scripts.alarm(incarnation=incarnation)),
                self.truth.alarm(incarnation),
            )
            told = (said.runs, said.seen_by, said.off) if said else None
            assert told == expected, f"alarm of {incarnation}: {told}, but it is {expected}"

    # --- rescue ---

    @act(limit=LIMITS, blameless=(False, True), lost=LOST)
    def reclaim(self, limit: int, blameless: bool, lost: bool) -> None:
        self.reclaim_some(limit, blameless, lost)

    def reclaim_some(self, limit: int, blameless: bool, lost: bool) -> bool:
        """Returns whether there was a lease that is over."""
        over = self.truth.lost_leases()
        answer = self.lab.run(
            scripts.reclaim(
                limit=limit,
                max_recoveries=MAX_RECOVERIES,
                blameless=blameless,
                heartbeat_ms=int(HEARTBEAT * TICK_MS),
            )
        )
        gone = answer.incarnation
        assert gone in (over or {""}), f"{gone!r} was reclaimed, over are {over}"
        if gone:
            owned = self.truth.owned(gone)
            left = self.lab.redis.smembers(self.lab.keys("worker_runs", gone))
            assert (answer.left, len(owned - left)) == (len(left), min(limit, len(owned))), f"left of {gone}"
            self.send(answer.wakes, self.truth.reclaim(gone, sorted(owned - left), blameless), lost)
        return bool(gone)

    @act(2, limit=LIMITS, lost=LOST)
    def wake(self, limit: int, lost: bool) -> None:
        wakes, _, overdue = self.lab.run(scripts.wake(limit=limit))
        expected, to_end = self.truth.wake(limit)
        self.send(wakes, expected, lost)
        assert set(overdue) == to_end, f"{overdue} are overdue, and must be {to_end}"
        for run_id in overdue if not lost else ():  # the worker may die before it ends them
            self.end_overdue(run_id)

    def end_overdue(self, run_id: str) -> None:
        messages = [f"question of {run_id}", "interrupted"]
        call = scripts.cancel(
            run_id=run_id, reason="interrupted", force=True, overdue=True, transcript=messages
        )
        expected, wakes = self.truth.cancel(run_id, True, messages, overdue=True)
        cancelled = self.lab.run(call)
        assert cancelled.answer == expected, f"end {run_id}: {cancelled.answer}, but it is {expected}"
        self.send(cancelled.wakes, wakes, lost=False)

    @act(2, back=(None, 0, 1), lost=LOST)
    def resend(self, back: int | None, lost: bool) -> None:
        """The queue is empty (None), or its oldest message was sent some ticks ago."""
        seconds, micros = self.lab.redis.time()
        oldest_us = EMPTY if back is None else seconds * 10**6 + micros - int((back + 0.5) * TICK_MS * 1000)
        call = scripts.resend(queue="q", oldest_us=oldest_us, grace_ms=TICK_MS // 2, limit=100)
        self.send(self.lab.run(call), self.truth.resend(self.truth.now - 0.5 - (back or 0)), lost)

    def send(self, wakes: tuple[Wake, ...], expected: set[str], lost: bool) -> None:
        assert {wake.run_id for wake in wakes} == expected, f"{expected} must be woken: {wakes}"
        if not lost:
            self.messages += sorted(expected)

    # --- the world ---

    @act(2, ticks=(1, 1, 2, 4))
    def let_pass(self, ticks: int) -> None:
        self.truth.now += ticks
        self.lab.let_pass(ticks * TICK_MS)

    @act(when=lambda self: self.ended, i=ANY)
    def forget(self, i: int) -> None:
        """The TTL of a run is over."""
        run_id = pick(self.ended, i)
        del self.truth.runs[run_id]
        self.lab.forget(run_id)

    @property
    def holders(self) -> list[str]:
        """Runs that hold a session without an owner, with other runs behind them."""
        return sorted(
            places[0]
            for places in self.truth.places.values()
            if len(places) > 1 and (run := self.truth.runs.get(places[0])) and not run.owner
        )

    @act(2, when=lambda self: self.holders, i=ANY, j=ANY, w=ANY, how=("claim", "cancel", "submit", "again"))
    def forget_holder(self, i: int, j: int, w: int, how: str) -> None:
        """The record of the holder of a session is lost. The next script that handles the session repairs
        it."""
        lost = pick(self.holders, i)
        session = self.truth.runs[lost].session
        waiting = pick(self.truth.places[session][1:], j)
        del self.truth.runs[lost]
        self.lab.forget(lost)
        if how == "claim":
            worker = pick(self.workers, w)
            self.register(worker)
            self.claim(worker, waiting)
        elif how == "cancel":
            self.cancel(sorted(self.requests).index(waiting), force=False, lost=False)
        elif how == "submit":
            self.submit(session, 0, durable=True, expires=0, tell=False, busy="", lost=False)
        else:
            self.offer(self.requests[lost], 0, 0, reject=False, lost=False)

    @act()
    def write_to_disk(self) -> None:
        self.saved = self.lab.snapshot(), deepcopy(self.truth)

    @act(when=lambda self: self.saved)
    def lose_what_is_not_on_disk(self) -> None:
        """Redis dies and restarts with its last state on disk. Producers and workers keep their beliefs."""
        assert self.saved
        now, dead, (snapshot, truth) = self.truth.now, self.truth.dead, self.saved
        self.lab.restore(snapshot)
        self.lab.cut()
        self.truth = deepcopy(truth)
        self.truth.dead, self.truth.listening = dead, set()
        self.truth.server = f"server{next(self.numbers)}"
        self.truth.now, self.truth.lost_a_second = now, True
        self.lab.let_pass(int((now - truth.now) * TICK_MS))

    # --- what must hold ---

    @invariant()
    def holds(self) -> None:
        check(self.lab.read(), self.lab.keys, self.truth)

    def end_fairly(self) -> None:
        """All workers live, every message arrives, the rescue loop works: then every run must end."""
        for _ in range(FAIR_ROUNDS):
            if all(run.over and not run.untold for run in self.truth.runs.values()):
                return
            self.let_pass(1)
            for w in range(len(self.workers)):
                self.beat(w)
            self.look()
            while self.reclaim_some(100, blameless=False, lost=False):
                pass
            self.end_waits()
            self.wake(100, lost=False)
            self.resend(None, lost=False)
            while self.messages:
                self.claim(self.workers[-1], run_id := self.messages.pop(0))  # it reads all formats
                if (run := self.truth.runs.get(run_id)) and run.over:
                    self.tell_of(run_id, run.life)
            for worker in self.workers:
                for attempt in list(worker.carries.values()):
                    self.work_fairly(worker, attempt)
            self.holds()
        stuck = [run for run in self.truth.runs.values() if not run.over or run.untold]
        raise AssertionError(f"stuck for ever: {stuck}")

    def work_fairly(self, worker: Worker, attempt: Attempt) -> None:
        """An attempt whose writes all arrive. It may be stopped by what happened before."""
        for kind in ("commit", "finish", "finish"):
            if attempt is worker.carries.get(attempt.run_id):
                self.step(worker, attempt, kind)

    def end_waits(self) -> None:
        """Everybody decides and sends what parked runs wait for."""
        for run in list(self.truth.runs.values()):
            for wait in run.waits:
                if wait.fact.startswith("child:") and self.is_worked_on(run, wait.fact[len("child:") :]):
                    continue
                if wait.fact == RESOLUTION:
                    self.decide_of(run.id, "skip", "", lost=False)
                    continue
                self.send_fact(sorted(self.requests).index(run.id), wait.fact, "", lost=False)

    def teardown(self) -> None:
        try:
            self.holds()
            self.end_fairly()
            self.holds()
            assert ttl_violations(self.lab.store.cell.url) == []
        finally:
            self.lab.clear()


def protocol_in(lab: Lab, machine: type[Protocol] = Protocol) -> type[Protocol]:
    return type("ProtocolInTheLab", (machine,), {"lab": lab})


def play(lab: Lab, seed: int, machine: type[Protocol] = Protocol) -> None:
    """Play histories in this laboratory; the seed determines them. Raises when one breaks a promise."""
    run_state_machine_as_test(
        hypothesis.seed(seed)(protocol_in(lab, machine)),
        settings=hypothesis.settings(
            max_examples=BATCH,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],  # shrinking takes minutes, and 40 acts are readable
        ),
    )
