"""Resumptions. The only place that decides whether a failed or cancelled run may start another life."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from openagents_worker.arguments import text_of_caller
from openagents_worker.errors import ConfigError, OpenAgentsError, RequestInvalid, RunConflict
from openagents_worker.models import RunRecord, RunRequest, parse_request
from openagents_worker.redaction import shown_reason
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.keys import Keys
from openagents_worker.store.plan import Plan
from openagents_worker.store.records import record_plan, run_not_found
from openagents_worker.store.scripts import ResumeAnswer, Resumed, ScriptCall
from openagents_worker.submission.accepted import Accepted, accepted_as, error_of
from openagents_worker.submission.new_run import NewRun

__all__ = ["Resumption", "requested_resumption"]

NAMES_THE_RUN = frozenset({"agent_id", "session_id", "input_text", "run_id", "resume_from_checkpoint"})
"""The fields of a request that say which run is resumed. The script compares them."""


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


def requested_resumption(submitted: NewRun) -> Plan[Resumption]:
    """A plan that returns the resumption for a request with `resume_from_checkpoint`.

    A resumed run keeps its request and its queue, so other values for them raise `RequestInvalid`. Equal ones
    are accepted: a request may be repeated with its checkpoint. The run keeps its task options, too, unless
    this submission has options of the same name.
    """
    request, keys = submitted.request, Keys(submitted.settings.key_prefix)
    for name in ("delay_ms", "expires_ms"):
        if getattr(submitted, name):
            raise _not_changed(request, [name], "the run is resumed at once: leave it out")
    given = {
        name
        for name in request.model_fields_set - NAMES_THE_RUN
        if getattr(request, name) != RunRequest.model_fields[name].get_default(call_default_factory=True)
    }
    if given or submitted.queue:
        run = yield from record_plan(keys, request.run_id)
        if different := sorted(_different_fields(submitted, given, run)):
            hint = f"leave out {', '.join(different)}; Client.extend raises a limit, and a new run can differ"
            raise _not_changed(request, different, hint)
    if not submitted.canvas:
        return Resumption(request)
    stored = yield lambda r: r.hget(keys("run", request.run_id), "canvas")
    return Resumption(request, _merged_options(stored or "", submitted.canvas))


def _different_fields(submitted: NewRun, given: set[str], run: RunRecord) -> Iterator[str]:
    """The names of the given fields whose values are not those of the run."""
    if submitted.queue not in (None, "", run.queue):
        yield "queue"
    if run.request is None:  # it is stored in another format, or it is gone
        yield from given
        return
    asked, stored = submitted.request.model_dump(mode="json"), run.request.model_dump(mode="json")
    stored["queue"] = run.queue
    if stored["durable"] is None:
        stored["durable"] = submitted.settings.durable_default
    # The run waits at the end of the queue of its session, whatever it did when it was submitted.
    yield from (name for name in given if name == "on_busy" or asked[name] != stored[name])


def _not_changed(request: RunRequest, names: list[str], hint: str) -> OpenAgentsError:
    message = f"the run {request.run_id!r} is resumed, which cannot change {', '.join(names)}"
    return error_of(request, RequestInvalid, message, hint)


def _merged_options(stored: str, new: str) -> str:
    """The stored task options (JSON) of a run with new ones: those of the same name are replaced.

    Headers and the names of stamps are merged one by one. The signatures that are linked to the run stay.
    """
    try:
        old, options = json.loads(stored or "{}"), json.loads(new)
    except ValueError:  # unreadable stored options would fail the run
        return new
    if not isinstance(old, dict):
        return new
    merged = {**old, **options}
    if isinstance(old.get("headers"), Mapping) and isinstance(options.get("headers"), Mapping):
        merged["headers"] = {**old["headers"], **options["headers"]}
    stamps: list[Any] = [*(old.get("stamped_headers") or ()), *(options.get("stamped_headers") or ())]
    return json.dumps({**merged, **({"stamped_headers": list(dict.fromkeys(stamps))} if stamps else {})})


_FIELDS = {
    ResumeAnswer.OTHER_AGENT: "agent",
    ResumeAnswer.OTHER_SESSION: "session",
    ResumeAnswer.OTHER_INPUT: "input_text",
}
"""The answers that name a field of the request which is different in the run."""
