"""The views: ask a question, show its answer."""

import json
import uuid

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404
from django.views.decorators.http import require_GET, require_POST

from openagents_worker import RedisUnreachable, SubmitUnknown
from questions.models import Question
from questions.runs import state_of, submit_on_commit


@require_POST
def ask(request: HttpRequest) -> JsonResponse:
    """Store the question and submit its run when the transaction is committed.

    If Redis is unreachable at that moment, the question is stored without a run, and the status is 503.
    `manage.py submit_missing` submits the run later.
    """
    body = json.loads(request.body)
    try:
        with transaction.atomic():
            question = Question.objects.create(
                customer=body["customer"], text=body["text"], run_id=f"question-{uuid.uuid4()}"
            )
            submit_on_commit(question)
            if body.get("give_up"):
                transaction.set_rollback(True)
    except (RedisUnreachable, SubmitUnknown) as error:
        stored = {"id": question.id, "run_id": question.run_id, "error": error.code}
        return JsonResponse(stored, status=503)
    return JsonResponse({"id": question.id, "run_id": question.run_id}, status=202)


@require_GET
def show(request: HttpRequest, question_id: int) -> JsonResponse:
    """The stored answer, and the state of the run."""
    question = get_object_or_404(Question, pk=question_id)
    return JsonResponse({"text": question.text, "answer": question.answer, "state": state_of(question)})
