"""The model: the only place that computes what must be true without calling a script.

It is small on purpose: a run is in one state, one fence may write, sessions are ordered lists of runs. Every
method is one step of the protocol. It returns the expected answer, and the runs for which a wake-up must be
sent.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from tests.properties.payments import ENDING_WITH_LIFE, PaymentsTruth

__all__ = ["LEASE", "MAX_RECOVERIES", "NO_TURNS", "RENEWED_WITHIN", "SILENCE", "Run", "Truth", "TurnsOfFork"]

LEASE = 3.5  # ticks
HEARTBEAT = 0.5  # ticks: leases that end within it count as lost together
RENEWED_WITHIN = 1.5  # a live worker has renewed again
SILENCE = 0.5
HOUR = 6  # ticks
TOO_MANY_ALARMS = 3
MAX_RECOVERIES = 2
MOST_SPARED = 3  # in a row
MOST_DOUBTED = 3  # deaths in company of a suspect that should be executed alone
EMPTY_WITHIN = 1.5  # ticks that such a suspect waits for an empty worker
MOST_ALONE = 2.5
FORCED_AFTER = 1.5  # ticks that an interrupted run has to end by itself
OVERDUE_AGAIN = 0.5
CANCELLED_BY = {"open_jobs": "job", "open_responses": "response"}  # recipient -> what a run leaves behind
TERMINAL = ("completed", "failed", "cancelled")
PARKED = ("waiting", "awaiting_approval", "paused", "waiting_child")
PARKS = 3  # the format of a run that was parked
DELEGATES = 4  # the format of parents and children
HOLDS = 5  # the same, of those that share a session

Wakes = set[str]


@dataclass(frozen=True)
class Suspicion:
    """The suspicion against a run; a record removes it."""

    group: str = ""  # its suspects may share a process; suspects of other groups may not
    halved: int = 0  # deaths with other suspects
    spared: int = 0  # ends of leases in a row that were not deaths
    named: int = 0  # by the watchdog
    by: str = ""  # the incarnation that died
    doubted: int = 0  # deaths after which it is poisoned, if no other run could have caused them


@dataclass
class End:
    """Information about the end of a lease."""

    attempt_result: int = 0  # when the first of its runs was reclaimed; 0: none was
    suspects: int = 0
    answered: bool = False  # the process is alive
    named: str = ""  # the run that its watchdog named
    died: bool = False
    blamed: dict[str, tuple[int, Suspicion]] = field(
        default_factory=dict
    )  # the suspicion against each run before


@dataclass(frozen=True)
class Wait:
    """What a parked run waits for: a fact, or numbered facts if its name ends with a colon."""

    fact: str
    needs_all: bool = False

    @property
    def kind(self) -> str:
        return self.fact.partition(":")[0]

    def is_ended_by(self, name: str) -> bool:
        number = name.removeprefix(self.fact)
        return name == self.fact or (self.fact.endswith(":") and number != name and number.isdecimal())


@dataclass(frozen=True)
class Parking:
    """How a run parks: its state, what it waits for, and for how many ticks at most (0: for ever)."""

    state: str
    waits: tuple[Wait, ...]
    delay: float = 0.0


@dataclass
class Run:
    id: str
    session: str
    digest: str
    durable: bool = True
    tell: bool = False  # Celery must be notified of its end
    expires: float = 0.0  # tick by which it must have been started; 0: never
    born: int = 0  # decides between equal ticks of `expires`
    state: str = "scheduled"
    life: int = 1
    untold: bool = False
    tellings: int = 0
    since: float = 0.0  # tick of its due time (scheduled, retrying) or of its last wake-up (queued)
    no: int = 0  # decides between equal ticks
    owner: str = ""
    fence: str = ""  # may write while the run is running; of a finished run: the one that ended it
    nonce: str = ""
    cancel: bool = False
    on_busy: str = ""  # `interrupt` or `rollback`: it does not wait for its session
    interrupted: str = ""  # the same, of the run that has interrupted this one
    is_told: bool = False  # its owner knows since its claim that it is interrupted
    force_at: float = 0.0  # it is ended by force; 0: it was not interrupted
    force_due: tuple[float, int] = (0.0, 0)  # when that is checked next
    attempts: int = 0
    emit_no: int = 0
    retries: int = 0
    recoveries: int = 0
    stuck: int = 0  # deaths as the single suspect
    suspicion: Suspicion = Suspicion()
    has_new_record: bool = False  # since its claim
    claimed: float = 0.0  # tick
    format: int = 1
    left: set[tuple[int, int]] = field(default_factory=set)  # its format, and the newest that a worker reads
    journal: list[str] = field(default_factory=list)
    copied: int = 0  # records of its journal that are copies of those of another run
    usage: int = 0
    told: list[int] = field(default_factory=list)  # numbers of the events that its attempts have emitted
    facts: dict[str, str] = field(default_factory=dict)  # from outside, not taken yet
    facts_no: int = 0  # the number of the newest fact
    message_ids: set[str] = field(default_factory=set)
    waits: tuple[Wait, ...] = ()
    until: float = 0.0  # tick at which a parked run continues without facts; 0: never
    parks: int = 0
    wakes: int = 0
    parent: str = ""  # the run that has delegated to it
    parent_call: str = ""
    parent_life: int = 0  # the life of the parent that waits for it
    parent_ended: bool = False  # it is cancelled because its parent has ended
    mode: str = ""  # `isolated`, `shared` or `forked`
    background: bool = False
    turns: list[str] = field(default_factory=list)  # what shared children have left for the session
    turns_written: int = 0  # the number of these items that are written
    kids_begun: int = 0
    kids_ended: int = 0

    @property
    def held(self) -> Suspicion:
        """The suspicion against a run. A run that was given back twice is a group with one member."""
        given_back = self.stuck >= 2 and self.suspicion == Suspicion()
        return Suspicion(self.id) if given_back else self.suspicion

    @property
    def over(self) -> bool:
        return self.state in TERMINAL

    @property
    def is_lent_to(self) -> bool:
        """Whether it works in the session of its parent while the parent waits for it."""
        return self.mode == "shared" and bool(self.parent_life)

    @property
    def says_so_itself(self) -> bool:
        """Whether a worker must end it, because its session gets a turn."""
        return self.cancel and self.interrupted == "interrupt"

    @property
    def may_expire(self) -> bool:
        return bool(self.expires) and not self.attempts and not self.over


@dataclass
class Gone:
    """A lease that was ended early, and the runs that were taken from its owner: the life of each."""

    seen_by: str
    alive: bool = False  # it has reported this
    taken: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TurnsOfFork:
    """What a fork gets of held turns: those that the source saw when it began (id of the run that holds them,
    first position, the one behind the last), and the first items of those that the source holds itself."""

    above: tuple[tuple[str, int, int], ...] = ()
    held_to: int = 0
    held_call: str = ""


NO_TURNS = TurnsOfFork()


def _messages_in(held: list[str]) -> list[str]:
    return [item[1:] for item in held if item[0] == "m"]


class Truth(PaymentsTruth):
    def __init__(self) -> None:
        self.server = "server1"  # the current server; it does not know earlier connections
        self.listening: set[str] = set()  # incarnations with a connection
        self.dead: set[str] = set()  # incarnations whose processes have died
        self.watched: dict[str, tuple[str, float]] = {}  # seen by this server, renews again by this tick
        self.silent: dict[str, float] = {}
        self.gone: dict[str, Gone] = {}
        self.alarms: list[tuple[str, float]] = []
        self.off: set[str] = set()
        self.now = 0.0
        self.leases: dict[str, float] = {}  # incarnation -> tick at which it ends
        self.ends: dict[str, End] = {}
        self.alone: dict[str, float] = {}  # suspect -> tick until which it waits for an empty worker
        self.lost: dict[str, float] = {}  # incarnation -> tick of the end of its lease, once it is reclaimed
        self.runs: dict[str, Run] = {}
        self.lost_journals: set[str] = set()  # runs whose journal key has a wrong type
        self.places: dict[str, list[str]] = {}  # session -> runs that have not ended, the first one holds it
        self.transcript: dict[str, list[str]] = {}
        self.formats: dict[str, int] = {}  # of sessions
        self.kids: dict[str, set[str]] = {}  # parent -> children that have not ended
        self.to_stop: list[tuple[Run, bool, set[str]]] = []
        self.is_stopping = False
        self.below: dict[str, str] = {}  # shared child that holds a session -> its parent
        self.summaries: dict[str, list[int]] = {}  # of sessions: how many messages each one stands for
        self.recipients: set[str] = set()  # of ends, served by workers
        self.undelivered: set[tuple[str, int, str]] = set()  # recipient, life, run
        self.lost_a_second = False
        self.woken: Wakes = set()  # by the last submission
        self.announced: dict[str, set[tuple[str, int]]] = {}  # facts that workers were told of: run, number
        self._no = 0

    # --- questions ---

    def holder(self, session: str) -> str | None:
        return next(iter(self.places.get(session, [])), None)

    def owned(self, incarnation: str) -> set[str]:
        return {run.id for run in self.runs.values() if run.owner == incarnation}

    def cancel_requested(self, incarnation: str) -> set[str]:
        return {
            run_id
            for run_id in self.owned(incarnation)
            if self.runs[run_id].cancel and not self.runs[run_id].is_told
        }

    def announcements(self, incarnation: str) -> set[str]:
        """The notices of facts in the box of a worker."""
        return {
            f' {{"kind":"fact","number":{number},"run":"{run_id}"}}'
            for run_id, number in self.announced.get(incarnation, ())
        }

    def group_in(self, incarnation: str) -> set[str]:
        """The groups of its suspects: one, unless a suspicion was removed."""
        return {self.runs[run_id].held.group for run_id in self.owned(incarnation)} - {""}

    def lost_leases(self) -> set[str]:
        return {incarnation for incarnation, end in self.leases.items() if end <= self.now}

    def writer(self, run_id: str, fence: str) -> Run | None:
        """The run, if the owner with this fence may write."""
        run = self.runs.get(run_id)
        return run if run and run.state == "running" and run.fence == fence else None

    def neighbours(self) -> set[str]:
        return {incarnation for incarnation, end in self.leases.items() if end > self.now}

    # --- producers ---

    def submit(self, asked: Run, delay: float, expires: float, reject: bool) -> str:
        """`asked` has the ids and options; the delay and the expiry are in ticks, 0 for none."""
        if known := self.runs.get(asked.id):
            return "SAME" if known.digest == asked.digest else "CONFLICT"
        if reject and any(run_id in self.runs for run_id in self.places.get(asked.session, [])):
            return "BUSY"
        self._no += 1
        until = self.now + expires if expires else 0.0
        run = self.runs[asked.id] = replace(
            asked,
            expires=until,
            born=self._no,
            journal=[],
            told=[],
            left=set(),
            facts={},
            message_ids=set(),
            turns=[],
        )
        if delay:
            self._at(run, "scheduled", self.now + (min(delay, expires) if expires else delay))
        else:
            self.woken = self._enter(run)
        return "NEW"

    def resume(self, run_id: str) -> str:
        run = self.runs.get(run_id)
        if not run:
            return "UNKNOWN"
        if not run.over or run.state == "completed":
            return "COMPLETED" if run.over else "LIVE"
        if not run.journal and not run.durable and run.attempts:
            return "NO_CHECKPOINT"
        self._revive(run)
        return "OK"

    def _revive(self, run: Run, parent_life: int = 0) -> Wakes:
        run.parent_life, run.parent_ended = parent_life, False
        run.life, run.cancel, run.untold = run.life + 1, False, False
        run.stuck = run.retries = run.emit_no = 0
        run.expires = run.force_at = 0.0
        run.on_busy = run.interrupted = ""
        run.suspicion = Suspicion()
        for name in ENDING_WITH_LIFE:
            run.facts.pop(name, None)
        return self._place(run)

    def fork(
        self, from_run_id: str, asked: Run, steps: int, messages: int, turns: TurnsOfFork = NO_TURNS
    ) -> str:
        source = self.runs.get(from_run_id)
        if not source:
            return "UNKNOWN"
        if from_run_id in self.lost_journals or not source.journal:
            return "NO_CHECKPOINT"
        if steps >= len(source.journal):
            return "OTHER_CHECKPOINT"
        held_above: list[str] = []
        for id_, begin, end in turns.above:
            items = self.runs[id_].turns if id_ in self.runs else []
            if len(items) < end:
                return "HELD_EXPIRED"
            held_above += items[begin:end]
        held = source.turns[: turns.held_to]
        self._no += 1
        journal = source.journal[: steps + 1]
        self.runs[asked.id] = run = replace(
            asked,
            born=self._no,
            journal=journal,
            copied=len(journal),
            format=source.format,
            told=[],
            left=set(),
            turns=held if len(held) == turns.held_to and held[-1:] == [f"t{turns.held_call}"] else [],
        )
        run.facts, run.message_ids = {}, set()
        if run.session != source.session:
            copied = self.transcript.get(source.session, [])[:messages]
            self.transcript[run.session] = [*copied, *_messages_in(held_above)]
            known = self.summaries.get(source.session, [])
            self.summaries[run.session] = [count for count in known if count <= messages]
            if source.session in self.formats:
                self.formats[run.session] = self.formats[source.session]
        self._place(run)
        return "NEW"

    def told(self, run_id: str, life: int) -> bool:
        run = self.runs.get(run_id)
        if not run or not run.over or run.life != life:
            return False
        run.untold = False
        return True

    def cancel(
        self, run_id: str, force: bool, messages: Collection[str] = (), *, overdue: bool = False
    ) -> tuple[str, Wakes]:
        """`messages`: what an interrupted run leaves in its session. `overdue`: only if it has not ended in
        time."""
        run = self.runs.get(run_id)
        if not run:
            return "UNKNOWN", set()
        if run.over or (overdue and not 0 < run.force_at <= self.now):
            return "ALREADY", set()
        if run.says_so_itself and not run.owner and not force:
            return "REQUESTED", set()
        if run.owner and not force:
            return "REQUESTED", self._stop(run)
        if messages and run.says_so_itself and self.holder(run.session) == run_id:
            self._write_turn(run, messages)
        return "CANCELLED", self._end(run, "cancelled")

    def fact(self, run_id: str, name: str, value: str, message_id: str) -> tuple[str, Wakes]:
        """A name that ends with a colon gets the number of the fact."""
        run = self.runs.get(run_id)
        if not run or run.over:
            return ("ENDED" if run else "UNKNOWN"), set()
        if name.endswith(":") and message_id in run.message_ids:
            return "SAME", set()
        if name in run.facts:
            return "ALREADY", set()
        run.message_ids |= {message_id} - {""}
        return "OK", self._store_fact(run, name, value)

    def _store_fact(self, run: Run, name: str, value: str) -> Wakes:
        run.facts_no += 1
        name = f"{name}{run.facts_no}" if name.endswith(":") else name
        run.facts[name] = value
        if run.owner:
            self.announced.setdefault(run.owner, set()).add((run.id, run.facts_no))
        ended = next((wait for wait in run.waits if wait.is_ended_by(name)), None)
        if not ended:
            return set()
        together = [wait for wait in run.waits if wait.needs_all and wait.kind == ended.kind]
        if ended.needs_all and not all(wait.fact in run.facts for wait in together):
            return set()
        return self._unpark(run)

    def delete_session(self, session: str, even_if_not_notified: bool) -> str:
        runs = [run for run in self.runs.values() if run.session == session]
        if any(not run.over for run in runs):
            return "BUSY"
        if any(run.untold or self._has_left_behind(run) for run in runs) and not even_if_not_notified:
            return "UNTOLD"
        for run in runs:
            del self.runs[run.id]
        for kept in (self.places, self.transcript, self.formats, self.summaries):
            kept.pop(session, None)
        return "DELETED"

    def _has_left_behind(self, run: Run) -> bool:
        """Whether a worker must still cancel a job or a response of the run: it needs its facts."""
        return any(
            (recipient, run.life, run.id) in self.undelivered
            and any(name.startswith(f"{kind}:") for name in run.facts)
            for recipient, kind in CANCELLED_BY.items()
        )

    # --- leases ---

    def register(self, incarnation: str, previous: str = "") -> None:
        self.leases[incarnation] = self.now + LEASE
        self._forget_connection(incarnation)
        if previous:
            self._answers(previous)

    def renew(self, incarnation: str) -> bool:
        alive = self.leases.get(incarnation, self.now) > self.now
        if alive:
            self.leases[incarnation] = self.now + LEASE
            self._forget_connection(incarnation)
            if incarnation in self.listening:
                self.watched[incarnation] = (self.server, self.now + RENEWED_WITHIN)
        return alive

    def retire(self, incarnation: str) -> str:
        self._forget_connection(incarnation)
        if incarnation in self.leases and self.owned(incarnation):
            self.leases[incarnation] = self.now
            self._answers(incarnation)
            return "OVER"
        self.leases.pop(incarnation, None)
        self.announced.pop(incarnation, None)
        return "GONE"

    def accuse(self, run_id: str, incarnation: str) -> bool:
        run = self.runs.get(run_id)
        if not run or run.owner != incarnation or incarnation not in self.leases:
            return False
        end = self.ends.setdefault(incarnation, End())
        end.named, end.died = run_id, True
        self.leases[incarnation] = min(self.leases[incarnation], self.now)
        return True

    # --- leases that end early ---

    def end_lease(self, incarnation: str, is_its_process: bool) -> str:
        if not is_its_process or self.leases.get(incarnation, self.now) <= self.now or "process" in self.off:
            return "OVER"
        self._end_early(incarnation, "process")
        return "OK"

    def look(self) -> set[str]:
        """The workers whose leases are ended."""
        given_up: set[str] = set()
        for incarnation in self.neighbours() if "connection" not in self.off else ():
            if incarnation in self.listening:
                self.silent.pop(incarnation, None)
                continue
            server, renewed_by = self.watched.get(incarnation, ("", 0.0))
            if server != self.server:
                continue
            silent_since = self.silent.setdefault(incarnation, self.now)
            is_over = max(silent_since + SILENCE, renewed_by) <= self.now
            if is_over and all(self.runs[run_id].durable for run_id in self.owned(incarnation)):
                self._end_early(incarnation, "connection")
                given_up.add(incarnation)
        return given_up

    def alarm(self, incarnation: str) -> tuple[int, str, bool] | None:
        """The number of runs, the check that was wrong, and whether it is off now."""
        gone = self.gone.get(incarnation)
        if not gone or gone.alive:
            return None
        gone.alive, runs = True, 0
        for run_id, life in gone.taken.items():
            run = self.runs.get(run_id)
            if run and run.life == life:
                runs += 1
                run.recoveries = max(run.recoveries - 1, 0)
        self.alarms.append((gone.seen_by, self.now))
        recent = [at for seen_by, at in self.alarms if seen_by == gone.seen_by and self.now - at < HOUR]
        if len(recent) >= TOO_MANY_ALARMS:
            self.off.add(gone.seen_by)
        return runs, gone.seen_by, gone.seen_by in self.off and len(recent) >= TOO_MANY_ALARMS

    def _end_early(self, incarnation: str, seen_by: str) -> None:
        self.leases[incarnation] = self.now
        self.silent.pop(incarnation, None)
        self.gone[incarnation] = Gone(seen_by)
        self.ends.setdefault(incarnation, End()).died = True

    def _forget_connection(self, incarnation: str) -> None:
        self.watched.pop(incarnation, None)
        self.silent.pop(incarnation, None)

    # --- whoever carries a run ---

    def claim(self, run_id: str, incarnation: str, nonce: str, newest: int) -> tuple[str, Wakes]:
        """CLAIMED also makes this incarnation the owner; the fence is that of the script."""
        run = self.runs.get(run_id)
        if not run:
            return "UNKNOWN", set()
        if run.over:
            return "OTHER_FORMAT" if run.untold and run.format > newest else "DONE", set()
        if self.leases.get(incarnation, self.now) <= self.now:
            return "NOT_ALIVE", set()
        if run.owner:
            return "CLAIMED" if (run.owner, run.nonce) == (incarnation, nonce) else "BUSY", set()
        is_cancelled = run.cancel and not run.says_so_itself
        if is_cancelled or (run.may_expire and run.expires <= self.now):
            return "CANCELLED", self._end(run, "cancelled", in_hand=True)
        if run.state in ("scheduled", "retrying") and run.since > self.now:
            return "NOT_DUE", set()
        woken = self._enter(run) if run.state == "scheduled" else set()
        woken |= self._repaired(run.session)
        if self.holder(run.session) != run_id:
            if run.state == "queued" and self._has_lent(run):
                run.since = math.inf  # until it has its session again
            return "WAITING", woken
        needs = max(run.format, self.formats.get(run.session, 0))
        if run.state in PARKED:
            return "OTHER_FORMAT" if needs > newest else "PARKED", set()
        if needs > newest and run.says_so_itself:
            return "OTHER_FORMAT", set()
        if needs > newest:
            run.left.add((needs, newest))
            self._at(run, "retrying", self.now)  # being left to others takes time
            return "OTHER_FORMAT", set()
        if run_id in self.lost_journals:
            return "DONE", self._end(run, "failed", in_hand=True)
        if self._is_busy(run, incarnation):
            if run.says_so_itself:
                return "SUSPECT_BUSY", set()
            self._at(run, "retrying", self.now)  # a second is less than a tick
            return "SUSPECT_BUSY", set()
        if run.held.doubted:
            self.alone.pop(run_id, None)
        run.state, run.owner, run.nonce, run.fence = "running", incarnation, nonce, ""
        run.claimed = self.now
        run.attempts, run.emit_no, run.has_new_record = run.attempts + 1, 0, False
        run.is_told = run.says_so_itself
        return "CLAIMED", set()

    def _is_busy(self, run: Run, incarnation: str) -> bool:
        """Whether the run must wait because of suspects: itself, or others."""
        if run.held.group and self.group_in(incarnation) - {run.held.group}:
            return True
        owned = [self.runs[run_id] for run_id in self.owned(incarnation)]
        if len(owned) == 1 and owned[0].held.doubted and self.now - owned[0].claimed < MOST_ALONE:
            return True
        if run.held.doubted:
            return bool(owned) and self._waits_for_empty(run.id)
        return not owned and self._is_kept_free()

    def _waits_for_empty(self, run_id: str) -> bool:
        self.alone[run_id] = min(self.alone.get(run_id, math.inf), self.now + EMPTY_WITHIN)
        return self.alone[run_id] > self.now

    def _is_kept_free(self) -> bool:
        """Whether empty workers are kept free for a suspect that comes soon."""
        is_kept = False
        for run_id in [run_id for run_id, until in self.alone.items() if until >= self.now]:
            run = self.runs.get(run_id)
            if not run or run.owner or run.over or not run.held.doubted:
                del self.alone[run_id]
            elif run.state == "queued" or (run.state == "retrying" and run.since <= self.now):
                is_kept |= self._waits_for_empty(run_id)
        return is_kept

    def emit(self, run_id: str, fence: str, batch_no: int, number: int, format_: int = 0) -> str:
        run = self.writer(run_id, fence)
        if not run:
            return "FENCED"
        if batch_no <= run.emit_no:
            return "SAME"
        run.emit_no = batch_no
        run.format = max(run.format, format_)
        run.told.append(number)
        return "OK"

    def commit(
        self,
        run_id: str,
        fence: str,
        position: int,
        records: list[str],
        usage: int,
        batch_no: int,
        number: int,
        format_: int,
        taken: tuple[str, ...] = (),
    ) -> str:
        run = self.writer(run_id, fence)
        if not run:
            return "FENCED"
        there = run.journal[position : position + len(records)]
        if there not in ([], records) or position > len(run.journal):
            return "MISPLACED"
        if not there:
            run.journal += records
            run.told.append(number)
            run.usage, run.emit_no, run.stuck, run.retries = usage, batch_no, 0, 0
            run.suspicion, run.has_new_record = Suspicion(), True
            run.format = max(run.format, format_)
            for name in taken:
                run.facts.pop(name, None)
        return "CANCEL" if run.cancel else "OK"

    def suspend(self, run_id: str, fence: str, kind: str, delay: float) -> tuple[str, Wakes]:
        run = self.writer(run_id, fence)
        if not run or run.cancel:
            return "CANCEL" if run else "FENCED", set()
        if kind == "retry":
            run.retries += 1
            self._at(run, "retrying", self.now + delay)
            return "OK", set()
        if kind == "left_to_others":
            self._at(run, "retrying", self.now)  # being left to others takes time
            return "OK", set()
        return "OK", self._queued(run)

    def park(
        self,
        run_id: str,
        fence: str,
        parking: Parking,
        facts_seen: int,
        acknowledged: int,
        *,
        lends: bool = True,
    ) -> tuple[str, Wakes]:
        """The run waits for these facts, at most `parking.delay` ticks; 0: for ever. `lends`: its session."""
        run, state, delay = self.writer(run_id, fence), parking.state, parking.delay
        if not run or run.cancel:
            return "CANCEL" if run else "FENCED", set()
        if run.emit_no < acknowledged:
            return "MISPLACED", set()
        if run.facts_no != facts_seen:
            return "OK", self._queued(run)
        self._at(run, state, self.now)
        run.waits, run.until, run.format = (
            parking.waits,
            self.now + delay if delay else 0.0,
            max(run.format, PARKS),
        )
        run.parks += 1
        return "OK", self._begin_shared(run) if lends else set()

    # --- children ---

    def delegate(
        self, run_id: str, fence: str, asked: Run, delegated: str, stored: int, batch_no: int
    ) -> tuple[str, Wakes]:
        """`asked` is the child, with its parent and the call that creates it."""
        run = self.writer(run_id, fence)
        if not run:
            return "FENCED", set()
        if len(run.journal) < stored:
            return "MISPLACED", set()
        child = self.runs.get(asked.id)
        if child:
            if (child.parent, child.parent_call) != (run_id, asked.parent_call):
                return "CONFLICT", set()
            may_go_on = child.state == "cancelled" and child.parent_ended
            may_go_on = may_go_on and bool(child.journal or child.durable or not child.attempts)
            if child.over and not may_go_on:
                return "ENDED", set()
            if not child.over and child.parent_ended:
                return "STOPPING", set()
        if run.cancel:
            return "CANCEL", set()
        format_ = HOLDS if asked.mode == "shared" else DELEGATES
        run.format, run.emit_no = max(run.format, format_), batch_no
        run.facts[f"delegated:{asked.parent_call}"] = delegated
        self.kids.setdefault(run_id, set()).add(asked.id)
        if child and not child.over:
            was_awaited, child.parent_life = child.parent_life, run.life
            if child.is_lent_to and not was_awaited and child.state == "waiting_session":
                places = self.places[child.session]
                places.remove(child.id)
                places.insert(self._place_of(child, places), child.id)
            return "SAME", self._queued(child) if child.state == "queued" else set()
        run.kids_begun += 1
        if child:
            run.facts.pop(f"child:{asked.parent_call}", None)
            return "NEW", self._revive(child, run.life)
        self._no += 1
        child = replace(asked, born=self._no, journal=[], told=[], left=set(), facts={}, message_ids=set())
        child.format, child.durable, child.parent_life, child.turns = format_, run.durable, run.life, []
        if child.mode == "forked" and child.session not in self.places:
            copy = self.transcript[child.session] = list(self.transcript.get(run.session, []))
            for each in self.stack(run):
                copy += _messages_in(each.turns[each.turns_written :])
            if run.session in self.formats:
                self.formats[child.session] = self.formats[run.session]
        self.runs[asked.id] = child
        return "NEW", self._place(child)

    def _begin_shared(self, parent: Run) -> Wakes:
        """A parked run lends its session to the next of its children that share it."""
        places = self.places.get(parent.session, [])
        if parent.state not in PARKED or not places or places[0] != parent.id:
            return set()
        waiting = (self.runs[waiting] for waiting in places[1:])
        child = next((each for each in waiting if each.is_lent_to and each.parent == parent.id), None)
        if not child:
            return set()
        places.remove(child.id)
        places[0] = child.id
        child.format = max(child.format, parent.format)
        self.below[child.id] = parent.id
        return self._queued(child)

    def stack(self, run: Run) -> list[Run]:
        """The runs that have lent the session of a run that works, the lowest one first, and the run."""
        found = [run]
        while (below := self.below.get(found[0].id)) is not None:
            found.insert(0, self.runs.get(below, Run(below, run.session, "")))
        return found

    def held_at_start(self, run: Run) -> list[str]:
        """What a claim says of the turns that the run and the runs above it hold."""
        ranges = [(each.id, each.turns_written, len(each.turns)) for each in self.stack(run)]
        return [str(part) for each in ranges if each[2] for part in each]

    def _hold(self, run: Run, turn: list[str]) -> None:
        """The parent of a shared child gets what it leaves for the session."""
        if parent := self.runs.get(run.parent):
            handed_on = [item for item in run.turns[run.turns_written :] if item[0] in "ma"]
            parent.turns += [*handed_on, *turn, f"t{run.parent_call}"]
            parent.format = max(parent.format, HOLDS)

    def _write_turn(self, run: Run, messages: Collection[str]) -> None:
        """The session gets what the run holds for its children, and then its own messages."""
        held = run.turns[run.turns_written :] if run.format >= HOLDS else []
        self.transcript.setdefault(run.session, []).extend([*_messages_in(held), *messages])
        self._held_is_written(run)

    def _held_is_written(self, run: Run) -> None:
        if run.format >= HOLDS:
            run.turns_written = len(run.turns)

    def _tell_parent(self, run: Run) -> Wakes:
        if not run.parent_call:
            return set()
        self.kids.get(run.parent, set()).discard(run.id)
        parent = self.runs.get(run.parent)
        if not parent or parent.over or run.parent_life != parent.life:
            return set()
        parent.kids_ended += 1
        if run.background:
            return set()
        return self._store_fact(parent, f"child:{run.parent_call}", "")

    def _end_children(self, run: Run, has_background: bool) -> Wakes:
        """First those of the run, then those of its children, and so on."""
        self.to_stop.append((run, has_background, self.kids.pop(run.id, set())))
        wakes: Wakes = set()
        if self.is_stopping:
            return wakes
        self.is_stopping = True
        while self.to_stop:
            parent, has_background, kids = self.to_stop.pop(0)
            for child in (self.runs[kid] for kid in sorted(kids) if kid in self.runs):
                if child.over:
                    continue
                if child.background and not has_background:
                    self.kids.setdefault(parent.id, set()).add(child.id)
                    continue
                child.parent_ended = True
                wakes |= self._stop(child)
        self.is_stopping = False
        return wakes

    def _stop(self, run: Run) -> Wakes:
        if not run.owner:
            return self._end(run, "cancelled")
        run.is_told = run.is_told and run.cancel
        run.cancel = True
        return set()

    def _lowest(self, run_id: str) -> str:
        found = run_id
        while run_id in self.below:
            run_id = self.below[run_id]
            found = run_id if self._lends(run_id) else found
        return found

    def _lends(self, run_id: str) -> bool:
        """Whether the run below a holder has lent the session; one that has ended and was resumed has not."""
        run = self.runs.get(run_id)
        return bool(run) and run.state in (*PARKED, "queued")

    def finish(
        self,
        run_id: str,
        fence: str,
        messages: Collection[str],
        usage: int,
        number: int,
        format_: int,
        batch_no: int,
        state: str,
        summary: tuple[int, int] | None = None,
    ) -> tuple[str, Wakes]:
        """`summary`: its number, and the number of messages that it stands for."""
        run = self.runs.get(run_id)
        if run and run.over and run.fence == fence:
            return "OK", set()
        run = self.writer(run_id, fence)
        if not run:
            return "FENCED", set()
        if run.interrupted == "rollback" and state == "completed":
            if batch_no > run.emit_no:
                run.emit_no, run.usage = batch_no, usage
                run.told.append(number)
            return "CANCEL", set()
        run.told.append(number)
        run.usage = usage
        run.format = max(run.format, format_)
        if run.is_lent_to:
            self._hold(run, [*(f"m{message}" for message in messages), "slast", f"v{number}"])
            self._held_is_written(run)
            return "OK", self._end(run, state, by=fence, in_hand=True)
        summaries = self.summaries.setdefault(run.session, [])
        if summary and summary[0] == len(summaries) + 1:
            summaries.append(summary[1])
            format_ = max(format_, PARKS)
        self.formats[run.session] = max(self.formats.get(run.session, 0), format_)
        self._write_turn(run, messages)
        return "OK", self._end(run, state, by=fence, in_hand=True)

    def release(self, run_id: str, incarnation: str, fence: str, kind: str) -> tuple[str, Wakes]:
        """`lost`: no task of the owner executes the run. This counts unless it has a new record."""
        run = self.writer(run_id, fence)
        if not run or run.owner != incarnation:
            return "FENCED", set()
        if kind == "handover":
            return "OK", self._queued(run)
        counts = not run.has_new_record
        run.stuck, run.recoveries = run.stuck + counts, run.recoveries + counts
        return "OK", self._recovered(run)

    # --- rescue ---

    def reclaim(self, incarnation: str, taken: Collection[str], blameless: bool) -> Wakes:
        wakes: Wakes = set()
        gone = self.gone.get(incarnation)
        counted = 0 if gone and gone.alive else 1
        end = self._end_of(incarnation)
        nobody_died = end.answered or (not end.died and (blameless or self._lost_together(incarnation)))
        half = dict.fromkeys("ns", len(self.owned(incarnation)) % 2)
        for run in map(self.runs.__getitem__, taken):
            if gone:
                gone.taken[run.id] = run.life
            run.recoveries += counted
            is_poison = self._blame(run, incarnation, end, nobody_died, half)
            if run.says_so_itself:
                wakes |= self._queued(run)
            elif run.cancel:
                wakes |= self._end(run, "cancelled")
            elif not run.durable or is_poison:
                wakes |= self._end(run, "failed")
            else:
                wakes |= self._queued(run)
        if not self.owned(incarnation):
            del self.leases[incarnation]
            self.announced.pop(incarnation, None)
            self._forget_connection(incarnation)
        return wakes

    def _end_of(self, incarnation: str) -> End:
        end = self.ends.setdefault(incarnation, End())
        if incarnation not in self.lost:
            self.lost[incarnation] = self.leases[incarnation]
            owned = [self.runs[run_id] for run_id in self.owned(incarnation)]
            end.attempt_result, end.suspects = len(owned), sum(bool(run.held.group) for run in owned)
        return end

    def _lost_together(self, incarnation: str) -> bool:
        over = {other: at for other, at in self.leases.items() if at <= self.now} | self.lost
        others = [
            other
            for other, at in over.items()
            if other != incarnation
            and abs(at - self.lost[incarnation]) <= HEARTBEAT
            and not (other in self.ends and self.ends[other].died)
        ]
        for other in others:
            self._spare_all(other)
        return bool(others)

    def _answers(self, incarnation: str) -> None:
        self.ends.setdefault(incarnation, End()).answered = True
        self._spare_all(incarnation)

    def _spare_all(self, incarnation: str) -> None:
        end = self.ends.setdefault(incarnation, End())
        for run_id, (stuck, before) in end.blamed.items():
            run = self.runs.get(run_id)
            if (
                run
                and not run.over
                and run.suspicion.by == incarnation
                and run.suspicion.spared < MOST_SPARED
            ):
                run.stuck, run.suspicion = stuck, replace(before, spared=before.spared + 1)
        end.blamed = {}

    def _blame(self, run: Run, incarnation: str, end: End, nobody_died: bool, half: dict[str, int]) -> bool:
        """Whether the run is poisoned: it was suspected of the death of a process too often."""
        held, is_named = run.held, end.named == run.id
        if run.has_new_record and not is_named:
            run.suspicion = Suspicion()
            return False
        if (nobody_died or (end.named and not is_named)) and held.spared < MOST_SPARED:
            run.suspicion = replace(held, spared=held.spared + 1)
            return False
        end.blamed[run.id] = run.stuck, held
        kind = "s" if held.group else "n"
        group = "named" if is_named else f"{kind}{half[kind]}"
        half[kind] = half[kind] if is_named else 1 - half[kind]
        is_single = is_named or (end.suspects if held.group else end.attempt_result) == 1
        run.stuck += is_single
        run.suspicion = Suspicion(
            f"{incarnation}:{group}",
            held.halved + (not is_single),
            held.spared,
            held.named + is_named,
            incarnation,
            held.doubted,
        )
        deaths = run.stuck + run.suspicion.halved
        is_poison = run.suspicion.named >= 2 or (is_single and deaths > MAX_RECOVERIES)
        is_certain = is_named or end.attempt_result == 1 or held.doubted >= MOST_DOUBTED
        if is_poison and not is_certain:
            run.suspicion = replace(run.suspicion, doubted=held.doubted + 1)
            self.alone[run.id] = math.inf
        return is_poison and is_certain

    def wake(self, limit: int) -> tuple[Wakes, set[str]]:
        """The runs to wake, and the interrupted runs that the caller must end."""
        due = [
            (*run.force_due, run.id)
            if run.force_at
            else (run.since, run.no, run.id)
            if run.state in ("scheduled", "retrying")
            else (run.expires, run.born, run.id)
            for run in self.runs.values()
            if run.state in ("scheduled", "retrying")
            or (run.may_expire and not run.owner)
            or (run.force_at and not run.over)
        ]
        wakes: Wakes = set()
        overdue: set[str] = set()
        woken = [self.runs[run_id] for at, _, run_id in sorted(due)[:limit] if at <= self.now]
        parked = sorted((run.until, run.no, run.id) for run in self.runs.values() if run.until)
        for run in woken:
            if run.force_at:
                is_overdue = run.force_at <= self.now and self.holder(run.session) == run.id
                if is_overdue and not run.says_so_itself:
                    wakes |= self._end(run, "cancelled")
                else:
                    overdue |= {run.id} if is_overdue else set()
                    self._check_force(run, max(run.force_at, self.now + OVERDUE_AGAIN))
            elif run.may_expire and run.expires <= self.now:
                wakes |= self._end(run, "cancelled")
            else:
                wakes |= self._queued(run) if run.state == "retrying" else self._enter(run)
        for at, _, run_id in parked[: limit - len(woken)]:
            # In the meantime, a run that came due may have ended its wait.
            if at <= self.now and self.runs[run_id].until:
                wakes |= self._unpark(self.runs[run_id])
        return wakes, overdue

    def resend(self, older_than: float) -> Wakes:
        """Runs whose message is lost.

        An end that is still not notified is sent again in increasing intervals of a tick.
        """
        missing = {run.id for run in self.runs.values() if run.since < older_than and run.state == "queued"}
        untold = {run.id for run in self.runs.values() if run.since < older_than and run.untold}
        for run_id in missing:
            self._queued(self.runs[run_id])
        for run in map(self.runs.__getitem__, untold):
            run.tellings += 1
            run.since = self.now + (1 if run.tellings > 1 else 0)
        return missing | untold

    # --- how a run moves ---

    def _recovered(self, run: Run) -> Wakes:
        """The run has no owner any more: it continues, or ends."""
        if run.says_so_itself:
            return self._queued(run)
        if run.cancel:
            return self._end(run, "cancelled")
        if not run.durable or run.stuck > MAX_RECOVERIES:
            return self._end(run, "failed")
        return self._queued(run)

    def _at(self, run: Run, state: str, since: float) -> None:
        self._no += 1
        run.state, run.since, run.no, run.owner, run.fence = state, since, self._no, "", ""
        run.waits, run.until = (), 0.0

    def _queued(self, run: Run) -> Wakes:
        self._at(run, "queued", self.now)
        return {run.id}

    def _unpark(self, run: Run) -> Wakes:
        run.wakes += 1
        return self._queued(run)

    def _place(self, run: Run) -> Wakes:
        """A run that is submitted again because its record was lost keeps its place."""
        places = self.places.setdefault(run.session, [])
        if run.id not in places:
            self._at(run, "waiting_session", self.now)
            places.insert(self._place_of(run, places), run.id)
        woken = self._repaired(run.session)
        return woken | self._queued(run) if places[0] == run.id else woken

    def _place_of(self, run: Run, places: list[str]) -> int:
        """At the end; an interrupting run behind the holder and earlier interrupting runs, a shared child
        before these."""
        if not (run.on_busy or run.is_lent_to) or not places:
            return len(places)
        others = [self.runs[waiting] for waiting in places[1:]]
        if run.is_lent_to:
            return 1 + sum(other.is_lent_to for other in others)
        return 1 + sum(bool(other.on_busy) or other.is_lent_to for other in others)

    def _enter(self, run: Run) -> Wakes:
        """The run enters its session. It may interrupt the run that works there, and the one before it."""
        woken = self._place(run)
        places = self.places[run.session]
        at = places.index(run.id)
        if not run.on_busy or at == 0:
            return woken
        holder = places[0]
        bottom = self._lowest(holder)  # a shared child ends with the run that has delegated to it
        for other in dict.fromkeys([*places[at - 1 : at][: at - 1], bottom]):
            if other in self.runs and not self.runs[other].over:
                woken |= self._interrupt(self.runs[other], run.on_busy)
        if bottom != holder and bottom in self.runs and not self.runs[bottom].over:
            woken |= self._end_children(self.runs[bottom], has_background=False)
        if bottom != holder and holder in self.runs and not self.runs[holder].over:
            woken |= self._interrupt(self.runs[holder], "rollback")
        return woken

    def _interrupt(self, run: Run, mode: str) -> Wakes:
        if not run.cancel and mode == "rollback" and not run.owner:
            return self._end(run, "cancelled")
        if not run.force_at:
            run.force_at = self.now + FORCED_AFTER
            self._check_force(run, run.force_at)
        if run.cancel:
            return set()
        run.cancel, run.interrupted = True, mode
        is_waiting = run.owner or self.holder(run.session) != run.id
        return set() if is_waiting else self._queued(run)

    def _check_force(self, run: Run, at: float) -> None:
        self._no += 1
        run.force_due = (at, self._no)

    def _repaired(self, session: str) -> Wakes:
        """A holder without a record is replaced by the next run, as soon as a script handles the session."""
        places = self.places.get(session, [])
        if not places or places[0] in self.runs:
            return set()
        return self._passed_on(session, places.pop(0))

    def _passed_on(self, session: str, gone: str) -> Wakes:
        """The holder has gone: the run below it holds the session again, else the next one in the queue."""
        woken = self._given_back(session, gone)
        if woken is None:
            places = self.places[session]
            return self._queued(self.runs[places[0]]) if places else set()
        return woken or self._begin_shared(self.runs[self.places[session][0]])

    def _has_lent(self, run: Run) -> bool:
        above = self.holder(run.session)
        while above is not None and above != run.id:
            above = self.below.get(above)
        return above is not None

    def _given_back(self, session: str, gone: str) -> Wakes | None:
        """The run below the holder holds the session again. None: no run has lent it."""
        below = self.below.pop(gone, None)
        while below is not None:
            if self._lends(below):
                run = self.runs[below]
                self.places[session].insert(0, below)
                is_woken = run.state == "queued" or run.cancel
                return self._queued(run) if is_woken else set()
            below = self.below.pop(below, None)
        return None

    def _end(self, run: Run, state: str, by: str = "", in_hand: bool = False) -> Wakes:
        """`in_hand`: the caller notifies Celery; otherwise a message is sent for this."""
        self._at(run, state, self.now)
        run.fence, run.untold, run.tellings = by, run.tell, 0
        self.undelivered |= {(recipient, run.life, run.id) for recipient in self.recipients}
        wakes = {run.id} if run.tell and not in_hand else set()
        places = self.places.get(run.session, [])
        was_holder = self.holder(run.session) == run.id
        if run.id in places:
            places.remove(run.id)
        lender = None
        if was_holder:
            woken = self._given_back(run.session, run.id)
            if woken is None:
                woken = self._queued(self.runs[places[0]]) if places else set()
            elif not woken:
                lender = self.runs[places[0]]
            wakes |= woken
        wakes |= self._repaired(run.session)
        wakes |= self._tell_parent(run)
        if lender:  # unless the result has woken it
            wakes |= self._begin_shared(lender)
        return wakes | self._end_children(run, state == "cancelled")
