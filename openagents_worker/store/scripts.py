"""Scripts: the only place where Python calls a Lua script, by one typed function for each.

A script function takes keyword arguments and returns a `ScriptCall`; its body turns the script's reply into a
value. The Lua side gets its arguments by name, generated from the signature, so positions cannot drift apart.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, cached_property, partial
from hashlib import sha1
from importlib import resources
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, cast, get_type_hints

from openagents_worker.jsontext import LARGEST_INTEGER, SMALLEST_INTEGER
from openagents_worker.store.formats import NEWEST_READ, OLDEST_READ, WRITTEN
from openagents_worker.store.keys import left_in_place_in_lua, lua_key_functions
from openagents_worker.store.permission import LACKING
from openagents_worker.store.rights import MENDING, Right, covering, rights_of, sample_of
from openagents_worker.store.states import states_in_lua

__all__ = [
    "PAGE_BYTES",
    "CancelAnswer",
    "ClaimAnswer",
    "Claimed",
    "DeleteAnswer",
    "Deleted",
    "FalseAlarm",
    "Looked",
    "Pruned",
    "Reclaimed",
    "Registered",
    "ReleaseKind",
    "Renewal",
    "ResumeAnswer",
    "Resumed",
    "Script",
    "ScriptCall",
    "SubmitAnswer",
    "Submitted",
    "SuspendKind",
    "Wake",
    "WriteAnswer",
    "accuse",
    "alarm",
    "aside_news",
    "cancel",
    "claim",
    "commit",
    "delete_session",
    "emit",
    "end_lease",
    "finish",
    "lacking",
    "look",
    "mend_key",
    "page",
    "prune",
    "put_aside",
    "reclaim",
    "register",
    "reject",
    "release",
    "renew",
    "replaced",
    "resend",
    "resend_unread",
    "resume",
    "retire",
    "submit",
    "suspend",
    "told",
    "wake",
]

T = TypeVar("T")
P = ParamSpec("P")
PAGE_BYTES = 240 * 1024
"""Of a journal's records in one answer: none is longer than 256 KiB, or it would hold up everybody else's."""
MAX_COUNTER_DIGITS = 19  # more do not fit into 64 bits
MAX_RECOVERIES = 5
LEFT_TO_OTHERS_MAX_MS = 24 * 3_600_000
"""Defaults of the settings of these names, for callers that have no settings."""
Reply = Any  # what Redis answers: nested lists of str and int

_COMMON = ("EVENTS_MAXLEN", "RUN_TTL_MS", "SESSION_TTL_MS")


class Script:
    """A Lua file with its library, its keys and its arguments by name."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        self.name = name
        types, self.body = _parts(name)
        body = f"{types}\n{self.body}"
        self.source = "\n".join([lua_key_functions(body), _arguments(parameters), body])
        self.sha, _ = _with_sha(self.source)

    @property
    def rights(self) -> tuple[Right, ...]:
        """What the user of Redis must be allowed to do, sorted."""
        return rights_of_script(self.name)

    @cached_property
    def guarded(self) -> tuple[str, str]:
        """SHA-1 and source of the same script for a user whose rights may be taken away while it runs.

        As `checking`, at a small part of its cost: each command and each kind of key is asked for once.
        Between the question and the writes no other command runs. Redis 6 cannot be asked without being
        tried: there the script may be refused in its middle.
        """
        probes = [
            f"if not may_({_words_in_lua(right)}) then lacking_[#lacking_ + 1] = {at} end"
            for at, right in enumerate(self.rights, 1)
            if right in covering(self.rights)
        ]
        return _with_sha(f"{_GUARD.format(probes=chr(10).join(probes), lacking=LACKING)}\n{self.source}")

    def checking(self) -> tuple[str, str]:
        """SHA-1 and source of the same script which first asks whether its user may do all that it does.

        Where that is not so it answers with an error that begins with `LACKING` and says which of `rights`,
        counted from 1. Nothing has been written then.
        """
        rights = ", ".join(_in_lua(right) for right in self.rights)
        check = _CHECK.format(may=_with_library("lib/may.lua", set()), rights=rights, lacking=LACKING)
        return _with_sha(f"{check}\n{self.source}")


def _with_sha(source: str) -> tuple[str, str]:
    return sha1(source.encode(), usedforsecurity=False).hexdigest(), source


# In a block of its own: Lua counts the local variables of a function.
_CHECK = """do
{may}
local lacking_ = {{}}
for i, right in ipairs({{{rights}}}) do
  if not may(right[1], right[2] and KEYS[1] .. right[2] or '') then lacking_[#lacking_ + 1] = i end
end
if #lacking_ > 0 then return redis.error_reply('{lacking} ' .. table.concat(lacking_, ' ')) end
end"""


_GUARD = """if redis.acl_check_cmd then
local may_, lacking_ = redis.acl_check_cmd, {{}}
{probes}
if #lacking_ > 0 then return redis.error_reply('{lacking} ' .. table.concat(lacking_, ' ')) end
end"""


def _words_in_lua(right: Right) -> str:
    """A command as it is asked for: its words, and its key or channel."""
    words = [f"'{word}'" for word in right.command.split("|")]
    if right.kind:
        words += [f"KEYS[1] .. '{sample_of(right.kind, '')}'"] * (2 if right.command == "RENAME" else 1)
    return ", ".join(words)


def _in_lua(right: Right) -> str:
    key = f", '{sample_of(right.kind, '')}'" if right.kind else ""
    return f"{{'{right.command}'{key}}}"


def _arguments(parameters: dict[str, Any]) -> str:
    """Lua locals in the order of the signature; a list travels as its length and its items."""
    lines = [
        "local at_ = 0",
        "local function one_() at_ = at_ + 1 return ARGV[at_] end",
        "local function many_() local t = {} for i = 1, tonumber(one_()) do t[i] = one_() end return t end",
    ]
    lines += [f"local {name} = tonumber(one_())" for name in _COMMON]
    for name, kind in parameters.items():
        if kind in (int, bool):
            lines.append(f"local {name} = tonumber(one_())")
        elif kind is str:
            lines.append(f"local {name} = one_()")
        else:
            lines.append(f"local {name} = many_()")
    return "\n".join(lines)


_INCLUDE = re.compile(r"^--#include (\w+)$", re.MULTILINE)


@cache
def rights_of_script(name: str) -> tuple[Right, ...]:
    """What the user of Redis must be allowed to do who runs the script of this name, sorted."""
    _, body = _parts(name)
    return tuple(sorted(rights_of(body) | MENDING))


@cache
def _parts(name: str) -> tuple[str, str]:
    """What comes before every script, and the script of this name with its libraries."""
    done: set[str] = set()
    types = _with_library("lib/types.lua", done).replace("LEFT_IN_PLACE_PATTERNS", left_in_place_in_lua())
    return types, states_in_lua(_with_library(f"{name}.lua", done))


@cache  # each library belongs to many scripts
def _text_of(path: str) -> str:
    return resources.files(__package__).joinpath("lua", *path.split("/")).read_text("utf-8")


def _with_library(path: str, done: set[str]) -> str:
    text = _text_of(path)
    before = []
    for library in _INCLUDE.findall(text):
        if library not in done:
            done.add(library)
            before.append(_with_library(f"lib/{library}.lua", done))
    return "\n".join([*before, text])


@dataclass(frozen=True, slots=True)
class ScriptCall(Generic[T]):
    """A script with its arguments, ready to be run by a sync or an async client."""

    script: Script
    args: tuple[Any, ...]
    parse: Callable[[Reply], T]

    def argv(self, common: tuple[int, int, int]) -> list[str | int]:
        flat: list[str | int] = list(common)
        for value in self.args:
            if isinstance(value, str):
                flat.append(value)
            elif isinstance(value, int):
                # A bool is one, too. hiredis ends the process for an integer that Python does not write.
                if not SMALLEST_INTEGER <= value <= LARGEST_INTEGER:
                    raise ValueError(f"an argument of {self.script.name} is beyond 64 bits")
                flat.append(int(value))
            else:
                flat.append(len(value))
                flat.extend(value)
        return flat


def _script_function(read: Callable[Concatenate[Reply, P], T]) -> Callable[P, ScriptCall[T]]:
    """Makes a door of a function whose keyword arguments are the script's and whose body reads the reply."""

    @cache  # not before the first call: most processes use only some of the doors
    def script() -> tuple[Script, dict[str, Any]]:
        hints = get_type_hints(read)
        parameters = [p for p in inspect.signature(read).parameters.values() if p.kind is p.KEYWORD_ONLY]
        made = Script(read.__name__.strip("_"), {p.name: hints[p.name] for p in parameters})
        return made, {p.name: p.default for p in parameters}

    def door(*_: P.args, **given: P.kwargs) -> ScriptCall[T]:
        made, defaults = script()
        values = {name: given.get(name, default) for name, default in defaults.items()}
        return ScriptCall(made, tuple(values.values()), partial(cast(Callable[..., T], read), **values))

    door.__name__, door.__doc__ = read.__name__, read.__doc__
    return door


# --- answers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wake:
    """A run to be woken, with all its message needs. `sent_us` is the server's time of this sending.

    `is_ended`: it is over, and the message is for Celery, which is to be notified.
    """

    run_id: str
    queue: str
    sent_us: int
    agent_id: str
    session_id: str
    attempt: int
    step: int
    canvas: str
    is_ended: bool = False

    @property
    def checkpoint_id(self) -> str:
        return f"{self.run_id}:step:{self.step}"

    @classmethod
    def of(cls, fields: Sequence[str]) -> Wake:
        run, queue, sent_us, agent, session, attempt, step, canvas, *ended = fields
        return cls(run, queue, int(sent_us), agent, session, int(attempt), int(step), canvas, bool(ended))


def _pairs(flat: Any) -> dict[str, str]:
    """A hash from Lua: name, value, name, value …"""
    return dict(flat) if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))


def _wakes(rows: Sequence[Sequence[str]]) -> tuple[Wake, ...]:
    return tuple(Wake.of(row) for row in rows)


class SubmitAnswer(StrEnum):
    NEW = "NEW"
    SAME = "SAME"
    CONFLICT = "CONFLICT"
    BUSY = "BUSY"
    UNKNOWN_AGENT = "UNKNOWN_AGENT"


@dataclass(frozen=True, slots=True)
class Submitted:
    """`sent_us` is set when a first message is to be sent; `also` is another run that is to be woken."""

    answer: SubmitAnswer
    state: str = ""
    queue: str = ""
    sent_us: int | None = None
    also: Wake | None = None
    holder: str = ""
    known_agents: tuple[str, ...] = ()


class ClaimAnswer(StrEnum):
    CLAIMED = "CLAIMED"
    DONE = "DONE"
    WAITING = "WAITING"
    BUSY = "BUSY"
    NOT_DUE = "NOT_DUE"
    NOT_ALIVE = "NOT_ALIVE"
    UNKNOWN = "UNKNOWN"
    CANCELLED = "CANCELLED"
    SUSPECT_BUSY = "SUSPECT_BUSY"
    OTHER_FORMAT = "OTHER_FORMAT"
    PARKED = "PARKED"


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim was answered; the fields from `fence` on are set for CLAIMED only, `life` also for an end.

    `untold` is the result (JSON) of a run that is DONE and whose end Celery does not know yet, else ''.
    `journal` is the first page of records as JSON, `journal_length` how many there are. `active_ms` is how
    long earlier attempts worked on the run. `messages` and `artifacts` count what the session has,
    `session_state` is JSON by key, None when it is too large to come along.
    """

    answer: ClaimAnswer
    wakes: tuple[Wake, ...] = ()
    state: str = ""
    untold: str = ""
    fence: str = ""
    request: str = ""
    attempt: int = 0
    life: int = 1
    retries: int = 0
    recoveries: int = 0
    uid: str = ""
    usage: str = ""
    queue: str = ""
    canvas: str = ""
    last_error: str = ""
    active_ms: int = 0
    durable: bool = True
    facts: dict[str, str] | None = None
    journal_length: int = 0
    journal: tuple[str, ...] = ()
    messages: int = 0
    artifacts: int = 0
    session_state: dict[str, str] | None = None


class WriteAnswer(StrEnum):
    """What a fenced write was answered. CANCEL: stop (a commit is stored all the same).

    OVERDUE: the run has been left to others for too long, and is still this worker's to end.
    """

    OK = "OK"
    SAME = "SAME"
    CANCEL = "CANCEL"
    FENCED = "FENCED"
    MISPLACED = "MISPLACED"
    OVERDUE = "OVERDUE"


class SuspendKind(StrEnum):
    """How a run is put aside by its owner."""

    RETRY = "retry"
    HANDOVER = "handover"
    LEFT_TO_OTHERS = "left_to_others"


class ReleaseKind(StrEnum):
    """Why a run is given back by its owner: by a worker that stops, or because nobody executes it there."""

    HANDOVER = "handover"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Handed:
    """The answer of a write that gives the run away, with the wake-ups to send."""

    answer: WriteAnswer
    wakes: tuple[Wake, ...] = ()
    delay_ms: int = 0
    """After which a run that was put aside is due again."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A lease that has begun. `neighbours` are the live leases of this host: incarnation -> process."""

    deadline_ms: int
    neighbours: dict[str, str]


@dataclass(frozen=True, slots=True)
class Renewal:
    """A heartbeat's answer. `lost`: the lease is over for ever. `others` counts the other leases."""

    lost: bool
    owned: frozenset[str] = frozenset()
    cancel_requested: frozenset[str] = frozenset()
    others: int = 0


@dataclass(frozen=True, slots=True)
class Looked:
    """`next_s`: when to look again, if that is sooner than usual.

    `neighbours` as in `Registered`, None when nobody has joined the host; `joined` is for the next look.
    """

    given_up: tuple[str, ...] = ()
    next_s: float | None = None
    joined: str = ""
    neighbours: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class FalseAlarm:
    """A lease was ended early although its process lived.

    `seen_by` is who was wrong: `process`, `connection`. `off`: it ends no leases for an hour.
    """

    runs: int
    seen_by: str
    off: bool


class CancelAnswer(StrEnum):
    REQUESTED = "REQUESTED"
    CANCELLED = "CANCELLED"
    ALREADY = "ALREADY"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class Cancelled:
    answer: CancelAnswer
    wakes: tuple[Wake, ...] = ()
    state: str = ""


class ResumeAnswer(StrEnum):
    OK = "OK"
    LIVE = "LIVE"
    COMPLETED = "COMPLETED"
    UNKNOWN = "UNKNOWN"
    OTHER_AGENT = "OTHER_AGENT"
    OTHER_SESSION = "OTHER_SESSION"
    OTHER_INPUT = "OTHER_INPUT"
    OTHER_CHECKPOINT = "OTHER_CHECKPOINT"
    NO_CHECKPOINT = "NO_CHECKPOINT"


@dataclass(frozen=True, slots=True)
class Resumed:
    """`detail` is what the run really has where the answer says OTHER_…."""

    answer: ResumeAnswer
    state: str = ""
    queue: str = ""
    sent_us: int | None = None
    also: Wake | None = None
    detail: str = ""
    canvas: str = ""


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """`incarnation` is the worker that is gone, '' when every lease is good; `left` runs are still its."""

    wakes: tuple[Wake, ...]
    incarnation: str
    left: int


class DeleteAnswer(StrEnum):
    """UNTOLD: the end of a run is still to be told to Celery. MORE: the session still has runs."""

    BUSY = "BUSY"
    UNTOLD = "UNTOLD"
    MORE = "MORE"
    DELETED = "DELETED"


@dataclass(frozen=True, slots=True)
class Deleted:
    """`run_id` is the one in the way, `runs` how many are gone."""

    answer: DeleteAnswer
    run_id: str = ""
    runs: int = 0


@dataclass(frozen=True, slots=True)
class Pruned:
    """`looked` is False when no list is due; `name` and `kept` are for the call that goes on with it."""

    looked: bool
    name: str
    kept: int
    removed: int


# --- doors -----------------------------------------------------------------------------------------------


@_script_function
def submit(
    reply: Reply,
    *,
    run_id: str,
    agent_id: str,
    session_id: str,
    queue: str,
    default_queue: str,
    digest: str,
    uid: str,
    request: str,
    canvas: str,
    durable: bool,
    delay_ms: int,
    reject_if_busy: bool,
    parent_run_id: str,
    lists: Sequence[str] = (),
    expires_ms: int = 0,
    tell: bool = False,
    format: int = WRITTEN,
) -> Submitted:
    """Accept a run. `queue` '' means the agent's own or the default; `digest` says which are the same.

    `lists` are the indexes of its tenant and labels; see `store.listing`.
    With `expires_ms` it is cancelled unless it has been started by then; `tell`: its end is told to Celery.
    """
    answer = SubmitAnswer(reply[0])
    if answer is SubmitAnswer.UNKNOWN_AGENT:
        return Submitted(answer, known_agents=tuple(sorted(reply[1:])))
    if answer is SubmitAnswer.BUSY:
        return Submitted(answer, holder=reply[1])
    if answer is SubmitAnswer.CONFLICT:
        return Submitted(answer)
    also = Wake.of(reply[4]) if len(reply) > 4 and reply[4] else None
    return Submitted(answer, reply[1], reply[2], int(float(reply[3])) if reply[3] else None, also)


@_script_function
def register(
    reply: Reply,
    *,
    incarnation: str,
    lease_ms: int,
    agents: list[str],
    previous: str = "",
    host: str = "",
    process: str = "",
    info: str = "",
) -> Registered:
    """Begin a worker's lease; `agents` is id, JSON, id, JSON …; `host` '' where no neighbour can look.

    `info` is what the worker says of itself (`store.fleet.WorkerCard`).

    `previous` is the incarnation whose lease this process has lost: it lives, so no run has killed it.
    """
    return Registered(int(reply[0]), _pairs(reply[1]))


@_script_function
def end_lease(reply: Reply, *, incarnation: str, host: str, process: str) -> Literal["OK", "OVER"]:
    """End the lease of a process of this host that was seen to be dead. OVER: there is none to end."""
    return "OK" if reply == "OK" else "OVER"


@_script_function
def retire(reply: Reply, *, incarnation: str, host: str = "") -> Literal["GONE", "OVER"]:
    """End a worker's lease: GONE when it owned nothing, OVER when its runs are left for reclaim."""
    return "GONE" if reply == "GONE" else "OVER"


@_script_function
def accuse(reply: Reply, *, run_id: str, incarnation: str) -> bool:
    """Say which run blocks the event loop of a process that is about to end. False: it is not its run."""
    return bool(reply == "OK")


@_script_function
def renew(
    reply: Reply,
    *,
    incarnation: str,
    lease_ms: int,
    server: str = "",
    renewed_within_ms: int = 0,
    loop_lag_ms: int = 0,
) -> Renewal:
    """A heartbeat: the lease goes on for `lease_ms` from now.

    `server` is the run_id of the Redis that sees the heartbeat's connection; `renewed_within_ms` from now
    this process will have renewed again, if it lives.
    """
    if reply[0] == "LOST":
        return Renewal(lost=True)
    return Renewal(False, frozenset(reply[1]), frozenset(reply[2]), int(reply[3]))


@_script_function
def look(reply: Reply, *, server: str, silence_ms: int, host: str = "", joined: str = "") -> Looked:
    """Give up the workers whose connection is gone for `silence_ms` and that should have renewed since.

    `server` is the run_id of the Redis that is asked, '' where it cannot see connections. `joined` is what
    the look before said of this host.
    """
    given_up, next_ms, (now_joined, neighbours) = reply
    return Looked(
        tuple(given_up),
        int(next_ms) / 1000 if next_ms else None,
        now_joined,
        _pairs(neighbours) if now_joined != joined else None,
    )


@_script_function
def alarm(reply: Reply, *, incarnation: str) -> FalseAlarm | None:
    """Say that this process lives, whose lease is over; None: nobody has ended it early."""
    return FalseAlarm(int(reply[1]), reply[2], bool(reply[3])) if reply[0] == "FALSE_ALARM" else None


@_script_function
def claim(
    reply: Reply,
    *,
    run_id: str,
    incarnation: str,
    nonce: str,
    page_bytes: int,
    oldest: int = OLDEST_READ,
    newest: int = NEWEST_READ,
    asked: int = WRITTEN,
    left_max_ms: int = LEFT_TO_OTHERS_MAX_MS,
) -> Claimed:
    """Take a run. The same nonce again gets the same answer, so a lost reply can be asked for once more.

    `oldest` to `newest` are the formats that the claimant reads, `asked` that of the message it has. A run in
    another format ends when it has been left to others for `left_max_ms`.
    """
    answer = ClaimAnswer(reply[0])
    if answer is ClaimAnswer.CANCELLED:
        return Claimed(answer, wakes=_wakes(reply[1]), life=int(reply[2]))
    if answer is ClaimAnswer.DONE:
        wakes = _wakes(reply[4]) if len(reply) > 4 else ()
        return Claimed(answer, wakes=wakes, state=reply[1], life=int(reply[2]), untold=reply[3])
    if answer is ClaimAnswer.WAITING:
        return Claimed(answer, wakes=_wakes(reply[1]))
    if answer is not ClaimAnswer.CLAIMED:
        return Claimed(answer, state=str(reply[1]) if len(reply) > 1 else "")
    _, fence, fields, facts, length, page, session = reply
    text = [value or "" for value in fields]
    request, attempt, life, retries, uid, usage, queue, canvas, _started, recoveries, last_error = text[:11]
    return Claimed(
        answer,
        fence=fence,
        request=request,
        attempt=_number(attempt),
        life=_number(life),
        retries=_number(retries),
        recoveries=_number(recoveries),
        uid=uid,
        usage=usage,
        queue=queue,
        canvas=canvas,
        last_error=last_error,
        active_ms=_number(text[12]),
        durable=text[13] != "0",
        facts=_pairs(facts),
        journal_length=int(length),
        journal=tuple(page),
        messages=int(session[0]),
        artifacts=int(session[1]),
        session_state=None if session[2] is None else _pairs(session[2]),
    )


def _number(text: str) -> int:
    """A counter of a record; 0 where it is not a number, as for the scripts."""
    return int(text) if text.isdecimal() and len(text) < MAX_COUNTER_DIGITS else 0


@_script_function
def page(reply: Reply, *, run_id: str, position: int, page_bytes: int) -> tuple[str, ...]:
    """A run's records as JSON from `position` on, as many as fit into a page, and one at least."""
    return tuple(reply)


@_script_function
def release(
    reply: Reply,
    *,
    run_id: str,
    incarnation: str,
    fence: str,
    kind: str = ReleaseKind.LOST,
    max_recoveries: int = MAX_RECOVERIES,
) -> Handed:
    """Give a claimed run back. `lost` counts as a recovery: after `max_recoveries` the run is poisoned."""
    return Handed(WriteAnswer(reply[0]), _wakes(reply[1]) if len(reply) > 1 else ())


@_script_function
def emit(reply: Reply, *, run_id: str, fence: str, batch_no: int, events: list[str]) -> WriteAnswer:
    """Append a batch of events: name, payload JSON, name, payload JSON …. A batch number counts once."""
    return WriteAnswer(reply)


@_script_function
def commit(
    reply: Reply,
    *,
    run_id: str,
    fence: str,
    position: int,
    records: list[str],
    usage: str,
    batch_no: int,
    events: list[str],
    format: int = WRITTEN,
) -> WriteAnswer:
    """Store outcomes as records from `position` on, 0 for prepare. `usage` is the run's total so far."""
    return WriteAnswer(reply)


@_script_function
def suspend(
    reply: Reply,
    *,
    run_id: str,
    fence: str,
    kind: str,
    delay_ms: int,
    call: str,
    error_code: str,
    batch_no: int,
    events: list[str],
    left_max_ms: int = LEFT_TO_OTHERS_MAX_MS,
    error_details: str = "",
) -> Handed:
    """Put a run aside, as `SuspendKind` says: `retry` for `delay_ms` after `error_code` at `call`, `handover`
    for now, `left_to_others` for ever longer times, and for `left_max_ms` at most. `error_details` is the
    error as JSON, for people."""
    if len(reply) == 1:
        return Handed(WriteAnswer(reply[0]))
    return Handed(WriteAnswer(reply[0]), _wakes(reply[1]), int(reply[2]))


@_script_function
def finish(
    reply: Reply,
    *,
    run_id: str,
    fence: str,
    end_state: str,
    result: str,
    event: str,
    payload: str,
    completed: str,
    transcript: list[str],
    artifacts: list[str],
    state: list[str],
    state_removed: list[str],
    usage: str,
    batch_no: int,
    events: list[str],
    format: int = WRITTEN,
) -> Handed:
    """End a run and write its session. `event` is terminal, `completed` is the payload of the last one."""
    return Handed(WriteAnswer(reply[0]), _wakes(reply[1]) if len(reply) > 1 else ())


@_script_function
def cancel(reply: Reply, *, run_id: str, reason: str, force: bool) -> Cancelled:
    """Cancel a run: at once when nobody carries it (or by force), else by telling its worker."""
    answer = CancelAnswer(reply[0])
    if answer is CancelAnswer.CANCELLED:
        return Cancelled(answer, _wakes(reply[1]))
    return Cancelled(answer, state=reply[1] if answer is CancelAnswer.ALREADY else "")


@_script_function
def reclaim(
    reply: Reply, *, limit: int, max_recoveries: int, blameless: bool, heartbeat_ms: int = 0
) -> Reclaimed:
    """Take runs of one worker whose lease is over. `blameless`: Redis was away, no step killed it.

    So it was, too, where other leases were lost within `heartbeat_ms`; 0: nobody looks.
    """
    wakes, incarnation, left = reply
    return Reclaimed(_wakes(wakes), incarnation, int(left))


@_script_function
def wake(reply: Reply, *, limit: int) -> tuple[tuple[Wake, ...], int]:
    """Wake what is due; also says how many entries were looked at."""
    return _wakes(reply[0]), int(reply[1])


@_script_function
def resend(reply: Reply, *, queue: str, oldest_us: int, grace_ms: int, limit: int) -> tuple[Wake, ...]:
    """Runs whose wake-up must be lost: sent before the queue's oldest message and before the grace."""
    return _wakes(reply)


@_script_function
def resend_unread(
    reply: Reply, *, queue: str, grace_ms: int, max_grace_ms: int, limit: int
) -> tuple[tuple[Wake, ...], int]:
    """As `resend` for a queue that nobody can read: a run's grace doubles each time it was sent again.

    Also says how many entries were looked at; as many as `limit` means that there may be more.
    """
    return _wakes(reply[0]), int(reply[1])


@_script_function
def replaced(reply: Reply, *, messages: Sequence[str]) -> frozenset[int]:
    """The numbers, from 0, of those messages that nobody waits for any more.

    Each is four words: queue, run id, µs of its sending, `ended` for one that only notifies Celery, else ''.
    """
    return frozenset(int(position) - 1 for position in reply)


@_script_function
def resume(
    reply: Reply,
    *,
    run_id: str,
    agent_id: str,
    session_id: str,
    input_text: str,
    checkpoint_id: str,
    canvas: str = "",
    by: str = "",
) -> Resumed:
    """Start another life of a run that failed or was cancelled. `checkpoint_id` '' means its latest.

    `canvas` '' keeps the options of its submission; `by` is who wants it, for the event.
    """
    answer = ResumeAnswer(reply[0])
    if answer is ResumeAnswer.LIVE:
        return Resumed(answer, reply[1], reply[2])
    if answer is not ResumeAnswer.OK:
        return Resumed(answer, detail=reply[1] if len(reply) > 1 else "")
    also = Wake.of(reply[5]) if len(reply) > 5 and reply[5] else None
    return Resumed(answer, reply[1], reply[2], int(reply[4]) if reply[4] else None, also, canvas=reply[3])


@_script_function
def told(reply: Reply, *, runs: list[str]) -> tuple[bool, ...]:
    """Note that Celery knows how these lives of runs have ended: run id, life, run id, life ….

    False for a run that has moved on.
    """
    return tuple(answer == "OK" for answer in reply)


@_script_function
def reject(reply: Reply, *, run_id: str, queue: str, code: str, message: str, hint: str) -> bool:
    """Answer a message that is no request with a failed run; False when the id is known already."""
    return bool(reply == "NEW")


@_script_function
def delete_session(reply: Reply, *, session_id: str, limit: int, even_untold: bool) -> Deleted:
    """Delete up to `limit` runs of a session, and with the last of them the session; nothing that lives."""
    answer = DeleteAnswer(reply[0])
    if answer in (DeleteAnswer.BUSY, DeleteAnswer.UNTOLD):
        return Deleted(answer, run_id=reply[1])
    return Deleted(answer, runs=int(reply[1]))


@_script_function
def put_aside(reply: Reply, *, key: str, code: str, what: str, item: str) -> None:
    """Keep an item that nobody can use; `key` says where it was found."""


@_script_function
def aside_news(reply: Reply, *, limit: int) -> tuple[str, ...]:
    """What was put aside since somebody asked last, newest first, as JSON (`store.dead_letters`)."""
    return tuple(reply)


@_script_function
def mend_key(reply: Reply, *, key: str, kind: str) -> Literal["MOVED", "LEFT", "SOUND"]:
    """Put a key aside that is not of this type. LEFT: nothing could go on without it, and it stays."""
    return cast(Literal["MOVED", "LEFT", "SOUND"], reply)


@_script_function
def prune(reply: Reply, *, limit: int, name: str = "", kept: int = 0) -> Pruned:
    """Take up to `limit` ids out of a list whose runs are gone; `name` '' looks for a list that is due."""
    looked, name_, kept_, removed = reply
    return Pruned(looked == 1, name_, int(kept_), int(removed))


@_script_function
def lacking(
    reply: Reply, *, commands: Sequence[str], keys: Sequence[str], by_trying: bool = False
) -> tuple[int, ...]:
    """Which of these commands the user may not run on the key of the same number, from 0; it changes nothing.

    `by_trying`: as with a Redis 6, which cannot be asked.
    """
    return tuple(int(position) - 1 for position in reply)
