"""The built-in context assemblers: the whole transcript, or its newest messages.

Their `metadata` has `transcript_size` (number of the session's messages that the run gets), `omitted` (number
of the other messages) and `assembler` (their type). `truncating` adds `strategy`, `omitted_messages`,
`omitted_artifacts` and `token_counter`, as the original SDK does.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from openagents_worker.context.base import (
    ContextAssemblerPlugin,
    ContextAssemblyResult,
    SessionReader,
)
from openagents_worker.models.omissions import omission_note

__all__ = ["DefaultAssembler", "TruncatingAssembler"]


class DefaultAssembler(ContextAssemblerPlugin):
    """The whole transcript and all artifacts of the session."""

    async def assemble(
        self, *, request: Any, session_state: dict[str, Any], session_manager: SessionReader
    ) -> ContextAssemblyResult:
        transcript = await session_manager.load_messages(request.session_id)
        return ContextAssemblyResult(
            transcript=transcript,
            session_artifacts=await session_manager.list_artifacts(request.session_id),
            metadata={"assembler": "default", "transcript_size": len(transcript), "omitted": 0},
        )


class TruncatingAssembler(ContextAssemblerPlugin):
    """The newest messages and artifacts. Only these are read from Redis, however long the session is."""

    class Config(ContextAssemblerPlugin.Config):
        max_messages: int = Field(20, ge=0, description="Number of messages, the newest, that a run sees.")
        max_artifacts: int = Field(10, ge=0, description="Number of artifacts, the newest, that a run sees.")
        include_summary_message: bool = Field(
            True, description="Whether a first message counts the omitted ones."
        )

    async def assemble(
        self, *, request: Any, session_state: dict[str, Any], session_manager: Any
    ) -> ContextAssemblyResult:
        session_id = request.session_id
        messages, artifacts = self.cfg.max_messages, self.cfg.max_artifacts
        transcript = await session_manager.load_messages(session_id, last=messages) if messages else []
        omitted = await session_manager.count_messages(session_id) - len(transcript)
        in_all = await session_manager.count_artifacts(session_id)
        metadata = {
            "assembler": "truncating",
            "strategy": "truncating",
            "token_counter": "none",
            "transcript_size": len(transcript),
            "omitted": omitted,
            "omitted_messages": omitted,
            "omitted_artifacts": max(0, in_all - artifacts),
        }
        if omitted > 0 and self.cfg.include_summary_message:
            note = omission_note(f"Summary: omitted {omitted} older message(s)")
            transcript = [note, *transcript]
        return ContextAssemblyResult(
            transcript=transcript,
            session_artifacts=await session_manager.list_artifacts(session_id, last=artifacts)
            if artifacts
            else [],
            metadata=metadata,
        )
