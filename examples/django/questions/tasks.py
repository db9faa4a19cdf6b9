"""A task of the product's own, linked to a run: Celery calls it when the run has completed."""

from celery import shared_task

from openagents_worker import RunHandle
from questions.models import Question


@shared_task
def store_answer(outcome: dict[str, str], question_id: int) -> None:
    """Read the output by the run's id, and keep it. Called at least once: doing it twice changes nothing."""
    answer = RunHandle(outcome["run_id"]).result["final_output"]
    Question.objects.filter(pk=question_id).update(answer=answer)
