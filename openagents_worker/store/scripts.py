"""Scripts: the only place where Python calls Lua scripts, with one typed function for each script.

A script function takes keyword arguments and returns a `ScriptCall`. The body of the function parses the
reply of the script. The Lua code that reads the arguments is generated from the signature, so the positions
of the arguments are always the same on both sides. `store/lua/NAME.lua` describes what each script does.
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
from openagents_worker.store.permission import MISSING_RIGHTS_MARK
from openagents_worker.store.rights import PUT_ASIDE_RIGHTS, Right, rights_of, sample_of, smallest_cover
from openagents_worker.store.states import states_in_lua

__all__ = [
    "PAGE_BYTES",
    "CancelAnswer",
    "ClaimAnswer",
    "Claimed",
    "DeleteAnswer",
    "Deleted",
    "FalseAlarm",
    "LookResult",
    "Pruned",
    "Reclaimed",
    "Registration",
    "ReleaseKind",
    "Renewal",
    "ResumeAnswer",
    "Resumed",
    "RunEnd",
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
    "confirm_completion",
    "confirm_notices",
    "delete_session",
    "emit",
    "end_lease",
    "finish",
    "lacking",
    "look",
    "mend_key",
    "notify",
    "outbox_done",
    "outbox_take",
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
    "wake",
]

T = TypeVar("T")
P = ParamSpec("P")
PAGE_BYTES = 240 * 1024
"""The size of a page of journal records in one answer. A larger answer would delay the commands of others."""
MAX_COUNTER_DIGITS = 19  # a longer number does not fit into 64 bits
MAX_RECOVERIES = 5
LEFT_TO_OTHERS_MAX_MS = 24 * 3_600_000
"""The defaults of the settings with these names, for callers without settings."""
Reply = Any  # an answer of Redis: nested lists of str and int

_COMMON = ("EVENTS_MAXLEN", "RUN_TTL_MS", "SESSION_TTL_MS")


class Script:
    """A Lua script: its file, with the libraries, key functions and arguments that it needs.

    `parameters` maps the name of each argument to its type (str, int, bool or a sequence of str).
    """

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        self.name = name
        self.signal = (f"openagents.redis {name}", {"db.system.name": "redis", "openagents.script": name})
        """The name and the attributes of the span of a call."""
        types, self.body = _types_and_body(name)
        body = f"{types}\n{self.body}"
        self.source = "\n".join([lua_key_functions(body), _arguments(parameters), body])
        self.sha, _ = _with_sha(self.source)

    @property
    def rights(self) -> tuple[Right, ...]:
        """The rights that the Redis user needs, sorted."""
        return rights_of_script(self.name)

    @cached_property
    def guarded(self) -> tuple[str, str]:
        """SHA-1 and source of the script with a short check of rights, for a user who may lose a right.

        As `checking`, but much cheaper: it checks each command and each kind of key once. No other command
        can run between the check and the writes. Redis 6 has no function for this check, so there a script
        may be refused after its first writes.
        """
        probes = [
            f"if not may_({_probe_arguments(right)}) then lacking_[#lacking_ + 1] = {at} end"
            for at, right in enumerate(self.rights, 1)
            if right in smallest_cover(self.rights)
        ]
        return _with_sha(
            f"{_GUARD.format(probes=chr(10).join(probes), lacking=MISSING_RIGHTS_MARK)}\n{self.source}"
        )

    def checking(self) -> tuple[str, str]:
        """SHA-1 and source of the script with a complete check of rights before its first write.

        If rights are missing, the script writes nothing and fails with an error that begins with
        `MISSING_RIGHTS_MARK`, followed by the positions of the missing rights in `rights`, counted from 1.
        """
        rights = ", ".join(_right_in_lua(right) for right in self.rights)
        check = _CHECK.format(
            may=_with_libraries("lib/may.lua", set()), rights=rights, lacking=MISSING_RIGHTS_MARK
        )
        return _with_sha(f"{check}\n{self.source}")


def _with_sha(source: str) -> tuple[str, str]:
    return sha1(source.encode(), usedforsecurity=False).hexdigest(), source


# In a `do` block, because Lua limits the number of local variables of a function.
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


def _probe_arguments(right: Right) -> str:
    """The arguments of `redis.acl_check_cmd`: the words of the command, and its key or channel."""
    words = [f"'{word}'" for word in right.command.split("|")]
    if right.kind:
        words += [f"KEYS[1] .. '{sample_of(right.kind, '')}'"] * (2 if right.command == "RENAME" else 1)
    return ", ".join(words)


def _right_in_lua(right: Right) -> str:
    key = f", '{sample_of(right.kind, '')}'" if right.kind else ""
    return f"{{'{right.command}'{key}}}"


def _arguments(parameters: dict[str, Any]) -> str:
    """Lua code that reads ARGV into locals, in the order of the signature. A list is its length and items."""
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
    """The rights that a Redis user needs to run this script, sorted."""
    _, body = _types_and_body(name)
    return tuple(sorted(rights_of(body) | PUT_ASIDE_RIGHTS))


@cache
def _types_and_body(name: str) -> tuple[str, str]:
    """The library that precedes every script (`lib/types.lua`), and the script with its other libraries."""
    done: set[str] = set()
    types = _with_libraries("lib/types.lua", done).replace("LEFT_IN_PLACE_PATTERNS", left_in_place_in_lua())
    return types, states_in_lua(_with_libraries(f"{name}.lua", done))


@cache  # many scripts include the same library
def _text_of(path: str) -> str:
    return resources.files(__package__).joinpath("lua", *path.split("/")).read_text("utf-8")


def _with_libraries(path: str, done: set[str]) -> str:
    text = _text_of(path)
    before = []
    for library in _INCLUDE.findall(text):
        if library not in done:
            done.add(library)
            before.append(_with_libraries(f"lib/{library}.lua", done))
    return "\n".join([*before, text])


@dataclass(frozen=True, slots=True)
class ScriptCall(Generic[T]):
    """A script with its arguments, for `Store.run` and `AsyncStore.run`. `parse` parses the reply."""

    script: Script
    args: tuple[Any, ...]
    parse: Callable[[Reply], T]

    def argv(self, common: tuple[int, int, int]) -> list[str | int]:
        flat: list[str | int] = list(common)
        for value in self.args:
            if isinstance(value, str):
                flat.append(value)
            elif isinstance(value, int):
                # This includes bool. hiredis aborts the process for an integer of more than 64 bits.
                if not SMALLEST_INTEGER <= value <= LARGEST_INTEGER:
                    raise ValueError(f"an argument of {self.script.name} does not fit into 64 bits")
                flat.append(int(value))
            else:
                flat.append(len(value))
                flat.extend(value)
        return flat


def _script_function(read: Callable[Concatenate[Reply, P], T]) -> Callable[P, ScriptCall[T]]:
    """Decorator: a function that builds the `ScriptCall` of the script with the same name.

    The keyword arguments of the decorated function are those of the script. Its body parses the reply.
    """

    @cache  # the script is built at the first call: most processes use only some scripts
    def script() -> tuple[Script, dict[str, Any]]:
        hints = get_type_hints(read)
        parameters = [p for p in inspect.signature(read).parameters.values() if p.kind is p.KEYWORD_ONLY]
        script_of_function = Script(read.__name__.strip("_"), {p.name: hints[p.name] for p in parameters})
        return script_of_function, {p.name: p.default for p in parameters}

    def build_call(*_: P.args, **arguments: P.kwargs) -> ScriptCall[T]:
        script_of_function, defaults = script()
        values = {name: arguments.get(name, default) for name, default in defaults.items()}
        return ScriptCall(
            script_of_function, tuple(values.values()), partial(cast(Callable[..., T], read), **values)
        )

    build_call.__name__, build_call.__doc__ = read.__name__, read.__doc__
    return build_call


# --- answers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wake:
    """A run to wake, with the fields of its Celery message. `sent_us` is the send time by the clock of Redis.

    `is_ended`: the run is over, and the message only serves to notify Celery.
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
    """A hash that Lua returned as a list: name, value, name, value …"""
    return dict(flat) if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))


def _parse_wakes(rows: Sequence[Sequence[str]]) -> tuple[Wake, ...]:
    return tuple(Wake.of(row) for row in rows)


class SubmitAnswer(StrEnum):
    """SAME: the run exists with an equal request. CONFLICT: it exists with another request.

    BUSY: the session has other runs, and the caller does not want to wait.
    """

    NEW = "NEW"
    SAME = "SAME"
    CONFLICT = "CONFLICT"
    BUSY = "BUSY"
    UNKNOWN_AGENT = "UNKNOWN_AGENT"


@dataclass(frozen=True, slots=True)
class Submitted:
    """The answer of `submit`.

    `sent_us` is set if the first message must be sent now. `also` is another run that must be woken. `holder`
    is the run that occupies the session (BUSY). `known_agents` are the announced agents (UNKNOWN_AGENT).
    """

    answer: SubmitAnswer
    state: str = ""
    queue: str = ""
    sent_us: int | None = None
    also: Wake | None = None
    holder: str = ""
    known_agents: tuple[str, ...] = ()


class ClaimAnswer(StrEnum):
    """The answer to a claim. Only CLAIMED means that the worker executes the run.

    DONE: the run has ended. WAITING: another run holds its session. BUSY: another attempt owns it. NOT_DUE:
    it waits for a time. NOT_ALIVE: the lease of the worker is over. UNKNOWN: no such run. CANCELLED: the
    claim has ended it as cancelled. SUSPECT_BUSY: the worker already has a suspect of another group.
    OTHER_FORMAT: this worker cannot read its format. PARKED: it is in a state in which it must not be
    executed.
    """

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
    """The answer of `claim`. The fields from `fence` on are only set for CLAIMED; `life` also for DONE.

    `unnotified_result` is the result (JSON) of a run that is DONE if Celery was not notified of its end yet,
    else ''. `journal` is the first page of records (JSON), `journal_length` the number of all records.
    `active_ms` is the time that earlier attempts worked on the run. `messages` and `artifacts` are the
    numbers of items in the session. `session_state` maps keys to JSON; None if it is too large for this
    answer.
    """

    answer: ClaimAnswer
    wakes: tuple[Wake, ...] = ()
    state: str = ""
    unnotified_result: str = ""
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
    """The answer to a write of the owner of a run. FENCED: the caller is not the owner; nothing was written.

    SAME: this batch was stored before. CANCEL: a cancel was requested, stop the run (a commit was stored).
    MISPLACED: the journal has another record at this position. OVERDUE: the run was left to other workers for
    too long, so this worker must end it.
    """

    OK = "OK"
    SAME = "SAME"
    CANCEL = "CANCEL"
    FENCED = "FENCED"
    MISPLACED = "MISPLACED"
    OVERDUE = "OVERDUE"


class SuspendKind(StrEnum):
    """Why the owner suspends a run: see `suspend`."""

    RETRY = "retry"
    HANDOVER = "handover"
    LEFT_TO_OTHERS = "left_to_others"


class ReleaseKind(StrEnum):
    """Why the owner gives a run back: the worker stops (HANDOVER), or no task executes the run (LOST)."""

    HANDOVER = "handover"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The answer of a write that ends the ownership of a run, and the wake-ups that must be sent."""

    answer: WriteAnswer
    wakes: tuple[Wake, ...] = ()
    delay_ms: int = 0
    """The time after which a suspended run is due again."""


@dataclass(frozen=True, slots=True)
class Registration:
    """The answer of `register`: the end of the new lease (ms since 1970).

    `neighbours` are the other live workers of this host: incarnation -> process id and start time.
    """

    deadline_ms: int
    neighbours: dict[str, str]


@dataclass(frozen=True, slots=True)
class Renewal:
    """The answer to a heartbeat. `lost`: the lease is over and cannot be renewed.

    `owned` are the runs of this worker. `notices` are the texts in its box (`store.notice`). `others` is the
    number of leases of other workers.
    """

    lost: bool
    owned: frozenset[str] = frozenset()
    notices: frozenset[str] = frozenset()
    others: int = 0


@dataclass(frozen=True, slots=True)
class LookResult:
    """The answer of `look`. `given_up` are the workers whose leases it has ended.

    `next_s` is the time until the next check, if it is earlier than usual. `neighbours` as in `Registration`;
    None if no worker has started on this host. Pass `joined` to the next call.
    """

    given_up: tuple[str, ...] = ()
    next_s: float | None = None
    joined: str = ""
    neighbours: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class FalseAlarm:
    """The lease of a live process was ended early. `runs` is the number of its runs.

    `seen_by` is the check that was wrong: `process` or `connection`. `off`: this check is now switched off
    for an hour.
    """

    runs: int
    seen_by: str
    off: bool


class CancelAnswer(StrEnum):
    """REQUESTED: the worker of the run will cancel it. ALREADY: the run has ended before."""

    REQUESTED = "REQUESTED"
    CANCELLED = "CANCELLED"
    ALREADY = "ALREADY"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The answer of `cancel`. `state` is set for ALREADY."""

    answer: CancelAnswer
    wakes: tuple[Wake, ...] = ()
    state: str = ""


class ResumeAnswer(StrEnum):
    """LIVE: the run has not ended. OTHER_…: the arguments do not match the run.

    NO_CHECKPOINT: the run has no record to continue from, and starting again might repeat an effect.
    """

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
    """The answer of `resume`. `detail` is the real value of the run if the answer is OTHER_….

    `sent_us` is set if a message must be sent now. `also` is another run that must be woken.
    """

    answer: ResumeAnswer
    state: str = ""
    queue: str = ""
    sent_us: int | None = None
    also: Wake | None = None
    detail: str = ""
    canvas: str = ""


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """The answer of `reclaim`. `incarnation` is the dead worker, '' if no lease is over.

    `left` is the number of its runs that are not reclaimed yet.
    """

    wakes: tuple[Wake, ...]
    incarnation: str
    left: int


class DeleteAnswer(StrEnum):
    """BUSY: a run of the session is live. NOT_NOTIFIED: Celery was not notified yet of the end of a run.

    MORE: runs were deleted, but the session still has runs: call it again.
    """

    BUSY = "BUSY"
    NOT_NOTIFIED = "UNTOLD"
    MORE = "MORE"
    DELETED = "DELETED"


@dataclass(frozen=True, slots=True)
class Deleted:
    """The answer of `delete_session`. `run_id` is the run for which nothing was deleted (BUSY, NOT_NOTIFIED).

    `runs` is the number of deleted runs.
    """

    answer: DeleteAnswer
    run_id: str = ""
    runs: int = 0


@dataclass(frozen=True, slots=True)
class Pruned:
    """The answer of `prune`. `looked`: an index was due. Pass `name` and `kept` to the next call."""

    looked: bool
    name: str
    kept: int
    removed: int


# --- script functions ------------------------------------------------------------------------------------


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
    """Accept a run.

    `queue` '' means the queue of the agent, or `default_queue`. Submissions with an equal `digest` are the
    same request. `lists` are the additional indexes of the run (`listing.extra_indexes`). `expires_ms`: the
    run is cancelled if it has not started by then (0: never). `tell`: Celery must be notified of its end.
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
) -> Registration:
    """Start the lease of a worker.

    `agents` is id, JSON, id, JSON …. `host` and `process` identify the process for the other workers of this
    host; `host` '' if they cannot check it. `info` is the JSON of `fleet.WorkerCard`. `previous` is an
    earlier incarnation of this process that has lost its lease: the process is alive, so no run has killed
    it.
    """
    return Registration(int(reply[0]), _pairs(reply[1]))


@_script_function
def notify(reply: Reply, *, incarnation: str, notice: str) -> Literal["OK", "GONE"]:
    """Send a notice (`store.notice`) to a worker. GONE: this incarnation has no lease."""
    return "OK" if reply == "OK" else "GONE"


@_script_function
def confirm_notices(reply: Reply, *, incarnation: str, notices: list[str]) -> int:
    """Take handled notices out of the box of a worker. Returns how many were in it."""
    return int(reply)


@_script_function
def end_lease(reply: Reply, *, incarnation: str, host: str, process: str) -> Literal["OK", "OVER"]:
    """End the lease of a dead process of this host. OVER: there is no lease of this process."""
    return "OK" if reply == "OK" else "OVER"


@_script_function
def retire(reply: Reply, *, incarnation: str, host: str = "") -> Literal["GONE", "OVER"]:
    """End the lease of a worker that stops. GONE: it owned no runs. OVER: `reclaim` must take its runs."""
    return "GONE" if reply == "GONE" else "OVER"


@_script_function
def accuse(reply: Reply, *, run_id: str, incarnation: str) -> bool:
    """Name the run that blocks the event loop of a process that is about to end.

    False: this worker does not own the run.
    """
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
    """A heartbeat: extend the lease to `lease_ms` from now.

    `server` is the `run_id` of the Redis server of the heartbeat connection. If the process is alive, it will
    call this again within `renewed_within_ms`. `loop_lag_ms` is the lag of its event loop.
    """
    if reply[0] == "LOST":
        return Renewal(lost=True)
    return Renewal(False, frozenset(reply[1]), frozenset(reply[2]), int(reply[3]))


@_script_function
def look(reply: Reply, *, server: str, silence_ms: int, host: str = "", joined: str = "") -> LookResult:
    """End the leases of workers without a connection for `silence_ms` that should have renewed since then.

    `server` is the `run_id` of this Redis server, '' if it cannot observe connections. `joined` is the value
    in the answer to the previous call.
    """
    given_up, next_ms, (now_joined, neighbours) = reply
    return LookResult(
        tuple(given_up),
        int(next_ms) / 1000 if next_ms else None,
        now_joined,
        _pairs(neighbours) if now_joined != joined else None,
    )


@_script_function
def alarm(reply: Reply, *, incarnation: str) -> FalseAlarm | None:
    """Report that this process is alive after its lease has ended. None: the lease was not ended early."""
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
    message_format: int = WRITTEN,
    left_max_ms: int = LEFT_TO_OTHERS_MAX_MS,
) -> Claimed:
    """Claim a run. A repeated claim with the same nonce gets the same answer, in case a reply was lost.

    `page_bytes` limits the journal records in the answer. `oldest` to `newest` are the formats that the
    worker reads, `message_format` is that of its message. A run in another format is left to other workers,
    and fails after `left_max_ms`.
    """
    answer = ClaimAnswer(reply[0])
    if answer is ClaimAnswer.CANCELLED:
        return Claimed(answer, wakes=_parse_wakes(reply[1]), life=int(reply[2]))
    if answer is ClaimAnswer.DONE:
        wakes = _parse_wakes(reply[4]) if len(reply) > 4 else ()
        return Claimed(answer, wakes=wakes, state=reply[1], life=int(reply[2]), unnotified_result=reply[3])
    if answer is ClaimAnswer.WAITING:
        return Claimed(answer, wakes=_parse_wakes(reply[1]))
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
    """Parse a counter of a record; 0 if it is not a number, as in the scripts."""
    return int(text) if text.isdecimal() and len(text) < MAX_COUNTER_DIGITS else 0


@_script_function
def page(reply: Reply, *, run_id: str, position: int, page_bytes: int) -> tuple[str, ...]:
    """Read journal records (JSON) from `position` on: as many as fit into `page_bytes`, at least one."""
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
) -> WriteResult:
    """Give a claimed run back (`ReleaseKind`).

    `lost` counts as a recovery unless the attempt committed a record; after `max_recoveries` of them in a
    row, the run is poisoned.
    """
    return WriteResult(WriteAnswer(reply[0]), _parse_wakes(reply[1]) if len(reply) > 1 else ())


@_script_function
def emit(reply: Reply, *, run_id: str, fence: str, batch_no: int, events: list[str]) -> WriteAnswer:
    """Append a batch of events: name, payload (JSON), name, payload …. A batch number is stored only once."""
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
    """Write outcomes to the journal as records from `position` on (0: prepare), together with events.

    `usage` is the total usage of the run so far (JSON).
    """
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
) -> WriteResult:
    """Suspend a run, so that another attempt continues it (`SuspendKind`).

    `retry`: in `delay_ms`, because of `error_code` in the recorded call `call`. `handover`: another worker
    continues immediately. `left_to_others`: in increasing intervals, for `left_max_ms` at most.
    `error_details` is the error as JSON, for display.
    """
    if len(reply) == 1:
        return WriteResult(WriteAnswer(reply[0]))
    return WriteResult(WriteAnswer(reply[0]), _parse_wakes(reply[1]), int(reply[2]))


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
) -> WriteResult:
    """End a run and write its results into its session.

    `event` and `payload` are the terminal event, `completed` is the payload of `session.run.completed`.
    `state` is key, JSON, key, JSON …; `state_removed` has the keys to delete.
    """
    return WriteResult(WriteAnswer(reply[0]), _parse_wakes(reply[1]) if len(reply) > 1 else ())


@_script_function
def cancel(reply: Reply, *, run_id: str, reason: str, force: bool) -> Cancelled:
    """Cancel a run: immediately if no worker executes it or with `force`, else by a request to its worker."""
    answer = CancelAnswer(reply[0])
    if answer is CancelAnswer.CANCELLED:
        return Cancelled(answer, _parse_wakes(reply[1]))
    return Cancelled(answer, state=reply[1] if answer is CancelAnswer.ALREADY else "")


@_script_function
def reclaim(
    reply: Reply, *, limit: int, max_recoveries: int, blameless: bool, heartbeat_ms: int = 0
) -> Reclaimed:
    """Take up to `limit` runs of one worker whose lease is over, and make them available to other workers.

    `blameless`: Redis was unreachable, so no run is suspected of having killed the worker. The same applies
    if other leases were lost within `heartbeat_ms` (0: this is not checked).
    """
    wakes, incarnation, left = reply
    return Reclaimed(_parse_wakes(wakes), incarnation, int(left))


@_script_function
def wake(reply: Reply, *, limit: int) -> tuple[tuple[Wake, ...], int]:
    """Wake runs that are due. Returns their wake-ups, and the number of examined entries."""
    return _parse_wakes(reply[0]), int(reply[1])


@_script_function
def resend(reply: Reply, *, queue: str, oldest_us: int, grace_ms: int, limit: int) -> tuple[Wake, ...]:
    """Resend lost wake-ups: those older than the oldest message of the queue and older than the grace."""
    return _parse_wakes(reply)


@_script_function
def resend_unread(
    reply: Reply, *, queue: str, grace_ms: int, max_grace_ms: int, limit: int
) -> tuple[tuple[Wake, ...], int]:
    """As `resend`, for a queue whose messages cannot be inspected.

    The grace of a run doubles with each resend.

    Also returns the number of examined entries. If it is `limit`, there may be more.
    """
    return _parse_wakes(reply[0]), int(reply[1])


@_script_function
def replaced(reply: Reply, *, messages: Sequence[str]) -> frozenset[int]:
    """The positions (from 0) of the messages that are not needed any more.

    A message is four items: queue, run id, send time in µs, and `ended` if it only notifies Celery, else ''.
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
    """Start another life of a run that failed or was cancelled. `checkpoint_id` '' means the latest one.

    `canvas` are new task options (JSON), '' keeps the old ones. `by` is who resumes the run, for the event.
    """
    answer = ResumeAnswer(reply[0])
    if answer is ResumeAnswer.LIVE:
        return Resumed(answer, reply[1], reply[2])
    if answer is not ResumeAnswer.OK:
        return Resumed(answer, detail=reply[1] if len(reply) > 1 else "")
    also = Wake.of(reply[5]) if len(reply) > 5 and reply[5] else None
    return Resumed(answer, reply[1], reply[2], int(reply[4]) if reply[4] else None, also, canvas=reply[3])


@_script_function
def confirm_completion(reply: Reply, *, runs: list[str]) -> tuple[bool, ...]:
    """Store that Celery was notified of the end of these lives: run id, life, run id, life ….

    False for a run that is in another life.
    """
    return tuple(answer == "OK" for answer in reply)


@dataclass(frozen=True, slots=True)
class RunEnd:
    """The end of one life of a run, and how often a recipient was to be notified of it, with this time."""

    run_id: str
    life: int
    tries: int = 1


@_script_function
def outbox_take(
    reply: Reply, *, recipient: str, limit: int, retry_ms: int, max_retry_ms: int
) -> tuple[tuple[RunEnd, ...], float | None]:
    """Take up to `limit` ends that this recipient must be notified of, and register the recipient.

    Each of them is due again after `retry_ms`, doubled with each try up to `max_retry_ms`, unless it is done
    before. Returns also the seconds until the next one is due.
    """
    taken, next_ms = reply
    ends = tuple(RunEnd(run_id, int(life), int(tries)) for run_id, life, tries in taken)
    return ends, None if next_ms == "-1" else int(next_ms) / 1000


@_script_function
def outbox_done(reply: Reply, *, recipient: str, ends: list[str]) -> int:
    """Remove ends from the outbox of a recipient: run id, life, run id, life …. Returns their number."""
    return int(reply)


@_script_function
def reject(reply: Reply, *, run_id: str, queue: str, code: str, message: str, hint: str) -> bool:
    """Create a failed run for an invalid message. False if a run with this id exists."""
    return bool(reply == "NEW")


@_script_function
def delete_session(reply: Reply, *, session_id: str, limit: int, even_if_not_notified: bool) -> Deleted:
    """Delete up to `limit` ended runs of a session, and the session itself with the last of them.

    `even_if_not_notified`: do not wait until Celery was notified of the end of the runs.
    """
    answer = DeleteAnswer(reply[0])
    if answer in (DeleteAnswer.BUSY, DeleteAnswer.NOT_NOTIFIED):
        return Deleted(answer, run_id=reply[1])
    return Deleted(answer, runs=int(reply[1]))


@_script_function
def put_aside(reply: Reply, *, key: str, code: str, what: str, item: str) -> None:
    """Add an unusable item to the list of dead letters. `key` is the key or queue where it was found."""


@_script_function
def aside_news(reply: Reply, *, limit: int) -> tuple[str, ...]:
    """The entries (JSON) that were put aside since the previous call, newest first (`store.dead_letters`)."""
    return tuple(reply)


@_script_function
def mend_key(reply: Reply, *, key: str, kind: str) -> Literal["MOVED", "LEFT", "SOUND"]:
    """Put a key aside if its type is not `kind`. LEFT: it has a wrong type, but it must stay in place."""
    return cast(Literal["MOVED", "LEFT", "SOUND"], reply)


@_script_function
def prune(reply: Reply, *, limit: int, name: str = "", kept: int = 0) -> Pruned:
    """Remove expired entries from the index `name` ('': from one that is due), examining about `limit`."""
    looked, name_, kept_, removed = reply
    return Pruned(looked == 1, name_, int(kept_), int(removed))


@_script_function
def lacking(
    reply: Reply, *, commands: Sequence[str], keys: Sequence[str], by_trying: bool = False
) -> tuple[int, ...]:
    """The positions (from 0) of the commands that the user may not run on the key at the same position.

    Changes nothing. `by_trying`: use the method for Redis 6, which has no function for this check.
    """
    return tuple(int(position) - 1 for position in reply)
