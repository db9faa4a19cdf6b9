"""Task state: what is reported to Celery, and so to Flower."""

from __future__ import annotations

import base64
import json
from collections.abc import Generator

import pytest
import redis
from celery import Celery, Task
from celery.exceptions import Ignore, Retry

from openagents_worker.celery.app import make_worker_app
from openagents_worker.celery.task_state import report_to_celery
from openagents_worker.errors import RunFailed
from openagents_worker.models import ErrorDetails, StopReason
from openagents_worker.producer.publisher import close_producers
from openagents_worker.runtime.attempt import AttemptOutcome, AttemptResult
from openagents_worker.settings import load_settings
from tests.support.waiting import PATIENCE_S, wait_for


@pytest.fixture
def app(redis_url: str) -> Generator[Celery]:
    app = make_worker_app(load_settings({"OPENAGENTS_REDIS_URL": redis_url}))
    yield app
    close_producers(app)
    app.close()


@pytest.fixture
def task(app: Celery) -> Generator[Task]:
    task = app.tasks["tasks.run_agent"]
    task.push_request(id="r1", hostname="w1@test")
    yield task
    task.pop_request()


def test_a_completed_run_is_a_success_without_its_output(task: Task) -> None:
    """The output is only in the run record."""
    reported = report_to_celery(
        task, "r1", AttemptResult(AttemptOutcome.FINISHED, stop_reason=StopReason.COMPLETED)
    )

    assert reported == {"run_id": "r1", "stop_reason": "completed"}


def test_a_failed_run_is_a_failure_with_its_code_only(task: Task) -> None:
    """A message may quote the user's input; a code does not."""
    error = ErrorDetails(code="llm.response", message="the secret input")

    with pytest.raises(RunFailed) as raised:
        report_to_celery(
            task, "r1", AttemptResult(AttemptOutcome.FINISHED, stop_reason=StopReason.FAILED, error=error)
        )

    assert raised.value.code == "llm.response"
    assert "secret" not in str(raised.value)


def test_a_suspended_run_is_a_retry_with_its_reason(task: Task) -> None:
    """Flower shows RETRY and the delay; no message is published."""
    with pytest.raises(Retry) as raised:
        report_to_celery(
            task, "r1", AttemptResult(AttemptOutcome.SUSPENDED, "llm.rate_limit", delay_ms=1_500)
        )

    assert raised.value.message == "llm.rate_limit"
    assert raised.value.when == 1.5


@pytest.mark.parametrize(
    ("answer", "reported"),
    [("waiting", "waiting for session"), ("not_due", "not due yet"), ("handover", "handover")],
)
def test_a_waiting_run_is_a_retry_for_every_message(task: Task, answer: str, reported: str) -> None:
    """It has not failed and does not run: Flower must not show STARTED because of a duplicate message."""
    with pytest.raises(Retry, match=reported):
        report_to_celery(task, "r1", AttemptResult(AttemptOutcome.SKIPPED, answer))


@pytest.mark.parametrize("answer", ["busy", "done", "unknown", "fenced"])
def test_a_message_with_nothing_to_do_is_ignored(task: Task, answer: str) -> None:
    """A duplicate or late message has no visible effect."""
    with pytest.raises(Ignore):
        report_to_celery(task, "r1", AttemptResult(AttemptOutcome.SKIPPED, answer))


def test_a_cancelled_run_is_shown_as_revoked(app: Celery, task: Task, redis_url: str) -> None:
    """While it was executed, or before a worker claimed it."""
    attempt_result = AttemptResult(AttemptOutcome.FINISHED, stop_reason=StopReason.CANCELLED)
    with redis.Redis.from_url(redis_url) as client, client.pubsub(ignore_subscribe_messages=True) as events:
        events.psubscribe("*celeryev/task.revoked")  # the channel of the events that Flower reads
        events.get_message(timeout=PATIENCE_S)

        with pytest.raises(Ignore):
            report_to_celery(task, "r1", attempt_result)

        message = wait_for(lambda: events.get_message(timeout=1), "Celery's event was published")
        client.flushall()  # Celery's keys are not in the cell's key table

    event = json.loads(base64.b64decode(json.loads(message["data"])["body"]))
    assert (event["type"], event["uuid"], event["hostname"]) == ("task-revoked", "r1", "w1@test")
