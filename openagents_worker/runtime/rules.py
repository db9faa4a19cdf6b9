"""The rules of replay as the recorder asks them. Two sets of rules follow: by content, and by place.

A run is replayed to its end by the rules under which it was begun; its first record says which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from openagents_worker.runtime.journal import Record

__all__ = ["REMEMBER", "Question", "ReplayContradiction", "Rules"]

REMEMBER = "remember"
"""The part of a run that comes after its pattern. The pattern's end does not answer for its records."""


class ReplayContradiction(Exception):
    """The program asks for something else than the journal holds; the text says what and where."""


@dataclass(slots=True, eq=False)
class Question:
    """A call at its entry: what it asks, and from where."""

    kind: str
    name: str
    content: str
    core: str
    branch: str
    ordinal: int
    """How many calls of its kind came before it: the same on every attempt."""


class Rules(ABC):
    """Which recorded call answers which."""

    format: int
    """The format of the runs that are begun under these rules."""

    @abstractmethod
    def begin(self, part: str = "") -> None:
        """The task that runs now makes the calls of a part of the run; '' is the pattern's."""

    @abstractmethod
    def end(self) -> None:
        """The task that runs now makes no more of the run's calls."""

    @abstractmethod
    def prompt(self, given: Mapping[str, Any]) -> tuple[str, str]:
        """The digest of a model call's arguments, and that of the part that the program itself wrote."""

    @abstractmethod
    def enter(self, kind: str, name: str, digest: str, core: str = "") -> Question:
        """A call begins. To be called in the task that makes it, before it waits for anything."""

    @abstractmethod
    async def find(self, question: Any) -> Record | None:
        """The record that answers the call; None when it is to be made. Raises `ReplayContradiction`."""

    @abstractmethod
    async def wait_for_turn(self, question: Any, record: Record) -> bool:
        """Returns when the record may be answered with; False when the call is to be made again."""

    @abstractmethod
    async def after_stored(self, took_ms: int) -> None:
        """Returns when an answer that has just been stored may be given to the program."""

    @abstractmethod
    def records_inside(self, record: Record) -> Sequence[Record]:
        """The records of calls made inside this one: they are read with it."""

    @abstractmethod
    def claim_id(self, question: Any, again: Record | None = None) -> str:
        """The id of a call that is to be made; `again` is the record of its cancellation."""

    @abstractmethod
    def inside(self, question: Any, call_id: str) -> AbstractContextManager[Any]:
        """Calls made in here are made inside this call."""

    @abstractmethod
    def identity(self, question: Any) -> dict[str, Any]:
        """What a record of this call holds, so that it is found again."""

    @abstractmethod
    def tries_fact(self, question: Any, call_id: str) -> str:
        """Under which name the run's record counts how often this call has failed and was put off."""

    @abstractmethod
    def failed_tries(self, question: Any, call_id: str) -> int:
        """How often this call has failed and was put off."""

    @abstractmethod
    async def unused_records(self, part: str) -> list[str]:
        """What is recorded in the parts up to this one and was not asked for, in words."""

    @abstractmethod
    def branch(self) -> str:
        """The branch of the program that runs now."""

    @abstractmethod
    def is_inside_a_call(self) -> bool:
        """Whether what runs now runs inside a recorded call."""

    @property
    @abstractmethod
    def is_replayed(self) -> bool:
        """Whether every record has been answered: from here on everything is new."""

    @abstractmethod
    def call_begins(self) -> None:
        """A call is being made."""

    @abstractmethod
    def call_ended(self) -> None:
        """A call that was being made has ended."""
