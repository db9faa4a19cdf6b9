"""The contract of a context assembler: it selects the part of a session that a run gets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from openagents_worker.agents.plugin import Plugin

__all__ = [
    "ContextAssemblerPlugin",
    "ContextAssemblyResult",
    "Selection",
    "SessionReader",
    "StoredTurn",
    "TurnReader",
]


class StoredTurn(NamedTuple):
    """A part of a transcript that must not be divided: a question with its tool calls and its answer.

    `begin` and `end` are its positions in the stored transcript, `end` excluded. `entries` are its messages,
    oldest first; none if later runs do not use them (an answer without a question, a blank message).
    """

    begin: int
    end: int
    entries: list[dict[str, Any]]


class SessionReader(Protocol):
    """Reads a session as it was when the run began.

    Messages and artifacts are ordered oldest first; `last` limits them to the newest. If the oldest messages
    have been replaced by a summary, the summary stands in their place.
    """

    async def load_messages(self, session_id: str, *, last: int | None = None) -> list[dict[str, Any]]:
        """The messages of the transcript. `last`: only that many, the newest."""
        ...

    async def list_artifacts(self, session_id: str, *, last: int | None = None) -> list[Any]:
        """The artifacts. `last`: only that many, the newest."""
        ...

    async def count_messages(self, session_id: str) -> int:
        """The number of messages in the transcript."""
        ...


class TurnReader(SessionReader, Protocol):
    """What the built-in assemblers read besides: turns in both directions, page by page."""

    @property
    def summary(self) -> list[dict[str, Any]]:
        """The messages that stand for the oldest turns; empty if no turns have been replaced."""
        ...

    @property
    def bounds(self) -> tuple[int, int]:
        """The positions of the first turn behind the summary, and of the end of the transcript."""
        ...

    def newest_turns(self, session_id: str) -> AsyncIterator[StoredTurn]:
        """The turns behind the summary, newest first. Reads no more pages than are consumed."""
        ...

    def oldest_turns(self, session_id: str) -> AsyncIterator[StoredTurn]:
        """The same turns, oldest first."""
        ...

    async def load_range(self, session_id: str, begin: int, end: int) -> list[dict[str, Any]]:
        """The usable messages between two positions."""
        ...

    async def count_artifacts(self, session_id: str) -> int: ...


class Selection(BaseModel):
    """Which stored messages a run gets. Recorded with its start, so that every attempt gets the same ones."""

    model_config = ConfigDict(frozen=True)

    ranges: tuple[tuple[int, int], ...] = ()
    """Positions in the stored transcript, ascending, the ends excluded."""
    metadata: Mapping[str, Any] = Field(default_factory=dict)
    """For `assembly_metadata`, see `context.budget`."""
    summarize: tuple[int, int] | None = None
    """The positions of the messages that a summary shall replace. None: no summary is due."""
    with_summary: tuple[tuple[int, int], ...] = ()
    """The `ranges` of a run for which this summary was written."""


class ContextAssemblyResult(BaseModel):
    """The transcript and the artifacts with which a run starts."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    transcript: list[dict[str, Any]] = Field(default_factory=list)
    session_artifacts: list[Any] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)


class ContextAssemblerPlugin(Plugin):
    """Base class of context assemblers. It is optional: a class with `assemble` works too."""

    counts_tokens: ClassVar[bool] = False
    """Whether the assembler selects by tokens. The library gives it a counter for the model of its agent."""

    async def assemble(
        self, *, request: Any, session_state: dict[str, Any], session_manager: SessionReader
    ) -> ContextAssemblyResult:
        """Select the messages and artifacts with which the run starts. The base class selects none."""
        return ContextAssemblyResult()

    async def compact(
        self, *, request: Any, session_state: dict[str, Any], session_manager: SessionReader
    ) -> None:
        """Shorten `session_state`, before `assemble`. If it fails, the run continues."""

    async def finalize(
        self, *, request: Any, session_state: dict[str, Any], session_manager: SessionReader, result: Any
    ) -> Any:
        """Never called. It exists because assemblers of the original SDK call it with `super()`."""
        return result
