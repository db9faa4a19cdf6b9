"""Nodes and call ids: who makes a recorded call, and what the call is called in every attempt.

A *node* is an asyncio task of a run, named when it is created: `{parent}/{coroutine}({digest of its plain
arguments})#{n}`. A *scope* is the recorded call inside which a call is made. The *content* of a call is a
digest of its scope, kind, name and arguments, and its id is `{name}:{content}:{n}`. None of them depends on
the order in which tasks happen to run, so they are the same in every attempt.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar
from weakref import WeakMethod

__all__ = [
    "Frame",
    "Node",
    "Nodes",
    "OuterCall",
    "content_digest",
    "content_of",
    "name_of",
    "name_tasks",
    "outside_runs",
]

T = TypeVar("T")

CONTENT_BYTES = 7  # 56 bits: among ten thousand calls of a run two share a digest once in a billion runs
ARGUMENT_BYTES = 3  # tells siblings apart, whose names and order are the same anyway


def content_digest(*parts: str) -> str:
    """The digest of a call's content."""
    return blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=CONTENT_BYTES).hexdigest()


def content_of(call_id: str) -> str:
    """The content that a call id holds."""
    return call_id.rsplit(":", 2)[1]


def name_of(call_id: str) -> str:
    """The name that a call id holds; names may have colons of their own."""
    return call_id.rsplit(":", 2)[0]


@dataclass(frozen=True, slots=True)
class OuterCall:
    """A recorded call inside which other calls are made."""

    id: str
    kind: str
    node: str


class Node:
    """A task of a run. It lives until the task is done."""

    __slots__ = ("adrift", "path", "prompts", "task")

    def __init__(self, path: str, task: asyncio.Task[Any] | None = None) -> None:
        self.path = path
        self.task = task
        self.adrift = False
        """Whether it asked for something else than its own unread records hold."""
        self.prompts: dict[str, Any] = {}
        """What is known of the prompts that it asked models, by scope; dropped with it."""


@dataclass(slots=True, eq=False)
class Frame:
    """Where calls are made: a node, and the recorded calls that it is inside of, the outermost first."""

    nodes: Nodes
    node: Node
    outer: tuple[OuterCall, ...] = ()
    model_calls: int = 0
    """Calls of models on the way here: those of the parent before the node began, and the node's own."""
    parent: Frame | None = None
    children: Counter[str] | None = None
    """How many tasks of each name it has started; None while there is none."""

    @property
    def scope(self) -> str:
        """The id of the call inside which calls are made here; empty outside of all."""
        return self.outer[-1].id if self.outer else ""

    def joins(self) -> None:
        """What was counted here counts for whoever comes after it."""
        if self.parent is not None:
            self.parent.model_calls = max(self.parent.model_calls, self.model_calls)


_frame: ContextVar[Frame | None] = ContextVar("openagents_frame", default=None)


class Nodes:
    """The tree of tasks of one attempt. `on_end` is called with each node whose task is done.

    It is a method of what has this tree, and held weakly: a circle is not freed before the garbage collector
    looks, which it does once in a thousand runs.
    """

    def __init__(self, on_end: Callable[[Node], None]) -> None:
        self.living: set[Node] = set()
        self._on_end = WeakMethod(on_end)
        self._strangers: Counter[str] = Counter()

    def begin(self, part: str = "") -> None:
        """The task that runs now is the root of a part of the run; '' is the pattern's own."""
        name_tasks(asyncio.get_running_loop())
        before = _frame.get()
        counted = 0
        if before is not None and before.nodes is self:
            counted = before.model_calls
            self._ended(before.node)
        node = Node(part, asyncio.current_task())
        self.living.add(node)
        _frame.set(Frame(self, node, model_calls=counted))

    def end(self) -> None:
        """The task that runs now makes no more calls of the run."""
        frame = _frame.get()
        if frame is not None and frame.nodes is self:
            self._ended(frame.node)
            _frame.set(None)

    def here(self) -> Frame:
        """The frame of the task that runs now; one that was not started by the run becomes a node of it."""
        frame = _frame.get()
        if frame is not None and frame.nodes is self:
            return frame
        task = asyncio.current_task()
        assert task is not None
        name = f"~{_name(task.get_coro())}"
        self._strangers[name] += 1
        frame = Frame(self, Node(f"{name}#{self._strangers[name]}", task))
        self._add(frame)
        _frame.set(frame)
        return frame

    def child(self, parent: Frame, coro: Any) -> Frame:
        """The frame of a task that is being created in `parent` to run `coro`."""
        scope = f"{parent.scope.replace('/', '_')}>" if parent.outer else ""
        name = f"{scope}{_name(coro)}{_plain_arguments(coro)}"
        if parent.children is None:
            parent.children = Counter()
        parent.children[name] += 1
        path = f"{parent.node.path}/{name}#{parent.children[name]}"
        return Frame(self, Node(path), parent.outer, parent.model_calls, parent)

    def _add(self, frame: Frame) -> None:
        node, task = frame.node, frame.node.task
        assert task is not None
        self.living.add(node)

        def done(_: asyncio.Task[Any]) -> None:
            frame.joins()
            self._ended(node)

        task.add_done_callback(done)

    def _ended(self, node: Node) -> None:
        self.living.discard(node)
        node.task = None
        if (on_end := self._on_end()) is not None:
            on_end(node)

    def is_alone(self, node: Node) -> bool:
        """Whether no other node of the run lives."""
        return not self.living or (len(self.living) == 1 and node in self.living)

    @contextmanager
    def inside(self, frame: Frame, call: OuterCall) -> Iterator[Frame]:
        """Calls made in here are made inside this call."""
        inner = Frame(self, frame.node, (*frame.outer, call), frame.model_calls, frame)
        token = _frame.set(inner)
        try:
            yield inner
        finally:
            _frame.reset(token)
            inner.joins()
            frame.node.prompts.pop(call.id, None)


def outside_runs(coro: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
    """A task of the runtime's own, started in a run: it is no node of it."""
    context = copy_context()
    context.run(_frame.set, None)
    # Not by the loop, whose tasks are those of runs and say so: this one has nothing to say, and is cheaper.
    return asyncio.Task(coro, loop=asyncio.get_running_loop(), name=name, context=context)


def name_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Make a loop name the tasks that runs create on it; what makes its tasks today goes on to."""
    make = loop.get_task_factory()
    if getattr(make, "names_nodes", False):
        return

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        context: Context | None = options.pop("context", None)
        parent = _frame.get() if context is None else context.get(_frame)
        if parent is not None:
            context = copy_context() if context is None else context
            frame = parent.nodes.child(parent, coro)
            context.run(_frame.set, frame)
        if context is not None:
            options["context"] = context
        task: Any = asyncio.Task(coro, loop=loop, **options) if make is None else make(loop, coro, **options)
        if parent is not None:
            frame.node.task = task
            parent.nodes._add(frame)
        return task

    factory.names_nodes = True  # type: ignore[attr-defined]
    loop.set_task_factory(factory)


def _name(coro: Any) -> str:
    name: str = getattr(coro, "__qualname__", None) or type(coro).__name__
    return name.rpartition("<locals>.")[2].replace("/", "_")


def _plain_arguments(coro: Any) -> str:
    """What a task is asked to do, as far as it is plain.

    `asyncio.as_completed` creates its tasks in the order of a set, which is another one in each process.
    """
    frame = getattr(coro, "cr_frame", None)
    if frame is None:
        return ""
    plain = {
        key: value
        for key, value in frame.f_locals.items()
        if value is None or isinstance(value, str | int | float | bool)
    }
    if not plain:
        return ""
    text = repr(sorted(plain.items()))
    return f"({blake2b(text.encode(errors='surrogatepass'), digest_size=ARGUMENT_BYTES).hexdigest()})"
