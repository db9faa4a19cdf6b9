"""Resumptions. The only place that decides whether a failed or cancelled run may start another life."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from openagents_worker.arguments import text_of_caller
from openagents_worker.errors import ConfigError, RunConflict
from openagents_worker.models import RunRecord, RunRequest, parse_request
from openagents_worker.redaction import shown_reason
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.records import run_not_found
from openagents_worker.store.scripts import ResumeAnswer, Resumed, ScriptCall
from openagents_worker.submission.accepted import Accepted, accepted_as, error_of

__all__ = ["Resumption"]


@dataclass(frozen=True, slots=True)
class Resumption:
    """The resumption of a failed or cancelled run. `request` names its last checkpoint.

    The task options in `canvas` replace the ones of the run. `by` names the user for the event.
    """

    request: RunRequest
    canvas: str = ""
    by: str = ""

    @classmethod
    def of(cls, run: RunRecord, settings: Settings, by: str) -> Resumption:
        """The resumption of a stored run. Raises `RequestInvalid`."""
        text_of_caller("by", by)
        fields = {
            "agent_id": run.agent_id,
            "session_id": run.session_id,
            "input_text": "",
            "resume_from_checkpoint": f"{run.run_id}:step:{run.steps}",
        }
        return cls(parse_request(fields, max_bytes=settings.max_payload_bytes), by=by)

    def call(self) -> ScriptCall[Resumed]:
        """The script that resumes the run."""
        return scripts.resume(
            run_id=self.request.run_id,
            agent_id=self.request.agent_id,
            session_id=self.request.session_id,
            input_text=self.request.input_text,
            checkpoint_id=self.request.resume_from_checkpoint or "",
            canvas=self.canvas,
            by=shown_reason(self.by),
        )

    def accepted(self, answer: Resumed) -> Accepted:
        """The resumed run. Raises the error for an answer that does not resume it."""
        request, run_id = self.request, self.request.run_id
        match answer.answer:
            case ResumeAnswer.OK | ResumeAnswer.LIVE:
                is_new = answer.answer is ResumeAnswer.OK
                return accepted_as(request, answer, answer.canvas, is_new=is_new)
            case ResumeAnswer.UNKNOWN:
                raise run_not_found(run_id)
            case ResumeAnswer.COMPLETED:
                raise error_of(
                    request,
                    RunConflict,
                    f"the run {run_id!r} has completed, so it cannot be resumed",
                    "to continue from its answer, submit a new run in the same session",
                )
            case ResumeAnswer.NO_CHECKPOINT:
                raise error_of(
                    request,
                    ConfigError,
                    f"the run {run_id!r} has no checkpoint, so it cannot be resumed",
                    "it is not durable, or its journal is gone; starting it again could repeat its effects: "
                    "submit a new run",
                )
            case ResumeAnswer.OTHER_CHECKPOINT:
                raise error_of(
                    request,
                    ConfigError,
                    f"Unknown resume_from_checkpoint {request.resume_from_checkpoint!r}",
                    f"the latest checkpoint is {answer.detail!r}; only the latest can be used",
                )
            case ResumeAnswer.OTHER_AGENT | ResumeAnswer.OTHER_SESSION | ResumeAnswer.OTHER_INPUT:
                field = _FIELDS[answer.answer]
                raise error_of(
                    request,
                    ConfigError,
                    f"the run {run_id!r} has another {field} than the request that resumes it",
                    f"the {field} of the run is {answer.detail!r}"
                    if answer.detail
                    else "leave input_text empty: the run keeps its own",
                )
            case _:
                assert_never(answer.answer)


_FIELDS = {
    ResumeAnswer.OTHER_AGENT: "agent",
    ResumeAnswer.OTHER_SESSION: "session",
    ResumeAnswer.OTHER_INPUT: "input_text",
}
"""The answers that name a field of the request which is different in the run."""
