"""The run of a question. The only place that creates its request, so a repeated request is the same.

The id of the run is stored with the question before the run is submitted. So any process can submit the run
again at any time: the same request with the same run_id is one run.
"""

from celery.result import AsyncResult
from shop.celery import run_agent

from openagents_worker import RunNotFound, RunRequest
from questions.models import Question
from questions.tasks import store_answer


def submit_on_commit(question: Question) -> None:
    """Submit the run when the transaction is committed. If it is rolled back, no run is submitted.

    If Redis is unreachable at the commit, `transaction.atomic()` raises `RedisUnreachable` or `SubmitUnknown`
    at its end. Then the question is stored, but its run is missing until `submit_again` is called.
    """
    run_agent.apply_async_on_commit((_request(question),), link=store_answer.s(question.pk))


def submit_again(question: Question) -> AsyncResult:
    """Submit the run now. If it was accepted before, this changes nothing."""
    return run_agent.apply_async((_request(question),), link=store_answer.s(question.pk))


def state_of(question: Question) -> str:
    """The Celery state of the run, or `MISSING` if the run was never accepted."""
    try:
        return str(run_agent.AsyncResult(question.run_id).state)
    except RunNotFound:
        return "MISSING"


def _request(question: Question) -> RunRequest:
    return RunRequest(
        run_id=question.run_id, agent_id="clerk", session_id=question.customer, input_text=question.text
    )
