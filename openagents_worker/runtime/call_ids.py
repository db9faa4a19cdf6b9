"""Nodes and call ids: the names of a run's tasks and recorded calls, the same in every attempt.

A *node* is an asyncio task of a run, named when it is created: `{parent}/{coroutine}({digest of its plain
arguments})#{n}`. A *scope* is the recorded call inside which a call is made. The *content* of a call is a
digest of its scope, kind, name and arguments. Its id is `{name}:{content}:{n}`. None of these depends on the
order in which tasks happen to execute.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol, TypeVar
from weakref import ref

from openagents_worker.quick_init import quick_init

__all__ = [
    "CallIdNumbering",
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

CONTENT_BYTES = 7  # 56 bits: with 10,000 calls per run, one run in a billion has a collision
ARGUMENT_BYTES = 3  # only distinguishes siblings with the same name


def content_digest(*parts: str) -> str:
    """The digest of a call's content."""
    return blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=CONTENT_BYTES).hexdigest()


def content_of(call_id: str) -> str:
    """The content digest in a call id."""
    return call_id.rsplit(":", 2)[1]


def name_of(call_id: str) -> str:
    """The name in a call id. Names can contain colons."""
    return call_id.rsplit(":", 2)[0]


@quick_init
@dataclass(frozen=True, slots=True)
class OuterCall:
    """A recorded call inside which other calls are made."""

    id: str
    kind: str
    node: str


class Node:
    """An asyncio task of a run."""

    __slots__ = ("drawn", "has_diverged", "path", "prompts", "task")

    def __init__(self, path: str, task: asyncio.Task[Any] | None = None) -> None:
        self.path = path
        self.task = task
        self.has_diverged = False
        """Whether it has made a call that differs from its own unused records."""
        self.prompts: dict[str, Any] = {}
        """Digest state of the prompts of its model calls, by scope. See `PromptDigests`."""
        self.drawn: defaultdict[str, int] = defaultdict(int)
        """How many values were derived from this place in the program, by scope."""


@dataclass(slots=True, eq=False)
class Frame:
    """Where a call is made: the node, and the enclosing recorded calls, the outermost first."""

    nodes: Nodes
    node: Node
    outer: tuple[OuterCall, ...] = ()
    model_calls: int = 0
    """Model calls so far: those of the parent before this node began, and those of this node."""
    parent: Frame | None = None
    children: Counter[str] | None = None
    """How many child tasks of each name were started; None while there are none."""

    @property
    def scope(self) -> str:
        """The id of the innermost enclosing call; empty if there is none."""
        return self.outer[-1].id if self.outer else ""

    def enclosing(self, call_id: str) -> tuple[OuterCall, str]:
        """The call with this id in which this code executes, and the id of the call around that one."""
        at = next(at for at, call in enumerate(self.outer) if call.id == call_id)
        return self.outer[at], self.outer[at - 1].id if at else ""

    def draw(self) -> str:
        """A text that names this place in the program and how often it was used, the same in each attempt."""
        self.node.drawn[self.scope] += 1
        return f"{self.node.path}\0{self.scope}\0{self.node.drawn[self.scope]}"

    def merge_into_parent(self) -> None:
        """Add the model calls of this frame to those of its parent."""
        if self.parent is not None:
            self.parent.model_calls = max(self.parent.model_calls, self.model_calls)


_frame: ContextVar[Frame | None] = ContextVar("openagents_frame", default=None)


class NodeObserver(Protocol):
    """Learns which tasks of a run have ended."""

    def on_node_end(self, node: Node) -> None:
        """The task of this node is done."""


class Nodes:
    """The tree of tasks of one attempt.

    Only a weak reference to the observer is kept: a reference cycle would keep the memory of an attempt until
    the next full garbage collection.
    """

    def __init__(self, observer: NodeObserver) -> None:
        self.living: set[Node] = set()
        self._observer = ref(observer)
        self._outside_tasks: defaultdict[str, int] = defaultdict(int)

    def begin(self, part: str = "") -> None:
        """Make the current task the root of a part of the run; '' is the part of the pattern."""
        name_tasks(asyncio.get_running_loop())
        before = _frame.get()
        counted = 0
        if before is not None and before.nodes is self:
            counted = before.model_calls
            self._node_ended(before.node)
        node = Node(part, asyncio.current_task())
        self.living.add(node)
        _frame.set(Frame(self, node, model_calls=counted))

    def end(self) -> None:
        """The current task makes no more calls of the run."""
        frame = _frame.get()
        if frame is not None and frame.nodes is self:
            self._node_ended(frame.node)
            _frame.set(None)

    def current_frame(self) -> Frame:
        """The frame of the current task. A task from outside of the run becomes a node on its first call."""
        frame = _frame.get()
        if frame is not None and frame.nodes is self:
            return frame
        task = asyncio.current_task()
        assert task is not None
        name = f"~{_coroutine_name(task.get_coro())}"
        self._outside_tasks[name] += 1
        frame = Frame(self, Node(f"{name}#{self._outside_tasks[name]}", task))
        self._register(frame)
        _frame.set(frame)
        return frame

    def frame_of_child(self, parent: Frame, coro: Any) -> Frame:
        """The frame of a new task for `coro`, created in the frame `parent`."""
        scope = f"{parent.scope.replace('/', '_')}>" if parent.outer else ""
        name = f"{scope}{_coroutine_name(coro)}{_arguments_digest(coro)}"
        if parent.children is None:
            parent.children = Counter()
        parent.children[name] += 1
        path = f"{parent.node.path}/{name}#{parent.children[name]}"
        return Frame(self, Node(path), parent.outer, parent.model_calls, parent)

    def _register(self, frame: Frame) -> None:
        node, task = frame.node, frame.node.task
        assert task is not None
        self.living.add(node)

        def on_done(_: asyncio.Task[Any]) -> None:
            frame.merge_into_parent()
            self._node_ended(node)

        task.add_done_callback(on_done)

    def _node_ended(self, node: Node) -> None:
        self.living.discard(node)
        node.task = None
        if (observer := self._observer()) is not None:
            observer.on_node_end(node)

    def tasks(self) -> list[asyncio.Task[Any]]:
        """The tasks of the run that are not done."""
        return [node.task for node in self.living if node.task is not None]

    def is_alone(self, node: Node) -> bool:
        """Whether the tasks of all other nodes of the run are done."""
        return not self.living or (len(self.living) == 1 and node in self.living)

    def inside(self, frame: Frame, call: OuterCall) -> AbstractContextManager[Frame]:
        """A context manager: calls made in its block are made inside `call`."""
        return _Inside(Frame(self, frame.node, (*frame.outer, call), frame.model_calls, frame))


class _Inside:
    """Makes a frame the current one for a block, and then adds its counts to those of its parent."""

    __slots__ = ("_inner", "_token")

    def __init__(self, inner: Frame) -> None:
        self._inner = inner

    def __enter__(self) -> Frame:
        self._token = _frame.set(self._inner)
        return self._inner

    def __exit__(self, *_: object) -> None:
        inner = self._inner
        _frame.reset(self._token)
        inner.merge_into_parent()
        inner.node.prompts.pop(inner.scope, None)


def outside_runs(coro: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
    """Start a task of the runtime from within a run. It does not become a node of the run."""
    context = copy_context()
    context.run(_frame.set, None)
    # Not with `loop.create_task`: its task factory would track this task as code of the run.
    return asyncio.Task(coro, loop=asyncio.get_running_loop(), name=name, context=context)


def name_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Install a task factory that names the tasks of runs. It calls the previous factory of the loop."""
    make = loop.get_task_factory()
    if getattr(make, "names_nodes", False):
        return

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        context: Context | None = options.pop("context", None)
        parent = _frame.get() if context is None else context.get(_frame)
        if parent is not None:
            context = copy_context() if context is None else context
            frame = parent.nodes.frame_of_child(parent, coro)
            context.run(_frame.set, frame)
        if context is not None:
            options["context"] = context
        task: Any = asyncio.Task(coro, loop=loop, **options) if make is None else make(loop, coro, **options)
        if parent is not None:
            frame.node.task = task
            parent.nodes._register(frame)
        return task

    factory.names_nodes = True  # type: ignore[attr-defined]
    loop.set_task_factory(factory)


def _coroutine_name(coro: Any) -> str:
    name: str = getattr(coro, "__qualname__", None) or type(coro).__name__
    return name.rpartition("<locals>.")[2].replace("/", "_")


def _arguments_digest(coro: Any) -> str:
    """A digest of the plain arguments of a coroutine: text, numbers, booleans, None. Empty if there are none.

    It distinguishes equal tasks that are created in no fixed order: `asyncio.as_completed` iterates over a
    set, whose order differs in each process.
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


class CallIdNumbering:
    """Assigns call ids. The calls with the same content are numbered; each number is used once."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}
        self._beyond: dict[str, set[int]] = {}

    def mark_used(self, call_id: str) -> None:
        """Mark an id as used, by a record or by an open call."""
        parts = call_id.rsplit(":", 2)
        if len(parts) == 3:
            self._add(parts[1], int(parts[2]))

    def next_id(self, name: str, content: str) -> str:
        number = self._taken.get(content, 0) + 1
        self._add(content, number)
        return f"{name}:{content}:{number}"

    def _add(self, content: str, number: int) -> None:
        taken = self._taken.get(content, 0)
        if number != taken + 1:
            if number > taken:
                self._beyond.setdefault(content, set()).add(number)
            return
        beyond = self._beyond.get(content)
        while beyond and number + 1 in beyond:
            number += 1
            beyond.discard(number)
        self._taken[content] = number
