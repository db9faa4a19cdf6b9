"""The ending of a run: its result, its terminal event and what it writes to its session."""

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
from openagents_worker.llm.transcript import interrupted_entries, turn_entries
from openagents_worker.models import (
    MAX_MESSAGE_CHARS,
    ErrorDetails,
    RunArtifact,
    RunRequest,
    RunResult,
    RunUsage,
    StopReason,
)
from openagents_worker.models.usage import NO_USAGE
from openagents_worker.quick_init import quick_init
from openagents_worker.redaction import DEFAULT_REDACT_KEYS, safe_message, shown_json
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.state import changed_keys, stored_texts
from openagents_worker.runtime.storable import artifact_name, sized_part, stored_artifact
from openagents_worker.runtime.user_code import described
from openagents_worker.store.scripts import Claimed
from openagents_worker.store.sessions import TranscriptSummary

__all__ = [
    "Ending",
    "StoredEnding",
    "artifact_list",
    "checked_output",
    "ending_error",
    "stop_reason_of",
    "usage_so_far",
]

# A Redis value can have 512 MB, but Redis serves no other client while it stores it.
LARGEST_ENDING_BYTES = 64 * 1024 * 1024

Unstorable = (StepTooDeep, StepTooLarge)


def stop_reason_of(error: OpenAgentsError) -> StopReason:
    """The stop reason of a run that ended with this error."""
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


def ending_error(verdict: OpenAgentsError | None, error: OpenAgentsError) -> OpenAgentsError:
    """The error with which a run ends: the verdict of its recorder if there is one, else `error`.

    `error` becomes the cause of the verdict, unless one of them has the other as its cause.
    """
    if verdict is None or verdict is error:
        return error
    if verdict.__cause__ is None and error.__cause__ is not verdict:
        verdict.__cause__ = error
    return verdict


def checked_output(output: Any, max_bytes: int) -> Any:
    """The output as it is stored. Raises `StepTooDeep`, or `StepTooLarge` if it is too large or not JSON."""
    if isinstance(output, BaseModel):
        output = output.model_dump(mode="json")
    return sized_part("the run's output", output, max_bytes)[0]


@quick_init
@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ends. `error` is None if it completed."""

    request: RunRequest
    usage: RunUsage
    artifacts: list[RunArtifact]
    duration_ms: int
    output: Any = None
    error: OpenAgentsError | None = None
    turn_messages: Any = ()
    finish_reason: str | None = None
    """The messages of the pattern between question and answer, for the transcript."""
    transferred: RunResult[Any] | None = None
    """The result of the agent to which the run was transferred: its stop reason is that of this run."""
    redact_keys: Collection[str] = DEFAULT_REDACT_KEYS
    not_stored: list[str] = field(default_factory=list)
    """Why parts of the run were left out: one message for each part that cannot be stored."""
    summary: TranscriptSummary | None = None
    """The summary that was written for the run. Stored if the run completes."""
    error_snapshot: dict[str, Any] | None = None
    """What a failed run leaves to find its error; see `openagents_worker.runtime.error_snapshot`."""
    in_children: RunUsage = field(default_factory=lambda: NO_USAGE)
    """What children have used so far whose results the run has not recorded. It counts in the result only:
    the next life of the run may get these results."""
    is_bare: bool = False
    """Whether nothing is written to the session."""
    is_interrupted: bool = False
    """Whether another run has interrupted this one, so that the session gets the turn so far."""
    stop_reason: StopReason = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_reason", self._find_stop_reason())

    def _find_stop_reason(self) -> StopReason:
        if self.error is None:
            return StopReason.COMPLETED
        details = None if self.transferred is None else self.transferred.error_details
        if self.transferred is not None and details is not None and self.error.code == details.code:
            return self.transferred.stop_reason
        return stop_reason_of(self.error)

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

    @property
    def _usage_in_all(self) -> RunUsage:
        return self.usage.plus(self.in_children)

    def result(self) -> RunResult[Any]:
        ids: dict[str, Any] = {"agent_id": self.request.agent_id, "session_id": self.request.session_id}
        return RunResult(
            run_id=self.request.run_id,
            final_output=self.output,
            stop_reason=self.stop_reason,
            usage=self._usage_in_all,
            artifacts=self.artifacts,
            error_details=self.details,
            metadata=ids
            | ({"not_stored": self.not_stored} if self.not_stored else {})
            | ({"finish_reason": self.finish_reason} if self.finish_reason else {})
            | ({"handoff_from": self.transferred.run_id} if self.transferred is not None else {})
            | ({"error_snapshot": self.error_snapshot} if self.error_snapshot and not self.is_bare else {}),
        )

    def stored(self, state_before: Mapping[str, str], state: Mapping[str, Any]) -> StoredEnding:
        """The ending in a form that can be written, with the arguments of the script `finish`.

        If a part of a completed run cannot be stored, the run fails with an error that names the part. A
        failed or cancelled run keeps its error, and loses the artifacts that cannot be stored.
        """
        try:
            storable, problems = self._storable_artifacts()
            whole = self
            if self.artifacts or self.not_stored:
                whole = replace(self, artifacts=storable, not_stored=[each.message for each in problems])
            texts: dict[str, str] = {}
            if self.error is None:
                try:
                    whole, texts = whole._completed(problems, state_before, state)
                except Unstorable as problem:
                    whole = replace(whole, output=None, error=problem)
            return StoredEnding(whole, whole._arguments(state_before, texts))
        except Exception as error:  # noqa: BLE001 - an object of a plugin can raise anything
            return self.bare(f"the run's end cannot be stored: {described(error)}")

    def bare(self, problem: str) -> StoredEnding:
        """A failed ending with only ids, usage and an error. It can always be stored."""
        error = StepTooLarge(problem, hint="see the worker's log", run_id=self.request.run_id)
        bare = replace(self, artifacts=[], output=None, error=error, not_stored=["everything"], is_bare=True)
        return StoredEnding(bare, bare._arguments({}, {}))

    def _completed(
        self, problems: Sequence[OpenAgentsError], state_before: Mapping[str, str], state: Mapping[str, Any]
    ) -> tuple[Ending, dict[str, str]]:
        """The ending of a completed run, and its state as JSON by key.

        Raises `StepTooDeep` or `StepTooLarge` if a part cannot be stored.
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
        _check_total_size(sizes)
        return self if output is self.output else replace(self, output=output), texts

    def _storable_artifacts(self) -> tuple[list[RunArtifact], list[OpenAgentsError]]:
        storable: list[RunArtifact] = []
        problems: list[OpenAgentsError] = []
        for artifact in self.artifacts:
            try:
                storable.append(RunArtifact.model_validate(stored_artifact(artifact)))
            except Unstorable as error:
                problems.append(error)
            except Exception as error:  # noqa: BLE001 - a pattern may have appended any object
                problems.append(
                    StepTooLarge(f"artifact {artifact_name(artifact)!r} is not JSON: {described(error)}")
                )
        if self.error is not None and sum(map(_bytes_of, storable)) > LARGEST_ENDING_BYTES:
            return [], [*problems, StepTooLarge("the artifacts are too large to be stored together")]
        return storable, problems

    def _arguments(self, state_before: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, Any]:
        """The arguments of the script `finish`. `texts`: the new session state, JSON by key."""
        completed, state = self.error is None, self.state
        written, removed = changed_keys(state_before, texts) if completed else ([], [])
        arguments: dict[str, Any] = {
            "end_state": state,
            "stop_reason": self.stop_reason.value,
            "code": "" if self.error is None else self.error.code,
            "result": self.result().model_dump_json(),
            "event": f"run.{state}",
            "payload": shown_json(self._terminal_payload(), self.redact_keys),
            "completed": dumps(
                {**self._ids(), "stop_reason": self.stop_reason, "duration_ms": self.duration_ms}
            ),
            "transcript": [dumps(message) for message in self._messages()],
            "artifacts": [artifact.model_dump_json() for artifact in self.artifacts] if completed else [],
            "state": written,
            "state_removed": removed,
            "usage": self.usage.model_dump_json(),
            "usage_in_all": self._usage_in_all.model_dump_json() if self.in_children != NO_USAGE else "",
        }
        if completed and self.summary is not None:
            arguments |= {
                "epoch": self.summary.epoch,
                "compacted": self.summary.messages,
                "compaction": self.summary.to_json(),
            }
        _check_utf8(arguments)
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
        """The messages that the run appends to the transcript: its turn, or none."""
        ids = {"run_id": self.request.run_id, "agent_id": self.request.agent_id}
        if self.transferred is not None:
            ids["handoff_from"] = self.transferred.run_id
        if self.is_interrupted and self.state == "cancelled" and not self.is_bare:
            return interrupted_entries(self.request.input_text, ids, tool_messages=self.turn_messages)
        if self.error is not None or self.is_bare:
            return []
        return turn_entries(
            self.request.input_text,
            self.output,
            ids,
            stop_reason=self.stop_reason,
            tool_messages=self.turn_messages,
        )


@quick_init
@dataclass(frozen=True, slots=True)
class StoredEnding:
    """An ending with the arguments of the script that writes it."""

    ending: Ending
    arguments: dict[str, Any]


def _check_total_size(sizes: Mapping[str, int]) -> None:
    """Raises `StepTooLarge` if the ending is too large. The error names its largest part."""
    if (size := sum(sizes.values())) > LARGEST_ENDING_BYTES:
        largest = max(sizes, key=lambda part: sizes[part])
        raise StepTooLarge(
            f"output, state and artifacts have {size:,} bytes, {LARGEST_ENDING_BYTES:,} are allowed; "
            f"the largest part is {largest} with {sizes[largest]:,}",
            hint="store a reference to the data",
        )


def _bytes_of(artifact: RunArtifact) -> int:
    return size_of(dict(artifact))


def _check_utf8(arguments: Mapping[str, Any]) -> None:
    """Raises UnicodeEncodeError for text that cannot be sent to Redis: a lone surrogate."""
    for value in arguments.values():
        for text in (value,) if isinstance(value, str) else () if isinstance(value, int) else value:
            if not text.isascii():
                text.encode()


def usage_so_far(claimed: Claimed, recorder: Recorder | None) -> RunUsage:
    """The usage of the run until now, or until its last attempt if this one has not read the journal."""
    if recorder is not None:
        return recorder.metrics.added_to(recorder.checkpoints.total_usage)
    try:
        return RunUsage.model_validate_json(claimed.usage) if claimed.usage else RunUsage()
    except ValueError:  # unreadable usage must not prevent the run from ending
        return RunUsage()


def artifact_list(artifacts: Any) -> list[Any]:
    """The artifacts of the context as a list. A pattern may have assigned any object instead."""
    return list(artifacts) if isinstance(artifacts, list | tuple) else [artifacts]
