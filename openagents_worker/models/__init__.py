"""Models: requests, results and records, as they are sent and stored in JSON."""

from __future__ import annotations

from openagents_worker.models.budget import EXTENDABLE, RunBudget
from openagents_worker.models.child import ChildRequest, SessionIsolation
from openagents_worker.models.chunk import ChunkKind, RunStreamChunk
from openagents_worker.models.decisions import Approval, Decision
from openagents_worker.models.error_details import MAX_MESSAGE_CHARS, ErrorDetails
from openagents_worker.models.fields import MAX_ID_CHARS, Id
from openagents_worker.models.parsing import (
    DEFAULT_MAX_PAYLOAD_BYTES,
    parse_child_request,
    parse_request,
)
from openagents_worker.models.record import RunRecord
from openagents_worker.models.request import MAX_LABELS, RunRequest, instance_of, output_class_of, schema_of
from openagents_worker.models.result import OutputT, RunArtifact, RunResult, run_failed
from openagents_worker.models.states import RunState, StopReason
from openagents_worker.models.usage import RunUsage
from openagents_worker.models.waiting import Waiting, WaitKind
from openagents_worker.printable import header_text

__all__ = [
    "DEFAULT_MAX_PAYLOAD_BYTES",
    "MAX_ID_CHARS",
    "MAX_LABELS",
    "MAX_MESSAGE_CHARS",
    "Approval",
    "ChildRequest",
    "ChunkKind",
    "Decision",
    "ErrorDetails",
    "Id",
    "OutputT",
    "RunArtifact",
    "EXTENDABLE",
    "RunBudget",
    "RunRecord",
    "RunRequest",
    "RunResult",
    "RunState",
    "RunStreamChunk",
    "RunUsage",
    "SessionIsolation",
    "StopReason",
    "WaitKind",
    "Waiting",
    "header_text",
    "instance_of",
    "output_class_of",
    "parse_child_request",
    "parse_request",
    "run_failed",
    "schema_of",
]
