"""`RunFailed`: the error of a failed run keeps its message and fields wherever Celery sends it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Generator
from typing import Any

import pytest
from celery import Celery

from openagents_worker.errors import OpenAgentsError, RunFailed
from tests.errors.test_every_code import DECLARED

RESULT = {"run_id": "r1", "stop_reason": "failed", "final_output": None}


@pytest.fixture
def app() -> Generator[Celery]:
    with Celery("product", backend="cache+memory://", set_as_current=False) as app:
        yield app


def failed(code: str) -> RunFailed:
    return RunFailed(f"met {code}", code=code, hint="look there", run_id="r1", result=RESULT)


def through_celerys_json(app: Celery, error: OpenAgentsError) -> Any:
    """As a result backend keeps the failure of a task, and gives it back."""
    kept = json.loads(json.dumps(app.backend.prepare_exception(error, serializer="json")))
    return app.backend.exception_to_python(kept)


@pytest.mark.parametrize("code", sorted(DECLARED))
def test_it_survives_pickling(code: str) -> None:
    """Whole, with its hint."""
    error = pickle.loads(pickle.dumps(failed(code)))  # noqa: S301 - it was just made here

    assert type(error) is RunFailed
    assert (error.to_dict(), str(error)) == (failed(code).to_dict(), str(failed(code)))


@pytest.mark.parametrize("code", sorted(DECLARED))
def test_it_survives_celerys_json(app: Celery, code: str) -> None:
    """Celery keeps an exception's arguments and nothing else: they are all that a product asks for."""
    error = through_celerys_json(app, failed(code))

    assert type(error) is RunFailed
    assert (error.code, error.message, error.run_id, error.result) == (code, f"met {code}", "r1", RESULT)


@pytest.mark.parametrize("code", sorted(DECLARED))
def test_every_other_error_of_ours_survives_it_too(app: Celery, code: str) -> None:
    """A task of the product's may let it through."""
    error = DECLARED[code]("in words")

    for again in (through_celerys_json(app, error), pickle.loads(pickle.dumps(error))):  # noqa: S301 - ours
        assert type(again) is DECLARED[code]
        assert (again.code, again.message, again.retryable) == (code, "in words", error.retryable)


def test_what_celery_shows_of_it_is_not_the_result() -> None:
    """Its events, its log and Flower contain neither the input nor the answer."""
    error = RunFailed("met", code="llm.response", run_id="r1", result={"final_output": "secret"})

    assert repr(error) == "RunFailed('met', 'llm.response', 'r1')"
    assert "secret" not in str(error)
