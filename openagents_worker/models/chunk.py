"""The pieces of `RunHandle.stream()`: the events of a run in the form of the original SDK."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field, JsonValue

from openagents_worker.models.base import StoredModel
from openagents_worker.models.result import RunResult

__all__ = ["ChunkKind", "RunStreamChunk"]


class ChunkKind(StrEnum):
    """What a piece of a stream says. The names are those of the original SDK."""

    RUN_STARTED = "run.started"
    LLM_DELTA = "llm.delta"
    LLM_FINISHED = "llm.finished"
    TOOL_STARTED = "tool.started"
    TOOL_DELTA = "tool.delta"
    TOOL_FINISHED = "tool.finished"
    ARTIFACT = "artifact"
    VALIDATION_RETRY = "validation.retry"
    CHECKPOINT_SAVED = "run.checkpoint_saved"
    RESUME_ATTEMPTED = "run.resume_attempted"
    RESUME_SUCCEEDED = "run.resume_succeeded"
    RUN_FINISHED = "run.finished"


class RunStreamChunk(StoredModel):
    """A piece of a stream.

    `sequence` is the number of the last stored event up to here: `stream(after=chunk.sequence)` continues
    after it. `timestamp_ms` is in milliseconds since 1970. `payload` is that of the event; for an `artifact`
    it has the fields of `RunArtifact`. Only the last piece, `run.finished`, has a `result`.
    """

    kind: ChunkKind
    run_id: str
    session_id: str = ""
    agent_id: str = ""
    sequence: int = 0
    timestamp_ms: int = 0
    payload: dict[str, JsonValue] = Field(default_factory=dict)
    result: RunResult[Any] | None = None
