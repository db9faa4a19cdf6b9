"""The boundary around user code. The only place where what a plugin raises becomes a coded error of the run.

User code is whatever a deployment brings: patterns, tools and their hooks, memories, assembler, deps, output
types, model clients. It may raise anything, `SystemExit`, `KeyboardInterrupt` and `CancelledError` included;
what is raised is an outcome of the run and never ends the process or its event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from types import TracebackType
from typing import Any, TypeVar, cast

from openagents_worker.errors import (
    ORIGINAL,
    ModelRetryError,
    OpenAgentsError,
    ProcessTraceback,
    text_of,
)
from openagents_worker.jsontext import ENVELOPE_LEVELS, MAX_NESTING, replaced
from openagents_worker.llm.base import current_call
from openagents_worker.models import MAX_MESSAGE_CHARS, ErrorDetails
from openagents_worker.redaction import safe_message
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.marks import Marks, mark_of, marked, run_prefix
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.offload import WorkOffLoop
from openagents_worker.tracebacks import is_raised_by_user, traceback_text

__all__ = [
    "RunCode",
    "cancelling_itself_only",
    "class_path",
    "coded",
    "current_run",
    "described",
    "described_in_log",
    "executing",
    "original_of",
    "stand_for",
    "tool_error",
    "travels_on",
    "user_code",
    "user_error_of",
]

log = get_logger(__name__)

T = TypeVar("T")

MAX_NAMED_MEMBERS = 10  # of an exception group; the message says how many there are
MAX_NAMED_DEPTH = 3  # of groups inside of groups
MAX_LOGGED_CHARS = 2_000  # of an error's message in a log line

Coded = Callable[[str], OpenAgentsError]
"""Makes the coded error of a text, as the class of an error does."""


class RunCode:
    """What of one attempt's code executes in this process: its tasks, and its work in threads and processes.

    A task belongs to the run in whose context it was started. What is shared by the runs of a process starts
    its tasks in a context of its own.
    """

    def __init__(
        self, run_id: str, agent_id: str, latch: Latch, marks: Marks | None = None, incarnation: str = ""
    ) -> None:
        """`marks` are those of the process; without them nobody reads what this run executes."""
        self.run_id = run_id
        self.agent_id = agent_id
        self.latch = latch
        self.marks = marks or Marks()
        self.off_loop = WorkOffLoop(_call_that_runs, self.marks.in_thread, group=agent_id)
        self._prefix = run_prefix(run_id, agent_id, incarnation)
        self._tasks: set[asyncio.Task[Any]] = set()

    def started(self, task: asyncio.Task[Any]) -> None:
        """A task was made in the context of the run; a worker's loop says so of each."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def contained(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The coroutine of a task that the run has started, which raises none of what is a signal elsewhere.

        asyncio would end its loop, and with it all runs of the process, for SystemExit and KeyboardInterrupt;
        GeneratorExit would close the coroutine that waits for the task. They become RuntimeErrors, as Python
        makes one of StopIteration.
        """
        try:
            return await self.marks.steps(work)
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            if travels_on(error):
                raise
            log.error(
                "run.task_exited",
                run_id=self.run_id,
                agent_id=self.agent_id,
                error=described(error),
                user_error=error,
            )
            raise RuntimeError(f"a task of the run raised {described(error)}") from error

    def mark(self, kind: str = "runtime", name: str = "", call_id: str = "") -> bytes:
        """The mark of code of this run; `runtime` is what this library does for it between its plugins."""
        return mark_of(self._prefix, kind, name, call_id)

    def tasks(self) -> set[asyncio.Task[Any]]:
        """The tasks of the run that have not ended, without those in which the runtime writes for it."""
        return {task for task in self._tasks if not task.done()}


def _call_that_runs() -> str:
    call = current_call.get()
    return f"{call.kind} {call.name}" if call is not None else ""


current_run: ContextVar[RunCode | None] = ContextVar("openagents_current_run", default=None)
"""The run whose code runs now."""


class executing:
    """`with executing("memory", "shop.Memory"): …` marks what the block executes as that code of the run.

    The block runs in a task of a run, on the event loop; elsewhere nothing is marked.
    """

    __slots__ = ("_before", "_code", "_mark", "_run")

    def __init__(self, kind: str, name: str, call_id: str = "") -> None:
        self._code = (kind, name, call_id)

    def __enter__(self) -> None:
        self._run = current_run.get()
        if self._run is not None:
            self._before, self._mark = marked.get(), self._run.mark(*self._code)
            marked.set(self._mark)
            self._run.marks.loop_begins(self._mark)

    def __exit__(self, *_: object) -> None:
        # A coroutine that is thrown away ends wherever that happens, which may be in code of another run.
        if self._run is not None and marked.get() is self._mark:
            marked.set(self._before)
            self._run.marks.loop_begins(self._before)


def class_path(plugin: object) -> str:
    """The name of a plugin's class, as its owner would look for it."""
    kind = type(plugin)
    return f"{text_of(kind.__module__)}.{text_of(kind.__qualname__)}"


class user_code:
    """`with user_code(PatternError): …` turns what the block raises into a coded error that names its type.

    What passes: a coded error (unless it cannot be stored), the latch of a run that is latched, and a
    cancellation that somebody asked for. Everything else is raised as `wrap(text)`, with the original as its
    cause. The error that `wrap` makes is not retryable unless its class is.
    """

    def __init__(self, wrap: Coded, *, prefix: str = "") -> None:
        self._wrap = wrap
        self._prefix = prefix

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or travels_on(error):
            return
        if (reason := _latched_in(error)) is not None:
            raise RunLatched(reason) from error
        translated = coded(error, self._wrap, prefix=self._prefix)
        if translated is not error:
            raise translated from error


async def cancelling_itself_only(work: Awaitable[T]) -> T:
    """Await user code that runs in its caller's task. A cancellation of that task which the code asks for
    itself is its own outcome: it is raised, and the task is not cancelled any more."""
    task = asyncio.current_task()
    assert task is not None
    steps = _Steps(work, task)
    try:
        value: T = await steps
        if steps.cancellations:
            await asyncio.sleep(0)  # where the cancellation that has not come yet would come next
    except asyncio.CancelledError:
        is_its_own = 0 < steps.cancellations >= task.cancelling()
        _uncancel(task, steps.cancellations)
        if steps.is_done and is_its_own:
            return cast(T, steps.value)
        raise
    _uncancel(task, steps.cancellations)
    return value


def _uncancel(task: asyncio.Task[Any], times: int) -> None:
    for _ in range(times):
        task.uncancel()


class _Steps:
    """Awaits something step by step, and counts how often a step has cancelled the task it runs in. Whoever
    else cancels the task does so between two steps."""

    def __init__(self, work: Awaitable[Any], task: asyncio.Task[Any]) -> None:
        self.cancellations = 0
        self.is_done = False
        self.value: Any = None
        self._work = work
        self._task = task

    def __await__(self) -> Generator[Any, Any, Any]:
        steps: Any = self._work.__await__()
        step, given = steps.send, None
        while True:
            before = self._task.cancelling()
            try:
                waits_for = step(given)
            except StopIteration as end:
                self.is_done, self.value = True, end.value
                return end.value
            finally:
                self.cancellations = max(0, self.cancellations + self._task.cancelling() - before)
            try:
                step, given = steps.send, (yield waits_for)
            except BaseException as error:  # noqa: BLE001 - it is the awaited one's
                step, given = steps.throw, error


def travels_on(error: BaseException) -> bool:
    """Whether this is no outcome of user code but a signal of the runtime that has to reach it."""
    if isinstance(error, RunLatched):
        run = current_run.get()
        return run is None or run.latch.reason is not None
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs: a coroutine is being thrown away
        task = None
    if isinstance(error, asyncio.CancelledError):
        return task is None or task.cancelling() > 0
    return isinstance(error, GeneratorExit) and task is None  # the coroutine is being thrown away


def _latched_in(error: BaseException) -> LatchReason | None:
    """Why the run is latched, where that is what a group of errors is about (a TaskGroup makes one of it)."""
    run = current_run.get()
    if run is None or not isinstance(error, BaseExceptionGroup) or error.subgroup(RunLatched) is None:
        return None
    return run.latch.reason


def coded(error: BaseException, wrap: Coded, *, prefix: str = "") -> OpenAgentsError:
    """The error as a coded one that can be stored: itself where it is one, else what `wrap` makes of it.

    Where user code raised it, it has the traceback as text from here on.
    """
    if isinstance(error, OpenAgentsError) and _is_storable(error):
        if error.traceback is None and (original := original_of(error)) is not None:
            error.__dict__["traceback"] = traceback_text(original)  # its class may have a property there
        return error
    wrapped = wrap(f"{prefix}{safe_message(described(error), MAX_MESSAGE_CHARS)}")
    wrapped.__cause__ = error
    wrapped.__dict__["traceback"] = traceback_text(error)
    return stand_for(wrapped, error)


# --- which exception it was ------------------------------------------------------------------------------


def stand_for(error: OpenAgentsError, original: BaseException | None) -> OpenAgentsError:
    """Note which exception the error stands for. Its cause stays as it is: on replay there is none, and the
    program must not see a difference."""
    if original is not None and original is not error:
        error.__dict__[ORIGINAL] = original
    return error


def original_of(error: BaseException) -> BaseException | None:
    """The exception that user code raised; None where an error of this library explains itself, and where
    the exception was raised in another process."""
    at = error
    while isinstance(at, OpenAgentsError):
        original = at.__dict__.get(ORIGINAL)
        if original is None:
            is_users = isinstance(at.__cause__, ProcessTraceback) or is_raised_by_user(at)
            return at if is_users and not isinstance(at, ModelRetryError) else None
        at = original
    return at


def user_error_of(error: OpenAgentsError) -> BaseException | None:
    """What a log line of the error shows as its exception, with the causes that this process knows."""
    original = original_of(error)
    with suppress(Exception):  # an exception's class may override anything
        at, seen = original, set[int]()
        while at is not None and id(at) not in seen:
            seen.add(id(at))
            if isinstance(at, OpenAgentsError) and at.__cause__ is None:
                at.__cause__ = at.__dict__.get(ORIGINAL)
            at = at.__context__ if at.__cause__ is None else at.__cause__
    return original


def described(error: BaseException, *, depth: int = MAX_NAMED_DEPTH) -> str:
    """The type and the text of an error; of a group, those of each member."""
    text = safe_message(text_of(error), MAX_MESSAGE_CHARS)
    name = type(error).__name__
    if not isinstance(error, BaseExceptionGroup) or not depth:
        return f"{name}: {text}"
    members = [described(member, depth=depth - 1) for member in error.exceptions[:MAX_NAMED_MEMBERS]]
    return f"{name}: {text} [{'; '.join(members)}]"


def described_in_log(error: OpenAgentsError) -> dict[str, Any]:
    """The fields of a log line that say what went wrong."""
    return {"code": text_of(error.code), "message": safe_message(error.message, MAX_LOGGED_CHARS)}


def _is_storable(error: OpenAgentsError) -> bool:
    """Whether the error of a plugin's own class can be recorded and shown as it is."""
    try:
        replaced(error.to_dict(), MAX_NESTING + ENVELOPE_LEVELS)
        ErrorDetails.from_exception(error).model_dump_json()
    except Exception:  # noqa: BLE001 - its class may override anything
        return False
    return isinstance(error.code, str)


def tool_error(make: Callable[..., OpenAgentsError], tool_id: str) -> Coded:
    """`wrap` for an error class that is told its tool."""
    return partial(_of_tool, make, tool_id)


def _of_tool(make: Callable[..., OpenAgentsError], tool_id: str, text: str) -> OpenAgentsError:
    return make(text, tool_id)
