"""Marks: the only place that shows another process which code this process executes.

Code that holds the interpreter lock (the GIL) keeps all threads of its process from reporting anything, for
example an endless regular expression, a C extension, or an integer with a billion digits. Therefore each step
of a task on the event loop, and each function in a thread, first writes its mark to shared memory. The guard
process (`worker.stall_monitor`) reads the marks when the worker hangs.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from openagents_worker.concurrency import yielded
from openagents_worker.quick_init import quick_init

__all__ = ["NO_RUN", "Executing", "MarkOfThread", "Marks", "MarksSnapshot", "mark_of", "marked", "run_prefix"]

P = ParamSpec("P")
T = TypeVar("T")

MARK_BYTES = 1536
"""Largest size of one mark. A run id always fits: it has at most 256 characters of at most four bytes."""
SIZE = struct.Struct("=H")
"""The beginning of a mark: the size of what follows. In the memory, the rest of a longer mark may follow."""

HEAD = struct.Struct("=QdQQQ")
"""Fields: number of beats; end of the lease in seconds of the boot clock (0: no lease); thread of the event
loop as the system's and as Python's number; 1 if the process is idle, else 0."""
THREAD = struct.Struct("=QQ")
"""A thread that executes code of a run: the system's and Python's number; 0 for none."""
THREADS = 126  # more than the default number of tool threads; further threads have no mark

ON_LOOP = HEAD.size
SLOT_BYTES = THREAD.size + MARK_BYTES
FIRST_SLOT = ON_LOOP + MARK_BYTES
SIZE_BYTES = FIRST_SLOT + THREADS * SLOT_BYTES

NO_RUN = SIZE.pack(0)
"""The mark of code that does not belong to a run."""
FREE_SLOT = bytes(THREAD.size) + NO_RUN
MAX_TEXT_BYTES = MARK_BYTES - SIZE.size

marked: ContextVar[bytes] = ContextVar("openagents_marked", default=NO_RUN)
"""The mark for the next steps of the current task."""


@quick_init
@dataclass(frozen=True, slots=True)
class Executing:
    """Code that executes: its run, its agent and the plugin.

    >>> mark = Executing("r1", "shop", kind="tool", name="search", call_id="c1").to_mark()
    >>> Executing.of(mark).plugin
    'tool search'
    """

    run_id: str
    agent_id: str = ""
    incarnation: str = ""
    """The incarnation that has claimed the run."""
    kind: str = ""
    """`tool`, `model`, `pattern`, `memory`, `output_type` and so on; `runtime` for code of this library."""
    name: str = ""
    call_id: str = ""

    @property
    def plugin(self) -> str:
        """Kind and name of the code, for people."""
        return f"{self.kind} {self.name}".strip()

    def to_mark(self) -> bytes:
        prefix = run_prefix(self.run_id, self.agent_id, self.incarnation)
        return mark_of(prefix, self.kind, self.name, self.call_id)

    @classmethod
    def of(cls, mark: bytes) -> Executing | None:
        """Parse a mark; None if it does not belong to a run."""
        (size,) = SIZE.unpack_from(mark)
        parts = mark[SIZE.size : SIZE.size + size].decode(errors="replace").split("\0", 5)
        run_id, agent_id, incarnation, kind, call_id, name = (*parts, *[""] * 5)[:6]
        return cls(run_id, agent_id, incarnation, kind, name, call_id) if run_id else None


def run_prefix(run_id: str, agent_id: str, incarnation: str) -> bytes:
    """The first bytes of all marks of a run."""
    return f"{run_id}\0{agent_id}\0{incarnation}\0".encode(errors="replace")


def mark_of(prefix: bytes, kind: str = "", name: str = "", call_id: str = "") -> bytes:
    """A mark of at most `MARK_BYTES`. If it is too long, the end of the name is cut off."""
    text = (prefix + f"{kind}\0{call_id}\0{name}".encode(errors="replace"))[:MAX_TEXT_BYTES]
    return SIZE.pack(len(text)) + text


@dataclass(frozen=True, slots=True)
class MarkOfThread:
    """The code that a thread executes. `native_id` is the number of the system, `ident` that of Python."""

    native_id: int
    ident: int
    executing: Executing | None


class Marks:
    """The marks of one process, written by its event loop and its threads.

    With `is_shared`, on Linux, `fd` is a memory file that a child process can read. Otherwise `fd` is -1.
    """

    def __init__(self, *, is_shared: bool = False) -> None:
        self.fd = _memory_file() if is_shared else -1
        self._memory = mmap.mmap(self.fd, SIZE_BYTES)
        self._on_loop = NO_RUN
        self._beats = 0
        self._loop = (0, 0)
        self._free = [FIRST_SLOT + n * SLOT_BYTES for n in range(THREADS)]

    def close(self) -> None:
        """Close `fd`. The memory stays mapped, because a thread of a tool may still write to it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    # --- which code executes ---

    def executing_on_loop(self) -> Executing | None:
        """The code that the event loop executes now. Can be called from any thread."""
        return Executing.of(self._on_loop)

    def mark_loop(self, mark: bytes) -> bytes:
        """Store which code the event loop executes from now on (`mark_of`). Returns the previous mark."""
        before, self._on_loop = self._on_loop, mark
        self._memory[ON_LOOP : ON_LOOP + len(mark)] = mark
        return before

    async def run_marked(
        self, work: Coroutine[Any, Any, T], on_exit: Callable[[BaseException], object] | None = None
    ) -> T:
        """Await a coroutine. In each of its steps the event loop has the mark of the current task.

        `on_exit` is called when a step raises SystemExit, KeyboardInterrupt or GeneratorExit. It may raise
        another exception in its place.
        """
        step: Callable[[Any], Any] = work.send
        sent: Any = None
        memory = self._memory
        while True:
            # As `mark_loop`, which is called here for every step of every task of a run.
            before, self._on_loop = self._on_loop, (mark := marked.get())
            memory[ON_LOOP : ON_LOOP + len(mark)] = mark
            try:
                waits_for = step(sent)
            except StopIteration as end:
                value: T = end.value
                return value
            except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
                if on_exit is not None:
                    on_exit(error)
                raise
            finally:
                self._on_loop = before
                memory[ON_LOOP : ON_LOOP + len(before)] = before
                sent = None  # an exception refers to this frame: no reference cycle
            try:
                step, sent = work.send, await yielded(waits_for)
            except BaseException as error:  # noqa: BLE001 - passed on to the awaited coroutine
                step, sent = work.throw, error
            finally:
                del waits_for  # as above: the exception of a future, too

    def in_thread(self, function: Callable[P, T]) -> Callable[P, T]:
        """Wrap a function: the thread that calls it has the mark of the current task."""
        mark = marked.get()

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                offset = self._free.pop()
            except IndexError:
                return function(*args, **kwargs)
            slot = THREAD.pack(threading.get_native_id(), threading.get_ident()) + mark
            self._memory[offset : offset + len(slot)] = slot
            try:
                return function(*args, **kwargs)
            finally:
                self._memory[offset : offset + len(FREE_SLOT)] = FREE_SLOT
                self._free.append(offset)

        return call if mark is not NO_RUN else function

    # --- beats of the process ---

    def set_loop_thread(self, native_id: int, ident: int) -> None:
        """Set the thread of the event loop."""
        self._loop = (native_id, ident)

    def beat(self, lease_end_s: float, *, is_idle: bool = False) -> None:
        """Show that the interpreter works. `lease_end_s` is a time of the boot clock; 0 without a lease.

        `is_idle`: no run executes, so the next beat comes later.
        """
        self._beats += 1
        HEAD.pack_into(self._memory, 0, self._beats, lease_end_s, *self._loop, is_idle)


def _memory_file() -> int:
    """The descriptor of a new memory file; -1 if the system does not offer or allow one."""
    if not hasattr(os, "memfd_create"):
        return -1
    try:
        fd = os.memfd_create("openagents-marks")
    except OSError:
        return -1
    os.ftruncate(fd, SIZE_BYTES)
    return fd


@dataclass(frozen=True, slots=True)
class MarksSnapshot:
    """The marks of a process, read by another process."""

    loop: MarkOfThread
    threads: tuple[MarkOfThread, ...]

    @classmethod
    def of(cls, memory: bytes) -> MarksSnapshot:
        _, _, native_id, ident, _ = HEAD.unpack_from(memory)
        threads = []
        for offset in range(FIRST_SLOT, SIZE_BYTES, SLOT_BYTES):
            native, python = THREAD.unpack_from(memory, offset)
            executing = Executing.of(memory[offset + THREAD.size : offset + SLOT_BYTES])
            if executing is not None:
                threads.append(MarkOfThread(native, python, executing))
        return cls(
            MarkOfThread(native_id, ident, Executing.of(memory[ON_LOOP:FIRST_SLOT])),
            tuple(threads),
        )
