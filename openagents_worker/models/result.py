"""Results. The only place that defines what a run returns, and the error for a run that did not complete."""

from __future__ import annotations

from typing import Any, Generic, cast

from pydantic import Field, JsonValue
from typing_extensions import TypeVar

from openagents_worker.errors import RunCancelled, RunFailed
from openagents_worker.models.base import StoredModel
from openagents_worker.models.error_details import ErrorDetails
from openagents_worker.models.states import StopReason
from openagents_worker.models.usage import RunUsage

__all__ = ["OutputT", "RunArtifact", "RunResult", "run_failed"]

OutputT = TypeVar("OutputT", default=Any)


class RunArtifact(StoredModel):
    """A further output of a run beside its answer: a report, the URL of a picture, a table."""

    name: str
    kind: str = "generic"
    payload: JsonValue = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class RunResult(StoredModel, Generic[OutputT]):
    """The result of a run that has ended. For a failed run, see `stop_reason` and `error_details`.

    `output` is the answer, or raises `RunFailed`. `final_output` is the answer, or None.
    """

    run_id: str
    task_id: str | None = None
    final_output: OutputT | None = None
    stop_reason: StopReason = StopReason.COMPLETED
    usage: RunUsage = Field(default_factory=RunUsage)
    artifacts: list[RunArtifact] = Field(default_factory=list)
    error_details: ErrorDetails | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.stop_reason is StopReason.COMPLETED

    @property
    def output(self) -> OutputT:
        """The answer of a completed run. For any other run it raises `RunFailed` with the error code of the
        run, as `RunHandle.get()` does."""
        if not self.ok:
            raise run_failed(self)
        return cast(OutputT, self.final_output)

    @property
    def finish_reason(self) -> str | None:
        """Why the model ended its answer: `stop`, `length` and so on. None: it is not known."""
        reason = self.metadata.get("finish_reason")
        return reason if isinstance(reason, str) else None


def run_failed(
    result: RunResult[Any], *, agent_id: str | None = None, session_id: str | None = None
) -> RunFailed:
    """The `RunFailed` error for the result of a run that did not complete."""
    details = result.error_details
    cancelled = result.stop_reason is StopReason.CANCELLED
    failed = RunFailed(
        details.message if details else f"the run ended as {result.stop_reason}",
        code=details.code if details else (RunCancelled.code if cancelled else "execution.error"),
        hint=details.hint if details else None,
        result=result.model_dump(mode="json"),
        run_id=result.run_id,
        agent_id=agent_id,
        session_id=session_id,
    )
    return failed.showing(details.traceback if details else None)
