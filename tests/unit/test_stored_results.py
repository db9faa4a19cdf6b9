"""Older versions can read results of newer ones: unknown fields are ignored."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from openagents_worker.models import ErrorDetails, RunRecord, RunRequest, RunResult

OF_TOMORROW = {"of_tomorrow": {"any": "thing"}}
RESULT = {
    "run_id": "r1",
    "stop_reason": "failed",
    "usage": {"llm_calls": 1, **OF_TOMORROW},
    "artifacts": [{"name": "report", **OF_TOMORROW}],
    "error_details": {
        "code": "tool.error",
        "message": "no price",
        "context": {"traceback": "of price"},
        "cause": {"code": "error.unknown", "message": "KeyError", **OF_TOMORROW},
        **OF_TOMORROW,
    },
    **OF_TOMORROW,
}


def test_a_result_with_more_fields_is_read() -> None:
    """At every level; known fields are kept."""
    result: RunResult[Any] = RunResult.model_validate(RESULT)
    assert (result.usage.llm_calls, result.artifacts[0].name) == (1, "report")
    assert result.error_details is not None
    assert result.error_details.cause is not None
    record = {"run_id": "r1", "agent_id": "a", "session_id": "s", "queue": "q", "state": "failed"}
    assert RunRecord.model_validate({**record, "result": RESULT, **OF_TOMORROW}).result == result


def test_a_request_with_an_unknown_field_is_refused() -> None:
    """A mistake in a request is an error for its author; a result is read by others, so it is read
    leniently."""
    with pytest.raises(ValidationError, match="no field 'sesion_id'"):
        RunRequest.model_validate({"agent_id": "a", "sesion_id": "s", "input_text": "hi"})


def test_the_traceback_of_an_error_is_its_own_or_that_of_its_cause() -> None:
    """Stored where the version before lets it pass; only text counts."""
    own = ErrorDetails(code="a", message="b", context={"traceback": "of mine"})
    assert own.traceback == "of mine"
    assert ErrorDetails(code="a", message="b", cause=own).traceback == "of mine"
    assert ErrorDetails(code="a", message="b", context={"traceback": 3}).traceback is None
