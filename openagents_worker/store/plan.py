"""Plans: the only place that defines how one sequence of Redis operations serves sync and async callers.

A plan is a generator. It yields the operations that it needs, receives their answers, and returns its result.
It does no I/O, so it is written once: `Store.execute` and `AsyncStore.execute` execute the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from openagents_worker.store.codec import PLAIN, PayloadCodec

__all__ = ["CODEC", "Commands", "Emit", "EmitNext", "OnDisk", "Plan", "PlanSteps", "pipelined"]

T = TypeVar("T")
Plan = Generator[Any, Any, T]
"""The generator yields script calls (`ScriptCall`, `OnDisk`), reads as for `Store.ask`, and `Commands`.

Inside of the store it also yields single commands as tuples, whose exceptions are those of redis-py.
"""
CODEC = object()
"""A step of a plan whose answer is the codec of the cell."""


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A step of a plan: a script call whose writes must be on disk (`Store.run_on_disk`)."""

    call: Any


@dataclass(frozen=True, slots=True)
class Commands:
    """A step of a plan: commands that are sent once, together, on one connection.

    The answer has one item for each command, which may be an exception of redis-py.
    """

    commands: Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Emit:
    """A step of a plan for `Store.stream`: these items are for the caller. They are consumed one by one."""

    items: Iterable[Any]


class EmitNext:
    """A step of a plan for `Store.stream`, which is executed again as long as its answer has items.

    The answer is a sequence of items for the caller. The plan continues after an empty answer or an error.
    """

    __slots__ = ()


def pipelined(commands: Commands) -> Callable[[Any], Any]:
    """The function for `Store.use` that sends these commands with the redis-py client, sync or async."""

    def work(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for command in commands.commands:
            pipeline.execute_command(*command)
        return pipeline.execute(raise_on_error=False)

    return work


class PlanSteps(Generic[T]):
    """The steps of a plan, for the loop that executes them.

    Each pass sets `answer` inside of `with`: an exception in this block is raised in the plan, where the step
    was yielded. After each step, `items` are those for the caller of `Store.stream`. After the last step,
    `result` is the result of the plan.

    >>> def plan() -> Plan[str]:
    ...     answer = yield "question"
    ...     return f"the answer is {answer}"
    >>> steps = PlanSteps(plan())
    >>> for step in steps:
    ...     with steps:
    ...         steps.answer = len(step)
    >>> steps.result
    'the answer is 8'
    """

    result: T

    def __init__(self, plan: Plan[T], codec: PayloadCodec = PLAIN) -> None:
        self.answer: Any = None
        self._plan = plan
        self._codec = codec
        self._error: Exception | None = None
        self._step: Any = None

    def __iter__(self) -> PlanSteps[T]:
        return self

    @property
    def items(self) -> Iterable[Any]:
        """The items that the current step has for the caller."""
        step = self._step
        if isinstance(step, EmitNext):
            return self.answer or ()
        return step.items if isinstance(step, Emit) else ()

    def __next__(self) -> Any:
        if self.answer and isinstance(self._step, EmitNext):
            return self._step
        error, self._error = self._error, None
        try:
            step = self._plan.send(self.answer) if error is None else self._plan.throw(error)
            while step is CODEC:
                step = self._plan.send(self._codec)
            self._step = step
            return step
        except StopIteration as done:
            self.result = done.value
            raise
        finally:
            del error  # it refers to this frame if the plan raises it: no reference cycle

    def __enter__(self) -> None:
        self.answer = None

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self._error = error
            return True
        return False
