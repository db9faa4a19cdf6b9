"""The boundary to user code: the only place that turns exceptions of plugins into coded errors of the run.

User code is everything that a deployment adds: patterns, tools and their hooks, memories, assemblers, deps,
output types, model clients. It may raise any exception, also `SystemExit`, `KeyboardInterrupt` and
`CancelledError`. Its exceptions never end the process or its event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from functools import lru_cache, partial
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
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched, RunTransferred
from openagents_worker.runtime.marks import Marks, mark_of, marked, run_prefix
from openagents_worker.runtime.original.errors import translated
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.offload import WorkOffLoop, work_off_loop
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
    "set_original",
    "tool_error",
    "is_runtime_signal",
    "user_code",
    "user_error_of",
]

log = get_logger(__name__)

T = TypeVar("T")

MAX_NAMED_MEMBERS = 10  # of an exception group; its own message has the total
MAX_NAMED_DEPTH = 3  # of nested exception groups
MAX_LOGGED_CHARS = 2_000  # of an error's message in a log line

MakeCodedError = Callable[[str], OpenAgentsError]
"""Creates a coded error from a message: an error class, or a function."""


class RunCode:
    """The code of one attempt that executes now: its tasks, and its work in threads and processes.

    A task belongs to the run in whose context it was started. Objects shared by runs start their tasks in an
    empty context.
    """

    def __init__(
        self, run_id: str, agent_id: str, latch: Latch, marks: Marks | None = None, incarnation: str = ""
    ) -> None:
        """`marks` are those of the process. Without them, no other process can see what executes."""
        self.run_id = run_id
        self.agent_id = agent_id
        self.latch = latch
        self.marks = marks or Marks()
        self.off_loop = WorkOffLoop(_name_of_current_call, self.marks.in_thread, group=agent_id)
        self.mark_prefix = run_prefix(run_id, agent_id, incarnation)
        """The beginning of the marks of this run."""
        self._tasks: set[asyncio.Task[Any]] = set()

    def context(self) -> Context:
        """A copy of the current context for a task of the run."""
        context = copy_context()
        context.run(current_run.set, self)
        context.run(marked.set, self.mark())
        context.run(work_off_loop.set, self.off_loop)
        return context

    def track_task(self, task: asyncio.Task[Any]) -> None:
        """Track a task that was created in the context of the run. Called by the task factory of the loop."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def contain_exits(self, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """A coroutine for a task of the run that cannot stop the event loop.

        In each step the event loop has the mark of the task.

        asyncio stops its loop, and with it all runs of the process, for SystemExit and KeyboardInterrupt.
        GeneratorExit would close the coroutine that awaits the task. They become RuntimeErrors, as Python
        does with StopIteration.
        """
        return self.marks.run_marked(work, self._refuse_exit)

    def _refuse_exit(self, error: BaseException) -> None:
        """Raises RuntimeError for an exception of user code that would stop the event loop."""
        if not is_runtime_signal(error):
            raise self._as_runtime_error(error) from error

    def _as_runtime_error(self, error: BaseException) -> RuntimeError:
        log.error(
            "run.task_exited",
            run_id=self.run_id,
            agent_id=self.agent_id,
            error=described(error),
            user_error=error,
        )
        return RuntimeError(f"a task of the run raised {described(error)}")

    def mark(self) -> bytes:
        """The mark of code of this library between the plugins of the run."""
        return mark_of(self.mark_prefix, "runtime")

    def tasks(self) -> set[asyncio.Task[Any]]:
        """The unfinished tasks of the run, without the tasks in which the runtime writes to Redis."""
        return {task for task in self._tasks if not task.done()}


def _name_of_current_call() -> str:
    call = current_call.get()
    return f"{call.kind} {call.name}" if call is not None else ""


current_run: ContextVar[RunCode | None] = ContextVar("openagents_current_run", default=None)
"""The run to which the current code belongs."""


class executing:
    """`with executing("memory", "shop.Memory"): …` sets the mark of the run for the block, see `marks`.

    Has an effect only in a task of a run on the event loop. With `wrap`, exceptions of the block become coded
    errors, as with `user_code`.
    """

    __slots__ = ("_before", "_code", "_mark", "_prefix", "_run", "_wrap")

    def __init__(
        self,
        kind: str,
        name: str,
        call_id: str = "",
        *,
        wrap: MakeCodedError | None = None,
        prefix: str = "",
    ) -> None:
        self._code = (kind, name, call_id)
        self._wrap = wrap
        self._prefix = prefix

    def __enter__(self) -> None:
        self._run = run = current_run.get()
        if run is not None:
            self._before = marked.get()
            self._mark = mark = mark_of(run.mark_prefix, *self._code)
            marked.set(mark)
            run.marks.mark_loop(mark)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # A discarded coroutine may be closed while code of another run executes.
        if self._run is not None and marked.get() is self._mark:
            marked.set(self._before)
            self._run.marks.mark_loop(self._before)
        if error is not None and self._wrap is not None:
            _raise_coded(error, self._wrap, self._prefix)


def class_path(plugin: object) -> str:
    """Module and name of the class of a plugin, or of the function that it wraps."""
    if isinstance(path := getattr(plugin, "code_path", None), str):
        return path
    return _path_of(type(plugin))  # type: ignore[arg-type]  # mypy looks at the hash of an object


@lru_cache(maxsize=256)  # the plugins of a process have few classes
def _path_of(kind: type) -> str:
    return f"{text_of(kind.__module__)}.{text_of(kind.__qualname__)}"


class user_code:
    """`with user_code(PatternError): …` turns exceptions of the block into coded errors.

    Four kinds pass unchanged: coded errors that can be stored, `RunLatched` of a latched run,
    `RunTransferred`, and a cancellation of the current task. Any other exception is raised as `wrap(text)`,
    with the original as cause. That error is retryable only if its class is.
    """

    __slots__ = ("_prefix", "_wrap")

    def __init__(self, wrap: MakeCodedError, *, prefix: str = "") -> None:
        self._wrap = wrap
        self._prefix = prefix

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            _raise_coded(error, self._wrap, self._prefix)


def _raise_coded(error: BaseException, wrap: MakeCodedError, prefix: str) -> None:
    """Raise the coded error for an exception of user code. Does nothing for one that passes unchanged."""
    if is_runtime_signal(error):
        return
    if (reason := _latch_reason_in(error)) is not None:
        raise RunLatched(reason) from error
    coded_error = coded(error, wrap, prefix=prefix)
    if coded_error is not error:
        raise coded_error from error


async def cancelling_itself_only(work: Awaitable[T]) -> T:
    """Await user code in the task of its caller.

    If the code cancels this task itself, CancelledError is raised as the outcome of the code, and the task
    does not stay cancelled.
    """
    task = asyncio.current_task()
    assert task is not None
    steps = _CountedSteps(work, task)
    try:
        value: T = await steps
        if steps.cancellations:
            await asyncio.sleep(0)  # a pending cancellation is raised here
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


class _CountedSteps:
    """Awaits an object step by step, and counts how often a step cancelled its own task.

    All other code that cancels the task does so between two steps.
    """

    def __init__(self, work: Awaitable[Any], task: asyncio.Task[Any]) -> None:
        self.cancellations = 0
        self.is_done = False
        self.value: Any = None
        self._work, self._task = work, task

    def __await__(self) -> Generator[Any, Any, Any]:
        work = self._work  # `awaited` reads this variable
        steps: Any = work.__await__()
        step, sent = steps.send, None
        while True:
            before = self._task.cancelling()
            try:
                waits_for = step(sent)
            except StopIteration as end:
                self.is_done, self.value = True, end.value
                return end.value
            finally:
                self.cancellations = max(0, self.cancellations + self._task.cancelling() - before)
            try:
                step, sent = steps.send, (yield waits_for)
            except BaseException as error:  # noqa: BLE001 - passed on to the awaited object
                step, sent = steps.throw, error


def is_runtime_signal(error: BaseException) -> bool:
    """Whether an exception is a signal of the runtime or of asyncio, not an outcome of user code."""
    if isinstance(error, RunTransferred):
        return True
    if isinstance(error, RunLatched):
        run = current_run.get()
        return run is None or run.latch.reason is not None
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop: a coroutine is being discarded
        task = None
    if isinstance(error, asyncio.CancelledError):
        return task is None or task.cancelling() > 0
    return isinstance(error, GeneratorExit) and task is None  # the coroutine is being discarded


def _latch_reason_in(error: BaseException) -> LatchReason | None:
    """The latch reason, if an exception group (of a TaskGroup) contains `RunLatched`; else None."""
    run = current_run.get()
    if run is None or not isinstance(error, BaseExceptionGroup) or error.subgroup(RunLatched) is None:
        return None
    return run.latch.reason


def coded(error: BaseException, wrap: MakeCodedError, *, prefix: str = "") -> OpenAgentsError:
    """The error itself if it is a coded error that can be stored, else a coded error made by `wrap`.

    A coded error of the original SDK's package becomes one of this library. If user code raised the error,
    its `traceback` is set to the traceback as text.
    """
    if isinstance(error, OpenAgentsError) and _is_storable(error):
        if error.traceback is None and (original := original_of(error)) is not None:
            # Not setattr: the class of the error may define a property.
            error.__dict__["traceback"] = traceback_text(original)
        return error
    wrapped = translated(error)
    if wrapped is None or not _is_storable(wrapped):
        wrapped = wrap(f"{prefix}{safe_message(described(error), MAX_MESSAGE_CHARS)}")
    wrapped.__cause__ = error
    wrapped.__dict__["traceback"] = traceback_text(error)
    return set_original(wrapped, error)


# --- original exceptions ------------------------------------------------------------------------------


def set_original(error: OpenAgentsError, original: BaseException | None) -> OpenAgentsError:
    """Attach the original exception to a coded error. Returns the error.

    Does not use `__cause__`: a replayed error has none, and the program must not see a difference.
    """
    if original is not None and original is not error:
        error.__dict__[ORIGINAL] = original
    return error


def original_of(error: BaseException) -> BaseException | None:
    """The exception that user code raised. None for an error of this library, or if it was raised in
    another process."""
    at = error
    while isinstance(at, OpenAgentsError):
        original = at.__dict__.get(ORIGINAL)
        if original is None:
            is_users = isinstance(at.__cause__, ProcessTraceback) or is_raised_by_user(at)
            return at if is_users and not isinstance(at, ModelRetryError) else None
        at = original
    return at


def user_error_of(error: OpenAgentsError) -> BaseException | None:
    """The exception of user code for a log line. Its causes are completed with the known originals."""
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
    """Type and message of an error; of an exception group, also those of its members."""
    text = safe_message(text_of(error), MAX_MESSAGE_CHARS)
    name = type(error).__name__
    if not isinstance(error, BaseExceptionGroup) or not depth:
        return f"{name}: {text}"
    members = [described(member, depth=depth - 1) for member in error.exceptions[:MAX_NAMED_MEMBERS]]
    return f"{name}: {text} [{'; '.join(members)}]"


def described_in_log(error: OpenAgentsError) -> dict[str, Any]:
    """Code and message of an error as fields of a log line."""
    return {"code": text_of(error.code), "message": safe_message(error.message, MAX_LOGGED_CHARS)}


def _is_storable(error: OpenAgentsError) -> bool:
    """Whether an error of a custom class can be recorded and shown."""
    try:
        replaced(error.to_dict(), MAX_NESTING + ENVELOPE_LEVELS)
        ErrorDetails.from_exception(error).model_dump_json()
    except Exception:  # noqa: BLE001 - its class may override anything
        return False
    return isinstance(error.code, str)


def tool_error(make: Callable[..., OpenAgentsError], tool_id: str) -> MakeCodedError:
    """A `wrap` for error classes that take a tool id."""
    return partial(_make_tool_error, make, tool_id)


def _make_tool_error(make: Callable[..., OpenAgentsError], tool_id: str, text: str) -> OpenAgentsError:
    return make(text, tool_id)
