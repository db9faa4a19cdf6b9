"""Error snapshots: the only place that says what a failed run leaves to find its error.

The names are those of the original SDK. Values are masked and cut like those of events.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from openagents_worker.errors import OpenAgentsError, RunCancelled, text_of
from openagents_worker.models import MAX_MESSAGE_CHARS
from openagents_worker.redaction import safe_message
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.context import AttemptContext
from openagents_worker.runtime.user_code import user_error_of
from openagents_worker.runtime.writer import RunWriter

__all__ = ["error_snapshot"]


def error_snapshot(
    error: OpenAgentsError | None, context: AttemptContext | None, assembly: Assembly, writer: RunWriter
) -> dict[str, Any] | None:
    """The snapshot of a failed run; None for another ending."""
    if error is None or isinstance(error, RunCancelled):
        return None
    last, preview = assembly.snapshot_last_n, writer.preview
    calls, messages = ([], []) if context is None else (list(context.tool_chain), context.transcript)
    return {
        "run_id": writer.run_id,
        "error_type": type(user_error_of(error) or error).__name__,
        "error_code": error.code,
        "error_message": safe_message(text_of(error), MAX_MESSAGE_CHARS),
        "tool_call_chain": [
            {"tool_id": id_, "params": preview(params)} for id_, params in _last(last, calls)
        ],
        "last_transcript": preview(_last(last, messages)),
        "captured_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def _last(number: int, items: Any) -> list[Any]:
    """The last items. A pattern may have assigned any object as the transcript."""
    return items[-number:] if number and isinstance(items, list) else []
