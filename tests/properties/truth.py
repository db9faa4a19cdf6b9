"""What must be true. The only place that says it without asking a script.

Small on purpose: a run stands somewhere, one fence may write, sessions are lists in the order of their
places. Every method is one step of the protocol; it returns what the step must be answered, and the runs
for which a wake-up must then be sent.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

__all__ = ["LEASE", "MAX_RECOVERIES", "Run", "Truth"]

LEASE = 3.5  # ticks
MAX_RECOVERIES = 2
TERMINAL = ("completed", "failed", "cancelled")

Wakes = set[str]


@dataclass
class Run:
    id: str
    session: str
    digest: str
    durable: bool = True
    tell: bool = False  # its end is to be told to Celery
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
    attempts: int = 0
    emit_no: int = 0
    retries: int = 0
    recoveries: int = 0
    stuck: int = 0
    format: int = 1
    left: set[tuple[int, int]] = field(default_factory=set)  # its format, and the newest that somebody read
    journal: list[str] = field(default_factory=list)
    claimed_length: int = 0  # records at the last claim
    usage: int = 0
    told: list[int] = field(default_factory=list)  # numbers of the events its attempts have told

    @property
    def over(self) -> bool:
        return self.state in TERMINAL

    @property
    def may_expire(self) -> bool:
        return bool(self.expires) and not self.attempts and not self.over


class Truth:
    def __init__(self) -> None:
        self.now = 0.0
        self.leases: dict[str, float] = {}  # incarnation -> tick at which it ends
        self.runs: dict[str, Run] = {}
        self.places: dict[str, list[str]] = {}  # session -> runs that have not ended, the first one holds it
        self.transcript: dict[str, list[str]] = {}
        self.formats: dict[str, int] = {}  # of sessions
        self.lost_a_second = False
        self._no = 0

    # --- questions ---

    def holder(self, session: str) -> str | None:
        return next(iter(self.places.get(session, [])), None)

    def owned(self, incarnation: str) -> set[str]:
        return {run.id for run in self.runs.values() if run.owner == incarnation}

    def cancel_requested(self, incarnation: str) -> set[str]:
        return {run_id for run_id in self.owned(incarnation) if self.runs[run_id].cancel}

    def lost_leases(self) -> set[str]:
        return {incarnation for incarnation, end in self.leases.items() if end <= self.now}

    def writer(self, run_id: str, fence: str) -> Run | None:
        """The run, if whoever has this fence may write."""
        run = self.runs.get(run_id)
        return run if run and run.state == "running" and run.fence == fence else None

    # --- producers ---

    def submit(self, asked: Run, delay: float, expires: float, reject: bool) -> str:
        """`asked` says who and what; the delay and the time to be started in are in ticks, 0 for none."""
        if known := self.runs.get(asked.id):
            return "SAME" if known.digest == asked.digest else "CONFLICT"
        if reject and self.places.get(asked.session):
            return "BUSY"
        self._no += 1
        until = self.now + expires if expires else 0.0
        run = self.runs[asked.id] = replace(
            asked, expires=until, born=self._no, journal=[], told=[], left=set()
        )
        if delay:
            self._at(run, "scheduled", self.now + (min(delay, expires) if expires else delay))
        else:
            self._place(run)
        return "NEW"

    def resume(self, run_id: str) -> str:
        run = self.runs.get(run_id)
        if not run or not run.journal:
            return "NO_CHECKPOINT" if run else "UNKNOWN"
        if not run.over or run.state == "completed":
            return "COMPLETED" if run.over else "LIVE"
        run.life, run.cancel, run.untold = run.life + 1, False, False
        run.stuck = run.retries = run.emit_no = 0
        self._place(run)
        return "OK"

    def told(self, run_id: str, life: int) -> bool:
        run = self.runs.get(run_id)
        if not run or not run.over or run.life != life:
            return False
        run.untold = False
        return True

    def cancel(self, run_id: str, force: bool) -> tuple[str, Wakes]:
        run = self.runs.get(run_id)
        if not run:
            return "UNKNOWN", set()
        if run.over:
            return "ALREADY", set()
        if run.owner and not force:
            run.cancel = True
            return "REQUESTED", set()
        return "CANCELLED", self._end(run, "cancelled")

    def delete_session(self, session: str, even_untold: bool) -> str:
        runs = [run for run in self.runs.values() if run.session == session]
        if any(not run.over for run in runs):
            return "BUSY"
        if any(run.untold for run in runs) and not even_untold:
            return "UNTOLD"
        for run in runs:
            del self.runs[run.id]
        for kept in (self.places, self.transcript, self.formats):
            kept.pop(session, None)
        return "DELETED"

    # --- leases ---

    def register(self, incarnation: str) -> None:
        self.leases[incarnation] = self.now + LEASE

    def renew(self, incarnation: str) -> bool:
        alive = self.leases.get(incarnation, self.now) > self.now
        if alive:
            self.leases[incarnation] = self.now + LEASE
        return alive

    def retire(self, incarnation: str) -> str:
        if incarnation in self.leases and self.owned(incarnation):
            self.leases[incarnation] = self.now
            return "OVER"
        self.leases.pop(incarnation, None)
        return "GONE"

    # --- whoever carries a run ---

    def claim(self, run_id: str, incarnation: str, nonce: str, newest: int) -> tuple[str, Wakes]:
        """CLAIMED also puts the run into the hands of this incarnation; its fence is what the script says."""
        run = self.runs.get(run_id)
        if not run:
            return "UNKNOWN", set()
        if run.over:
            return "OTHER_FORMAT" if run.untold and run.format > newest else "DONE", set()
        if self.leases.get(incarnation, self.now) <= self.now:
            return "NOT_ALIVE", set()
        if run.owner:
            return "CLAIMED" if (run.owner, run.nonce) == (incarnation, nonce) else "BUSY", set()
        if run.cancel or (run.may_expire and run.expires <= self.now):
            return "CANCELLED", self._end(run, "cancelled", in_hand=True)
        if run.state in ("scheduled", "retrying") and run.since > self.now:
            return "NOT_DUE", set()
        if run.state == "scheduled":
            self._place(run)
        if self.holder(run.session) != run_id:
            return "WAITING", set()
        needs = max(run.format, self.formats.get(run.session, 0))
        if needs > newest:
            run.left.add((needs, newest))
            self._at(run, "retrying", self.now)  # who leaves it lets its time pass
            return "OTHER_FORMAT", set()
        if run.stuck >= 2 and any(self.runs[other].stuck >= 2 for other in self.owned(incarnation)):
            self._at(run, "retrying", self.now)  # a second is no tick
            return "SUSPECT_BUSY", set()
        run.state, run.owner, run.nonce, run.fence = "running", incarnation, nonce, ""
        run.attempts, run.emit_no = run.attempts + 1, 0
        run.claimed_length = len(run.journal)
        return "CLAIMED", set()

    def emit(self, run_id: str, fence: str, batch_no: int, number: int) -> str:
        run = self.writer(run_id, fence)
        if not run:
            return "FENCED"
        if batch_no <= run.emit_no:
            return "SAME"
        run.emit_no = batch_no
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
            run.format = max(run.format, format_)
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
            self._at(run, "retrying", self.now)  # who leaves it lets its time pass
            return "OK", set()
        return "OK", self._queued(run)

    def finish(
        self, run_id: str, fence: str, messages: Collection[str], usage: int, number: int, format_: int
    ) -> tuple[str, Wakes]:
        run = self.runs.get(run_id)
        if run and run.over and run.fence == fence:
            return "OK", set()
        run = self.writer(run_id, fence)
        if not run:
            return "FENCED", set()
        run.told.append(number)
        run.usage = usage
        run.format = max(run.format, format_)
        self.formats[run.session] = max(self.formats.get(run.session, 0), format_)
        self.transcript.setdefault(run.session, []).extend(messages)
        return "OK", self._end(run, "completed", by=fence, in_hand=True)

    def release(self, run_id: str, incarnation: str, fence: str, kind: str) -> tuple[str, Wakes]:
        """`lost`: who had it does not execute it any more, which counts unless a record came of it."""
        run = self.writer(run_id, fence)
        if not run or run.owner != incarnation:
            return "FENCED", set()
        if kind == "handover":
            return "OK", self._queued(run)
        counts = len(run.journal) <= run.claimed_length
        run.stuck, run.recoveries = run.stuck + counts, run.recoveries + counts
        return "OK", self._recovered(run)

    # --- rescue ---

    def reclaim(self, incarnation: str, taken: Collection[str], blameless: bool) -> Wakes:
        wakes: Wakes = set()
        for run in map(self.runs.__getitem__, taken):
            run.recoveries += 1
            run.stuck += not blameless
            wakes |= self._recovered(run)
        if not self.owned(incarnation):
            del self.leases[incarnation]
        return wakes

    def wake(self, limit: int) -> Wakes:
        due = [
            (run.since, run.no, run.id)
            if run.state in ("scheduled", "retrying")
            else (run.expires, run.born, run.id)
            for run in self.runs.values()
            if run.state in ("scheduled", "retrying") or (run.may_expire and not run.owner)
        ]
        wakes: Wakes = set()
        for run in [self.runs[run_id] for at, _, run_id in sorted(due)[:limit] if at <= self.now]:
            if run.may_expire and run.expires <= self.now:
                wakes |= self._end(run, "cancelled")
            else:
                wakes |= self._queued(run) if run.state == "retrying" else self._place(run)
        return wakes

    def resend(self, older_than: float) -> Wakes:
        """Whose message is missing; an end that is still not told is told again less often, a tick apart."""
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
        """Nobody executes it any more: it goes on, or its end is due."""
        if run.cancel:
            return self._end(run, "cancelled")
        if not run.durable or run.stuck > MAX_RECOVERIES:
            return self._end(run, "failed")
        return self._queued(run)

    def _at(self, run: Run, state: str, since: float) -> None:
        self._no += 1
        run.state, run.since, run.no, run.owner, run.fence = state, since, self._no, "", ""

    def _queued(self, run: Run) -> Wakes:
        self._at(run, "queued", self.now)
        return {run.id}

    def _place(self, run: Run) -> Wakes:
        places = self.places.setdefault(run.session, [])
        places.append(run.id)
        if places[0] == run.id:
            return self._queued(run)
        self._at(run, "waiting_session", self.now)
        return set()

    def _end(self, run: Run, state: str, by: str = "", in_hand: bool = False) -> Wakes:
        """`in_hand`: whoever ends it tells Celery; else a message sees to that."""
        self._at(run, state, self.now)
        run.fence, run.untold, run.tellings = by, run.tell, 0
        wakes = {run.id} if run.tell and not in_hand else set()
        places = self.places.get(run.session, [])
        was_holder = self.holder(run.session) == run.id
        if run.id in places:
            places.remove(run.id)
        following = self.holder(run.session) if was_holder else None
        return wakes | self._queued(self.runs[following]) if following else wakes
