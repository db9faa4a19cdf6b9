"""How a run ends: its result, its terminal event and what it writes into its session."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, assert_never

from pydantic import BaseModel

from openagents_worker.errors import (
    BudgetExhausted,
    MaxStepsExceeded,
    OpenAgentsError,
    RunCancelled,
    StepTimeoutError,
    StepTooDeep,
    StepTooLarge,
    text_of,
)
from openagents_worker.jsontext import dumps, size_of
from openagents_worker.llm.transcript import turn_entries
from openagents_worker.models import (
    MAX_MESSAGE_CHARS,
    ErrorDetails,
    RunArtifact,
    RunRequest,
    RunResult,
    RunUsage,
    StopReason,
)
from openagents_worker.redaction import DEFAULT_REDACT_KEYS, safe_message, shown_json
from openagents_worker.runtime.state import changed_keys, stored_texts
from openagents_worker.runtime.storable import artifact_name, sized_part, stored_artifact
from openagents_worker.runtime.user_code import described

__all__ = ["Ending", "StoredEnding", "checked_output", "stop_reason_of"]

# Redis takes 512 MB in one value, and its one thread serves nobody else while it stores an ending.
LARGEST_ENDING_BYTES = 64 * 1024 * 1024

Unstorable = (StepTooDeep, StepTooLarge)


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
    """The output as it is stored. Raises `StepTooDeep`, or `StepTooLarge` for what is not JSON or larger than
    allowed."""
    if isinstance(output, BaseModel):
        output = output.model_dump(mode="json")
    return sized_part("the run's output", output, max_bytes)[0]


@dataclass(frozen=True, slots=True)
class Ending:
    """One ending of a run. `error` is None when it completed."""

    request: RunRequest
    usage: RunUsage
    artifacts: list[RunArtifact]
    duration_ms: int
    output: Any = None
    error: OpenAgentsError | None = None
    turn_messages: Any = ()
    """The messages between question and answer, as the pattern says."""
    redact_keys: Collection[str] = DEFAULT_REDACT_KEYS
    not_stored: list[str] = field(default_factory=list)
    """What of the run was left out because it cannot be stored."""
    is_bare: bool = False
    """Nothing of it goes into the session."""

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
            case StopReason.FAILED | StopReason.TIMEOUT | StopReason.MAX_STEPS | StopReason.BUDGET_EXHAUSTED:
                return "failed"
            case _:
                assert_never(self.stop_reason)

    def result(self) -> RunResult[Any]:
        ids: dict[str, Any] = {"agent_id": self.request.agent_id, "session_id": self.request.session_id}
        return RunResult(
            run_id=self.request.run_id,
            final_output=self.output,
            stop_reason=self.stop_reason,
            usage=self.usage,
            artifacts=self.artifacts,
            error_details=self.details,
            metadata=ids | ({"not_stored": self.not_stored} if self.not_stored else {}),
        )

    def stored(self, state_before: Mapping[str, str], state: Mapping[str, Any]) -> StoredEnding:
        """What is written of this ending: all of it, or one in its place that can be written.

        Where a part of a completed run cannot be stored, the run has failed, and its error names the part. A
        run that has failed or was cancelled keeps its error, and loses artifacts that cannot be stored.
        """
        try:
            kept, problems = self._storable_artifacts()
            whole = replace(self, artifacts=kept, not_stored=[each.message for each in problems])
            texts: dict[str, str] = {}
            if self.error is None:
                try:
                    whole, texts = whole._completed(problems, state_before, state)
                except Unstorable as problem:
                    whole = replace(whole, output=None, error=problem)
            return StoredEnding(whole, whole._arguments(state_before, texts))
        except Exception as error:  # noqa: BLE001 - a plugin's object can raise anything where it is looked at
            return self.bare(f"the run's end cannot be stored: {described(error)}")

    def bare(self, problem: str) -> StoredEnding:
        """An ending with nothing in it but ids, what was used and an error: it can be stored always."""
        error = StepTooLarge(problem, hint="see the worker's log", run_id=self.request.run_id)
        bare = replace(self, artifacts=[], output=None, error=error, not_stored=["everything"], is_bare=True)
        return StoredEnding(bare, bare._arguments({}, {}))

    def _completed(
        self, problems: Sequence[OpenAgentsError], state_before: Mapping[str, str], state: Mapping[str, Any]
    ) -> tuple[Ending, dict[str, str]]:
        """The ending of a run that completed, with its state as JSON by key.

        Raises `StepTooDeep` or `StepTooLarge` when it cannot be stored as completed.
        """
        for problem in problems:
            raise problem
        output, size = sized_part("the run's output", self.output, LARGEST_ENDING_BYTES)
        texts, sizes = {}, {"the run's output": size}
        for key, text in stored_texts(state_before, state):
            texts[key] = text
            sizes[f"state key {key!r}"] = len(text.encode())
        for artifact in self.artifacts:
            what = f"artifact {artifact.name!r}"
            sizes[what] = sizes.get(what, 0) + _bytes_of(artifact)
        _check_whole(sizes)
        return replace(self, output=output), texts

    def _storable_artifacts(self) -> tuple[list[RunArtifact], list[OpenAgentsError]]:
        kept: list[RunArtifact] = []
        problems: list[OpenAgentsError] = []
        for artifact in self.artifacts:
            try:
                kept.append(RunArtifact.model_validate(stored_artifact(artifact)))
            except Unstorable as error:
                problems.append(error)
            except Exception as error:  # noqa: BLE001 - it is no artifact, whatever it is
                problems.append(
                    StepTooLarge(f"artifact {artifact_name(artifact)!r} is not JSON: {described(error)}")
                )
        if self.error is not None and sum(map(_bytes_of, kept)) > LARGEST_ENDING_BYTES:
            return [], [*problems, StepTooLarge("the artifacts are too large to be stored together")]
        return kept, problems

    def _arguments(self, state_before: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, Any]:
        """What the script `finish` is given. Only a completed run changes its session's state: `texts`."""
        completed = self.error is None
        written, removed = changed_keys(state_before, texts) if completed else ([], [])
        arguments = {
            "end_state": self.state,
            "result": self.result().model_dump_json(),
            "event": f"run.{self.state}",
            "payload": shown_json(self._terminal_payload(), self.redact_keys),
            "completed": dumps(
                {**self._ids(), "stop_reason": self.stop_reason, "duration_ms": self.duration_ms}
            ),
            "transcript": [dumps(message) for message in self._messages()],
            "artifacts": [artifact.model_dump_json() for artifact in self.artifacts] if completed else [],
            "state": written,
            "state_removed": removed,
            "usage": self.usage.model_dump_json(),
        }
        _see_that_it_is_utf8(arguments)
        return arguments

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
            "error": safe_message(text_of(self.error), MAX_MESSAGE_CHARS),
            "error_details": details.model_dump(exclude_none=True),
        }

    def _messages(self) -> list[dict[str, Any]]:
        """What the run leaves in the transcript: its turn, or nothing."""
        if self.error is not None or self.is_bare:
            return []
        ids = {"run_id": self.request.run_id, "agent_id": self.request.agent_id}
        return turn_entries(
            self.request.input_text,
            self.output,
            ids,
            stop_reason=self.stop_reason,
            tool_messages=self.turn_messages,
        )


@dataclass(frozen=True, slots=True)
class StoredEnding:
    """An ending with the arguments of the script that writes it."""

    ending: Ending
    arguments: dict[str, Any]


def _check_whole(sizes: Mapping[str, int]) -> None:
    """Raises `StepTooLarge` that names the largest part of an ending that is too large as a whole."""
    if (size := sum(sizes.values())) > LARGEST_ENDING_BYTES:
        largest = max(sizes, key=lambda part: sizes[part])
        raise StepTooLarge(
            f"what the run leaves has {size:,} bytes, {LARGEST_ENDING_BYTES:,} are allowed; "
            f"most of it is {largest} with {sizes[largest]:,}",
            hint="leave a reference to where the whole is",
        )


def _bytes_of(artifact: RunArtifact) -> int:
    return size_of(dict(artifact))


def _see_that_it_is_utf8(arguments: Mapping[str, Any]) -> None:
    """Raises UnicodeEncodeError for text that Redis cannot be sent: half of a surrogate pair."""
    for value in arguments.values():
        for text in [value] if isinstance(value, str) else value:
            text.encode()
