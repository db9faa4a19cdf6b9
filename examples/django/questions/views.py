"""Pages: ask a question, look at its answer."""

import json

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404
from django.views.decorators.http import require_GET, require_POST
from shop.celery import run_agent

from openagents_worker import RunRequest
from questions.models import Question
from questions.tasks import store_answer


@require_POST
def ask(request: HttpRequest) -> JsonResponse:
    """The question and its run, or neither: the run is submitted when the transaction is committed."""
    asked = json.loads(request.body)
    with transaction.atomic():
        question = Question.objects.create(customer=asked["customer"], text=asked["text"])
        run = RunRequest(agent_id="clerk", session_id=asked["customer"], input_text=asked["text"])
        handle = run_agent.apply_async_on_commit((run,), link=store_answer.s(question.id))
        question.run_id = handle.id
        question.save()
        if asked.get("give_up"):
            transaction.set_rollback(True)
    return JsonResponse({"id": question.id, "run_id": question.run_id}, status=202)


@require_GET
def show(request: HttpRequest, question_id: int) -> JsonResponse:
    """The answer as it was stored, and where the run stands."""
    question = get_object_or_404(Question, pk=question_id)
    state = run_agent.AsyncResult(question.run_id).state
    return JsonResponse({"text": question.text, "answer": question.answer, "state": state})
