"""How a run ends: its result, its terminal event and what it writes into its session."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from openagents_worker.errors import (
    BudgetExhausted,
    MaxStepsExceeded,
    OpenAgentsError,
    PatternError,
    RunCancelled,
    StepTimeoutError,
    StepTooLarge,
)
from openagents_worker.models import (
    ErrorDetails,
    RunArtifact,
    RunRequest,
    RunResult,
    RunUsage,
    StopReason,
    dumps,
)
from openagents_worker.redaction import DEFAULT_REDACT_KEYS, redact
from openagents_worker.runtime.state import changed_keys

__all__ = ["Ending", "checked_output", "stop_reason_of", "translated"]


def translated(error: Exception) -> OpenAgentsError:
    """Any exception of a pattern as a coded error; its cause is kept."""
    if isinstance(error, OpenAgentsError):
        return error
    wrapped = PatternError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def stop_reason_of(error: OpenAgentsError) -> StopReason:
    """Why a run that met this error ended."""
    match error:
        case RunCancelled():
            return StopReason.CANCELLED
        case MaxStepsExceeded():
            return StopReason.MAX_STEPS
        case BudgetExhausted():
            return StopReason.BUDGET_EXHAUSTED
        case StepTimeoutError():
            return StopReason.TIMEOUT
    return StopReason.TIMEOUT if isinstance(error.__cause__, TimeoutError) else StopReason.FAILED


def checked_output(output: Any, max_bytes: int) -> Any:
    """The output as plain JSON. Raises `StepTooLarge` for what is not JSON or larger than allowed."""
    if isinstance(output, BaseModel):
        output = output.model_dump(mode="json")
    try:
        size = len(dumps(output).encode())
    except (TypeError, ValueError) as error:
        raise StepTooLarge(
            f"the run's output is not JSON: {error}", hint="return plain JSON values"
        ) from error
    if size > max_bytes:
        raise StepTooLarge(f"the run's output has {size:,} bytes, {max_bytes:,} are allowed")
    return output


@dataclass(frozen=True, slots=True)
class Ending:
    """One ending of a run. `error` is None when it completed."""

    request: RunRequest
    usage: RunUsage
    artifacts: list[RunArtifact]
    duration_ms: int
    output: Any = None
    error: OpenAgentsError | None = None
    redact_keys: Collection[str] = DEFAULT_REDACT_KEYS

    @property
    def stop_reason(self) -> StopReason:
        return StopReason.COMPLETED if self.error is None else stop_reason_of(self.error)

    @property
    def details(self) -> ErrorDetails | None:
        return None if self.error is None else ErrorDetails.from_exception(self.error)

    @property
    def state(self) -> str:
        match self.stop_reason:
            case StopReason.COMPLETED:
                return "completed"
            case StopReason.CANCELLED:
                return "cancelled"
            case _:
                return "failed"

    def result(self) -> RunResult[Any]:
        return RunResult(
            run_id=self.request.run_id,
            final_output=self.output,
            stop_reason=self.stop_reason,
            usage=self.usage,
            artifacts=self.artifacts,
            error_details=self.details,
            metadata={"agent_id": self.request.agent_id, "session_id": self.request.session_id},
        )

    def arguments(self, state_before: Mapping[str, str], state: Mapping[str, Any]) -> dict[str, Any]:
        """What the script `finish` is given. Only a completed run changes its session's state."""
        completed = self.error is None
        written, removed = changed_keys(state_before, state) if completed else ([], [])
        return {
            "end_state": self.state,
            "result": self.result().model_dump_json(),
            "event": f"run.{self.state}",
            "payload": dumps(redact(self._terminal_payload(), self.redact_keys)),
            "completed": dumps(
                {**self._ids(), "stop_reason": self.stop_reason, "duration_ms": self.duration_ms}
            ),
            "transcript": [dumps(message) for message in self._messages()],
            "artifacts": [artifact.model_dump_json() for artifact in self.artifacts] if completed else [],
            "state": written,
            "state_removed": removed,
            "usage": self.usage.model_dump_json(),
        }

    def _ids(self) -> dict[str, str]:
        return {
            "agent_id": self.request.agent_id,
            "session_id": self.request.session_id,
            "run_id": self.request.run_id,
        }

    def _terminal_payload(self) -> dict[str, Any]:
        if self.error is None:
            return {**self._ids(), "result": self.output}
        if self.state == "cancelled":
            return {**self._ids(), "reason": self.error.message}
        details = self.details
        assert details is not None
        return {
            **self._ids(),
            "error": str(self.error),
            "error_details": details.model_dump(exclude_none=True),
        }

    def _messages(self) -> list[dict[str, Any]]:
        """The two messages a run leaves in the transcript; a cancelled run leaves none."""
        if self.state == "cancelled":
            return []
        ids = {"run_id": self.request.run_id, "agent_id": self.request.agent_id}
        failed = self.error is not None
        answer = (
            str(self.error) if failed else self.output if isinstance(self.output, str) else dumps(self.output)
        )
        return [
            {"role": "user", "content": self.request.input_text, **ids},
            {
                "role": "assistant",
                "content": answer,
                **ids,
                "stop_reason": self.stop_reason,
                "is_error": failed,
            },
        ]
