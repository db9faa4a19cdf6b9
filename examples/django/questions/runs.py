"""The run of a question. The only place that makes its request: submitted again, it is the same request.

The run's id is stored with the question before the run is submitted. So a run can be submitted again at any
time, by anybody: the same run_id with the same request is one run.
"""

from celery.result import AsyncResult
from shop.celery import run_agent

from openagents_worker import RunNotFound, RunRequest
from questions.models import Question
from questions.tasks import store_answer


def submit_on_commit(question: Question) -> None:
    """Submit the run when the transaction is committed; never, when it is rolled back.

    At the commit, Redis may be away. Then `transaction.atomic()` raises `RedisUnreachable` or `SubmitUnknown`
    when it ends: the question *is* stored, and its run is missing until `submit_again`.
    """
    run_agent.apply_async_on_commit((_request(question),), link=store_answer.s(question.pk))


def submit_again(question: Question) -> AsyncResult:
    """Submit the run now. Where it was accepted before, nothing new begins."""
    return run_agent.apply_async((_request(question),), link=store_answer.s(question.pk))


def state_of(question: Question) -> str:
    """Celery's state of the run; `MISSING` for a run that was never accepted."""
    try:
        return str(run_agent.AsyncResult(question.run_id).state)
    except RunNotFound:
        return "MISSING"


def _request(question: Question) -> RunRequest:
    return RunRequest(
        run_id=question.run_id, agent_id="clerk", session_id=question.customer, input_text=question.text
    )
