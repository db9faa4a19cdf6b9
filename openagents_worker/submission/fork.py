"""Forks. The only place that decides which run continues from a checkpoint of another one, and where."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from openagents_worker.arguments import optional_text, text_of_caller
from openagents_worker.errors import ConfigError, RequestInvalid, RunConflict, SessionNotFound
from openagents_worker.jsontext import loads
from openagents_worker.models import RunRecord, RunRequest, parse_request
from openagents_worker.models.fields import MAX_ID_CHARS, problem_with_id
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.checkpoints import Checkpoint
from openagents_worker.store.formats import HOLDS_TURNS, WRITTEN, stored_format, translate_parse_errors
from openagents_worker.store.held_turns import HELD, TakenTurns, taken_turns, turns_expired
from openagents_worker.store.keys import Keys
from openagents_worker.store.listing import extra_indexes
from openagents_worker.store.plan import Plan
from openagents_worker.store.records import record_plan, run_not_found
from openagents_worker.store.scripts import ForkAnswer, Forked, ForkSessionAnswer, ScriptCall
from openagents_worker.submission.accepted import Accepted, accepted_as, error_of
from openagents_worker.submission.new_run import digest_of, stored_text

__all__ = ["Fork", "fork_of", "fork_session"]

MAX_STEPS = 10**9
SUFFIX_CHARS = 32  # of the id of a forked session, which begins with that of the session


@dataclass(frozen=True, slots=True)
class _HeldTurns:
    """What a fork gets of turns that are not written to a session yet (`store.held_turns`).

    `above` are those that the source saw when it began, `taken` those of its own shared children.
    """

    above: Sequence[str]
    taken: TakenTurns


@dataclass(frozen=True, slots=True)
class Fork:
    """The fork of a run. `request` is that of the new run.

    `messages` and `artifacts` are the numbers of items in the session when the source began.
    """

    request: RunRequest
    from_run_id: str
    steps: int
    messages: int
    artifacts: int
    turns: _HeldTurns

    @property
    def checkpoint_id(self) -> str:
        return f"{self.from_run_id}:step:{self.steps}"

    def call(self) -> ScriptCall[Forked]:
        """The script that creates the run."""
        request = self.request
        return scripts.fork(
            run_id=request.run_id,
            from_run_id=self.from_run_id,
            steps=self.steps,
            session_id=request.session_id,
            digest=_digest(f"{digest_of(request)} {self.checkpoint_id}"),
            uid=secrets.token_hex(8),
            request=stored_text(request),
            messages=self.messages,
            artifacts=self.artifacts,
            lists=extra_indexes(request.tenant, request.labels),
            tell=True,
            input_text=request.input_text,
            above=self.turns.above,
            held_to=self.turns.taken.end,
            held_call=self.turns.taken.call,
        )

    def accepted(self, answer: Forked) -> Accepted:
        """The accepted run. Raises the error for an answer that does not accept it."""
        request = self.request
        match answer.answer:
            case ForkAnswer.NEW | ForkAnswer.SAME:
                return accepted_as(request, answer, "", is_new=answer.answer is ForkAnswer.NEW)
            case ForkAnswer.CONFLICT:
                raise error_of(
                    request,
                    RunConflict,
                    f"the run_id {request.run_id!r} belongs to another request",
                    "choose another run_id, or leave it out",
                )
            case ForkAnswer.UNKNOWN:
                raise run_not_found(self.from_run_id)
            case ForkAnswer.NO_CHECKPOINT:
                raise _no_checkpoint(self.from_run_id)
            case ForkAnswer.OTHER_CHECKPOINT:
                raise error_of(
                    request,
                    ConfigError,
                    f"the run {self.from_run_id!r} has no checkpoint {self.checkpoint_id!r}",
                    f"its last checkpoint is {answer.detail!r}",
                )
            case ForkAnswer.HELD_EXPIRED:
                raise turns_expired(answer.detail)
            case ForkAnswer.SESSION_EXISTS:
                raise error_of(
                    request,
                    RunConflict,
                    f"the session {request.session_id!r} exists",
                    "choose a new session_id, or the one of the run",
                )
            case _:
                assert_never(answer.answer)


def fork_of(
    keys: Keys,
    settings: Settings,
    checkpoint_id: str,
    *,
    input_text: str | None = None,
    session_id: str | None = None,
    run_id: str | None = None,
) -> Plan[Fork]:
    """A plan that returns the fork of a run, from what is stored about the run.

    Raises `RequestInvalid`, `RequestTooLarge`, `RunNotFound`, or `ConfigError` if the run has no checkpoint.
    `accepted` of the fork raises `HeldTurnsExpired`, too.
    """
    from_run_id, steps = _parts_of(checkpoint_id)
    run_id = optional_text("run_id", run_id) or str(uuid.uuid4())
    source: RunRecord = yield from record_plan(keys, from_run_id)
    first = yield scripts.page(run_id=from_run_id, position=0, page_bytes=1)
    if not first:
        raise _no_checkpoint(from_run_id)
    start = Checkpoint.of(from_run_id, 0, first[0]).value
    request = _forked_request(source, run_id, optional_text("session_id", session_id), input_text)
    return Fork(
        parse_request(request, max_bytes=settings.max_payload_bytes),
        from_run_id,
        steps,
        _count_in(start, "transcript_length"),
        _count_in(start, "artifact_count"),
        (yield from _held_turns(keys, from_run_id, steps)),
    )


def _held_turns(keys: Keys, run_id: str, steps: int) -> Plan[_HeldTurns]:
    """Reads the records of a run up to a checkpoint, if it may have held turns. Raises `RecordUnreadable`."""
    above: Sequence[str] = ()
    taken = TakenTurns()
    format_ = yield lambda r: r.hget(keys("run", run_id), "format")
    position = 0 if stored_format(format_) >= HOLDS_TURNS else steps + 1
    while position <= steps:
        texts = yield scripts.page(run_id=run_id, position=position, page_bytes=scripts.PAGE_BYTES)
        if not texts:
            break
        with translate_parse_errors(WRITTEN, run_id=run_id):
            if position == 0:
                above = [str(part) for part in loads(texts[0])["outcome"].get("context", {}).get(HELD, ())]
            taken = max(taken, *map(taken_turns, texts[: steps + 1 - position]))
        position += len(texts)
    return _HeldTurns(above, taken)


def _forked_request(
    source: RunRecord, run_id: str, session_id: str | None, input_text: str | None
) -> dict[str, Any]:
    """The fields of the request: those of the source, with other ids, and another input if there is one."""
    if source.request is None:
        raise ConfigError(f"the request of the run {source.run_id!r} cannot be read", run_id=source.run_id)
    fields = source.request.model_dump(mode="json", exclude_none=True, exclude={"on_busy", "parent_run_id"})
    return {
        **fields,
        "run_id": run_id,
        "session_id": session_id or _new_session_id(source.session_id, run_id),
        "input_text": source.request.input_text if input_text is None else input_text,
        "queue": source.queue,
    }


def _parts_of(checkpoint_id: str) -> tuple[str, int]:
    """The id of the run and the number of a checkpoint. Raises `RequestInvalid`."""
    text_of_caller("checkpoint_id", checkpoint_id)
    run_id, _, number = checkpoint_id.rpartition(":step:")
    if not run_id or not number.isascii() or not number.isdecimal() or int(number[:20]) > MAX_STEPS:
        raise RequestInvalid(
            f"checkpoint_id must have the form '{{run_id}}:step:{{n}}'; found {checkpoint_id[:200]!r}",
            hint="Client.checkpoints(run_id) lists the checkpoints of a run",
        )
    return run_id, int(number)


def _new_session_id(session_id: str, made_for: str) -> str:
    """The id of a forked session. The same fork again gets the same id."""
    return f"{session_id[: MAX_ID_CHARS - SUFFIX_CHARS]}-fork-{_digest(made_for)[:12]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _count_in(start: Any, name: str) -> int:
    """A number of the prepared start. 0 if it cannot be read: the fork then begins with an empty list."""
    count = start.get(name) if isinstance(start, dict) else None
    return count if isinstance(count, int) and count >= 0 else 0


def _no_checkpoint(run_id: str) -> ConfigError:
    return ConfigError(
        f"the run {run_id!r} has no checkpoint, so it cannot be forked",
        hint="it has not begun, it is not durable, or its journal is gone: submit a new run",
        run_id=run_id,
    )


def fork_session(session_id: str, new_session_id: str | None) -> Plan[str]:
    """A plan that copies a session, and returns the id of the copy.

    Raises `RequestInvalid`, `SessionNotFound`, or `RunConflict` if the new session exists.
    """
    text_of_caller("session_id", session_id)
    new_id = optional_text("new_session_id", new_session_id) or _new_session_id(
        session_id, secrets.token_hex(8)
    )
    if problem := problem_with_id(new_id):
        raise RequestInvalid(f"new_session_id {problem}")
    answer: ForkSessionAnswer = yield scripts.fork_session(session_id=session_id, new_session_id=new_id)
    match answer:
        case ForkSessionAnswer.OK:
            return new_id
        case ForkSessionAnswer.EXISTS:
            raise RunConflict(
                f"the session {new_id!r} exists", hint="choose another new_session_id", session_id=new_id
            )
        case ForkSessionAnswer.UNKNOWN:
            raise SessionNotFound(
                f"the session {session_id!r} does not exist",
                hint="it expires OPENAGENTS_SESSION_TTL_S after its last run",
                session_id=session_id,
            )
        case _:
            assert_never(answer)
