"""The interface of the replay rules. Two implementations follow: replay by content and replay by place.

A run is replayed to its end by the rules under which it began. Its first record names them.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from openagents_worker.runtime.journal import Record

__all__ = [
    "MODEL_KINDS",
    "PREPARE_PART",
    "EXTEND",
    "REMEMBER",
    "STEER",
    "CallQuery",
    "OpenCall",
    "ReplayContradiction",
    "Rules",
    "model_calls_inside",
]

PREPARE_PART = "prepare"
"""The part of a run before its pattern, in runs that are replayed by place."""
REMEMBER = "remember"
"""The part of a run after its pattern, in which the memory stores the turn. It has its own records."""
STEER = "steer"
"""The kind of the call that takes messages for a run. It is made only when there are messages."""
EXTEND = "extend"
"""The kind of the call that waits for an extension of the budget, and takes it."""
MODEL_KINDS = frozenset({"model", "http"})
"""Kinds of calls whose argument is a prompt. It can contain data that is not recorded, such as a date."""


class ReplayContradiction(Exception):
    """The program makes a call that contradicts the journal. The text says which call, and where."""


@dataclass(slots=True, eq=False)
class CallQuery:
    """What is known of a recorded call when it begins: what it does, and where in the program it is made."""

    kind: str
    name: str
    content: str
    core: str
    branch: str
    ordinal: int
    """How many calls of its kind came before it in its branch. It is the same in every attempt."""


def model_calls_inside(query: CallQuery, frame: Any) -> int:
    """How many model calls were made inside this call. `frame` is what `Rules.inside` has returned."""
    own = 1 if query.kind in MODEL_KINDS else 0
    return max(0, getattr(frame, "model_calls", 0) - query.ordinal - own)


@dataclass(slots=True, eq=False)
class OpenCall:
    """An unfinished call of an earlier attempt: calls inside it are recorded, or facts of it are stored."""

    id: str
    kind: str
    node: str
    scope: str
    is_begun: bool = True
    """False for a call that need not be made again: it failed in an earlier life, or it only waits. It is
    continued if the program makes it; it is not a contradiction if the program does not."""
    has_intent: bool = False
    """Whether the call has effects that may have happened."""


class Rules(ABC):
    """Decides which record of the journal answers which recorded call."""

    format: int
    """The record format of runs that began under these rules."""

    @abstractmethod
    def begin(self, part: str = "") -> None:
        """Make the current task the root of a part of the run; '' is the part of the pattern."""

    @abstractmethod
    def end(self) -> None:
        """The current task makes no more calls of the run."""

    @abstractmethod
    def prompt(self, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """The digest of the arguments of a model call, and the digest of its prompt without instructions."""

    @abstractmethod
    def enter(self, kind: str, name: str, digest: str, core: str = "") -> CallQuery:
        """A recorded call begins. Must be called in the task that makes it, before the first await."""

    @abstractmethod
    async def find(self, query: Any) -> Record | None:
        """The record that answers the call; None if the call must be made. Raises `ReplayContradiction`."""

    @abstractmethod
    async def wait_for_turn(self, query: Any, record: Record) -> bool:
        """Wait until the record may answer the call. Returns False if the call must be made again."""

    @abstractmethod
    async def after_stored(self, took_ms: int) -> None:
        """Wait until a new outcome may be returned to the program. `took_ms`: the duration of its call."""

    @abstractmethod
    def records_inside(self, record: Record) -> Sequence[Record]:
        """The records of calls made inside this one. They are replayed together with it."""

    @abstractmethod
    def assign_id(self, query: Any, again: Record | None = None) -> str:
        """The call id for a call that is made now. `again`: the record of its earlier cancellation."""

    def begun_as(self, query: Any, call_id: str) -> str:
        """The id under which an earlier attempt began this call with effects, if it was interrupted."""
        return call_id

    @abstractmethod
    def inside(self, query: Any, call_id: str) -> AbstractContextManager[Any]:
        """A context manager: calls made in its block are made inside this call."""

    @abstractmethod
    def identity(self, query: Any) -> dict[str, Any]:
        """The fields of a record by which `find` finds it in later attempts."""

    @abstractmethod
    def tries_fact(self, query: Any, call_id: str, requests: int = 1) -> str:
        """The name under which the run record counts the retries of this call that sent so many requests."""

    @abstractmethod
    def failed_tries(self, query: Any, call_id: str) -> int:
        """How often this call has failed and was retried later."""

    @abstractmethod
    def requests_sent(self, query: Any, call_id: str) -> int:
        """How many requests the earlier attempts of this call sent to the model."""

    @abstractmethod
    async def unused_records(self, part: str) -> list[str]:
        """The recorded calls, in the parts up to this one, that the program has not made: one text each."""

    @abstractmethod
    def branch(self) -> str:
        """The branch of the program to which the current task belongs."""

    @abstractmethod
    def place_of(self, call_id: str) -> OpenCall:
        """Where the call that is being made was entered, so that a later attempt finds it again."""

    @abstractmethod
    def draw(self) -> str:
        """A text that differs for each draw of the program, and is the same in every attempt."""

    @abstractmethod
    def tasks(self) -> Collection[asyncio.Task[Any]]:
        """The tasks of the program that have not ended, as far as they are known."""

    @abstractmethod
    def is_inside_a_call(self) -> bool:
        """Whether the current code executes inside a recorded call."""

    @abstractmethod
    def next_kind(self) -> str | None:
        """The kind of the next recorded call of the current task; None if all further calls of it are new."""

    @abstractmethod
    def next_name(self, *, recorded: bool = False) -> str | None:
        """The name of the same call. With `recorded`, None for a call that has only begun."""

    def next_position(self) -> int | None:
        """The position of the first record that the current task, or one that it has started, has not asked
        for. None if there is none, and under rules under which no run of a fork begins."""
        return None

    @property
    @abstractmethod
    def is_replay_over(self) -> bool:
        """Whether every record was used: all further calls are new."""

    @property
    @abstractmethod
    def has_unused(self) -> bool:
        """Whether a record was not used, or a call that was begun was not continued."""

    @abstractmethod
    def call_begins(self) -> None:
        """A call is now being made."""

    @abstractmethod
    def call_ended(self) -> None:
        """A call that was being made has ended."""
