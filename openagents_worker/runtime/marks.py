"""Marks. The only place that says, in memory that another process can read, whose code executes now.

Code that keeps the interpreter to itself (the GIL) lets no other thread of its process say who it is: a
regular expression that never ends, an extension in C, an integer with a billion digits. So whoever executes
code of a run writes that down before: each step of a task on the event loop, and each function in a thread.
A process beside the worker (`worker.stall_monitor`) reads it when the worker stands still.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

__all__ = ["NOBODY", "Executing", "MarkOfThread", "Marks", "Seen", "mark_of", "marked", "run_prefix"]

P = ParamSpec("P")
T = TypeVar("T")

MARK_BYTES = 1536
"""Of one mark. A run's id is never cut short: it has at most 256 characters of at most four bytes."""

HEAD = struct.Struct("=QdQQQ")
"""How often the process has said that it lives, the end of its lease by the boot clock in seconds (0: it has
none), its event loop's thread as the system and as Python number it, and whether it is idle (1, else 0)."""
THREAD = struct.Struct("=QQ")
"""A thread that executes code of a run, as the system and as Python number it; 0: none."""
THREADS = 126  # more than execute tools by default; a thread beyond them has no mark

ON_LOOP = HEAD.size
SLOT_BYTES = THREAD.size + MARK_BYTES
FIRST_SLOT = ON_LOOP + MARK_BYTES
SIZE_BYTES = FIRST_SLOT + THREADS * SLOT_BYTES

NOBODY = bytes(MARK_BYTES)
"""The mark of code that belongs to no run."""

marked: ContextVar[bytes] = ContextVar("openagents_marked", default=NOBODY)
"""The mark of what the current task does next."""


@dataclass(frozen=True, slots=True)
class Executing:
    """Code that executes: of which run and agent, and what it is.

    >>> mark = Executing("r1", "shop", kind="tool", name="search", call_id="c1").to_mark()
    >>> Executing.of(mark).plugin
    'tool search'
    """

    run_id: str
    agent_id: str = ""
    incarnation: str = ""
    """As which the process has claimed the run."""
    kind: str = ""
    """`tool`, `model`, `pattern`, `memory`, `output_type` and so on; `runtime` between them."""
    name: str = ""
    call_id: str = ""

    @property
    def plugin(self) -> str:
        """What a person looks for: the kind and the name of the code."""
        return f"{self.kind} {self.name}".strip()

    def to_mark(self) -> bytes:
        prefix = run_prefix(self.run_id, self.agent_id, self.incarnation)
        return mark_of(prefix, self.kind, self.name, self.call_id)

    @classmethod
    def of(cls, mark: bytes) -> Executing | None:
        """What a mark says; None for nobody's."""
        parts = mark.rstrip(b"\0").decode(errors="replace").split("\0", 5)
        run_id, agent_id, incarnation, kind, call_id, name = (*parts, *[""] * 5)[:6]
        return cls(run_id, agent_id, incarnation, kind, name, call_id) if run_id else None


def run_prefix(run_id: str, agent_id: str, incarnation: str) -> bytes:
    """What all marks of a run begin with."""
    return f"{run_id}\0{agent_id}\0{incarnation}\0".encode(errors="replace")


def mark_of(prefix: bytes, kind: str = "", name: str = "", call_id: str = "") -> bytes:
    """A mark; what is too long is cut short at the end of the name."""
    text = prefix + f"{kind}\0{call_id}\0{name}".encode(errors="replace")
    return text[:MARK_BYTES].ljust(MARK_BYTES, b"\0")


@dataclass(frozen=True, slots=True)
class MarkOfThread:
    """What a thread executes. `native_id` is the system's number, `ident` Python's."""

    native_id: int
    ident: int
    executing: Executing | None


class Marks:
    """The marks of one process. Written by its event loop and its threads.

    With `is_shared`, and where the system has memory files (Linux), `fd` opens them to a child process; -1
    where nobody else can read them.
    """

    def __init__(self, *, is_shared: bool = False) -> None:
        self.fd = _memory_file() if is_shared else -1
        self._memory = mmap.mmap(self.fd, SIZE_BYTES)
        self._on_loop = NOBODY
        self._beats = 0
        self._loop = (0, 0)
        self._free = [FIRST_SLOT + n * SLOT_BYTES for n in range(THREADS)]

    def close(self) -> None:
        """No new process can read them from here on. The memory stays: a tool's thread may still write."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    # --- who executes ---

    def on_loop(self) -> Executing | None:
        """What the event loop executes now; from any thread."""
        return Executing.of(self._on_loop)

    def loop_begins(self, mark: bytes) -> bytes:
        """The event loop executes this from here on; returns what it did before."""
        before, self._on_loop = self._on_loop, mark
        self._memory[_ON_LOOP] = mark
        return before

    @types.coroutine
    def steps(self, work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
        """Await a coroutine on the event loop, with the current task's mark in each of its steps."""
        memory, place = self._memory, _ON_LOOP
        step: Callable[[Any], Any] = work.send
        given: Any = None
        while True:
            before = self._on_loop
            self._on_loop = memory[place] = marked.get()
            try:
                waits_for = step(given)
            except StopIteration as end:
                value: T = end.value
                return value
            finally:
                self._on_loop = memory[place] = before
            try:
                step, given = work.send, (yield waits_for)
            except BaseException as error:  # noqa: BLE001 - it is the awaited one's
                step, given = work.throw, error

    def in_thread(self, function: Callable[P, T]) -> Callable[P, T]:
        """The same function, which has the current task's mark in the thread that calls it."""
        mark = marked.get()

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                at = self._free.pop()
            except IndexError:
                return function(*args, **kwargs)
            thread = THREAD.pack(threading.get_native_id(), threading.get_ident())
            self._memory[at : at + SLOT_BYTES] = thread + mark
            try:
                return function(*args, **kwargs)
            finally:
                self._memory[at : at + SLOT_BYTES] = bytes(SLOT_BYTES)
                self._free.append(at)

        return call if mark is not NOBODY else function

    # --- that the process lives ---

    def loop_is(self, native_id: int, ident: int) -> None:
        """Which thread the event loop runs in."""
        self._loop = (native_id, ident)

    def beat(self, lease_end_s: float, *, is_idle: bool = False) -> None:
        """Say that the interpreter runs. `lease_end_s` by the boot clock; 0: there is no lease to keep.

        `is_idle`: nobody works, and the next beat comes later.
        """
        self._beats += 1
        HEAD.pack_into(self._memory, 0, self._beats, lease_end_s, *self._loop, is_idle)


def _memory_file() -> int:
    """An open file that is nowhere but in memory; -1 where the system has none, or does not allow it."""
    if not hasattr(os, "memfd_create"):
        return -1
    try:
        fd = os.memfd_create("openagents-marks")
    except OSError:
        return -1
    os.ftruncate(fd, SIZE_BYTES)
    return fd


_ON_LOOP = slice(ON_LOOP, ON_LOOP + MARK_BYTES)


@dataclass(frozen=True, slots=True)
class Seen:
    """The marks of a process, as another one has read them."""

    loop: MarkOfThread
    threads: tuple[MarkOfThread, ...]

    @classmethod
    def of(cls, memory: bytes) -> Seen:
        _, _, native_id, ident, _ = HEAD.unpack_from(memory)
        threads = []
        for at in range(FIRST_SLOT, SIZE_BYTES, SLOT_BYTES):
            native, python = THREAD.unpack_from(memory, at)
            executing = Executing.of(memory[at + THREAD.size : at + SLOT_BYTES])
            if executing is not None:
                threads.append(MarkOfThread(native, python, executing))
        return cls(
            MarkOfThread(native_id, ident, Executing.of(memory[_ON_LOOP])),
            tuple(threads),
        )
