"""Script runs: the only place that defines which commands run a script, and in which order.

A script is run by one command. What follows an error of it, and a run with a write to disk, are plans.
"""

from __future__ import annotations

from typing import Any, TypeVar

from redis import exceptions

from openagents_worker.redaction import safe_url
from openagents_worker.store.cell import Cell
from openagents_worker.store.durability import (
    WAITAOF,
    WAITAOF_TIMEOUT_MS,
    PersistenceInfo,
    queue_persistence_commands,
)
from openagents_worker.store.permission import (
    DEFAULT_USER,
    add_rights_to_permission_error,
    is_permission_error,
    missing_rights_error,
    user_of,
)
from openagents_worker.store.plan import Commands, Plan
from openagents_worker.store.redis_errors import AnswerLost, is_temporary_error, translate_errors
from openagents_worker.store.scripts import Script, ScriptCall, lacking

__all__ = ["ScriptRuns"]

T = TypeVar("T")

_DEMOTED = "WAITAOF cannot be used with replica"  # the only error of a replica without a code of its own


class ScriptRuns:
    """How one process runs scripts in a cell."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._common = cell.common
        self._permissions = _ScriptPermissions(cell)
        self.checked = self._permissions.permitted
        """The SHA-1s of the scripts that have checked all rights that they need in an earlier run."""
        self._persistence_info: PersistenceInfo | None = None
        self._loading: set[str] = set()

    def command(self, call: ScriptCall[T]) -> tuple[Any, ...]:
        """The command that runs the script. `result` parses its reply, `after_error` handles its error."""
        sha, _ = self._permissions.source_to_run(call.script)
        return ("EVALSHA", sha, 1, self._cell.prefix, *call.argv(self._common, self._cell.codec))

    def result(self, call: ScriptCall[T], reply: Any) -> T:
        """The result of a script that was executed."""
        self._permissions.permitted.add(call.script.sha)
        result: T = call.decode(reply, self._cell.codec)
        return result

    def after_error(self, call: ScriptCall[T], error: exceptions.ResponseError) -> Plan[T]:
        """Load and run the script if Redis does not know it yet, or not any more. Else raise the error."""
        sha, source = self._permissions.source_to_run(call.script)
        arguments = self._arguments(call)
        try:
            if not isinstance(error, exceptions.NoScriptError):
                raise error
            # Runs that start together need the same script. The other commands follow the first SCRIPT LOAD,
            # usually on the same connection, so one is enough.
            if sha not in self._loading:
                self._loading.add(sha)
                try:
                    yield ("SCRIPT", "LOAD", source)
                finally:
                    self._loading.discard(sha)
            try:
                reply = yield ("EVALSHA", sha, *arguments)
            except exceptions.NoScriptError:  # another Redis has become the master, or scripts are flushed
                reply = yield ("EVAL", source, *arguments)
        except exceptions.ResponseError as refused:
            self._permissions.handle_error(call.script, refused)
            raise
        finally:
            del error  # it refers to this frame if it was raised: no reference cycle
        return self.result(call, reply)

    def _arguments(self, call: ScriptCall[Any]) -> tuple[Any, ...]:
        return (1, self._cell.prefix, *call.argv(self._common, self._cell.codec))

    def run_on_disk(self, call: ScriptCall[T]) -> Plan[T]:
        """Run a script once and wait until its writes are on disk (`Store.run_on_disk`)."""
        if self._persistence_info is None:
            self._persistence_info = yield from self._checked_persistence()
        if not self._persistence_info.can_wait_for_disk:
            result: T = yield call  # with `appendfsync always`, Redis answers after the write to disk
            return result
        arguments = self._arguments(call)
        reply = waitaof_answer = None
        sha, source = self._permissions.source_to_run(call.script)
        for verb in (("EVALSHA", sha), ("EVAL", source)):
            # On one connection: WAITAOF waits for the writes of its own connection.
            reply, waitaof_answer = yield Commands([(*verb, *arguments), WAITAOF])
            if not isinstance(reply, exceptions.NoScriptError):
                break
        if isinstance(reply, exceptions.ResponseError):
            self._permissions.handle_error(call.script, reply)
        with translate_errors(self._cell.url):
            reply = _require_on_disk(reply, waitaof_answer, self._cell)
            return self.result(call, reply)

    def _checked_persistence(self) -> Plan[PersistenceInfo]:
        """Read the persistence settings. Raises if this Redis or this user cannot write to disk on demand."""
        found = yield from persistence(self._cell)
        found.check_disk()
        if found.can_wait_for_disk and (yield lacking(commands=[WAITAOF[0]], keys=[""])):
            url = self._cell.url
            raise missing_rights_error([f"+{WAITAOF[0].lower()}"], safe_url(url), user_of(url))
        return found


def persistence(cell: Cell) -> Plan[PersistenceInfo]:
    """Read the persistence settings of this Redis."""

    def question(client: Any) -> Any:
        return queue_persistence_commands(client.pipeline(transaction=False)).execute(raise_on_error=False)

    answers = yield question
    with translate_errors(cell.url):
        for answer in answers:
            if isinstance(answer, Exception) and is_temporary_error(answer):
                raise answer
    return PersistenceInfo.of(answers)


def _require_on_disk(reply: Any, waitaof_answer: Any, cell: Cell) -> Any:
    """The reply of the script. Raises `AnswerLost` if Redis has not confirmed that its writes are on disk."""
    if isinstance(reply, Exception):
        raise reply
    if isinstance(waitaof_answer, Exception):
        if _DEMOTED in str(waitaof_answer):
            raise AnswerLost(
                f"Redis at {safe_url(cell.url)} has executed the script and was then demoted to a replica"
            ) from waitaof_answer
        raise waitaof_answer
    if not int(waitaof_answer[0]):
        raise AnswerLost(
            f"Redis at {safe_url(cell.url)} has the run, but not on disk within {WAITAOF_TIMEOUT_MS} ms"
        )
    return reply


class _ScriptPermissions:
    """Which scripts this process is known to be allowed to run.

    The first run of a script checks all rights of the Redis user that the script needs. An ACL user may lose
    a right later, so its scripts check their rights in every run, in a short form. After such an error,
    each script is checked completely again, so that the error names every missing right.
    """

    def __init__(self, cell: Cell) -> None:
        self._prefix = cell.prefix
        self._has_acl = user_of(cell.url) != DEFAULT_USER
        self.permitted: set[str] = set()
        """The SHA-1s of the scripts that were executed: the user had all rights."""

    def source_to_run(self, script: Script) -> tuple[str, str]:
        """SHA-1 and source of the script, with the check of rights that this run needs."""
        if script.sha not in self.permitted:
            return script.checking()
        return script.guarded if self._has_acl else (script.sha, script.source)

    def handle_error(self, script: Script, error: Exception) -> None:
        """If the user lacks a right, check all scripts again and add the missing rights to the error."""
        if is_permission_error(error):
            self.permitted.clear()
            add_rights_to_permission_error(error, script.rights, self._prefix)
