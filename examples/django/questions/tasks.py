"""A task of the application that is linked to a run. Celery calls it when the run has completed."""

from celery import shared_task

from openagents_worker import RunHandle
from questions.models import Question


@shared_task
def store_answer(outcome: dict[str, str], question_id: int) -> None:
    """Read the answer of the run and store it. Celery may call this twice; a repeat changes nothing."""
    answer = RunHandle(outcome["run_id"]).result["final_output"]
    Question.objects.filter(pk=question_id).update(answer=answer)
