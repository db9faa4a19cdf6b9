"""The contract of a context assembler: it selects the part of a session that a run gets."""

from __future__ import annotations

from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from openagents_worker.agents.plugin import Plugin

__all__ = ["ContextAssemblerPlugin", "ContextAssemblyResult", "SessionReader"]


class SessionReader(Protocol):
    """Reads a session: messages oldest first, artifacts oldest first. `last` limits them to the newest."""

    async def load_messages(self, session_id: str, *, last: int | None = None) -> list[dict[str, Any]]:
        """The messages of the transcript, oldest first. `last`: only that many, the newest."""
        ...

    async def list_artifacts(self, session_id: str, *, last: int | None = None) -> list[Any]:
        """The artifacts, oldest first. `last`: only that many, the newest."""
        ...

    async def count_messages(self, session_id: str) -> int:
        """The number of messages in the transcript."""
        ...


class ContextAssemblyResult(BaseModel):
    """The transcript and the artifacts with which a run starts."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    transcript: list[dict[str, Any]] = Field(default_factory=list)
    session_artifacts: list[Any] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)


class ContextAssemblerPlugin(Plugin):
    """Base class of context assemblers. It is optional: a class with `assemble` and `finalize` works too."""

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
        return result
